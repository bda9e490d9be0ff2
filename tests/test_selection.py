"""Selection of the kept pairs, against the rule written out row by row in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import focalkern.logps.selection
from focalkern.logps.certificate import DroppedMass
from focalkern.logps.selection import (
    MAX_WEIGHTED_MASS,
    Selection,
    count_pairs,
    gradient_scale,
    list_pairs,
    select_pairs,
)
from focalkern.options import automatic_tau


def block_statistics(n, vocab_size, sharpness, seed=0):
    """What the forward hands over, in fp32, and the true mass of each block, in float64."""
    generator = torch.Generator().manual_seed(seed)
    z = sharpness * torch.randn(n, vocab_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (n,), generator=generator)
    g = torch.randn(n, generator=generator, dtype=torch.float64)
    lse = z.logsumexp(-1)
    one_minus_p = -torch.expm1(z.gather(1, targets[:, None])[:, 0] - lse)
    rest = z.scatter(1, targets[:, None], -math.inf)
    rest = torch.nn.functional.pad(rest, (0, -vocab_size % 128), value=-math.inf)
    block_lse = rest.unflatten(1, (-1, 128)).logsumexp(-1)
    mass = (block_lse - lse[:, None]).exp()
    return block_lse.float(), lse.float(), one_minus_p.float(), targets, g.float(), mass


@given(
    n=st.integers(1, 40),
    vocab_size=st.integers(2, 2000),
    sharpness=st.floats(0.1, 20.0),
    tau=st.sampled_from([1e-6, 2.0**-13, 1e-3, 0.1, 10.0]),
    seed=st.integers(0, 2**16),
)
def test_selection_is_the_rule(n, vocab_size, sharpness, tau, seed):
    block_lse, lse, one_minus_p, targets, g, mass = block_statistics(n, vocab_size, sharpness, seed)
    g[::3] *= 1e-3
    g[1::5] = 0.0
    selection = select_pairs(block_lse, lse, one_minus_p, targets, g, tau)
    size = g.double().abs()
    scale = min(size.amax().item(), 2 * size.sum().item() / max((g != 0).sum().item(), 1))
    relative = (size / (scale or 1.0)).tolist()

    for t in range(n):
        keep = selection.keep[t]
        own = targets[t].item() // 128
        if g[t] == 0:
            assert not keep.any()
            assert selection.dropped_mass[t] == 1
            continue
        assert keep[own]
        dropped = mass[t][~keep].sum().item()
        assert selection.dropped_mass[t].item() == pytest.approx(dropped, abs=1e-6, rel=0)
        assert relative[t] * dropped <= MAX_WEIGHTED_MASS * (1 + 1e-5)
        assert_kept_above_threshold(keep, relative[t] * mass[t], own, tau, MAX_WEIGHTED_MASS)


def assert_kept_above_threshold(keep, weighted, own, tau, most):
    """Of the blocks [NB] of a row; `own` is the label's, if it is not negative."""
    others = [b for b in range(len(weighted)) if b != own]
    # The smallest kept and the largest dropped block are on either side of a threshold, which is τ or, where
    # the row would drop too much, τ halved as often as it takes.
    threshold = min(tau, 1.0)
    while sum(m for m in weighted[others].tolist() if m <= threshold) > most:
        threshold /= 2
    for b in others:
        if abs(weighted[b].item() / threshold - 1) > 1e-4:
            assert keep[b].item() == (weighted[b].item() > threshold)


def statistics_of_shards(n, vocab_size, cuts, sharpness, seed=0):
    """The same of each shard: labels that are in another are negative, 1 − p_y is the shard's part of it."""
    generator = torch.Generator().manual_seed(seed)
    z = sharpness * torch.randn(n, vocab_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (n,), generator=generator)
    g = torch.randn(n, generator=generator, dtype=torch.float64).float()
    lse = z.logsumexp(-1)
    z = z.scatter(1, targets[:, None], -math.inf)
    shards = []
    for start, end in itertools.pairwise([0, *cuts, vocab_size]):
        rest = torch.nn.functional.pad(z[:, start:end], (0, (start - end) % 128), value=-math.inf)
        block_lse = rest.unflatten(1, (-1, 128)).logsumexp(-1)
        mass = (block_lse - lse[:, None]).exp()
        own_targets = torch.where((targets >= start) & (targets < end), targets - start, -128)
        shards.append((block_lse.float(), lse.float(), mass.sum(1).float(), own_targets, mass))
    return shards, g


@given(
    n=st.integers(1, 20),
    vocab_size=st.integers(3, 2000),
    cuts=st.tuples(st.floats(0.01, 0.49), st.floats(0.51, 0.99)),
    sharpness=st.floats(0.1, 20.0),
    tau=st.sampled_from([1e-6, 2.0**-13, 1e-3, 0.1, 10.0]),
    seed=st.integers(0, 2**16),
)
def test_shards_select_by_the_rule_and_share_what_may_be_left_out(n, vocab_size, cuts, sharpness, tau, seed):
    cuts = sorted({min(max(int(cut * vocab_size), 1), vocab_size - 1) for cut in cuts})
    shards, g = statistics_of_shards(n, vocab_size, cuts, sharpness, seed)
    g[1::5] = 0.0
    relative = torch.where(g == 0, 0.0, g.abs() / gradient_scale(g)).double()
    total = torch.zeros(n, dtype=torch.float64)
    ends = [0, *cuts, vocab_size]
    for (*statistics, targets, mass), (start, end) in zip(shards, itertools.pairwise(ends), strict=True):
        share = (end - start) / vocab_size
        selection = select_pairs(*statistics, targets, g, tau, share)
        total += selection.dropped_mass.double()
        for t in range(n):
            keep = selection.keep[t]
            own = targets[t].item() // 128
            if g[t] == 0:
                assert not keep.any()
                continue
            assert own < 0 or keep[own]
            dropped = mass[t][~keep].sum().item()
            assert selection.dropped_mass[t].item() == pytest.approx(dropped, abs=1e-6, rel=0)
            assert_kept_above_threshold(keep, relative[t] * mass[t], own, tau, MAX_WEIGHTED_MASS * share)
    assert (relative * torch.where(g == 0, 0.0, total) <= MAX_WEIGHTED_MASS * (1 + 1e-5)).all()
    torch.testing.assert_close(total[g == 0], torch.ones_like(total[g == 0]))


