"""The trial of a head or a model: whether its own logits agree with the fused head's, up to rounding.

`lm_head` tries a head by it, and `trl.head` a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from focalkern.torch_logits import fp32_products

# In units of eps: the largest error by the largest logit, the root mean squares, and the slope. Causal
# language models of transformers 5.23, built small, come to 0.7, 0.4 and 0.03 in fp32 and bf16 on a CPU,
# nearly all of them to 0 (2026-11). A scale that is off by 1 % has a slope of 1.3 in bf16.
_LARGEST, _RMS, _SLOPE = 4.0, 1.0, 0.3
# Of a whole model, whose layers round one after the other: in units of eps, or of another shape's error.
_LAYERS = 4.0
# Sums of fp32 products, in another order, by how torch multiplies.
_OF_FP32 = {"ieee": 2.0**-17, "tf32": 2.0**-10, "bf16": 2.0**-7}


def agree(
    found: torch.Tensor,  # [n, V]
    expected: torch.Tensor,  # [n, V]
    dtypes: set[torch.dtype],  # of what both were computed from, and rounded to
) -> bool:
    """Whether logits are the expected ones, up to rounding.

    Rounding moves each logit by itself, up or down. Another scale or softcap moves them with their size:
    it shows in the slope of the error over thousands of logits, long before it shows in one of them.
    """
    if found.shape != expected.shape:
        return False
    found, expected = found.double(), expected.double()
    broken = (found.isnan() & expected.isnan()).any(-1)  # weights, or hidden states, with NaN
    found, expected = found[~broken], expected[~broken]
    if not found.numel():
        return True
    eps, error = max(_eps(dtype, found.device.type) for dtype in dtypes), found - expected
    rms, scatter = (x.square().mean(-1).sqrt() for x in (expected, error))
    largest = error.abs().amax(-1) <= _LARGEST * eps * expected.abs().amax(-1)
    total = expected.square().sum()
    slope = ((error * expected).sum() / total).abs() if total else total
    deviation = (error * expected).square().sum().sqrt() / total if total else total
    fits = largest & (scatter <= _RMS * eps * rms)
    return bool(fits.all()) and bool(slope <= _SLOPE * eps + 4 * deviation)


def same_to_rounding(
    found: torch.Tensor, expected: torch.Tensor, again: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Whether logits are the expected ones up to the rounding of all layers of a model.

    `again` are the expected ones of another shape of batch, which rounds in another way.
    """
    found, expected, again = (x.double() for x in (found, expected, again))
    norm = torch.linalg.vector_norm
    rounding = torch.maximum(norm(again - expected), _eps(dtype, found.device.type) * norm(expected))
    return bool(norm(found - expected) <= _LAYERS * rounding)


def _eps(dtype: torch.dtype, device_type: str) -> float:
    if dtype == torch.float32:
        return _OF_FP32[fp32_products(device_type)]
    return 2.0**-40 if dtype == torch.float64 else torch.finfo(dtype).eps


def spread(index: torch.Tensor, count: int = 8) -> torch.Tensor:
    """At most so many of an index's entries, evenly spread."""
    return index[:: max(1, -(-len(index) // count))]


def picked(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:  # [..., H] -> [1, n, H]
    """Rows of x by their place among all of them."""
    return x.flatten(0, -2)[index.to(x.device)][None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and then every module in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
