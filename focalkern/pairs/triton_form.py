"""Sums over sequences and the loss of each pair by Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from csrc_triton import pair_loss as kernels
from focalkern.records import PairConstants, PairForward, PairObjective
from focalkern.triton_launch import OPTIONS, on_device


def sequence_sums(
    values: torch.Tensor,  # [n]
    offsets: torch.Tensor,  # [S + 1]
) -> torch.Tensor:  # [S]
    sums = torch.empty(offsets.numel() - 1, dtype=torch.float32, device=values.device)
    if sums.numel():
        with on_device(values):
            kernels.sequence_sum_fwd_kernel[(sums.numel(),)](values, offsets, sums, BLOCK=1024, **OPTIONS)
    return sums


def pair_forward(
    logps: torch.Tensor,  # [2B] sums over completion tokens
    constants: PairConstants,
    objective: PairObjective,
) -> PairForward:
    pairs = logps.numel() // 2

    def fp32(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32, device=logps.device)

    result = PairForward(
        losses=fp32(pairs),
        prob=fp32(pairs),
        slope=fp32(pairs),
        rewards=fp32(2 * pairs),
        grad_logps=fp32(2 * pairs),
    )
    compiled_in = objective._replace(
        modulation=tl.constexpr(objective.modulation),
        length_normalize=tl.constexpr(objective.length_normalize),
        label_smoothing=objective.label_smoothing or None,
    )
    if pairs:
        with on_device(logps):
            kernels.pair_loss_fwd_kernel[(triton.cdiv(pairs, 128),)](
                logps, constants, result, pairs, compiled_in, BLOCK=128, **OPTIONS
            )
    return result