def test_a_block_is_kept_for_the_sake_of_a_label_in_its_own_shard_alone():
    blocks = 6
    block_lse, lse = torch.full((3, blocks), -20.0), torch.zeros(3)  # no block has mass to speak of
    rest_mass = block_lse.exp().sum(1)
    targets = torch.tensor([300, -128, 0])  # the second row's label is in another shard
    selection = select_pairs(block_lse, lse, rest_mass, targets, torch.ones(3), 1e-3, share=0.5)
    assert selection.keep.nonzero().tolist() == [[0, 2], [2, 0]]


def test_largest_error_is_that_of_the_worst_row():
    block_lse, lse, one_minus_p, targets, g, mass = block_statistics(30, 1500, 6.0)
    selection = select_pairs(block_lse, lse, one_minus_p, targets, g, 1e-3)
    dropped = torch.where(selection.keep, 0.0, mass).sum(1)
    assert dropped.amax() > 0
    expected = (g.double().abs() * dropped).amax().item()
    left_out = DroppedMass.of(selection, count_pairs(selection.keep), g)
    assert left_out.largest_error.item() == pytest.approx(expected, rel=1e-4)


def test_a_few_large_gradients_do_not_decide_for_all():
    assert gradient_scale(torch.tensor([3.0, -2.0, 1.0, 0.0])) == 3.0
    assert gradient_scale(torch.tensor([500.0, -1.0, 1.0, 0.0, 0.0])) == 2 * 502 / 3


def test_scale_of_the_gradient_does_not_matter():
    *statistics, g, _ = block_statistics(30, 1500, 6.0)
    selections = [select_pairs(*statistics, g * scale, 1e-3) for scale in (1.0, 2.0**-100, 2.0**100)]
    assert all(torch.equal(selections[0].keep, other.keep) for other in selections[1:])


@pytest.mark.parametrize("where", ["g", "statistics"])
def test_rows_that_are_not_a_number_are_kept_whole(where):
    block_lse, lse, one_minus_p, targets, g, _ = block_statistics(10, 1500, 6.0)
    if where == "g":
        g[4] = math.nan
    else:
        block_lse[4, 2] = lse[4] = one_minus_p[4] = math.nan
    selection = select_pairs(block_lse, lse, one_minus_p, targets, g, 1e-3)
    assert selection.keep[4].all()


def test_an_infinite_gradient_is_kept_whole():
    block_lse, lse, one_minus_p, targets, g, _ = block_statistics(10, 1500, 6.0)
    g[4] = -math.inf
    assert select_pairs(block_lse, lse, one_minus_p, targets, g, 1e-3).keep[4].all()


def test_lists_are_per_block_with_ascending_rows():
    block_lse, lse, one_minus_p, targets, g, _ = block_statistics(30, 1500, 6.0)
    selection = select_pairs(block_lse, lse, one_minus_p, targets, g, 1e-3)
    counts = count_pairs(selection.keep)
    pairs = list_pairs(selection.keep, counts)
    expected = [(b, t) for b in range(12) for t in range(30) if selection.keep[t, b]]
    assert list(zip(pairs.block.tolist(), pairs.row.tolist(), strict=True)) == expected
    assert counts.total == len(expected)
    assert counts.share == len(expected) / (12 * 30)
    assert counts.per_block.tolist() == counts.per_block_host.tolist() == selection.keep.sum(0).tolist()
    assert counts.per_row.tolist() == counts.per_row_host.tolist() == selection.keep.sum(1).tolist()


@pytest.mark.parametrize(("name", "value"), [("_ROWS_AT_ONCE", 7), ("_MAX_NONZERO", 65)])
def test_selection_in_pieces_is_the_same(name, value, monkeypatch):
    *statistics, targets, g, _ = block_statistics(30, 1500, 6.0)

    def select():
        selection = select_pairs(*statistics, targets, g, 1e-3)
        pairs = list_pairs(selection.keep, count_pairs(selection.keep))
        return selection.keep, selection.dropped_mass, pairs.row, pairs.block

    whole = select()
    monkeypatch.setattr(focalkern.logps.selection, name, value)
    assert all(torch.equal(a, b) for a, b in zip(select(), whole, strict=True))


def test_no_token_is_a_share_of_one():
    selection = Selection(torch.empty(0, 3, dtype=torch.bool), torch.empty(0))
    assert count_pairs(selection.keep).share == 1.0


def test_automatic_threshold_follows_the_dtype():
    assert automatic_tau(torch.bfloat16) == 2.0**-13
    assert automatic_tau(torch.float16) == 2.0**-16
    assert automatic_tau(torch.float32) == 2.0**-29
