"""The certified backward of the torch backend: per vocabulary block, the rows that need it.

One block after the other would be many small calls. Several blocks share the gathering of their rows and the
element-wise work; each has its own three products. Half of the blocks are worked on in a thread of its own:
forward and backward of 2048 × 512 × 32768 with a fifth of the pairs kept are then 2.1 times as fast as exact
ones, and 1.8 times otherwise (bf16, 2 cores of an AMD EPYC, torch 2.13, 2026-11). A dispatch mode, such as a
counter of operations, does not see into these threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from focalkern.backends import VOCAB_BLOCK, Gradients, HeadInputs, LogitTransform, Needs, gradients_in_order
from focalkern.backends.torch_tiles import (
    Logits,
    compute_dtype,
    empty_gradients,
    has_native_product,
    matmul,
    targets_in,
    transform_logits,
)
from focalkern.layout import Rows, spread_over_hidden
from focalkern.selection import KeptPairs

if TYPE_CHECKING:
    from focalkern.distributed import PendingSums

# oneDNN builds a kernel for every new shape, in more time than a block's product takes (300 against 130 µs
# at 450 × 512 × 128, 2 cores of an AMD EPYC, torch 2.13, 2026-11). The rows of a block are padded to a
# multiple of this: few shapes, that come again.
_PADDING = 32
# Rows and vocabulary blocks of a group: what they need stays in the processor's cache.
_GROUP_ROWS = 1024
_GROUP_BLOCKS = 32
# Where this much may be left out, how oneDNN adds up a logit (see `Logits`) does not show.
_ROUNDING_TAU = 2.0**-20


@dataclass(frozen=True)
class _Part:
    """Rows that need one vocabulary block; those of a block may be in several parts."""

    rows: slice  # of the padded list of rows
    block: slice  # of the vocabulary
    is_first: bool
    is_last: bool


def head_backward_certified(
    head: HeadInputs,
    rows: Rows,
    transform: LogitTransform,
    lse: torch.Tensor,  # [n]
    one_minus_p: torch.Tensor,  # [n]
    g: torch.Tensor,  # [n]
    pairs: KeptPairs,
    tau: float,
    needs: Needs,
    workspace_bytes: int,
    sums: PendingSums | None = None,
) -> Gradients:
    """dz of the kept pairs, group by group, and its products; rows of dweight that no pair needs are zero."""
    needs_hidden = needs[0::3]
    n, vocab_size = rows.targets.numel(), head.weight.shape[0]
    given_dtype, dtype = head.hidden.dtype, compute_dtype(head.hidden)
    dweight = empty_gradients([weight for _, weight in head.products], needs[1::3])
    (dbias,) = empty_gradients([head.bias], needs[2:3])
    in_vocabulary = [x for x in (*dweight, dbias) if x is not None]
    for i_block in (pairs.counts.per_block_host == 0).nonzero().flatten().tolist():
        for gradient in in_vocabulary:
            gradient[_vocab_range(i_block, vocab_size)] = 0.0

    # The rows, and one more that the lists of rows are padded with: it has no gradient.
    def extended(values: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        return torch.cat([values, values.new_full((1, *values.shape[1:]), value)])

    h_input = [extended(hidden[rows.hidden_index]) for hidden, _ in head.products]
    g, targets = extended(g)[:, None], extended(rows.targets, -1)
    lse = extended(lse, torch.inf)[:, None]  # p = 0, whatever the bias
    minus_g, target_dz = -g, g[:, 0] * extended(one_minus_p)
    is_native = has_native_product(head.hidden)
    is_fp32 = given_dtype == torch.float32 and tau < _ROUNDING_TAU

    # Bytes of one row of a group: hidden in both dtypes, its gradient, logits, dz in both dtypes.
    width = sum(hidden.shape[1] for hidden, _ in head.products) + VOCAB_BLOCK
    row_bytes = width * (8 + given_dtype.itemsize)
    group_rows = max(min(_GROUP_ROWS, workspace_bytes // row_bytes) // _PADDING, 1) * _PADDING
    row_list, first_v = _padded_rows(pairs, n)

    def process(parts: list[_Part], dh: list[torch.Tensor | None]) -> None:
        """Gradients of the blocks of these parts; `dh` takes what they add to dhidden of each product."""
        dbias_sum, dweight_sum = lse.new_zeros(()), [lse.new_zeros(()) for _ in dweight]
        for group in _groups(parts, group_rows):
            listed = slice(group[0].rows.start, group[-1].rows.stop)
            span = slice(group[0].block.start, group[-1].block.stop)
            row = row_list[listed]
            h_native = [h.index_select(0, row) for h in h_input]  # several times as fast as h[row]
            w_span = [weight[span].to(dtype).contiguous() for _, weight in head.products]
            b_span = None if head.bias is None else head.bias[span].to(dtype)

            sizes = [part.rows.stop - part.rows.start for part in group]
            in_span = [slice(part.block.start - span.start, part.block.stop - span.start) for part in group]
            # For each product, its operands of every part.
            h_parts = [h.to(dtype).split(sizes) for h in h_native]
            w_parts = [[w[v] for v in in_span] for w in w_span]
            b_parts = [None if b_span is None else b_span[v] for v in in_span]
            operands = zip(zip(*h_parts, strict=True), zip(*w_parts, strict=True), b_parts, strict=True)
            x = [Logits(list(h), is_fp32)(list(w), b) for h, w, b in operands]
            z, slope = transform_logits(torch.cat(x), transform)
            # d logps / dz_v = 1[v = y] − p_v
            dz = z.sub_(lse[row]).exp_().mul_(minus_g[row])
            label_row, column = targets_in(targets[row] - first_v[listed], dz.shape[1])
            dz[label_row, column] = target_dz[row[label_row]]
            if isinstance(slope, torch.Tensor) or slope != 1.0:
                dz = dz.mul_(slope)

            dz_parts = dz.split(sizes)
            for i, dh_sum in enumerate(dh):
                if dh_sum is not None:
                    for r, dz_part, w in zip(row.split(sizes), dz_parts, w_parts[i], strict=True):
                        dh_sum.index_add_(0, r, matmul(dz_part, w.t()))
            native_dz = dz.to(given_dtype).split(sizes) if is_native and any(needs[1::3]) else ()
            for i, gradient in enumerate(dweight):
                if gradient is None:
                    continue
                if is_native:
                    native_parts = zip(native_dz, h_native[i].split(sizes), strict=True)
                    products = (dz_part.t() @ h for dz_part, h in native_parts)
                else:
                    products = (
                        matmul(dz_part.t(), h.t()) for dz_part, h in zip(dz_parts, h_parts[i], strict=True)
                    )
                for part, product in zip(group, products, strict=True):
                    dweight_sum[i] = product if part.is_first else dweight_sum[i].to(dtype) + product
                    if part.is_last:
                        gradient[part.block] = dweight_sum[i]
            if dbias is not None:
                for part, dz_part in zip(group, dz_parts, strict=True):
                    dbias_sum = dz_part.sum(0) if part.is_first else dbias_sum + dz_part.sum(0)
                    if part.is_last:
                        dbias[part.block] = dbias_sum

    halves = _halves(list(_parts(pairs, vocab_size, group_rows)))
    dh_halves = [
        [
            torch.zeros_like(h, dtype=dtype) if needed else None
            for h, needed in zip(h_input, needs_hidden, strict=False)
        ]
        for _ in halves
    ]
    tasks: list[Callable[[], None]] = [
        partial(process, *work) for work in zip(halves, dh_halves, strict=True)
    ]
    _run_side_by_side(tasks, head.hidden.device)

    dh = [
        None if one is None or other is None else (one + other)[:n]
        for one, other in zip(*dh_halves, strict=True)
    ]
    if sums is not None:
        sums.start(*(x for x in dh if x is not None))
        sums.wait()
    dhidden = [
        None if x is None else spread_over_hidden(x, hidden, rows)
        for x, (hidden, _) in zip(dh, head.products, strict=True)
    ]
    return gradients_in_order(dhidden, dweight, dbias)


def _halves(parts: list[_Part]) -> list[list[_Part]]:
    """The parts in two runs of about as many rows, each block in one of them."""
    total = parts[-1].rows.stop if parts else 0
    middle = next(
        (i for i, part in enumerate(parts) if part.is_first and 2 * part.rows.start >= total), len(parts)
    )
    return [parts[:middle], parts[middle:]]


def _run_side_by_side(tasks: list[Callable[[], None]], device: torch.device) -> None:
    """Each task with its share of the threads: products this small gain little from more than one."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < len(tasks):
        for task in tasks:
            task()
        return

    def run(task: Callable[[], None]) -> None:
        torch.set_num_threads(threads // len(tasks))
        with torch.no_grad():
            task()

    try:
        with ThreadPoolExecutor(len(tasks)) as pool:
            for future in [pool.submit(run, task) for task in tasks]:
                future.result()
    finally:
        # Threads started later take over what was set last, in whichever thread; one started in the meantime
        # keeps half.
        torch.set_num_threads(threads)


def _padded_counts(pairs: KeptPairs) -> torch.Tensor:
    return (pairs.counts.per_block_host + _PADDING - 1) // _PADDING * _PADDING


def _padded_rows(pairs: KeptPairs, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all blocks, each block's padded with n; and beside each the first entry of its block."""
    counts, padded, device = pairs.counts.per_block_host, _padded_counts(pairs), pairs.row.device
    shift = ((padded - counts).cumsum(0) - (padded - counts)).to(device)
    row = pairs.row.new_full((int(padded.sum()),), n)
    row[torch.arange(len(pairs.row), device=device) + shift[pairs.block]] = pairs.row
    first_v = torch.arange(len(counts), device=counts.device).repeat_interleave(padded) * VOCAB_BLOCK
    return row, first_v.to(device)


def _parts(pairs: KeptPairs, vocab_size: int, group_rows: int) -> Iterator[_Part]:
    start = 0
    for i_block, size in enumerate(_padded_counts(pairs).tolist()):
        block = _vocab_range(i_block, vocab_size)
        for first in range(0, size, group_rows):
            last = min(first + group_rows, size)
            yield _Part(slice(start + first, start + last), block, first == 0, last == size)
        start += size


def _groups(parts: list[_Part], group_rows: int) -> Iterator[list[_Part]]:
    """Consecutive parts that are processed together; their blocks have one width."""
    group: list[_Part] = []
    for part in parts:
        if group:
            first = group[0]
            too_long = part.rows.stop - first.rows.start > group_rows
            too_wide = part.block.stop - first.block.start > _GROUP_BLOCKS * VOCAB_BLOCK
            narrower = part.block.stop - part.block.start < first.block.stop - first.block.start
            if too_long or too_wide or narrower:
                yield group
                group = []
        group.append(part)
    if group:
        yield group


def _vocab_range(i_block: int, vocab_size: int) -> slice:
    return slice(i_block * VOCAB_BLOCK, min((i_block + 1) * VOCAB_BLOCK, vocab_size))
