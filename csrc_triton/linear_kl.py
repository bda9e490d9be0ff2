"""Kernels of the operator `linear_kl`: logits of two LM heads tile by tile, their KL per row, its gradient.

Names as in `csrc_triton.linear_logps`, whose kernels also multiply dz; `ref_*` is of the reference. A
vocabulary tile is one block of 128 entries. Launched by `focalkern.backends.triton_kl`.
"""

import triton
import triton.language as tl

from csrc_triton.linear_logps import logits_tile, tile_order
from csrc_triton.scalar import fast_exp, logit_transform


@triton.jit
def kl_terms(b_log_q, b_log_p):
    """q − p − p·log(q/p), whose sum over distributions p and q is KL(p ‖ q), from their logarithms.

    No term is negative, and an error common to all log q or all log p cancels to first order: what is left
    when p and q nearly agree is not the rounding of Σp. Where p = 0 the term is q.
    """
    # In this order: with q formed before d, the tile of kl_fwd spills registers on sm_80 and sm_90.
    b_p = tl.exp(b_log_p)
    b_d = b_log_q - b_log_p
    b_q = tl.exp(b_log_q)
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
def block_log_softmax(b_x, b_poison, m_v, in_scale, out_scale, HAS_SOFTCAP: tl.constexpr):
    """Log-probs within the block, and its logsumexp."""
    b_z, _ = logit_transform(b_x, in_scale, out_scale, HAS_SOFTCAP)
    b_z = tl.where(m_v[None, :], b_z, -float("inf"))
    b_max = tl.max(b_z, axis=1)
    b_shift = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_z -= b_shift[:, None]
    b_log_sum = tl.log(tl.sum(tl.exp(b_z), axis=1) + b_poison)
    # A block of −inf alone keeps its −inf.
    b_log_p = b_z - tl.where(b_log_sum == -float("inf"), 0.0, b_log_sum)[:, None]
    return b_log_p, b_shift + b_log_sum


