"""What every launch of the Triton backend needs: its tile, its scalars, the device to launch on.

Used by `triton_backend` (forward and exact backward) and `triton_certified`.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from functools import lru_cache

import torch
import triton

from csrc_triton.launch import GROUP_M, NARROW_COLUMNS, Launch, launch_config
from focalkern.backends import VOCAB_BLOCK, HeadInputs, LogitTransform


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def unit_strides(head: HeadInputs) -> HeadInputs:
    return replace(
        head,
        hidden=unit_stride(head.hidden),
        weight=unit_stride(head.weight),
        update_hidden=None if head.update_hidden is None else unit_stride(head.update_hidden),
        update_weight=None if head.update_weight is None else unit_stride(head.update_weight),
    )


def with_aligned_update(head: HeadInputs) -> HeadInputs:
    """The same logits from an update whose rank and strides are multiples of 16, by columns of zeros.

    The tile of logits has no registers left for masks or for loads of single elements.
    """

    def aligned(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None or (x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0):
            return x
        return torch.nn.functional.pad(x, (0, -x.shape[1] % 16)).contiguous()

    return replace(head, update_hidden=aligned(head.update_hidden), update_weight=aligned(head.update_weight))


# The arguments of a kernel that makes logits, of a head with an aligned update.


def tensors(head: HeadInputs) -> tuple[torch.Tensor | None, ...]:
    return head.hidden, head.weight, head.bias, head.update_hidden, head.update_weight


def sizes(head: HeadInputs) -> tuple[int, int, int]:
    """V, H and the rank of the update, 0 without one."""
    (vocab_size, hidden_size), update = head.weight.shape, head.update_weight
    return vocab_size, hidden_size, 0 if update is None else update.shape[1]


def strides(head: HeadInputs) -> tuple[int, ...]:
    update = head.update_hidden, head.update_weight
    return (
        head.hidden.stride(0),
        head.weight.stride(0),
        *(0 if tensor is None else tensor.stride(0) for tensor in update),
    )


def head_options(head: HeadInputs, transform: LogitTransform, config: Launch) -> dict[str, object]:
    """What a kernel that makes logits is compiled for, beside its tile."""
    rank = sizes(head)[2]
    return {
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": transform.softcap is not None,
        "EVEN_H": head.hidden.shape[1] % config.block_k == 0,
        "BLOCK_R": math.gcd(rank, config.block_k) if rank else 0,
    }


def power_of_two(columns: int) -> int:
    """The columns of a tile that is to hold so many: products take 16 or more."""
    return max(triton.next_power_of_2(columns), 16)


def scales(transform: LogitTransform) -> tuple[float | None, float]:
    """z = x·in_scale, or out_scale·tanh(x·in_scale) with a softcap. None is 1, and spares the product."""
    if transform.softcap is None:
        in_scale = transform.logit_scale / transform.temperature
        return None if in_scale == 1.0 else in_scale, 1.0
    return transform.logit_scale / transform.softcap, transform.softcap / transform.temperature


def launch_of(kernel: str, hidden: torch.Tensor, small: bool = False, few_rows: bool = False) -> Launch:
    # Where 64 does not divide the hidden size, loads are masked or unvectorised: more registers for them.
    odd = hidden.shape[1] % 64 != 0
    if few_rows and not odd:
        kernel += "_few"
    elif small or odd:
        kernel += "_small"
    return launch_config(kernel, arch_of(hidden.device), hidden.element_size() * 8)


def tma_if_readable(config: Launch, head: HeadInputs) -> Launch:
    """The entry, without TMA where this head is not one that TMA can read."""
    if not config.tma:
        return config
    weight = head.weight
    aligned = not (weight.stride(0) * weight.element_size() % 16 or weight.data_ptr() % 16)
    whole_blocks = weight.shape[0] % VOCAB_BLOCK == 0
    if not aligned or not whole_blocks or head.update_weight is not None:
        return without_tma(config)
    return config if _SPECIALIZES_WARPS else unspecialised(config)


def without_tma(config: Launch) -> Launch:
    return replace(unspecialised(config), tma=False)


def unspecialised(config: Launch) -> Launch:
    # 4 specialised warps stand for 12; unspecialised, a tile for them has 8.
    warps = 8 if config.warp_specialize else config.num_warps
    return replace(config, warp_specialize=False, num_warps=warps)


# Triton 3.6 cannot specialise the warps of a loop with these kernels' reductions in it.
_SPECIALIZES_WARPS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)


def product_launch_of(kernel: str, hidden: torch.Tensor, few_rows: bool = False) -> Launch:
    """For the product of dz with this hidden, or the weight that belongs to it: an update's is narrow."""
    width = hidden.shape[1]
    if width > NARROW_COLUMNS:
        return launch_of(kernel, hidden, few_rows=few_rows)
    config = launch_config(f"{kernel}_narrow", arch_of(hidden.device), hidden.element_size() * 8)
    return replace(config, block_n=min(config.block_n, power_of_two(width)))


@lru_cache
def arch_of(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpret"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # in the interpreter: fewer programs than tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


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
