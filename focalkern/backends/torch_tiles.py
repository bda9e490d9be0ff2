"""What the torch backend makes a tile of logits from, and gradients: chunks, products, the logit transform.

Used by `torch_backend` (forward and exact backward), `torch_certified` and `torch_kl`.
"""

from __future__ import annotations

import torch

from focalkern.backends import VOCAB_BLOCK, LogitTransform
from focalkern.layout import Rows

# A tile of logits: 16 MB in fp32. Forward and backward of 2048 × 512 × 32768 in fp32 take 0.84 s with tiles
# of 8 MB, 0.89 s with 16, 1.06 s with 32 and with 64 (2 idle cores of an AMD EPYC, torch 2.13, 2026-11);
# where other processes want the cores, each call may wait for them, and few large ones lose less.
_TILE_ELEMENTS = 4 * 2**20
TILE_ROWS = 2048
_MAX_VOCAB_CHUNK = 4096

_SUM_BLOCK = 256


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def vocab_chunks(vocab_size: int, n: int) -> list[tuple[int, int]]:
    blocks = _TILE_ELEMENTS // max(n, 1) // VOCAB_BLOCK
    chunk = min(max(blocks, 1) * VOCAB_BLOCK, _MAX_VOCAB_CHUNK)
    return [(start, min(start + chunk, vocab_size)) for start in range(0, vocab_size, chunk)]


def nonfinite_to_nan(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """NaN where x holds NaN or inf, else 0: for what a softmax would turn into 0, or a tanh into 1."""
    low, high = torch.aminmax(x) if dim is None else torch.aminmax(x, dim=dim)
    return (low - low) + (high - high)


def targets_in(column: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose label lies in a chunk of `width` entries, and the label's column there."""
    row = ((column >= 0) & (column < width)).nonzero().squeeze(-1)
    return row, column[row]


def _onednn_linear_works() -> bool:
    # Private to torch, used by its compiler: seen to work rather than trusted.
    try:
        x, ones = torch.ones(2, 3), torch.ones(4, 3)
        y = torch.ops.mkldnn._linear_pointwise(x, ones, None, "none", [], "")
        y = torch.ops.mkldnn._linear_pointwise.binary(x, y, ones, None, "add")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((y == 6).all())


_HAS_ONEDNN_LINEAR = _onednn_linear_works()


def _is_onednn(x: torch.Tensor) -> bool:
    return _HAS_ONEDNN_LINEAR and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


def matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a @ bᵀ (+ bias); each contiguous, or the transpose of a contiguous tensor."""
    # oneDNN's fp32 product, where torch.mm takes MKL's: 500 against 225 GFLOP/s on 2 cores of an AMD EPYC
    # (Zen 5), 2048 × 512 × 2048, torch 2.13, 2026-11. Other strides take it a thousand times as long.
    if _is_onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return torch.nn.functional.linear(a, b, bias)


def has_native_product(x: torch.Tensor) -> bool:
    """Whether products of this 16-bit dtype are faster than fp32's and add up in fp32."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return x.is_cuda or (x.device.type == "cpu" and x.dtype == torch.bfloat16 and _HAS_BF16_PRODUCTS)


# Private to torch too. Without these instructions a bf16 product is emulated, at less than fp32's speed.
_HAS_BF16_PRODUCTS = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


class Logits:
    """hidden @ weightᵀ + bias of one set of rows, for one vocabulary chunk after the other."""

    def __init__(self, hidden: torch.Tensor, is_fp32: bool) -> None:
        # oneDNN adds up the products of a logit one after the other, MKL in several sums: its error is 1.7
        # times MKL's at H = 512, 2.2 times at 4096. In blocks of 256 it is 1.2 times, for an eighth of the
        # speed of the whole. Rounding to fp16 or bf16 hides that difference.
        hidden_size = hidden.shape[1]
        self.block = _SUM_BLOCK if is_fp32 and _is_onednn(hidden) else hidden_size
        self.hidden = [block.contiguous() for block in hidden.split(self.block, dim=1)]

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        first, *rest = (block.contiguous() for block in weight.split(self.block, dim=1))
        z = matmul(self.hidden[0], first, bias)
        for hidden, block in zip(self.hidden[1:], rest, strict=True):
            z = torch.ops.mkldnn._linear_pointwise.binary(hidden, z, block, None, "add")
        return z


def transform_logits(x: torch.Tensor, transform: LogitTransform) -> tuple[torch.Tensor, torch.Tensor | float]:
    """z = T(x) and dz/dx, in place where possible."""
    slope: torch.Tensor | float = transform.logit_scale / transform.temperature
    if transform.softcap is None:
        return (x if slope == 1.0 else x.mul_(slope)), slope
    t = x.mul_(transform.logit_scale / transform.softcap).tanh_()
    slope = t.square().neg_().add_(1.0).mul_(slope)
    return t.mul_(transform.softcap / transform.temperature), slope


class HeadGradients:
    """dhidden, dweight and dbias, those that are needed; complete once every chunk of dz has been added."""

    def __init__(
        self,
        hidden: torch.Tensor,  # [M, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        rows: Rows,
        h: torch.Tensor,  # [n, H] the rows of hidden, in the dtype that is computed in
        needs: tuple[bool, bool, bool],  # which of dhidden, dweight, dbias
    ) -> None:
        needs_hidden, needs_weight, needs_bias = needs
        self.hidden, self.rows, self.h = hidden, rows, h
        self.dh = torch.zeros_like(h) if needs_hidden else None
        self.dweight = None
        if needs_weight:
            self.dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        self.dbias = torch.empty_like(bias) if bias is not None and needs_bias else None

    def add(self, dz: torch.Tensor, w: torch.Tensor, start: int, end: int) -> None:
        """Take in dz = dL/d(hidden @ weightᵀ) of the chunk whose weight is `w`."""
        if self.dweight is not None:
            self.dweight[start:end] = matmul(dz.t(), self.h.t())
        if self.dbias is not None:
            self.dbias[start:end] = dz.sum(0)
        if self.dh is not None:
            self.dh += matmul(dz, w.t())

    def dhidden(self) -> torch.Tensor | None:
        if self.dh is None:
            return None
        dhidden = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        dhidden[self.rows.hidden_index] = self.dh.to(self.hidden.dtype)
        return dhidden
