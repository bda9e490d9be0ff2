"""Speed and memory of focalkern beside other ways to the same loss and gradients, on the same input.

    python benchmarks/throughput.py                        # a size that suits the machine
    python benchmarks/throughput.py --quick                # every peer, in a minute
    python benchmarks/throughput.py --shape llama3-8b --tokens 8192 --dtype bf16 --json result.json
    python benchmarks/throughput.py --loss dpo focalpo alpha-dpo simpo --head full frozen
    python benchmarks/throughput.py --tokens 1024 4096 16384 65536 --plot plots
    python benchmarks/throughput.py --sharpness 16 50 200 flat --saturated 0 0.75
    python benchmarks/throughput.py --capture capture.pt   # hidden states of a real model, see capture.py
    python benchmarks/throughput.py --max-tokens 40        # the longest batch in 40 GiB, see max_tokens.py

Each peer's loss and gradients are compared with float64 first; one that is wrong is not timed. The columns:

    forward, backward, both   medians of runs that alternate between the peers; `range` is that of `both`.
                              What compiles or tunes itself has done so before. On CUDA, the time between two
                              events on the stream: at few tokens, where kernels are shorter than their
                              launch, it is the host's time that is seen
    x floor                   `both` over the time of one bare GEMM `hidden @ weight.T` in the same dtype
    kept share                of the (token, vocabulary block) pairs that the certified backward computed
    TFLOP/s                   useful operations over time, the same ones for every peer: 2NVH in the forward,
                              4NVH in the backward, 6NVH in both; with a frozen head 2NVH, and 4NVH in both.
                              What a peer computes twice or leaves out changes nothing. The table has the
                              rate of `both`, JSON all three as `tflops`: null for the forward and backward
                              of a peer that makes its gradients in the forward. (As `executed_tflops` JSON
                              has what peers execute that compute the logits once more in the backward: 2NVH
                              more there; of CCE, whose backward leaves tiles out, an upper limit)
    extra MiB, of logits      peak memory beyond the inputs and the returned gradients, also as a share of the
                              fp32 logits; on a CPU measured in a process of its own
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import max_tokens, plots
from benchmarks.capture_file import Capture, CapturedInput, CaptureError
from benchmarks.check import (
    Bound,
    Errors,
    Sample,
    SampledStep,
    choose_sample,
    error_bound,
    errors_of,
    plain_errors,
    sampled_step,
    ticks,
)
from benchmarks.inputs import SHAPES, Batch, Case, Recipe, Sequences, Shape, Source, calibrate
from benchmarks.measure import (
    PeakMemory,
    Step,
    Times,
    available_bytes,
    in_fresh_process,
    interleaved_times,
    peak_extra_bytes,
    release_cached,
    return_freed_memory,
    settle_exp,
)
from benchmarks.objectives import OBJECTIVES
from benchmarks.peers import LossFn, Peer, Unavailable, all_peers, first_line, gradients_of
from benchmarks.report import (
    CERTIFIED,
    DTYPES,
    Comparison,
    Row,
    as_json,
    environment,
    print_correctness,
    print_input,
    print_summary,
    print_times,
)

FLAT = "flat"  # sharpness of random weights
CPU_SHAPE = Shape("small", 512, 32768)
QUICK_SHAPE, QUICK_TOKENS = Shape("quick", 256, 8192), 256  # on a CPU
HEADS = {"full": False, "frozen": True}
GRADIENTS_IN_FORWARD = "its gradients are made in the forward"
GEMM_OUTPUT_BYTES = 2**31  # the bare GEMM writes into one buffer of at most this size


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    settle_exp()
    # Not a terminal: a file or a pipe has no width of its own, and 80 columns break the table.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    report = begin(options, console)
    if options.max_tokens is not None:
        report["max_tokens"] = []
        for case in cases(options):
            report["max_tokens"].append(max_tokens.find(case, options, console))
            write_json(report, options)
        report["finished"] = True
        write_json(report, options)
        return 0
    comparisons = []
    for case in cases(options):
        comparison = compare(options, case, console)
        print_times(comparison, console)
        comparisons.append(comparison)
        report["comparisons"].append(as_json(comparison))
        write_json(report, options)
    report["finished"] = True
    write_json(report, options)
    if len(comparisons) > 1:
        print_summary(comparisons, console)
    if options.json:
        console.print(f"written to {options.json}", highlight=False)
    if options.plot:
        for path in plots.write(report, options.plot):
            console.print(f"written to {path}", highlight=False)
    names = [*CERTIFIED, *(f"{name}-exact" for name in CERTIFIED)]
    ours = [comparison.rows.get(name) for comparison in comparisons for name in names]
    return 1 if any(row is not None and row.status == "failed" for row in ours) else 0


def begin(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Say where this runs, on a launch table of its own if there is one; the report so far."""
    if options.launch_table:
        from benchmarks.tune import load_table  # needs Triton

        try:
            load_table(options.launch_table)
        except ValueError as error:
            raise SystemExit(f"--launch-table: {error}") from None
    about = environment(options.device)
    console.print(
        f"{about['device']} ({options.device.upper()}), {about['threads']} threads, "
        f"torch {about['versions']['torch']}; head {options.shape.name}: "
        f"{options.shape.hidden} x {options.shape.vocab}",
        highlight=False,
    )
    if about["load_average"] is not None and about["load_average"] > about["cpus"] / 2:
        load = f"The load average is {about['load_average']:.1f} on {about['cpus']} CPUs"
        console.print(f"{load}: other work on this machine disturbs the times.", highlight=False)
    if options.quick:
        console.print(
            "--quick shows that everything runs: at so small a size, calls cost more than products, and the "
            "certified backward has nothing to leave out.",
            highlight=False,
        )
    table = str(options.launch_table) if options.launch_table else "shipped"
    about |= {
        "command": options.command,
        "repeats": options.repeats,
        "tau": options.tau,
        "launch_table": table,
    }
    return {**about, "finished": False, "comparisons": []}


