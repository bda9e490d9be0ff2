"""Kernels of the operator `linear_logps`: LM-head GEMM, log-softmax statistics, log-probs, and dz.

Arguments without `_ptr` are records of `focalkern.records`, where shapes stand; their tensors are pointers
here, their None members are compiled away. `i_*` are program indices, `o_*` offsets, `m_*` masks, `b_*` block
values. Every output element has one writer and a fixed order of summation: results are bitwise reproducible,
and do not depend on the other rows. Launched by `focalkern.logps.triton_form`.
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
def tile_of_rows(n, columns, tile):
    """Which rows [tile.m] and columns [tile.n] this program has; rows past n repeat the last one in o_row."""
    i_m, i_n = tile_order(tl.program_id(0), tl.cdiv(n, tile.m), tl.cdiv(columns, tile.n), tile.group_m)
    o_m = i_m * tile.m + tl.arange(0, tile.m)
    return o_m, tl.minimum(o_m, n - 1).to(tl.int64), i_n


@triton.jit
def logits_tile(head, o_row, o_v, sizes, tile):
    """The logits of rows [tile.m] (int64) and vocabulary entries [tile.n] in fp32, before their transform;
    and per row NaN if the products are not finite, else 0."""
    # Columns past V repeat the last one: no mask in the inner loop, and the caller drops them.
    o_v = tl.minimum(o_v, sizes.V - 1)
    o_k = tl.arange(0, tile.k)
    p_hidden = head.hidden + o_row[:, None] * sizes.H + o_k[None, :]
    p_weight = head.weight + o_v[:, None].to(tl.int64) * sizes.H + o_k[None, :]

    b_acc = tl.zeros([tile.m, tile.n], dtype=tl.float32)
    for i_k in range(0, sizes.H, tile.k):
        if tile.even_k:
            b_hidden = tl.load(p_hidden)
            b_weight = tl.load(p_weight)
        else:
            m_k = (i_k + o_k < sizes.H)[None, :]
            b_hidden = tl.load(p_hidden, mask=m_k, other=0.0)
            b_weight = tl.load(p_weight, mask=m_k, other=0.0)
        b_acc = tl.dot(b_hidden, tl.trans(b_weight), b_acc, input_precision=tile.precision)
        p_hidden += tile.k
        p_weight += tile.k

    if head.update_hidden is not None:
        o_r = tl.arange(0, tile.r)
        p_hidden = head.update_hidden + o_row[:, None] * sizes.R + o_r[None, :]
        p_weight = head.update_weight + o_v[:, None].to(tl.int64) * sizes.R + o_r[None, :]
        for _ in range(0, sizes.R, tile.r):
            b_weight = tl.trans(tl.load(p_weight))
            b_acc = tl.dot(tl.load(p_hidden), b_weight, b_acc, input_precision=tile.precision)
            p_hidden += tile.r
            p_weight += tile.r

    # A softmax would turn an infinite logit into a finite loss, and so would the softcap; a −inf in bias is
    # meant.
    b_poison = tl.sum(b_acc * 0.0, axis=1)
    if head.bias is not None:
        b_acc += tl.load(head.bias + o_v).to(tl.float32)[None, :]
    return b_acc, b_poison


@triton.jit
def take_out_label(b_z, b_y, o_m, first_v, m_own, target_z_ptr, V, tile):
    """Store the labels' logits; give all logits, −inf in place of the labels' and of those past V, and the
    labels' logits [tile.m], 0 where they are in another tile."""
    o_c = tl.arange(0, tile.n)
    if not tile.even_v:  # noqa: SIM102 (a constant of the kernel; the next condition is none)
        if first_v + tile.n > V:
            b_z += tl.where(o_c < V - first_v, 0.0, -float("inf"))[None, :]  # fewer registers than a mask
    m_target = o_c[None, :] == (b_y - first_v)[:, None]
    b_own_z = tl.sum(tl.where(m_target, b_z, 0.0), axis=1)
    tl.store(target_z_ptr + o_m, b_own_z, mask=m_own)
    return tl.where(m_target, -float("inf"), b_z), b_own_z


