"""The products that give exp(z − S) on CPUs, coarse ones too: against float64, and against the dense logits.

Small problems are made to suit. Where a CPU has no bf16 instructions, torch emulates them.
"""

from __future__ import annotations

import math

import pytest
import torch
from problems import Problem, outcome, sharp_problem
from tolerance import relative_error

import focalkern.logps.function
from focalkern import torch_logits
from focalkern.logps import (
    torch_certified,
    torch_coarse,
    torch_coarse_backward,
    torch_exp,
    torch_form,
    torch_pairs,
)
from focalkern.logps.torch_exp import Sampled
from focalkern.logps.torch_form import block_statistics
from focalkern.records import Head, LogitTransform

BF16 = torch.bfloat16
DENSE = torch_form._dense_statistics
PROBLEMS = {
    "plain": {},
    "a narrow last block": {"vocab_size": 1290},
    "several tiles of rows": {"tokens": 150},
    "low-rank update": {"rank": 5},
    "fp16": {"dtype": torch.float16},
}


@pytest.fixture(autouse=True)
def take(request, monkeypatch):
    """Chooses "coarse" products, "one product" in fp32 or "dense" logits; coarse ones in the beginning.

    Dense logits that were not chosen fail the test, unless it has `or_dense`.
    """
    way = getattr(request, "param", "coarse")
    if way == "coarse" and not torch_coarse._is_accurate():
        pytest.skip("this CPU's bf16 products are not the rounded ones: the library does not take them")

    def choose(way: str) -> None:
        monkeypatch.setattr(torch_form, "_dense_statistics", DENSE if way == "dense" else refused)
        monkeypatch.setattr(torch_coarse, "_is_trusted", way == "coarse")
        monkeypatch.setattr(torch_exp, "_is_fp32_accurate", way != "dense")

    def refused(*args):
        pytest.fail("the dense forward")

    monkeypatch.setattr(torch_logits, "_MAX_VOCAB_CHUNK", 512)
    monkeypatch.setattr(torch_exp, "_MIN_SIZE", 0)
    monkeypatch.setattr(torch_form, "TILE_ROWS", 64)
    monkeypatch.setattr(torch_form, "_MIN_ROWS", 64)
    monkeypatch.setattr(torch_exp, "_GATHERED", 48 * 16)
    monkeypatch.setattr(torch_coarse, "_MAX_SHARE_OF_ROW", 1.0)
    monkeypatch.setattr(torch_coarse, "_MAX_SHARE", 1.0)
    monkeypatch.setattr(torch_coarse, "_WIDE", 48 * 100)
    monkeypatch.setattr(torch_coarse, "_MAX_FOUND", 1000)
    monkeypatch.setattr(torch_pairs, "_GROUP_ROWS", 64)
    choose(way)
    return choose


@pytest.fixture
def or_dense(take, monkeypatch):
    monkeypatch.setattr(torch_form, "_dense_statistics", DENSE)


by_both = pytest.mark.parametrize("take", ["coarse", "one product"], indirect=True)


@pytest.fixture
def calls(monkeypatch):
    """Module and dtype of each product that gave exp(z − S)."""
    made, product = [], torch_exp.exp_product

    def noted_of(module):
        def noted(hidden, *others):
            made.append((module, hidden.dtype))
            return product(hidden, *others)

        return noted

    for module in (torch_exp, torch_coarse_backward):
        monkeypatch.setattr(module, "exp_product", noted_of(module))
    return made


def measure(problem: Problem, **options):
    leaves = problem.leaves(
        trained=options.pop("trained", ("hidden", "weight", "update_hidden", "update_weight"))
    )
    result = problem.run("torch", leaves, **options)
    return result, outcome(problem, result, leaves)


def likeliest(problem: Problem) -> torch.Tensor:
    labels = problem.labels.clone()
    labels[problem.keep] = problem.logits().argmax(1)
    return labels


