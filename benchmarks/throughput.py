"""Speed, memory and error of focalkern beside other ways to the same loss and gradients, on the same input.

    python benchmarks/throughput.py                        # a size that suits the machine
    python benchmarks/throughput.py --quick                # without compiled peers and memory
    python benchmarks/throughput.py --shape llama3-8b --tokens 8192 --dtype bf16 --json result.json
    python benchmarks/throughput.py --loss dpo focalpo alpha-dpo simpo --head full frozen
    python benchmarks/throughput.py --tokens 1024 4096 16384 65536 --plot plots
    python benchmarks/throughput.py --sharpness 16 50 200 flat --saturated 0 0.75
    python benchmarks/throughput.py --capture capture.pt   # hidden states of a real model, see capture.py

Each peer's loss and gradients are compared with float64 first; a wrong peer is not timed.

    fwd, both      medians of runs that alternate between the peers. Compilation and tuning come before
    x focalkern    the peer's time of both over that of focalkern: below 1, the peer is faster
    kept           share of the (token, vocabulary block) pairs that the certified backward computed
    extra          peak memory beyond inputs and gradients; ≤ where only a limit could be told
    error          relative L2 error of dhidden against float64

JSON has more: all runs, backward, errors of loss and dweight, the bare GEMM `hidden @ weight.T`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

# Where other processes want the cores too, threads that spin at every barrier cost several times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure, parser_of
from benchmarks.check import Gate
from benchmarks.inputs import OBJECTIVES, SHAPES, Batch, Capture, Case, FromFile, Recipe, Shape, calibrate
from benchmarks.measure import PeakMemory, Step
from benchmarks.peers import PEERS, LossFn, Unavailable, first_line, gradients_of
from benchmarks.report import DTYPES, OURS, environment, plots, terminal, wrapped, write_json
from focalkern.torch_logits import HAS_BF16_PRODUCTS, matmul

FLAT = "flat"  # sharpness of random weights
CPU_SHAPE = Shape("small", 512, 32768)
QUICK_PEERS = ("triton", "torch", "torch-exact", "eager", "trl")
GEMM = "bare GEMM"  # its name among the peers
GEMM_TILE = 2048  # rows and vocabulary entries on a CPU; on CUDA all entries, and rows to fill the bytes
GEMM_OUTPUT_BYTES = 2**31

Rows = dict[str, dict[str, Any]]  # what was found out about each peer, as in the JSON file


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    report = environment(options.device)
    device = f"{report['device']} ({options.device.upper()})"
    print(f"{device}, {report['threads']} threads, torch {report['versions']['torch']}")
    if (report["load_average"] or 0) > report["cpus"] / 2:
        load = f"The load average is {report['load_average']:.1f} on {report['cpus']} CPUs"
        print(wrapped(f"{load}: other work on this machine disturbs the times."))
    if options.quick:
        print("--quick leaves compiled peers and memory out; a full run has them.")
    report |= {"command": options.command, "repeats": options.repeats, "finished": False, "comparisons": []}
    with measure.memory_limit(options.device):
        for case in cases(options):
            report["comparisons"].append(compare(options, case))
            print(terminal(report["comparisons"][-1]))
            if options.json:
                write_json(report, options.json)  # what a run that is killed leaves
    if options.json:
        write_json(report | {"finished": True}, options.json)
        print(f"written to {options.json}")
    for path in plots(report, options.plot) if options.plot else []:
        print(f"written to {path}")
    rows = [row for comparison in report["comparisons"] for row in comparison["rows"]]
    failed = {row["id"].removesuffix("-exact") for row in rows if row["status"] == "failed"}
    return 1 if failed.intersection(OURS) else 0


# Options


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    positive, share = number(int, "a positive integer", 1), number(float, "at least 0 and below 1", 0, 1)
    add = parser.add_argument_group("size, by default 2048 x 512 x 32768, llama3-8b on CUDA").add_argument
    add("--shape", type=shape, help=f"H x V of the LM head, as 512x32768, or one of {', '.join(SHAPES)}")
    add("--tokens", type=positive, nargs="+", metavar="N", help="completion tokens of the batch in all")
    add("--pairs", type=positive, metavar="B", help="preference pairs (default: 4)")
    add("--dtype", nargs="+", choices=DTYPES, help="default: bf16 on CUDA; fp32 on a CPU, and bf16 if it has "
        "instructions for it")  # fmt: skip
    add("--quick", action="store_true", help="fewer tokens, peers and runs; one dtype")
    add = parser.add_argument_group("input; each combination of several values is a comparison").add_argument
    add("--loss", nargs="+", choices=OBJECTIVES, default=["dpo"], help="default: dpo")
    add("--head", nargs="+", choices=("full", "frozen"), default=["full"],
        help="gradients of hidden and weight (full, default) or of hidden alone, as for LoRA")  # fmt: skip
    add("--sharpness", type=lambda text: text if text == FLAT else positive(text), nargs="+", metavar="K",
        help=f"softmax entries above 2^-12 per row (default: 50, a trained LM); {FLAT}: random")  # fmt: skip
    add("--capture", type=Path, metavar="PATH", help="hidden states and head of a model, from capture.py")
    add("--saturated", type=share, nargs="+", default=[0.0], metavar="SHARE",
        help="share of the pairs that are saturated, with next to no gradient (default: 0)")  # fmt: skip
    add = parser.add_argument_group("run").add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--only", nargs="+", choices=PEERS, metavar="PEER", help=f"of {' '.join(PEERS)}")
    add("--repeats", type=positive, help="timed runs (default: 3 on a CPU, 20 on CUDA)")
    add("--no-memory", action="store_true", help="leave the memory out")
    add("--json", type=Path, metavar="PATH", help="write all numbers here, after each comparison")
    add("--plot", type=Path, metavar="DIR", help="draw the times over tokens and over sharpness")
    options = parser.parse_args(argv)
    options.command = shlex.join(["throughput.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        settle(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def number(kind: type, range_: str, least: float, below: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: a number in this range."""

    def parsed(text: str) -> float:
        if not least <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"expected {range_}, got {text}")
        return kind(text)

    return parsed


