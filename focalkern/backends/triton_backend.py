"""Launches the kernels of `csrc_triton`: allocates their outputs, picks their tiles, never waits for the
device.

Under `TRITON_INTERPRET=1` the same code runs on CPU tensors, for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from csrc_triton import linear_logps as kernels
from csrc_triton import pair_loss as pair_kernels
from csrc_triton.launch import Launch
from focalkern.backends import (
    VOCAB_BLOCK,
    Gradients,
    HeadForward,
    HeadInputs,
    LogitTransform,
    Needs,
    PairForward,
    PairObjective,
    triton_tma,
)
from focalkern.backends.row_statistics import BlockStatistics
from focalkern.backends.triton_certified import head_backward_certified as head_backward_certified
from focalkern.backends.triton_kl import kl_backward as kl_backward
from focalkern.backends.triton_kl import kl_forward as kl_forward
from focalkern.backends.triton_launch import (
    head_options,
    launch_of,
    on_device,
    scales,
    sizes,
    strides,
    tensors,
    tile_grid,
    tile_options,
    tma_if_readable,
    unit_strides,
    with_aligned_update,
)
from focalkern.backends.triton_products import HeadGradients
from focalkern.layout import Rows, Sequences

if TYPE_CHECKING:
    from focalkern.distributed import PendingSums

EXACT_ROW_COUNT = False
# Estimated: by count of operations and bytes on an H200, the certified backward takes as long as the exact
# one somewhere from 0.4 to 0.5 (docs/certified-backward.md). The torch backend's limit is one of accuracy.
EXACT_ABOVE_KEPT_SHARE = 0.4

_MODULATIONS = {"focalpo": 0, "inverse": 1, "focal": 2}


def head_forward(
    head: HeadInputs, rows: Rows, transform: LogitTransform, outputs: tuple[str, ...]
) -> HeadForward:
    n, device = rows.targets.numel(), head.hidden.device
    target_z, block_lse, stats = _block_statistics(head, rows, transform, outputs)
    blocks = block_lse.shape[1]

    def per_output(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(rows.output_shape.numel(), dtype=dtype, device=device)

    lse, one_minus_p = torch.empty_like(target_z), torch.empty_like(target_z)
    logps = per_output()
    entropy = mean_logits = log_sum_sq = is_top1 = None
    if outputs:
        entropy, mean_logits, log_sum_sq = per_output(), per_output(), per_output()
        is_top1 = per_output(torch.int8)

    if n:
        with on_device(head.hidden):
            kernels.linear_logps_reduce_kernel[(n,)](
                target_z,
                block_lse,
                stats,
                rows.targets,
                rows.output_index,
                rows.count,
                lse,
                one_minus_p,
                logps,
                entropy,
                mean_logits,
                is_top1,
                log_sum_sq,
                n * blocks,
                head.weight.shape[0],
                blocks,
                HAS_STATS=stats is not None,
                BLOCK_NB=triton.next_power_of_2(blocks),
            )

    def asked(name: str, value: torch.Tensor | None) -> torch.Tensor | None:
        return value if name in outputs else None

    return HeadForward(
        logps=logps,
        lse=lse,
        one_minus_p=one_minus_p,
        block_lse=block_lse,
        entropy=asked("entropy", entropy),
        mean_logits=asked("mean_logits", mean_logits),
        is_top1=asked("is_top1", None if is_top1 is None else is_top1.bool()),
        log_sum_sq_probs=asked("log_sum_sq_probs", log_sum_sq),
    )


def block_statistics(
    head: HeadInputs, rows: Rows, transform: LogitTransform, outputs: tuple[str, ...]
) -> BlockStatistics:
    target_z, block_lse, stats = _block_statistics(head, rows, transform, outputs)
    max_z, entropy, log_sum_sq, sum_z = (None,) * 4 if stats is None else stats.unbind()
    return BlockStatistics(
        # The kernel writes the logits of labels that it meets.
        torch.where(rows.targets < 0, -torch.inf, target_z),
        block_lse,
        entropy if "entropy" in outputs else None,
        log_sum_sq if "log_sum_sq_probs" in outputs else None,
        sum_z.sum(1) if sum_z is not None and "mean_logits" in outputs else None,
        max_z if "is_top1" in outputs else None,
    )


def _block_statistics(
    head: HeadInputs, rows: Rows, transform: LogitTransform, outputs: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # [n], [n, NB], [4, n, NB]
    head = with_aligned_update(unit_strides(head))
    n, blocks = rows.targets.numel(), triton.cdiv(head.weight.shape[0], VOCAB_BLOCK)

    def fp32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=head.hidden.device)

    target_z, block_lse = fp32(n), fp32(n, blocks)
    stats = fp32(4, n, blocks) if outputs else None
    if n:
        with on_device(head.hidden):
            config = tma_if_readable(launch_of("fwd", head.hidden, small=bool(outputs)), head)
            if config.tma:
                triton_tma.forward(head, rows, transform, config, target_z, block_lse)
            else:
                _forward_by_pointers(head, rows, transform, config, target_z, block_lse, stats)
    return target_z, block_lse, stats


def _forward_by_pointers(
    head: HeadInputs,
    rows: Rows,
    transform: LogitTransform,
    config: Launch,
    target_z: torch.Tensor,  # [n] out
    block_lse: torch.Tensor,  # [n, NB] out
    stats: torch.Tensor | None,  # [4, n, NB] out
) -> None:
    (n, blocks), vocab_size = block_lse.shape, head.weight.shape[0]
    kernels.linear_logps_fwd_kernel[tile_grid(config, n, vocab_size)](
        *tensors(head),
        rows.hidden_index,
        rows.targets,
        rows.count,
        target_z,
        block_lse,
        stats,
        n * blocks,
        *sizes(head),
        blocks,
        *strides(head),
        *scales(transform),
        HAS_STATS=stats is not None,
        EVEN_V=vocab_size % VOCAB_BLOCK == 0,
        **head_options(head, transform, config),
        **tile_options(config, "BLOCK_V", head.hidden.dtype),
    )


def head_backward(
    head: HeadInputs,
    rows: Rows,
    transform: LogitTransform,
    lse: torch.Tensor,  # [n]
    one_minus_p: torch.Tensor,  # [n]
    entropy: torch.Tensor | None,  # [outputs]
    grad_logps: torch.Tensor | None,  # [outputs]
    grad_entropy: torch.Tensor | None,  # [outputs]
    needs: Needs,
    sums: PendingSums | None = None,
) -> Gradients:
    """Exact: per vocabulary chunk recompute the logits of all rows into dz, then multiply it both ways."""
    head = unit_strides(head)
    hidden, n = head.hidden, rows.targets.numel()
    if grad_logps is None:
        grad_logps = torch.zeros(rows.output_shape.numel(), dtype=torch.float32, device=hidden.device)
    grad_logps = grad_logps.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()

    small = transform.softcap is not None or grad_entropy is not None
    config = tma_if_readable(launch_of("bwd_dz", hidden, small), head)
    gradients = HeadGradients(head, rows, needs, config, sums)
    head = with_aligned_update(head)
    with on_device(hidden):
        for start, size in gradients.chunks():
            if config.tma and gradients.gathered is not None:
                triton_tma.dz(
                    head,
                    gradients.gathered,
                    rows,
                    transform,
                    config,
                    lse,
                    one_minus_p,
                    grad_logps,
                    gradients.dz,
                    start,
                    size,
                )
            elif n:
                kernels.linear_logps_bwd_dz_kernel[tile_grid(config, n, size)](
                    *tensors(head),
                    rows.hidden_index,
                    rows.output_index,
                    rows.targets,
                    rows.count,
                    lse,
                    one_minus_p,
                    entropy,
                    grad_logps,
                    grad_entropy,
                    gradients.dz,
                    start,
                    size,
                    gradients.chunk,
                    n,
                    *sizes(head),
                    *strides(head),
                    *scales(transform),
                    HAS_ENTROPY_GRAD=grad_entropy is not None,
                    **head_options(head, transform, config),
                    **tile_options(config, "BLOCK_V", hidden.dtype),
                )
            gradients.add(start, size)
    return gradients.result()


def sequence_sums(
    logps: torch.Tensor,  # [outputs] per token, flat, 0 where ignored
    sequences: Sequences,
) -> torch.Tensor:  # [2B]
    count = sequences.lengths.numel()
    sums = torch.empty(count, dtype=torch.float32, device=logps.device)
    with on_device(logps):
        pair_kernels.sequence_sum_fwd_kernel[(count,)](logps, sequences.offsets, sums, BLOCK=1024)
    return sums


def pair_forward(
    logps: torch.Tensor,  # [2B] sums over completion tokens
    ref_logps: torch.Tensor | None,  # [2B]; None when reference-free
    lengths: torch.Tensor,  # [2B] completion tokens
    adaptive_margin: torch.Tensor | None,  # [B], on top of the objective's margin
    objective: PairObjective,
) -> PairForward:
    count = lengths.numel()
    pairs = count // 2

    def fp32(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32, device=logps.device)

    result = PairForward(fp32(pairs), fp32(pairs), fp32(pairs), fp32(count), fp32(count))
    with on_device(logps):
        pair_kernels.pair_loss_fwd_kernel[(triton.cdiv(pairs, 128),)](
            logps,
            ref_logps,
            lengths,
            adaptive_margin,
            result.losses,
            result.prob,
            result.slope,
            result.rewards,
            result.grad_logps,
            pairs,
            objective.beta,
            objective.gamma,
            objective.margin,
            objective.label_smoothing,
            MODULATION=_MODULATIONS[objective.modulation],
            HAS_REF=ref_logps is not None,
            HAS_ADAPTIVE_MARGIN=adaptive_margin is not None,
            LENGTH_NORMALIZE=objective.length_normalize,
            LABEL_SMOOTHING=objective.label_smoothing > 0,
            BLOCK=128,
        )
    return result
