"""Speed and memory of focalkern beside other ways to the same loss and gradients, on one input.

    python benchmarks/throughput.py                                       # what this machine can do in a minute
    python benchmarks/throughput.py --shape llama3-8b --tokens 8192 --dtype bf16 --json result.json

Each peer's loss and gradients are compared with float64 first; one that is wrong is not timed. The columns:

    forward, backward, both   median of the runs, which alternate between the peers; the range is that of `both`
    x floor                   `both` over the time of one bare GEMM `hidden @ weight.T` in the same dtype
    extra memory              peak beyond the inputs and the returned gradients, and its share of the fp32 logits
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.check import (
    ERROR_FACTOR,
    Errors,
    Sample,
    SampledStep,
    choose_sample,
    error_bound,
    errors,
    sampled_step,
    ticks,
)
from benchmarks.inputs import SHAPES, Batch, Recipe, Shape, Sharpness, calibrate, preference_batch
from benchmarks.measure import (
    PeakMemory,
    Step,
    StepTimes,
    available_bytes,
    in_fresh_process,
    interleaved_times,
    peak_extra_bytes,
)
from benchmarks.peers import LossFn, Peer, Unavailable, all_peers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_SHAPE = Shape("small", 512, 32768)
GEMM_OUTPUT_BYTES = 2**31  # the bare GEMM writes into one buffer of at most this size
MIB = 2**20


@dataclass
class Row:
    """What was found out about one peer."""

    peer: str
    status: str = "ok"  # or "skipped", or "failed"
    note: str = ""
    errors: Errors | None = None
    times: StepTimes | None = None
    memory: PeakMemory | None = None


@dataclass
class Comparison:
    """All peers on one input."""

    recipe: Recipe
    sharpness: Sharpness
    frozen_head: bool
    bound: Errors
    floor_ms: dict[str, Any] = field(default_factory=dict)
    floor: float = float("nan")  # seconds
    rows: dict[str, Row] = field(default_factory=dict)  # by the peer's short name

    @property
    def fp32_logits_bytes(self) -> int:
        return 4 * self.recipe.tokens * self.recipe.shape.vocab


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    settle_exp()
    # Not a terminal: a file or a pipe has no width of its own, and 80 columns break the table.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    about = environment(options)
    console.print(
        f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}; "
        f"{options.shape.name}: {options.tokens} tokens x {options.shape.hidden} x {options.shape.vocab}, "
        f"{'frozen head' if options.frozen_head else 'gradients of hidden and weight'}",
        highlight=False,
    )
    comparisons = []
    for name in options.dtype:
        comparison = compare(options, DTYPES[name], console)
        print_times(comparison, console)
        comparisons.append(comparison)
    if options.json:
        report = {**about, "comparisons": [as_json(comparison) for comparison in comparisons]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        console.print(f"written to {options.json}", highlight=False)
    ours = [comparison.rows.get(name) for comparison in comparisons for name in ("triton", "torch")]
    return 1 if any(row is not None and row.status == "failed" for row in ours) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    peers = list(all_peers("certified"))
    size = parser.add_argument_group(
        "size", "default: 2048 x 512 x 32768 on a CPU, llama3-8b with 8192 tokens on CUDA"
    )
    size.add_argument("--shape", choices=SHAPES, help="the LM head of a model")
    size.add_argument("--hidden", type=positive, metavar="H", help="hidden size, instead of --shape")
    size.add_argument("--vocab", type=positive, metavar="V", help="with --hidden")
    size.add_argument("--tokens", type=positive, metavar="N", help="completion tokens of the batch in all")
    size.add_argument("--pairs", type=positive, default=4, metavar="B", help="preference pairs (default: 4)")
    size.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: fp32 bf16 on a CPU, bf16 on CUDA")
    size.add_argument("--frozen-head", action="store_true", help="no gradient of the weight (LoRA)")
    size.add_argument(
        "--sharpness", type=positive, default=50, metavar="K",
        help="softmax entries above 2^-12 per row (default: 50, a trained LM)",
    )  # fmt: skip
    size.add_argument("--seed", type=int, default=0)
    run = parser.add_argument_group("run")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument("--only", nargs="+", choices=peers, default=peers, help="peers to run")
    run.add_argument(
        "--backward", choices=("certified", "exact"), default="certified", help="focalkern's mode"
    )
    run.add_argument("--repeats", type=positive, help="timed runs (default: 3 on a CPU, 20 on CUDA)")
    run.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")
    run.add_argument("--no-memory", action="store_true", help="leave the memory out")
    run.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    options = parser.parse_args(argv)

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = options.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if (options.hidden is None) != (options.vocab is None):
        parser.error("--hidden and --vocab go together")
    if options.hidden is not None and options.shape is not None:
        parser.error("give --shape or --hidden and --vocab, not both")
    if options.hidden is not None:
        options.shape = Shape("explicit size", options.hidden, options.vocab)
    elif options.shape is not None:
        options.shape = SHAPES[options.shape]
    else:
        options.shape = SHAPES["llama3-8b"] if on_cuda else CPU_SHAPE
    options.tokens = options.tokens or (8192 if on_cuda else 2048)
    if options.tokens % (2 * options.pairs):
        parser.error(
            f"--tokens {options.tokens} is not a multiple of 2 x {options.pairs} sequences (--pairs)"
        )
    options.dtype = options.dtype or (["bf16"] if on_cuda else ["fp32", "bf16"])
    options.repeats = options.repeats or (20 if on_cuda else 3)
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def settle_exp() -> None:
    """On CPUs, torch 2.13 can get the first multi-threaded exp of a process wrong: let it be this one."""
    torch.exp(torch.randn(100))


def compare(options: argparse.Namespace, dtype: torch.dtype, console: Console) -> Comparison:
    """Correctness, times and memory of every peer in one dtype."""
    recipe = Recipe(options.shape, options.tokens, options.pairs, dtype, options.device, seed=options.seed)
    recipe = calibrate(recipe, options.sharpness)
    batch, sharpness = preference_batch(recipe)
    batch.requires_grad_(options.frozen_head)
    console.print(f"\n[bold]{name_of(dtype)}[/bold]  input: {sharpness}", highlight=False)

    rows, losses = load_peers(options, batch, dtype)
    sample = choose_sample(batch, options.seed)
    truth, bound = reference(batch, sample, dtype)
    for name, loss in losses.items():
        check(rows[name], loss, batch, sample, truth, bound)
    comparison = Comparison(recipe, sharpness, options.frozen_head, bound, rows=rows)
    print_correctness(comparison, sample, console)

    losses = {name: loss for name, loss in losses.items() if rows[name].status == "ok"}
    measure_times(comparison, losses, batch, options.repeats)
    if not options.no_memory:
        for name in tqdm(losses, desc="memory", leave=False, disable=None):
            measure_memory(rows[name], name, losses[name], batch, recipe, options)
    return comparison


def load_peers(
    options: argparse.Namespace, batch: Batch, dtype: torch.dtype
) -> tuple[dict[str, Row], dict[str, LossFn]]:
    """A row for every peer, and the loss functions of those that can run."""
    rows, losses = {}, {}
    for name, peer in all_peers(options.backward).items():
        if name not in options.only:
            continue
        rows[name] = Row(peer.name)
        try:
            losses[name] = peer.load(options.device)
        except Unavailable as reason:
            rows[name].status, rows[name].note = "skipped", str(reason)
            continue
        shortage = memory_shortage(peer, options, batch, dtype)
        if shortage:
            rows[name].status, rows[name].note = "skipped", shortage
            del losses[name]
    return rows, losses


def memory_shortage(peer: Peer, options: argparse.Namespace, batch: Batch, dtype: torch.dtype) -> str:
    """Why the peer is not tried, or nothing. A peer that does run out may take the whole process with it."""
    needed = peer.estimated_bytes(options.shape, options.tokens, dtype, options.frozen_head)
    if options.device == "cpu":
        # The process that measures the memory has inputs of its own.
        needed += (batch.hidden.numel() + batch.weight.numel()) * dtype.itemsize
    available = available_bytes(torch.device(options.device))
    if needed <= 0.9 * available:
        return ""
    return f"would need about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"


def reference(batch: Batch, sample: Sample, dtype: torch.dtype) -> tuple[SampledStep, Errors]:
    """The float64 step, and the errors that a peer in this dtype may have."""
    with tqdm(total=2 * ticks(batch), desc="float64 reference", leave=False, disable=None) as bar:
        truth = sampled_step(batch, sample, torch.float64, bar.update)
        same_dtype = sampled_step(batch, sample, dtype, bar.update)
    return truth, error_bound(truth, same_dtype, dtype)


def check(row: Row, loss: LossFn, batch: Batch, sample: Sample, truth: SampledStep, bound: Errors) -> None:
    """Run the peer once and compare; a wrong result or an exception makes it a failed row."""
    try:
        value = loss(batch)
        gradients = torch.autograd.grad(value, batch.differentiated())
        row.errors = errors(value.detach(), list(gradients), sample, truth)
    except torch.OutOfMemoryError:
        row.status, row.note = "skipped", "ran out of memory"
    except Exception as error:  # noqa: BLE001 - whatever a peer raises, the others are still to be measured
        row.status, row.note = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        exceeded = row.errors.exceeded(bound)
        if exceeded:
            row.status, row.note = "failed", f"wrong: error of {' and '.join(exceeded)} beyond the bound"


def measure_times(comparison: Comparison, losses: dict[str, LossFn], batch: Batch, repeats: int) -> None:
    floor, inputs = "bare GEMM", batch.differentiated()
    steps = {floor: Step(bare_gemm(batch), None)}
    for name, loss in losses.items():
        steps[name] = Step(
            forward=lambda loss=loss: loss(batch), backward=lambda value: torch.autograd.grad(value, inputs)
        )
    device = batch.hidden.device
    # On a CPU, where a run may take minutes, the run that was compared with float64 is warm-up enough.
    warmup = 0 if device.type == "cpu" else 3
    steps[floor].forward()
    with tqdm(total=(warmup + repeats) * len(steps), desc="timing", leave=False, disable=None) as bar:
        times = interleaved_times(steps, device, warmup, repeats, bar.update)
    comparison.floor, comparison.floor_ms = times[floor].both.median, times[floor].both.as_ms()
    for name in losses:
        comparison.rows[name].times = times[name]


def bare_gemm(batch: Batch) -> Callable[[], None]:
    """`hidden @ weight.T` and nothing else, into a buffer that is there already: the floor of every head."""
    hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    rows = min(len(hidden), max(1, GEMM_OUTPUT_BYTES // (len(weight) * weight.element_size())))
    out = torch.empty(rows, len(weight), dtype=weight.dtype, device=weight.device)

    def run() -> None:
        for part in hidden.split(rows):
            torch.mm(part, weight.T, out=out[: len(part)])

    return run


def measure_memory(
    row: Row, name: str, loss: LossFn, batch: Batch, recipe: Recipe, options: argparse.Namespace
) -> None:
    if options.device == "cuda":
        row.memory = peak_extra_bytes(lambda: gradients_of(loss, batch), batch.hidden.device)
        return
    try:
        row.memory = in_fresh_process(
            cpu_memory,
            name,
            options.backward,
            recipe,
            options.frozen_head,
            batch.labels.tolist(),
            batch.ref_logps.tolist(),
            options.threads,
        )
    except BrokenProcessPool:
        row.note = "killed while its memory was measured: the machine has too little"


def cpu_memory(
    name: str,
    backward: str,
    recipe: Recipe,
    frozen_head: bool,
    labels: list[list[int]],
    ref_logps: list[float],
    threads: int,
) -> PeakMemory:
    """Extra memory of one step of a peer; runs in a process of its own (`in_fresh_process`)."""
    torch.set_num_threads(threads)
    settle_exp()
    loss = all_peers(backward)[name].load("cpu")
    batch = Batch(*recipe.build(), torch.tensor(labels), torch.tensor(ref_logps), recipe.shape.softcap)
    batch.requires_grad_(frozen_head)
    # Libraries and thread stacks come with the first step, whatever its size.
    gradients_of(loss, batch.sample(tokens=8, vocab=1024))
    return peak_extra_bytes(lambda: gradients_of(loss, batch), torch.device("cpu"))


def gradients_of(loss: LossFn, batch: Batch) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss(batch), batch.differentiated()))


def print_correctness(comparison: Comparison, sample: Sample, console: Console) -> None:
    bound = comparison.bound
    table = Table(
        title=f"Errors against float64 on {len(sample.rows)} rows of hidden and {len(sample.vocab)} of weight; "
        f"bound: {ERROR_FACTOR:g} x plain PyTorch in {name_of(comparison.recipe.dtype)}",
        title_justify="left",
    )
    for column in ("peer", "loss", "dhidden", "dweight"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    table.add_column("verdict", overflow="fold")
    for row in comparison.rows.values():
        found = row.errors
        cells = [scientific(value) for value in (asdict(found).values() if found else (None, None, None))]
        table.add_row(row.peer, *cells, f"{row.status}: {row.note}" if row.note else row.status)
    table.add_row("bound", *(scientific(value) for value in asdict(bound).values()), "", style="dim")
    console.print(table)


def print_times(comparison: Comparison, console: Console) -> None:
    recipe = comparison.recipe
    table = Table(
        title=f"{name_of(recipe.dtype)}, {recipe.device.upper()}: {recipe.tokens} x {recipe.shape.hidden} x "
        f"{recipe.shape.vocab}, milliseconds; bare GEMM {milliseconds(comparison.floor)}; "
        f"fp32 logits {comparison.fp32_logits_bytes / MIB:.0f} MiB",
        title_justify="left",
    )
    for column in (
        "peer",
        "forward",
        "backward",
        "both",
        "range",
        "x floor",
        "tokens/s",
        "extra MiB",
        "of logits",
    ):
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
            f"{both.median / comparison.floor:.2f}",
            f"{recipe.tokens / both.median:,.0f}",
            *memory_cells(row.memory, comparison.fp32_logits_bytes),
        )
    console.print(table)
    for row in comparison.rows.values():
        if row.status == "ok" and row.note:  # the others' notes stand in the table of errors
            console.print(f"{row.peer}: {row.note}", highlight=False, markup=False)
    for speed in speed_ratios(comparison):
        owner = {"TRL head": "TRL's", "eager PyTorch": "eager PyTorch's"}[speed["over"]]
        console.print(
            f"{speed['peer']} is {speed['ratio']:.2f}x {owner} speed, forward+backward, {name_of(recipe.dtype)}",
            highlight=False,
            markup=False,
        )


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


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def as_json(comparison: Comparison) -> dict[str, Any]:
    recipe = comparison.recipe
    return {
        "shape": asdict(recipe.shape),
        "tokens": recipe.tokens,
        "pairs": recipe.pairs,
        "dtype": name_of(recipe.dtype),
        "frozen_head": comparison.frozen_head,
        "input": {
            "kind": "LM-like",
            "seed": recipe.seed,
            "scale": recipe.scale,
            **asdict(comparison.sharpness),
        },
        "error_bound": finite(asdict(comparison.bound)),
        "bare_gemm_ms": comparison.floor_ms,
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
        result["x_floor"] = row.times.both.median / comparison.floor
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


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    on_cuda = options.device == "cuda"
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if on_cuda else cpu_name(),
        "device_type": options.device,
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {name: version(name) for name in ("torch", "triton", "trl", "focalkern")},
        "python": platform.python_version(),
        "repeats": options.repeats,
        "backward": options.backward,
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


if __name__ == "__main__":
    sys.exit(main())