def shape(text: str) -> Shape:
    return SHAPES.get(text) or Shape("explicit size", *map(number(int, "positive sizes", 1), text.split("x")))


def settle(options: argparse.Namespace) -> None:
    """Defaults of what was not given; `ValueError` for what cannot be."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = options.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if options.capture is not None:
        names = ("sharpness", "shape", "tokens", "pairs", "quick")
        if given := [f"--{name}" for name in names if getattr(options, name)]:
            raise ValueError(f"--capture brings its own input: leave out {' and '.join(given)}")
        capture = Capture.load(options.capture)
        options.shape, options.tokens, options.pairs = capture.shape, [len(capture.labels)], capture.pairs
    else:
        options.shape = options.shape or (SHAPES["llama3-8b"] if on_cuda else CPU_SHAPE)
        usual = (8192 if on_cuda else 2048) // (4 if options.quick else 1)
        options.tokens, options.pairs = options.tokens or [usual], options.pairs or 4
        options.sharpness = options.sharpness or [50]
        if wrong := [tokens for tokens in options.tokens if tokens % (2 * options.pairs)]:
            raise ValueError(f"--tokens {wrong[0]} is not a multiple of 2 x {options.pairs} (--pairs)")
    free = [name for name in options.loss if OBJECTIVES[name].reference_free]
    if any(options.saturated) and free:
        raise ValueError(f"--saturated is by the reference, which the score of {free[0]} does not have")
    if options.json and options.json.is_dir():
        raise ValueError(f"--json {options.json}: is a folder, expected a file")
    if options.plot and options.plot.is_file():
        raise ValueError(f"--plot {options.plot}: is a file, expected a folder")
    if any(options.saturated) and options.pairs < 2:
        raise ValueError("--saturated: of one pair, none can be saturated beside another that is not")
    if options.plot and max(len(options.tokens), len(options.sharpness or [])) < 2:
        raise ValueError("--plot draws over several values of --tokens or --sharpness: give more than one")
    usual = ["fp32", "bf16"] if HAS_BF16_PRODUCTS else ["fp32"]
    options.dtype = options.dtype or (["bf16"] if on_cuda else usual[-1:] if options.quick else usual)
    options.only = options.only or (QUICK_PEERS if options.quick else list(PEERS))
    options.no_memory |= options.quick
    options.repeats = options.repeats or (20 if on_cuda and not options.quick else 3)


# Comparisons


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every combination of what was asked for."""
    pairs = options.pairs
    for dtype, tokens in itertools.product(options.dtype, options.tokens):
        size = options.shape, tokens, pairs, DTYPES[dtype], options.device
        if options.capture is not None:
            sources = [FromFile(*size, path=options.capture)]
        else:
            recipe = Recipe(*size, scale=None)
            sources = [recipe if x == FLAT else calibrate(recipe, x) for x in options.sharpness]
        wanted = itertools.product(sources, options.saturated, options.head, options.loss)
        for source, share, head, loss in wanted:
            # In whole pairs: at least one where the share is not 0, and never all.
            saturated = min(max(1, round(share * pairs)), pairs - 1) if share else 0
            yield replace(source, saturated=saturated, frozen_head=head == "frozen", loss=loss)


