"""The longest batch that each peer can take in a given memory: `throughput.py --max-tokens GIB`.

The memory is all that a step needs: inputs, returned gradients, and the peak of what lies between. On CUDA
the allocator gets no more, and what does not fit raises its `OutOfMemoryError`; on a CPU every try runs in a
process of its own, whose memory is measured (`peak_extra_bytes`). A machine that has less memory free than
that ends the search sooner: what was found is then a lower limit, and the row says so.

A batch grows by whole pairs, all of the length that `--tokens` and `--pairs` give: twice as many until they
do not fit, then by bisection to within a sixteenth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.inputs import Batch, Case, Sequences
from benchmarks.measure import (
    available_bytes,
    in_fresh_process,
    peak_extra_bytes,
    release_cached,
    return_freed_memory,
    settle_exp,
    tensor_bytes,
)
from benchmarks.peers import LossFn, Unavailable, all_peers, first_line, gradients_of

MOST_TOKENS = {"cpu": 2**15, "cuda": 2**20}  # no more are tried: a step would take minutes
GRANULARITY = 16  # bisection ends at a sixteenth of the length that fits
SHORT_OF_MEMORY = "limited by the memory that is free here"


@dataclass
class Longest:
    """What was found out about one peer; `tokens` is 0 where not even one pair fits."""

    id: str
    peer: str
    status: str = "ok"  # or "skipped", or "failed"
    note: str = ""
    tokens: int | None = None
    at_least: bool = False  # more were not tried, or not to the end of the budget


def find(case: Case, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The longest batch of each peer, printed, and as JSON."""
    base = case.batch()[0].to("cpu")
    peers = {name: peer for name, peer in all_peers(options.tau).items() if name in options.only}
    rows = [Longest(name, peer.name) for name, peer in peers.items()]
    with tqdm(rows, desc="longest batch", leave=False, disable=None) as bar:
        for row in bar:
            bar.set_postfix_str(row.peer)
            try_peer(row, case, base, options)
    print_longest(case, rows, options.max_tokens, console)
    source = case.source
    return {
        "gib": options.max_tokens,
        "shape": asdict(source.shape),
        "dtype": str(source.dtype).removeprefix("torch."),
        "frozen_head": case.frozen_head,
        "loss": case.loss,
        "tokens_per_pair": source.tokens // source.pairs,
        "most_tokens_tried": MOST_TOKENS[options.device],
        "rows": [asdict(row) for row in rows],
    }


