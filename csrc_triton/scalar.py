"""Scalar functions that the kernels share, accurate where the hardware's approximations are not."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def fast_exp(x):
    """e^x for the entries of a tile: a product and a hardware instruction. What is denormal becomes 0.

    tl.exp is the same product and instruction, and four more for the denormals.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def atanh_series(s2):
    """(atanh(s)/s − 1)/s² for s² = s2 <= 1/9 to fp32 rounding: 1/3 + s²/5 + s⁴/7 + …"""
    series = 1.0 / 15.0
    series = series * s2 + 1.0 / 13.0
    series = series * s2 + 1.0 / 11.0
    series = series * s2 + 1.0 / 9.0
    series = series * s2 + 1.0 / 7.0
    series = series * s2 + 1.0 / 5.0
    return series * s2 + 1.0 / 3.0


@triton.jit
def log1p_unit(x):
    """log(1 + x) = 2·atanh(s), s = x/(2 + x), for 0 <= x <= 1 to fp32 rounding.

    The hardware logarithm is accurate to an absolute 1e-7 near 1, which is nothing of log(1 + 1e-8).
    """
    s = x / (2.0 + x)
    s2 = s * s
    return 2.0 * s * (atanh_series(s2) * s2 + 1.0)


@triton.jit
def softplus(x):
    """log(1 + e^x), with full relative accuracy for very negative x."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def logaddexp(a, b):
    """log(e^a + e^b); -inf stands for an empty sum."""
    high = tl.maximum(a, b)
    gap = tl.where(a == b, 0.0, -tl.abs(a - b))
    return high + log1p_unit(tl.exp(gap))


@triton.jit
def logit_transform(b_x, scales):
    """z = T(x) and dz/dx: x·inner, or outer·tanh(x·inner) with a softcap. None is a scale of 1."""
    b_y = b_x
    b_slope = 1.0
    if scales.inner is not None:
        b_y = b_x * scales.inner
        b_slope = scales.inner
    b_z = b_y
    if scales.outer is not None:
        # 1 − tanh² = 4e/(1 + e)² with e = exp(−2|y|): no cancellation where the cap saturates.
        b_e = fast_exp(-2.0 * tl.abs(b_y))
        b_t = (1.0 - b_e) / (1.0 + b_e)
        b_z = scales.outer * tl.where(b_y < 0.0, -b_t, b_t)
        b_slope = b_slope * scales.outer * 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))
    return b_z, b_slope
