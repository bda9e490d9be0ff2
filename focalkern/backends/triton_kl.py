"""Launches the kernels of `linear_kl`: forward by vocabulary block, exact backward by vocabulary chunk.

Called through `triton_backend`.
"""

from __future__ import annotations

import torch
import triton

from csrc_triton import linear_kl as kernels
from csrc_triton.launch import Launch
from focalkern.backends import VOCAB_BLOCK, Gradients, HeadInputs, KLForward, LogitTransform, Needs
from focalkern.backends.triton_launch import (
    launch_of,
    on_device,
    scales,
    tile_grid,
    tile_options,
    unit_strides,
)
from focalkern.backends.triton_products import HeadGradients
from focalkern.layout import Rows


def kl_forward(policy: HeadInputs, ref: HeadInputs, rows: Rows, transform: LogitTransform) -> KLForward:
    policy, ref = unit_strides(policy), unit_strides(ref)
    device = policy.hidden.device
    n, vocab_size = rows.targets.numel(), policy.weight.shape[0]
    blocks = triton.cdiv(vocab_size, VOCAB_BLOCK)

    def fp32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    block_lse, block_ref_lse, block_kl = fp32(n, blocks), fp32(n, blocks), fp32(n, blocks)
    lse, ref_lse = fp32(n), fp32(n)
    kl = torch.zeros(rows.output_shape.numel(), dtype=torch.float32, device=device)
    if n:
        config = _launch("kl_fwd", policy, ref, transform)
        with on_device(kl):
            kernels.linear_kl_fwd_kernel[tile_grid(config, n, vocab_size)](
                *_tensors(policy),
                *_tensors(ref),
                rows.hidden_index,
                rows.count,
                block_lse,
                block_ref_lse,
                block_kl,
                vocab_size,
                policy.hidden.shape[1],
                ref.hidden.shape[1],
                blocks,
                *_strides(policy, ref),
                *scales(transform),
                **_head_options(policy, ref, transform, config),
            )
            kernels.linear_kl_reduce_kernel[(n,)](
                block_lse,
                block_ref_lse,
                block_kl,
                rows.output_index,
                rows.count,
                lse,
                ref_lse,
                kl,
                blocks,
                BLOCK_NB=triton.next_power_of_2(blocks),
            )
    return KLForward(kl, lse, ref_lse)


def kl_backward(
    policy: HeadInputs,
    ref: HeadInputs,
    rows: Rows,
    transform: LogitTransform,
    lse: torch.Tensor,  # [n]
    ref_lse: torch.Tensor,  # [n]
    grad_kl: torch.Tensor,  # [outputs]
    needs: Needs,
) -> Gradients:
    policy, ref = unit_strides(policy), unit_strides(ref)
    n, vocab_size = rows.targets.numel(), policy.weight.shape[0]
    grad_kl = grad_kl.contiguous()
    config = _launch("kl_bwd_dz", policy, ref, transform)
    gradients = HeadGradients(policy, rows, needs, config)
    with on_device(policy.hidden):
        for start, size in gradients.chunks():
            if n:
                kernels.linear_kl_bwd_dz_kernel[tile_grid(config, n, size)](
                    *_tensors(policy),
                    *_tensors(ref),
                    rows.hidden_index,
                    rows.output_index,
                    rows.count,
                    lse,
                    ref_lse,
                    grad_kl,
                    gradients.dz,
                    start,
                    size,
                    gradients.chunk,
                    n,
                    vocab_size,
                    policy.hidden.shape[1],
                    ref.hidden.shape[1],
                    *_strides(policy, ref),
                    *scales(transform),
                    **_head_options(policy, ref, transform, config),
                )
            gradients.add(start, size)
    return gradients.result()


def _tensors(head: HeadInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return head.hidden, head.weight, head.bias


def _strides(policy: HeadInputs, ref: HeadInputs) -> list[int]:
    return [x.stride(0) for head in (policy, ref) for x in (head.hidden, head.weight)]


def _launch(kernel: str, policy: HeadInputs, ref: HeadInputs, transform: LogitTransform) -> Launch:
    odd_ref = ref.hidden.shape[1] % 64 != 0
    return launch_of(kernel, policy.hidden, small=transform.softcap is not None or odd_ref)


def _head_options(
    policy: HeadInputs, ref: HeadInputs, transform: LogitTransform, config: Launch
) -> dict[str, object]:
    return {
        "HAS_BIAS": policy.bias is not None,
        "HAS_REF_BIAS": ref.bias is not None,
        "HAS_SOFTCAP": transform.softcap is not None,
        "EVEN_H": policy.hidden.shape[1] % config.block_k == 0,
        "EVEN_H_REF": ref.hidden.shape[1] % config.block_k == 0,
        **tile_options(config, "BLOCK_V", policy.hidden.dtype),
    }
