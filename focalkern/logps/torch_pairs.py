"""Logits of kept (row, vocabulary block) pairs in plain PyTorch, a group of pairs at a time.

One block after the other would be many small calls. Several blocks share the gathering of their rows and the
element-wise work; each has its own product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.records import Head, KeptPairs
from focalkern.torch_logits import Product, compute_dtype, targets_in

# oneDNN builds a kernel for every new shape, in more time than a block's product takes (300 against 130 µs
# at 450 × 512 × 128, 2 cores of an AMD EPYC, torch 2.13, 2026-11). The rows of a block are padded to a
# multiple of this: few shapes, that come again.
_PADDING = 32
# Rows, numbers of hidden and logits, and vocabulary blocks of a group. With four times the numbers, 50 MB a
# thread, forward and backward of 1024 × 4096 × 128256 take 6 % longer (bf16, AMD EPYC, 2026-12).
_GROUP_ROWS, _GROUP_ELEMENTS = 2048, 2**20
_GROUP_BLOCKS = 32
# A part takes as long as this many rows, on top of its own.
_PART_ROWS = 64


@dataclass(frozen=True)
class Part:
    """Rows that need one vocabulary block; those of a block may be in several parts."""

    rows: slice  # of the padded list of rows
    block: slice  # of the vocabulary
    is_first: bool
    is_last: bool

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass
class Group:
    """Parts that are processed together."""

    parts: list[Part]
    row: torch.Tensor  # [k] the rows of all parts
    first_v: torch.Tensor  # [k] the first entry of the row's block
    hidden: list[torch.Tensor]  # of each product, [k, K]
    weight: list[torch.Tensor]  # of each product, [c, K] from the first part's block to the last's

    @cached_property
    def wide(self) -> Group:
        """The same in fp32 (float64 of float64)."""
        dtype = compute_dtype(self.hidden[0])
        return replace(
            self, hidden=[h.to(dtype) for h in self.hidden], weight=[w.to(dtype) for w in self.weight]
        )

    def split(self, x: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, ...]:
        """The rows of each part."""
        return x.split([part.size for part in self.parts], dim)

    def joined(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Hidden and weight of each part, [rows, ΣK] and [128, ΣK]: the products of a head as one."""
        weights = zip(*self.weights(), strict=True)
        return zip(self.split(joined(self.hidden)), (joined([*w]) for w in weights), strict=True)

    def weights(self) -> list[list[torch.Tensor]]:
        """Of each product and part, [128, K]."""
        first = self.parts[0].block.start
        blocks = [slice(part.block.start - first, part.block.stop - first) for part in self.parts]
        return [[weight[block] for block in blocks] for weight in self.weight]


class PairLogits:
    """The kept pairs in groups. Tensors of the rows have one more row, which pads lists of rows."""

    def __init__(
        self,
        head: Head,
        targets: torch.Tensor,  # [n]
        pairs: KeptPairs,
        workspace_bytes: int,
        sums_in_blocks: bool = False,  # see `Product`
    ) -> None:
        self.head, self.sums_in_blocks = head, sums_in_blocks
        self.hidden = [extended(hidden, 0.0) for hidden, _ in head.products]
        self.targets = extended(targets, -1)

        # Bytes of one row of a group: hidden in both dtypes, its gradient, logits, dz in both dtypes.
        width = sum(hidden.shape[1] for hidden in self.hidden) + VOCAB_BLOCK
        row_bytes = width * (8 + head.hidden.element_size())
        rows = min(_GROUP_ROWS, _GROUP_ELEMENTS // width, workspace_bytes // row_bytes)
        self.group_rows = max(rows // _PADDING, 1) * _PADDING
        self.row_list, self.first_v = _padded_rows(pairs, targets.numel())
        self.parts = list(_parts(pairs, head.vocab_size, self.group_rows))

    def halves(self) -> tuple[list[Part], list[Part]]:
        """The parts in two runs of about as much work, each block in one of them."""
        work = list(accumulate((part.size + _PART_ROWS for part in self.parts), initial=0))
        middle = next(
            (i for i, part in enumerate(self.parts) if part.is_first and 2 * work[i] >= work[-1]),
            len(self.parts),
        )
        return self.parts[:middle], self.parts[middle:]

    def groups(self, parts: list[Part]) -> Iterator[Group]:
        return (self.gather(group) for group in _groups(parts, self.group_rows))

    def gather(self, parts: list[Part]) -> Group:
        rows = slice(parts[0].rows.start, parts[-1].rows.stop)
        span = slice(parts[0].block.start, parts[-1].block.stop)
        row = self.row_list[rows]
        hidden = [h.index_select(0, row) for h in self.hidden]  # several times as fast as h[row]
        weight = [weight[span] for _, weight in self.head.products]
        return Group(parts, row, self.first_v[rows], hidden, weight)

    def logits(self, group: Group) -> torch.Tensor:  # [k, 128], before their transform
        hidden = zip(*map(group.split, group.wide.hidden), strict=True)
        weights = zip(*group.wide.weights(), strict=True)
        bias = self.head.bias
        x = [
            Product(list(h), self.sums_in_blocks)(
                list(w), None if bias is None else bias[part.block].to(h[0].dtype)
            )
            for part, h, w in zip(group.parts, hidden, weights, strict=True)
        ]
        return torch.cat(x)

    def labels(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs of a group whose block holds the row's label, and the label's column."""
        width = group.parts[0].block.stop - group.parts[0].block.start
        return targets_in(self.targets[group.row] - group.first_v, width)


def joined(operands: list[torch.Tensor]) -> torch.Tensor:
    """The operands of a head's products as those of one."""
    return operands[0] if len(operands) == 1 else torch.cat(operands, 1)


def extended(values: torch.Tensor, value: float) -> torch.Tensor:
    """The rows, and the row that pads."""
    return torch.cat([values, values.new_full((1, *values.shape[1:]), value)])


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


def _parts(pairs: KeptPairs, vocab_size: int, group_rows: int) -> Iterator[Part]:
    start = 0
    for i_block, size in enumerate(_padded_counts(pairs).tolist()):
        block = slice(i_block * VOCAB_BLOCK, min((i_block + 1) * VOCAB_BLOCK, vocab_size))
        for first in range(0, size, group_rows):
            last = min(first + group_rows, size)
            yield Part(slice(start + first, start + last), block, first == 0, last == size)
        start += size


def _groups(parts: list[Part], group_rows: int) -> Iterator[list[Part]]:
    """Consecutive parts that are processed together; their blocks have one width."""
    group: list[Part] = []
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
