"""The forward on CPUs with bf16 instructions: a coarse product for all, an exact one where the mass is.

Such a CPU multiplies bf16 matrices 2 to 7 times as fast as fp32, and rounds the result to bf16: a logit of
10 is off by up to 0.03. oneDNN applies a function to the fp32 sums before it rounds. With a shift S above
all logits,

    y = σ(z − S) = exp(z − S) up to a factor of 1 + exp(z − S),

off by at most 2^-8 of itself, whatever its size, in the time of the product alone. The sum of y over a
vocabulary block is the block's mass. Blocks with more than `_TAU` of a row's mass, and the label's, are
then computed exactly: in fp32, or with AMX by `two_products`, whose labels and entries above `_LARGE` then
take fp32 one by one. The roundings of the other blocks are independent of each other: their error is 3e-7 of
the row's mass, root mean square, and 1.2e-6 at most (2048 × 512 × 128256, 50 entries above 2^-12, 2026-11).
Equal rows of weight round alike: with 1 % of the mass on them it is 3e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.checks import warn_once
from focalkern.logps.selection import count_pairs, list_pairs
from focalkern.logps.torch_pairs import Group, PairLogits, extended, joined
from focalkern.records import BlockStatistics, Head, LogitTransform
from focalkern.torch_logits import (
    HAS_BF16_PRODUCTS,
    TILE_ROWS,
    Product,
    in_blocks,
    nonfinite_to_nan,
    vocab_chunks,
)

# The dropped mass comes from sums of y: 2^-15 keeps it exact to 1e-6.
_TAU = 2.0**-15
# Log-probs are then off by up to 5e-6, by fp32 products 1e-5 (2048 × 512 × 32768, logits up to 49, AMX).
_LARGE = 2.0**-7
# Where more pairs than this are exact, one fp32 product of all is as fast; the estimate of the share is high.
_MAX_SHARE, _MAX_ESTIMATE = 0.3, 0.45
_SAMPLED_BLOCKS = 4
# How far the logsumexp of a row may be below S: nearer, y is not exp(z − S); further, small y are 0 in bf16.
NEAREST, FURTHEST = 5.0, 64.0
_MARGIN = 16.0
# By how much the logarithms of a block's coarse and exact mass may differ: roundings, and exp(−NEAREST).
_MAX_DIFFERENCE = 2.0**-6
# Below this many multiplications the calls cost more than the product.
_MIN_SIZE = 2**31
_WORKSPACE_BYTES = 64 * 2**20
# Numbers of hidden or weight that are gathered at once for single entries.
_GATHERED = 2**20


def coarse_exp(hidden: torch.Tensor, weight: torch.Tensor, shift: float) -> torch.Tensor:
    """y = σ(hidden @ weightᵀ − shift) in bf16, rounded once."""
    bias = weight.new_full((len(weight),), -shift)
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "sigmoid", [], "")


def two_products(hidden: torch.Tensor, weight: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """z = hidden @ weightᵀ − shift in fp32, to 2^-17·max|z|: the second product gives what the first lost."""
    bias = weight.new_full((len(weight),), -shift)
    first = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    rest = torch.ops.mkldnn._linear_pointwise.binary(hidden, first.neg(), weight, bias, "add")
    return first.float().add_(rest.float())


def _is_accurate() -> bool:
    # The operators are private to torch, and the accuracy of the logistic function nowhere stated.
    z = -torch.arange(1.0, 81.0)[:, None].bfloat16()
    x = torch.arange(4096.0).sin().view(2, 2048).bfloat16()
    try:
        y = coarse_exp(z, torch.ones(1, 1, dtype=torch.bfloat16), shift=5.0)
        product = two_products(x, x[:1], shift=100.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
    exact_y, exact_product = (z.double() - 5.0).sigmoid(), x.double() @ x[:1].double().t() - 100.0
    is_product_accurate = (product - exact_product).abs().amax() <= 2.0**-17 * exact_product.abs().amax()
    return bool((y / exact_y - 1).abs().amax() <= 2.0**-8 and is_product_accurate)


_is_trusted = HAS_BF16_PRODUCTS and _is_accurate()
# With AMX a bf16 product takes a quarter of an fp32 one's time, with AVX512-BF16 half. Private to torch.
_TWO_ARE_FASTER = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def suits(head: Head, transform: LogitTransform, outputs: tuple[str, ...] = ()) -> bool:
    """Whether coarse products can take the place of most of the fp32 ones."""
    hidden = head.hidden
    has_plain_logits = transform.softcap is None and transform.logit_scale == transform.temperature
    return (
        _is_trusted
        and hidden.device.type == "cpu"
        and hidden.dtype == torch.bfloat16
        and hidden.numel() * head.vocab_size >= _MIN_SIZE
        and head.vocab_size >= _SAMPLED_BLOCKS * VOCAB_BLOCK
        and head.bias is None
        and has_plain_logits
        and not outputs
    )


def block_statistics(head: Head, targets: torch.Tensor) -> BlockStatistics | None:
    """The forward of a head that suits, or of a vocabulary shard; None where the dense one is to be taken."""
    global _is_trusted
    shift, estimate = _sample(head, targets)
    if not estimate <= _MAX_ESTIMATE:
        return None
    masses = _coarse_masses(head, shift)
    total = masses[:-1].sum(1)
    distance = -total.log()
    # Of what is not finite, the dense forward tells the row.
    if not (distance.amin() >= NEAREST and distance.amax() <= FURTHEST):
        return None

    keep = masses[:-1] > _TAU * total[:, None]
    row = (targets >= 0).nonzero().squeeze(1)
    keep[row, targets[row] // VOCAB_BLOCK] = True
    counts = count_pairs(keep)
    if counts.share > _MAX_SHARE:
        return None
    logits = PairLogits(head, targets, list_pairs(keep, counts), _WORKSPACE_BYTES)
    # Two products round least near their shift.
    center = as_bias(shift - _MARGIN)
    lse = extended(shift - center - distance, torch.inf)
    exact = _ExactBlocks(logits, center, masses.log_().add_(shift - center), lse + math.log(_LARGE))
    logits.for_each_group(exact.of_half)
    if not exact.differences.amax() <= _MAX_DIFFERENCE:
        _is_trusted = False
        warn_once("bf16 products of this CPU are less accurate than bf16: from now on fp32 ones are taken")
        return None
    return BlockStatistics(target_z=exact.target_z[:-1] + center, lse=exact.block_lse[:-1] + center)


def _sample(head: Head, targets: torch.Tensor) -> tuple[float, float]:
    """S, and an estimate of the share of pairs that take fp32: from logits of labels and of a few blocks."""
    blocks = head.vocab_size // VOCAB_BLOCK
    first = torch.arange(_SAMPLED_BLOCKS) * blocks // _SAMPLED_BLOCKS * VOCAB_BLOCK
    v = (first[:, None] + torch.arange(VOCAB_BLOCK)).flatten()
    sampled = [weight[v].float() for _, weight in head.products]
    labels = entry_logits(head, torch.arange(len(targets)), targets.clamp(min=0))
    target_z = torch.cat([z for _, z, _, _ in labels])
    highest, kept = -math.inf, 0
    for rows in _row_tiles(len(targets)):
        hidden = [h[rows].float() for h, _ in head.products]
        z = Product(hidden, is_fp32=False)(sampled, None)
        block_lse = z.unflatten(1, (-1, VOCAB_BLOCK)).logsumexp(-1)
        lse = block_lse.logsumexp(-1) + math.log(blocks / _SAMPLED_BLOCKS)
        lse = torch.where(targets[rows] >= 0, torch.maximum(lse, target_z[rows]), lse)
        highest = max(highest, lse.amax().item())
        kept += int((block_lse - lse[:, None] > math.log(_TAU)).sum())
    return as_bias(highest + _MARGIN), kept / (len(targets) * _SAMPLED_BLOCKS)


def as_bias(shift: float) -> float:
    """Rounded to bf16, in which the product takes it."""
    return torch.tensor(shift, dtype=torch.bfloat16).item()


def _coarse_masses(head: Head, shift: float) -> torch.Tensor:  # [n + 1, NB]
    """Σ exp(z − S) of each block, label and all, and a row that pads; NaN where inputs are not finite."""
    n, ones = len(head.hidden), head.weight.new_ones(1, VOCAB_BLOCK)
    masses = torch.ones(n + 1, -(-head.vocab_size // VOCAB_BLOCK))
    poison = torch.zeros(())
    for rows in _row_tiles(n):
        hidden = joined([h[rows] for h, _ in head.products])
        for start, end in vocab_chunks(head.vocab_size, len(hidden)):
            weight = joined([w[start:end] for _, w in head.products])
            if rows.start == 0:
                poison = poison + nonfinite_to_nan(weight)
            y = in_blocks(coarse_exp(hidden, weight, shift), padding=0.0)
            at = slice(start // VOCAB_BLOCK, -(-end // VOCAB_BLOCK))
            # sum() would make a copy in fp32 first.
            masses[rows, at] = two_products(y.flatten(0, 1), ones).view(y.shape[:2])
        masses[rows] += nonfinite_to_nan(hidden, dim=1)[:, None]
    return masses.add_(poison)


def _row_tiles(n: int) -> list[slice]:
    return [slice(start, min(start + TILE_ROWS, n)) for start in range(0, n, TILE_ROWS)]


def entry_logits(
    head: Head,
    row: torch.Tensor,  # [k]
    v: torch.Tensor,  # [k]
) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]]:
    """Logits of single entries in fp32, some at a time: which, logits, hidden and weight of each product."""
    step = max(_GATHERED // head.hidden.shape[1], 1)
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        hidden = [h.index_select(0, row[part]).float() for h, _ in head.products]
        weight = [w.index_select(0, v[part]).float() for _, w in head.products]
        z = torch.stack([(h * w).sum(1) for h, w in zip(hidden, weight, strict=True)]).sum(0)
        yield part, z, hidden, weight


def entries_above(x: torch.Tensor, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the entries of x [k, c] above their row's limit [k], where few rows have any."""
    row = (x.amax(1) > limit).nonzero().squeeze(1)
    at, column = (x[row] > limit[row, None]).nonzero(as_tuple=True)
    return row[at], column


