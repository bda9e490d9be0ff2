"""How close is close enough: measured against float64, in units of what PyTorch itself achieves."""

from __future__ import annotations

import torch


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 error; absolute where the exact value is zero."""
    exact = exact.detach().double()
    difference = (actual.detach().double() - exact).norm().item()
    return difference / (exact.norm().item() or 1.0)


def assert_as_accurate(
    actual: torch.Tensor,  # of the library
    naive: torch.Tensor,  # of plain PyTorch in the same dtype
    exact: torch.Tensor,  # of plain PyTorch in float64
    name: str = "value",
    conditioning: float = 0.0,
) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype.

    To that come two units in the last place of the actual value's dtype: rounding the result alone costs one
    half, and a short sum may by luck come out exact in one order of summation and not in another. Likewise
    for `conditioning`: by how many units in the last place of fp32, or of float64 for a float64 value, the
    value moves when the intermediate values of any implementation are rounded.
    """
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error, naive_error = relative_error(actual, exact), relative_error(naive, exact)
    allowed = 2 * naive_error + 2 * torch.finfo(actual.dtype).eps
    wide = torch.float64 if actual.dtype == torch.float64 else torch.float32
    allowed += 2 * conditioning * torch.finfo(wide).eps
    assert error <= allowed, f"{name}: error {error:.2e}, plain PyTorch has {naive_error:.2e}"
