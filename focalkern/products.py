"""The gradients of a head while they are computed, and the two products that an exact backward makes of dz.

The vendor's library makes the products, on CPUs and GPUs alike. Used by both forms of `logps` and of `kl`.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from focalkern.distributed import AsyncReduction
from focalkern.records import Gradients, Head, Needs
from focalkern.torch_logits import compute_dtype, matmul

_NARROW = 128


class HeadGradients:
    """Gradients of a head while they are computed: those that are needed, None in place of the others."""

    def __init__(
        self,
        head: Head,
        needs: Needs,
        reduction: AsyncReduction | None = None,  # of dhidden, over the shards of the vocabulary
        dhidden_dtype: torch.dtype | None = None,  # that dhidden is summed up in, of hidden if None
    ) -> None:
        self.dtype, self.reduction = head.hidden.dtype, reduction
        self.dhidden = [
            torch.zeros_like(hidden, dtype=dhidden_dtype) if needed else None
            for (hidden, _), needed in zip(head.products, needs.of_hidden, strict=False)
        ]
        self.dweight = [
            torch.empty_like(weight) if needed else None
            for (_, weight), needed in zip(head.products, needs.of_weight, strict=False)
        ]
        self.dbias = torch.empty_like(head.bias) if head.bias is not None and needs.bias else None

    def start_reduction(self) -> None:
        """dhidden is complete: the other shards' is added while dweight is computed."""
        if self.reduction is not None:
            self.reduction.start(*(x for x in self.dhidden if x is not None))

    def result(self) -> Gradients:
        if self.reduction is not None:
            self.reduction.wait()
        dhidden = [None if x is None else x.to(self.dtype) for x in self.dhidden]
        return Gradients.of_products(dhidden, self.dweight, self.dbias)


class ExactGradients(HeadGradients):
    """Complete once every chunk of dz has been added."""

    def __init__(
        self,
        head: Head,
        hidden: list[torch.Tensor],  # of each product, [n, K], in the dtype of dz
        needs: Needs,
        reduction: AsyncReduction | None = None,
    ) -> None:
        super().__init__(head, needs, reduction, compute_dtype(head.hidden))
        self.hidden, self.vocab_size = hidden, head.vocab_size

    def add(self, dz: torch.Tensor, weights: list[torch.Tensor], start: int) -> None:
        """Take in dz = dL/d(hidden @ weightᵀ) of the chunk whose weights these are, in the dtype of dz."""
        end = start + dz.shape[1]
        for dhidden, weight in zip(self.dhidden, weights, strict=True):
            if dhidden is not None:
                add_product(dhidden, dz, weight)
        if end == self.vocab_size:
            self.start_reduction()
        for dweight, hidden in zip(self.dweight, self.hidden, strict=True):
            if dweight is not None:
                product_over_rows(dz, hidden, out=dweight[start:end])
        if self.dbias is not None:
            self.dbias[start:end] = dz.sum(0, dtype=compute_dtype(dz))


def add_product(
    total: torch.Tensor,  # [n, K] fp32 (fp64 for fp64 inputs)
    dz: torch.Tensor,  # [n, c]
    weight: torch.Tensor,  # [c, K]
) -> None:
    """total += dz @ weight."""
    if not dz.is_cuda:
        total += matmul(dz.to(total.dtype), weight.to(total.dtype).t())
    elif dz.dtype == total.dtype:
        total.addmm_(dz, weight)
    elif _adds_to_fp32(dz.device, dz.dtype):
        torch.addmm(total, dz, weight, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(dz, weight, out_dtype=torch.float32)


def product_over_rows(
    dz: torch.Tensor,  # [n, c]
    hidden: torch.Tensor,  # [n, K]
    out: torch.Tensor,  # [c, K]
) -> None:
    """out = dzᵀ @ hidden."""
    if dz.is_cuda:
        if dz.dtype != out.dtype:
            out.copy_(dz.t() @ hidden)
        elif dz.dtype != torch.float32 and hidden.shape[1] <= _NARROW:
            # So few columns share the sum over the rows among programs, whose parts cuBLAS may add up in the
            # dtype of the result.
            out.copy_(torch.mm(dz.t(), hidden, out_dtype=torch.float32))
        else:
            torch.mm(dz.t(), hidden, out=out)
        return
    dtype = compute_dtype(dz)
    dz, hidden = dz.to(dtype), hidden.to(dtype)
    # oneDNN, 2048 × 2048 × 16: 3.3 ms, and 1.1 ms the other way round (1 core of an AMD EPYC, torch 2.13,
    # 2026-11). That takes a copy of hidden, which is small where hidden is narrow.
    if hidden.shape[1] <= _NARROW:
        out.copy_(matmul(hidden.t().contiguous(), dz.t()).t())
    else:
        out.copy_(matmul(dz.t(), hidden.t()))


@lru_cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm adds a 16-bit product to fp32: not in every release with `out_dtype`."""
    total, ones = torch.zeros((16, 16), device=device), torch.ones((16, 16), dtype=dtype, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 16).all())
