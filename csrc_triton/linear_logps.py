"""Kernels of the operator `linear_logps`: LM-head GEMM, log-softmax statistics, log-probs, exact backward.

Names: n rows (completion tokens) of which `count` are real, V vocabulary, H hidden size, R rank of an update
of the head, NB = ceil(V / 128) vocabulary blocks; `i_*` program indices, `o_*` offsets, `m_*` masks, `b_*`
block values. Every output element has one writer and a fixed order of summation: results are bitwise
reproducible. Launched by `focalkern.backends.triton_backend`.
"""

import triton
import triton.language as tl

from csrc_triton import launch
from csrc_triton.scalar import fast_exp, log1p_unit, logaddexp, logit_transform

VOCAB_BLOCK = tl.constexpr(launch.VOCAB_BLOCK)


@triton.jit
def tile_order(i_tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Tiles in groups of GROUP_M rows, so that the tiles in flight share their operands in L2."""
    group_size = GROUP_M * num_n
    first_m = i_tile // group_size * GROUP_M
    rows_in_group = tl.minimum(num_m - first_m, GROUP_M)
    i_in_group = i_tile % group_size
    return first_m + i_in_group % rows_in_group, i_in_group // rows_in_group


@triton.jit
def with_bias(b_acc, bias_ptr, o_v, HAS_BIAS: tl.constexpr):
    """The logits; and per row NaN if the products are not finite, else 0."""
    # A softmax would turn an infinite logit into a finite loss, and so would the softcap; a −inf in bias is
    # meant.
    b_poison = tl.sum(b_acc * 0.0, axis=1)
    if HAS_BIAS:
        b_acc += tl.load(bias_ptr + o_v).to(tl.float32)[None, :]
    return b_acc, b_poison


@triton.jit
def logits_tile(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    o_row,  # [BLOCK_M] int64, rows of hidden
    o_v,  # [BLOCK_V], may pass V
    V,
    H,
    stride_hidden,
    stride_weight,
    HAS_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    update_hidden_ptr=None,
    update_weight_ptr=None,
    R=0,
    stride_update_hidden=0,
    stride_update_weight=0,
    BLOCK_R: tl.constexpr = 0,  # divides R; 0 where the head has no update
):
    """hidden @ weightᵀ + update_hidden @ update_weightᵀ + bias of one tile in fp32; and per row NaN if the
    products are not finite, else 0."""
    # Columns past V repeat the last one: no mask in the inner loop, and the caller drops them.
    o_v = tl.minimum(o_v, V - 1)
    o_k = tl.arange(0, BLOCK_K)
    p_hidden = hidden_ptr + o_row[:, None] * stride_hidden + o_k[None, :]
    p_weight = weight_ptr + o_v[:, None].to(tl.int64) * stride_weight + o_k[None, :]

    b_acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for i_k in range(0, H, BLOCK_K):
        if EVEN_H:
            b_hidden = tl.load(p_hidden)
            b_weight = tl.load(p_weight)
        else:
            m_k = (i_k + o_k < H)[None, :]
            b_hidden = tl.load(p_hidden, mask=m_k, other=0.0)
            b_weight = tl.load(p_weight, mask=m_k, other=0.0)
        b_acc = tl.dot(b_hidden, tl.trans(b_weight), b_acc, input_precision=PRECISION)
        p_hidden += BLOCK_K
        p_weight += BLOCK_K

    if BLOCK_R > 0:
        o_r = tl.arange(0, BLOCK_R)
        p_hidden = update_hidden_ptr + o_row[:, None] * stride_update_hidden + o_r[None, :]
        p_weight = update_weight_ptr + o_v[:, None].to(tl.int64) * stride_update_weight + o_r[None, :]
        for _ in range(0, R, BLOCK_R):
            b_acc = tl.dot(tl.load(p_hidden), tl.trans(tl.load(p_weight)), b_acc, input_precision=PRECISION)
            p_hidden += BLOCK_R
            p_weight += BLOCK_R

    return with_bias(b_acc, bias_ptr, o_v, HAS_BIAS)


@triton.jit
def take_out_label(b_z, b_y, o_m, o_v, m_own, target_z_ptr, V, EVEN_V: tl.constexpr):
    """Store the labels' logits; give all logits, −inf in place of the labels' and of those past V."""
    m_target = o_v[None, :] == b_y[:, None]
    tl.store(target_z_ptr + o_m, tl.sum(tl.where(m_target, b_z, 0.0), axis=1), mask=m_own)
    b_rest = tl.where(m_target, -float("inf"), b_z)
    if not EVEN_V:
        # Columns past V repeat the last one. Adding −inf removes them in fewer registers than a second mask.
        b_rest += tl.where(o_v < V, 0.0, -float("inf"))[None, :]
    return b_rest


@triton.jit
def store_block_statistics(
    b_x,  # [BLOCK_M, BLOCK_V], hidden @ weightᵀ + bias
    b_poison,  # [BLOCK_M]
    i_m,
    i_v,
    targets_ptr,
    count,
    target_z_ptr,
    block_lse_ptr,
    stats_ptr,
    stats_plane,
    V,
    NB,
    in_scale,
    out_scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    EVEN_V: tl.constexpr,  # no vocabulary block passes V
    BRANCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What the forward keeps of a tile: the labels' logits, and of each vocabulary block its logsumexp."""
    b_z, _ = logit_transform(b_x, in_scale, out_scale, HAS_SOFTCAP)

    # The label's logit, then the block statistics without it: 1 − p_y becomes a ratio of sums.
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_m = o_m < count
    b_y = tl.load(targets_ptr + o_m, mask=m_m, other=-1).to(tl.int32)
    m_own = m_m & (b_y >= i_v * BLOCK_V) & (b_y < (i_v + 1) * BLOCK_V)
    if BRANCH:
        # Most tiles hold no label of their rows: they save a third of the instructions of this function.
        b_rest = b_z
        if (tl.max(m_own.to(tl.int32), axis=0) > 0) | ((i_v + 1) * BLOCK_V > V):
            b_rest = take_out_label(b_z, b_y, o_m, o_v, m_own, target_z_ptr, V, EVEN_V)
    else:
        b_rest = take_out_label(b_z, b_y, o_m, o_v, m_own, target_z_ptr, V, EVEN_V)

    NUM_BLOCKS: tl.constexpr = BLOCK_V // VOCAB_BLOCK
    b_rest = tl.reshape(b_rest, [BLOCK_M, NUM_BLOCKS, VOCAB_BLOCK])
    b_max = tl.max(b_rest, axis=2)
    b_shift = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_exp = fast_exp(b_rest - b_shift[:, :, None])
    b_sum = tl.sum(b_exp, axis=2) + b_poison[:, None]
    b_log_sum = tl.log(b_sum)

    o_b = i_v * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    o_out = o_m[:, None].to(tl.int64) * NB + o_b[None, :]
    m_out = m_m[:, None] & (o_b < NB)[None, :]
    tl.store(block_lse_ptr + o_out, b_shift + b_log_sum, mask=m_out)

    if HAS_STATS:
        # One plane after the other: 3·n·NB need not fit an int32.
        entropy_plane_ptr = stats_ptr + stats_plane
        log_sum_sq_plane_ptr = entropy_plane_ptr + stats_plane
        sum_z_plane_ptr = log_sum_sq_plane_ptr + stats_plane
        # The label is the top-1 if it is above all before it and at least equal to all after it. In its own
        # block that is decided here: its maximum becomes −inf, or +inf if the label is beaten.
        m_target = o_v[None, :] == b_y[:, None]
        b_own_z = tl.sum(tl.where(m_target, b_z, 0.0), axis=1)[:, None]
        b_wins = tl.where(o_v[None, :] < b_y[:, None], b_own_z > b_z, b_own_z >= b_z)
        b_wins |= m_target | (o_v >= V)[None, :]
        b_wins = tl.min(tl.reshape(b_wins.to(tl.int32), [BLOCK_M, NUM_BLOCKS, VOCAB_BLOCK]), axis=2)
        b_verdict = tl.where(b_wins == 1, -float("inf"), float("inf"))
        m_own_block = (b_y // VOCAB_BLOCK)[:, None] == o_b[None, :]
        tl.store(stats_ptr + o_out, tl.where(m_own_block, b_verdict, b_max), mask=m_out)
        # Entropy and log Σp² within the block do not change when all logits are shifted.
        b_weighted = b_exp * tl.where(b_exp > 0.0, b_rest - b_shift[:, :, None], 0.0)
        b_entropy = b_log_sum - tl.sum(b_weighted, axis=2) / b_sum
        tl.store(entropy_plane_ptr + o_out, b_entropy, mask=m_out)
        b_log_sum_sq = tl.log(tl.sum(b_exp * b_exp, axis=2)) - 2.0 * b_log_sum
        tl.store(log_sum_sq_plane_ptr + o_out, b_log_sum_sq, mask=m_out)
        b_all = tl.reshape(tl.where((o_v < V)[None, :], b_z, 0.0), [BLOCK_M, NUM_BLOCKS, VOCAB_BLOCK])
        tl.store(sum_z_plane_ptr + o_out, tl.sum(b_all, axis=2) + b_poison[:, None], mask=m_out)


@triton.jit
def linear_logps_fwd_kernel(
    hidden_ptr,  # [M, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    update_hidden_ptr,  # [M, R]
    update_weight_ptr,  # [V, R]
    hidden_index_ptr,  # [n] int64
    targets_ptr,  # [n] int64
    count_ptr,  # [1] int32
    target_z_ptr,  # [n] out: z[t, y_t]
    block_lse_ptr,  # [n, NB] out: logsumexp of the block without the label
    stats_ptr,  # [4, n, NB] out: block maximum, entropy, log Σp², Σz
    stats_plane,  # n·NB
    V,
    H,
    R,
    NB,
    stride_hidden,
    stride_weight,
    stride_update_hidden,
    stride_update_weight,
    in_scale,
    out_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    count = tl.load(count_ptr)
    num_m = tl.cdiv(count, BLOCK_M)
    num_v = tl.cdiv(V, BLOCK_V)
    if tl.program_id(0) >= num_m * num_v:
        return
    i_m, i_v = tile_order(tl.program_id(0), num_m, num_v, GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_row = tl.load(hidden_index_ptr + tl.minimum(o_m, count - 1))

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
        update_hidden_ptr,
        update_weight_ptr,
        R,
        stride_update_hidden,
        stride_update_weight,
        BLOCK_R,
    )
    store_block_statistics(
        b_x,
        b_poison,
        i_m,
        i_v,
        targets_ptr,
        count,
        target_z_ptr,
        block_lse_ptr,
        stats_ptr,
        stats_plane,
        V,
        NB,
        in_scale,
        out_scale,
        HAS_SOFTCAP,
        HAS_STATS,
        EVEN_V,
        True,  # BRANCH
        BLOCK_M,
        BLOCK_V,
    )


@triton.jit
def linear_logps_reduce_kernel(
    target_z_ptr,  # [n]
    block_lse_ptr,  # [n, NB]
    stats_ptr,  # [4, n, NB]
    targets_ptr,  # [n] int64
    output_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    lse_ptr,  # [n] out
    one_minus_p_ptr,  # [n] out: 1 − p_y
    logps_ptr,  # [outputs] out
    entropy_ptr,  # [outputs] out
    mean_logits_ptr,  # [outputs] out
    is_top1_ptr,  # [outputs] out, int8
    log_sum_sq_probs_ptr,  # [outputs] out
    stats_plane,  # n·NB
    V,
    NB,
    HAS_STATS: tl.constexpr,
    BLOCK_NB: tl.constexpr,  # power of two, at least NB
):
    """One row per program: from block statistics to the values of the token."""
    i_row = tl.program_id(0).to(tl.int64)
    if i_row >= tl.load(count_ptr):
        return
    o_b = tl.arange(0, BLOCK_NB)
    m_b = o_b < NB
    b_lse = tl.load(block_lse_ptr + i_row * NB + o_b, mask=m_b, other=-float("inf"))
    target_z = tl.load(target_z_ptr + i_row)

    high = tl.max(b_lse, axis=0)
    high = tl.where(high == -float("inf"), 0.0, high)
    rest_lse = high + tl.log(tl.sum(tl.exp(b_lse - high), axis=0))
    gap = rest_lse - target_z
    logp = -(tl.maximum(gap, 0.0) + log1p_unit(tl.exp(-tl.abs(gap))))
    lse = logaddexp(rest_lse, target_z)

    i_out = tl.load(output_index_ptr + i_row)
    tl.store(lse_ptr + i_row, lse)
    tl.store(one_minus_p_ptr + i_row, tl.sigmoid(gap))
    tl.store(logps_ptr + i_out, logp)

    if HAS_STATS:
        entropy_plane_ptr = stats_ptr + stats_plane
        log_sum_sq_plane_ptr = entropy_plane_ptr + stats_plane
        sum_z_plane_ptr = log_sum_sq_plane_ptr + stats_plane
        b_log_p = b_lse - lse
        # The label counts as a block of its own, of entropy 0.
        b_entropy = tl.load(entropy_plane_ptr + i_row * NB + o_b, mask=m_b, other=0.0)
        b_terms = tl.exp(b_log_p) * tl.where(b_log_p == -float("inf"), 0.0, b_entropy - b_log_p)
        own_entropy = -tl.exp(logp) * tl.where(logp == -float("inf"), 0.0, logp)
        tl.store(entropy_ptr + i_out, tl.sum(b_terms, axis=0) + own_entropy)

        b_sum_z = tl.load(sum_z_plane_ptr + i_row * NB + o_b, mask=m_b, other=0.0)
        tl.store(mean_logits_ptr + i_out, tl.sum(b_sum_z, axis=0) / V)

        b_max = tl.load(stats_ptr + i_row * NB + o_b, mask=m_b, other=-float("inf"))
        own_block = tl.load(targets_ptr + i_row) // VOCAB_BLOCK
        b_wins = tl.where(o_b < own_block, target_z > b_max, target_z >= b_max) | ~m_b
        tl.store(is_top1_ptr + i_out, tl.min(b_wins.to(tl.int32), axis=0).to(tl.int8))

        b_log_sum_sq = tl.load(log_sum_sq_plane_ptr + i_row * NB + o_b, mask=m_b, other=0.0)
        b_log_sum_sq = tl.where(b_log_p == -float("inf"), -float("inf"), b_log_sum_sq + 2.0 * b_log_p)
        high_sq = tl.maximum(tl.max(b_log_sum_sq, axis=0), 2.0 * logp)
        sum_sq = tl.sum(tl.exp(b_log_sum_sq - high_sq), axis=0) + tl.exp(2.0 * logp - high_sq)
        tl.store(log_sum_sq_probs_ptr + i_out, high_sq + tl.log(sum_sq))


@triton.jit
def store_dz(
    b_x,  # [BLOCK_M, BLOCK_V], hidden @ weightᵀ + bias
    i_m,
    i_v,
    output_index_ptr,
    targets_ptr,
    count,
    lse_ptr,
    one_minus_p_ptr,
    entropy_ptr,
    grad_logps_ptr,
    grad_entropy_ptr,
    dz_ptr,
    n,
    chunk_start,
    chunk_size,
    C,
    in_scale,
    out_scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradient of a tile of hidden @ weightᵀ; 0 in rows past the count."""
    b_z, b_slope = logit_transform(b_x, in_scale, out_scale, HAS_SOFTCAP)

    # d logps / dz_v = 1[v = y] − p_v
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_m = o_m < count
    b_y = tl.load(targets_ptr + o_m, mask=m_m, other=-1).to(tl.int32)
    b_lse = tl.load(lse_ptr + o_m, mask=m_m, other=0.0)
    b_one_minus_p = tl.load(one_minus_p_ptr + o_m, mask=m_m, other=0.0)
    o_out = tl.load(output_index_ptr + o_m, mask=m_m, other=0)
    b_g = tl.load(grad_logps_ptr + o_out, mask=m_m, other=0.0)
    b_log_p = b_z - b_lse[:, None]
    b_p = fast_exp(b_log_p)
    m_target = (chunk_start + o_c)[None, :] == b_y[:, None]
    b_dz = b_g[:, None] * tl.where(m_target, b_one_minus_p[:, None], -b_p)

    if HAS_ENTROPY_GRAD:
        # d entropy / dz_v = −p_v (log p_v + entropy)
        b_e = tl.load(grad_entropy_ptr + o_out, mask=m_m, other=0.0)
        b_entropy = tl.load(entropy_ptr + o_out, mask=m_m, other=0.0)
        b_dz -= b_e[:, None] * b_p * tl.where(b_p == 0.0, 0.0, b_log_p + b_entropy[:, None])

    b_dz *= b_slope
    o_dz = o_m[:, None].to(tl.int64) * C + o_c[None, :]
    b_dz = tl.where(m_m[:, None], b_dz, 0.0)
    m_dz = (o_m < n)[:, None] & (o_c < chunk_size)[None, :]
    tl.store(dz_ptr + o_dz, b_dz.to(dz_ptr.dtype.element_ty), mask=m_dz)


@triton.jit
def linear_logps_bwd_dz_kernel(
    hidden_ptr,  # [M, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    update_hidden_ptr,  # [M, R]
    update_weight_ptr,  # [V, R]
    hidden_index_ptr,  # [n] int64
    output_index_ptr,  # [n] int64
    targets_ptr,  # [n] int64
    count_ptr,  # [1] int32
    lse_ptr,  # [n]
    one_minus_p_ptr,  # [n]
    entropy_ptr,  # [outputs]
    grad_logps_ptr,  # [outputs]
    grad_entropy_ptr,  # [outputs]
    dz_ptr,  # [n, C] out: gradient of hidden @ weightᵀ for the vocabulary chunk, in the inputs' dtype
    chunk_start,
    chunk_size,
    C,
    n,
    V,
    H,
    R,
    stride_hidden,
    stride_weight,
    stride_update_hidden,
    stride_update_weight,
    in_scale,
    out_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
    o_row = tl.load(hidden_index_ptr + tl.minimum(o_m, count - 1))

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
        update_hidden_ptr,
        update_weight_ptr,
        R,
        stride_update_hidden,
        stride_update_weight,
        BLOCK_R,
    )
    store_dz(
        b_x,
        i_m,
        i_v,
        output_index_ptr,
        targets_ptr,
        count,
        lse_ptr,
        one_minus_p_ptr,
        entropy_ptr,
        grad_logps_ptr,
        grad_entropy_ptr,
        dz_ptr,
        n,
        chunk_start,
        chunk_size,
        C,
        in_scale,
        out_scale,
        HAS_SOFTCAP,
        HAS_ENTROPY_GRAD,
        BLOCK_M,
        BLOCK_V,
    )


@triton.jit
def linear_logps_bwd_dweight_kernel(
    dz_ptr,  # [n, C]
    hidden_ptr,  # [M, H]
    hidden_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    dweight_ptr,  # [V, H] out
    chunk_start,
    chunk_size,
    C,
    H,
    stride_hidden,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # vocabulary
    BLOCK_N: tl.constexpr,  # hidden size
    BLOCK_K: tl.constexpr,  # rows
    GROUP_M: tl.constexpr,
):
    """dweight[v, h] = Σ_t dz[t, v]·hidden[t, h] over all rows: complete, written once."""
    count = tl.load(count_ptr)
    i_m, i_n = tile_order(tl.program_id(0), tl.cdiv(chunk_size, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP_M)
    o_c = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_h = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c = o_c < chunk_size
    m_h = o_h < H
    o_k = tl.arange(0, BLOCK_K)

    b_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_k in range(0, count, BLOCK_K):
        m_k = i_k + o_k < count
        o_row = tl.load(hidden_index_ptr + tl.minimum(i_k + o_k, count - 1))
        o_dz = (i_k + o_k)[:, None].to(tl.int64) * C + o_c[None, :]
        b_dz = tl.load(dz_ptr + o_dz, mask=m_k[:, None] & m_c[None, :], other=0.0)
        o_hidden = o_row[:, None] * stride_hidden + o_h[None, :]
        b_hidden = tl.load(hidden_ptr + o_hidden, mask=m_h[None, :], other=0.0)
        b_acc = tl.dot(tl.trans(b_dz), b_hidden, b_acc, input_precision=PRECISION)

    o_out = (chunk_start + o_c)[:, None].to(tl.int64) * H + o_h[None, :]
    tl.store(dweight_ptr + o_out, b_acc.to(dweight_ptr.dtype.element_ty), mask=m_c[:, None] & m_h[None, :])


@triton.jit
def linear_logps_bwd_dbias_kernel(
    dz_ptr,  # [n, C]
    count_ptr,  # [1] int32
    dbias_ptr,  # [V] out
    chunk_start,
    chunk_size,
    C,
    BLOCK_K: tl.constexpr,  # rows
    BLOCK_V: tl.constexpr,
):
    """dbias[v] = Σ_t dz[t, v]."""
    count = tl.load(count_ptr)
    o_c = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_c = o_c < chunk_size
    o_k = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros([BLOCK_V], dtype=tl.float32)
    for i_k in range(0, count, BLOCK_K):
        m_dz = (i_k + o_k < count)[:, None] & m_c[None, :]
        o_dz = (i_k + o_k)[:, None].to(tl.int64) * C + o_c[None, :]
        b_acc += tl.sum(tl.load(dz_ptr + o_dz, mask=m_dz, other=0.0).to(tl.float32), axis=0)
    tl.store(dbias_ptr + chunk_start + o_c, b_acc.to(dbias_ptr.dtype.element_ty), mask=m_c)


@triton.jit
def split_range(chunk_size, i_split, splits, BLOCK_K: tl.constexpr):
    """The part of a chunk that a split sums over: as many blocks of BLOCK_K each, fewer in the last."""
    per_split = tl.cdiv(tl.cdiv(chunk_size, BLOCK_K), splits) * BLOCK_K
    first = i_split * per_split
    return first, tl.minimum(first + per_split, chunk_size)


@triton.jit
def sum_so_far(partial_ptr, o_m, o_h, i_split, count, chunk_start, n, H):
    """A tile of a split's sum over the chunks, 0 before the first.

    The product goes on from it: added afterwards, it would take as many registers as the product.
    """
    m_out = (o_m < count)[:, None] & (o_h < H)[None, :]
    p_partial = partial_ptr + (i_split.to(tl.int64) * n + o_m)[:, None] * H + o_h[None, :]
    return tl.load(p_partial, mask=m_out & (chunk_start > 0), other=0.0)


@triton.jit
def store_sum(
    b_acc,  # [BLOCK_M, BLOCK_N], of all chunks so far
    o_m,
    o_h,
    i_split,
    splits,
    hidden_index_ptr,
    count,
    partial_ptr,
    dhidden_ptr,
    is_last,
    n,
    H,
):
    """The sum of a single split over all chunks is dhidden; any other waits in `partial`, as all do where
    there is no dhidden yet."""
    m_m = o_m < count
    m_out = m_m[:, None] & (o_h < H)[None, :]
    p_partial = partial_ptr + (i_split.to(tl.int64) * n + o_m)[:, None] * H + o_h[None, :]
    if dhidden_ptr is None:
        tl.store(p_partial, b_acc, mask=m_out)
    elif is_last & (splits == 1):
        o_row = tl.load(hidden_index_ptr + o_m, mask=m_m, other=0)
        p_out = dhidden_ptr + o_row[:, None] * H + o_h[None, :]
        tl.store(p_out, b_acc.to(dhidden_ptr.dtype.element_ty), mask=m_out)
    else:
        tl.store(p_partial, b_acc, mask=m_out)


@triton.jit
def linear_logps_bwd_dhidden_kernel(
    dz_ptr,  # [n, C]
    weight_ptr,  # [V, H]
    hidden_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    partial_ptr,  # [splits, n, H] fp32, sums over the chunks so far
    dhidden_ptr,  # [M, H] out, written with the last chunk if there is one split; or None
    chunk_start,
    chunk_size,
    C,
    n,
    V,
    H,
    stride_weight,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows
    BLOCK_N: tl.constexpr,  # hidden size
    BLOCK_K: tl.constexpr,  # vocabulary
    GROUP_M: tl.constexpr,
):
    """dhidden[t, h] = Σ_v dz[t, v]·weight[v, h], chunk after chunk in fp32; axis 1 splits the chunk."""
    count = tl.load(count_ptr)
    num_m = tl.cdiv(count, BLOCK_M)
    num_n = tl.cdiv(H, BLOCK_N)
    if tl.program_id(0) >= num_m * num_n:
        return
    i_m, i_n = tile_order(tl.program_id(0), num_m, num_n, GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_h = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < count
    m_h = o_h < H
    o_k = tl.arange(0, BLOCK_K)
    i_split = tl.program_id(1)
    first_k, end_k = split_range(chunk_size, i_split, tl.num_programs(1), BLOCK_K)

    b_acc = sum_so_far(partial_ptr, o_m, o_h, i_split, count, chunk_start, n, H)
    for i_k in range(first_k, end_k, BLOCK_K):
        m_k = i_k + o_k < end_k
        o_dz = o_m[:, None].to(tl.int64) * C + (i_k + o_k)[None, :]
        b_dz = tl.load(dz_ptr + o_dz, mask=m_m[:, None] & m_k[None, :], other=0.0)
        o_weight = (chunk_start + i_k + o_k)[:, None].to(tl.int64) * stride_weight + o_h[None, :]
        b_weight = tl.load(weight_ptr + o_weight, mask=m_k[:, None] & m_h[None, :], other=0.0)
        b_acc = tl.dot(b_dz, b_weight, b_acc, input_precision=PRECISION)

    store_sum(
        b_acc,
        o_m,
        o_h,
        i_split,
        tl.num_programs(1),
        hidden_index_ptr,
        count,
        partial_ptr,
        dhidden_ptr,
        chunk_start + chunk_size == V,
        n,
        H,
    )


@triton.jit
def linear_logps_bwd_dhidden_sum_kernel(
    partial_ptr,  # [splits, n, H] fp32
    hidden_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    dhidden_ptr,  # [M, H] out
    splits,
    n,
    H,
    BLOCK_N: tl.constexpr,  # hidden size
):
    """One row per program: the sum over the splits, in their order."""
    i_row = tl.program_id(0).to(tl.int64)
    if i_row >= tl.load(count_ptr):
        return
    o_h = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_h = o_h < H
    b_acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    for i_split in range(splits):
        b_acc += tl.load(partial_ptr + (i_split * n + i_row) * H + o_h, mask=m_h, other=0.0)
    p_out = dhidden_ptr + tl.load(hidden_index_ptr + i_row) * H + o_h
    tl.store(p_out, b_acc.to(dhidden_ptr.dtype.element_ty), mask=m_h)
