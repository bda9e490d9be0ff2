"""The choice between Triton and plain PyTorch."""

from __future__ import annotations

import importlib.util
import os

import torch

from focalkern import checks

# Looked for, not imported: that takes its time.
HAS_TRITON = importlib.util.find_spec("triton") is not None

# tl.dot on bf16 needs tensor cores of Ampere or later; older GPUs take the torch backend.
_MIN_CAPABILITY = (8, 0)


def select_backend(name: str, hidden: torch.Tensor) -> str:
    """ "triton" or "torch". `auto`: triton where it runs (CUDA of capability 8.0 or later, not float64)."""
    reason = _why_not_triton(hidden)
    if name == "auto" and hidden.is_cuda and reason and hidden.dtype != torch.float64:
        checks.warn_once(f"backend='auto' takes the torch backend, the slower one: triton {reason}")
    if name == "triton" and reason:
        raise ValueError(f"backend='triton' {reason}; use backend='torch' or 'auto'")
    # Only by name under the interpreter, which runs the kernels on the CPU for tests, very slowly.
    if name == "triton" or (name == "auto" and hidden.is_cuda and not reason):
        return "triton"
    return "torch"


def _why_not_triton(hidden: torch.Tensor) -> str | None:
    if not HAS_TRITON:
        return "needs the triton package, which is not installed"
    if hidden.dtype == torch.float64:
        return "takes float32, float16 or bfloat16 hidden; got float64"
    if not hidden.is_cuda:
        if hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"needs hidden on a CUDA device; got {hidden.device}"
    if torch.version.hip is not None:
        return "has no launch configuration for AMD GPUs"
    if torch.cuda.get_device_capability(hidden.device) < _MIN_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or later"
    return None