def compare(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Errors, times and memory of every peer on one input, as they stand in the JSON file."""
    batch = case.batch()
    peers = {name: peer for name, peer in PEERS.items() if name in options.only}
    rows = {name: {"id": name, "peer": peer.name, "status": "ok", "note": ""} for name, peer in peers.items()}
    if any(peer.compiled for peer in peers.values()):
        torch.compiler.reset()  # else, after 8 recompilations for other batches, torch would run eagerly
    gate = Gate(batch)
    for name, peer in tqdm(peers.items(), desc="errors", leave=False, disable=None):
        with recorded(rows[name]):
            check_peer(rows[name], peer.loss, batch, gate)
    gemm = measure_times(rows, batch, options.repeats)
    if not options.no_memory:
        measure_memory(rows, batch, case)
    return {
        "shape": asdict(case.shape),
        "tokens": case.tokens,
        "pairs": case.pairs,
        "saturated_pairs": case.saturated,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == case.dtype),
        "frozen_head": case.frozen_head,
        "loss": case.loss,
        "input": {**case.about(), **batch.sharpness},
        "fp32_logits_bytes": 4 * case.tokens * case.shape.vocab,
        "plain_pytorch_errors": finite(gate.plain.norms),
        "error_bound": finite(gate.bound),
        "bare_gemm_ms": gemm,
        "rows": list(rows.values()),
    }


def finite(values: dict[str, float]) -> dict[str, float | str]:
    """JSON has no NaN or infinity: they become words."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


@contextlib.contextmanager
def recorded(row: dict[str, Any]) -> Iterator[None]:
    """A peer's exception goes into its row; the others are still to be measured."""
    try:
        yield
    except Unavailable as error:
        row |= {"status": "skipped", "note": str(error)}
    except Exception as error:
        row |= {"status": "failed", "note": first_line(error)}
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            row |= {"status": "skipped", "note": "ran out of memory"}
    if row["status"] != "ok":
        measure.release_cached()


def check_peer(row: dict[str, Any], loss: LossFn, batch: Batch, gate: Gate) -> None:
    """Run the peer once and compare; a wrong result makes it a failed row."""
    out = loss(batch)
    found = gate.errors(out.loss.detach(), batch.gradients(out.loss))
    row |= {"errors": finite(found.norms), "scale_errors": finite(found.scale)}
    if out.kept_share is not None:
        row["kept_share"] = out.kept_share.item()
    if wrong := gate.verdict(found):
        row |= {"status": "failed", "note": wrong}


def passed(rows: Rows) -> dict[str, LossFn]:
    return {name: PEERS[name].loss for name, row in rows.items() if row["status"] == "ok"}


def measure_times(rows: Rows, batch: Batch, repeats: int) -> dict[str, Any]:
    """Times of the peers, into their rows, and of the bare GEMM."""
    device = batch.hidden.device
    steps = {GEMM: Step(lambda: bare_gemm(batch.hidden.detach(), batch.weight.detach()))}
    for name, loss in passed(rows).items():
        forward, guard = partial(lambda loss: loss(batch).loss, loss), partial(recorded, rows[name])
        steps[name] = Step(forward, batch.gradients, guard)
    # On a CPU, where a run may take minutes, the comparison with float64 was warm-up enough.
    warmup = 0 if device.type == "cpu" else 3
    times = measure.interleaved_times(steps, device, warmup, repeats)
    gemm = times.pop(GEMM)["both_ms"]
    for name, found in times.items():
        rows[name] |= found
    return gemm


def bare_gemm(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """`hidden @ weight.T` and nothing else, tile by tile: the floor of every head."""
    row_bytes = len(weight) * weight.element_size()
    size = (max(1, GEMM_OUTPUT_BYTES // row_bytes), len(weight)) if hidden.is_cuda else (GEMM_TILE, GEMM_TILE)
    for rows, entries in itertools.product(hidden.split(size[0]), weight.split(size[1])):
        matmul(rows, entries)


def measure_memory(rows: Rows, batch: Batch, case: Case) -> None:
    """Memory of the peers that were timed, into their rows."""
    for name, loss in tqdm(passed(rows).items(), desc="memory", leave=False, disable=None):
        row = rows[name]
        try:
            if batch.hidden.is_cuda:
                memory = measure.peak_extra_bytes(partial(gradients_of, loss, batch), batch.hidden.device)
            else:
                memory = measure.in_fresh_process(cpu_memory, name, case)
        except Exception as error:  # refused by the allocator, or the process was killed
            row["note"] = f"its memory could not be measured: {first_line(error)}"
            measure.release_cached()
        else:
            row |= {"extra_bytes": memory.extra, "extra_bytes_is_upper_limit": memory.upper_limit}


def cpu_memory(name: str, case: Case) -> PeakMemory:
    """Extra memory of one step of a peer; runs in a process of its own (`in_fresh_process`)."""
    peer, batch = PEERS[name], case.batch()
    # Libraries and thread stacks come with the first step, whatever its size; compiled code is for this size.
    shape, objective = replace(case.shape, vocab=1024), (case.saturated, case.frozen_head, case.loss)
    small = Recipe(shape, 16 * case.pairs, case.pairs, case.dtype, "cpu", *objective)
    gradients_of(peer.loss, batch if peer.compiled else small.batch())
    return measure.peak_extra_bytes(partial(gradients_of, peer.loss, batch), torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
