"""The certified backward in plain PyTorch: per vocabulary block, the rows that need it.

Where bf16 products are fast, they compute the pairs with little mass, and only the others take fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.distributed import AsyncReduction
from focalkern.logps.torch_coarse_backward import CoarseDz
from focalkern.logps.torch_pairs import Group, PairLogits, Part, extended, vocab_range
from focalkern.products import HeadGradients
from focalkern.records import Forward, Gradients, Head, KeptPairs, Needs, RowGradients
from focalkern.torch_logits import (
    HAS_BF16_PRODUCTS,
    compute_dtype,
    matmul,
    times_slope,
    transform_logits,
)

# Where this much may be left out, how oneDNN adds up a logit (see `Product`) does not show.
_ROUNDING_TAU = 2.0**-20

DzOfGroup = Callable[[Group], torch.Tensor]


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
    gradients = PairGradients(head, needs, reduction)
    coarse = CoarseDz.of(forward, RowGradients(g))
    if coarse is not None:
        logits = PairLogits(head, targets, pairs, workspace_bytes)
        gradients.add(logits, coarse.of_group, is_native=True)
        return gradients.result(coarse.add_large)

    sums_in_blocks = head.hidden.dtype == torch.float32 and tau < _ROUNDING_TAU
    logits = PairLogits(head, targets, pairs, workspace_bytes, sums_in_blocks)
    gradients.add(logits, _exact_dz(forward, g, logits), _has_native_product(head.hidden))
    return gradients.result()


def _exact_dz(forward: Forward, g: torch.Tensor, logits: PairLogits) -> DzOfGroup:
    """Gradient of hidden @ weightᵀ for the pairs of a group, [k, 128]."""
    saved = forward.saved
    # The padding row has no gradient, and p = 0, whatever the bias.
    lse, minus_g = extended(saved.lse, torch.inf)[:, None], -extended(g, 0.0)[:, None]
    target_dz = extended(g * saved.one_minus_p, 0.0)

    def of_group(group: Group) -> torch.Tensor:
        z, slope = transform_logits(logits.logits(group), forward.transform)
        # d logps / dz_v = 1[v = y] − p_v
        dz = z.sub_(lse[group.row]).exp_().mul_(minus_g[group.row])
        label_row, column = logits.labels(group)
        dz[label_row, column] = target_dz[group.row[label_row]]
        return times_slope(dz, slope)

    return of_group


class PairGradients:
    """Gradients of a head, from pairs group by group."""

    def __init__(self, head: Head, needs: Needs, reduction: AsyncReduction | None) -> None:
        self.n, self.vocab_size = len(head.hidden), head.vocab_size
        padded = [extended(hidden, 0.0) for hidden, _ in head.products]
        head = head._replace(**dict(zip(("hidden", "update_hidden"), padded, strict=False)))
        self.gradients = HeadGradients(head, needs, reduction, compute_dtype(head.hidden))
        # Each half of the pairs adds its blocks up by itself.
        other = [None if x is None else torch.zeros_like(x) for x in self.gradients.dhidden]
        self.dhidden = [self.gradients.dhidden, other]
        self.is_written = torch.zeros(-(-head.vocab_size // VOCAB_BLOCK), dtype=torch.bool)  # of dweight

    @property
    def of_weights(self) -> list[torch.Tensor | None]:
        return [*self.gradients.dweight, self.gradients.dbias]

    def add(self, logits: PairLogits, dz_of: DzOfGroup, is_native: bool) -> None:
        """Add what these pairs give; `is_native`: dweight by products in the dtype of the inputs."""

        def of_half(half: int) -> Callable[[Group], None]:
            sums = [_BlockSum(gradient) for gradient in self.of_weights]

            def add_group(group: Group) -> None:
                dz = dz_of(group)
                self.add_dhidden(self.dhidden[half], group, dz)
                hidden = (group if is_native else group.wide).hidden
                dz_parts = group.split(dz.to(hidden[0].dtype))
                for block_sum, h in zip(sums, hidden, strict=False):
                    if block_sum.gradient is not None:
                        operands = zip(dz_parts, group.split(h), strict=True)
                        block_sum.add(group.parts, (_product(dz.t(), h.t()) for dz, h in operands))
                if sums[-1].gradient is not None:
                    sums[-1].add(group.parts, (dz.sum(0) for dz in group.split(dz)))

            return add_group

        logits.for_each_group(of_half)
        self.is_written[[part.block.start // VOCAB_BLOCK for part in logits.parts]] = True

    def add_dhidden(self, dhidden: list[torch.Tensor | None], group: Group, dz: torch.Tensor) -> None:
        weights_of = (group if dz.dtype == group.hidden[0].dtype else group.wide).weights()
        for total, weights in zip(dhidden, weights_of, strict=True):
            if total is None:
                continue
            for row, dz_part, weight in zip(*map(group.split, (group.row, dz)), weights, strict=True):
                total.index_add_(0, row, _product(dz_part, weight.t()).to(total.dtype))

    def result(self, add_rest: Callable[[HeadGradients], None] = lambda _: None) -> Gradients:
        self.gradients.dhidden = [
            None if one is None or other is None else one.add_(other)[: self.n]
            for one, other in zip(*self.dhidden, strict=True)
        ]
        for i_block in (~self.is_written).nonzero().flatten().tolist():
            for gradient in self.of_weights:
                if gradient is not None:
                    gradient[vocab_range(i_block, self.vocab_size)] = 0.0
        add_rest(self.gradients)
        self.gradients.start_reduction()
        return self.gradients.result()


class _BlockSum:
    """Sums over the parts of each block, written to a gradient with the last."""

    def __init__(self, gradient: torch.Tensor | None) -> None:
        self.gradient = gradient
        self.total = torch.zeros(())

    def add(self, parts: list[Part], values: Iterable[torch.Tensor]) -> None:
        assert self.gradient is not None
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
