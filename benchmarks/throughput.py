"""Speed and memory of focalkern beside other ways to the same loss and gradients, on one input.

    python benchmarks/throughput.py                        # a size that suits the machine
    python benchmarks/throughput.py --shape llama3-8b --tokens 8192 --dtype bf16 --json result.json

Each peer's loss and gradients are compared with float64 first; one that is wrong is not timed. The columns:

    forward, backward, both   medians of runs that alternate between the peers; `range` is that of `both`
    x floor                   `both` over the time of one bare GEMM `hidden @ weight.T` in the same dtype
    extra MiB, of logits      peak memory beyond the inputs and the returned gradients, also as a share of the
                              fp32 logits; on a CPU measured in a process of its own
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.check import (
    Errors,
    Sample,
    SampledStep,
    choose_sample,
    error_bound,
    errors_of,
    sampled_step,
    ticks,
)
from benchmarks.inputs import SHAPES, Batch, Recipe, Shape, calibrate, preference_batch
from benchmarks.measure import (
    PeakMemory,
    Step,
    Times,
    available_bytes,
    in_fresh_process,
    interleaved_times,
    peak_extra_bytes,
)
from benchmarks.peers import LossFn, Peer, Unavailable, all_peers
from benchmarks.report import (
    DTYPES,
    Comparison,
    Row,
    as_json,
    environment,
    print_correctness,
    print_times,
    short,
)

CPU_SHAPE = Shape("small", 512, 32768)
GEMM_OUTPUT_BYTES = 2**31  # the bare GEMM writes into one buffer of at most this size


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    settle_exp()
    # Not a terminal: a file or a pipe has no width of its own, and 80 columns break the table.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    about = environment(options.device)
    console.print(
        f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}; "
        f"{options.shape.name}: {options.tokens} tokens x {options.shape.hidden} x {options.shape.vocab}, "
        f"{'frozen head' if options.frozen_head else 'gradients of hidden and weight'}",
        highlight=False,
    )
    if about["load_average"] is not None and about["load_average"] > about["cpus"] / 2:
        load = f"The load average is {about['load_average']:.1f} on {about['cpus']} CPUs"
        console.print(f"{load}: other work on this machine disturbs the times.", highlight=False)
    comparisons = []
    for name in options.dtype:
        comparison = compare(options, DTYPES[name], console)
        print_times(comparison, console)
        comparisons.append(comparison)
    if options.json:
        about |= {"repeats": options.repeats, "backward": options.backward}
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
    console.print(f"\n[bold]{short(dtype)}[/bold]  input: {sharpness}", highlight=False)

    rows, losses = load_peers(options, batch, dtype)
    sample = choose_sample(batch, options.seed)
    truth, bound = reference(batch, sample, dtype)
    for name, loss in losses.items():
        check_peer(rows[name], loss, batch, sample, truth, bound)
    print_correctness(rows.values(), bound, sample, dtype, console)

    losses = {name: loss for name, loss in losses.items() if rows[name].status == "ok"}
    floor = measure_times(rows, losses, batch, options.repeats)
    if not options.no_memory:
        for name in tqdm(losses, desc="memory", leave=False, disable=None):
            measure_memory(rows[name], name, losses[name], batch, recipe, options)
    return Comparison(recipe, sharpness, options.frozen_head, bound, floor, rows)


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
    needed += min(GEMM_OUTPUT_BYTES, options.tokens * options.shape.vocab * dtype.itemsize)
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


def check_peer(
    row: Row, loss: LossFn, batch: Batch, sample: Sample, truth: SampledStep, bound: Errors
) -> None:
    """Run the peer once and compare; a wrong result or an exception makes it a failed row."""
    try:
        value = loss(batch)
        gradients = torch.autograd.grad(value, batch.differentiated())
        row.errors = errors_of(value.detach(), list(gradients), sample, truth)
    except torch.OutOfMemoryError:
        row.status, row.note = "skipped", "ran out of memory"
    except Exception as error:  # whatever a peer raises, the others are still to be measured
        row.status, row.note = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        exceeded = row.errors.exceeded(bound)
        if exceeded:
            row.status, row.note = "failed", f"wrong: error of {' and '.join(exceeded)} beyond the bound"


def measure_times(rows: dict[str, Row], losses: dict[str, LossFn], batch: Batch, repeats: int) -> Times:
    """Times of the peers, into their rows, and of the bare GEMM."""
    inputs = batch.differentiated()
    gemms = {f"bare GEMM: {way.__name__}": Step(way, None) for way in bare_gemms(batch)}
    steps = dict(gemms)
    for name, loss in losses.items():
        steps[name] = Step(
            forward=lambda loss=loss: loss(batch), backward=lambda value: torch.autograd.grad(value, inputs)
        )
    device = batch.hidden.device
    # On a CPU, where a run may take minutes, the run that was compared with float64 is warm-up enough.
    warmup = 0 if device.type == "cpu" else 3
    with tqdm(total=(warmup + repeats) * len(steps), desc="timing", leave=False, disable=None) as bar:
        times = interleaved_times(steps, device, warmup, repeats, bar.update)
    for name in losses:
        rows[name].times = times[name]
    return min((times[name].both for name in gemms), key=lambda found: found.median)


def bare_gemms(batch: Batch) -> list[Callable[[], None]]:
    """Ways to `hidden @ weight.T` and nothing else; the fastest is the floor of every head."""
    hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    rows = min(len(hidden), max(1, GEMM_OUTPUT_BYTES // (len(weight) * weight.element_size())))
    out = torch.empty(rows, len(weight), dtype=weight.dtype, device=weight.device)

    def into_buffer() -> None:
        for part in hidden.split(rows):
            torch.mm(part, weight.T, out=out[: len(part)])

    def onednn_tiles() -> None:
        for part in hidden.split(2048):
            for tile in weight.split(2048):
                torch.ops.mkldnn._linear_pointwise(part, tile, None, "none", [], "")

    ways = [into_buffer]
    # On a CPU, torch.mm takes fp32 to MKL, which is twice as slow as oneDNN on AMD.
    has_onednn = weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if has_onednn and weight.dtype == torch.float32:
        ways.append(onednn_tiles)
    for warm_up in ways:
        warm_up()
    return ways


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
    except RuntimeError as error:  # out of memory: refused by the allocator, or the process was killed
        row.note = f"its memory could not be measured: {error}".splitlines()[0]


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


if __name__ == "__main__":
    sys.exit(main())