@pytest.mark.parametrize("backward", ["certified", "exact"])
@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS.keys())
@by_both
def test_values_and_gradients_are_as_accurate_as_of_dense_logits(options, backward, take, calls):
    problem = sharp_problem(**{"dtype": BF16, **options})
    problem.labels[..., ::2] = likeliest(problem)[..., ::2]
    _, found = measure(problem, backward=backward)
    if torch_coarse._is_trusted and problem.hidden.dtype == BF16:
        assert set(calls) == {(torch_exp, BF16), (torch_coarse_backward, BF16)}
    else:
        assert set(calls) == {(torch_exp, torch.float32)}
    take("dense")
    calls.clear()
    _, by_fp32 = measure(problem, backward=backward)
    assert not calls
    leaves = problem.leaves(torch.float64)
    exact = outcome(problem, problem.plain(leaves), leaves)
    assert (found["logps"].double() - exact["logps"]).abs().max() < 1e-5 * problem.largest_logit()
    for name in found.keys() - {"logps"}:
        of_fp32 = relative_error(by_fp32[name], exact[name])
        assert relative_error(found[name], exact[name]) <= 1.05 * of_fp32 + 1e-5, name


@pytest.mark.parametrize("backward", ["certified", "exact"])
def test_the_gradient_of_a_label_of_many_rows_is_rounded_once(backward):
    """16 rows are added at a time, to sums in fp32."""
    problem = sharp_problem(300, dtype=BF16)
    label = int(likeliest(problem)[problem.keep][0])
    problem.labels[problem.keep] = label
    _, found = measure(problem, backward=backward)
    leaves = problem.leaves(torch.float64)
    exact = outcome(problem, problem.plain(leaves), leaves)["weight"][label]
    # √2: the label's row of dweight has been rounded before, with the small entries.
    assert relative_error(found["weight"][label], exact) <= 1.5 * relative_error(exact.to(BF16), exact)


def test_the_dropped_mass_is_exact(monkeypatch):
    kept, list_pairs = [], focalkern.logps.function.list_pairs
    monkeypatch.setattr(
        focalkern.logps.function,
        "list_pairs",
        lambda keep, counts: kept.append(keep) or list_pairs(keep, counts),
    )
    problem = sharp_problem(200, vocab_size=4096, dtype=BF16, sharpness=12.0)
    result, _ = measure(problem, tau=2.0**-11)
    p = problem.logits().softmax(-1).view(-1, 32, 128).sum(-1)
    dropped = torch.where(kept[-1], 0.0, p).sum(1)
    assert dropped.max() > 1e-3
    # Rows of small gradient drop much: there the rounding of fp32 logits shows.
    rounding = dropped * problem.largest_logit() * 2.0**-23
    assert ((result.dropped_mass[problem.keep] - dropped).abs() <= 1e-6 + rounding).all()


@by_both
@pytest.mark.parametrize("offset", [0.0, 1008.0])
def test_every_block_has_its_mass(offset, take):
    """To the rounding of fp32; small entries of coarse products to that of bf16."""
    problem = sharp_problem(100, vocab_size=4096, dtype=BF16)
    ulp = offset * 2.0**-23
    if offset:
        problem.hidden[:, 0], problem.weight[:, 0] = 64.0, offset / 64
    hidden, labels = problem.hidden[problem.keep], problem.labels[problem.keep]
    elsewhere = torch.where(torch.arange(len(labels)) % 3 == 0, -128, labels)  # in another vocabulary shard
    found = block_statistics(Head(hidden, problem.weight), elsewhere, LogitTransform(), ())
    z = problem.logits()
    here = (elsewhere >= 0).nonzero().squeeze(1)
    target_z = torch.full_like(z[:, 0], -torch.inf)
    target_z[here] = z[here, labels[here]]
    z[here, labels[here]] = -torch.inf
    torch.testing.assert_close(found.target_z.double(), target_z, rtol=1e-6, atol=1e-5 + 4 * ulp)
    p = z.softmax(1)
    small = torch.where(p <= 2 * torch_coarse._THRESHOLDS[0], p, 0.0).view(len(labels), 32, 128).sum(-1)
    mass = p.view(len(labels), 32, 128).sum(-1)
    assert 0.1 < (small / mass).mean() < 0.9
    rounding = 1e-5 + 8 * ulp
    error = ((found.lse - z.logsumexp(1, keepdim=True)).exp() - mass).abs()
    assert (error <= rounding * mass + 2.0**-8 * small * torch_coarse._is_trusted).all()
    assert (found.lse.logsumexp(1) - z.logsumexp(1)).abs().max() < rounding


