"""Kernels of the pairwise objective: sums over sequences, then per pair u, p, the loss and its gradient.

Between the two stand the statistics of α-DPO's adaptive margin, over the batch and all ranks; it comes in as
one value per pair. The same formulas, with their sources, are in `focalkern/pairs/objective.py`. Launched by
`focalkern.pairs.triton_form`.
"""

import triton
import triton.language as tl

from csrc_triton.scalar import atanh_series, softplus


@triton.jit
def sequence_sum_fwd_kernel(
    values_ptr,  # [n]
    offsets_ptr,  # [S + 1] int64
    sums_ptr,  # [S] out
    BLOCK: tl.constexpr,
):
    """Σ over the rows of one sequence per program, in fp32, in a fixed order."""
    i_s = tl.program_id(0)
    start = tl.load(offsets_ptr + i_s)
    end = tl.load(offsets_ptr + i_s + 1)
    o_t = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i_t in range(start, end, BLOCK):
        b_sum += tl.load(values_ptr + i_t + o_t, mask=i_t + o_t < end, other=0.0)
    tl.store(sums_ptr + i_s, tl.sum(b_sum, axis=0))


@triton.jit
def modulated_nll(b_u, gamma, MODULATION: tl.constexpr):
    """ℓ(u) = −w(p)·log p and dℓ/du, each product as one exponent."""
    b_nll = softplus(-b_u)  # −log p
    b_flipped = softplus(b_u)  # −log(1−p)
    if MODULATION == "focalpo":
        b_loss = tl.exp(-gamma * b_nll) * b_nll
        b_slope = -tl.exp(-gamma * b_nll - b_flipped) * (1.0 - gamma * b_nll)
    elif MODULATION == "inverse":
        # log softplus(−u) = −u for large u, where softplus(−u) itself underflows.
        b_log_nll = tl.where(b_u > 20.0, -b_u, tl.log(tl.where(b_u > 20.0, 1.0, b_nll)))
        b_loss = tl.exp(gamma * b_flipped + b_log_nll)
        b_slope = -tl.exp((gamma - 1.0) * b_flipped) * ((1.0 - gamma) + gamma * one_minus_r(b_u, b_nll))
    elif MODULATION == "focal":
        b_loss = tl.exp(-gamma * b_flipped) * b_nll
        b_slope = -tl.exp(-gamma * b_flipped) * (tl.exp(-b_flipped) + gamma * tl.exp(-b_nll) * b_nll)
    else:
        tl.static_assert(False, "modulation without a formula in this kernel")
    return b_loss, b_slope


@triton.jit
def one_minus_r(b_u, b_nll):
    """1 − r with r = e^u·softplus(−u). For u >= 0 without a difference of two nearly equal terms:

    r = log(1 + x)/x with x = e^−u, so 1 − r = s − (1 − s)·(atanh(s)/s − 1) with s = x/(2 + x).
    """
    b_x = tl.exp(-tl.maximum(b_u, 0.0))
    b_s = b_x / (2.0 + b_x)
    b_s2 = b_s * b_s
    b_small = b_s - (1.0 - b_s) * b_s2 * atanh_series(b_s2)
    return tl.where(b_u > 0.0, b_small, 1.0 - tl.exp(tl.minimum(b_u, 0.0)) * b_nll)


@triton.jit
def pair_loss_fwd_kernel(
    logps_ptr,  # [2B] sums over completion tokens
    constants,  # PairConstants
    out,  # PairForward
    pairs,
    objective,  # PairObjective; its modulation, switches and an ε of 0 are constants
    BLOCK: tl.constexpr,
):
    o_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_b = o_b < pairs
    b_score_w = tl.load(logps_ptr + o_b, mask=m_b, other=0.0)
    b_score_l = tl.load(logps_ptr + pairs + o_b, mask=m_b, other=0.0)
    if constants.ref_logps is not None:
        b_score_w -= tl.load(constants.ref_logps + o_b, mask=m_b, other=0.0)
        b_score_l -= tl.load(constants.ref_logps + pairs + o_b, mask=m_b, other=0.0)
    b_per_w = tl.full([BLOCK], 1.0, tl.float32)
    b_per_l = tl.full([BLOCK], 1.0, tl.float32)
    if objective.length_normalize:
        b_per_w = 1.0 / tl.load(constants.lengths + o_b, mask=m_b, other=1).to(tl.float32)
        b_per_l = 1.0 / tl.load(constants.lengths + pairs + o_b, mask=m_b, other=1).to(tl.float32)
    b_score_w *= b_per_w
    b_score_l *= b_per_l

    b_u = objective.beta * (b_score_w - b_score_l) - objective.margin
    if constants.adaptive_margin is not None:
        b_u -= tl.load(constants.adaptive_margin + o_b, mask=m_b, other=0.0)
    b_loss, b_slope = modulated_nll(b_u, objective.gamma, objective.modulation)
    if objective.label_smoothing is not None:
        b_loss_flipped, b_slope_flipped = modulated_nll(-b_u, objective.gamma, objective.modulation)
        b_loss = (1.0 - objective.label_smoothing) * b_loss + objective.label_smoothing * b_loss_flipped
        b_slope = (1.0 - objective.label_smoothing) * b_slope - objective.label_smoothing * b_slope_flipped

    tl.store(out.losses + o_b, b_loss, mask=m_b)
    tl.store(out.prob + o_b, tl.exp(-softplus(-b_u)), mask=m_b)
    tl.store(out.slope + o_b, b_slope, mask=m_b)
    tl.store(out.rewards + o_b, objective.beta * b_score_w, mask=m_b)
    tl.store(out.rewards + pairs + o_b, objective.beta * b_score_l, mask=m_b)
    tl.store(out.grad_logps + o_b, objective.beta * b_slope * b_per_w, mask=m_b)
    tl.store(out.grad_logps + pairs + o_b, -objective.beta * b_slope * b_per_l, mask=m_b)