class _ExactBlocks:
    """Exact statistics of z − center in the kept pairs, with the row that pads; coarse ones elsewhere."""

    def __init__(
        self, logits: PairLogits, center: float, block_lse: torch.Tensor, large: torch.Tensor
    ) -> None:
        self.logits, self.center, self.block_lse = logits, center, block_lse
        self.large = large  # [n + 1] logits above it take fp32
        self.target_z = block_lse.new_full((len(block_lse),), -torch.inf)
        self.differences = block_lse.new_zeros(2)  # the largest in each half of the pairs

    def of_half(self, half: int) -> Callable[[Group], None]:
        def replace(group: Group) -> None:
            row, column = self.logits.labels(group)
            if _TWO_ARE_FASTER:
                z = torch.cat([two_products(*operands, self.center) for operands in group.joined()])
                self.replace_large(z, group, row, column)
            else:
                z = self.logits.logits(group).sub_(self.center)
            self.target_z[group.row[row]] = z[row, column]
            z[row, column] = -torch.inf
            lse, at = z.logsumexp(1), (group.row, group.first_v // VOCAB_BLOCK)
            difference = lse - self.block_lse[at]
            difference[row] = 0.0  # the coarse mass has the label
            difference.masked_fill_(group.row == len(self.block_lse) - 1, 0.0)
            self.differences[half] = torch.maximum(self.differences[half], difference.abs().amax())
            self.block_lse[at] = lse

        return replace

    def replace_large(
        self, z: torch.Tensor, group: Group, label_row: torch.Tensor, label_column: torch.Tensor
    ) -> None:
        """Labels and large entries in fp32."""
        row, column = entries_above(z, self.large[group.row])
        row, column = torch.cat([label_row, row]), torch.cat([label_column, column])
        for part, exact, _, _ in entry_logits(self.logits.head, group.row[row], group.first_v[row] + column):
            z[row[part], column[part]] = exact - self.center