@pytest.mark.parametrize("trained", ["hidden", "weight"])
@pytest.mark.parametrize("backward", ["certified", "exact"])
def test_only_the_gradients_that_are_needed(backward, trained):
    problem = sharp_problem(dtype=BF16)
    both, alone = (
        measure(problem, backward=backward, trained=names)[1] for names in (("hidden", "weight"), (trained,))
    )
    assert torch.equal(alone[trained], both[trained])


@by_both
@pytest.mark.parametrize("name", ["hidden", "weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_as_nan(name, value, take, or_dense):
    """The weight's is in a row that no sample of entries holds; its logits are all +inf, or all −inf."""
    problem = sharp_problem(dtype=BF16)
    problem.hidden[..., 7].abs_()
    getattr(problem, name).flatten(0, -2)[0 if name == "hidden" else 3, 7] = value
    result, found = measure(problem)
    assert result.logps[problem.keep][0].isnan()
    assert found["hidden"].isnan().any()


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 60.0},
        {"temperature": 0.7},
        {"has_bias": True},
        {"dtype": torch.float32},
        {"outputs": ("entropy",)},
    ],
    ids=str,
)
def test_other_heads_have_dense_logits(options, calls, or_dense):
    options = {"dtype": BF16, "outputs": (), **options}
    outputs = options.pop("outputs")
    sharp_problem(**options).run("torch", outputs=outputs)
    assert not calls


def test_a_gradient_of_the_entropy_takes_dense_logits(calls, or_dense):
    problem = sharp_problem(dtype=BF16)
    leaves = problem.leaves()
    result = problem.run("torch", leaves, outputs=("entropy",))
    (result.logps + result.entropy).sum().backward()
    assert leaves["hidden"].grad.any()
    assert not calls


@by_both
@pytest.mark.parametrize("backward", ["certified", "exact"])
def test_rows_may_have_logits_of_any_size(backward, take):
    problem = sharp_problem(dtype=BF16)
    tokens = problem.keep.nonzero()
    for factor, at in zip((16.0, 0.0), tokens, strict=False):
        problem.hidden[tuple(at)] *= factor
    leaves = problem.leaves(torch.float64)
    exact = outcome(problem, problem.plain(leaves), leaves)
    _, found = measure(problem, backward=backward)
    assert (found["logps"].double() - exact["logps"]).abs().max() < 1e-6 * problem.largest_logit()
    for name in ("hidden", "weight"):
        assert relative_error(found[name], exact[name]) < 4e-3


@by_both
def test_a_shift_that_is_not_found_leaves_it_to_dense_logits(take):
    problem = sharp_problem(dtype=BF16)
    head, labels = Head(problem.hidden[problem.keep], problem.weight), problem.labels[problem.keep]
    sampled = Sampled.of(head, labels, torch_coarse._thresholds)
    dtype = BF16 if torch_coarse._is_trusted else torch.float32
    assert sampled._replace(lse=sampled.lse - 3000).block_statistics(dtype) is None
    assert sampled._replace(lse=sampled.lse + 100).block_statistics(dtype) is None


@by_both
def test_the_default_dtype_does_not_matter(take):
    problem = sharp_problem(dtype=BF16)
    expected, _ = measure(problem)
    for dtype in (BF16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = problem.run("torch", problem.leaves())
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found.logps, expected.logps)


@pytest.mark.parametrize("offset", [-9984.0, 9984.0])
@pytest.mark.parametrize("backward", ["certified", "exact"])
def test_a_common_offset_of_the_logits_does_not_shift_them_out_of_range(backward, offset, take):
    problem = sharp_problem(dtype=BF16, sharpness=4.0)
    problem.hidden[:, 0], problem.weight[:, 0] = 64.0, offset / 64
    leaves = problem.leaves(torch.float64)
    exact = outcome(problem, problem.plain(leaves), leaves)
    errors = []
    for way in ("coarse", "dense"):
        take(way)
        _, found = measure(problem, backward=backward)
        # The offset's own column is a sum of all dz, which is 0.
        errors.append(relative_error(found["hidden"][:, 1:], exact["hidden"][:, 1:]))
    assert errors[0] <= 1.05 * errors[1] + 1e-5


