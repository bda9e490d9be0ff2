"""From the gradient of the logits to the gradients of the head: the two products of an exact backward.

Used by `triton_backend` and `triton_kl`, which form dz for one vocabulary chunk after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton

from csrc_triton import linear_logps as kernels
from csrc_triton.launch import Launch
from focalkern.backends import VOCAB_BLOCK, Gradients, HeadInputs, Needs, gradients_in_order, triton_tma
from focalkern.backends.triton_launch import (
    multiprocessors,
    on_device,
    product_launch_of,
    tile_grid,
    tile_options,
    tma_if_readable,
    without_tma,
)
from focalkern.layout import Rows, spread_over_hidden

if TYPE_CHECKING:
    from focalkern.distributed import PendingSums

# A backward chunk has as many vocabulary entries as `_DZ_BYTES` hold of dz, but not more than a quarter of
# the vocabulary; at least `_LEAST_CHUNK`; and for up to a million rows, not more than `_MAX_DZ_BYTES` hold.
# Each chunk is three launches, and reads and writes the fp32 partial sums of dhidden once: by count of bytes
# and operations, about 160/chunk of the backward on an A100 or H200.
_LEAST_CHUNK = 4096
_DZ_BYTES = 64 * 2**20
_MAX_DZ_BYTES = 256 * 2**20
_MAX_SPLITS = 8


class HeadGradients:
    """Gradients of a head, those that are needed; complete once every chunk of dz has been added."""

    def __init__(
        self,
        head: HeadInputs,
        rows: Rows,
        needs: Needs,
        dz_config: Launch,
        sums: PendingSums | None = None,
    ) -> None:
        """Of a head whose tensors have last strides of 1; `dz_config` is of the kernel that forms dz."""
        self.rows, self.n, self.vocab_size, self.sums = rows, rows.targets.numel(), head.weight.shape[0], sums
        device, dtype = head.hidden.device, head.hidden.dtype
        self.chunk = vocab_chunk(self.n, self.vocab_size, head.hidden.element_size())
        self.dz = torch.empty((self.n, self.chunk), dtype=dtype, device=device)
        self.products = [
            _ProductGradients(
                head, product, rows, needs_hidden, needs_weight, dz_config, is_shard=sums is not None
            )
            for product, needs_hidden, needs_weight in zip(
                head.products, needs[0::3], needs[1::3], strict=False
            )
        ]
        self.dbias = torch.empty_like(head.bias) if head.bias is not None and needs[2] else None
        by_tma = dz_config.tma or any(product.dweight_by_tma for product in self.products)
        with on_device(head.hidden):
            self.gathered = triton_tma.gather_rows(head.hidden, rows) if self.n and by_tma else None

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Start and size of each vocabulary chunk, in the order in which dz is to be added."""
        for start in range(0, self.vocab_size, self.chunk):
            yield start, min(self.chunk, self.vocab_size - start)

    def add(self, start: int, size: int) -> None:
        """Take in what `dz` now holds of the chunk; 0 in rows past the count, as far as a tile has them."""
        for product in self.products:
            product.add_dhidden(self.dz, start, size)
        if self.sums is not None and start + size == self.vocab_size:
            # Under way while the last chunk's dweight is computed.
            self.sums.start(*(x.partial[0] for x in self.products if x.partial is not None))
        for product in self.products:
            product.add_dweight(self.dz, self.gathered, start, size)
        if self.dbias is not None:
            kernels.linear_logps_bwd_dbias_kernel[(triton.cdiv(size, VOCAB_BLOCK),)](
                self.dz, self.rows.count, self.dbias, start, size, self.chunk, BLOCK_K=32, BLOCK_V=VOCAB_BLOCK
            )

    def result(self) -> Gradients:
        if self.sums is not None:
            self.sums.wait()
        dhidden, dweight = [x.whole_dhidden() for x in self.products], [x.dweight for x in self.products]
        return gradients_in_order(dhidden, dweight, self.dbias)


