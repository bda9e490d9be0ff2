"""Logits in plain PyTorch, one vocabulary chunk after the other: products in fp32, and the logit transform.

Products are formed in fp32 whatever the input dtype: on CPU a bf16 product rounds its result to bf16, which
costs a gradient error of 5e-2. Used by the torch forms of `logps` and `kl`, and by `products`.
`fp32_products` is what `triton_launch` and `trial` ask.
"""

from __future__ import annotations

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.records import Head, LogitTransform

# A tile of logits: 8 MB in fp32. Forward and backward of 2048 × 512 × 32768 in fp32 take 1.60 s with tiles of
# 8 MB, 1.67 s with 4 and 1.75 s with 16 (2 idle cores of an AMD EPYC Zen 4, torch 2.13, 2026-12); where other
# processes want the cores, each call may wait for them, and few large ones lose less: 16 MB are 8 % faster.
_TILE_ELEMENTS = 2 * 2**20
TILE_ROWS = 2048
_MAX_VOCAB_CHUNK = 4096

_SUM_BLOCK = 256

# PyTorch 2.13: the first multi-threaded exp of a process can be off by 1e-4 in one thread's share.
torch.exp(torch.zeros(16))


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def fp32_products(device_type: str) -> str:
    """How torch multiplies float32 matrices there, by the user's setting: "ieee", "tf32" or "bf16"."""
    backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    if hasattr(backend.matmul, "fp32_precision"):
        # Since torch 2.9. It follows the older setting, whose getter raises once this one has been used.
        chosen = backend.matmul.fp32_precision
        chosen = torch.backends.fp32_precision if chosen == "none" else chosen  # type: ignore[attr-defined]
        return "ieee" if chosen == "none" else chosen
    medium = "bf16" if device_type == "cpu" else "tf32"
    return {"highest": "ieee", "high": "tf32", "medium": medium}[torch.get_float32_matmul_precision()]


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


def in_blocks(z: torch.Tensor) -> torch.Tensor:  # [n, c] -> [n, blocks, 128]
    """Columns as vocabulary blocks, the last one filled up."""
    if z.shape[1] % VOCAB_BLOCK:
        z = torch.nn.functional.pad(z, (0, -z.shape[1] % VOCAB_BLOCK), value=-torch.inf)
    return z.unflatten(1, (-1, VOCAB_BLOCK))


def _onednn_linear_works() -> bool:
    # Private to torch, used by its compiler: seen to work rather than trusted.
    try:
        x, ones = torch.ones(2, 3), torch.ones(4, 3)
        y = torch.ops.mkldnn._linear_pointwise(x, ones, None, "none", [], "")
        y = torch.ops.mkldnn._linear_pointwise.binary(x, y, ones, None, "add")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((y == 6).all())


# Private to torch. Without these instructions a bf16 product is emulated, at less than fp32's speed.
HAS_BF16_PRODUCTS = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
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


def transform_logits(x: torch.Tensor, transform: LogitTransform) -> tuple[torch.Tensor, torch.Tensor | float]:
    """z = T(x) and dz/dx, in place where possible."""
    slope: torch.Tensor | float = transform.logit_scale / transform.temperature
    if transform.softcap is None:
        return (x if slope == 1.0 else x.mul_(slope)), slope
    t = x.mul_(transform.logit_scale / transform.softcap).tanh_()
    slope = t.square().neg_().add_(1.0).mul_(slope)
    return t.mul_(transform.softcap / transform.temperature), slope


def times_slope(dz: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    """From the gradient of z to that of hidden @ weightᵀ, in place."""
    return dz if isinstance(slope, float) and slope == 1.0 else dz.mul_(slope)


class Product:
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


class Logits:
    """Transformed logits of some rows of a head, for one vocabulary chunk after the other."""

    def __init__(self, head: Head, transform: LogitTransform, rows: slice = slice(None)) -> None:
        self.head, self.transform, self.dtype = head, transform, compute_dtype(head.hidden)
        self.hidden = [hidden[rows].to(self.dtype) for hidden, _ in head.products]
        self.product = Product(self.hidden, is_fp32=head.hidden.dtype == torch.float32)

    def __call__(
        self, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor | float, list[torch.Tensor]]:  # z, dz/dx, weights of the chunk
        weights = [weight[start:end].to(self.dtype) for _, weight in self.head.products]
        bias = None if self.head.bias is None else self.head.bias[start:end].to(self.dtype)
        z, slope = transform_logits(self.product(weights, bias), self.transform)
        return z, slope, weights

    def poison(self) -> torch.Tensor:  # [rows]
        """NaN for a row whose hidden states are not all finite, else 0."""
        return torch.stack([nonfinite_to_nan(hidden, dim=1) for hidden in self.hidden]).sum(0)
