"""Kernels of the certified backward of `linear_logps`: dz of the kept (row, vocabulary block) pairs, and its
two products.

dz is compact: pair after pair, 128 entries each, the pairs of a block together. Work is cut into tiles of
rows that need the same block. Names as in `csrc_triton.linear_logps`. Launched by
`focalkern.logps.triton_certified`.
"""

import triton
import triton.language as tl

from csrc_triton.linear_logps import VOCAB_BLOCK, logits_tile
from csrc_triton.scalar import fast_exp, logit_transform


@triton.jit
def tile_pairs(i_tile, i_block, group, tiles, BLOCK_M: tl.constexpr):
    """Which of its block's pairs a tile has; those that pass the block's number are none."""
    size = tl.load(group.size + i_block)
    tiles_left = tl.load(tiles.end + i_block) - i_tile
    first = (tl.cdiv(size, BLOCK_M) - tiles_left) * BLOCK_M
    o_pair = first + tl.arange(0, BLOCK_M)
    return o_pair, o_pair < size


@triton.jit
def linear_logps_certified_dz_kernel(
    head,
    targets_ptr,  # [n] int64
    saved,
    g_ptr,  # [n] dL/dlogps
    pair_row_ptr,  # [K] int64
    group,  # PairGroup
    tiles,  # PairTiles
    dz_ptr,  # [pairs, 128] out: gradient of hidden @ weightᵀ, in the inputs' dtype
    sizes,
    scales,
    tile,  # pairs × 128 over the hidden size
):
    i_tile = tl.program_id(0)
    i_block = tl.load(tiles.block + i_tile)
    o_pair, m_pair = tile_pairs(i_tile, i_block, group, tiles, tile.m)
    o_t = tl.load(pair_row_ptr + tl.load(group.start + i_block) + o_pair, mask=m_pair, other=0)
    o_c = tl.arange(0, VOCAB_BLOCK)
    o_v = i_block.to(tl.int32) * VOCAB_BLOCK + o_c
    b_x, _ = logits_tile(head, o_t, o_v, sizes, tile)
    b_z, b_slope = logit_transform(b_x, scales)

    # d logps / dz_v = 1[v = y] − p_v
    b_p = fast_exp(b_z - tl.load(saved.lse + o_t)[:, None])
    m_target = o_v[None, :] == tl.load(targets_ptr + o_t).to(tl.int32)[:, None]
    b_dlogp = tl.where(m_target, tl.load(saved.one_minus_p + o_t)[:, None], -b_p)
    b_dz = tl.load(g_ptr + o_t)[:, None] * b_dlogp * b_slope
    b_dz = tl.where((o_v < sizes.V)[None, :], b_dz, 0.0)
    o_dz = (tl.load(group.place + i_block) + o_pair)[:, None] * VOCAB_BLOCK + o_c[None, :]
    tl.store(dz_ptr + o_dz, b_dz.to(dz_ptr.dtype.element_ty), mask=m_pair[:, None])


