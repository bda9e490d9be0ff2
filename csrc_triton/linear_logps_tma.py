"""The kernels of `linear_logps` in the form for Hopper: tiles come by TMA, and a program makes many of them.

TMA reads whole tiles of consecutive rows, so the rows that take part lie together (`gather_rows_kernel`), and
the vocabulary is a multiple of its block. A descriptor costs each program about as much as a step of a
product, hence one program per multiprocessor, which makes them once. What each tile computes is shared with
`linear_logps`. Launched by `focalkern.backends.triton_tma`.
"""

import triton
import triton.language as tl

from csrc_triton.linear_logps import (
    split_range,
    store_block_statistics,
    store_dz,
    store_sum,
    sum_so_far,
    tile_order,
    with_bias,
)


@triton.jit
def gather_rows_kernel(
    hidden_ptr,  # [M, H]
    hidden_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    rows_ptr,  # [n, H] out: row after row, 0 past the count
    H,
    stride_hidden,
    BLOCK_H: tl.constexpr,
):
    """The rows that take part, one behind the other, as TMA needs them."""
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    p_hidden = hidden_ptr + tl.load(hidden_index_ptr + i_row) * stride_hidden + o_h
    m_row = (o_h < H) & (i_row < tl.load(count_ptr))
    tl.store(rows_ptr + i_row * H + o_h, tl.load(p_hidden, mask=m_row, other=0.0), mask=o_h < H)