def write_json(report: dict[str, Any], options: argparse.Namespace) -> None:
    """After each comparison: a run that is killed leaves what it has measured, with `finished` false."""
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        unfinished = options.json.with_name(options.json.name + ".part")
        unfinished.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        unfinished.replace(options.json)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    peers = list(all_peers())
    size = parser.add_argument_group(
        "size", "default: 2048 x 512 x 32768 on a CPU, llama3-8b with 8192 tokens on CUDA"
    )
    size.add_argument("--shape", choices=SHAPES, help="the LM head of a model")
    size.add_argument("--hidden", type=positive, metavar="H", help="hidden size, instead of --shape")
    size.add_argument("--vocab", type=positive, metavar="V", help="with --hidden")
    size.add_argument(
        "--tokens", type=positive, nargs="+", metavar="N",
        help="completion tokens of the batch in all; of a capture, the first pairs that have no more; "
        "several values are so many comparisons",
    )  # fmt: skip
    size.add_argument("--pairs", type=positive, metavar="B", help="preference pairs (default: 4)")
    size.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: fp32 bf16 on a CPU, bf16 on CUDA")
    size.add_argument(
        "--quick", action="store_true",
        help="smaller and fewer runs: llama3-8b with 2048 tokens on CUDA; on a CPU, in one thread and bf16, "
        f"{QUICK_TOKENS} x {QUICK_SHAPE.hidden} x {QUICK_SHAPE.vocab}",
    )  # fmt: skip
    what = parser.add_argument_group("what is computed", "each combination of several values is a comparison")
    what.add_argument("--loss", nargs="+", choices=OBJECTIVES, default=["dpo"], help="default: dpo")
    what.add_argument(
        "--head", nargs="+", choices=HEADS, default=["full"],
        help="full: gradients of hidden and weight (default); frozen: of hidden alone, as for LoRA",
    )  # fmt: skip
    content = parser.add_argument_group("input", "each combination of several values is a comparison")
    content.add_argument(
        "--sharpness", type=sharpness, nargs="+", metavar="K",
        help=f"softmax entries above 2^-12 per row (default: 50, a trained LM), or {FLAT}: random weights",
    )  # fmt: skip
    content.add_argument(
        "--capture",
        type=Path,
        metavar="PATH",
        help="hidden states and head of a model, from capture.py",
    )
    content.add_argument(
        "--saturated", type=share, nargs="+", default=[0.0], metavar="SHARE",
        help="share of the pairs that are saturated, with next to no gradient (default: 0)",
    )  # fmt: skip
    content.add_argument("--seed", type=int, default=0)
    run = parser.add_argument_group("run")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument("--only", nargs="+", choices=peers, default=peers, help="peers to run")
    run.add_argument(
        "--tau", type=threshold, default="auto", metavar="TAU",
        help="threshold of the certified backward, or auto for that of the dtype (default)",
    )  # fmt: skip
    run.add_argument("--repeats", type=positive, help="timed runs (default: 3 on a CPU, 20 on CUDA)")
    run.add_argument("--threads", type=positive, help="CPU threads (default: all; --quick: one)")
    run.add_argument("--no-memory", action="store_true", help="leave the memory out")
    run.add_argument(
        "--max-tokens", type=gibibytes, metavar="GIB",
        help="instead of times: the longest batch of each peer in this memory, inputs and gradients included",
    )  # fmt: skip
    run.add_argument(
        "--launch-table", type=Path, metavar="PATH", help="of a tuning run, for the triton peers"
    )
    run.add_argument(
        "--json", type=Path, metavar="PATH", help="write all numbers here, after each comparison"
    )
    run.add_argument("--plot", type=Path, metavar="DIR", help="draw the times over tokens and over sharpness")
    options = parser.parse_args(argv)
    options.command = shlex.join(["throughput.py", *(sys.argv[1:] if argv is None else argv)])

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = options.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.capture is not None:
        settle_capture(parser, options)
    else:
        settle_size(parser, options, on_cuda)
    settle_run(parser, options, on_cuda)
    return options


