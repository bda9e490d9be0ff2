"""What every launch of the Triton backend needs: its tile, its scalars, the device to launch on.

Used by `triton_backend` (forward and exact backward) and `triton_certified`.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache

import torch
import triton

from csrc_triton.launch import GROUP_M, Launch, launch_config
from focalkern.backends import LogitTransform


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def scales(transform: LogitTransform) -> tuple[float, float]:
    """z = x·in_scale, or out_scale·tanh(x·in_scale) with a softcap."""
    if transform.softcap is None:
        return transform.logit_scale / transform.temperature, 1.0
    return transform.logit_scale / transform.softcap, transform.softcap / transform.temperature


def launch_of(kernel: str, hidden: torch.Tensor, small: bool = False) -> Launch:
    # Where 64 does not divide the hidden size, loads are masked or unvectorised: more registers for them.
    if small or hidden.shape[1] % 64:
        kernel += "_small"
    return launch_config(kernel, arch_of(hidden.device), hidden.element_size() * 8)


@lru_cache
def arch_of(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpret"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tile_grid(config: Launch, m: int, n: int) -> tuple[int]:
    return (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)


def tile_options(config: Launch, block_n: str, dtype: torch.dtype) -> dict[str, object]:
    return {
        "BLOCK_M": config.block_m,
        block_n: config.block_n,
        "GROUP_M": GROUP_M,
        **product_options(config, dtype),
    }


def product_options(config: Launch, dtype: torch.dtype) -> dict[str, object]:
    """What every kernel with a product takes, whatever its tiles are."""
    return {
        "PRECISION": precision(dtype),
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def precision(dtype: torch.dtype) -> str:
    """As torch.matmul multiplies on CUDA: fp32 in full unless the user chose tf32; 16 bits know no choice."""
    if dtype != torch.float32:
        return "ieee"
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        # Since torch 2.9. It follows the older setting, whose getter raises once this one has been used.
        chosen = torch.backends.cuda.matmul.fp32_precision
        chosen = torch.backends.fp32_precision if chosen == "none" else chosen  # type: ignore[attr-defined]
        return "tf32" if chosen == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
