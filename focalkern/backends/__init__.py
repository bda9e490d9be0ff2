"""What a backend takes and returns, and the choice between the two. A backend is a module with three
functions:

    head_forward(hidden, weight, bias, rows, transform, outputs) -> HeadForward
    head_backward(hidden, weight, bias, rows, transform, lse, one_minus_p, entropy, grad_logps, grad_entropy,
    needs)
        -> dhidden, dweight, dbias, None where not needed
    pair_forward(logps, sequences, ref_logps, objective) -> PairForward

Called by `focalkern.autograd`; knows tensors and numbers, not autograd.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import torch

try:
    import triton  # noqa: F401

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

# The vocabulary is described in blocks of this many entries: one lse per row and block.
VOCAB_BLOCK = 128
# tl.dot on bf16 needs tensor cores of Ampere or later; older GPUs take the torch backend.
_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class LogitTransform:
    """z = T(hidden @ weightᵀ + bias): times logit_scale, softcap·tanh(·/softcap), over temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class HeadForward:
    """Per row (n completion tokens) what the backward needs; per output position what the caller sees.

    Outputs are flat, 0 where ignored; those not asked for are None. The label is left out of `block_lse`, so
    that 1 − p_y is a ratio of sums and not a difference of nearly equal numbers.
    """

    logps: torch.Tensor  # [outputs] fp32
    lse: torch.Tensor  # [n] logsumexp over the vocabulary
    one_minus_p: torch.Tensor  # [n] 1 − p_y
    block_lse: torch.Tensor  # [n, ceil(V / 128)] logsumexp of each vocabulary block without the label
    entropy: torch.Tensor | None = None  # [outputs]
    mean_logits: torch.Tensor | None = None  # [outputs]
    is_top1: torch.Tensor | None = None  # [outputs] bool
    log_sum_sq_probs: torch.Tensor | None = None  # [outputs]


@dataclass(frozen=True)
class PairObjective:
    """The numbers of the pairwise loss; formulas in `focalkern.objective`."""

    beta: float
    gamma: float
    modulation: str
    margin: float
    length_normalize: bool
    label_smoothing: float


@dataclass(frozen=True)
class PairForward:
    """Per pair and per sequence (chosen first), fp32."""

    losses: torch.Tensor  # [B]
    prob: torch.Tensor  # [B] p = σ(u)
    slope: torch.Tensor  # [B] dL/du
    logps: torch.Tensor  # [2B] sums over completion tokens
    rewards: torch.Tensor  # [2B] β·score
    grad_logps: torch.Tensor  # [2B] dL/dlogps of every token of the sequence


def select_backend(name: str, hidden: torch.Tensor) -> ModuleType:
    """The backend's module. `auto`: triton where it runs (CUDA of capability 8.0 or later, not float64), else
    torch."""
    if name == "auto":
        name = "torch" if _why_not_triton(hidden) else "triton"
    elif name == "triton":
        reason = _why_not_triton(hidden)
        if reason:
            raise ValueError(f"backend='triton' {reason}; use backend='torch' or 'auto'")
    return importlib.import_module(f"focalkern.backends.{name}_backend")


def _why_not_triton(hidden: torch.Tensor) -> str | None:
    if not HAS_TRITON:
        return "needs the triton package, which is not installed"
    if hidden.dtype == torch.float64:
        return "takes float32, float16 or bfloat16 hidden; got float64"
    if not hidden.is_cuda:
        if hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"needs hidden on a CUDA device; got {hidden.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(hidden.device) < _MIN_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or later"
    return None
