"""`linear_logps` in plain PyTorch, by chunks: what CPUs use, and any device without triton.

The same steps as the Triton kernels, on tiles small enough to stay in the processor's cache.
"""

from __future__ import annotations

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.distributed import AsyncReduction
from focalkern.logps import torch_coarse, torch_coarse_backward, torch_exp
from focalkern.logps.statistics import (
    ShardStatistics,
    empty_statistics,
    first_maximum_verdict,
    shard_statistics,
    values_of_shards,
)
from focalkern.logps.torch_certified import certified_backward as certified_backward
from focalkern.products import ExactGradients
from focalkern.records import (
    BlockStatistics,
    Forward,
    Gradients,
    Head,
    LogitTransform,
    Needs,
    RowGradients,
    RowValues,
    Saved,
)
from focalkern.torch_logits import (
    TILE_ROWS,
    Logits,
    compute_dtype,
    in_blocks,
    nonfinite_to_nan,
    targets_in,
    times_slope,
    vocab_chunks,
)


def block_statistics(
    head: Head, targets: torch.Tensor, transform: LogitTransform, outputs: tuple[str, ...]
) -> BlockStatistics:
    """The forward of a head, or of a vocabulary shard: then targets of other shards are negative."""
    found = None
    if torch_exp.suits(head, transform, outputs):
        found = torch_coarse.block_statistics(head, targets)
    return found or _dense_statistics(head, targets, transform, outputs)


def _dense_statistics(
    head: Head, targets: torch.Tensor, transform: LogitTransform, outputs: tuple[str, ...]
) -> BlockStatistics:
    n, dtype = targets.numel(), compute_dtype(head.hidden)
    blocks = empty_statistics(n, head, outputs)
    blocks.target_z.fill_(-torch.inf)
    row_poison = torch.zeros(n, dtype=dtype, device=head.hidden.device)
    weight_poison = row_poison.new_zeros(())

    for row_start in range(0, n, TILE_ROWS):
        rows = slice(row_start, row_start + TILE_ROWS)
        logits = Logits(head, transform, rows)
        row_poison[rows] = logits.poison()
        for start, end in vocab_chunks(head.vocab_size, len(targets[rows])):
            z, _, weights = logits(start, end)
            if row_start == 0:
                for weight in weights:
                    weight_poison += nonfinite_to_nan(weight)
            _add_tile(blocks, z, targets[rows] - start, rows, start)

    poison = row_poison + weight_poison
    blocks.target_z.add_(poison)
    if blocks.sum_z is not None:
        blocks.sum_z[:, 0] += poison
    return blocks


def _add_tile(
    blocks: BlockStatistics,
    z: torch.Tensor,  # logits of some rows, of the vocabulary from `start`; overwritten
    column: torch.Tensor,  # of the rows' labels, perhaps outside
    rows: slice,
    start: int,
) -> None:
    row, column = targets_in(column, z.shape[1])
    target_z = z[row, column]
    blocks.target_z[rows][row] = target_z
    at = rows, slice(start // VOCAB_BLOCK, -(-(start + z.shape[1]) // VOCAB_BLOCK))
    if blocks.sum_z is not None:
        padding = -z.shape[1] % VOCAB_BLOCK
        blocks.sum_z[at] = torch.nn.functional.pad(z, (0, padding)).unflatten(1, (-1, VOCAB_BLOCK)).sum(-1)

    z[row, column] = -torch.inf
    z = in_blocks(z)
    block_max = z.amax(-1)
    if blocks.max_z is not None:
        blocks.max_z[at] = block_max
        own_block = z[row, column // VOCAB_BLOCK]
        before = torch.arange(VOCAB_BLOCK, device=z.device) < (column % VOCAB_BLOCK)[:, None]
        verdict = first_maximum_verdict(target_z, own_block, before)
        blocks.max_z[at][row, column // VOCAB_BLOCK] = verdict

    # Entropy and log Σp² within the block do not change when all logits are shifted.
    shift = torch.where(block_max == -torch.inf, 0.0, block_max)
    exp_z = z.sub_(shift[..., None]).exp_()
    log_sum = exp_z.sum(-1).log_()
    blocks.lse[at] = shift + log_sum
    if blocks.entropy is not None:
        blocks.entropy[at] = log_sum + torch.special.entr(exp_z).sum(-1) / log_sum.exp()
    if blocks.log_sum_sq is not None:
        blocks.log_sum_sq[at] = exp_z.square_().sum(-1).log_() - 2 * log_sum


def reduced(
    blocks: BlockStatistics, targets: torch.Tensor, head: Head, outputs: tuple[str, ...]
) -> tuple[RowValues, Saved]:
    """The values of the rows of a head that is not split."""
    whole = shard_statistics(blocks, targets)._asdict().items()
    shards = ShardStatistics(**{name: x[None] for name, x in whole if x is not None})
    return values_of_shards(shards, blocks.lse, head.vocab_size)


def exact_backward(
    forward: Forward, grads: RowGradients, needs: Needs, reduction: AsyncReduction | None
) -> Gradients:
    """Recompute the logits of all rows by vocabulary chunks, form dz, and multiply it both ways."""
    gradients = torch_coarse_backward.exact_backward(forward, grads, needs, reduction)
    return gradients or _dense_backward(forward, grads, needs, reduction)


def _dense_backward(
    forward: Forward, grads: RowGradients, needs: Needs, reduction: AsyncReduction | None
) -> Gradients:
    head, targets, transform, saved = forward
    logits = Logits(head, transform)
    gradients = ExactGradients(head, logits.hidden, needs, reduction)
    g = grads.logps.to(saved.lse.dtype)
    target_dz = g * saved.one_minus_p

    for start, end in vocab_chunks(head.vocab_size, g.numel()):
        z, slope, weights = logits(start, end)
        p = z.sub_(saved.lse[:, None]).exp_()
        dz_entropy = None
        if grads.entropy is not None and saved.entropy is not None:
            # d entropy / dz_v = −p_v (log p_v + entropy)
            dz_entropy = (torch.special.entr(p) - p * saved.entropy[:, None]).mul_(grads.entropy[:, None])

        # d logps / dz_v = 1[v = y] − p_v
        dz = p.mul_(-g[:, None])
        row, column = targets_in(targets - start, end - start)
        dz[row, column] = target_dz[row]
        if dz_entropy is not None:
            dz += dz_entropy
        gradients.add(times_slope(dz, slope), weights, start)
    return gradients.result()
