"""What the benchmark tells: tables on the screen and JSON with every number. `throughput.py` fills it."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.check import ERROR_FACTOR, Errors, Sample
from benchmarks.inputs import Recipe, Sharpness
from benchmarks.measure import PeakMemory, StepTimes, Times

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Row:
    """What was found out about one peer."""

    peer: str
    status: str = "ok"  # or "skipped", or "failed"
    note: str = ""
    errors: Errors | None = None
    times: StepTimes | None = None
    memory: PeakMemory | None = None


@dataclass(frozen=True)
class Comparison:
    """All peers on one input."""

    recipe: Recipe
    sharpness: Sharpness
    frozen_head: bool
    bound: Errors
    floor: Times  # of the bare GEMM
    rows: dict[str, Row]  # by the peer's short name

    @property
    def fp32_logits_bytes(self) -> int:
        return 4 * self.recipe.tokens * self.recipe.shape.vocab


def print_correctness(
    rows: Iterable[Row], bound: Errors, sample: Sample, dtype: torch.dtype, console: Console
) -> None:
    table = Table(
        title=f"Errors against float64, {len(sample.rows)} rows of dhidden, {len(sample.vocab)} of dweight; "
        f"bound: {ERROR_FACTOR:g} x plain PyTorch in {short(dtype)}",
        title_justify="left",
    )
    for column in ("peer", "loss", "dhidden", "dweight"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    table.add_column("verdict", overflow="fold")
    for row in rows:
        found = row.errors
        cells = [scientific(value) for value in (asdict(found).values() if found else (None, None, None))]
        table.add_row(row.peer, *cells, f"{row.status}: {row.note}" if row.note else row.status)
    table.add_row("bound", *(scientific(value) for value in asdict(bound).values()), "", style="dim")
    console.print(table)


def print_times(comparison: Comparison, console: Console) -> None:
    recipe = comparison.recipe
    table = Table(
        title=f"{short(recipe.dtype)}, {recipe.device.upper()}: {recipe.tokens} x {recipe.shape.hidden} x "
        f"{recipe.shape.vocab}, milliseconds; bare GEMM {milliseconds(comparison.floor.median)}; "
        f"fp32 logits {comparison.fp32_logits_bytes / MIB:.0f} MiB",
        title_justify="left",
    )
    columns = "peer", "forward", "backward", "both", "range", "x floor", "tokens/s", "extra MiB", "of logits"
    for column in columns:
        table.add_column(column, justify="left" if column == "peer" else "right")
    for row in comparison.rows.values():
        if row.times is None:
            table.add_row(row.peer, row.status, *[""] * 7)
            continue
        both = row.times.both
        table.add_row(
            row.peer,
            milliseconds(row.times.forward.median),
            milliseconds(row.times.backward.median),
            milliseconds(both.median),
            f"{milliseconds(min(both.samples))}-{milliseconds(max(both.samples))}",
            f"{both.median / comparison.floor.median:.2f}",
            f"{recipe.tokens / both.median:,.0f}",
            *memory_cells(row.memory, comparison.fp32_logits_bytes),
        )
    console.print(table)
    for row in comparison.rows.values():
        if row.status == "ok" and row.note:  # the others' notes stand in the table of errors
            console.print(f"{row.peer}: {row.note}", highlight=False, markup=False)
    for speed in speed_ratios(comparison):
        owner = {"TRL head": "TRL's", "eager PyTorch": "eager PyTorch's"}[speed["over"]]
        what = f"{owner} speed, forward+backward, {short(recipe.dtype)}"
        console.print(f"{speed['peer']} is {speed['ratio']:.2f}x {what}", highlight=False)


def memory_cells(memory: PeakMemory | None, logits: int) -> tuple[str, str]:
    if memory is None:
        return "", ""
    sign = "<= " if memory.upper_limit else ""
    return f"{sign}{memory.extra / MIB:,.0f}", f"{sign}{memory.extra / logits:.3f}"


def speed_ratios(comparison: Comparison) -> list[dict[str, Any]]:
    """How many times faster each of our backends is than TRL's head and eager PyTorch, forward+backward."""
    ratios = []
    for ours in ("triton", "torch"):
        for other in ("trl", "eager"):
            mine, theirs = (comparison.rows.get(name) for name in (ours, other))
            if mine and theirs and mine.times and theirs.times:
                ratio = theirs.times.both.median / mine.times.both.median
                ratios.append({"peer": mine.peer, "over": theirs.peer, "ratio": ratio})
    return ratios


def milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.4g}"


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def short(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def as_json(comparison: Comparison) -> dict[str, Any]:
    recipe = comparison.recipe
    return {
        "shape": asdict(recipe.shape),
        "tokens": recipe.tokens,
        "pairs": recipe.pairs,
        "dtype": short(recipe.dtype),
        "frozen_head": comparison.frozen_head,
        "input": {
            "kind": "LM-like",
            "seed": recipe.seed,
            "scale": recipe.scale,
            **asdict(comparison.sharpness),
        },
        "error_bound": finite(asdict(comparison.bound)),
        "bare_gemm_ms": comparison.floor.as_ms(),
        "fp32_logits_bytes": comparison.fp32_logits_bytes,
        "rows": [row_as_json(row, comparison) for row in comparison.rows.values()],
        "speed_ratios": speed_ratios(comparison),
    }


def row_as_json(row: Row, comparison: Comparison) -> dict[str, Any]:
    result: dict[str, Any] = {"peer": row.peer, "status": row.status, "note": row.note}
    if row.errors is not None:
        result["errors"] = finite(asdict(row.errors))
    if row.times is not None:
        result["forward_ms"] = row.times.forward.as_ms()
        result["backward_ms"] = row.times.backward.as_ms()
        result["both_ms"] = row.times.both.as_ms()
        result["x_floor"] = row.times.both.median / comparison.floor.median
        result["tokens_per_second"] = comparison.recipe.tokens / row.times.both.median
    if row.memory is not None:
        result["extra_bytes"] = row.memory.extra
        result["extra_bytes_is_upper_limit"] = row.memory.upper_limit
        result["share_of_fp32_logits"] = row.memory.extra / comparison.fp32_logits_bytes
    return result


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
        "versions": {name: version(name) for name in ("torch", "triton", "trl", "focalkern")},
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
    """Commit of the tree that this file is in, marked when the tree differs from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
