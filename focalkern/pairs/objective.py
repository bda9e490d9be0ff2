"""The pairwise objective of the FocalPO, DynamicFocalPO and α-DPO papers, in log space, in plain PyTorch.

The Triton kernel in `csrc_triton/pair_loss.py` computes the same formulas. Knows nothing of heads: all but
the sums over sequences is one value per pair.
"""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from focalkern.records import PairConstants, PairForward, PairObjective
from focalkern.rows import sequence_of

MODULATIONS = ("focalpo", "inverse", "focal")

# Above this, log softplus(-u) = -u - e^-u / 2 to the last bit of float64, and softplus(-u) itself soon
# underflows.
_LARGE_U = 20.0
# Below this x = e^-u, the series of 1 - log1p(x)/x is more accurate than the difference.
_SMALL_X = 0.1
_SERIES = tuple((-1) ** k / (k + 2) for k in range(14))


def modulated_nll(
    u: torch.Tensor,  # [B]
    gamma: float,
    modulation: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # [B], [B]
    """ℓ(u) = −w(p)·log p with p = σ(u), and its exact derivative dℓ/du.

    | modulation | w(p)       | dℓ/du                          | source           |
    |------------|------------|--------------------------------|------------------|
    | focalpo    | p^γ        | −p^γ (1−p) (1 + γ log p)       | FocalPO Eq. 4, 6 |
    | inverse    | (1−p)^(−γ) | −(1−p)^(−γ) [(1−p) + γ p log p]| FocalPO Eq. 3    |
    | focal      | (1−p)^γ    | −(1−p)^γ [(1−p) − γ p log p]   | FocalPO Fig. 4   |

    Every product is formed as one exponent, so none of its factors can overflow alone: finite for |u| up to
    1e4 and γ ≤ 1 in fp32.
    """
    nll = _softplus(-u)  # −log p
    nll_flipped = _softplus(u)  # −log(1−p)

    if modulation == "focalpo":
        loss = torch.exp(-gamma * nll) * nll
        slope = -torch.exp(-gamma * nll - nll_flipped) * (1 - gamma * nll)
    elif modulation == "inverse":
        loss = torch.exp(gamma * nll_flipped + _log_softplus_neg(u, nll))
        # (1−p) + γ p log p = (1−p)·[(1−γ) + γ·(1−r)], r = e^u·softplus(−u): no difference of two nearly equal
        # terms.
        slope = -torch.exp((gamma - 1) * nll_flipped) * ((1 - gamma) + gamma * _one_minus_r(u, nll))
    elif modulation == "focal":
        loss = torch.exp(-gamma * nll_flipped) * nll
        slope = -torch.exp(-gamma * nll_flipped) * (torch.exp(-nll_flipped) + gamma * torch.exp(-nll) * nll)
    else:
        raise ValueError(f"modulation must be one of {', '.join(MODULATIONS)}; got {modulation!r}")
    return loss, slope


def pair_loss(
    u: torch.Tensor,  # [B]
    gamma: float,
    modulation: str,
    label_smoothing: float | None,  # None is 0
) -> tuple[torch.Tensor, torch.Tensor]:  # [B], [B]
    """L = (1−ε)·ℓ(u) + ε·ℓ(−u) and dL/du, with ℓ of `modulated_nll` and ε = `label_smoothing`."""
    loss, slope = modulated_nll(u, gamma, modulation)
    if label_smoothing:
        flipped_loss, flipped_slope = modulated_nll(-u, gamma, modulation)
        loss = (1 - label_smoothing) * loss + label_smoothing * flipped_loss
        slope = (1 - label_smoothing) * slope - label_smoothing * flipped_slope
    return loss, slope


def sequence_scores(
    logps: torch.Tensor,  # [2B] sums over completion tokens
    ref_logps: torch.Tensor | None,  # [2B]; None when reference-free
    lengths: torch.Tensor,  # [2B]
    length_normalize: bool,
) -> torch.Tensor:  # [2B]
    """score = logps − ref_logps, each divided by |s| first when length-normalised (SimPO; α-DPO Eq. 10)."""
    score = logps if ref_logps is None else logps - ref_logps
    return score / lengths if length_normalize else score


def sequence_sums(
    values: torch.Tensor,  # [n]
    offsets: torch.Tensor,  # [S + 1]
) -> torch.Tensor:  # [S]
    # One after the other in fp32 would lose digits over thousands of tokens.
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    sums = torch.zeros(offsets.numel() - 1, dtype=dtype, device=values.device)
    return sums.index_add_(0, sequence_of(offsets, values.numel()), values.to(dtype)).to(values.dtype)


def pair_forward(
    logps: torch.Tensor,  # [2B] sums over completion tokens
    constants: PairConstants,
    objective: PairObjective,
) -> PairForward:
    """Loss, metrics and gradient of each pair."""
    lengths, ref_logps, adaptive_margin = constants
    score = sequence_scores(logps, ref_logps, lengths, objective.length_normalize)
    score_w, score_l = score.chunk(2)
    u = objective.beta * (score_w - score_l) - objective.margin
    if adaptive_margin is not None:
        u = u - adaptive_margin
    losses, slope = pair_loss(u, objective.gamma, objective.modulation, objective.label_smoothing)

    grad_logps = torch.cat([slope, -slope]) * objective.beta
    if objective.length_normalize:
        grad_logps = grad_logps / lengths
    return PairForward(
        losses=losses,
        prob=torch.sigmoid(u),
        slope=slope,
        rewards=objective.beta * score,
        grad_logps=grad_logps,
    )


def _softplus(x: torch.Tensor) -> torch.Tensor:
    # The threshold of torch's softplus (x for x > 20) is off by 2e-9: visible in float64.
    return softplus(x, threshold=40)


def _log_softplus_neg(u: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    # softplus(−u) underflows for large u, its logarithm does not.
    large = u > _LARGE_U
    return torch.where(
        large, -u - torch.exp(-u.clamp(min=_LARGE_U)) / 2, torch.log(nll.masked_fill(large, 1.0))
    )


def _one_minus_r(u: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    # 1 − log1p(x)/x with x = e^−u, which is x/2 − x²/3 + x³/4 − … for small x.
    x = torch.exp(-u)
    small = x < _SMALL_X
    x_small = x.masked_fill(~small, 0.0)
    series = torch.zeros_like(u)
    for coefficient in reversed(_SERIES):
        series = series * x_small + coefficient
    direct = 1 - torch.exp(u.masked_fill(small, 0.0)) * nll
    return torch.where(small, series * x_small, direct)
