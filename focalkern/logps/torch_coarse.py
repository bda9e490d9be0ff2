"""The forward on CPUs with bf16 instructions: a coarse product for all, exact logits where they are large.

Such a CPU multiplies bf16 matrices 2 to 7 times as fast as fp32, and rounds the result to bf16: a logit of
10 is off by up to 0.03. exp(z − S) of `torch_exp` is off by at most 2^-8 of itself, whatever its size.
Entries with more than 2^-16 of a row's mass, some 200, are computed again in fp32, one by one. The
roundings of the others are independent of each other: they change the mass by 1.6e-7, root mean square, and
8e-7 at most (2048 × 512 × 32768 and 1024 × 512 × 128256, 50 entries above 2^-12, and Gaussian logits of
deviation 6 and 8, 2026-12). Equal logits round alike: rows where a sample shows it take an fp32 product.
"""

from __future__ import annotations

import math
import warnings

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.checks import warn_once
from focalkern.logps.torch_exp import MARGIN, Sampled, Tile, is_exp_accurate
from focalkern.logps.torch_pairs import joined
from focalkern.records import BlockStatistics, Head
from focalkern.torch_logits import HAS_BF16_PRODUCTS

# Large entries have more than one of these shares of their row's mass without the label.
_THRESHOLDS = (2.0**-16, 2.0**-17, 2.0**-18, 2.0**-20)
# By how much the rounding of the others may change that mass: root mean square where they are independent of
# each other, and where they are all alike.
_MAX_ERROR, _MAX_SUM = 5e-7, 5e-5
# Where more entries are large, of a row and of all, one fp32 product is as fast; estimates are high.
_MAX_SHARE_OF_ROW, _MAX_SHARE = 0.16, 0.045
# Of fewer rows a coarse product of their own gains nothing.
_MIN_SUITED = 0.8
# By how much a coarse and an exact entry may differ, and how that grows with √K·|S|.
_MAX_DIFFERENCE, _ROUNDING = 2.0**-6, 2.0**-22
# Numbers of weight that are in fp32 at once.
_WIDE = 2**19
# After the tile with which more entries have been found, these are made exact: 14 bytes each.
_MAX_FOUND = 2**19


def logits_at(
    v: torch.Tensor,  # [k] in rising order
    row: torch.Tensor,  # [k]
    weight: torch.Tensor,  # [c, K] fp32
    hidden: torch.Tensor,  # [n, K] fp32
) -> torch.Tensor:  # [k]
    """Single entries of weight @ hiddenᵀ."""
    ends = torch.searchsorted(v, torch.arange(len(weight) + 1))
    size = len(weight), len(hidden)
    wanted = torch.sparse_csr_tensor(ends, row, weight.new_zeros(len(v)), size, check_invariants=False)
    return torch.sparse.sampled_addmm(wanted, weight, hidden.t(), beta=0.0).values()


def _is_accurate() -> bool:
    x = torch.arange(4096, dtype=torch.float32).sin().view(2, 2048)
    with warnings.catch_warnings():
        # torch calls sparse tensors a beta, once.
        warnings.simplefilter("ignore")
        try:
            z = logits_at(torch.tensor([0, 1]), torch.tensor([1, 0]), x, x)
        except (AttributeError, RuntimeError, TypeError):
            return False
    exact = (x[0].double() * x[1].double()).sum()
    return is_exp_accurate(torch.bfloat16, 2.0**-8) and bool((z - exact).abs().amax() <= 1e-5 * exact.abs())


_is_trusted = HAS_BF16_PRODUCTS and _is_accurate()


def is_trusted(head: Head) -> bool:
    """Whether a head that suits has coarse products."""
    return _is_trusted and head.hidden.dtype == torch.bfloat16


def block_statistics(head: Head, targets: torch.Tensor) -> BlockStatistics | None:
    """By coarse products, or one in fp32 where it is as fast; None where the dense forward is to be taken.

    Of a head that suits (`torch_exp`), or its vocabulary shard.
    """
    sampled = Sampled.of(head, targets, _thresholds if is_trusted(head) else _none)
    suits = sampled.judgement > 0
    if suits.double().mean() < _MIN_SUITED:
        return sampled.block_statistics(torch.float32)
    if suits.all():
        return _coarse_statistics(sampled)
    by_coarse, by_fp32 = suits.nonzero().squeeze(1), suits.logical_not().nonzero().squeeze(1)
    exact = sampled.rows(by_fp32).block_statistics(torch.float32)
    coarse = _coarse_statistics(sampled.rows(by_coarse)) if exact else None
    if exact is None or coarse is None:
        return None
    order = torch.cat([by_coarse, by_fp32]).argsort()
    return BlockStatistics(sampled.target_z, lse=torch.cat([coarse.lse, exact.lse])[order])


def _coarse_statistics(sampled: Sampled) -> BlockStatistics | None:
    global _is_trusted
    entries = _LargeEntries(sampled.head, sampled.judgement)
    found = sampled.block_statistics(torch.bfloat16, entries.find)
    if entries.is_bf16:
        return found
    _is_trusted = False
    warn_once("bf16 products of this CPU are less accurate than bf16: from now on fp32 ones are taken")
    return sampled.block_statistics(torch.float32)


