"""The forward on CPUs with bf16 instructions: a coarse product for all, an exact one where the mass is.

Such a CPU multiplies bf16 matrices 2 to 7 times as fast as fp32, and rounds the result to bf16: a logit of
10 is off by up to 0.03. exp(z − S) of `torch_exp` is off by at most 2^-8 of itself, whatever its size. Blocks
with more than `_TAU` of a row's mass, and the label's, are then computed exactly: in fp32, or with AMX by
`two_products`, whose entries above `_LARGE` then take fp32 one by one. The roundings of the other blocks are
independent of each other: their error is 3e-7 of the row's mass, root mean square, and 1.2e-6 at most
(2048 × 512 × 128256, 50 entries above 2^-12, 2026-11). Equal rows of weight round alike: with 1 % of the
mass on them it is 3e-6. 1 − p of a confident label, where no other block is exact, is off by up to 2^-8 of
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.checks import warn_once
from focalkern.logps import torch_exp
from focalkern.logps.selection import count_pairs, list_pairs
from focalkern.logps.torch_exp import MARGIN, Sampled, as_bias, entry_logits, exp_product, is_exp_accurate
from focalkern.logps.torch_pairs import Group, PairLogits, extended
from focalkern.records import BlockStatistics, Head
from focalkern.torch_logits import HAS_BF16_PRODUCTS

# The dropped mass comes from sums of y: 2^-15 keeps it exact to 1e-6.
_TAU = 2.0**-15
# Log-probs are then off by up to 5e-6, by fp32 products 1e-5 (2048 × 512 × 32768, logits up to 49, AMX).
_LARGE = 2.0**-7
# Where more pairs than this are exact, one fp32 product of all is as fast; the estimate of the share is high.
_MAX_SHARE, _MAX_ESTIMATE = 0.3, 0.45
# By how much a block's coarse and exact mass may differ.
_MAX_DIFFERENCE = 2.0**-6
_WORKSPACE_BYTES = 64 * 2**20


def two_products(hidden: torch.Tensor, weight: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """z = hidden @ weightᵀ − shift in fp32, to 2^-17·max|z|: the second product gives what the first lost."""
    bias = weight.new_full((len(weight),), -shift)
    first = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    rest = torch.ops.mkldnn._linear_pointwise.binary(hidden, first.neg(), weight, bias, "add")
    return first.float().add_(rest.float())


def _is_accurate() -> bool:
    x = torch.arange(4096.0).sin().view(2, 2048).bfloat16()
    try:
        product = two_products(x, x[:1], shift=100.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
    exact = x.double() @ x[:1].double().t() - 100.0
    is_product_accurate = (product - exact).abs().amax() <= 2.0**-17 * exact.abs().amax()
    return is_exp_accurate(torch.bfloat16, 2.0**-8) and bool(is_product_accurate)


_is_trusted = HAS_BF16_PRODUCTS and _is_accurate()
# With AMX a bf16 product takes a quarter of an fp32 one's time, with AVX512-BF16 half. Private to torch.
_TWO_ARE_FASTER = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def is_trusted(head: Head) -> bool:
    """Whether a head that suits has coarse products."""
    return _is_trusted and head.hidden.dtype == torch.bfloat16


def block_statistics(sampled: Sampled) -> BlockStatistics | None:
    """By coarse products, or one in fp32 where it is as fast; None where the dense forward is to be taken."""
    global _is_trusted
    head, targets, target_z, _, _, log_share = sampled
    if not is_trusted(head) or (log_share > math.log(_TAU)).double().mean() > _MAX_ESTIMATE:
        return torch_exp.block_statistics(sampled)
    found = sampled.masses(torch.bfloat16)
    if found is None:
        return None
    masses, total, shift = found
    keep = masses[:-1] > _TAU * total[:, None]
    row = (targets >= 0).nonzero().squeeze(1)
    keep[row, targets[row] // VOCAB_BLOCK] = True
    counts = count_pairs(keep)
    if counts.share > _MAX_SHARE:
        return torch_exp.block_statistics(sampled)
    exact = _ExactBlocks(PairLogits(head, targets, list_pairs(keep, counts), _WORKSPACE_BYTES), masses, shift)
    exact.logits.for_each_group(exact.of_half)
    if not exact.differences.amax() <= _MAX_DIFFERENCE:
        _is_trusted = False
        warn_once("bf16 products of this CPU are less accurate than bf16: from now on fp32 ones are taken")
        return torch_exp.block_statistics(sampled)
    return BlockStatistics(target_z, lse=masses[:-1].log_().add_(shift))


def entries_above(x: torch.Tensor, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the entries of x [k, c] above their row's limit [k], where few rows have any."""
    row = (x.amax(1) > limit).nonzero().squeeze(1)
    at, column = (x[row] > limit[row, None]).nonzero(as_tuple=True)
    return row[at], column


class _ExactBlocks:
    """Puts the exact masses of the kept pairs in the place of the coarse ones."""

    def __init__(self, logits: PairLogits, masses: torch.Tensor, shift: float) -> None:
        self.logits, self.masses, self.shift = logits, masses, shift
        # Two products round least near their shift.
        self.center = as_bias(shift - MARGIN)
        # [n + 1] z − center above which an entry takes fp32.
        large = masses[:-1].sum(1).log_().add_(shift - self.center + math.log(_LARGE))
        self.large = extended(large, torch.inf)
        self.differences = masses.new_zeros(2)  # the largest in each half of the pairs

    def of_half(self, half: int) -> Callable[[Group], None]:
        def replace(group: Group) -> None:
            row, column = self.logits.labels(group)
            y = self.exp_of(group)
            y[row, column] = 0.0
            exact, at = y.sum(1), (group.row, group.first_v // VOCAB_BLOCK)
            difference = (exact / self.masses[at] - 1).abs_()
            difference[row] = 0.0  # a label's block may have no other mass
            difference.masked_fill_(group.row == len(self.masses) - 1, 0.0)
            self.differences[half] = torch.maximum(self.differences[half], difference.amax())
            self.masses[at] = exact

        return replace

    def exp_of(self, group: Group) -> torch.Tensor:  # [k, 128] exp(z − S)
        if not _TWO_ARE_FASTER:
            return torch.cat([exp_product(*operands, self.shift) for operands in group.wide.joined()])
        z = torch.cat([two_products(*operands, self.center) for operands in group.joined()])
        row, column = entries_above(z, self.large[group.row])
        for part, exact, _, _ in entry_logits(self.logits.head, group.row[row], group.first_v[row] + column):
            z[row[part], column[part]] = exact - self.center
        return z.sub_(self.shift - self.center).exp_()
