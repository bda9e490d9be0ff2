"""The certified backward by Triton kernels: dz of the kept pairs, then dweight per block and dhidden per row.

The workspace is dz and its products with weight. The lists of pairs come on top, about 50 bytes a pair.

dz is kept for all pairs at once where the workspace holds it. Where it does not, dweight is made of some
blocks at a time and dhidden of some rows at a time, and dz is formed for each: every gradient is written
once, from the same sums, whatever the workspace.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
import triton

from csrc_triton import linear_logps_certified as kernels
from csrc_triton.launch import FEW_ROWS, VOCAB_BLOCK
from focalkern.distributed import AsyncReduction
from focalkern.products import HeadGradients
from focalkern.records import Forward, Gradients, KeptPairs, Needs, PairGroup, PairTiles, Scales, Sizes
from focalkern.triton_launch import (
    OPTIONS,
    entry,
    head_tile,
    on_device,
    power_of_two,
    product_entry,
    sizes_of,
    with_aligned_update,
)

# The product of dz and weight is held for this many columns of dhidden at least, or a multiple.
_PRODUCT_COLUMNS = 128


def certified_backward(
    forward: Forward,
    g: torch.Tensor,  # [n] dL/dlogps
    pairs: KeptPairs,
    tau: float,
    needs: Needs,
    reduction: AsyncReduction | None,
    workspace_bytes: int,
) -> Gradients:
    """Gradients from the kept pairs alone; rows of dweight that no pair needs are zero."""
    step, counts, head = _Step(forward, g, pairs, needs, reduction), pairs.counts, forward.head
    gradients = step.gradients
    needs_hidden, needs_weight_or_bias = any(needs.of_hidden), any((*needs.of_weight, needs.bias))

    pair_bytes = VOCAB_BLOCK * head.hidden.element_size()
    product_bytes = _PRODUCT_COLUMNS * _product_dtype(head.hidden).itemsize if needs_hidden else 0
    most_pairs = max(workspace_bytes // (pair_bytes + product_bytes), 1)
    with on_device(head.hidden):
        if counts.total <= most_pairs:
            group = _group(step.block_start, counts.per_block)
            dz = step.dz(group, counts.total)
            if needs_hidden:
                step.write_dhidden(group, dz, (0, len(counts.per_row)), workspace_bytes)
            gradients.start_reduction()
            step.write_dweight(group, dz, (0, len(counts.per_block)))
            return gradients.result()

        if needs_hidden:
            for rows in _ranges(counts.per_row_host, most_pairs):
                group = step.group_of_rows(rows)
                dz = step.dz(group, int(counts.per_row_host[slice(*rows)].sum()))
                step.write_dhidden(group, dz, rows, workspace_bytes)
        gradients.start_reduction()
        if needs_weight_or_bias:
            for blocks in _ranges(counts.per_block_host, most_pairs):
                group = step.group_of_blocks(blocks)
                dz = step.dz(group, int(counts.per_block_host[slice(*blocks)].sum()))
                step.write_dweight(group, dz, blocks)
    return gradients.result()


class _Step:
    """One backward: its tensors, the gradients that are needed, and the three kinds of launches."""

    def __init__(
        self,
        forward: Forward,
        g: torch.Tensor,
        pairs: KeptPairs,
        needs: Needs,
        reduction: AsyncReduction | None,
    ) -> None:
        self.head, self.targets, self.transform, self.saved = forward
        self.logits_head = with_aligned_update(self.head)
        self.g, self.pairs = g, pairs
        counts = pairs.counts
        self.few_rows = counts.total <= FEW_ROWS * int((counts.per_block_host > 0).sum())
        self.block_start = counts.per_block.cumsum(0) - counts.per_block
        self.row_start = torch.nn.functional.pad(counts.per_row.cumsum(0), (1, 0))
        # Shards are added up in fp32, as in an exact backward: which of the two each takes is its own affair.
        dtype = None if reduction is None else torch.float32
        self.gradients = HeadGradients(self.head, needs, reduction, dtype)

    def group_of_blocks(self, blocks: tuple[int, int]) -> PairGroup:
        per_block = self.pairs.counts.per_block
        i_block = torch.arange(len(per_block), device=per_block.device)
        inside = (i_block >= blocks[0]) & (i_block < blocks[1])
        return _group(self.block_start, torch.where(inside, per_block, 0))

    def group_of_rows(self, rows: tuple[int, int]) -> PairGroup:
        first_key = torch.arange(len(self.block_start), device=self.key.device) * self.targets.numel()
        start, end = (torch.searchsorted(self.key, first_key + row) for row in rows)
        return _group(start, end - start)

    def dz(self, group: PairGroup, count: int) -> torch.Tensor:  # [count, 128]
        head, hidden = self.logits_head, self.head.hidden
        dz = torch.empty((count, VOCAB_BLOCK), dtype=hidden.dtype, device=hidden.device)
        if count:
            small = self.transform.softcap is not None
            found = entry("certified_dz", hidden, small=small, few_rows=self.few_rows)
            tiles = _tiles(group, count, found.config.block_m)
            kernels.linear_logps_certified_dz_kernel[(len(tiles.block),)](
                head,
                self.targets,
                self.saved,
                self.g,
                self.pairs.row,
                group,
                tiles,
                dz,
                sizes_of(head),
                Scales.of(self.transform),
                head_tile(found, head),
                **found.options,
            )
        return dz

    def write_dweight(self, group: PairGroup, dz: torch.Tensor, blocks: tuple[int, int]) -> None:
        """The rows of these blocks in dweight of each product and in dbias."""
        all_dweight, dbias = self.gradients.dweight, self.gradients.dbias
        if dbias is None and not any(x is not None for x in all_dweight):
            return
        # A few blocks hold frequent tokens and are needed by most rows: they are to start first.
        order = blocks[0] + group.size[slice(*blocks)].argsort(descending=True, stable=True)
        for (hidden, weight), dweight in zip(self.head.products, all_dweight, strict=True):
            if dweight is None:
                continue
            found, width = product_entry("certified_dweight", hidden), hidden.shape[1]
            grid = (len(order) * triton.cdiv(width, found.config.block_n),)
            kernels.linear_logps_certified_dweight_kernel[grid](
                dz,
                hidden,
                self.pairs.row,
                order,
                group,
                dweight,
                Sizes(*weight.shape),
                found.tile(width),
                **found.options,
            )
        if dbias is not None:
            kernels.linear_logps_certified_dbias_kernel[(len(order),)](
                dz, order, group, dbias, self.head.vocab_size, BLOCK_K=32, **OPTIONS
            )

    def write_dhidden(
        self, group: PairGroup, dz: torch.Tensor, rows: tuple[int, int], workspace_bytes: int
    ) -> None:
        """These rows in dhidden of each product."""
        if not len(dz):
            return
        places, before = self._row_places(group, rows)
        dtype = _product_dtype(self.head.hidden)
        free_columns = (workspace_bytes // len(dz) - VOCAB_BLOCK * dz.element_size()) // dtype.itemsize
        for (hidden, weight), dhidden in zip(self.head.products, self.gradients.dhidden, strict=True):
            if dhidden is None:
                continue
            width = weight.shape[1]
            at_least = min(_PRODUCT_COLUMNS, power_of_two(width))
            columns = max(free_columns // at_least, 1) * at_least
            columns = min(columns, triton.cdiv(width, at_least) * at_least)
            product = torch.empty((len(dz), columns), dtype=dtype, device=dz.device)

            found = product_entry("certified_product", hidden, self.few_rows)
            tiles, constants = _tiles(group, len(dz), found.config.block_m), found.tile(VOCAB_BLOCK)
            grid = (len(tiles.block) * triton.cdiv(columns, found.config.block_n),)
            for first in range(0, width, columns):
                kernels.linear_logps_certified_product_kernel[grid](
                    dz,
                    weight,
                    group,
                    tiles,
                    product,
                    first,
                    columns,
                    Sizes(*weight.shape),
                    constants,
                    **found.options,
                )
                kernels.linear_logps_certified_dhidden_kernel[
                    (rows[1] - rows[0], triton.cdiv(columns, at_least))
                ](
                    product,
                    places,
                    self.row_start,
                    dhidden,
                    rows[0],
                    before,
                    first,
                    columns,
                    width,
                    BLOCK_N=at_least,
                    BLOCK_K=8,
                    num_warps=1,
                    **OPTIONS,
                )

    def _row_places(self, group: PairGroup, rows: tuple[int, int]) -> tuple[torch.Tensor, int]:
        """Where in dz the pairs of each row are, row after row; and how many come before these rows."""
        before, end = (int(self.pairs.counts.per_row_host[:row].sum()) for row in rows)
        pair = self.by_row[before:end]
        block = self.pairs.block[pair]
        return pair - group.start[block] + group.place[block], before

    @cached_property
    def key(self) -> torch.Tensor:  # [K] int64
        """Block and row of each pair in one number, ascending."""
        return self.pairs.block * self.targets.numel() + self.pairs.row

    @cached_property
    def by_row(self) -> torch.Tensor:  # [K] int64
        """The pairs, row after row instead of block after block."""
        return self.pairs.row.int().sort(stable=True).indices


def _group(start: torch.Tensor, size: torch.Tensor) -> PairGroup:
    return PairGroup(start, size, size.cumsum(0) - size)


def _tiles(group: PairGroup, count: int, block_m: int) -> PairTiles:
    """The tiles of a group of `count` pairs; a few more than there are, which stand for no block."""
    end = ((group.size + block_m - 1) // block_m).cumsum(0)
    at_most = count // block_m + min(len(group.size), count)
    i_tile = torch.arange(at_most, device=end.device)
    return PairTiles(end, torch.searchsorted(end, i_tile, right=True))


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