def settle_run(parser: argparse.ArgumentParser, options: argparse.Namespace, on_cuda: bool) -> None:
    """What is measured, and how often."""
    if any(options.saturated):
        if min(pairs for _, pairs in options.sizes) < 2:
            parser.error("--saturated: of one pair, none can be saturated beside another that is not")
        free = [name for name in options.loss if OBJECTIVES[name].reference_free]
        if free:
            parser.error(f"--saturated is by the reference, which the score of {free[0]} does not have")
    if options.max_tokens is not None and options.capture is not None:
        parser.error("--max-tokens makes batches of any length, a capture has its own: give one of them")
    if options.max_tokens is not None and on_cuda:
        memory = torch.cuda.get_device_properties(torch.device("cuda")).total_memory / 2**30
        if options.max_tokens > memory:
            parser.error(f"--max-tokens {options.max_tokens:g}: the device has {memory:.1f} GiB")
    if options.launch_table and not options.launch_table.is_file():
        parser.error(f"--launch-table: there is no file {options.launch_table}")
    if options.launch_table and not on_cuda:
        parser.error("--launch-table is for the triton peers, which need a CUDA device")
    if options.json and options.json.is_dir():
        parser.error(f"--json {options.json}: is a folder, expected a file")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which the extra `bench` of this package installs")
    if options.plot and options.plot.exists() and not options.plot.is_dir():
        parser.error(f"--plot {options.plot}: is a file, expected a folder")
    if options.plot and max(len(options.sizes), len(options.sharpness or [])) < 2:
        parser.error("--plot draws over several values of --tokens or --sharpness: give more than one")
    options.dtype = options.dtype or (["bf16"] if on_cuda or options.quick else ["fp32", "bf16"])
    # At such a size, threads that wait for one another measure what else the machine does.
    options.threads = options.threads or (1 if options.quick else torch.get_num_threads())
    options.repeats = options.repeats or (20 if on_cuda and not options.quick else 5 if on_cuda else 3)