@triton.jit(do_not_specialize=["n"])
def linear_logps_fwd_kernel(
    head,
    targets_ptr,  # [n] int64
    blocks,  # BlockStatistics, out; lse is stored without the label
    n,
    sizes,
    scales,
    tile,  # rows × vocabulary over the hidden size; n is a multiple of 128
):
    o_m, o_row, i_v = tile_of_rows(n, sizes.V, tile)
    o_v = i_v * tile.n + tl.arange(0, tile.n)
    b_x, b_poison = logits_tile(head, o_row, o_v, sizes, tile)
    b_z, _ = logit_transform(b_x, scales)

    # The label's logit, then the block statistics without it: 1 − p_y becomes a ratio of sums.
    m_m = o_m < n
    b_y = tl.load(targets_ptr + o_m, mask=m_m, other=-1).to(tl.int32)
    m_own = m_m & (b_y >= i_v * tile.n) & (b_y < (i_v + 1) * tile.n)
    b_rest = b_z
    b_own_z = tl.zeros([tile.m], dtype=tl.float32)
    # Most tiles hold no label of their rows: they save a third of the instructions of the epilogue.
    if (tl.max(m_own.to(tl.int32), axis=0) > 0) | ((i_v + 1) * tile.n > sizes.V):
        b_rest, b_own_z = take_out_label(b_z, b_y, o_m, i_v * tile.n, m_own, blocks.target_z, sizes.V, tile)

    NUM_BLOCKS: tl.constexpr = tile.n // VOCAB_BLOCK
    NB = tl.cdiv(sizes.V, VOCAB_BLOCK)
    o_b = i_v * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    o_out = o_m[:, None].to(tl.int64) * NB + o_b[None, :]
    m_out = m_m[:, None] & (o_b < NB)[None, :]
    b_blocks = tl.reshape(b_rest, [tile.m, NUM_BLOCKS, VOCAB_BLOCK])
    b_max = tl.max(b_blocks, axis=2)

    # What is made of the logits themselves comes first: beside exponentials, registers would spill.
    if blocks.sum_z is not None or blocks.max_z is not None:
        m_target = o_v[None, :] == b_y[:, None]
        m_own_block = (b_y // VOCAB_BLOCK)[:, None] == o_b[None, :]
    if blocks.sum_z is not None:
        b_others = tl.where(m_target | (o_v >= sizes.V)[None, :], 0.0, b_rest)
        b_sum_z = tl.sum(tl.reshape(b_others, [tile.m, NUM_BLOCKS, VOCAB_BLOCK]), axis=2)
        b_sum_z += tl.where(m_own_block, b_own_z[:, None], 0.0)
        tl.store(blocks.sum_z + o_out, b_sum_z + b_poison[:, None], mask=m_out)
    if blocks.max_z is not None:
        # The label is the top-1 if it is above all before it and at least equal to all after it. In its own
        # block that is decided here: its maximum becomes −inf, or +inf if the label is beaten.
        b_wins = tl.where(o_v[None, :] < b_y[:, None], b_own_z[:, None] > b_rest, b_own_z[:, None] >= b_rest)
        b_wins |= m_target | (o_v >= sizes.V)[None, :]
        b_wins = tl.min(tl.reshape(b_wins.to(tl.int32), [tile.m, NUM_BLOCKS, VOCAB_BLOCK]), axis=2)
        b_verdict = tl.where(b_wins == 1, -float("inf"), float("inf"))
        tl.store(blocks.max_z + o_out, tl.where(m_own_block, b_verdict, b_max), mask=m_out)

    b_shift = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_centred = b_blocks - b_shift[:, :, None]
    b_exp = fast_exp(b_centred)
    b_sum = tl.sum(b_exp, axis=2) + b_poison[:, None]
    b_log_sum = tl.log(b_sum)
    tl.store(blocks.lse + o_out, b_shift + b_log_sum, mask=m_out)

    # Entropy and log Σp² within the block do not change when all logits are shifted.
    if blocks.entropy is not None:
        b_weighted = b_exp * tl.where(b_exp > 0.0, b_centred, 0.0)
        tl.store(blocks.entropy + o_out, b_log_sum - tl.sum(b_weighted, axis=2) / b_sum, mask=m_out)
    if blocks.log_sum_sq is not None:
        b_log_sum_sq = tl.log(tl.sum(b_exp * b_exp, axis=2)) - 2.0 * b_log_sum
        tl.store(blocks.log_sum_sq + o_out, b_log_sum_sq, mask=m_out)


@triton.jit
def linear_logps_reduce_kernel(
    blocks,  # BlockStatistics
    targets_ptr,  # [n] int64
    saved,  # Saved, out: lse and one_minus_p
    values,  # RowValues, out; is_top1 as int8
    V,
    BLOCK_NB: tl.constexpr,  # power of two, at least NB
):
    """One row per program: from block statistics to the values of the row."""
    i_row = tl.program_id(0).to(tl.int64)
    NB = tl.cdiv(V, VOCAB_BLOCK)
    o_b = tl.arange(0, BLOCK_NB)
    m_b = o_b < NB
    o_in = i_row * NB + o_b
    b_lse = tl.load(blocks.lse + o_in, mask=m_b, other=-float("inf"))
    target_z = tl.load(blocks.target_z + i_row)

    high = tl.max(b_lse, axis=0)
    high = tl.where(high == -float("inf"), 0.0, high)
    rest_lse = high + tl.log(tl.sum(tl.exp(b_lse - high), axis=0))
    gap = rest_lse - target_z
    logp = -(tl.maximum(gap, 0.0) + log1p_unit(tl.exp(-tl.abs(gap))))
    lse = logaddexp(rest_lse, target_z)
    tl.store(saved.lse + i_row, lse)
    tl.store(saved.one_minus_p + i_row, tl.sigmoid(gap))
    tl.store(values.logps + i_row, logp)

    # The label counts as a block of its own, of entropy 0.
    b_log_p = b_lse - lse
    if values.entropy is not None:
        b_entropy = tl.load(blocks.entropy + o_in, mask=m_b, other=0.0)
        b_terms = tl.exp(b_log_p) * tl.where(b_log_p == -float("inf"), 0.0, b_entropy - b_log_p)
        own_entropy = -tl.exp(logp) * tl.where(logp == -float("inf"), 0.0, logp)
        tl.store(values.entropy + i_row, tl.sum(b_terms, axis=0) + own_entropy)
    if values.mean_logits is not None:
        b_sum_z = tl.load(blocks.sum_z + o_in, mask=m_b, other=0.0)
        tl.store(values.mean_logits + i_row, tl.sum(b_sum_z, axis=0) / V)
    if values.is_top1 is not None:
        b_max = tl.load(blocks.max_z + o_in, mask=m_b, other=-float("inf"))
        own_block = tl.load(targets_ptr + i_row) // VOCAB_BLOCK
        b_wins = tl.where(o_b < own_block, target_z > b_max, target_z >= b_max)
        tl.store(values.is_top1 + i_row, tl.min((b_wins | (o_b >= NB)).to(tl.int32), axis=0).to(tl.int8))
    if values.log_sum_sq_probs is not None:
        b_log_sum_sq = tl.load(blocks.log_sum_sq + o_in, mask=m_b, other=0.0)
        b_log_sum_sq = tl.where(b_log_p == -float("inf"), -float("inf"), b_log_sum_sq + 2.0 * b_log_p)
        high_sq = tl.maximum(tl.max(b_log_sum_sq, axis=0), 2.0 * logp)
        sum_sq = tl.sum(tl.exp(b_log_sum_sq - high_sq), axis=0) + tl.exp(2.0 * logp - high_sq)
        tl.store(values.log_sum_sq_probs + i_row, high_sq + tl.log(sum_sq))


@triton.jit(do_not_specialize=["n"])
def linear_logps_bwd_dz_kernel(
    head,
    targets_ptr,  # [n] int64
    saved,
    grads,  # RowGradients
    dz_ptr,  # [n, chunk.pitch] out: gradient of hidden @ weightᵀ, in the inputs' dtype
    chunk,
    n,
    sizes,
    scales,
    tile,  # rows × vocabulary over the hidden size
):
    o_m, o_row, i_v = tile_of_rows(n, chunk.size, tile)
    o_c = i_v * tile.n + tl.arange(0, tile.n)
    o_v = chunk.start + o_c
    b_x, _ = logits_tile(head, o_row, o_v, sizes, tile)
    b_z, b_slope = logit_transform(b_x, scales)

    # d logps / dz_v = 1[v = y] − p_v
    b_y = tl.load(targets_ptr + o_row).to(tl.int32)
    b_log_p = b_z - tl.load(saved.lse + o_row)[:, None]
    b_p = fast_exp(b_log_p)
    m_target = o_v[None, :] == b_y[:, None]
    b_dlogp = tl.where(m_target, tl.load(saved.one_minus_p + o_row)[:, None], -b_p)
    b_dz = tl.load(grads.logps + o_row)[:, None] * b_dlogp

    if grads.entropy is not None:
        # d entropy / dz_v = −p_v (log p_v + entropy)
        b_e = tl.load(grads.entropy + o_row)
        b_entropy = tl.load(saved.entropy + o_row)
        b_dz -= b_e[:, None] * b_p * tl.where(b_p == 0.0, 0.0, b_log_p + b_entropy[:, None])

    b_dz *= b_slope
    o_dz = o_m[:, None].to(tl.int64) * chunk.pitch + o_c[None, :]
    m_dz = (o_m < n)[:, None] & (o_c < chunk.size)[None, :]
    tl.store(dz_ptr + o_dz, b_dz.to(dz_ptr.dtype.element_ty), mask=m_dz)