@triton.jit
def linear_kl_fwd_kernel(
    hidden_ptr,  # [M, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    ref_hidden_ptr,  # [M, H_ref]
    ref_weight_ptr,  # [V, H_ref]
    ref_bias_ptr,  # [V]
    hidden_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    block_lse_ptr,  # [n, NB] out
    block_ref_lse_ptr,  # [n, NB] out
    block_kl_ptr,  # [n, NB] out: KL of the distributions within the block
    V,
    H,
    H_ref,
    NB,
    stride_hidden,
    stride_weight,
    stride_ref_hidden,
    stride_ref_weight,
    in_scale,
    out_scale,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_H_REF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    count = tl.load(count_ptr)
    num_m = tl.cdiv(count, BLOCK_M)
    if tl.program_id(0) >= num_m * NB:
        return
    i_m, i_v = tile_order(tl.program_id(0), num_m, NB, GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_m = o_m < count
    m_v = o_v < V
    o_row = tl.load(hidden_index_ptr + tl.minimum(o_m, count - 1))

    b_ref_x, b_ref_poison = logits_tile(
        ref_hidden_ptr,
        ref_weight_ptr,
        ref_bias_ptr,
        o_row,
        o_v,
        V,
        H_ref,
        stride_ref_hidden,
        stride_ref_weight,
        HAS_REF_BIAS,
        EVEN_H_REF,
        PRECISION,
        BLOCK_M,
        BLOCK_V,
        BLOCK_K,
    )
    b_ref_log_p, b_ref_lse = block_log_softmax(b_ref_x, b_ref_poison, m_v, in_scale, out_scale, HAS_SOFTCAP)
    b_x, b_poison = logits_tile(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        o_row,
        o_v,
        V,
        H,
        stride_hidden,
        stride_weight,
        HAS_BIAS,
        EVEN_H,
        PRECISION,
        BLOCK_M,
        BLOCK_V,
        BLOCK_K,
    )
    b_log_p, b_lse = block_log_softmax(b_x, b_poison, m_v, in_scale, out_scale, HAS_SOFTCAP)
    b_kl = tl.sum(kl_terms(b_log_p, b_ref_log_p), axis=1)

    o_out = o_m.to(tl.int64) * NB + i_v
    tl.store(block_lse_ptr + o_out, b_lse, mask=m_m)
    tl.store(block_ref_lse_ptr + o_out, b_ref_lse, mask=m_m)
    tl.store(block_kl_ptr + o_out, b_kl, mask=m_m)


@triton.jit
def row_lse(b_lse):
    high = tl.max(b_lse, axis=0)
    high = tl.where(high == -float("inf"), 0.0, high)
    return high + tl.log(tl.sum(tl.exp(b_lse - high), axis=0))


@triton.jit
def linear_kl_reduce_kernel(
    block_lse_ptr,  # [n, NB]
    block_ref_lse_ptr,  # [n, NB]
    block_kl_ptr,  # [n, NB]
    output_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    lse_ptr,  # [n] out
    ref_lse_ptr,  # [n] out
    kl_ptr,  # [outputs] out
    NB,
    BLOCK_NB: tl.constexpr,  # power of two, at least NB
):
    """One row per program: KL of the blocks' probabilities, and within each block in proportion to them."""
    i_row = tl.program_id(0).to(tl.int64)
    if i_row >= tl.load(count_ptr):
        return
    o_b = tl.arange(0, BLOCK_NB)
    m_b = o_b < NB
    o_in = i_row * NB + o_b
    b_lse = tl.load(block_lse_ptr + o_in, mask=m_b, other=-float("inf"))
    b_ref_lse = tl.load(block_ref_lse_ptr + o_in, mask=m_b, other=-float("inf"))
    b_kl = tl.load(block_kl_ptr + o_in, mask=m_b, other=0.0)

    lse = row_lse(b_lse)
    ref_lse = row_lse(b_ref_lse)
    b_ref_log_p = b_ref_lse - ref_lse
    b_ref_p = tl.exp(b_ref_log_p)
    # A block that the reference never uses may be one that the policy cannot: 0·inf.
    b_within = tl.where(b_ref_p == 0.0, 0.0, b_ref_p * b_kl)
    kl = tl.sum(kl_terms(b_lse - lse, b_ref_log_p) + b_within, axis=0)

    tl.store(lse_ptr + i_row, lse)
    tl.store(ref_lse_ptr + i_row, ref_lse)
    tl.store(kl_ptr + tl.load(output_index_ptr + i_row), kl)


@triton.jit
def linear_kl_bwd_dz_kernel(
    hidden_ptr,  # [M, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    ref_hidden_ptr,  # [M, H_ref]
    ref_weight_ptr,  # [V, H_ref]
    ref_bias_ptr,  # [V]
    hidden_index_ptr,  # [n] int64
    output_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    lse_ptr,  # [n]
    ref_lse_ptr,  # [n]
    grad_kl_ptr,  # [outputs]
    dz_ptr,  # [n, C] out: gradient of hidden @ weightᵀ for the vocabulary chunk, in the inputs' dtype
    chunk_start,
    chunk_size,
    C,
    n,
    V,
    H,
    H_ref,
    stride_hidden,
    stride_weight,
    stride_ref_hidden,
    stride_ref_weight,
    in_scale,
    out_scale,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_H_REF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    count = tl.load(count_ptr)
    num_m = tl.cdiv(count, BLOCK_M)
    num_v = tl.cdiv(chunk_size, BLOCK_V)
    if tl.program_id(0) >= num_m * num_v:
        return
    i_m, i_v = tile_order(tl.program_id(0), num_m, num_v, GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_v = chunk_start + o_c
    m_m = o_m < count
    o_row = tl.load(hidden_index_ptr + tl.minimum(o_m, count - 1))

    b_ref_x, _ = logits_tile(
        ref_hidden_ptr,
        ref_weight_ptr,
        ref_bias_ptr,
        o_row,
        o_v,
        V,
        H_ref,
        stride_ref_hidden,
        stride_ref_weight,
        HAS_REF_BIAS,
        EVEN_H_REF,
        PRECISION,
        BLOCK_M,
        BLOCK_V,
        BLOCK_K,
    )
    b_ref_z, _ = logit_transform(b_ref_x, in_scale, out_scale, HAS_SOFTCAP)
    b_ref_lse = tl.load(ref_lse_ptr + o_m, mask=m_m, other=0.0)
    b_ref_p = fast_exp(b_ref_z - b_ref_lse[:, None])
    b_x, _ = logits_tile(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        o_row,
        o_v,
        V,
        H,
        stride_hidden,
        stride_weight,
        HAS_BIAS,
        EVEN_H,
        PRECISION,
        BLOCK_M,
        BLOCK_V,
        BLOCK_K,
    )
    b_z, b_slope = logit_transform(b_x, in_scale, out_scale, HAS_SOFTCAP)
    b_lse = tl.load(lse_ptr + o_m, mask=m_m, other=0.0)
    b_p = fast_exp(b_z - b_lse[:, None])

    # d KL / dz_v = p_v − p_ref_v
    o_out = tl.load(output_index_ptr + o_m, mask=m_m, other=0)
    b_g = tl.load(grad_kl_ptr + o_out, mask=m_m, other=0.0)
    b_dz = tl.where(m_m[:, None], b_g[:, None] * (b_p - b_ref_p) * b_slope, 0.0)
    o_dz = o_m[:, None].to(tl.int64) * C + o_c[None, :]
    m_dz = (o_m < n)[:, None] & (o_c < chunk_size)[None, :]
    tl.store(dz_ptr + o_dz, b_dz.to(dz_ptr.dtype.element_ty), mask=m_dz)
