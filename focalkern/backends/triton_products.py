"""From the gradient of the logits to the gradients of the head: the two products of an exact backward.

Used by `triton_backend` and `triton_kl`, which form dz for one vocabulary chunk after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from csrc_triton import linear_logps as kernels
from focalkern.backends import VOCAB_BLOCK, Gradients, HeadInputs, Needs, gradients_in_order
from focalkern.backends.triton_launch import product_launch_of, tile_grid, tile_options
from focalkern.layout import Rows

# Vocabulary entries per backward chunk: dz takes rows × chunk × 2 bytes (67 MB at 8192 rows), at most
# `_MAX_DZ_BYTES` for up to a million rows. Each chunk reads and writes the fp32 partial sums of dhidden once:
# by count of bytes and operations, about 160/chunk of the backward on an A100 or H200.
_VOCAB_CHUNK = 4096
_MAX_DZ_BYTES = 256 * 2**20


class HeadGradients:
    """Gradients of a head, those that are needed; complete once every chunk of dz has been added."""

    def __init__(self, head: HeadInputs, rows: Rows, needs: Needs) -> None:
        """Of a head whose tensors have last strides of 1."""
        self.rows, self.n, self.vocab_size = rows, rows.targets.numel(), head.weight.shape[0]
        device, dtype = head.hidden.device, head.hidden.dtype
        self.chunk = vocab_chunk(self.n, self.vocab_size, head.hidden.element_size())
        self.dz = torch.empty((self.n, self.chunk), dtype=dtype, device=device)
        self.products = [
            _ProductGradients(hidden, weight, self.n, needs_hidden, needs_weight)
            for (hidden, weight), needs_hidden, needs_weight in zip(
                head.products, needs[0::3], needs[1::3], strict=False
            )
        ]
        self.dbias = torch.empty_like(head.bias) if head.bias is not None and needs[2] else None

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Start and size of each vocabulary chunk, in the order in which dz is to be added."""
        for start in range(0, self.vocab_size, self.chunk):
            yield start, min(self.chunk, self.vocab_size - start)

    def add(self, start: int, size: int) -> None:
        """Take in what `dz` now holds of the chunk."""
        for product in self.products:
            product.add(self.dz, self.rows, start, size)
        if self.dbias is not None:
            kernels.linear_logps_bwd_dbias_kernel[(triton.cdiv(size, VOCAB_BLOCK),)](
                self.dz, self.rows.count, self.dbias, start, size, self.chunk, BLOCK_K=32, BLOCK_V=VOCAB_BLOCK
            )

    def result(self) -> Gradients:
        dhidden, dweight = [x.dhidden for x in self.products], [x.dweight for x in self.products]
        return gradients_in_order(dhidden, dweight, self.dbias)


class _ProductGradients:
    """dhidden and dweight of one hidden @ weightᵀ."""

    def __init__(
        self,
        hidden: torch.Tensor,  # [M, K]
        weight: torch.Tensor,  # [V, K]
        n: int,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> None:
        self.hidden, self.weight = hidden, weight
        self.dhidden = self.partial = self.dweight = None
        if needs_hidden:
            self.dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
            self.partial = torch.empty((n, hidden.shape[1]), dtype=torch.float32, device=hidden.device)
        if needs_weight:
            self.dweight = torch.empty(weight.shape, dtype=hidden.dtype, device=hidden.device)
        self.dweight_config = product_launch_of("bwd_dweight", hidden)
        self.dhidden_config = product_launch_of("bwd_dhidden", hidden)

    def add(self, dz: torch.Tensor, rows: Rows, start: int, size: int) -> None:
        (n, chunk), (vocab_size, width) = dz.shape, self.weight.shape
        if self.dweight is not None:
            kernels.linear_logps_bwd_dweight_kernel[tile_grid(self.dweight_config, size, width)](
                dz,
                self.hidden,
                rows.hidden_index,
                rows.count,
                self.dweight,
                start,
                size,
                chunk,
                width,
                self.hidden.stride(0),
                **tile_options(self.dweight_config, "BLOCK_N", self.hidden.dtype),
            )
        if self.dhidden is not None and n:
            kernels.linear_logps_bwd_dhidden_kernel[tile_grid(self.dhidden_config, n, width)](
                dz,
                self.weight,
                rows.hidden_index,
                rows.count,
                self.partial,
                self.dhidden,
                start,
                size,
                chunk,
                vocab_size,
                width,
                self.weight.stride(0),
                **tile_options(self.dhidden_config, "BLOCK_N", self.hidden.dtype),
            )


def vocab_chunk(n: int, vocab_size: int, element_size: int) -> int:
    fitting = _MAX_DZ_BYTES // (max(n, 1) * element_size) // VOCAB_BLOCK * VOCAB_BLOCK
    chunk = min(max(fitting, VOCAB_BLOCK), _VOCAB_CHUNK)
    return min(chunk, triton.cdiv(vocab_size, VOCAB_BLOCK) * VOCAB_BLOCK)
