"""Launches the certified backward: dz of the kept pairs, then dweight per block and dhidden per row.

The workspace is dz and its products with weight. The lists of pairs come on top, about 50 bytes a pair.

dz is kept for all pairs at once where the workspace holds it. Where it does not, dweight is made of some
blocks at a time and dhidden of some rows at a time, and dz is formed for each: every gradient is written
once, from the same sums, whatever the workspace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import triton

from csrc_triton import certified as kernels
from csrc_triton.launch import FEW_ROWS, Launch
from focalkern.backends import VOCAB_BLOCK, Gradients, HeadInputs, LogitTransform, Needs, gradients_in_order
from focalkern.backends.triton_launch import (
    head_options,
    launch_of,
    on_device,
    power_of_two,
    product_launch_of,
    product_options,
    scales,
    sizes,
    strides,
    tensors,
    unit_strides,
    with_aligned_update,
)
from focalkern.layout import Rows, spread_over_hidden
from focalkern.selection import KeptPairs

if TYPE_CHECKING:
    from focalkern.distributed import PendingSums

# The product of dz and weight is held for this many columns of dhidden at least, or a multiple.
_PRODUCT_COLUMNS = 128


@dataclass(frozen=True)
class _Slice:
    """Pairs whose dz is held at once: some of each block's list, all or none of it or those of some rows."""

    count: int
    start: torch.Tensor  # [NB] int64, in the list of pairs
    size: torch.Tensor  # [NB] int64
    place: torch.Tensor  # [NB] int64, in dz

    @classmethod
    def of(cls, count: int, start: torch.Tensor, size: torch.Tensor) -> _Slice:
        return cls(count, start, size, size.cumsum(0) - size)

    def tiles(self, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tiles up to and with each block; the block of each tile, NB for the few that are too many."""
        tile_end = ((self.size + block_m - 1) // block_m).cumsum(0)
        at_most = self.count // block_m + min(len(self.size), self.count)
        i_tile = torch.arange(at_most, device=tile_end.device)
        return tile_end, torch.searchsorted(tile_end, i_tile, right=True)


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
    """Gradients from the kept pairs alone; rows of dweight that no pair needs are zero."""
    step = _Step(unit_strides(head), rows, transform, lse, one_minus_p, g, pairs, needs, sums)
    needs_hidden, needs_weight_or_bias = any(needs[0::3]), any((*needs[1::3], needs[2]))
    counts = pairs.counts

    pair_bytes = VOCAB_BLOCK * head.hidden.element_size()
    product_bytes = _PRODUCT_COLUMNS * _product_dtype(head.hidden).itemsize if needs_hidden else 0
    most_pairs = max(workspace_bytes // (pair_bytes + product_bytes), 1)
    with on_device(head.hidden):
        if counts.total <= most_pairs:
            everything = _Slice.of(counts.total, step.block_start, counts.per_block)
            dz = step.dz(everything)
            if needs_hidden:
                free = workspace_bytes - counts.total * pair_bytes
                step.write_dhidden(everything, dz, (0, rows.targets.numel()), free)
            step.start_sums()
            step.write_dweight(everything, dz, (0, len(counts.per_block)))
            return step.result()

        if needs_hidden:
            for range_of_rows in _ranges(counts.per_row_host, most_pairs):
                part = step.slice_of_rows(range_of_rows)
                free = workspace_bytes - part.count * pair_bytes
                step.write_dhidden(part, step.dz(part), range_of_rows, free)
        step.start_sums()
        if needs_weight_or_bias:
            for blocks in _ranges(counts.per_block_host, most_pairs):
                part = step.slice_of_blocks(blocks)
                step.write_dweight(part, step.dz(part), blocks)
    return step.result()


class _Step:
    """One backward: its tensors, the gradients that are needed, and the three kinds of launches."""

    def __init__(
        self,
        head: HeadInputs,  # last strides of 1
        rows: Rows,
        transform: LogitTransform,
        lse: torch.Tensor,
        one_minus_p: torch.Tensor,
        g: torch.Tensor,
        pairs: KeptPairs,
        needs: Needs,
        sums: PendingSums | None,
    ) -> None:
        self.head, self.logits_head, self.rows, self.dtype = (
            head,
            with_aligned_update(head),
            rows,
            head.hidden.dtype,
        )
        self.transform, self.lse, self.one_minus_p, self.g, self.pairs = transform, lse, one_minus_p, g, pairs
        kept_blocks = int((pairs.counts.per_block_host > 0).sum())
        self.few_rows = pairs.counts.total <= FEW_ROWS * kept_blocks
        self.block_start = pairs.counts.per_block.cumsum(0) - pairs.counts.per_block
        self.row_start = torch.nn.functional.pad(pairs.counts.per_row.cumsum(0), (1, 0))
        # Shards exchange rows, as in an exact backward: which of the two each takes is its own affair.
        self.sums, n = sums, rows.targets.numel()
        self.dhidden_index = rows.hidden_index
        if sums is not None:
            self.dhidden_index = torch.arange(n, device=head.hidden.device)
        dtype, height = (head.hidden.dtype, len(head.hidden)) if sums is None else (torch.float32, n)
        self.dhidden = [
            torch.zeros((height, hidden.shape[1]), dtype=dtype, device=hidden.device) if needed else None
            for (hidden, _), needed in zip(head.products, needs[0::3], strict=False)
        ]
        self.dweight = [
            torch.empty_like(weight, memory_format=torch.contiguous_format) if needed else None
            for (_, weight), needed in zip(head.products, needs[1::3], strict=False)
        ]
        self.dbias = torch.empty_like(head.bias) if head.bias is not None and needs[2] else None

    def start_sums(self) -> None:
        """dhidden is complete: the other shards' is added while dweight is computed."""
        if self.sums is not None:
            self.sums.start(*(x for x in self.dhidden if x is not None))

    def result(self) -> Gradients:
        if self.sums is None:
            return gradients_in_order(self.dhidden, self.dweight, self.dbias)
        self.sums.wait()
        dhidden = [
            None if x is None else spread_over_hidden(x, hidden, self.rows)
            for x, (hidden, _) in zip(self.dhidden, self.head.products, strict=True)
        ]
        return gradients_in_order(dhidden, self.dweight, self.dbias)

    def slice_of_blocks(self, blocks: tuple[int, int]) -> _Slice:
        counts = self.pairs.counts
        i_block = torch.arange(len(counts.per_block), device=self.head.hidden.device)
        inside = (i_block >= blocks[0]) & (i_block < blocks[1])
        size = torch.where(inside, counts.per_block, 0)
        return _Slice.of(int(counts.per_block_host[slice(*blocks)].sum()), self.block_start, size)

    def slice_of_rows(self, rows: tuple[int, int]) -> _Slice:
        first_key = torch.arange(len(self.block_start), device=self.key.device) * self.rows.targets.numel()
        start, end = (torch.searchsorted(self.key, first_key + row) for row in rows)
        return _Slice.of(int(self.pairs.counts.per_row_host[slice(*rows)].sum()), start, end - start)

    def dz(self, part: _Slice) -> torch.Tensor:  # [pairs, 128]
        head, hidden = self.logits_head, self.head.hidden
        dz = torch.empty((part.count, VOCAB_BLOCK), dtype=hidden.dtype, device=hidden.device)
        config = launch_of("certified_dz", hidden, self.transform.softcap is not None, self.few_rows)
        tile_end, tile_block = part.tiles(config.block_m)
        if part.count:
            kernels.certified_dz_kernel[(len(tile_block),)](
                *tensors(head),
                self.rows.hidden_index,
                self.rows.targets,
                self.lse,
                self.one_minus_p,
                self.g,
                self.pairs.row,
                part.start,
                part.size,
                part.place,
                tile_end,
                tile_block,
                dz,
                len(part.size),
                *sizes(head),
                *strides(head),
                *scales(self.transform),
                **head_options(head, self.transform, config),
                BLOCK_M=config.block_m,
                **product_options(config, hidden.dtype),
            )
        return dz

    def write_dweight(self, part: _Slice, dz: torch.Tensor, blocks: tuple[int, int]) -> None:
        """The rows of these blocks in dweight of each product and in dbias."""
        vocab_size = self.head.weight.shape[0]
        # A few blocks hold frequent tokens and are needed by most rows: they are to start first.
        order = blocks[0] + part.size[slice(*blocks)].argsort(descending=True, stable=True)
        for (hidden, _), dweight in zip(self.head.products, self.dweight, strict=True):
            if dweight is None:
                continue
            config = product_launch_of("certified_dweight", hidden)
            kernels.certified_dweight_kernel[(len(order) * triton.cdiv(hidden.shape[1], config.block_n),)](
                dz,
                hidden,
                self.rows.hidden_index,
                self.pairs.row,
                order,
                part.start,
                part.size,
                part.place,
                dweight,
                vocab_size,
                hidden.shape[1],
                hidden.stride(0),
                BLOCK_N=config.block_n,
                **product_options(config, self.dtype),
            )
        if self.dbias is not None:
            kernels.certified_dbias_kernel[(len(order),)](
                dz, order, part.size, part.place, self.dbias, vocab_size, BLOCK_K=32
            )

    def write_dhidden(self, part: _Slice, dz: torch.Tensor, rows: tuple[int, int], free_bytes: int) -> None:
        """These rows in dhidden of each product."""
        if not part.count:
            return
        row_places = self._row_places(part, rows)
        for (hidden, weight), dhidden in zip(self.head.products, self.dhidden, strict=True):
            if dhidden is not None:
                config = product_launch_of("certified_product", hidden, self.few_rows)
                self._sum_products(part, dz, rows, row_places, free_bytes, weight, config, dhidden)

    def _sum_products(
        self,
        part: _Slice,
        dz: torch.Tensor,
        rows: tuple[int, int],
        row_places: tuple[torch.Tensor, int],
        free_bytes: int,
        weight: torch.Tensor,
        config: Launch,
        dhidden: torch.Tensor,
    ) -> None:
        vocab_size, width = weight.shape
        dtype = _product_dtype(self.head.hidden)
        at_least = min(_PRODUCT_COLUMNS, power_of_two(width))
        columns = max(free_bytes // (part.count * dtype.itemsize) // at_least, 1) * at_least
        columns = min(columns, triton.cdiv(width, at_least) * at_least)
        product = torch.empty((part.count, columns), dtype=dtype, device=dz.device)
        tile_end, tile_block = part.tiles(config.block_m)

        for first_column in range(0, width, columns):
            kernels.certified_product_kernel[(len(tile_block) * triton.cdiv(columns, config.block_n),)](
                dz,
                weight,
                part.size,
                part.place,
                tile_end,
                tile_block,
                product,
                first_column,
                columns,
                len(part.size),
                vocab_size,
                width,
                weight.stride(0),
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                **product_options(config, self.dtype),
            )
            kernels.certified_dhidden_kernel[(rows[1] - rows[0], triton.cdiv(columns, at_least))](
                product,
                row_places[0],
                self.row_start,
                self.dhidden_index,
                self.rows.count,
                dhidden,
                rows[0],
                row_places[1],
                first_column,
                columns,
                width,
                BLOCK_N=at_least,
                BLOCK_K=16,
            )

    def _row_places(self, part: _Slice, rows: tuple[int, int]) -> tuple[torch.Tensor, int]:
        """Where in dz the pairs of each row are, row after row; and how many come before these rows."""
        before, end = (int(self.pairs.counts.per_row_host[:row].sum()) for row in rows)
        pair = self.by_row[before:end]
        block = self.pairs.block[pair]
        return pair - part.start[block] + part.place[block], before

    @cached_property
    def key(self) -> torch.Tensor:  # [K] int64
        """Block and row of each pair in one number, ascending."""
        return self.pairs.block * self.rows.targets.numel() + self.pairs.row

    @cached_property
    def by_row(self) -> torch.Tensor:  # [K] int64
        """The pairs, row after row instead of block after block."""
        return self.pairs.row.int().sort(stable=True).indices


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    # Under a loss scale, what single blocks add to a row may exceed fp16 where their sum does not.
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _ranges(counts: torch.Tensor, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of counts that add up to `most`, or of a single one that is larger."""
    start = total = 0
    for i, count in enumerate(counts.tolist()):
        if i > start and total + count > most:
            yield start, i
            start, total = i, 0
        total += count
    if len(counts) > start:
        yield start, len(counts)
