"""From statistics of vocabulary blocks to those of a vocabulary shard, and from shards to a row's values.

A vocabulary that is not split over ranks is one shard. Used by the torch form, and by both forms for shards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.records import BlockStatistics, Head, RowValues, Saved
from focalkern.torch_logits import compute_dtype


def empty_statistics(n: int, head: Head, outputs: tuple[str, ...]) -> BlockStatistics:
    """What a forward with these outputs fills in."""
    lse = torch.empty(
        (n, -(-head.vocab_size // VOCAB_BLOCK)), dtype=compute_dtype(head.hidden), device=head.hidden.device
    )
    return BlockStatistics(
        target_z=lse.new_empty(n),
        lse=lse,
        entropy=torch.empty_like(lse) if "entropy" in outputs else None,
        log_sum_sq=torch.empty_like(lse) if "log_sum_sq_probs" in outputs else None,
        sum_z=torch.empty_like(lse) if "mean_logits" in outputs else None,
        max_z=torch.empty_like(lse) if "is_top1" in outputs else None,
    )


class ShardStatistics(NamedTuple):
    """`BlockStatistics` of whole shards: `[n]` of one, `[shards, n]` of those of a vocabulary."""

    target_z: torch.Tensor
    rest_lse: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_sq: torch.Tensor | None = None
    sum_z: torch.Tensor | None = None
    to_reach: torch.Tensor | None = None  # the logit from which on the label is the top-1


def first_maximum_verdict(
    target_z: torch.Tensor,  # [n]
    others: torch.Tensor,  # [n, ...]
    before: torch.Tensor,  # [n, ...] which of them stand before the label
) -> torch.Tensor:  # [n]
    """−inf where the label is the first maximum: above all before it, at least equal to the rest; or inf."""
    target_z = target_z[:, None]
    wins = torch.where(before, target_z > others, target_z >= others).all(-1)
    return torch.where(wins, -torch.inf, torch.inf).to(others.dtype)


def shard_statistics(
    blocks: BlockStatistics,
    targets: torch.Tensor,  # [n] within the shard, negative where the label is in another
) -> ShardStatistics:
    rest_lse = torch.logsumexp(blocks.lse, dim=-1)
    entropy = log_sum_sq = to_reach = log_share = None
    if blocks.entropy is not None or blocks.log_sum_sq is not None:
        log_share = torch.where(blocks.lse == -torch.inf, -torch.inf, blocks.lse - rest_lse[:, None])
    if log_share is not None and blocks.entropy is not None:
        entropy = _mixed_entropy(log_share, blocks.entropy, dim=-1)
    if log_share is not None and blocks.log_sum_sq is not None:
        log_sum_sq = _mixed_log_sum_sq(log_share, blocks.log_sum_sq, dim=-1)
    if blocks.max_z is not None:
        own_block = (targets // VOCAB_BLOCK)[:, None]
        before = torch.arange(blocks.max_z.shape[1], device=own_block.device) < own_block
        verdict = first_maximum_verdict(blocks.target_z, blocks.max_z, before)
        to_reach = torch.where(targets < 0, blocks.max_z.amax(-1), verdict)
    return ShardStatistics(
        target_z=blocks.target_z,
        rest_lse=rest_lse,
        entropy=entropy,
        log_sum_sq=log_sum_sq,
        sum_z=None if blocks.sum_z is None else blocks.sum_z.sum(-1),
        to_reach=to_reach,
    )


def values_of_shards(
    shards: ShardStatistics,  # [shards, n]
    block_lse: torch.Tensor,  # [n, NB] of the own shard
    vocab_size: int,  # of all shards
) -> tuple[RowValues, Saved]:
    target_z, rest_lse = shards.target_z.amax(0), torch.logsumexp(shards.rest_lse, 0)
    gap = rest_lse - target_z
    logps = -torch.logaddexp(gap, torch.zeros_like(gap))
    lse = torch.logaddexp(rest_lse, target_z)
    log_p = shards.rest_lse - lse

    entropy = mean_logits = is_top1 = log_sum_sq_probs = None
    if shards.entropy is not None:
        # The label counts as a part of its own, of entropy 0.
        entropy = _mixed_entropy(log_p, shards.entropy, dim=0) + torch.special.entr(logps.exp())
    if shards.sum_z is not None:
        mean_logits = shards.sum_z.sum(0) / vocab_size
    if shards.to_reach is not None:
        is_top1 = (target_z >= shards.to_reach).all(0)
    if shards.log_sum_sq is not None:
        log_sum_sq_probs = torch.logaddexp(_mixed_log_sum_sq(log_p, shards.log_sum_sq, dim=0), 2 * logps)
    values = RowValues(
        logps=logps,
        entropy=entropy,
        mean_logits=mean_logits,
        is_top1=is_top1,
        log_sum_sq_probs=log_sum_sq_probs,
    )
    return values, Saved(lse=lse, one_minus_p=torch.sigmoid(gap), block_lse=block_lse, entropy=entropy)


def _mixed_entropy(log_share: torch.Tensor, entropy: torch.Tensor, dim: int) -> torch.Tensor:
    """Entropy of a distribution from the shares of its parts and the entropies within them."""
    terms = log_share.exp() * (entropy - log_share)
    return torch.where(log_share == -torch.inf, 0.0, terms).sum(dim)


def _mixed_log_sum_sq(log_share: torch.Tensor, log_sum_sq: torch.Tensor, dim: int) -> torch.Tensor:
    terms = torch.where(log_share == -torch.inf, -torch.inf, log_sum_sq + 2 * log_share)
    return torch.logsumexp(terms, dim=dim)
