"""The certified backward in plain PyTorch: per vocabulary block, the rows that need it.

Where bf16 products are fast, they compute the pairs but for large entries, which take fp32 one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.distributed import AsyncReduction
from focalkern.logps.torch_coarse_backward import CoarseDz
from focalkern.logps.torch_pairs import Group, PairLogits, Part, extended
from focalkern.logps.torch_threads import sums_in_two_threads
from focalkern.products import HeadGradients
from focalkern.records import Forward, Gradients, KeptPairs, Needs, RowGradients
from focalkern.torch_logits import (
    HAS_BF16_PRODUCTS,
    compute_dtype,
    matmul,
    times_slope,
    transform_logits,
)

# Where this much may be left out, how oneDNN adds up a logit (see `Product`) does not show.
_ROUNDING_TAU = 2.0**-20

DzOfGroup = Callable[[Group], Sequence[torch.Tensor]]  # of each part


def certified_backward(
    forward: Forward,
    g: torch.Tensor,  # [n] dL/dlogps
    pairs: KeptPairs,
    tau: float,
    needs: Needs,
    reduction: AsyncReduction | None,
    workspace_bytes: int,
) -> Gradients:
    """dz of the kept pairs, group by group, and its products; rows of dweight that no pair needs are zero."""
    head, targets, _, _ = forward
    coarse = CoarseDz.of(forward, RowGradients(g))
    sums_in_blocks = head.hidden.dtype == torch.float32 and tau < _ROUNDING_TAU
    logits = PairLogits(head, targets, pairs, workspace_bytes, sums_in_blocks)
    # dweight by products in the dtype of the inputs.
    is_native = coarse is not None or _has_native_product(head.hidden)
    gradients = HeadGradients(head.with_hidden(logits.hidden), needs, reduction, compute_dtype(head.hidden))

    def add(parts: list[Part], dhidden: list[torch.Tensor | None]) -> None:
        own = coarse and coarse.with_own_large()
        dz_of = own.of_group if own else _exact_dz(forward, g, logits)
        sums_of_weight = [_BlockSum(gradient) for gradient in gradients.dweight]
        sum_of_bias = _BlockSum(gradients.dbias)
        for group in logits.groups(parts):
            dz = dz_of(group)
            _add_dhidden(dhidden, group, dz)
            if any(needs.of_weight):
                _add_dweight(sums_of_weight, group if is_native else group.wide, dz)
            sum_of_bias.add(group.parts, (part.sum(0) for part in dz))
        if own:
            own.add_large(dhidden, gradients.dweight)

    sums_in_two_threads(add, logits.halves(), gradients.dhidden, head.hidden.device)
    gradients.dhidden = [None if x is None else x[: len(g)] for x in gradients.dhidden]
    written = {part.block.start for part in logits.parts}
    for start in range(0, head.vocab_size, VOCAB_BLOCK):
        for gradient in (*gradients.dweight, gradients.dbias):
            if gradient is not None and start not in written:
                gradient[start : start + VOCAB_BLOCK] = 0.0
    gradients.start_reduction()
    return gradients.result()


def _exact_dz(forward: Forward, g: torch.Tensor, logits: PairLogits) -> DzOfGroup:
    """Gradient of hidden @ weightᵀ for the pairs of a group, [k, 128]."""
    saved = forward.saved
    # The padding row has no gradient, and p = 0, whatever the bias.
    lse, minus_g = extended(saved.lse, torch.inf)[:, None], -extended(g, 0.0)[:, None]
    target_dz = extended(g * saved.one_minus_p, 0.0)

    def of_group(group: Group) -> Sequence[torch.Tensor]:
        z, slope = transform_logits(logits.logits(group), forward.transform)
        # d logps / dz_v = 1[v = y] − p_v
        dz = z.sub_(lse[group.row]).exp_().mul_(minus_g[group.row])
        label_row, column = logits.labels(group)
        dz[label_row, column] = target_dz[group.row[label_row]]
        return group.split(times_slope(dz, slope))

    return of_group


def _add_dhidden(totals: list[torch.Tensor | None], group: Group, dz: Sequence[torch.Tensor]) -> None:
    weights_of = (group if dz[0].dtype == group.hidden[0].dtype else group.wide).weights()
    for total, weights in zip(totals, weights_of, strict=True):
        if total is None:
            continue
        for row, dz_part, weight in zip(group.split(group.row), dz, weights, strict=True):
            total.index_add_(0, row, _product(dz_part, weight.t()).to(total.dtype))


def _add_dweight(sums: list[_BlockSum], group: Group, dz: Sequence[torch.Tensor]) -> None:
    dz = [part.to(group.hidden[0].dtype) for part in dz]
    for block_sum, hidden in zip(sums, group.hidden, strict=True):
        operands = zip(dz, group.split(hidden), strict=True)
        block_sum.add(group.parts, (_product_over_rows(part, h) for part, h in operands))


class _BlockSum:
    """Sums over the parts of each block, written to a gradient with the last; nothing where there is none."""

    def __init__(self, gradient: torch.Tensor | None) -> None:
        self.gradient = gradient
        self.total = torch.zeros(())

    def add(self, parts: list[Part], values: Iterable[torch.Tensor]) -> None:
        if self.gradient is None:
            return
        dtype = compute_dtype(self.gradient)
        for part, value in zip(parts, values, strict=True):
            self.total = value if part.is_first else self.total.to(dtype) + value
            if part.is_last:
                self.gradient[part.block] = self.total


def _has_native_product(x: torch.Tensor) -> bool:
    """Whether products of this 16-bit dtype are faster than fp32's and add up in fp32."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return x.is_cuda or (x.device.type == "cpu" and x.dtype == torch.bfloat16 and HAS_BF16_PRODUCTS)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ bᵀ in the dtype of both."""
    return matmul(a, b) if a.dtype in (torch.float32, torch.float64) else torch.mm(a, b.t())


def _product_over_rows(dz: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """dzᵀ @ hidden."""
    # oneDNN takes the transpose of a bf16 matrix in twice the time: 128 × 128 × 4096, 1 core of an Intel Xeon
    # with AMX, torch 2.13, 2026-11.
    transposed = dz.t().contiguous() if dz.dtype == torch.bfloat16 and not dz.is_cuda else dz.t()
    return _product(transposed, hidden.t())
