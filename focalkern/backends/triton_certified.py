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

import torch
import triton

from csrc_triton import certified as kernels
from focalkern.backends import VOCAB_BLOCK, LogitTransform
from focalkern.backends.triton_launch import launch_of, on_device, product_options, scales, unit_stride
from focalkern.layout import Rows
from focalkern.selection import KeptPairs

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
    hidden: torch.Tensor,  # [M, H]
    weight: torch.Tensor,  # [V, H]
    bias: torch.Tensor | None,  # [V]
    rows: Rows,
    transform: LogitTransform,
    lse: torch.Tensor,  # [n]
    one_minus_p: torch.Tensor,  # [n]
    g: torch.Tensor,  # [n]
    pairs: KeptPairs,
    tau: float,
    needs: tuple[bool, bool, bool],  # which of dhidden, dweight, dbias
    workspace_bytes: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients from the kept pairs alone; rows of dweight that no pair needs are zero."""
    step = _Step(unit_stride(hidden), unit_stride(weight), bias, rows, transform, lse, one_minus_p, g, pairs)
    needs_hidden, needs_weight, needs_bias = needs
    counts = pairs.counts
    dhidden = torch.zeros_like(step.hidden, memory_format=torch.contiguous_format) if needs_hidden else None
    dweight = torch.empty_like(step.weight, memory_format=torch.contiguous_format) if needs_weight else None
    dbias = torch.empty_like(bias) if bias is not None and needs_bias else None

    pair_bytes = VOCAB_BLOCK * hidden.element_size()
    product_bytes = _PRODUCT_COLUMNS * _product_dtype(hidden).itemsize if needs_hidden else 0
    most_pairs = max(workspace_bytes // (pair_bytes + product_bytes), 1)
    with on_device(hidden):
        if counts.total <= most_pairs:
            everything = _Slice.of(counts.total, step.block_start, counts.per_block)
            dz = step.dz(everything)
            step.write_dweight(everything, dz, (0, len(counts.per_block)), dweight, dbias)
            if dhidden is not None:
                free = workspace_bytes - counts.total * pair_bytes
                step.write_dhidden(everything, dz, (0, rows.targets.numel()), free, dhidden)
            return dhidden, dweight, dbias

        if dweight is not None or dbias is not None:
            for blocks in _ranges(counts.per_block_host, most_pairs):
                part = step.slice_of_blocks(blocks)
                step.write_dweight(part, step.dz(part), blocks, dweight, dbias)
        if dhidden is not None:
            for range_of_rows in _ranges(counts.per_row_host, most_pairs):
                part = step.slice_of_rows(range_of_rows)
                free = workspace_bytes - part.count * pair_bytes
                step.write_dhidden(part, step.dz(part), range_of_rows, free, dhidden)
    return dhidden, dweight, dbias


class _Step:
    """One backward: its tensors, and the three kinds of launches."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: Rows,
        transform: LogitTransform,
        lse: torch.Tensor,
        one_minus_p: torch.Tensor,
        g: torch.Tensor,
        pairs: KeptPairs,
    ) -> None:
        self.hidden, self.weight, self.bias, self.rows = hidden, weight, bias, rows
        self.transform, self.lse, self.one_minus_p, self.g, self.pairs = transform, lse, one_minus_p, g, pairs
        self.block_start = pairs.counts.per_block.cumsum(0) - pairs.counts.per_block
        self.row_start = torch.nn.functional.pad(pairs.counts.per_row.cumsum(0), (1, 0))

    def slice_of_blocks(self, blocks: tuple[int, int]) -> _Slice:
        counts = self.pairs.counts
        i_block = torch.arange(len(counts.per_block), device=self.hidden.device)
        inside = (i_block >= blocks[0]) & (i_block < blocks[1])
        size = torch.where(inside, counts.per_block, 0)
        return _Slice.of(int(counts.per_block_host[slice(*blocks)].sum()), self.block_start, size)

    def slice_of_rows(self, rows: tuple[int, int]) -> _Slice:
        first_key = torch.arange(len(self.block_start), device=self.key.device) * self.rows.targets.numel()
        start, end = (torch.searchsorted(self.key, first_key + row) for row in rows)
        return _Slice.of(int(self.pairs.counts.per_row_host[slice(*rows)].sum()), start, end - start)

    def dz(self, part: _Slice) -> torch.Tensor:  # [pairs, 128]
        hidden, weight = self.hidden, self.weight
        dz = torch.empty((part.count, VOCAB_BLOCK), dtype=hidden.dtype, device=hidden.device)
        config = launch_of("certified_dz", hidden, small=self.transform.softcap is not None)
        tile_end, tile_block = part.tiles(config.block_m)
        in_scale, out_scale = scales(self.transform)
        if part.count:
            kernels.certified_dz_kernel[(len(tile_block),)](
                hidden,
                weight,
                self.bias,
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
                *weight.shape,
                hidden.stride(0),
                weight.stride(0),
                in_scale,
                out_scale,
                HAS_BIAS=self.bias is not None,
                HAS_SOFTCAP=self.transform.softcap is not None,
                EVEN_H=hidden.shape[1] % config.block_k == 0,
                BLOCK_M=config.block_m,
                **product_options(config, hidden.dtype),
            )
        return dz

    def write_dweight(
        self,
        part: _Slice,
        dz: torch.Tensor,
        blocks: tuple[int, int],
        dweight: torch.Tensor | None,
        dbias: torch.Tensor | None,
    ) -> None:
        vocab_size, hidden_size = self.weight.shape
        # A few blocks hold frequent tokens and are needed by most rows: they are to start first.
        order = blocks[0] + part.size[slice(*blocks)].argsort(descending=True, stable=True)
        if dweight is not None:
            config = launch_of("certified_dweight", self.hidden)
            kernels.certified_dweight_kernel[(len(order) * triton.cdiv(hidden_size, config.block_n),)](
                dz,
                self.hidden,
                self.rows.hidden_index,
                self.pairs.row,
                order,
                part.start,
                part.size,
                part.place,
                dweight,
                vocab_size,
                hidden_size,
                self.hidden.stride(0),
                BLOCK_N=config.block_n,
                **product_options(config, self.hidden.dtype),
            )
        if dbias is not None:
            kernels.certified_dbias_kernel[(len(order),)](
                dz, order, part.size, part.place, dbias, vocab_size, BLOCK_K=32
            )

    def write_dhidden(
        self, part: _Slice, dz: torch.Tensor, rows: tuple[int, int], free_bytes: int, dhidden: torch.Tensor
    ) -> None:
        if not part.count:
            return
        vocab_size, hidden_size = self.weight.shape
        dtype = _product_dtype(self.hidden)
        column_bytes = part.count * dtype.itemsize
        columns = max(free_bytes // column_bytes // _PRODUCT_COLUMNS, 1) * _PRODUCT_COLUMNS
        columns = min(columns, triton.cdiv(hidden_size, _PRODUCT_COLUMNS) * _PRODUCT_COLUMNS)
        product = torch.empty((part.count, columns), dtype=dtype, device=dz.device)
        row_places, first_place = self._row_places(part, rows)
        config = launch_of("certified_product", self.hidden)
        tile_end, tile_block = part.tiles(config.block_m)

        for first_column in range(0, hidden_size, columns):
            kernels.certified_product_kernel[(len(tile_block) * triton.cdiv(columns, config.block_n),)](
                dz,
                self.weight,
                part.size,
                part.place,
                tile_end,
                tile_block,
                product,
                first_column,
                columns,
                len(part.size),
                vocab_size,
                hidden_size,
                self.weight.stride(0),
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                **product_options(config, self.hidden.dtype),
            )
            kernels.certified_dhidden_kernel[(rows[1] - rows[0], triton.cdiv(columns, _PRODUCT_COLUMNS))](
                product,
                row_places,
                self.row_start,
                self.rows.hidden_index,
                self.rows.count,
                dhidden,
                rows[0],
                first_place,
                first_column,
                columns,
                hidden_size,
                BLOCK_N=_PRODUCT_COLUMNS,
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