class _ProductGradients:
    """dhidden and dweight of one hidden @ weightᵀ of a head."""

    def __init__(
        self,
        head: HeadInputs,
        product: tuple[torch.Tensor, torch.Tensor],  # [M, K], [V, K]
        rows: Rows,
        needs_hidden: bool,
        needs_weight: bool,
        dz_config: Launch,
        is_shard: bool,  # of the vocabulary: dhidden is yet to be summed over shards
    ) -> None:
        (self.hidden, self.weight), self.rows = product, rows
        n, width, device = rows.targets.numel(), self.hidden.shape[1], self.hidden.device
        self.dweight_config = tma_if_readable(product_launch_of("bwd_dweight", self.hidden), head)
        self.dhidden_config = tma_if_readable(product_launch_of("bwd_dhidden", self.hidden), head)
        if dz_config.block_m % self.dweight_config.block_k:
            self.dweight_config = without_tma(self.dweight_config)
        self.dhidden = self.partial = self.dweight = None
        if needs_hidden:
            tiles = tile_grid(self.dhidden_config, n, width)[0]
            splits = splits_of_sum(tiles, multiprocessors(device))
            self.partial = torch.empty((splits, n, width), dtype=torch.float32, device=device)
            if not is_shard:  # else it is made of `partial[0]`, summed over the shards
                self.dhidden = torch.zeros(self.hidden.shape, dtype=self.hidden.dtype, device=device)
        if needs_weight:
            self.dweight = torch.empty(self.weight.shape, dtype=self.hidden.dtype, device=device)

    def whole_dhidden(self) -> torch.Tensor | None:
        if self.dhidden is not None or self.partial is None:
            return self.dhidden
        return spread_over_hidden(self.partial[0], self.hidden, self.rows)

    @property
    def dweight_by_tma(self) -> bool:
        return self.dweight is not None and self.dweight_config.tma

    def add_dweight(self, dz: torch.Tensor, gathered: torch.Tensor | None, start: int, size: int) -> None:
        config = self.dweight_config
        if self.dweight is None:
            return
        if self.dweight_by_tma and gathered is not None:
            triton_tma.dweight(dz, gathered, self.rows, config, self.dweight, start, size)
            return
        width = self.hidden.shape[1]
        kernels.linear_logps_bwd_dweight_kernel[tile_grid(config, size, width)](
            dz,
            self.hidden,
            self.rows.hidden_index,
            self.rows.count,
            self.dweight,
            start,
            size,
            dz.shape[1],
            width,
            self.hidden.stride(0),
            **tile_options(config, "BLOCK_N", self.hidden.dtype),
        )

    def add_dhidden(self, dz: torch.Tensor, start: int, size: int) -> None:
        (n, chunk), (vocab_size, width) = dz.shape, self.weight.shape
        if self.partial is None or not n:
            return
        splits, rows = self.partial.shape[0], self.rows
        if self.dhidden_config.tma:
            triton_tma.dhidden(
                dz, self.weight, rows, self.dhidden_config, self.partial, self.dhidden, start, size
            )
        else:
            grid = (*tile_grid(self.dhidden_config, n, width), splits)
            kernels.linear_logps_bwd_dhidden_kernel[grid](
                dz,
                self.weight,
                rows.hidden_index,
                rows.count,
                self.partial,
                self.dhidden,
                start,
                size,
                chunk,
                n,
                vocab_size,
                width,
                self.weight.stride(0),
                **tile_options(self.dhidden_config, "BLOCK_N", self.hidden.dtype),
            )
        if splits > 1 and start + size == vocab_size:
            out, index = self.dhidden, rows.hidden_index
            if out is None:
                out, index = self.partial[0], torch.arange(n, device=dz.device)
            kernels.linear_logps_bwd_dhidden_sum_kernel[(n, triton.cdiv(width, 1024))](
                self.partial,
                index,
                rows.count,
                out,
                splits,
                n,
                width,
                BLOCK_N=1024,
            )


def splits_of_sum(tiles: int, programs: int) -> int:
    """How many programs share the sum of a tile, where there are fewer tiles than programs at a time.

    With s splits the tiles take ⌈s·tiles / programs⌉ rounds of 1/s of the work each: the fewest splits that
    come within a tenth of the shortest time.
    """
    if not 0 < tiles < programs:
        return 1
    times = {splits: -(-splits * tiles // programs) / splits for splits in range(1, _MAX_SPLITS + 1)}
    return next(splits for splits, time in times.items() if time <= 1.1 * min(times.values()))


def vocab_chunk(n: int, vocab_size: int, element_size: int) -> int:
    def fitting(available: int) -> int:
        return max(available // (max(n, 1) * element_size), VOCAB_BLOCK)

    chunk = max(min(fitting(_DZ_BYTES), triton.cdiv(vocab_size, 4)), min(_LEAST_CHUNK, vocab_size))
    chunk = min(triton.cdiv(chunk, VOCAB_BLOCK), fitting(_MAX_DZ_BYTES) // VOCAB_BLOCK)
    return chunk * VOCAB_BLOCK
