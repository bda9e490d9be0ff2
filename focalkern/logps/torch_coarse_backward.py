"""The backward on CPUs with bf16 instructions: small probabilities by bf16 products, large ones one by one.

|g|·p, up to a power of 2, comes from one product: `exp_product` with S_t = lse_t − log|g_t|. It is off by at
most 2^-8 of itself, and its products with hidden and weight round their results to bf16. Neither shows as
long as no large entry takes part: the roundings of many small ones cancel. Entries with p > `_LARGE` and
labels are left out, and added to the gradients in fp32, from dot products of their own. Errors of dhidden and
dweight are then those of fp32 products, to 1 % (2048 × 512 × 32768 and 2048 × 512 × 128256, 2026-11). Rows of
weight may share a direction, which cancels in dhidden: where the mean row is as large as the standard
deviation, the error is 1.09 times as large, at four times that 1.4 times. That of bf16 logits is several
times as large.
"""

from __future__ import annotations

from copy import copy

import torch

from focalkern.distributed import AsyncReduction
from focalkern.logps import torch_coarse, torch_exp
from focalkern.logps.torch_coarse import bits, entries_above
from focalkern.logps.torch_exp import entry_logits, exp_product
from focalkern.logps.torch_pairs import Group, extended, joined
from focalkern.logps.torch_threads import sums_in_two_threads
from focalkern.products import HeadGradients
from focalkern.records import Forward, Gradients, Needs, RowGradients
from focalkern.torch_logits import targets_in, vocab_chunks

_LARGE = 2.0**-5
# y is at most this much of p: σ is exp to 1.3e-4 of small entries.
_MAX_Y = 2.0**-8
# With more, the power of 2 above |g| / _MAX_Y may overflow.
_MAX_G = 2.0**100


class CoarseDz:
    """dz of a backward without its large entries, and these."""

    def __init__(self, forward: Forward, g: torch.Tensor) -> None:
        self.forward, self.g = forward, g
        # y = |g|·p / scale; by a power of 2 nothing is rounded.
        scale = torch.frexp(g.abs().amax())[1].exp2() / _MAX_Y
        share = g.abs() / scale
        self.shift = extended(forward.saved.lse - share.log(), torch.inf)
        self.limit = extended(bits(_LARGE * share), 0)
        self.factor = extended(-g.sign() * scale, 0.0).bfloat16()
        self.targets = extended(forward.targets, -1)
        # Row and vocabulary entry of large ones and labels.
        self.large: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def of(cls, forward: Forward, grads: RowGradients) -> CoarseDz | None:
        """None where the head does not suit, or something is not finite."""
        head = forward.head
        suits = torch_exp.suits(head, forward.transform) and torch_coarse.is_trusted(head)
        if grads.entropy is not None or not suits:
            return None
        is_finite = grads.logps.abs().amax() + forward.saved.lse.abs().amax() < _MAX_G
        return cls(forward, grads.logps) if is_finite else None

    def with_own_large(self) -> CoarseDz:
        """The same with large entries of its own, for one of two threads."""
        own = copy(self)
        own.large = []
        return own

    def of_group(self, group: Group) -> list[torch.Tensor]:  # of each part, −g·p [rows, 128] in bf16
        operands = zip(group.joined(), group.split(self.shift[group.row]), strict=True)
        y = torch.cat([exp_product(weight, hidden, shift) for (hidden, weight), shift in operands], 1)
        self.take_large(y, group.row, group.first_v)
        y *= self.factor[group.row]
        # oneDNN builds a kernel for each distance between rows: that of a group is seldom met again.
        return [part.contiguous().t() for part in group.split(y, 1)]

    def take_large(
        self,
        y: torch.Tensor,  # [c, k] overwritten
        row: torch.Tensor,  # [k]
        first_v: torch.Tensor,  # [k] or []: the entry of the first column
    ) -> None:
        """Set labels and large entries to 0, and note them for `add_large`."""
        label_at, label_column = targets_in(self.targets[row] - first_v, len(y))
        y[label_column, label_at] = 0.0
        place, _ = entries_above(bits(y), self.limit[row])
        y.view(-1)[place] = 0.0
        column = torch.cat([label_column, place // len(row)])
        at = torch.cat([label_at, place % len(row)])
        self.large.append((row[at], column + first_v.expand_as(row)[at]))

    def add_large(self, dhidden: list[torch.Tensor | None], dweight: list[torch.Tensor | None]) -> None:
        """Add the entries that were left out, in fp32, to the gradients of each product."""
        if not self.large:
            return
        head, targets, _, saved = self.forward
        row, entry = (torch.cat(x) for x in zip(*self.large, strict=True))
        # The entries of a row of dweight are to be added up before they are rounded.
        entry, order = entry.sort(stable=True)
        row = row[order]

        sums: dict[int, torch.Tensor] = {}  # of the entry that the last part ended with, by product
        for part, z, hidden, weight in entry_logits(head, row, entry):
            at, v = row[part], entry[part]
            goes_on = part.start > 0 and bool(entry[part.start - 1] == v[0])
            rest = torch.where(v == targets[at], -saved.one_minus_p[at], (z - saved.lse[at]).exp())
            dz = (-self.g[at] * rest)[:, None]
            distinct, place = v.unique(return_inverse=True)
            for i, (h, w, dh, dw) in enumerate(zip(hidden, weight, dhidden, dweight, strict=True)):
                if dh is not None:
                    dh.index_add_(0, at, w.mul_(dz))
                if dw is not None:
                    total = dw[distinct].float()
                    if goes_on:
                        total[0] = sums[i]
                    dw[distinct] = total.index_add_(0, place, h.mul_(dz)).to(dw.dtype)
                    sums[i] = total[-1].clone()


def exact_backward(
    forward: Forward, grads: RowGradients, needs: Needs, reduction: AsyncReduction | None
) -> Gradients | None:
    """All pairs, by vocabulary chunks; None where the head does not suit."""
    coarse = CoarseDz.of(forward, grads)
    if coarse is None:
        return None
    head, n = forward.head, len(grads.logps)
    gradients = HeadGradients(head, needs, reduction, torch.float32)
    hidden, row = joined([h for h, _ in head.products]), torch.arange(n)
    shift, factor = coarse.shift[:n], coarse.factor[:n, None]
    scaled = [h * factor if any(needs.of_weight) else h for h, _ in head.products]

    def add(chunks: list[tuple[int, int]], dhidden: list[torch.Tensor | None]) -> None:
        own = coarse.with_own_large()
        for start, end in chunks:
            weights = [weight[start:end] for _, weight in head.products]
            y = exp_product(joined(weights), hidden, shift)
            own.take_large(y, row, torch.tensor(start))
            # The rows' factors are in hidden for dweight, and come last for dhidden: dz itself is not formed.
            for total, weight in zip(dhidden, weights, strict=True):
                if total is not None:
                    total += y.t() @ weight
            for dweight, h in zip(gradients.dweight, scaled, strict=True):
                if dweight is not None:
                    torch.mm(y, h, out=dweight[start:end])
            del y
        for total in dhidden:
            if total is not None:
                total *= factor
        own.add_large(dhidden, gradients.dweight)

    chunks = vocab_chunks(head.vocab_size, n)
    middle = len(chunks) // 2
    sums_in_two_threads(add, (chunks[:middle], chunks[middle:]), gradients.dhidden, hidden.device)
    gradients.start_reduction()
    return gradients.result()
