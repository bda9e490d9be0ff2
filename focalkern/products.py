"""From dz, the gradient of the logits, to the gradients of a head: the two products of an exact backward.

The vendor's library makes them, on CPUs and GPUs alike. Used by both forms of `logps` and of `kl`, which form
dz for one vocabulary chunk after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from focalkern.distributed import AsyncReduction
from focalkern.records import Gradients, Head, Needs
from focalkern.torch_logits import compute_dtype, matmul

_NARROW = 128


class ExactGradients:
    """Gradients of a head, those that are needed; complete once every chunk of dz has been added."""

    def __init__(
        self,
        head: Head,
        hidden: list[torch.Tensor],  # of each product, [n, K], in the dtype of dz
        needs: Needs,
        reduction: AsyncReduction | None = None,  # of dhidden, over the shards of the vocabulary
    ) -> None:
        self.head, self.hidden, self.reduction = head, hidden, reduction
        self.dhidden = zero_sums([h for h, _ in head.products], needs.of_hidden)
        self.dweight = empty_gradients([weight for _, weight in head.products], needs.of_weight)
        (self.dbias,) = empty_gradients([head.bias], [needs.bias])

    def add(self, dz: torch.Tensor, weights: list[torch.Tensor], start: int) -> None:
        """Take in dz = dL/d(hidden @ weightᵀ) of the chunk whose weights these are, in the dtype of dz."""
        end = start + dz.shape[1]
        for dhidden, weight in zip(self.dhidden, weights, strict=True):
            if dhidden is not None:
                add_product(dhidden, dz, weight)
        if self.reduction is not None and end == self.head.vocab_size:
            # Under way while the last chunk's dweight is computed.
            self.reduction.start(*(x for x in self.dhidden if x is not None))
        for dweight, hidden in zip(self.dweight, self.hidden, strict=True):
            if dweight is not None:
                product_over_rows(dz, hidden, out=dweight[start:end])
        if self.dbias is not None:
            self.dbias[start:end] = dz.sum(0, dtype=compute_dtype(dz))

    def result(self) -> Gradients:
        if self.reduction is not None:
            self.reduction.wait()
        return Gradients.of_products(in_dtype(self.dhidden, self.head), self.dweight, self.dbias)


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


def zero_sums(hidden: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """What dhidden of each product is summed up in, where it is needed."""
    return [
        torch.zeros(h.shape, dtype=compute_dtype(h), device=h.device) if needed else None
        for h, needed in zip(hidden, needs, strict=False)
    ]


def in_dtype(dhidden: Sequence[torch.Tensor | None], head: Head) -> list[torch.Tensor | None]:
    """The sums in the dtype of the hidden states."""
    return [None if x is None else x.to(head.hidden.dtype) for x in dhidden]


def empty_gradients(
    tensors: Sequence[torch.Tensor | None], needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    return [
        torch.empty_like(x) if needed and x is not None else None
        for x, needed in zip(tensors, needs, strict=False)
    ]
