"""What autocast does to the tensors of a head, as to those of a linear layer."""

from __future__ import annotations

import torch

from focalkern import checks


def autocast_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As autocast does for a linear layer: all three in its dtype, float64 left alone."""
    checks.check_first_tensor("hidden", hidden)
    return autocast_tensors(hidden.device, hidden, weight, bias)


def autocast_tensors(device: torch.device, *tensors):
    """The tensors, narrow floating-point ones in the dtype that autocast has on the device, if it is on."""
    if not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)

    def cast(x):
        is_narrow = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if is_narrow else x

    return tuple(cast(x) for x in tensors)