def settle_capture(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Shape and sizes of the capture, or of as many of its first pairs as --tokens has room for."""
    given = [
        name for name in ("sharpness", "shape", "hidden", "vocab", "pairs", "quick") if getattr(options, name)
    ]
    if given:
        parser.error(f"--capture brings its own hidden states and pairs: leave out --{' and --'.join(given)}")
    try:
        capture = Capture.load(options.capture)
    except CaptureError as error:
        parser.error(f"--capture: {error}")
    options.sizes = []
    for tokens in options.tokens or [len(capture.labels)]:
        pairs = capture.pairs_within(tokens)
        if not pairs:
            parser.error(f"--tokens {tokens}: the first pair of {options.capture} has more")
        options.sizes.append((len(capture.first(pairs).labels), pairs))
    options.shape = capture.shape


def settle_size(parser: argparse.ArgumentParser, options: argparse.Namespace, on_cuda: bool) -> None:
    """Shape, tokens, pairs and sharpness of generated input."""
    if (options.hidden is None) != (options.vocab is None):
        parser.error("--hidden and --vocab go together")
    if options.hidden is not None and options.shape is not None:
        parser.error("give --shape or --hidden and --vocab, not both")
    if options.hidden is not None:
        options.shape = Shape("explicit size", options.hidden, options.vocab)
    elif options.shape is not None:
        options.shape = SHAPES[options.shape]
    elif on_cuda:
        options.shape = SHAPES["llama3-8b"]
    else:
        options.shape = QUICK_SHAPE if options.quick else CPU_SHAPE
    options.sharpness = options.sharpness or [50]
    options.pairs = options.pairs or 4
    options.sizes = []
    usual = (2048 if options.quick else 8192) if on_cuda else (QUICK_TOKENS if options.quick else 2048)
    for tokens in options.tokens or [usual]:
        if tokens % (2 * options.pairs):
            parser.error(f"--tokens {tokens} is not a multiple of 2 x {options.pairs} sequences (--pairs)")
        options.sizes.append((tokens, options.pairs))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def gibibytes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of GiB above 0, got {text}")
    return value


def sharpness(text: str) -> int | str:
    return text if text == FLAT else positive(text)


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share of at least 0 and below 1, got {text}")
    return value


def threshold(text: str) -> float | str:
    value = text if text == "auto" else float(text)
    if value != "auto" and not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected auto or a number of at least 0, got {text}")
    return value


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every combination of what was asked for."""
    for source in sources(options):
        for saturated in options.saturated:
            for head in options.head:
                for loss in options.loss:
                    yield Case(source, saturated_pairs(saturated, source.pairs), HEADS[head], loss)


def sources(options: argparse.Namespace) -> Iterator[Source]:
    """Every input asked for, in every dtype and number of tokens."""
    for dtype in (DTYPES[name] for name in options.dtype):
        for tokens, pairs in options.sizes:
            size = options.shape, tokens, pairs, dtype, options.device
            if options.capture is not None:
                yield CapturedInput(options.capture, *size)
                continue
            recipe = Recipe(*size, seed=options.seed)
            for entries in options.sharpness:
                yield replace(recipe, scale=None) if entries == FLAT else calibrate(recipe, entries)


def saturated_pairs(share: float, pairs: int) -> int:
    """The share in whole pairs: at least one where it is not 0, and never all."""
    return min(max(1, round(share * pairs)), pairs - 1) if share else 0


def compare(options: argparse.Namespace, case: Case, console: Console) -> Comparison:
    """Correctness, times and memory of every peer on one input."""
    source = case.source
    batch, sharpness = case.batch()
    print_input(source, sharpness, case.saturated, case.setting, console)

    rows, losses = load_peers(options, batch, case)
    sample = choose_sample(batch, options.seed)
    truth, plain = reference(batch, sample, source.dtype)
    bound = error_bound(plain, source.dtype)
    certified_bound = bound if options.tau == "auto" else bound.at_tau(options.tau)
    for name, loss in tqdm(losses.items(), desc="correctness", leave=False, disable=None):
        own_bound = certified_bound if name in CERTIFIED else bound
        check_peer(rows[name], loss, batch, sample, truth, own_bound)
        if rows[name].status != "ok":
            release_cached(batch.hidden.device)
    print_correctness(list(rows.values()), plain, bound, sample, source.dtype, console)

    floor = measure_times(rows, still_ok(rows, losses), batch, options.repeats)
    if not options.no_memory:
        measure_memory(rows, still_ok(rows, losses), batch, case, options)
    return Comparison(
        source, sharpness, case.saturated, case.frozen_head, case.loss, plain, bound, floor, rows
    )


def still_ok(rows: dict[str, Row], losses: dict[str, LossFn]) -> dict[str, LossFn]:
    return {name: loss for name, loss in losses.items() if rows[name].status == "ok"}


def load_peers(
    options: argparse.Namespace, batch: Batch, case: Case
) -> tuple[dict[str, Row], dict[str, LossFn]]:
    """A row for every peer, and the loss functions of those that can run."""
    rows, losses = {}, {}
    for name, peer in all_peers(options.tau).items():
        if name not in options.only:
            continue
        rows[name] = Row(peer.name, peer.recomputes, peer.gradients_in_forward)
        shortage = memory_shortage(peer, case.frozen_head, batch, case.source)
        try:
            loss = peer.load(options.device)
        except Exception as error:  # the others are still to be measured
            set_aside(rows[name], error)
            continue
        if peer.gradients_in_forward:
            rows[name].note = GRADIENTS_IN_FORWARD
        if shortage:
            rows[name].status, rows[name].note = "skipped", shortage
        else:
            losses[name] = loss
    return rows, losses


def set_aside(row: Row, error: Exception) -> None:
    """Why the peer is measured no further."""
    if isinstance(error, Unavailable):
        row.status, row.note = "skipped", str(error)
    elif isinstance(error, torch.OutOfMemoryError):
        row.status, row.note = "skipped", "ran out of memory"
    else:
        row.status, row.note = "failed", first_line(error)


def memory_shortage(peer: Peer, frozen_head: bool, batch: Batch, source: Source) -> str:
    """Why the peer is not tried, or nothing. One that runs out may take the whole process with it, on a CPU;
    on CUDA it raises an exception."""
    if source.device == "cuda":
        return ""
    needed = peer.estimated_bytes(source.shape, source.tokens, source.pairs, source.dtype, frozen_head)
    needed += min(GEMM_OUTPUT_BYTES, source.tokens * source.shape.vocab * source.dtype.itemsize)
    # The process that measures the memory has inputs of its own.
    needed += (batch.hidden.numel() + batch.weight.numel()) * source.dtype.itemsize
    available = available_bytes(torch.device(source.device))
    if needed <= 0.9 * available:
        return ""
    return f"would need about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"


def reference(batch: Batch, sample: Sample, dtype: torch.dtype) -> tuple[SampledStep, Errors]:
    """The float64 step, and what plain PyTorch in this dtype gets wrong."""
    with tqdm(total=2 * ticks(batch), desc="float64 reference", leave=False, disable=None) as bar:
        truth = sampled_step(batch, sample, torch.float64, bar.update)
        same_dtype = sampled_step(batch, sample, dtype, bar.update)
    return truth, plain_errors(truth, same_dtype)


def check_peer(
    row: Row, loss: LossFn, batch: Batch, sample: Sample, truth: SampledStep, bound: Bound
) -> None:
    """Run the peer once and compare; a wrong result or an exception makes it a failed row."""
    try:
        out = loss(batch)
        gradients = torch.autograd.grad(out.loss, batch.differentiated())
        row.errors = errors_of(out.loss.detach(), list(gradients), sample, truth)
        row.kept_share = None if out.kept_share is None else out.kept_share.item()
        row.note = "; ".join(note for note in (row.note, out.note) if note)
    except Exception as error:  # whatever a peer raises, the others are still to be measured
        set_aside(row, error)
    else:
        wrong = row.errors.verdict(bound)
        if wrong:
            row.status, row.note = "failed", wrong


def measure_times(rows: dict[str, Row], losses: dict[str, LossFn], batch: Batch, repeats: int) -> Times:
    """Times of the peers, into their rows, and of the bare GEMM."""
    inputs = batch.differentiated()
    gemms = {f"bare GEMM: {name}": Step(run, None) for name, run in bare_gemms(batch).items()}
    steps = dict(gemms)
    for name, loss in losses.items():
        steps[name] = Step(
            forward=lambda loss=loss: loss(batch).loss,
            backward=lambda value: torch.autograd.grad(value, inputs),
        )
    device = batch.hidden.device
    # What is compiled or tuned at the first call was so when the peer was compared with float64, on this
    # batch; on a CPU, where a run may take minutes, that is warm-up enough.
    warmup = 0 if device.type == "cpu" else 3

    def on_failure(name: str, error: Exception) -> None:
        if name in gemms:
            raise error
        set_aside(rows[name], error)

    with tqdm(total=(warmup + repeats) * len(steps), desc="timing", leave=False, disable=None) as bar:
        times = interleaved_times(steps, device, warmup, repeats, bar.update, on_failure)
    for name in times.keys() & losses.keys():
        rows[name].times = times[name]
    return min((times[name].both for name in gemms), key=lambda found: found.median)


def bare_gemms(batch: Batch) -> dict[str, Callable[[], None]]:
    """Ways to `hidden @ weight.T` and nothing else; the fastest is the floor of every head."""
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    rows = min(len(hidden), max(1, GEMM_OUTPUT_BYTES // (len(weight) * weight.element_size())))
    buffer = torch.empty(rows, len(weight), dtype=weight.dtype, device=weight.device)
    runs = {"into_buffer": lambda: exhaust(products_in(buffer, hidden, weight))}
    # On a CPU, torch.mm takes fp32 to MKL, which is twice as slow as oneDNN on AMD.
    has_onednn = weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if has_onednn and weight.dtype == torch.float32:
        runs["onednn_tiles"] = lambda: exhaust(onednn_products(hidden, weight))
    for warm_up in runs.values():
        warm_up()
    return runs


def products_in(buffer: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """`hidden @ weight.T` of the rows that the buffer has room for, then of the next, in their place."""
    for part in hidden.split(len(buffer)):
        yield torch.mm(part, weight.T, out=buffer[: len(part)])


def onednn_products(hidden: torch.Tensor, weight: torch.Tensor, size: int = 2048) -> Iterator[torch.Tensor]:
    """Tiles of `hidden @ weight.T`, along the vocabulary first."""
    for part in hidden.split(size):
        for tile in weight.split(size):
            yield torch.ops.mkldnn._linear_pointwise(part, tile, None, "none", [], "")


def exhaust(products: Iterator[torch.Tensor]) -> None:
    """Compute each, and hold none while the next is computed."""
    deque(products, maxlen=0)


def measure_memory(
    rows: dict[str, Row], losses: dict[str, LossFn], batch: Batch, case: Case, options: argparse.Namespace
) -> None:
    """Memory of the peers, into their rows."""

    def of_one(name: str) -> None:
        try:
            rows[name].memory = peak_memory(name, losses[name], batch, case, options)
        except Exception as error:  # out of memory: refused by the allocator, or the process was killed
            unknown = f"its memory could not be measured: {first_line(error)}"
            rows[name].note = "; ".join(note for note in (rows[name].note, unknown) if note)
        if rows[name].memory is None:
            release_cached(batch.hidden.device)

    # Most of the time of a small process is its start: two at once, where two fit for certain.
    workers = 2 if options.quick and options.device == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(of_one, losses)
        list(tqdm(done, total=len(losses), desc="memory", leave=False, disable=None))


def peak_memory(name: str, loss: LossFn, batch: Batch, case: Case, options: argparse.Namespace) -> PeakMemory:
    if options.device == "cuda":
        return peak_extra_bytes(lambda: gradients_of(loss, batch), batch.hidden.device)
    return in_fresh_process(
        cpu_memory,
        name,
        options.tau,
        case,
        batch.labels.tolist(),
        batch.sequences.cu_seqlens.tolist(),
        batch.ref_logps.tolist(),
        options.threads,
    )


def cpu_memory(
    name: str,
    tau: float | str,
    case: Case,
    labels: list[int],
    cu_seqlens: list[int],
    ref_logps: list[float],
    threads: int,
) -> PeakMemory:
    """Extra memory of one step of a peer; runs in a process of its own (`in_fresh_process`)."""
    torch.set_num_threads(threads)
    settle_exp()
    peer = all_peers(tau)[name]
    loss = peer.load("cpu")
    sequences, transform = Sequences(torch.tensor(cu_seqlens)), case.source.shape.transform
    inputs = *case.source.build(), torch.tensor(labels), sequences, torch.tensor(ref_logps), transform
    batch = case.settled(Batch(*inputs))
    # Libraries and thread stacks come with the first step, whatever its size.
    if peer.compiled:  # for this size alone
        return_freed_memory()
        gradients_of(loss, batch)
    else:
        gradients_of(loss, batch.sample(tokens=64, vocab=1024))
    return peak_extra_bytes(lambda: gradients_of(loss, batch), torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
