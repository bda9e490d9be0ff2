"""`linear_kl` by Triton kernels: forward by vocabulary block, exact backward by vocabulary chunk."""

from __future__ import annotations

import torch
import triton

from csrc_triton import linear_kl as kernels
from csrc_triton.launch import VOCAB_BLOCK
from focalkern.records import Chunk, Gradients, Head, KLForward, KLStatistics, LogitTransform, Needs, Scales
from focalkern.triton_launch import (
    OPTIONS,
    Entry,
    entry,
    exact_gradients,
    head_tile,
    on_device,
    sizes_of,
)


def forward(policy: Head, ref: Head, transform: LogitTransform) -> KLForward:
    n, blocks = len(policy.hidden), triton.cdiv(policy.vocab_size, VOCAB_BLOCK)

    def fp32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=policy.hidden.device)

    statistics = KLStatistics(lse=fp32(n, blocks), ref_lse=fp32(n, blocks), kl=fp32(n, blocks))
    result = KLForward(kl=fp32(n), lse=fp32(n), ref_lse=fp32(n))
    if n:
        found = _entry("kl_fwd", policy, ref, transform)
        with on_device(result.kl):
            kernels.linear_kl_fwd_kernel[found.grid(n, policy.vocab_size)](
                policy, ref, statistics, n, *_constants(found, policy, ref, transform), **found.options
            )
            kernels.linear_kl_reduce_kernel[(n,)](
                statistics, result, blocks, BLOCK_NB=triton.next_power_of_2(blocks), **OPTIONS
            )
    return result


def backward(
    policy: Head, ref: Head, transform: LogitTransform, saved: KLForward, grad_kl: torch.Tensor, needs: Needs
) -> Gradients:
    found, n = _entry("kl_bwd_dz", policy, ref, transform), len(policy.hidden)
    constants = _constants(found, policy, ref, transform)

    def launch_dz(dz: torch.Tensor, chunk: Chunk) -> None:
        kernels.linear_kl_bwd_dz_kernel[found.grid(n, chunk.size)](
            policy, ref, saved, grad_kl, dz, chunk, n, *constants, **found.options
        )

    with on_device(policy.hidden):
        return exact_gradients(policy, needs, None, launch_dz)


def _entry(kernel: str, policy: Head, ref: Head, transform: LogitTransform) -> Entry:
    return entry(kernel, policy.hidden, ref.hidden, small=transform.softcap is not None)


def _constants(found: Entry, policy: Head, ref: Head, transform: LogitTransform) -> tuple:
    tiles = head_tile(found, policy), head_tile(found, ref)
    return sizes_of(policy), sizes_of(ref), Scales.of(transform), *tiles
