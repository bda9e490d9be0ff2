"""Kernels of the certified backward: dz of the kept (row, vocabulary block) pairs, and its two products.

dz is compact: pair after pair, 128 entries each, the pairs of a block together. `block_*` arrays say for each
of the NB blocks where its pairs begin in the list of kept pairs, how many they are, and where they are put.
Work is cut into tiles of rows that need the same block. Every output element has one writer and a fixed order
of summation. Launched by `focalkern.backends.triton_certified`.
"""

import triton
import triton.language as tl

from csrc_triton.linear_logps import VOCAB_BLOCK, logits_tile
from csrc_triton.scalar import fast_exp, logit_transform


@triton.jit
def tile_pairs(i_tile, i_block, tile_end_ptr, block_size_ptr, BLOCK_M: tl.constexpr):
    """Which of its block's pairs a tile has; those that pass the block's number are none."""
    size = tl.load(block_size_ptr + i_block)
    tiles_left = tl.load(tile_end_ptr + i_block) - i_tile
    first = (tl.cdiv(size, BLOCK_M) - tiles_left) * BLOCK_M
    o_pair = first + tl.arange(0, BLOCK_M)
    return o_pair, o_pair < size


@triton.jit
def certified_dz_kernel(
    hidden_ptr,  # [M, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    update_hidden_ptr,  # [M, R]
    update_weight_ptr,  # [V, R]
    hidden_index_ptr,  # [n] int64
    targets_ptr,  # [n] int64
    lse_ptr,  # [n]
    one_minus_p_ptr,  # [n]
    g_ptr,  # [n]
    pair_row_ptr,  # [K] int64
    block_start_ptr,  # [NB] int64, in pair_row
    block_size_ptr,  # [NB] int64
    block_place_ptr,  # [NB] int64, in dz
    tile_end_ptr,  # [NB] int64, tiles up to and with the block
    tile_block_ptr,  # [tiles] int64, NB for no block
    dz_ptr,  # [pairs, 128] out: gradient of hidden @ weightᵀ, in the inputs' dtype
    NB,
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
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_block = tl.load(tile_block_ptr + i_tile)
    if i_block >= NB:
        return
    o_pair, m_pair = tile_pairs(i_tile, i_block, tile_end_ptr, block_size_ptr, BLOCK_M)
    o_t = tl.load(pair_row_ptr + tl.load(block_start_ptr + i_block) + o_pair, mask=m_pair, other=0)
    o_c = tl.arange(0, VOCAB_BLOCK)
    o_v = i_block.to(tl.int32) * VOCAB_BLOCK + o_c

    b_x, _ = logits_tile(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        tl.load(hidden_index_ptr + o_t),
        o_v,
        V,
        H,
        stride_hidden,
        stride_weight,
        HAS_BIAS,
        EVEN_H,
        PRECISION,
        BLOCK_M,
        VOCAB_BLOCK,
        BLOCK_K,
        update_hidden_ptr,
        update_weight_ptr,
        R,
        stride_update_hidden,
        stride_update_weight,
        BLOCK_R,
    )
    b_z, b_slope = logit_transform(b_x, in_scale, out_scale, HAS_SOFTCAP)

    # d logps / dz_v = 1[v = y] − p_v
    b_p = fast_exp(b_z - tl.load(lse_ptr + o_t)[:, None])
    m_target = o_v[None, :] == tl.load(targets_ptr + o_t).to(tl.int32)[:, None]
    b_dlogp = tl.where(m_target, tl.load(one_minus_p_ptr + o_t)[:, None], -b_p)
    b_dz = tl.load(g_ptr + o_t)[:, None] * b_dlogp * b_slope
    b_dz = tl.where((o_v < V)[None, :], b_dz, 0.0)
    o_dz = (tl.load(block_place_ptr + i_block) + o_pair)[:, None] * VOCAB_BLOCK + o_c[None, :]
    tl.store(dz_ptr + o_dz, b_dz.to(dz_ptr.dtype.element_ty), mask=m_pair[:, None])


@triton.jit
def certified_dweight_kernel(
    dz_ptr,  # [pairs, 128]
    hidden_ptr,  # [M, H]
    hidden_index_ptr,  # [n] int64
    pair_row_ptr,  # [K] int64
    block_order_ptr,  # [blocks] int64: the blocks to write, those of most pairs first
    block_start_ptr,  # [NB] int64
    block_size_ptr,  # [NB] int64
    block_place_ptr,  # [NB] int64
    dweight_ptr,  # [V, H] out
    V,
    H,
    stride_hidden,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,  # hidden size
    BLOCK_K: tl.constexpr,  # rows
):
    """dweight[v, h] = Σ_t dz[t, v]·hidden[t, h] over the rows that keep the block of v; zero without any."""
    num_n = tl.cdiv(H, BLOCK_N)
    i_block = tl.load(block_order_ptr + tl.program_id(0) // num_n)
    size = tl.load(block_size_ptr + i_block).to(tl.int32)
    p_row = pair_row_ptr + tl.load(block_start_ptr + i_block)
    place = tl.load(block_place_ptr + i_block)
    o_c = tl.arange(0, VOCAB_BLOCK)
    o_h = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_h = o_h < H
    o_k = tl.arange(0, BLOCK_K)

    b_acc = tl.zeros([VOCAB_BLOCK, BLOCK_N], dtype=tl.float32)
    for i_k in range(0, size, BLOCK_K):
        m_k = i_k + o_k < size
        o_t = tl.load(p_row + i_k + o_k, mask=m_k, other=0)
        o_row = tl.load(hidden_index_ptr + o_t)
        o_dz = (place + i_k + o_k)[:, None] * VOCAB_BLOCK + o_c[None, :]
        b_dz = tl.load(dz_ptr + o_dz, mask=m_k[:, None], other=0.0)
        o_hidden = o_row[:, None] * stride_hidden + o_h[None, :]
        # Rows past the end must not meet the NaN of a row that is not theirs.
        b_hidden = tl.load(hidden_ptr + o_hidden, mask=m_k[:, None] & m_h[None, :], other=0.0)
        b_acc = tl.dot(tl.trans(b_dz), b_hidden, b_acc, input_precision=PRECISION)

    o_v = i_block * VOCAB_BLOCK + o_c
    o_out = o_v[:, None] * H + o_h[None, :]
    m_out = (o_v < V)[:, None] & m_h[None, :]
    tl.store(dweight_ptr + o_out, b_acc.to(dweight_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def certified_dbias_kernel(
    dz_ptr,  # [pairs, 128]
    block_order_ptr,  # [blocks] int64
    block_size_ptr,  # [NB] int64
    block_place_ptr,  # [NB] int64
    dbias_ptr,  # [V] out
    V,
    BLOCK_K: tl.constexpr,  # rows
):
    """dbias[v] = Σ_t dz[t, v]."""
    i_block = tl.load(block_order_ptr + tl.program_id(0))
    size = tl.load(block_size_ptr + i_block).to(tl.int32)
    place = tl.load(block_place_ptr + i_block)
    o_c = tl.arange(0, VOCAB_BLOCK)
    o_k = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros([VOCAB_BLOCK], dtype=tl.float32)
    for i_k in range(0, size, BLOCK_K):
        o_dz = (place + i_k + o_k)[:, None] * VOCAB_BLOCK + o_c[None, :]
        b_dz = tl.load(dz_ptr + o_dz, mask=(i_k + o_k < size)[:, None], other=0.0)
        b_acc += tl.sum(b_dz.to(tl.float32), axis=0)
    o_v = i_block * VOCAB_BLOCK + o_c
    tl.store(dbias_ptr + o_v, b_acc.to(dbias_ptr.dtype.element_ty), mask=o_v < V)


@triton.jit
def certified_product_kernel(
    dz_ptr,  # [pairs, 128]
    weight_ptr,  # [V, H]
    block_size_ptr,  # [NB] int64
    block_place_ptr,  # [NB] int64
    tile_end_ptr,  # [NB] int64
    tile_block_ptr,  # [tiles] int64
    product_ptr,  # [pairs, columns] out
    first_column,
    columns,
    NB,
    V,
    H,
    stride_weight,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pairs
    BLOCK_N: tl.constexpr,  # hidden size
    BLOCK_K: tl.constexpr,  # vocabulary
):
    """What each pair adds to its row of dhidden: dz @ weight[block], some columns of it."""
    num_n = tl.cdiv(columns, BLOCK_N)
    i_tile = tl.program_id(0) // num_n
    i_block = tl.load(tile_block_ptr + i_tile)
    if i_block >= NB:
        return
    o_pair, m_pair = tile_pairs(i_tile, i_block, tile_end_ptr, block_size_ptr, BLOCK_M)
    o_place = tl.load(block_place_ptr + i_block) + o_pair
    o_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = first_column + o_n
    o_k = tl.arange(0, BLOCK_K)

    b_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_k in range(0, VOCAB_BLOCK, BLOCK_K):
        o_dz = o_place[:, None] * VOCAB_BLOCK + (i_k + o_k)[None, :]
        b_dz = tl.load(dz_ptr + o_dz, mask=m_pair[:, None], other=0.0)
        o_v = i_block * VOCAB_BLOCK + i_k + o_k
        m_weight = (o_v < V)[:, None] & (o_h < H)[None, :]
        b_weight = tl.load(weight_ptr + o_v[:, None] * stride_weight + o_h[None, :], mask=m_weight, other=0.0)
        b_acc = tl.dot(b_dz, b_weight, b_acc, input_precision=PRECISION)

    m_out = m_pair[:, None] & (o_n < columns)[None, :]
    o_out = o_place[:, None] * columns + o_n[None, :]
    tl.store(product_ptr + o_out, b_acc.to(product_ptr.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["first_row", "first_place"])
def certified_dhidden_kernel(
    product_ptr,  # [pairs, columns]
    row_places_ptr,  # [pairs] int64: row after row, the places of its pairs, blocks ascending
    row_start_ptr,  # [n + 1] int64, in row_places
    hidden_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    dhidden_ptr,  # [M, H] out
    first_row,
    first_place,  # of first_row, in row_places
    first_column,
    columns,
    H,
    BLOCK_N: tl.constexpr,  # hidden size
    BLOCK_K: tl.constexpr,  # pairs
):
    """One row per program: the sum of what its pairs add."""
    i_row = first_row + tl.program_id(0)
    if i_row >= tl.load(count_ptr):
        return
    start = tl.load(row_start_ptr + i_row) - first_place
    size = (tl.load(row_start_ptr + i_row + 1) - first_place - start).to(tl.int32)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = first_column + o_n
    m_n = (o_n < columns) & (o_h < H)
    o_k = tl.arange(0, BLOCK_K)

    b_acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    for i_k in range(0, size, BLOCK_K):
        m_k = i_k + o_k < size
        o_place = tl.load(row_places_ptr + start + i_k + o_k, mask=m_k, other=0)
        p_product = product_ptr + o_place[:, None] * columns + o_n[None, :]
        b_product = tl.load(p_product, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc += tl.sum(b_product.to(tl.float32), axis=0)

    p_out = dhidden_ptr + tl.load(hidden_index_ptr + i_row) * H + o_h
    tl.store(p_out, b_acc.to(dhidden_ptr.dtype.element_ty), mask=m_n)
