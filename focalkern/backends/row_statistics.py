"""From statistics of vocabulary blocks to those of a vocabulary shard, and from shards to a row's values.

A vocabulary that is not split over ranks is one shard. Used by the torch backend, and by both for shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch

from focalkern.backends import VOCAB_BLOCK, HeadForward
from focalkern.layout import Rows, spread_over_outputs


@dataclass(frozen=True)
class BlockStatistics:
    """n rows and the NB blocks of one shard of the vocabulary; None what no output asks for.

    The label is left out of all but `sum_z`, so that 1 − p_y is a ratio of sums. What is not finite in
    hidden or weight makes `target_z` and `sum_z` NaN.
    """

    target_z: torch.Tensor  # [n] the label's logit, −inf where it is in another shard
    lse: torch.Tensor  # [n, NB]
    entropy: torch.Tensor | None  # [n, NB] of the distribution within the block
    log_sum_sq: torch.Tensor | None  # [n, NB] log Σp² of it
    sum_z: torch.Tensor | None  # [n]
    max_z: (
        torch.Tensor | None
    )  # [n, NB]; the label's own block: −inf if the label is its first maximum, or inf


@dataclass(frozen=True)
class ShardStatistics:
    """The same of whole shards: `[n]` of one, `[shards, n]` of those of a vocabulary."""

    target_z: torch.Tensor
    rest_lse: torch.Tensor
    entropy: torch.Tensor | None
    log_sum_sq: torch.Tensor | None
    sum_z: torch.Tensor | None
    to_reach: torch.Tensor | None  # the label is the first maximum of all if its logit is at least this

    def given(self) -> dict[str, torch.Tensor]:
        """Those that are not None, by name."""
        values = {name.name: getattr(self, name.name) for name in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, given: Mapping[str, torch.Tensor]) -> ShardStatistics:
        return cls(**{name.name: given.get(name.name) for name in fields(cls)})  # type: ignore[arg-type]


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
    return ShardStatistics(blocks.target_z, rest_lse, entropy, log_sum_sq, blocks.sum_z, to_reach)


def head_forward_of(
    shards: ShardStatistics,  # [shards, n]
    block_lse: torch.Tensor,  # [n, NB] of the own shard
    vocab_size: int,  # of all shards
    rows: Rows,
) -> HeadForward:
    target_z, rest_lse = shards.target_z.amax(0), torch.logsumexp(shards.rest_lse, 0)
    gap = rest_lse - target_z
    logps = -torch.logaddexp(gap, torch.zeros_like(gap))
    lse = torch.logaddexp(rest_lse, target_z)
    log_p = shards.rest_lse - lse
    spread = partial(spread_over_outputs, rows=rows)

    entropy = mean_logits = is_top1 = log_sum_sq_probs = None
    if shards.entropy is not None:
        # The label counts as a part of its own, of entropy 0.
        own = torch.special.entr(logps.exp())
        entropy = spread(_mixed_entropy(log_p, shards.entropy, dim=0) + own)
    if shards.sum_z is not None:
        mean_logits = spread(shards.sum_z.sum(0) / vocab_size)
    if shards.to_reach is not None:
        is_top1 = spread((target_z >= shards.to_reach).all(0))
    if shards.log_sum_sq is not None:
        rest = _mixed_log_sum_sq(log_p, shards.log_sum_sq, dim=0)
        log_sum_sq_probs = spread(torch.logaddexp(rest, 2 * logps))
    return HeadForward(
        logps=spread(logps),
        lse=lse,
        one_minus_p=torch.sigmoid(gap),
        block_lse=block_lse,
        entropy=entropy,
        mean_logits=mean_logits,
        is_top1=is_top1,
        log_sum_sq_probs=log_sum_sq_probs,
    )


def _mixed_entropy(log_share: torch.Tensor, entropy: torch.Tensor, dim: int) -> torch.Tensor:
    """Entropy of a distribution from the shares of its parts and the entropies within them."""
    terms = log_share.exp() * (entropy - log_share)
    return torch.where(log_share == -torch.inf, 0.0, terms).sum(dim)


def _mixed_log_sum_sq(log_share: torch.Tensor, log_sum_sq: torch.Tensor, dim: int) -> torch.Tensor:
    terms = torch.where(log_share == -torch.inf, -torch.inf, log_sum_sq + 2 * log_share)
    return torch.logsumexp(terms, dim=dim)
