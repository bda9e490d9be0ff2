"""The forward of 16-bit heads on CPUs: exp(z − S) straight from a product.

oneDNN applies a function to the fp32 sums of a product before it stores them. With a shift S above all
logits,

    y = σ(z − S) = exp(z − S) up to a factor of 1 + exp(z − S),

so that a sum over each vocabulary block is all that is left to do: a forward of 2048 × 512 × 32768 takes
362 ms, with dense logits 379 (bf16, 2 cores of an AMD EPYC, torch 2.13, 2026-12); at H = 2048 as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.logps.torch_pairs import joined
from focalkern.records import BlockStatistics, Head, LogitTransform
from focalkern.torch_logits import TILE_ROWS, in_blocks, matmul, nonfinite_to_nan, targets_in, vocab_chunks

# How far S is above the highest logsumexp of a row, as far as that is known. Where a block has more than this
# mass, y is not exp(z − S), here to 6e-6: S is raised.
MARGIN = 16.0
_MAX_MASS, _RAISE = math.exp(-12.0), 12.0
# y below it is 0. What is lost of a row so may be this much of the mass beside its label, or of all.
_SMALLEST, _MAX_LOST, _MAX_LOST_OF_ALL = math.exp(-87.0), 1e-6, 1e-9
_SAMPLED_BLOCKS, _SAMPLED_ROWS = 4, 512
# Below this many multiplications the calls cost more than they save.
_MIN_SIZE = 2**31
# Numbers of hidden or weight that are gathered at once for single entries.
_GATHERED = 2**19


def exp_product(hidden: torch.Tensor, weight: torch.Tensor, shift: float) -> torch.Tensor:
    """y = σ(hidden @ weightᵀ − shift), rounded once to the dtype of the operands."""
    bias = weight.new_full((len(weight),), -shift)
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "sigmoid", [], "")


def is_exp_accurate(dtype: torch.dtype, error: float) -> bool:
    """The operator is private to torch, and the accuracy of the logistic function nowhere stated."""
    z = -torch.arange(1.0, 81.0)[:, None]
    try:
        y = exp_product(z.to(dtype), torch.ones(1, 1, dtype=dtype), shift=5.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((y / (z.double() - 5.0).sigmoid() - 1).abs().amax() <= error)


_is_fp32_accurate = is_exp_accurate(torch.float32, 2.0**-20)


def suits(head: Head, transform: LogitTransform, outputs: tuple[str, ...] = ()) -> bool:
    """Whether exp(z − S) is all that is needed of the logits, and a product gives it."""
    hidden = head.hidden
    has_plain_logits = transform.softcap is None and transform.logit_scale == transform.temperature
    return (
        _is_fp32_accurate
        and hidden.device.type == "cpu"
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and hidden.numel() * head.vocab_size >= _MIN_SIZE
        and head.vocab_size >= _SAMPLED_BLOCKS * VOCAB_BLOCK
        and head.bias is None
        and has_plain_logits
        and not outputs
    )


class Masses(NamedTuple):
    """Sums of exp(z − S) in fp32."""

    of_blocks: torch.Tensor  # [n + 1, NB] without the label; the last row pads
    of_rows: torch.Tensor  # [n] with the label
    shift: float


class Sampled(NamedTuple):
    """A head that suits, or its vocabulary shard, and what a look at its labels and a few blocks told."""

    head: Head
    targets: torch.Tensor  # [n]
    target_z: torch.Tensor  # [n] fp32, −inf where the label is in another shard
    highest: float  # estimates of the highest and lowest logsumexp of a row
    lowest: float
    log_share: torch.Tensor  # [rows, blocks] of the looked at ones: logarithm of their share of a row's mass

    @classmethod
    def of(cls, head: Head, targets: torch.Tensor) -> Sampled:
        labels = entry_logits(head, torch.arange(len(targets)), targets.clamp(min=0))
        target_z = torch.cat([z for _, z, _, _ in labels]).masked_fill_(targets < 0, -torch.inf)
        blocks = head.vocab_size // VOCAB_BLOCK
        first = torch.arange(_SAMPLED_BLOCKS) * blocks // _SAMPLED_BLOCKS * VOCAB_BLOCK
        v = (first[:, None] + torch.arange(VOCAB_BLOCK)).flatten()
        row = torch.arange(0, len(targets), -(-len(targets) // _SAMPLED_ROWS))
        hidden = joined([h[row] for h, _ in head.products])
        weight = joined([w[v] for _, w in head.products])
        z = matmul(hidden.float(), weight.float())
        block_lse = z.unflatten(1, (-1, VOCAB_BLOCK)).logsumexp(-1)
        lse = block_lse.logsumexp(-1) + math.log(blocks / _SAMPLED_BLOCKS)
        lse = torch.maximum(lse, target_z[row])
        highest = torch.maximum(lse.amax(), target_z.amax()).item()
        return cls(head, targets, target_z, highest, lse.amin().item(), block_lse - lse[:, None])

    def masses(self, dtype: torch.dtype) -> Masses | None:
        """By a product in this dtype. None where logits lie too far apart, or something is not finite.

        The dense forward then tells which row it is.
        """
        head, targets, n = self.head, self.targets, len(self.targets)
        masses = torch.ones(n + 1, -(-head.vocab_size // VOCAB_BLOCK))
        poison = torch.zeros(())
        shift = as_bias(self.highest + MARGIN, dtype)
        lost = head.vocab_size * _SMALLEST
        if lost > _MAX_LOST * math.exp(self.lowest - shift):
            return None
        for row_start in range(0, n, TILE_ROWS):
            rows = slice(row_start, min(row_start + TILE_ROWS, n))
            hidden = joined([h[rows] for h, _ in head.products]).to(dtype)
            poison += nonfinite_to_nan(hidden)
            for start, end in vocab_chunks(head.vocab_size, len(hidden)):
                weight = joined([w[start:end] for _, w in head.products]).to(dtype)
                if row_start == 0:
                    poison += nonfinite_to_nan(weight)
                column, before = targets[rows] - start, shift
                tile = _tile_masses(hidden, weight, column, shift)
                while tile.amax() > _MAX_MASS:
                    raised = as_bias(shift + _RAISE, dtype)
                    if not shift < raised < before + 8 * _RAISE:
                        return None
                    masses *= math.exp(shift - raised)
                    shift = raised
                    tile = _tile_masses(hidden, weight, column, shift)
                masses[rows, start // VOCAB_BLOCK : -(-end // VOCAB_BLOCK)] = tile
        rest = masses[:-1].sum(1) + poison
        total = rest + (self.target_z - shift).exp()
        is_exact = (lost <= _MAX_LOST * rest) | (lost <= _MAX_LOST_OF_ALL * total)
        return Masses(masses, total, shift) if is_exact.all() else None


def as_bias(shift: float, dtype: torch.dtype = torch.bfloat16) -> float:
    """Rounded to the dtype in which the product takes it."""
    return torch.tensor(shift, dtype=dtype).item()


def _tile_masses(
    hidden: torch.Tensor, weight: torch.Tensor, column: torch.Tensor, shift: float
) -> torch.Tensor:  # [rows, blocks] fp32, without the labels in these columns
    y = exp_product(hidden, weight, shift)
    y[targets_in(column, y.shape[1])] = 0.0
    return in_blocks(y, padding=0.0).sum(-1, dtype=torch.float32)


def block_statistics(sampled: Sampled) -> BlockStatistics | None:
    """By one fp32 product; None where the dense forward is to be taken."""
    found = sampled.masses(torch.float32)
    if found is None:
        return None
    return BlockStatistics(sampled.target_z, lse=found.of_blocks[:-1].log_().add_(found.shift))


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