@triton.jit
def linear_logps_certified_dweight_kernel(
    dz_ptr,  # [pairs, 128]
    hidden_ptr,  # [n, H]
    pair_row_ptr,  # [K] int64
    block_order_ptr,  # [blocks] int64: the blocks to write, those of most pairs first
    group,  # PairGroup
    dweight_ptr,  # [V, H] out
    sizes,  # of this product
    tile,  # 128 × hidden size over rows
):
    """dweight[v, h] = Σ_t dz[t, v]·hidden[t, h] over the rows that keep the block of v; zero without any."""
    num_n = tl.cdiv(sizes.H, tile.n)
    i_block = tl.load(block_order_ptr + tl.program_id(0) // num_n)
    size = tl.load(group.size + i_block).to(tl.int32)
    p_row = pair_row_ptr + tl.load(group.start + i_block)
    place = tl.load(group.place + i_block)
    o_c = tl.arange(0, VOCAB_BLOCK)
    o_h = tl.program_id(0) % num_n * tile.n + tl.arange(0, tile.n)
    m_h = o_h < sizes.H
    o_k = tl.arange(0, tile.k)

    b_acc = tl.zeros([VOCAB_BLOCK, tile.n], dtype=tl.float32)
    for i_k in range(0, size, tile.k):
        m_k = i_k + o_k < size
        o_t = tl.load(p_row + i_k + o_k, mask=m_k, other=0)
        # Transposed by its pointers: tl.trans would take it through registers instead of cp.async.
        o_dz = o_c[:, None] + (place + i_k + o_k)[None, :] * VOCAB_BLOCK
        b_dz_t = tl.load(dz_ptr + o_dz, mask=m_k[None, :], other=0.0)
        # Rows past the end must not meet the NaN of a row that is not theirs.
        o_hidden = o_t[:, None] * sizes.H + o_h[None, :]
        b_hidden = tl.load(hidden_ptr + o_hidden, mask=m_k[:, None] & m_h[None, :], other=0.0)
        b_acc = tl.dot(b_dz_t, b_hidden, b_acc, input_precision=tile.precision)

    o_v = i_block * VOCAB_BLOCK + o_c
    o_out = o_v[:, None] * sizes.H + o_h[None, :]
    m_out = (o_v < sizes.V)[:, None] & m_h[None, :]
    tl.store(dweight_ptr + o_out, b_acc.to(dweight_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def linear_logps_certified_dbias_kernel(
    dz_ptr,  # [pairs, 128]
    block_order_ptr,  # [blocks] int64
    group,  # PairGroup
    dbias_ptr,  # [V] out
    V,
    BLOCK_K: tl.constexpr,  # rows
):
    """dbias[v] = Σ_t dz[t, v]."""
    i_block = tl.load(block_order_ptr + tl.program_id(0))
    size = tl.load(group.size + i_block).to(tl.int32)
    place = tl.load(group.place + i_block)
    o_c = tl.arange(0, VOCAB_BLOCK)
    o_k = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros([VOCAB_BLOCK], dtype=tl.float32)
    for i_k in range(0, size, BLOCK_K):
        o_dz = (place + i_k + o_k)[:, None] * VOCAB_BLOCK + o_c[None, :]
        b_dz = tl.load(dz_ptr + o_dz, mask=(i_k + o_k < size)[:, None], other=0.0)
        b_acc += tl.sum(b_dz.to(tl.float32), axis=0)
    o_v = i_block * VOCAB_BLOCK + o_c
    tl.store(dbias_ptr + o_v, b_acc.to(dbias_ptr.dtype.element_ty), mask=o_v < V)


@triton.jit(do_not_specialize=["first_tile", "first_place"])
def linear_logps_certified_product_kernel(
    dz_ptr,  # [pairs, 128]
    weight_ptr,  # [V, H]
    group,  # PairGroup
    tiles,  # PairTiles
    product_ptr,  # [pairs of the part, columns] out
    first_tile,  # of the part
    first_place,  # of the part, in dz
    first_column,
    columns,
    sizes,  # of this product
    tile,  # pairs × hidden size over 128
    EVICTION: tl.constexpr,  # of product from L2
):
    """What each pair adds to its row of dhidden: dz @ weight[block], some columns of it."""
    num_n = tl.cdiv(columns, tile.n)
    i_tile = first_tile + tl.program_id(0) // num_n
    i_block = tl.load(tiles.block + i_tile)
    o_pair, m_pair = tile_pairs(i_tile, i_block, group, tiles, tile.m)
    place = tl.load(group.place + i_block)
    o_n = tl.program_id(0) % num_n * tile.n + tl.arange(0, tile.n)
    o_h = first_column + o_n
    m_h = o_h < sizes.H
    o_k = tl.arange(0, tile.k)
    p_dz = dz_ptr + place * VOCAB_BLOCK + o_pair[:, None] * VOCAB_BLOCK + o_k[None, :]
    p_weight = weight_ptr + i_block * VOCAB_BLOCK * sizes.H + o_k[:, None] * sizes.H + o_h[None, :]
    size_v = tl.minimum(sizes.V - i_block.to(tl.int32) * VOCAB_BLOCK, VOCAB_BLOCK)

    b_acc = tl.zeros([tile.m, tile.n], dtype=tl.float32)
    for i_k in range(0, size_v, tile.k):
        b_dz = tl.load(p_dz + i_k, mask=m_pair[:, None], other=0.0)
        m_weight = (i_k + o_k < size_v)[:, None] & m_h[None, :]
        b_weight = tl.load(p_weight, mask=m_weight, other=0.0)
        b_acc = tl.dot(b_dz, b_weight, b_acc, input_precision=tile.precision)
        p_weight += tile.k * sizes.H

    m_out = m_pair[:, None] & (o_n < columns)[None, :]
    p_out = product_ptr + (place - first_place) * columns + o_pair[:, None] * columns + o_n[None, :]
    tl.store(p_out, b_acc.to(product_ptr.dtype.element_ty), mask=m_out, eviction_policy=EVICTION)


@triton.jit(do_not_specialize=["first_place", "first_row", "i_part", "num_parts"])
def linear_logps_certified_dhidden_kernel(
    product_ptr,  # [pairs of the part, columns]
    row_places_ptr,  # [pairs] int64: row after row, the places of its pairs in dz, blocks ascending
    start_ptr,  # [rows] int32, in row_places: the part's pairs of a row
    end_ptr,  # [rows] int32
    sum_ptr,  # [rows, columns] fp32: of the parts before
    dhidden_ptr,  # [n, H] out, by the last part
    first_place,  # of the part, in dz
    first_row,
    first_column,
    columns,
    H,
    i_part,
    num_parts,
    BLOCK_N: tl.constexpr,  # hidden size
    BLOCK_K: tl.constexpr,  # pairs
    EVICTION: tl.constexpr,  # of product and sum from L2
):
    """One row per program: what its pairs add, on top of the sum of the parts before."""
    i_row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(start_ptr + i_row), tl.load(end_ptr + i_row)
    if (start == end) & (i_part > 0) & (i_part < num_parts - 1):
        return
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = first_column + o_n
    m_n = (o_n < columns) & (o_h < H)
    o_k = tl.arange(0, BLOCK_K)

    # Summed over BLOCK_K once, after the loop: in it, the sum would cost more than the loads.
    b_acc = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    for i_k in range(start, end, BLOCK_K):
        m_k = i_k + o_k < end
        o_place = tl.load(row_places_ptr + i_k + o_k, mask=m_k, other=0)
        p_product = product_ptr + (o_place - first_place)[:, None] * columns + o_n[None, :]
        m_product = m_k[:, None] & m_n[None, :]
        b_product = tl.load(p_product, mask=m_product, other=0.0, eviction_policy=EVICTION)
        b_acc += b_product.to(tl.float32)
    b_sum = tl.sum(b_acc, axis=0)

    p_sum = sum_ptr + i_row * columns + o_n
    if i_part > 0:
        b_sum += tl.load(p_sum, mask=m_n, other=0.0, eviction_policy=EVICTION)
    if i_part < num_parts - 1:
        tl.store(p_sum, b_sum, mask=m_n, eviction_policy=EVICTION)
    else:
        p_dhidden = dhidden_ptr + (first_row + i_row) * H + o_h
        tl.store(p_dhidden, b_sum.to(dhidden_ptr.dtype.element_ty), mask=m_n)
