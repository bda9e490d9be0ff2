"""What the torch backend makes a tile of logits from, and gradients: chunks, products, the logit transform.

Used by `torch_backend` (forward and exact backward), `torch_certified` and `torch_kl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from focalkern.backends import VOCAB_BLOCK, Gradients, HeadInputs, LogitTransform, Needs, gradients_in_order
from focalkern.layout import Rows, spread_over_hidden

if TYPE_CHECKING:
    from focalkern.distributed import PendingSums

# A tile of logits: 16 MB in fp32. Forward and backward of 2048 × 512 × 32768 in fp32 take 0.84 s with tiles
# of 8 MB, 0.89 s with 16, 1.06 s with 32 and with 64 (2 idle cores of an AMD EPYC, torch 2.13, 2026-11);
# where other processes want the cores, each call may wait for them, and few large ones lose less.
_TILE_ELEMENTS = 4 * 2**20
TILE_ROWS = 2048
_MAX_VOCAB_CHUNK = 4096

_SUM_BLOCK = 256
_NARROW = 128


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
    """Σ hidden @ weightᵀ + bias over the products of a head, for one set of rows and one vocabulary chunk
    after the other."""

    def __init__(self, hidden: list[torch.Tensor], is_fp32: bool) -> None:
        # oneDNN adds up the products of a logit one after the other, MKL in several sums: its error is 1.7
        # times MKL's at H = 512, 2.2 times at 4096. In blocks of 256 it is 1.2 times, for an eighth of the
        # speed of the whole. Rounding to fp16 or bf16 hides that difference.
        self.block = _SUM_BLOCK if is_fp32 and _is_onednn(hidden[0]) else None
        self.hidden = self._blocks(hidden)

    def __call__(self, weight: list[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        first, *rest = self._blocks(weight)
        z = matmul(self.hidden[0], first, bias)
        for hidden, block in zip(self.hidden[1:], rest, strict=True):
            z = torch.ops.mkldnn._linear_pointwise.binary(hidden, z, block, None, "add")
        return z

    def _blocks(self, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        first, *update = operands
        *blocks, last = first.split(self.block or first.shape[1], dim=1)
        # A copy of the weight's chunk takes less than a second pass over the logits: 3 against 12 % of their
        # product, 2048 × 512 × 2048 with an update of rank 16.
        last = torch.cat([last, *update], dim=1) if update else last
        return [block.contiguous() for block in (*blocks, last)]


def transform_logits(x: torch.Tensor, transform: LogitTransform) -> tuple[torch.Tensor, torch.Tensor | float]:
    """z = T(x) and dz/dx, in place where possible."""
    slope: torch.Tensor | float = transform.logit_scale / transform.temperature
    if transform.softcap is None:
        return (x if slope == 1.0 else x.mul_(slope)), slope
    t = x.mul_(transform.logit_scale / transform.softcap).tanh_()
    slope = t.square().neg_().add_(1.0).mul_(slope)
    return t.mul_(transform.softcap / transform.temperature), slope


class RowLogits:
    """Transformed logits of a set of rows under a head, for one vocabulary chunk after the other."""

    def __init__(self, head: HeadInputs, index: torch.Tensor, transform: LogitTransform) -> None:
        self.head, self.transform, self.dtype = head, transform, compute_dtype(head.hidden)
        self.hidden = [hidden[index].to(self.dtype) for hidden, _ in head.products]
        self.product = Logits(self.hidden, is_fp32=head.hidden.dtype == torch.float32)

    def __call__(
        self, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor | float, list[torch.Tensor]]:  # z, dz/dx, weights of the chunk
        weights = [weight[start:end].to(self.dtype).contiguous() for _, weight in self.head.products]
        bias = None if self.head.bias is None else self.head.bias[start:end].to(self.dtype)
        z, slope = transform_logits(self.product(weights, bias), self.transform)
        return z, slope, weights

    def poison(self) -> torch.Tensor:  # [rows]
        """NaN for a row whose hidden states are not all finite, else 0."""
        return torch.stack([nonfinite_to_nan(hidden, dim=1) for hidden in self.hidden]).sum(0)


class HeadGradients:
    """Gradients of a head, those that are needed; complete once every chunk of dz has been added."""

    def __init__(
        self,
        head: HeadInputs,
        rows: Rows,
        hidden: list[torch.Tensor],  # rows of each product's, [n, K], in the dtype that is computed in
        needs: Needs,
        sums: PendingSums | None = None,
    ) -> None:
        self.head, self.rows, self.hidden, self.sums = head, rows, hidden, sums
        self.dh = [
            torch.zeros_like(h) if needed else None for h, needed in zip(hidden, needs[0::3], strict=False)
        ]
        self.dweight = empty_gradients([weight for _, weight in head.products], needs[1::3])
        (self.dbias,) = empty_gradients([head.bias], needs[2:3])

    def add(self, dz: torch.Tensor, weights: list[torch.Tensor], start: int, end: int) -> None:
        """Take in dz = dL/d(hidden @ weightᵀ) of the chunk whose weights these are."""
        for dh, w in zip(self.dh, weights, strict=True):
            if dh is not None:
                dh += matmul(dz, w.t())
        if self.sums is not None and end == self.head.weight.shape[0]:
            # Under way while the last chunk's dweight is computed.
            self.sums.start(*(dh for dh in self.dh if dh is not None))
        for dweight, h in zip(self.dweight, self.hidden, strict=True):
            if dweight is not None:
                dweight[start:end] = _product_over_rows(dz, h)
        if self.dbias is not None:
            self.dbias[start:end] = dz.sum(0)

    def result(self) -> Gradients:
        if self.sums is not None:
            self.sums.wait()
        dhidden = [
            None if dh is None else spread_over_hidden(dh, hidden, self.rows)
            for dh, (hidden, _) in zip(self.dh, self.head.products, strict=True)
        ]
        return gradients_in_order(dhidden, self.dweight, self.dbias)


def _product_over_rows(
    dz: torch.Tensor,  # [n, c]
    h: torch.Tensor,  # [n, K]
) -> torch.Tensor:  # [c, K]
    # oneDNN, 2048 × 2048 × 16: 3.3 ms, and 1.1 ms the other way round (1 core of an AMD EPYC, torch 2.13,
    # 2026-11). That takes a copy of h, which is small where h is narrow.
    if h.shape[1] <= _NARROW:
        return matmul(h.t().contiguous(), dz.t()).t()
    return matmul(dz.t(), h.t())


def empty_gradients(
    tensors: Sequence[torch.Tensor | None], needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed and x is not None else None
        for x, needed in zip(tensors, needs, strict=False)
    ]