@pytest.mark.parametrize(
    ("n", "expected"), [(1, [1]), (63, [63]), (64, [32, 32]), (129, [32, 32, 32, 33]), (256, [64] * 4)]
)
def test_the_rows_of_a_forward_are_split_evenly(n, expected, monkeypatch):
    sizes, statistics = [], torch_coarse.block_statistics
    monkeypatch.setattr(
        torch_coarse, "block_statistics", lambda head, y: sizes.append(len(y)) or statistics(head, y)
    )
    weight = torch.randn(512, 16).to(BF16)
    found = block_statistics(Head(torch.randn(n, 16).to(BF16), weight), torch.arange(n), LogitTransform(), ())
    assert sorted(sizes) == expected
    assert found.lse.shape == (n, 4)


def test_the_pairs_of_a_backward_are_split_evenly(monkeypatch):
    sizes, sums = [], torch_certified.sums_in_two_threads

    def noted(work, halves, *others):
        sizes.append([sum(part.size for part in parts) for parts in halves])
        sums(work, halves, *others)

    monkeypatch.setattr(torch_certified, "sums_in_two_threads", noted)
    measure(sharp_problem(300, vocab_size=4096, dtype=BF16, sharpness=9.0))
    assert 0.4 < sizes[0][0] / sum(sizes[0]) < 0.6


@pytest.mark.parametrize("backward", ["certified", "exact"])
def test_the_number_of_threads_does_not_show(backward, calls):
    problem, threads = sharp_problem(300, vocab_size=4096, dtype=BF16, sharpness=9.0), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(measure(problem, backward=backward)[1])
            assert torch.get_num_threads() == count
        expected = problem.run("torch").logps
        with torch.inference_mode():
            assert torch.equal(problem.run("torch").logps, expected)
    finally:
        torch.set_num_threads(threads)
    for name in found[0]:
        assert torch.equal(*(gradients[name] for gradients in found)), name
    assert set(calls) == {(torch_exp, BF16), (torch_coarse_backward, BF16)}


def test_a_product_that_is_off_is_not_trusted_again(monkeypatch):
    product = torch_exp.exp_product
    problem = sharp_problem(dtype=BF16)
    monkeypatch.setattr(torch_exp, "exp_product", lambda *operands: product(*operands) * 1.05)
    torch_coarse.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="less accurate than bf16"):
        _, found = measure(problem)
    assert not torch_coarse._is_trusted
    _, by_fp32 = measure(problem)
    assert torch.equal(found["logps"], by_fp32["logps"])


@pytest.mark.parametrize(("dtype", "error"), [(BF16, 2.0**-7), (torch.float32, 2.0**-17)])
def test_a_logistic_function_that_is_off_is_not_taken(dtype, error, monkeypatch):
    product = torch_exp.exp_product
    assert torch_exp.is_exp_accurate(dtype, error)
    monkeypatch.setattr(torch_exp, "exp_product", lambda *operands: product(*operands) * (1 + 2 * error))
    assert not torch_exp.is_exp_accurate(dtype, error)


@pytest.mark.parametrize("size", [(64, 64, 48), (3, 1, 4096), (1000, 1, 128)], ids=str)
def test_single_logits(size, monkeypatch):
    columns, rows, width = size
    weight, hidden = torch.randn(columns, width), torch.randn(rows, width)
    v, row = (torch.rand(columns, rows) < 0.3).nonzero(as_tuple=True)
    exact = (weight.double() @ hidden.double().t())[v, row]
    z = torch_coarse.logits_at(v, row, weight, hidden)
    torch.testing.assert_close(z.double(), exact, rtol=1e-6, atol=1e-5 * math.sqrt(width))
    assert torch_coarse._is_accurate()
    monkeypatch.setattr(torch_coarse, "logits_at", lambda *operands: torch.zeros(2))
    assert not torch_coarse._is_accurate()