@triton.jit
def tile_descriptors(
    rows_ptr,
    weight_ptr,
    n,
    V,
    H,
    stride_weight,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.make_tensor_descriptor(rows_ptr, [n, H], [H, 1], [BLOCK_M, BLOCK_K])
    weight = tl.make_tensor_descriptor(weight_ptr, [V, H], [stride_weight, 1], [BLOCK_V, BLOCK_K])
    return rows, weight


@triton.jit
def logits_tile_tma(
    rows,  # descriptor of [n, H]
    weight,  # descriptor of [V, H]
    bias_ptr,
    first_row,
    first_v,
    V,
    H,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `logits_tile`, of consecutive rows; what lies past n, V or H is read as 0."""
    b_acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for i_k in range(0, H, BLOCK_K):
        b_rows = rows.load([first_row, i_k])
        b_weight = weight.load([first_v, i_k])
        b_acc = tl.dot(b_rows, tl.trans(b_weight), b_acc, input_precision=PRECISION)
    return with_bias(b_acc, bias_ptr, tl.minimum(first_v + tl.arange(0, BLOCK_V), V - 1), HAS_BIAS)


@triton.jit
def linear_logps_fwd_tma_kernel(
    rows_ptr,  # [n, H], the rows of hidden
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    targets_ptr,  # [n] int64
    count_ptr,  # [1] int32
    target_z_ptr,  # [n] out
    block_lse_ptr,  # [n, NB] out
    n,
    V,
    H,
    NB,
    stride_weight,
    in_scale,
    out_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As `linear_logps_fwd_kernel`, for Hopper: tiles come by TMA, and each program works through many."""
    rows, weight = tile_descriptors(rows_ptr, weight_ptr, n, V, H, stride_weight, BLOCK_M, BLOCK_V, BLOCK_K)
    count = tl.load(count_ptr)
    num_m = tl.cdiv(count, BLOCK_M)
    num_v = tl.cdiv(V, BLOCK_V)
    tiles = num_m * num_v
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        i_m, i_v = tile_order(i_tile, num_m, num_v, GROUP_M)
        b_x, b_poison = logits_tile_tma(
            rows,
            weight,
            bias_ptr,
            i_m * BLOCK_M,
            i_v * BLOCK_V,
            V,
            H,
            HAS_BIAS,
            PRECISION,
            BLOCK_M,
            BLOCK_V,
            BLOCK_K,
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
            None,  # statistics
            0,
            V,
            NB,
            in_scale,
            out_scale,
            HAS_SOFTCAP,
            False,  # HAS_STATS
            True,  # EVEN_V
            not WARP_SPECIALIZE,  # BRANCH: Triton does not specialise the warps of a loop with a branch
            BLOCK_M,
            BLOCK_V,
        )


@triton.jit
def linear_logps_bwd_dz_tma_kernel(
    rows_ptr,  # [n, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    output_index_ptr,  # [n] int64
    targets_ptr,  # [n] int64
    count_ptr,  # [1] int32
    lse_ptr,  # [n]
    one_minus_p_ptr,  # [n]
    grad_logps_ptr,  # [outputs]
    dz_ptr,  # [n, C] out; rows past the count are 0 up to the next multiple of BLOCK_M
    chunk_start,
    chunk_size,
    C,
    n,
    V,
    H,
    stride_weight,
    in_scale,
    out_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As `linear_logps_bwd_dz_kernel` without a gradient through the entropy; see the forward's."""
    rows, weight = tile_descriptors(rows_ptr, weight_ptr, n, V, H, stride_weight, BLOCK_M, BLOCK_V, BLOCK_K)
    count = tl.load(count_ptr)
    num_m = tl.cdiv(count, BLOCK_M)
    num_v = tl.cdiv(chunk_size, BLOCK_V)
    tiles = num_m * num_v
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        i_m, i_v = tile_order(i_tile, num_m, num_v, GROUP_M)
        b_x, _ = logits_tile_tma(
            rows,
            weight,
            bias_ptr,
            i_m * BLOCK_M,
            chunk_start + i_v * BLOCK_V,
            V,
            H,
            HAS_BIAS,
            PRECISION,
            BLOCK_M,
            BLOCK_V,
            BLOCK_K,
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
            None,
            grad_logps_ptr,
            None,
            dz_ptr,
            n,
            chunk_start,
            chunk_size,
            C,
            in_scale,
            out_scale,
            HAS_SOFTCAP,
            False,  # HAS_ENTROPY_GRAD
            BLOCK_M,
            BLOCK_V,
        )


@triton.jit
def linear_logps_bwd_dweight_tma_kernel(
    dz_ptr,  # [n, C]; rows past the count are 0 up to the next multiple of BLOCK_K
    rows_ptr,  # [n, H]
    count_ptr,  # [1] int32
    dweight_ptr,  # [V, H] out
    chunk_start,
    chunk_size,
    C,
    n,
    H,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # vocabulary
    BLOCK_N: tl.constexpr,  # hidden size
    BLOCK_K: tl.constexpr,  # rows
    GROUP_M: tl.constexpr,
):
    """As `linear_logps_bwd_dweight_kernel`."""
    dz = tl.make_tensor_descriptor(dz_ptr, [n, C], [C, 1], [BLOCK_K, BLOCK_M])
    rows = tl.make_tensor_descriptor(rows_ptr, [n, H], [H, 1], [BLOCK_K, BLOCK_N])
    count = tl.load(count_ptr)
    num_m = tl.cdiv(chunk_size, BLOCK_M)
    num_n = tl.cdiv(H, BLOCK_N)
    for i_tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        i_m, i_n = tile_order(i_tile, num_m, num_n, GROUP_M)
        b_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for i_k in range(0, count, BLOCK_K):
            b_dz = dz.load([i_k, i_m * BLOCK_M])
            b_rows = rows.load([i_k, i_n * BLOCK_N])
            b_acc = tl.dot(tl.trans(b_dz), b_rows, b_acc, input_precision=PRECISION)

        o_c = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_h = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        o_out = (chunk_start + o_c)[:, None].to(tl.int64) * H + o_h[None, :]
        m_out = (o_c < chunk_size)[:, None] & (o_h < H)[None, :]
        tl.store(dweight_ptr + o_out, b_acc.to(dweight_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def linear_logps_bwd_dhidden_tma_kernel(
    dz_ptr,  # [n, C]
    weight_ptr,  # [V, H]
    hidden_index_ptr,  # [n] int64
    count_ptr,  # [1] int32
    partial_ptr,  # [splits, n, H] fp32
    dhidden_ptr,  # [M, H] out, or None
    chunk_start,
    chunk_size,
    C,
    n,
    V,
    H,
    stride_weight,
    splits,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows
    BLOCK_N: tl.constexpr,  # hidden size
    BLOCK_K: tl.constexpr,  # vocabulary, divides the vocabulary block
    GROUP_M: tl.constexpr,
):
    """As `linear_logps_bwd_dhidden_kernel`."""
    dz = tl.make_tensor_descriptor(dz_ptr, [n, C], [C, 1], [BLOCK_M, BLOCK_K])
    weight = tl.make_tensor_descriptor(weight_ptr, [V, H], [stride_weight, 1], [BLOCK_K, BLOCK_N])
    count = tl.load(count_ptr)
    num_m = tl.cdiv(count, BLOCK_M)
    num_n = tl.cdiv(H, BLOCK_N)
    for i_tile in range(tl.program_id(0), num_m * num_n * splits, tl.num_programs(0)):
        i_split = i_tile // (num_m * num_n)
        i_m, i_n = tile_order(i_tile % (num_m * num_n), num_m, num_n, GROUP_M)
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_h = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        first_k, end_k = split_range(chunk_size, i_split, splits, BLOCK_K)
        b_acc = sum_so_far(partial_ptr, o_m, o_h, i_split, count, chunk_start, n, H)
        for i_k in range(first_k, end_k, BLOCK_K):
            b_dz = dz.load([i_m * BLOCK_M, i_k])
            b_weight = weight.load([chunk_start + i_k, i_n * BLOCK_N])
            b_acc = tl.dot(b_dz, b_weight, b_acc, input_precision=PRECISION)

        store_sum(
            b_acc,
            o_m,
            o_h,
            i_split,
            splits,
            hidden_index_ptr,
            count,
            partial_ptr,
            dhidden_ptr,
            chunk_start + chunk_size == V,
            n,
            H,
        )