def _thresholds(log_p: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Above which p entries are to be exact; 0 of rows where too many were, or the others' roundings show."""
    p, y = log_p.exp(), (log_p - MARGIN).exp()
    error = p * (y.bfloat16() / y - 1).nan_to_num_(0.0)  # y may be 0
    scale = vocab_size / p.shape[1]
    thresholds = torch.zeros_like(p[:, 0])
    share = torch.zeros_like(thresholds)
    left = torch.arange(len(p))
    for threshold in _THRESHOLDS:
        is_large = p[left] > threshold
        small = error[left].masked_fill_(is_large, 0.0)
        # Roundings of equal logits are alike.
        suits = (small.square().sum(1) * scale).sqrt_() <= _MAX_ERROR
        suits &= small.sum(1).abs_() * scale <= _MAX_SUM
        thresholds[left[suits]] = threshold
        share[left[suits]] = is_large[suits].float().mean(1)
        left = left[~suits]
    if share.mean() > _MAX_SHARE:
        thresholds *= share <= _MAX_SHARE_OF_ROW
        share *= thresholds > 0
    return thresholds * (share.mean() <= _MAX_SHARE)


def _none(log_p: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return torch.zeros_like(log_p[:, 0])


def bits(y: torch.Tensor) -> torch.Tensor:
    """y >= 0 in bf16 as int16, in the same order: the maximum takes a sixth of the time."""
    return y.bfloat16().view(torch.int16)


def entries_above(x: torch.Tensor, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries of x [c, k] are above their column's limit [k], and these; int16, >= 0.

    The first are places in x.view(-1), in rising order.
    """
    # Row i of each slab together: few such groups hold any. The sign of a difference takes a tenth of a
    # comparison's time.
    slabs = x.view(8 if len(x) % 8 == 0 else 1, -1, len(limit))
    place = (limit - slabs.amax(0)).bitwise_right_shift_(15).view(-1).nonzero().squeeze(1)
    group = slabs.flatten(1).index_select(1, place)
    slab, at = (limit[place % len(limit)] - group).bitwise_right_shift_(15).nonzero().unbind(1)
    return slab * slabs[0].numel() + place[at], group[slab, at]


class _LargeEntries:
    """Puts exact exp(z − S) of large entries in the place of coarse ones."""

    def __init__(self, head: Head, thresholds: torch.Tensor) -> None:
        self.head, self.thresholds = head, thresholds
        self.hidden = joined([h for h, _ in head.products]).float()
        self.is_bf16 = True  # coarse entries are as accurate as bf16
        # Places in [V, n], y and S of entries that may turn out to be large.
        self.found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def find(self, tile: Tile) -> None:
        """Note the entries that are large by the mass so far; with the last tile, make them exact."""
        n = len(tile.rest)
        place, y = entries_above(bits(tile.y), bits(self.thresholds * tile.rest))
        self.found.append((place + tile.start * n, y.view(torch.bfloat16), tile.shift[place % n]))
        if tile.end == self.head.vocab_size or sum(len(place) for place, _, _ in self.found) > _MAX_FOUND:
            self.correct(tile)

    def correct(self, tile: Tile) -> None:
        """Put exact ones in the place of those that still are."""
        # x.index_select(0, i) takes a quarter of the time of x[i].
        place, y, shift = (torch.cat(x) for x in zip(*self.found, strict=True))
        self.found.clear()
        row = place % len(tile.rest)
        coarse = y.float() * (shift - tile.shift.index_select(0, row)).exp_()
        limit = (self.thresholds * tile.rest).index_select(0, row)
        large = (coarse > limit).nonzero().squeeze(1)
        row, coarse = row.index_select(0, large), coarse.index_select(0, large)
        v = place.index_select(0, large) // len(tile.rest)
        shift = tile.shift.index_select(0, row)
        exact = self._logits(v, row).sub_(shift).exp_()
        allowed = _MAX_DIFFERENCE + _ROUNDING * math.sqrt(self.hidden.shape[1]) * shift.abs_()
        self.is_bf16 &= bool(((exact / coarse - 1).abs_() <= allowed).all())
        block = row * tile.masses.shape[1] + v // VOCAB_BLOCK
        tile.masses.view(-1).index_add_(0, block, exact - coarse)

    def _logits(self, v: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        step = max(_WIDE // self.hidden.shape[1], 1)
        first = torch.arange(0, self.head.vocab_size + step, step)
        counts = torch.searchsorted(v, first).diff().tolist()
        wide = self.hidden.new_empty(step, self.hidden.shape[1])  # once: new memory costs as much as copying
        z = [wide.new_empty(0)]
        parts = zip(first.tolist(), v.split(counts), row.split(counts), strict=False)
        for start, v_part, row_part in parts:
            if len(v_part):
                weight = joined([w[start : start + step] for _, w in self.head.products])
                z.append(logits_at(v_part - start, row_part, wide[: len(weight)].copy_(weight), self.hidden))
        return torch.cat(z)
