"""The certified backward by Triton kernels: dz of the kept pairs, then dweight per block and dhidden per row.

The workspace is dz and its products with weight. The lists of pairs, about 50 bytes a pair, and the sums of
products, 1 KiB a row, come on top.

dz is kept for all pairs at once where the workspace holds it. Where it does not, dweight is made of some
blocks at a time and dhidden of some rows at a time, and dz is formed for each.

dhidden is made in rounds of some columns. In each round, the products of a part of the pairs are added to the
sums of their rows before the products of the next part take their place. Where products and sums stay in the
L2 cache, they do not pass through memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import NamedTuple

import torch
import triton

from csrc_triton import linear_logps_certified as kernels
from csrc_triton.launch import FEW_ROWS, PRODUCT_COLUMNS, VOCAB_BLOCK
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
    products_in_l2,
    sizes_of,
    with_aligned_update,
)


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
    gradients, num_rows = step.gradients, len(counts.per_row)
    needs_hidden, needs_weight_or_bias = any(needs.of_hidden), any((*needs.of_weight, needs.bias))

    products = _products_at_once(head.hidden.device, num_rows, workspace_bytes)
    free = workspace_bytes - (products.bytes if needs_hidden else 0)
    most_pairs = max(free // (VOCAB_BLOCK * head.hidden.element_size()), 1)
    with on_device(head.hidden):
        if counts.total <= most_pairs:
            dz = step.dz(step.all_pairs)
            write_dweight = partial(step.write_dweight, step.all_pairs, dz, (0, len(counts.per_block)))
            # dhidden takes hundreds of launches, for which dweight gives the host time. Where shards add
            # dhidden up, that runs beside dweight.
            if reduction is None:
                write_dweight()
            if needs_hidden:
                step.write_dhidden(step.all_pairs, dz, (0, num_rows), products)
            gradients.start_reduction()
            if reduction is not None:
                write_dweight()
            return gradients.result()

        if needs_hidden:
            ranges = list(_ranges(counts.per_row_host, most_pairs))
            for rows, group in zip(ranges, step.groups_of_rows(ranges), strict=True):
                step.write_dhidden(group, step.dz(group), rows, products)
        gradients.start_reduction()
        if needs_weight_or_bias:
            for blocks in _ranges(counts.per_block_host, most_pairs):
                group = step.group_of_blocks(blocks)
                step.write_dweight(group, step.dz(group), blocks)
    return gradients.result()


class _ProductsAtOnce(NamedTuple):
    bytes: int
    in_l2: bool  # they are to stay there, with the sums


def _products_at_once(device: torch.device, num_rows: int, workspace_bytes: int) -> _ProductsAtOnce:
    in_l2, sums = products_in_l2(device), num_rows * PRODUCT_COLUMNS * torch.float32.itemsize
    if in_l2 is not None and 2 * sums <= in_l2:
        return _ProductsAtOnce(min(in_l2 - sums, workspace_bytes // 2), True)
    return _ProductsAtOnce(workspace_bytes // 2, False)


class _Group(NamedTuple):
    """Kept pairs whose dz is held together."""

    ranges: PairGroup
    per_block: torch.Tensor  # [NB] int64: ranges.size on the host

    @classmethod
    def of(cls, start: torch.Tensor, size: torch.Tensor, per_block: torch.Tensor) -> _Group:
        return cls(PairGroup(start, size, size.cumsum(0) - size), per_block)

    def num_pairs(self, first_block: int = 0, end_block: int | None = None) -> int:
        return int(self.per_block[first_block:end_block].sum())

    def num_tiles(self, block_m: int, first_block: int = 0, end_block: int | None = None) -> int:
        return int(((self.per_block[first_block:end_block] + block_m - 1) // block_m).sum())

    def tiles(self, block_m: int) -> PairTiles:
        end = ((self.ranges.size + block_m - 1) // block_m).cumsum(0)
        i_tile = torch.arange(self.num_tiles(block_m), device=end.device)
        return PairTiles(end, torch.searchsorted(end, i_tile, right=True))


class _Part(NamedTuple):
    """Pairs of a group, those of some blocks, whose products with weight are held at once."""

    first_tile: int
    num_tiles: int
    first_place: int  # in dz
    num_pairs: int
    start: torch.Tensor  # [rows] int32, of each row's pairs in `_row_places`
    end: torch.Tensor  # [rows] int32


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
        block_start = counts.per_block.cumsum(0) - counts.per_block
        self.all_pairs = _Group.of(block_start, counts.per_block, counts.per_block_host)
        # Shards are added up in fp32, as in an exact backward: which of the two each takes is its own affair.
        dtype = None if reduction is None else torch.float32
        self.gradients = HeadGradients(self.head, needs, reduction, dtype)

    def group_of_blocks(self, blocks: tuple[int, int]) -> _Group:
        def inside(per_block: torch.Tensor) -> torch.Tensor:
            i_block = torch.arange(len(per_block), device=per_block.device)
            return torch.where((i_block >= blocks[0]) & (i_block < blocks[1]), per_block, 0)

        (start, size, _), per_block = self.all_pairs
        return _Group.of(start, inside(size), inside(per_block))

    def groups_of_rows(self, ranges: list[tuple[int, int]]) -> list[_Group]:
        """One group for each range of rows; the ranges are all rows. Waits for the device."""
        n, NB = len(self.targets), self.num_blocks
        key = self.pairs.block * n + self.pairs.row  # ascending, as the pairs are
        first_key = torch.arange(NB, device=key.device) * n
        bounds = [first for first, _ in ranges] + [n]
        starts = torch.stack([torch.searchsorted(key, first_key + row) for row in bounds])
        sizes = starts.diff(dim=0)
        return [_Group.of(*each) for each in zip(starts[:-1], sizes, sizes.cpu(), strict=True)]

    def dz(self, group: _Group) -> torch.Tensor:  # [pairs, 128]
        head, hidden = self.logits_head, self.head.hidden
        dz = torch.empty((group.num_pairs(), VOCAB_BLOCK), dtype=hidden.dtype, device=hidden.device)
        if len(dz):
            small = self.transform.softcap is not None
            found = entry("certified_dz", hidden, small=small, few_rows=self.few_rows)
            tiles = group.tiles(found.config.block_m)
            kernels.linear_logps_certified_dz_kernel[(len(tiles.block),)](
                head,
                self.targets,
                self.saved,
                self.g,
                self.pairs.row,
                group.ranges,
                tiles,
                dz,
                sizes_of(head),
                Scales.of(self.transform),
                head_tile(found, head),
                **found.options,
            )
        return dz

    def write_dweight(self, group: _Group, dz: torch.Tensor, blocks: tuple[int, int]) -> None:
        """The rows of these blocks in dweight of each product and in dbias."""
        all_dweight, dbias = self.gradients.dweight, self.gradients.dbias
        if dbias is None and not any(x is not None for x in all_dweight):
            return
        # A few blocks hold frequent tokens and are needed by most rows: they are to start first.
        order = blocks[0] + group.ranges.size[slice(*blocks)].argsort(descending=True, stable=True)
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
                group.ranges,
                dweight,
                Sizes(*weight.shape),
                found.tile(width),
                **found.options,
            )
        if dbias is not None:
            kernels.linear_logps_certified_dbias_kernel[(len(order),)](
                dz, order, group.ranges, dbias, self.head.vocab_size, BLOCK_K=32, **OPTIONS
            )

    def write_dhidden(
        self, group: _Group, dz: torch.Tensor, rows: tuple[int, int], products: _ProductsAtOnce
    ) -> None:
        """These rows in dhidden of each product."""
        if not len(dz):
            return
        num_rows, dtype, row_places = rows[1] - rows[0], _product_dtype(dz), self._row_places(group, rows)
        for (hidden, weight), dhidden in zip(self.head.products, self.gradients.dhidden, strict=True):
            if dhidden is None:
                continue
            width, found = weight.shape[1], product_entry("certified_product", hidden, self.few_rows)
            block_m, block_n = found.config.block_m, found.config.block_n
            min_columns = min(PRODUCT_COLUMNS, power_of_two(width))
            parts = self._parts(group, rows, products.bytes // (min_columns * dtype.itemsize), block_m)
            most_pairs = max(part.num_pairs for part in parts)
            columns = _columns_of_a_round(width, products.bytes // (most_pairs * dtype.itemsize), min_columns)
            product = torch.empty((most_pairs, columns), dtype=dtype, device=dz.device)
            # A single part needs no sums.
            sums_shape = num_rows if len(parts) > 1 else 0, columns
            sums = torch.empty(sums_shape, dtype=torch.float32, device=dz.device)

            tiles, sizes, tile = group.tiles(block_m), Sizes(*weight.shape), found.tile(VOCAB_BLOCK)
            for first_column in range(0, width, columns):
                # The last round gives the priority in L2 up.
                has_priority = products.in_l2 and first_column + columns < width
                eviction = "evict_last" if has_priority else ""
                for i_part, part in enumerate(parts):
                    tile_grid = (part.num_tiles * triton.cdiv(columns, block_n),)
                    kernels.linear_logps_certified_product_kernel[tile_grid](
                        dz,
                        weight,
                        group.ranges,
                        tiles,
                        product,
                        part.first_tile,
                        part.first_place,
                        first_column,
                        columns,
                        sizes,
                        tile,
                        EVICTION=eviction,
                        **found.options,
                    )
                    row_grid = num_rows, triton.cdiv(columns, min_columns)
                    kernels.linear_logps_certified_dhidden_kernel[row_grid](
                        product,
                        row_places,
                        part.start,
                        part.end,
                        sums,
                        dhidden,
                        part.first_place,
                        rows[0],
                        first_column,
                        columns,
                        width,
                        i_part,
                        len(parts),
                        BLOCK_N=min_columns,
                        BLOCK_K=8,
                        EVICTION=eviction,
                        num_warps=1,
                        **OPTIONS,
                    )

    def _parts(self, group: _Group, rows: tuple[int, int], most_pairs: int, block_m: int) -> list[_Part]:
        """The group, cut into ranges of blocks that have at most so many pairs."""
        keys, before = self.by_row.values, self._pairs_before(rows[0])
        first_key = torch.arange(*rows, device=keys.device) * self.num_blocks

        def row_starts(block: int) -> torch.Tensor:
            return torch.searchsorted(keys, first_key + block, out_int32=True) - before

        parts, start = [], row_starts(0)
        for first, end_block in _ranges(group.per_block, most_pairs):
            end, num_pairs = row_starts(end_block), group.num_pairs(first, end_block)
            if num_pairs:
                tiles = group.num_tiles(block_m, 0, first), group.num_tiles(block_m, first, end_block)
                parts.append(_Part(*tiles, group.num_pairs(0, first), num_pairs, start, end))
            start = end
        return parts

    def _row_places(self, group: _Group, rows: tuple[int, int]) -> torch.Tensor:
        """Where in dz the pairs of each row are, row after row."""
        pair = self.by_row.indices[slice(*map(self._pairs_before, rows))]
        block = self.pairs.block[pair]
        return pair - group.ranges.start[block] + group.ranges.place[block]

    def _pairs_before(self, row: int) -> int:
        return int(self.pairs.counts.per_row_host[:row].sum())

    @property
    def num_blocks(self) -> int:
        return len(self.all_pairs.per_block)

    @cached_property
    def by_row(self) -> torch.return_types.sort:  # [K] int64 each
        """Row and block of each pair in one number, ascending, and the pairs in this order."""
        return (self.pairs.row * self.num_blocks + self.pairs.block).sort()


def _columns_of_a_round(width: int, fitting: int, unit: int) -> int:
    """As many as fit, but at least a unit; a multiple of it, and no more than all rounds need."""
    rounds = triton.cdiv(width, max(fitting // unit, 1) * unit)
    return triton.cdiv(triton.cdiv(width, rounds), unit) * unit


def _product_dtype(dz: torch.Tensor) -> torch.dtype:
    # Under a loss scale, what single blocks add to a row may exceed fp16 where their sum does not.
    return torch.float32 if dz.dtype == torch.float16 else dz.dtype


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