@pytest.mark.parametrize("rows", [1, 8, 13, 200])
def test_entries_above_a_limit(rows):
    y, limit = torch.rand(rows, 50).to(BF16), torch.rand(50).mul(1.5).to(BF16)
    y[y < 0.1] = 0.0
    limit[:2] = 0.0
    place, value = torch_coarse.entries_above(torch_coarse.bits(y), torch_coarse.bits(limit))
    assert torch.equal(place, (y > limit).view(-1).nonzero().squeeze(1))
    assert torch.equal(value.view(BF16), y.view(-1)[place])


@pytest.mark.parametrize("at_once", [1, 2**19])
def test_large_entries_are_made_exact_once_the_mass_is_known(at_once, monkeypatch):
    """Or when too many have been found; most of them where the last tiles have the mass."""
    counts, logits_at = [], torch_coarse.logits_at
    monkeypatch.setattr(
        torch_coarse, "logits_at", lambda v, *others: counts.append(len(v)) or logits_at(v, *others)
    )
    monkeypatch.setattr(torch_coarse, "_MAX_FOUND", at_once)
    monkeypatch.setattr(torch_coarse, "_WIDE", 2**30)
    problem = sharp_problem(60, vocab_size=4096, dtype=BF16)
    z = problem.logits()
    problem.weight[:] = problem.weight[z.logsumexp(0).argsort()]
    hidden, labels = problem.hidden[problem.keep][:32], problem.labels[problem.keep][:32]
    block_statistics(Head(hidden, problem.weight), labels, LogitTransform(), ())
    z = problem.logits()[:32].scatter_(1, labels[:, None], -torch.inf)
    large = (z.softmax(1) > torch_coarse._THRESHOLDS[0]).sum()
    assert len(counts) == (1 if at_once > 1 else 8)
    assert sum(counts) >= large
    assert (sum(counts) <= 1.2 * large) == (at_once > 1)


def test_the_sums_of_coarse_blocks_are_not_rounded_to_bf16():
    problem = sharp_problem(100, vocab_size=4096, dtype=BF16)
    hidden, labels = problem.hidden[problem.keep], problem.labels[problem.keep]
    shift = problem.logits().logsumexp(1).float() + 20
    y, sums = torch_exp._exp_without_labels(problem.weight, hidden, shift, labels)
    exact = y.double().view(32, 128, -1).sum(1)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0.0)
    assert (y[labels, torch.arange(len(labels))] == 0).all()


