"""Which (row, vocabulary block) pairs a certified backward computes, and the probability mass it leaves out.

Called by `LinearLogpsFunction.backward`. All of it runs on the device, but for one transfer of the counts to
the host, which every allocation after it depends on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.records import KeptCounts, KeptPairs
from focalkern.rows import nonzero

# No row may drop more than this share of a large gradient: |g_t|·δ_t <= 2^-7·ĝ.
MAX_WEIGHTED_MASS = 2.0**-7
# Rows looked at together: what is between the block statistics and the choice takes 100 MB at V = 128k.
_ROWS_AT_ONCE = 8192
_MAX_NONZERO = 2**31 - 1  # elements that torch.nonzero takes on CUDA


@dataclass(frozen=True)
class Selection:
    """The pairs that are kept; n rows, NB = ceil(V / 128) vocabulary blocks."""

    keep: torch.Tensor  # [n, NB] bool
    dropped_mass: torch.Tensor  # [n] fp32: δ_t = Σ_b P[t, b] over the blocks that are not kept


def select_pairs(
    block_lse: torch.Tensor,  # [n, NB] logsumexp of each block without the label
    lse: torch.Tensor,  # [n]
    rest_mass: torch.Tensor,  # [n] Σ_b P[t, b]: 1 − p_y, or a shard's part of it
    targets: torch.Tensor,  # [n]; negative where the label is in another shard
    g: torch.Tensor,  # [n]
    tau: float,
    share: float = 1.0,  # of the vocabulary that these blocks are
) -> Selection:
    """Keep (t, b) if |g_t|·P[t, b] > τ·ĝ, or if b holds the label; nothing of a row with g_t = 0.

    P[t, b] = exp(block_lse[t, b] − lse[t]), and ĝ is `gradient_scale`. Where a row would drop more than
    `MAX_WEIGHTED_MASS` allows, of which every shard has its share, its τ is halved until it does not.
    What is not a number is kept, so that it comes out as NaN.
    """
    n, blocks = block_lse.shape
    relative = torch.where(g == 0, 0.0, g.abs() / gradient_scale(g))
    keep = torch.empty(n, blocks, dtype=torch.bool, device=g.device)
    dropped_mass = torch.empty(n, dtype=block_lse.dtype, device=g.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        keep[rows], dropped_mass[rows] = _select_rows(
            torch.exp(block_lse[rows] - lse[rows, None]),
            rest_mass[rows],
            targets[rows],
            relative[rows],
            tau,
            MAX_WEIGHTED_MASS * share,
        )
    live = g != 0
    return Selection(
        keep=keep.logical_and_(live[:, None]),
        dropped_mass=torch.where(live, dropped_mass, share),
    )


def gradient_scale(g: torch.Tensor) -> torch.Tensor:  # []
    """ĝ = min(max|g|, 2·mean|g|), the mean over the rows that have a gradient: what counts as large.

    The maximum alone would let one short completion decide, where |g_t| is proportional to 1/length: with
    completions of 8 and 1000 tokens, the gradient of the longer was 5 to 9 % off.
    """
    size = g.abs()
    return torch.minimum(size.amax(), 2 * size.sum() / (g != 0).sum())


def _select_rows(
    mass: torch.Tensor,  # [n, NB] P without the label
    rest_mass: torch.Tensor,  # [n]
    targets: torch.Tensor,  # [n]
    relative: torch.Tensor,  # [n] |g_t|/ĝ
    tau: float,
    most_weighted_mass: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(keep [n, NB], dropped mass [n]) of rows that have a gradient."""
    # All blocks without the label sum to the rest's mass, but for the rounding of lse, which is that of a
    # number of the size of the logits.
    correction = rest_mass / mass.sum(1)
    own_block = (targets // VOCAB_BLOCK).clamp(min=0)[:, None]
    is_here = (targets >= 0)[:, None]
    mass.scatter_(1, own_block, torch.where(is_here, 0.0, mass.gather(1, own_block)))
    weighted = relative[:, None] * mass

    # With a threshold of θ a row drops less than NB·θ: so many halvings are enough for every row.
    tau = min(tau, 1.0)
    halvings = max(0, math.ceil(math.log2(tau * mass.shape[1] / most_weighted_mass)))
    threshold = torch.full_like(weighted[:, :1], tau)
    for _ in range(halvings):
        dropped = torch.where(weighted <= threshold, weighted, 0.0).sum(1, keepdim=True)
        threshold = torch.where(dropped > most_weighted_mass, threshold / 2, threshold)

    keep = (weighted <= threshold).logical_not_()
    keep.scatter_(1, own_block, keep.gather(1, own_block) | is_here)
    dropped_mass = torch.where(keep, 0.0, mass).sum(1)
    return keep, torch.where(dropped_mass > 0, dropped_mass * correction, 0.0)


def count_pairs(keep: torch.Tensor) -> KeptCounts:  # [n, NB]
    """Waits for the device: the only step of a certified backward that does where the workspace holds dz."""
    blocks = keep.shape[1]
    counts = torch.cat([keep.sum(0), keep.sum(1)])
    host = counts.cpu()
    return KeptCounts(
        per_block=counts[:blocks],
        per_row=counts[blocks:],
        per_block_host=host[:blocks],
        per_row_host=host[blocks:],
    )


def list_pairs(keep: torch.Tensor, counts: KeptCounts) -> KeptPairs:  # [n, NB]
    """The kept pairs as lists per block; their number being known, this does not wait for the device."""
    n, blocks = keep.shape
    at_once = max(_MAX_NONZERO // max(n, 1), 1)
    pairs = [
        nonzero(
            keep[:, start : start + at_once].t().reshape(-1),
            int(counts.per_block_host[start : start + at_once].sum()),
        )
        + start * n
        for start in range(0, blocks, at_once)
    ]
    pair = torch.cat(pairs)
    return KeptPairs(row=pair % n, block=pair // n, counts=counts)
