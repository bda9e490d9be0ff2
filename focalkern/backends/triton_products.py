"""From the gradient of the logits to the gradients of the head: the two products of an exact backward.

Used by `triton_backend` and `triton_kl`, which form dz for one vocabulary chunk after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from csrc_triton import linear_logps as kernels
from focalkern.backends import VOCAB_BLOCK
from focalkern.backends.triton_launch import launch_of, tile_grid, tile_options
from focalkern.layout import Rows

# Vocabulary entries per backward chunk: dz takes rows × chunk × 2 bytes (67 MB at 8192 rows), at most
# `_MAX_DZ_BYTES` for up to a million rows. Each chunk reads and writes the fp32 partial sums of dhidden once:
# by count of bytes and operations, about 160/chunk of the backward on an A100 or H200.
_VOCAB_CHUNK = 4096
_MAX_DZ_BYTES = 256 * 2**20


class HeadGradients:
    """dhidden, dweight and dbias, those that are needed; complete once every chunk of dz has been added."""

    def __init__(
        self,
        hidden: torch.Tensor,  # [M, H], last stride 1
        weight: torch.Tensor,  # [V, H], last stride 1
        bias: torch.Tensor | None,  # [V]
        rows: Rows,
        needs: tuple[bool, bool, bool],  # which of dhidden, dweight, dbias
    ) -> None:
        needs_hidden, needs_weight, needs_bias = needs
        self.hidden, self.weight, self.rows = hidden, weight, rows
        self.n, (self.vocab_size, self.hidden_size) = rows.targets.numel(), weight.shape
        device, dtype = hidden.device, hidden.dtype
        self.dhidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if needs_hidden else None
        self.dweight = torch.empty(weight.shape, dtype=dtype, device=device) if needs_weight else None
        self.dbias = torch.empty_like(bias) if bias is not None and needs_bias else None

        self.chunk = vocab_chunk(self.n, self.vocab_size, hidden.element_size())
        self.dz = torch.empty((self.n, self.chunk), dtype=dtype, device=device)
        self.partial = None
        if needs_hidden:
            self.partial = torch.empty((self.n, self.hidden_size), dtype=torch.float32, device=device)
        self.dweight_config = launch_of("bwd_dweight", hidden)
        self.dhidden_config = launch_of("bwd_dhidden", hidden)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Start and size of each vocabulary chunk, in the order in which dz is to be added."""
        for start in range(0, self.vocab_size, self.chunk):
            yield start, min(self.chunk, self.vocab_size - start)

    def add(self, start: int, size: int) -> None:
        """Take in what `dz` now holds of the chunk."""
        if self.dweight is not None:
            kernels.linear_logps_bwd_dweight_kernel[tile_grid(self.dweight_config, size, self.hidden_size)](
                self.dz,
                self.hidden,
                self.rows.hidden_index,
                self.rows.count,
                self.dweight,
                start,
                size,
                self.chunk,
                self.hidden_size,
                self.hidden.stride(0),
                **tile_options(self.dweight_config, "BLOCK_N", self.hidden.dtype),
            )
        if self.dbias is not None:
            kernels.linear_logps_bwd_dbias_kernel[(triton.cdiv(size, VOCAB_BLOCK),)](
                self.dz, self.rows.count, self.dbias, start, size, self.chunk, BLOCK_K=32, BLOCK_V=VOCAB_BLOCK
            )
        if self.dhidden is not None and self.n:
            kernels.linear_logps_bwd_dhidden_kernel[tile_grid(self.dhidden_config, self.n, self.hidden_size)](
                self.dz,
                self.weight,
                self.rows.hidden_index,
                self.rows.count,
                self.partial,
                self.dhidden,
                start,
                size,
                self.chunk,
                self.vocab_size,
                self.hidden_size,
                self.weight.stride(0),
                **tile_options(self.dhidden_config, "BLOCK_N", self.hidden.dtype),
            )


def vocab_chunk(n: int, vocab_size: int, element_size: int) -> int:
    fitting = _MAX_DZ_BYTES // (max(n, 1) * element_size) // VOCAB_BLOCK * VOCAB_BLOCK
    chunk = min(max(fitting, VOCAB_BLOCK), _VOCAB_CHUNK)
    return min(chunk, triton.cdiv(vocab_size, VOCAB_BLOCK) * VOCAB_BLOCK)
