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
from focalkern.logps.torch_threads import in_two_threads
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
    in_blocks,
    nonfinite_to_nan,
    targets_in,
    times_slope,
    vocab_chunks,
)

# Two threads have half of these rows each, at least: with fewer, both would mostly read the weight.
_MIN_ROWS = 1024


def block_statistics(
    head: Head, targets: torch.Tensor, transform: LogitTransform, outputs: tuple[str, ...]
) -> BlockStatistics:
    """The forward of a head, or of a vocabulary shard: then targets of other shards are negative."""
    n = targets.numel()
    count = 2 * -(-n // (2 * TILE_ROWS)) if n >= _MIN_ROWS else 1
    bounds = [n * i // count for i in range(count + 1)]
    suits = torch_exp.suits(head, transform, outputs)

    def of_rows(rows: slice) -> BlockStatistics:
        part = head.with_hidden([hidden[rows] for hidden, _ in head.products])
        found = torch_coarse.block_statistics(part, targets[rows]) if suits else None
        return found or _dense_statistics(part, targets[rows], transform, outputs)

    parts = in_two_threads(of_rows, list(map(slice, bounds[:-1], bounds[1:])), head.hidden.device)
    return _joined(parts)


def _joined(parts: list[BlockStatistics]) -> BlockStatistics:
    """The statistics of all rows, from those of consecutive ones."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name, x in parts[0]._asdict().items() if x is not None]
    return BlockStatistics(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _dense_statistics(
    head: Head, targets: torch.Tensor, transform: LogitTransform, outputs: tuple[str, ...]
) -> BlockStatistics:
    blocks = empty_statistics(len(targets), head, outputs)
    blocks.target_z.fill_(-torch.inf)
    logits = Logits(head, transform)
    poison = logits.poison()
    for start, end in vocab_chunks(head.vocab_size, len(targets)):
        z, _, weights = logits(start, end)
        for weight in weights:
            poison += nonfinite_to_nan(weight)
        _add_tile(blocks, z, targets - start, start)
    blocks.target_z.add_(poison)
    if blocks.sum_z is not None:
        blocks.sum_z[:, 0] += poison
    return blocks


def _add_tile(
    blocks: BlockStatistics,
    z: torch.Tensor,  # logits of the vocabulary from `start`; overwritten
    column: torch.Tensor,  # of the rows' labels, perhaps outside
    start: int,
) -> None:
    row, column = targets_in(column, z.shape[1])
    target_z = z[row, column]
    blocks.target_z[row] = target_z
    at = slice(None), slice(start // VOCAB_BLOCK, -(-(start + z.shape[1]) // VOCAB_BLOCK))
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
