"""The forward of 16-bit heads on CPUs: exp(z − S) straight from a product.

oneDNN applies a function to the fp32 sums of a product before it stores them. With a shift S_t well above
the logsumexp of row t,

    y = σ(z − S_t) = exp(z − S_t) up to a factor of 1 + exp(z − S_t),

so that a sum over each vocabulary block is all that is left to do. oneDNN adds one number to each column of a
product: for S_t the rows are to be columns, y is [vocabulary, rows].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.logps.torch_pairs import joined
from focalkern.records import BlockStatistics, Head, LogitTransform
from focalkern.torch_logits import matmul, nonfinite_to_nan, targets_in, vocab_chunks

# How far S_t is above an estimate of the row's logsumexp.
MARGIN = 30.0
# Where a block has more mass, the estimate was 18 too low, and y is not exp(z − S) to 6e-6: S_t is raised.
_MAX_MASS, _RAISE, _MAX_RAISES = math.exp(-12.0), 20.0, 100
# y below it is 0. So much of a row's mass may be lost by that.
_SMALLEST, _MAX_LOST = math.exp(-87.0), 1e-6
# Vocabulary entries that the estimates come from, and rows at a time.
_SAMPLED, _SAMPLED_ROWS = 256, 512
# With fewer multiplications the calls cost more than they save.
_MIN_SIZE = 2**31
# Numbers of hidden or weight that are gathered at once for single entries.
_GATHERED = 2**19


def exp_product(weight: torch.Tensor, hidden: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """y = σ(weight @ hiddenᵀ − shift) [c, n], rounded once to the operands' dtype; shift [n] in fp32."""
    return torch.ops.mkldnn._linear_pointwise(weight, hidden, -shift, "sigmoid", [], "")


def is_exp_accurate(dtype: torch.dtype, error: float) -> bool:
    """The operator is private to torch, and the accuracy of the logistic function nowhere stated."""
    z = -torch.arange(1, 81, dtype=torch.float32)
    shift = torch.linspace(0.1, 5.0, 80, dtype=torch.float32)
    try:
        y = exp_product(torch.ones(2, 1, dtype=dtype), z[:, None].to(dtype), shift)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((y / (z - shift).double().sigmoid() - 1).abs().amax() <= error)


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
        and head.vocab_size >= _SAMPLED
        and head.bias is None
        and has_plain_logits
        and not outputs
    )


class Tile(NamedTuple):
    """y = exp(z − S) of some vocabulary entries, and what is known by then of the rows."""

    y: torch.Tensor  # [c, n], 0 at the labels
    start: int  # the first of the entries
    end: int
    shift: torch.Tensor  # [n]
    rest: torch.Tensor  # [n] sums of y up to here, as it came
    masses: torch.Tensor  # [n, NB] the same by blocks, and corrected


class Sampled(NamedTuple):
    """A head that suits, or its vocabulary shard, and what a look at its labels and a few entries told."""

    head: Head
    targets: torch.Tensor  # [n]
    target_z: torch.Tensor  # [n] fp32, −inf where the label is in another shard
    lse: torch.Tensor  # [n] estimates, without the label
    judgement: torch.Tensor  # [n]

    @classmethod
    def of(
        cls,
        head: Head,
        targets: torch.Tensor,
        judge: Callable[[torch.Tensor, int], torch.Tensor],  # [n] from [n, sampled] log p, and V
    ) -> Sampled:
        labels = entry_logits(head, torch.arange(len(targets)), targets.clamp(min=0))
        target_z = torch.cat([z for _, z, _, _ in labels]).masked_fill_(targets < 0, -torch.inf)
        v = torch.arange(_SAMPLED) * (head.vocab_size // _SAMPLED)
        weight = joined([w[v] for _, w in head.products]).float()
        lse, judgement = [], []
        hidden = joined([h for h, _ in head.products])
        for h, target in zip(hidden.split(_SAMPLED_ROWS), targets.split(_SAMPLED_ROWS), strict=True):
            z = matmul(h.float(), weight).masked_fill_(v == target[:, None], -torch.inf)
            lse.append(z.logsumexp(1) + math.log(head.vocab_size / _SAMPLED))
            judgement.append(judge(z.sub_(lse[-1][:, None]), head.vocab_size))
        return cls(head, targets, target_z, torch.cat(lse), torch.cat(judgement))

    def rows(self, row: torch.Tensor) -> Sampled:
        head = self.head.with_hidden([h[row] for h, _ in self.head.products])
        return Sampled(head, *(x[row] for x in self[1:]))

    def block_statistics(
        self, dtype: torch.dtype, after: Callable[[Tile], None] | None = None
    ) -> BlockStatistics | None:
        """By a product in this dtype. None where S is not found, or something is not finite.

        The dense forward then tells which row it is. `after` is called after each tile, and may change the
        masses.
        """
        vocab_size, targets, shift = self.head.vocab_size, self.targets, self.lse + MARGIN
        hidden = joined([h for h, _ in self.head.products]).to(dtype)
        poison = nonfinite_to_nan(hidden)
        rest = torch.zeros_like(shift)
        masses = rest.new_empty(len(rest), -(-vocab_size // VOCAB_BLOCK))
        for start, end in vocab_chunks(vocab_size, len(rest)):
            weight = joined([w[start:end] for _, w in self.head.products]).to(dtype)
            if (poison + nonfinite_to_nan(weight)).isnan():
                return None
            blocks = slice(start // VOCAB_BLOCK, -(-end // VOCAB_BLOCK))
            y, sums = _exp_without_labels(weight, hidden, shift, targets - start)
            for _ in range(_MAX_RAISES):
                high = (sums.amax(0) > _MAX_MASS).nonzero().squeeze(1)
                if not len(high):
                    break
                shift[high] += _RAISE
                rest[high] *= math.exp(-_RAISE)
                masses[high, : blocks.start] *= math.exp(-_RAISE)
                y[:, high], sums[:, high] = _exp_without_labels(
                    weight, hidden[high], shift[high], targets[high] - start
                )
            else:
                return None
            rest += sums.sum(0)
            masses[:, blocks] = sums.t()
            if after is not None:
                after(Tile(y, start, end, shift, rest, masses))
            del y  # the next one takes its memory
        if not (vocab_size * _SMALLEST <= _MAX_LOST * masses.sum(1)).all():
            return None
        return BlockStatistics(self.target_z, lse=masses.log_().add_(shift[:, None]))


def _exp_without_labels(
    weight: torch.Tensor,
    hidden: torch.Tensor,
    shift: torch.Tensor,
    column: torch.Tensor,  # of the rows' labels, perhaps outside
) -> tuple[torch.Tensor, torch.Tensor]:  # y [c, rows], and its sums [blocks, rows] in fp32
    y = exp_product(weight, hidden, shift)
    row, v = targets_in(column, len(y))
    y[v, row] = 0.0
    if len(y) % VOCAB_BLOCK:
        y = torch.nn.functional.pad(y, (0, 0, 0, -len(y) % VOCAB_BLOCK))
    # Block by block takes two thirds of the time of one sum of all.
    sums = shift.new_empty(len(y) // VOCAB_BLOCK, len(shift))
    for block, total in zip(y.split(VOCAB_BLOCK), sums, strict=True):
        torch.sum(block, 0, dtype=torch.float32, out=total)
    return y, sums


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
