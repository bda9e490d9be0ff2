"""What the torch backend makes a tile of logits from: products, the logit transform, the label's place.

Used by `torch_backend` (forward and exact backward) and `torch_certified`.
"""

from __future__ import annotations

import torch

from focalkern.backends import LogitTransform

_SUM_BLOCK = 256


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


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
