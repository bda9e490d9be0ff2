"""What the benchmark tells: tables on the screen and JSON with every number. `throughput.py` fills it."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.check import ERROR_FACTOR, Bound, Errors, Sample
from benchmarks.inputs import SATURATED_U, Sharpness, Source
from benchmarks.measure import PeakMemory, StepTimes, Times

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
CERTIFIED = ("triton", "torch")  # peers with the certified backward, by short name; beside them "*-exact"
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "focalkern")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Row:
    """What was found out about one peer."""

    peer: str
    recomputes: bool = False  # the logits, in the backward
    gradients_in_forward: bool = False
    status: str = "ok"  # or "skipped", or "failed"
    note: str = ""
    errors: Errors | None = None
    kept_share: float | None = None
    times: StepTimes | None = None
    memory: PeakMemory | None = None


@dataclass(frozen=True)
class Comparison:
    """All peers on one input."""

    source: Source
    sharpness: Sharpness
    saturated_pairs: int
    frozen_head: bool
    loss: str  # name of the objective
    plain: Errors  # of plain PyTorch in the same dtype
    bound: Bound
    floor: Times  # of the bare GEMM
    rows: dict[str, Row]  # by the peer's short name

    @property
    def fp32_logits_bytes(self) -> int:
        return 4 * self.source.tokens * self.source.shape.vocab

    def operations(self, *, recomputed: bool = False) -> dict[str, int]:
        """Floating-point operations of the exact computation: 2NVH for the logits in the forward; in the
        backward 2NVH for dhidden, for dweight unless the head is frozen, and for the logits if recomputed.
        """
        source = self.source
        one_product = 2 * source.tokens * source.shape.vocab * source.shape.hidden
        products = (1 if self.frozen_head else 2) + (1 if recomputed else 0)
        return {
            part: count * one_product
            for part, count in (("forward", 1), ("backward", products), ("both", 1 + products))
        }


def print_input(
    source: Source, sharpness: Sharpness, saturated_pairs: int, setting: str, console: Console
) -> None:
    """What is compared; `setting` is the loss and which gradients are taken."""
    about = source.about()
    kind = about["kind"]
    if kind == "captured":
        kind += f" from {about['model']} on {about['data']}, reference {about['reference']}"
    size = f"{source.tokens} tokens, {source.pairs} pairs, {setting}"
    console.print(f"\n[bold]{short(source.dtype)}[/bold]  {size}", highlight=False)
    console.print(f"      input: {kind}; {sharpness}", highlight=False)
    if saturated_pairs:
        saturation = f"{saturated_pairs} of {source.pairs} pairs saturated, at u = {SATURATED_U:g}"
        console.print(f"      {saturation}", highlight=False)


def print_correctness(
    rows: Sequence[Row], plain: Errors, bound: Bound, sample: Sample, dtype: torch.dtype, console: Console
) -> None:
    """The errors; of those of the scale, the largest of loss and gradients."""
    table = Table(
        title=f"Errors against float64, {len(sample.rows)} rows of dhidden, {len(sample.vocab)} of dweight; "
        f"bound: {ERROR_FACTOR:g} x plain PyTorch in {short(dtype)}; scale within {bound.scale.dhidden:g} "
        f"(loss {bound.scale.loss:g}) of float64 or of plain PyTorch",
        title_justify="left",
    )
    for column in ("peer", "loss", "dhidden", "dweight", "scale"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    table.add_column("verdict", overflow="fold")
    for row in rows:
        found = row.errors
        verdict = f"{row.status}: {row.note}" if row.note else row.status
        table.add_row(row.peer, *error_cells(found), verdict)
    as_trl = f"{short(dtype)} logits and {short(dtype)} dz, as TRL computes"
    table.add_row("plain PyTorch, same dtype", *error_cells(plain), as_trl, style="dim")
    table.add_row("bound", *error_cells(bound.errors)[:-1], "", "", style="dim")
    console.print(table)


def print_times(comparison: Comparison, console: Console) -> None:
    source = comparison.source
    table = Table(
        title=f"{comparison.loss}, {short(source.dtype)}, {source.device.upper()}: "
        f"{source.tokens} x {source.shape.hidden} x {source.shape.vocab}, milliseconds; "
        f"bare GEMM {milliseconds(comparison.floor.median)}; "
        f"fp32 logits {comparison.fp32_logits_bytes / MIB:.0f} MiB",
        title_justify="left",
    )
    columns = ["peer", "forward", "backward", "both", "range", "x floor", "kept share", "tokens/s"]
    for column in [*columns, "TFLOP/s", "extra MiB", "of logits"]:
        table.add_column(column, justify="left" if column == "peer" else "right")
    for row in comparison.rows.values():
        if row.times is None:
            table.add_row(row.peer, row.status)
            continue
        both = row.times.both
        table.add_row(
            row.peer,
            milliseconds(row.times.forward.median),
            milliseconds(row.times.backward.median),
            milliseconds(both.median),
            f"{milliseconds(min(both.samples))}-{milliseconds(max(both.samples))}",
            f"{both.median / comparison.floor.median:.2f}",
            percent(row.kept_share),
            f"{source.tokens / both.median:,.0f}",
            f"{tera(comparison.operations()['both'], both):.3g}",
            *memory_cells(row.memory, comparison.fp32_logits_bytes),
        )
    console.print(table)
    for row in comparison.rows.values():
        if row.status == "ok" and row.note:  # the others' notes stand in the table of errors
            console.print(f"{row.peer}: {row.note}", highlight=False, markup=False)
    for speed in speed_ratios(comparison):
        owner = "TRL" if speed["over"] == "TRL head" else speed["over"]
        what = f"{owner}'s speed, forward+backward, {short(source.dtype)}"
        console.print(f"{speed['peer']} is {speed['ratio']:.2f}x {what}", highlight=False)


def memory_cells(memory: PeakMemory | None, logits: int) -> tuple[str, str]:
    if memory is None:
        return "", ""
    sign = "<= " if memory.upper_limit else ""
    return f"{sign}{memory.extra / MIB:,.0f}", f"{sign}{memory.extra / logits:.3f}"


def print_summary(comparisons: Sequence[Comparison], console: Console) -> None:
    """What the certified backward gains on each of several inputs, and how exact it is."""
    table = Table(
        title="The certified backward on all inputs; errors as multiples of plain PyTorch's in that dtype",
        title_justify="left",
    )
    rivals = {"trl": "x TRL", "eager": "x eager", "exact": "x exact"}
    columns = ["input", "entries", "saturated", "peer", "kept share", "backward", "both", *rivals.values()]
    for column in [*columns, "dhidden", "dweight"]:
        table.add_column(column, justify="left" if column in ("input", "peer") else "right")
    for comparison in comparisons:
        source = comparison.source
        for name in CERTIFIED:
            row = comparison.rows.get(name)
            if row is None or row.times is None or row.errors is None:
                continue
            errors = row.errors.multiples_of(comparison.plain)
            others = [comparison.rows.get(f"{name}-exact" if rival == "exact" else rival) for rival in rivals]
            table.add_row(
                setting_of(comparison, comparisons),
                f"{comparison.sharpness.entries:.0f}",
                f"{comparison.saturated_pairs} of {source.pairs}",
                name,
                percent(row.kept_share),
                milliseconds(row.times.backward.median),
                milliseconds(row.times.both.median),
                *(multiple(speed_ratio(row, other)) for other in others),
                multiple(errors["dhidden"]),
                multiple(errors["dweight"]),
            )
    if table.row_count:
        console.print(table)


def setting_of(comparison: Comparison, comparisons: Sequence[Comparison]) -> str:
    """Dtype and kind of input, and what else is not the same in all comparisons."""
    source = comparison.source
    words = [short(source.dtype), source.about()["kind"]]
    if len({other.source.tokens for other in comparisons}) > 1:
        words.append(f"{source.tokens} tokens")
    if len({other.loss for other in comparisons}) > 1:
        words.append(comparison.loss)
    if len({other.frozen_head for other in comparisons}) > 1:
        words.append("frozen head" if comparison.frozen_head else "full")
    return ", ".join(words)


def speed_ratios(comparison: Comparison) -> list[dict[str, Any]]:
    """How many times faster our certified backward is than each of the others and our exact one."""
    ratios = []
    ours = {*CERTIFIED, *(f"{name}-exact" for name in CERTIFIED)}
    for name in CERTIFIED:
        mine = comparison.rows.get(name)
        for other, theirs in comparison.rows.items():
            if other in ours and other != f"{name}-exact":
                continue
            ratio = speed_ratio(mine, theirs)
            if mine and theirs and ratio is not None:
                ratios.append({"peer": mine.peer, "over": theirs.peer, "ratio": ratio})
    return ratios


def speed_ratio(row: Row | None, other: Row | None) -> float | None:
    """How many times faster one peer is than another, forward+backward, where both were timed."""
    if row is None or other is None or row.times is None or other.times is None:
        return None
    return other.times.both.median / row.times.both.median


def tera(operations: int, times: Times) -> float:
    """TFLOP/s."""
    return operations / times.median / 1e12


def milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.4g}"


def multiple(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def error_cells(errors: Errors | None) -> list[str]:
    """Errors of loss, dhidden and dweight, and the one of the scale that is furthest from 0."""
    if errors is None:
        return [""] * 4
    scales = [value for value in vars(errors.scale).values() if value is not None]
    return [scientific(value) for value in (*errors.norms.values(), max(scales, key=badness))]


def badness(error: float) -> float:
    return math.inf if math.isnan(error) else abs(error)


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def short(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def as_json(comparison: Comparison) -> dict[str, Any]:
    source = comparison.source
    return {
        "shape": asdict(source.shape),
        "tokens": source.tokens,
        "pairs": source.pairs,
        "saturated_pairs": comparison.saturated_pairs,
        "dtype": short(source.dtype),
        "frozen_head": comparison.frozen_head,
        "loss": comparison.loss,
        "input": {**source.about(), **asdict(comparison.sharpness)},
        "plain_pytorch_errors": finite(comparison.plain.norms),
        "plain_pytorch_scale_errors": finite(asdict(comparison.plain.scale)),
        "error_bound": finite(comparison.bound.errors.norms),
        "scale_error_bound": finite(asdict(comparison.bound.scale)),
        "bare_gemm_ms": comparison.floor.as_ms(),
        "fp32_logits_bytes": comparison.fp32_logits_bytes,
        "rows": [row_as_json(name, row, comparison) for name, row in comparison.rows.items()],
        "speed_ratios": speed_ratios(comparison),
    }


def row_as_json(name: str, row: Row, comparison: Comparison) -> dict[str, Any]:
    result: dict[str, Any] = {"id": name, "peer": row.peer, "status": row.status, "note": row.note}
    if row.errors is not None:
        result["errors"] = finite(row.errors.norms)
        result["scale_errors"] = finite(asdict(row.errors.scale))
    if row.kept_share is not None:
        result["kept_share"] = row.kept_share
    if row.times is not None:
        result["forward_ms"] = row.times.forward.as_ms()
        result["backward_ms"] = row.times.backward.as_ms()
        result["both_ms"] = row.times.both.as_ms()
        result["x_floor"] = row.times.both.median / comparison.floor.median
        result["tokens_per_second"] = comparison.source.tokens / row.times.both.median
        result["tflops"] = tflops(row, comparison.operations())
        if row.recomputes:
            result["executed_tflops"] = tflops(row, comparison.operations(recomputed=True))
    if row.memory is not None:
        result["extra_bytes"] = row.memory.extra
        result["extra_bytes_is_upper_limit"] = row.memory.upper_limit
        result["share_of_fp32_logits"] = row.memory.extra / comparison.fp32_logits_bytes
    return result


def tflops(row: Row, operations: dict[str, int]) -> dict[str, float | None]:
    """None for the forward and the backward of a peer that does the one's work in the other."""
    return {
        part: None if row.gradients_in_forward and part != "both" else tera(count, getattr(row.times, part))
        for part, count in operations.items()
    }


def finite(values: dict[str, float | None]) -> dict[str, float | str | None]:
    """JSON has no NaN or infinity: they become words."""
    return {
        name: value if value is None or math.isfinite(value) else str(value) for name, value in values.items()
    }


def environment(device_type: str) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device_type == "cuda" else cpu_name(),
        "device_type": device_type,
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the tree that this file is in, marked "-dirty" when the tree differs from it: what runs, that
    is, not the results that an earlier run has written, nor the pages made of them."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        others = [":!benchmarks/results", ":!*.md", ":!*.png"]
        changed = git("status", "--porcelain", "--untracked-files=no", ".", *others)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