@pytest.mark.parametrize("rows", [0, 1, 8, 20, 64])
def test_rows_of_equal_logits_whose_roundings_add_up_take_fp32(rows, calls, monkeypatch):
    """Hidden states of zero, as of a head that is filled with zeros."""
    monkeypatch.setattr(torch_coarse, "_THRESHOLDS", (2.0**-10,))
    monkeypatch.setattr(torch_coarse, "_MAX_ERROR", 1.0)
    monkeypatch.setattr(torch_coarse, "_MAX_SUM", 4e-4)
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(size, 16, generator=generator) for size in (8192, 64))
    hidden /= 8
    hidden[torch.arange(rows) * 64 // max(rows, 1)] = 0.0  # as many in both halves
    head, labels = Head(hidden.to(BF16), weight.to(BF16)), torch.arange(64)
    found = block_statistics(head, labels, LogitTransform(), ())
    of_rows = {torch.float32} if rows >= 20 else {torch.float32, BF16} if rows else {BF16}
    assert {dtype for _, dtype in calls} == of_rows
    z = head.hidden.double() @ head.weight.double().t()
    z[labels, labels] = -torch.inf
    torch.testing.assert_close(found.lse.logsumexp(1).double(), z.logsumexp(1), rtol=0.0, atol=1e-4)


def test_rows_whose_entries_are_all_large_take_fp32(calls, monkeypatch):
    monkeypatch.setattr(torch_coarse, "_MAX_SHARE_OF_ROW", 0.16)
    monkeypatch.setattr(torch_coarse, "_MAX_SHARE", 0.1)
    problem = sharp_problem(100, vocab_size=4096, dtype=BF16)
    hidden, labels = problem.hidden[problem.keep], problem.labels[problem.keep]
    hidden[::8] /= 16
    block_statistics(Head(hidden, problem.weight), labels, LogitTransform(), ())
    assert {dtype for _, dtype in calls} == {torch.float32, BF16}
    calls.clear()
    monkeypatch.setattr(torch_coarse, "_MAX_SHARE", 0.0)
    block_statistics(Head(hidden, problem.weight), labels, LogitTransform(), ())
    assert {dtype for _, dtype in calls} == {torch.float32}


@by_both
def test_a_shift_that_turns_out_too_low_is_raised(take):
    problem = sharp_problem(100, vocab_size=4096, dtype=BF16)
    head, labels = Head(problem.hidden[problem.keep], problem.weight), problem.labels[problem.keep]
    sampled = Sampled.of(head, labels, torch_coarse._thresholds)
    lower = sampled._replace(lse=sampled.lse - 60.0 * (torch.arange(len(labels)) % 2))
    dtype, after = torch.float32, None
    if torch_coarse._is_trusted:
        dtype, after = BF16, torch_coarse._LargeEntries(head, sampled.judgement).find
    expected, found = (x.block_statistics(dtype, after) for x in (sampled, lower))
    torch.testing.assert_close(found.lse, expected.lse, rtol=0.0, atol=2.0**-7)
    torch.testing.assert_close(found.lse.logsumexp(1), expected.lse.logsumexp(1), rtol=0.0, atol=1e-5)


@by_both
@pytest.mark.parametrize("distance", [10.0, 36.0, 60.0, 80.0])
def test_what_is_beside_a_confident_label_is_not_lost(distance, take):
    """1 − p of the label is 8191·exp(−distance)."""
    hidden, weight = torch.zeros(64, 16), torch.zeros(8192, 16)
    hidden[:, 0], weight[0, 0] = distance, 1.0
    hidden[5, 1], weight[:, 1] = 40.0, 1.0
    hidden[:, 2:], weight[:, 2:] = torch.randn(64, 14), torch.randn(8192, 14) / 2
    head = Head(hidden.to(BF16), weight.to(BF16))
    found = block_statistics(head, torch.zeros(64).long(), LogitTransform(), ())
    rest = (head.hidden.double() @ head.weight.double().t())[:, 1:].logsumexp(1)
    torch.testing.assert_close(found.lse.logsumexp(1).double(), rest, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("backward", ["certified", "exact"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 65536.0, 1e34, math.inf, math.nan])
def test_gradients_of_any_size(scale, backward, take):
    """Of flat rows, where small entries show; not finite where a loss scale is too large."""
    problem = sharp_problem(60, vocab_size=2048, dtype=BF16, sharpness=2.0)
    problem.grad[0] *= scale
    _, found = measure(problem, backward=backward, trained=("hidden", "weight"))
    take("dense")
    _, dense = measure(problem, backward=backward, trained=("hidden", "weight"))
    leaves = problem.leaves(torch.float64)
    exact = outcome(problem, problem.plain(leaves), leaves)
    for name in ("hidden", "weight"):
        assert torch.equal(found[name].isfinite(), dense[name].isfinite())
        if math.isfinite(scale):
            of_dense = relative_error(dense[name], exact[name])
            assert relative_error(found[name], exact[name]) <= 1.05 * of_dense + 1e-5, name


@pytest.mark.parametrize("offset", [-9984.0, -128.0, 1008.0, 6000.0, 9984.0])
@pytest.mark.parametrize("hidden_size", [48, 2048])
def test_an_offset_is_not_taken_for_an_error_of_the_products(hidden_size, offset):
    problem = sharp_problem(100, vocab_size=2048, dtype=BF16, hidden_size=hidden_size)
    problem.hidden[:, 0], problem.weight[:, 0] = 64.0, offset / 64
    problem.run("torch")
    assert torch_coarse._is_trusted
