"""Kernels of the operator `linear_kl`: logits of two LM heads tile by tile, their KL per row, its gradient.

Names as in `csrc_triton.linear_logps`; `ref` is of the reference. A vocabulary tile is one block of 128
entries. Launched by `focalkern.kl.triton_form`.
"""

import triton
import triton.language as tl

from csrc_triton.linear_logps import VOCAB_BLOCK, logits_tile, tile_of_rows
from csrc_triton.scalar import fast_exp, logit_transform


@triton.jit
def kl_terms(b_log_q, b_log_p):
    """q − p − p·log(q/p), whose sum over distributions p and q is KL(p ‖ q), from their logarithms.

    No term is negative, and an error common to all log q or all log p cancels to first order: what is left
    when p and q nearly agree is not the rounding of Σp. Where p = 0 the term is q.
    """
    # In this order: with q formed before d, the tile of kl_fwd spills registers on sm_80 and sm_90. A small
    # p is not flushed to 0: where the policy has no probability, the KL is inf.
    b_p = tl.exp(b_log_p)
    b_d = b_log_q - b_log_p
    b_q = fast_exp(b_log_q)
    b_far = b_q - b_p - b_p * b_d
    # p·(e^d − 1 − d) by its series, where the above would cancel.
    series = 1.0 / 362880.0
    series = series * b_d + 1.0 / 40320.0
    series = series * b_d + 1.0 / 5040.0
    series = series * b_d + 1.0 / 720.0
    series = series * b_d + 1.0 / 120.0
    series = series * b_d + 1.0 / 24.0
    series = series * b_d + 1.0 / 6.0
    series = series * b_d + 0.5
    b_near = b_p * b_d * b_d * series
    return tl.where(b_p == 0.0, b_q, tl.where(tl.abs(b_d) < 0.5, b_near, b_far))


@triton.jit
def block_log_softmax(b_x, b_poison, m_v, scales):
    """Log-probs within the block, and its logsumexp."""
    b_z, _ = logit_transform(b_x, scales)
    b_z = tl.where(m_v[None, :], b_z, -float("inf"))
    b_max = tl.max(b_z, axis=1)
    b_shift = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_z -= b_shift[:, None]
    b_log_sum = tl.log(tl.sum(fast_exp(b_z), axis=1) + b_poison)
    # A block of −inf alone keeps its −inf.
    b_log_p = b_z - tl.where(b_log_sum == -float("inf"), 0.0, b_log_sum)[:, None]
    return b_log_p, b_shift + b_log_sum


@triton.jit(do_not_specialize=["n"])
def linear_kl_fwd_kernel(
    policy,  # Head
    ref,  # Head
    blocks,  # KLStatistics, out
    n,
    sizes,
    ref_sizes,
    scales,
    tile,  # rows × 128 over the hidden size
    ref_tile,  # the same over that of the reference
):
    o_m, o_row, i_v = tile_of_rows(n, sizes.V, tile)
    o_v = i_v * tile.n + tl.arange(0, tile.n)
    m_v = o_v < sizes.V
    b_ref_x, b_ref_poison = logits_tile(ref, o_row, o_v, ref_sizes, ref_tile)
    b_ref_log_p, b_ref_lse = block_log_softmax(b_ref_x, b_ref_poison, m_v, scales)
    b_x, b_poison = logits_tile(policy, o_row, o_v, sizes, tile)
    b_log_p, b_lse = block_log_softmax(b_x, b_poison, m_v, scales)
    b_kl = tl.sum(kl_terms(b_log_p, b_ref_log_p), axis=1)

    o_out = o_m.to(tl.int64) * tl.cdiv(sizes.V, VOCAB_BLOCK) + i_v
    m_m = o_m < n
    tl.store(blocks.lse + o_out, b_lse, mask=m_m)
    tl.store(blocks.ref_lse + o_out, b_ref_lse, mask=m_m)
    tl.store(blocks.kl + o_out, b_kl, mask=m_m)


@triton.jit
def row_lse(b_lse):
    high = tl.max(b_lse, axis=0)
    high = tl.where(high == -float("inf"), 0.0, high)
    return high + tl.log(tl.sum(tl.exp(b_lse - high), axis=0))


@triton.jit
def linear_kl_reduce_kernel(
    blocks,  # KLStatistics
    out,  # KLForward, out
    NB,
    BLOCK_NB: tl.constexpr,  # power of two, at least NB
):
    """One row per program: KL of the blocks' probabilities, and within each block in proportion to them."""
    i_row = tl.program_id(0).to(tl.int64)
    o_b = tl.arange(0, BLOCK_NB)
    m_b = o_b < NB
    o_in = i_row * NB + o_b
    b_lse = tl.load(blocks.lse + o_in, mask=m_b, other=-float("inf"))
    b_ref_lse = tl.load(blocks.ref_lse + o_in, mask=m_b, other=-float("inf"))
    b_kl = tl.load(blocks.kl + o_in, mask=m_b, other=0.0)

    lse = row_lse(b_lse)
    ref_lse = row_lse(b_ref_lse)
    b_ref_log_p = b_ref_lse - ref_lse
    b_ref_p = tl.exp(b_ref_log_p)
    # A block that the reference never uses may be one that the policy cannot: 0·inf.
    b_within = tl.where(b_ref_p == 0.0, 0.0, b_ref_p * b_kl)
    tl.store(out.kl + i_row, tl.sum(kl_terms(b_lse - lse, b_ref_log_p) + b_within, axis=0))
    tl.store(out.lse + i_row, lse)
    tl.store(out.ref_lse + i_row, ref_lse)


@triton.jit(do_not_specialize=["n"])
def linear_kl_bwd_dz_kernel(
    policy,  # Head
    ref,  # Head
    saved,  # KLForward
    grad_kl_ptr,  # [n]
    dz_ptr,  # [n, chunk.pitch] out: gradient of hidden @ weightᵀ, in the inputs' dtype
    chunk,
    n,
    sizes,
    ref_sizes,
    scales,
    tile,  # rows × 128 over the hidden size
    ref_tile,  # the same over that of the reference
):
    o_m, o_row, i_v = tile_of_rows(n, chunk.size, tile)
    o_c = i_v * tile.n + tl.arange(0, tile.n)
    o_v = chunk.start + o_c
    b_ref_x, _ = logits_tile(ref, o_row, o_v, ref_sizes, ref_tile)
    b_ref_z, _ = logit_transform(b_ref_x, scales)
    b_ref_p = fast_exp(b_ref_z - tl.load(saved.ref_lse + o_row)[:, None])
    b_x, _ = logits_tile(policy, o_row, o_v, sizes, tile)
    b_z, b_slope = logit_transform(b_x, scales)
    b_p = fast_exp(b_z - tl.load(saved.lse + o_row)[:, None])

    # d KL / dz_v = p_v − p_ref_v
    b_dz = tl.load(grad_kl_ptr + o_row)[:, None] * (b_p - b_ref_p) * b_slope
    o_dz = o_m[:, None].to(tl.int64) * chunk.pitch + o_c[None, :]
    m_dz = (o_m < n)[:, None] & (o_c < chunk.size)[None, :]
    tl.store(dz_ptr + o_dz, b_dz.to(dz_ptr.dtype.element_ty), mask=m_dz)
