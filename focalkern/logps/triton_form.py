"""`linear_logps` by Triton kernels: allocates what they fill in, picks their tiles, waits for nothing."""

from __future__ import annotations

import torch
import triton

from csrc_triton import linear_logps as kernels
from focalkern.distributed import AsyncReduction
from focalkern.logps.statistics import empty_statistics
from focalkern.logps.triton_certified import certified_backward as certified_backward
from focalkern.records import (
    BlockStatistics,
    Chunk,
    Forward,
    Gradients,
    Head,
    LogitTransform,
    Needs,
    RowGradients,
    RowValues,
    Saved,
    Scales,
)
from focalkern.triton_launch import (
    OPTIONS,
    entry,
    exact_gradients,
    head_tile,
    on_device,
    sizes_of,
    with_aligned_update,
)


def block_statistics(
    head: Head, targets: torch.Tensor, transform: LogitTransform, outputs: tuple[str, ...]
) -> BlockStatistics:
    """The forward of a head, or of a vocabulary shard: then targets of other shards are negative."""
    head, n = with_aligned_update(head), targets.numel()
    blocks = empty_statistics(n, head, outputs)
    blocks.target_z.fill_(-torch.inf)  # the kernel writes the logits of labels that it meets
    if n:
        found = entry("fwd", head.hidden, small=bool(outputs))
        with on_device(head.hidden):
            kernels.linear_logps_fwd_kernel[found.grid(n, head.vocab_size)](
                head,
                targets,
                blocks,
                n,
                sizes_of(head),
                Scales.of(transform),
                head_tile(found, head),
                **found.options,
            )
    return blocks


def reduced(
    blocks: BlockStatistics, targets: torch.Tensor, head: Head, outputs: tuple[str, ...]
) -> tuple[RowValues, Saved]:
    """The values of the rows of a head that is not split."""
    n, NB = blocks.lse.shape

    def per_row(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(n, dtype=dtype, device=blocks.lse.device)

    dtypes = {"is_top1": torch.int8}
    values = RowValues(per_row(), **{name: per_row(dtypes.get(name, torch.float32)) for name in outputs})
    saved = Saved(lse=per_row(), one_minus_p=per_row(), block_lse=blocks.lse, entropy=values.entropy)
    if n:
        with on_device(blocks.lse):
            kernels.linear_logps_reduce_kernel[(n,)](
                blocks,
                targets,
                saved,
                values,
                head.vocab_size,
                BLOCK_NB=triton.next_power_of_2(NB),
                **OPTIONS,
            )
    return values._replace(is_top1=None if values.is_top1 is None else values.is_top1.bool()), saved


def exact_backward(
    forward: Forward, grads: RowGradients, needs: Needs, reduction: AsyncReduction | None
) -> Gradients:
    """Per vocabulary chunk recompute the logits of all rows into dz, then multiply it both ways."""
    head, targets, transform, saved = forward
    aligned = with_aligned_update(head)
    found = entry("bwd_dz", head.hidden, small=transform.softcap is not None or grads.entropy is not None)
    constants = (sizes_of(aligned), Scales.of(transform), head_tile(found, aligned))
    n = targets.numel()

    def launch_dz(dz: torch.Tensor, chunk: Chunk) -> None:
        kernels.linear_logps_bwd_dz_kernel[found.grid(n, chunk.size)](
            aligned, targets, saved, grads, dz, chunk, n, *constants, **found.options
        )

    with on_device(head.hidden):
        return exact_gradients(head, needs, reduction, launch_dz)
