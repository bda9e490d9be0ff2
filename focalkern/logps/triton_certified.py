"""The certified backward by Triton kernels: dz of the kept pairs, then dweight per block and dhidden per row.

The workspace is dz, its products with weight, and sums of these. The lists of pairs come on top, about 50
bytes a pair.

dz is kept for all pairs at once where the workspace holds it. Where it does not, dweight is made of some
blocks at a time and dhidden of some rows at a time, and dz is formed for each.

dhidden is made of some columns at a time. The products of a few blocks are added to the sums of their rows
before the products of the next blocks take their place. Where an L2 cache holds both, they need not go to
memory.
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
    gradients = step.gradients
    needs_hidden, needs_weight_or_bias = any(needs.of_hidden), any((*needs.of_weight, needs.bias))

    pair_bytes = VOCAB_BLOCK * head.hidden.element_size()
    for_products = workspace_bytes // 2 if needs_hidden else 0
    if (in_l2 := products_in_l2(g.device)) is not None:
        for_products = min(for_products, in_l2)
    most_pairs = max((workspace_bytes - for_products) // pair_bytes, 1)
    with on_device(head.hidden):
        if counts.total <= most_pairs:
            dz = step.dz(step.all_pairs)
            write_dweight = partial(step.write_dweight, step.all_pairs, dz, (0, len(counts.per_block)))
            # dhidden takes hundreds of launches, for which dweight gives the host time. Where shards add
            # dhidden up, that runs beside dweight.
            if reduction is None:
                write_dweight()
            if needs_hidden:
                step.write_dhidden(step.all_pairs, dz, (0, len(counts.per_row)), for_products)
            gradients.start_reduction()
            if reduction is not None:
                write_dweight()
            return gradients.result()

        if needs_hidden:
            for rows in _ranges(counts.per_row_host, most_pairs):
                group = step.group_of_rows(rows)
                step.write_dhidden(group, step.dz(group), rows, for_products)
        gradients.start_reduction()
        if needs_weight_or_bias:
            for blocks in _ranges(counts.per_block_host, most_pairs):
                group = step.all_pairs.in_blocks(blocks)
                step.write_dweight(group, step.dz(group), blocks)
    return gradients.result()


class _Group(NamedTuple):
    """Kept pairs whose dz, or whose products with weight, are held together."""

    pairs: PairGroup
    per_block: torch.Tensor  # [NB] int64: pairs.size on the host

    @classmethod
    def of(cls, start: torch.Tensor, size: torch.Tensor, per_block: torch.Tensor) -> _Group:
        return cls(PairGroup(start, size, size.cumsum(0) - size), per_block)

    @property
    def num_pairs(self) -> int:
        return int(self.per_block.sum())

    def in_blocks(self, blocks: tuple[int, int]) -> _Group:
        """Its pairs in these blocks; their places count from the first of them."""

        def cut(per_block: torch.Tensor) -> torch.Tensor:
            i_block = torch.arange(len(per_block), device=per_block.device)
            return torch.where((i_block >= blocks[0]) & (i_block < blocks[1]), per_block, 0)

        return _Group.of(self.pairs.start, cut(self.pairs.size), cut(self.per_block))

    def tiles(self, block_m: int) -> PairTiles:
        num_tiles = int(((self.per_block + block_m - 1) // block_m).sum())
        end = ((self.pairs.size + block_m - 1) // block_m).cumsum(0)
        i_tile = torch.arange(num_tiles, device=end.device)
        return PairTiles(end, torch.searchsorted(end, i_tile, right=True))


class _Part(NamedTuple):
    """Pairs of a group in some blocks, whose products with weight are held at once."""

    group: _Group
    first_place: int  # of the part, in the dz of all of the group
    start: torch.Tensor  # [rows] int64, of each row's pairs in `row_places`
    end: torch.Tensor  # [rows] int64


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

    def group_of_rows(self, rows: tuple[int, int]) -> _Group:
        first_key = torch.arange(self.num_blocks, device=self.by_block.device) * self.targets.numel()
        start, end = (torch.searchsorted(self.by_block, first_key + row) for row in rows)
        return _Group.of(start, end - start, (end - start).cpu())

    def dz(self, group: _Group) -> torch.Tensor:  # [pairs, 128]
        head, hidden = self.logits_head, self.head.hidden
        dz = torch.empty((group.num_pairs, VOCAB_BLOCK), dtype=hidden.dtype, device=hidden.device)
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
                group.pairs,
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
        order = blocks[0] + group.pairs.size[slice(*blocks)].argsort(descending=True, stable=True)
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
                group.pairs,
                dweight,
                Sizes(*weight.shape),
                found.tile(width),
                **found.options,
            )
        if dbias is not None:
            kernels.linear_logps_certified_dbias_kernel[(len(order),)](
                dz, order, group.pairs, dbias, self.head.vocab_size, BLOCK_K=32, **OPTIONS
            )

    def write_dhidden(
        self, group: _Group, dz: torch.Tensor, rows: tuple[int, int], for_products: int
    ) -> None:
        """These rows in dhidden of each product, in so many bytes for products and sums."""
        if not len(dz):
            return
        n, dtype = rows[1] - rows[0], _product_dtype(dz)
        places = self._row_places(group, rows)
        for (hidden, weight), dhidden in zip(self.head.products, self.gradients.dhidden, strict=True):
            if dhidden is None:
                continue
            width, found = weight.shape[1], product_entry("certified_product", hidden, self.few_rows)
            at_least = min(PRODUCT_COLUMNS, power_of_two(width))
            free = max(for_products - n * at_least * torch.float32.itemsize, for_products // 4)
            parts = self._parts(group, rows, free // (at_least * dtype.itemsize))
            most_pairs = max(part.group.num_pairs for part in parts)
            columns = max(free // (most_pairs * dtype.itemsize * at_least), 1) * at_least
            columns = min(columns, triton.cdiv(width, at_least) * at_least)
            product = torch.empty((most_pairs, columns), dtype=dtype, device=dz.device)
            # A single part needs no sums.
            sums = torch.empty((n if len(parts) > 1 else 0, columns), dtype=torch.float32, device=dz.device)

            inputs = [(dz[part.first_place :], part.group.tiles(found.config.block_m)) for part in parts]
            sizes, tile = Sizes(*weight.shape), found.tile(VOCAB_BLOCK)
            for first in range(0, width, columns):
                # The last round leaves nothing in L2 that would stay there.
                stays = products_in_l2(dz.device) is not None and first + columns < width
                eviction = "evict_last" if stays else ""
                for i_part, (part, (part_dz, tiles)) in enumerate(zip(parts, inputs, strict=True)):
                    grid = (len(tiles.block) * triton.cdiv(columns, found.config.block_n),)
                    kernels.linear_logps_certified_product_kernel[grid](
                        part_dz,
                        weight,
                        part.group.pairs,
                        tiles,
                        product,
                        first,
                        columns,
                        sizes,
                        tile,
                        EVICTION=eviction,
                        **found.options,
                    )
                    kernels.linear_logps_certified_dhidden_kernel[(n, triton.cdiv(columns, at_least))](
                        product,
                        places,
                        part.start,
                        part.end,
                        sums,
                        dhidden,
                        part.first_place,
                        rows[0],
                        first,
                        columns,
                        width,
                        i_part,
                        len(parts),
                        BLOCK_N=at_least,
                        BLOCK_K=8,
                        EVICTION=eviction,
                        num_warps=1,
                        **OPTIONS,
                    )

    def _parts(self, group: _Group, rows: tuple[int, int], most_pairs: int) -> list[_Part]:
        """The group, cut into ranges of blocks that have at most so many pairs."""
        keys, before = self.by_row.values, self._pairs_before(rows[0])
        first_key = torch.arange(*rows, device=keys.device) * self.num_blocks

        def row_starts(block: int) -> torch.Tensor:
            return torch.searchsorted(keys, first_key + block) - before

        parts, place, start = [], 0, row_starts(0)
        for blocks in _ranges(group.per_block, most_pairs):
            part, end = group.in_blocks(blocks), row_starts(blocks[1])
            if part.num_pairs:
                parts.append(_Part(part, place, start, end))
            place, start = place + part.num_pairs, end
        return parts

    def _row_places(self, group: _Group, rows: tuple[int, int]) -> torch.Tensor:
        """Where in dz the pairs of each row are, row after row."""
        pair = self.by_row.indices[slice(*map(self._pairs_before, rows))]
        block = self.pairs.block[pair]
        return pair - group.pairs.start[block] + group.pairs.place[block]

    def _pairs_before(self, row: int) -> int:
        return int(self.pairs.counts.per_row_host[:row].sum())

    @property
    def num_blocks(self) -> int:
        return len(self.all_pairs.per_block)

    @cached_property
    def by_block(self) -> torch.Tensor:  # [K] int64
        """Block and row of each pair in one number, ascending as the pairs are."""
        return self.pairs.block * self.targets.numel() + self.pairs.row

    @cached_property
    def by_row(self) -> torch.return_types.sort:  # [K] int64 each
        """Row and block of each pair in one number, ascending, and the pairs in this order."""
        return (self.pairs.row * self.num_blocks + self.pairs.block).sort()


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