def try_peer(row: Longest, case: Case, base: Batch, options: argparse.Namespace) -> None:
    tokens_per_pair = case.source.tokens // case.source.pairs
    most = max(1, MOST_TOKENS[options.device] // tokens_per_pair)
    try:
        pairs = longest(tries(row, case, base, options), most)
    except Unavailable as reason:
        row.status, row.note = "skipped", str(reason)
    except Exception as error:  # the other peers are still to be tried
        row.status, row.note = "failed", first_line(error)
    else:
        row.tokens, row.at_least = pairs * tokens_per_pair, pairs == most or row.note == SHORT_OF_MEMORY
    release_cached(torch.device(options.device))


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, to within a sixteenth; 0 if not even 1 does."""
    fitting, too_many = 0, 1
    while fits(too_many):
        fitting = too_many
        if fitting == most:
            return most
        too_many = min(2 * fitting, most)
    while too_many - fitting > max(1, fitting // GRANULARITY):
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def tries(row: Longest, case: Case, base: Batch, options: argparse.Namespace) -> Callable[[int], bool]:
    """Whether a step of the peer on so many pairs fits into the memory.

    The note is that of the fewest pairs that do not, which are the last of those tried: see `longest`.
    """
    budget = int(options.max_tokens * 2**30)
    peer = all_peers(options.tau)[row.id]
    peer.load(options.device)  # or it is unavailable
    if options.device == "cuda":
        # Loaded anew each time: what was compiled for one length would be compiled for only 8 others.
        return lambda pairs: fits_on_cuda(row, peer.load("cuda"), case, base, pairs, budget)

    def fits_on_cpu(pairs: int) -> bool:
        source = case.source
        tokens = pairs * source.tokens // source.pairs
        needed = peer.estimated_bytes(source.shape, tokens, pairs, source.dtype, case.frozen_head)
        # A try beyond the budget is no use where it would take the machine down.
        if needed > 0.9 * available_bytes(torch.device("cpu")):
            row.note = SHORT_OF_MEMORY
            return False
        settings = options.tau, case, pairs, options.threads
        given = base.labels.tolist(), base.ref_logps.tolist()
        try:
            fits = in_fresh_process(cpu_step_bytes, row.id, *settings, *given) <= budget
        except RuntimeError as error:
            # Killed for want of memory, unless it cannot do even one pair; or refused by the allocator.
            killed = isinstance(error, BrokenProcessPool) and pairs > 1
            if not killed and "can't allocate memory" not in str(error):
                raise
            row.note = SHORT_OF_MEMORY
            return False
        if not fits:
            row.note = ""
        return fits

    return fits_on_cpu


def fits_on_cuda(row: Longest, loss: LossFn, case: Case, base: Batch, pairs: int, budget: int) -> bool:
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    release_cached(device)
    short = available_bytes(device) < budget  # others hold memory of the device
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
    try:
        gradients_of(loss, case.settled(with_pairs(base, pairs).to("cuda")))
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        row.note = SHORT_OF_MEMORY if short else ""
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


def cpu_step_bytes(
    name: str,
    tau: float | str,
    case: Case,
    pairs: int,
    threads: int,
    labels: list[int],
    ref_logps: list[float],
) -> int:
    """Memory of one step on the CPU, inputs and gradients included; in a process of its own."""
    torch.set_num_threads(threads)
    settle_exp()
    return_freed_memory()
    peer = all_peers(tau)[name]
    loss = peer.load("cpu")
    source = case.source
    sequences = Sequences(torch.arange(0, source.tokens + 1, source.tokens // (2 * source.pairs)))
    inputs = torch.tensor(labels), sequences, torch.tensor(ref_logps), source.shape.transform
    batch = case.settled(with_pairs(Batch(*source.build(), *inputs), pairs))
    # Libraries come with the first step of any size, and what is compiled with the first of this one.
    gradients_of(loss, batch if peer.compiled else batch.sample(tokens=64, vocab=1024))
    extra = peak_extra_bytes(lambda: gradients_of(loss, batch), torch.device("cpu")).extra
    differentiated = tensor_bytes(batch.differentiated())  # each has a gradient of its size
    return extra + differentiated + tensor_bytes([batch.hidden, batch.weight, batch.labels])


def with_pairs(batch: Batch, pairs: int) -> Batch:
    """A batch of this many pairs: those of `batch`, whose sequences are of one length, over and over."""
    count, length = len(batch.ref_logps) // 2, batch.sequences.lengths[0]
    chosen = torch.arange(pairs) % count
    sequences = torch.cat([chosen, chosen + count])
    tokens = (sequences[:, None] * length + torch.arange(length)).flatten()
    return replace(
        batch,
        hidden=batch.hidden.detach()[tokens],
        weight=batch.weight.detach(),
        labels=batch.labels[tokens],
        sequences=Sequences(torch.arange(0, len(tokens) + 1, length)),
        ref_logps=batch.ref_logps[sequences],
    )


def print_longest(case: Case, rows: list[Longest], gib: float, console: Console) -> None:
    source = case.source
    table = Table(
        title=f"Longest batch in {gib:g} GiB, inputs and gradients included: {case.setting}, {source.dtype}, "
        f"{source.device.upper()}, {source.shape.hidden} x {source.shape.vocab}, "
        f"pairs of {source.tokens // source.pairs} tokens",
        title_justify="left",
    )
    for column in ("peer", "tokens", "note"):
        table.add_column(column, justify="right" if column == "tokens" else "left")
    for row in rows:
        tokens = row.status if row.tokens is None else f"{'>= ' if row.at_least else ''}{row.tokens:,}"
        table.add_row(row.peer, tokens, row.note)
    console.print(table)
