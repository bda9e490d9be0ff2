"""`linear_kl`: value and gradient against plain PyTorch, between (nearly) equal models, and its edges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, LOW_PRECISION
from hypothesis import given
from hypothesis import strategies as st
from largest import Largest
from problems import DTYPES, EPS, TRANSFORMS, Problem, assert_equal, each_dtype, kl_problem, transformed
from tolerance import assert_as_accurate, relative_error

from focalkern import linear_kl

BOTH = ("policy", "reference")


def measure(
    models: Problem, backend: str | None, dtype=None, leaves=None, **options
) -> dict[str, torch.Tensor]:
    """The KL, and its gradients by name; of the reference where there is no backend."""
    leaves = models.leaves(dtype) if leaves is None else leaves
    kl = models.plain_kl(leaves) if backend is None else models.run_kl(backend, leaves, **options)
    gradients = torch.autograd.grad(kl, list(leaves.values()), models.grad.to(kl.dtype))
    return {"KL": kl.detach(), **dict(zip(leaves, gradients, strict=True))}


def model(models: Problem, whose: str) -> Problem:
    return models if whose == "policy" else models.ref


def conditioning(models: Problem) -> dict[str, float]:
    """How many ulps of fp32 the KL and its gradients move when the logits move by one: what p and p_ref are
    known to, and p − p_ref, whose terms cancel."""
    models.ref.labels = models.labels
    (z, slope), (ref_z, _) = (transformed(x.logits(), models.transform) for x in (models, models.ref))
    log_p, ref_log_p = z.log_softmax(-1), ref_z.log_softmax(-1)
    p, ref_p = log_p.exp(), ref_log_p.exp()
    g = models.grad[models.keep].double()[:, None]
    limits = models.moves((g * (p + ref_p) * slope).abs(), g * (p - ref_p) * slope)
    # The larger of both models' logits counts, and at least 1.
    size = max(models.largest_logit(), models.ref.largest_logit(), 1.0)
    limits = {name: ratio * size / models.largest_logit() for name, ratio in limits.items()}
    kl = (ref_p * (ref_log_p - log_p)).sum(-1)
    moved = (p + ref_p * (1 + (ref_log_p - log_p).abs())).sum(-1)
    return {"KL": size * (moved.norm() / kl.norm()).item(), **limits}


def assert_matches(models: Problem, actual: dict[str, torch.Tensor]) -> None:
    naive, exact = measure(models, None), measure(models, None, torch.float64)
    limits = conditioning(models)
    for name, value in actual.items():
        assert_as_accurate(value, naive[name], exact[name], name, limits[name])


def assert_accurate(models: Problem, backend: str) -> None:
    actual = measure(models, backend)
    assert actual["KL"].dtype == torch.float32
    assert actual["KL"].shape == models.labels.shape
    assert not actual["KL"][~models.keep].any()
    assert {actual[name].dtype for name in models.tensors} == {models.hidden.dtype}
    assert_matches(models, actual)


def equal_models(*shape, distance: float = 0.0, **options) -> Problem:
    """The reference is the policy, but for a random distance."""
    models = kl_problem(*shape, **options)
    moved = {name: x + distance * torch.randn_like(x) for name, x in models.tensors.items()}
    models.ref = replace(models, **moved)
    return models


# Value and gradient


@pytest.mark.parametrize(
    ("transform", "has_bias"), [("plain", False), *((transform, True) for transform in TRANSFORMS)]
)
@each_dtype
def test_value_and_gradients_match_the_reference(dtype, transform, has_bias, backend):
    assert_accurate(
        kl_problem(2, 9, vocab_size=300, dtype=dtype, has_bias=has_bias, **TRANSFORMS[transform]), backend
    )


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "hidden_size", "ref_hidden_size"),
    [
        (DTYPES[0], 2, 1, 1),
        (DTYPES[-1], 127, 33, 64),
        (DTYPES[0], 128, 64, 1),
        (DTYPES[-1], 129, 1, 33),
        (DTYPES[0], 515, 33, 33),
        (DTYPES[-1], 515, 64, 96),
        (DTYPES[0], 4500, 8, 16),  # more than a chunk of the vocabulary
    ],
)
def test_odd_sizes_match_the_reference(dtype, vocab_size, hidden_size, ref_hidden_size, backend):
    sizes = {"hidden_size": hidden_size, "ref_hidden_size": ref_hidden_size, "vocab_size": vocab_size}
    assert_accurate(kl_problem(19, dtype=dtype, has_bias=True, **sizes), backend)


@given(
    shape=st.sampled_from([(1,), (7,), (2, 5), (17,), (2, 1, 9)]),
    sizes=st.tuples(*[st.integers(1, 70)] * 2),
    vocab_size=st.integers(2, 400),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    sharpness=st.floats(0.1, 8.0),
    transform=st.sampled_from(list(TRANSFORMS)),
    seed=st.integers(0, 10**6),
)
def test_random_problems_match_the_reference(
    backend, shape, sizes, vocab_size, dtype, has_bias, sharpness, transform, seed
):
    sizes = {"hidden_size": sizes[0], "ref_hidden_size": sizes[1], "vocab_size": vocab_size}
    options = {
        "dtype": dtype,
        "has_bias": has_bias,
        "sharpness": sharpness,
        "seed": seed,
        **TRANSFORMS[transform],
    }
    models = kl_problem(*shape, **sizes, **options)
    models.labels.view(-1)[0] = 0
    assert_accurate(models, backend)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_float64_gradients_match_finite_differences(transform):
    sizes = {"hidden_size": 3, "ref_hidden_size": 5, "vocab_size": 140}
    models = kl_problem(4, dtype=torch.float64, has_bias=True, **sizes, **TRANSFORMS[transform])
    models.labels[:] = torch.tensor([0, -100, 130, 2])
    leaves = models.leaves()

    def kl(*tensors):
        return models.run_kl("torch", dict(zip(leaves, tensors, strict=True)))

    assert kl(*leaves.values()).dtype == torch.float64
    torch.testing.assert_close(kl(*leaves.values()), models.plain_kl(leaves), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(kl, tuple(leaves.values()))


def test_a_vocabulary_of_one_leaves_nothing_to_diverge(backend):
    found = measure(kl_problem(2, 9, vocab_size=1, has_bias=True), backend)
    assert not any(x.any() for x in found.values())


def test_the_sum_along_a_sequence_is_tdpos_sequential_kl(backend):
    models = kl_problem(2, 9)
    sequential = models.run_kl(backend, shift=True).sum(-1)
    for b in range(2):
        predicts = models.keep[b, 1:].nonzero()[:, 0]
        logits, ref_logits = (
            x.hidden[b, predicts].double() @ x.weight.double().T for x in (models, models.ref)
        )
        expected = torch.nn.functional.kl_div(logits.log_softmax(-1), ref_logits.softmax(-1), reduction="sum")
        assert sequential[b].item() == pytest.approx(expected.item(), rel=1e-5)


# Equal and nearly equal models


@pytest.mark.parametrize(
    ("hidden_size", "transform"), [(33, "plain"), (64, "softcap"), (33, "all of them"), (64, "temperature")]
)
@each_dtype
def test_equal_models_have_no_divergence_and_no_gradient(hidden_size, dtype, transform, backend):
    options = {"dtype": dtype, "has_bias": True, **TRANSFORMS[transform]}
    found = measure(equal_models(2, 9, hidden_size=hidden_size, vocab_size=515, **options), backend)
    assert not any(x.any() for x in found.values())


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_divergence_of_nearly_equal_models_does_not_cancel(distance, backend):
    models = equal_models(2, 9, hidden_size=32, distance=distance)
    models.labels[:] = 0
    exact = models.plain_kl(models.leaves(torch.float64))
    # KL is about half the variance of the logits' difference, which is known to eps of a logit.
    models.ref.labels = models.labels
    allowed = 4 * EPS * models.largest_logit() / (models.logits() - models.ref.logits()).std()
    assert relative_error(models.run_kl(backend), exact) <= allowed


@given(distance=st.floats(1e-7, 1.0), sharpness=st.floats(0.1, 20.0), seed=st.integers(0, 10**6))
def test_the_divergence_is_never_negative(backend, distance, sharpness, seed):
    sizes = {"hidden_size": 16, "vocab_size": 200, "sharpness": sharpness}
    assert (equal_models(16, distance=distance, seed=seed, **sizes).run_kl(backend) >= 0).all()


# Offsets, saturation, removed entries


@pytest.mark.parametrize("whose", [("policy",), ("reference",), BOTH], ids="+".join)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_logits_changes_nothing_but_their_rounding(offset, whose, backend):
    models = kl_problem(2, 9, has_bias=True)
    models.bias.zero_()
    models.ref.bias.zero_()
    plain = measure(models, backend)
    for name in whose:
        model(models, name).bias.fill_(offset)
    moved = measure(models, backend)
    ulp = 2.0**-10  # of 1e4 in fp32; a log-prob of either model is known to that, and what they weigh
    assert ((moved["KL"] - plain["KL"]).abs() <= 2 * ulp * (1 + plain["KL"])).all()
    for name in ("hidden", "weight"):
        assert relative_error(moved[name], plain[name]) <= 2 * ulp


def test_logits_far_apart_give_a_large_but_finite_divergence(backend):
    hidden = torch.ones(2, 8, device=DEVICE)
    weight, ref_weight = torch.zeros(2, 300, 8, device=DEVICE)
    weight[7], ref_weight[200] = 1e3, 1e3  # logits of 8000 among zeros
    leaves = [hidden.clone().requires_grad_(), weight.requires_grad_()]
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    kl = linear_kl(*leaves, hidden, ref_weight, labels, backend=backend)
    assert kl.tolist() == [8000.0, 8000.0]
    _, dweight = torch.autograd.grad(kl.sum(), leaves)
    assert dweight[7].tolist() == [2.0] * 8
    assert dweight[200].tolist() == [-2.0] * 8
    assert dweight.count_nonzero() == 16


REMOVED = {
    "first": [0],
    "last": [299],
    "a whole block": list(range(128, 256)),
    "every third": list(range(0, 300, 3)),
    "all but two": list(range(2, 300)),
}


@pytest.mark.parametrize("removed", REMOVED.values(), ids=REMOVED)
class TestRemovedEntries:
    def test_of_both_models_take_no_part(self, removed, backend):
        models = kl_problem(2, 9, vocab_size=300, has_bias=True)
        kept = [v for v in range(300) if v not in set(removed)]
        smaller, smaller_ref = (
            replace(x, weight=x.weight[kept], bias=x.bias[kept]) for x in (models, models.ref)
        )
        smaller = replace(smaller, ref=smaller_ref, labels=models.labels.clamp(max=0))
        models.labels = smaller.labels
        for x in (models, models.ref):
            x.bias[removed] = -math.inf
        found = measure(models, backend)
        for name in ("weight", "bias"):
            assert not found[name][removed].any()
            found[name] = found[name][kept]
        assert_matches(smaller, found)

    def test_of_the_reference_add_nothing(self, removed, backend):
        models = kl_problem(2, 9, vocab_size=300, has_bias=True)
        kept = [v for v in range(300) if v not in set(removed)]
        models.ref.bias[removed] = -math.inf
        found = measure(models, backend)
        torch.testing.assert_close(found["KL"].double(), of_entries(models, kept), rtol=1e-5, atol=0)
        assert found["bias"][removed].any()  # what the policy gives them is pushed down
        assert torch.isfinite(found["weight"]).all()

    def test_of_the_policy_alone_make_the_divergence_infinite(self, removed, backend):
        models = kl_problem(2, 9, vocab_size=300, has_bias=True)
        models.bias[removed] = -math.inf
        found = measure(models, backend)
        assert torch.equal(found.pop("KL") == math.inf, models.keep)
        assert all(torch.isfinite(gradient).all() for gradient in found.values())


def of_entries(models: Problem, entries) -> torch.Tensor:
    """KL in float64 from the terms of some entries; the others' are 0."""
    models.ref.labels = models.labels
    log_p, ref_log_p = (x.logits().log_softmax(-1)[:, entries] for x in (models, models.ref))
    kl = (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1)
    return kl.new_zeros(models.labels.shape).masked_scatter(models.keep, kl)


def test_an_entry_removed_from_the_policy_costs_nothing_where_the_reference_has_no_mass_left(backend):
    models = kl_problem(2, 9, vocab_size=300, has_bias=True)
    models.ref.bias[128:256] = -1e3  # the whole block underflows
    models.bias[130] = -math.inf
    exact = of_entries(models, torch.arange(300, device=DEVICE) != 130)
    torch.testing.assert_close(models.run_kl(backend).double(), exact, rtol=1e-5, atol=0)


# NaN, inf and masks


@pytest.mark.parametrize(
    ("bad", "softcap"), [(math.nan, None), (math.inf, 5.0), (-math.inf, None), (math.nan, 5.0)]
)
@pytest.mark.parametrize("whose", BOTH)
class TestNonFiniteInputs:
    def test_in_hidden_gives_nan_there_alone(self, whose, bad, softcap, backend):
        models = kl_problem(2, 9, softcap=softcap)
        models.labels[:] = 5
        clean = models.run_kl(backend)
        model(models, whose).hidden[1, 3, 2] = bad
        spoiled = models.run_kl(backend)
        assert spoiled[1, 3].isnan()
        spoiled[1, 3] = clean[1, 3]
        assert torch.equal(spoiled, clean)

    def test_in_weight_gives_nan_everywhere(self, whose, bad, softcap, backend):
        models = kl_problem(2, 9, softcap=softcap)
        model(models, whose).weight[190, 3] = bad
        assert torch.equal(models.run_kl(backend).isnan(), models.keep)

    def test_at_a_masked_position_takes_no_part(self, whose, bad, softcap, backend):
        models, found = kl_problem(2, 9, has_bias=True, softcap=softcap), []
        for filling in (0.0, bad):
            model(models, whose).hidden[~models.keep] = filling
            found.append(measure(models, backend))
        assert_equal(*found)
        assert not found[1]["hidden"][~models.keep].any()


def test_non_finite_gradients_come_out_as_nan(backend):
    models = kl_problem(2, 9)
    models.hidden[models.keep] = math.nan
    found = measure(models, backend)
    assert found["hidden"][models.keep].isnan().all()
    assert found["weight"].isnan().all()


@pytest.mark.parametrize("shape", [(9,), (3, 5), (2, 2, 4), (3, 1)], ids=str)
def test_shift_equals_slicing(shape, backend):
    models = kl_problem(*shape)
    spoiled = models.labels.clone()
    spoiled[..., 0] = 10**6  # predicted by nothing: may be anything
    sliced = replace(models, hidden=models.hidden[..., :-1, :], labels=models.labels[..., 1:])
    sliced.ref = replace(models.ref, hidden=models.ref.hidden[..., :-1, :])
    sliced.grad = models.grad = models.grad[..., 1:]
    shifted, expected = measure(models, backend, labels=spoiled, shift=True), measure(sliced, backend)
    assert shifted["KL"].shape == spoiled[..., 1:].shape
    assert not shifted["hidden"][..., -1, :].any()
    shifted["hidden"] = shifted["hidden"][..., :-1, :]
    assert_equal(shifted, expected)


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
def test_packed_gives_the_same_as_padded(shift, backend):
    """Sequences of 4, 1, 0 and 6 tokens, their padding left out; and their sums, as TDPO takes them."""
    lengths = torch.tensor([4, 1, 0, 6], device=DEVICE)
    models = kl_problem(4, 6)
    real = torch.arange(6, device=DEVICE) < lengths[:, None]
    models.labels = torch.where(real, 5, -100)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    packed = replace(models, hidden=models.hidden[real], labels=models.labels[real])
    packed.ref = replace(models.ref, hidden=models.ref.hidden[real])
    models.grad, packed.grad = torch.ones(4, 6 - shift, device=DEVICE), torch.ones(11, device=DEVICE)
    expected = measure(models, backend, shift=shift)
    found = measure(packed, backend, shift=shift, cu_seqlens=cu_seqlens)
    sums = torch.segment_reduce(found["KL"], "sum", offsets=cu_seqlens)
    torch.testing.assert_close(sums, expected["KL"].sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["hidden"], expected["hidden"][real], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["weight"], expected["weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cu_seqlens", "exception", "message"),
    [
        (torch.tensor([0, 4, 3, 9]), ValueError, "must start at 0, never decrease and end at N = 9"),
        (torch.tensor([0, 8]), ValueError, "must start at 0, never decrease and end at N = 9"),
        (torch.tensor([0.0, 9.0]), TypeError, "must be int64 or int32"),
        (torch.tensor([9]), ValueError, r"must be \[S \+ 1\]"),
    ],
    ids=["falling", "short", "dtype", "one"],
)
def test_bad_boundaries_of_packed_sequences_are_refused(cu_seqlens, exception, message):
    with pytest.raises(exception, match=f"^cu_seqlens {message}"):
        kl_problem(9).run_kl("torch", cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"^hidden must be \[N, H\] when cu_seqlens is given"):
        kl_problem(3, 3).run_kl("torch", cu_seqlens=torch.tensor([0, 9]))


def test_the_ignored_label_may_be_a_token(backend):
    models = kl_problem(2, 9, vocab_size=4)
    labels = models.labels.where(models.keep, 3)
    inside = models.run_kl(backend, labels=labels, ignore_index=3)
    assert torch.equal(inside, models.run_kl(backend, labels=labels.masked_fill(labels == 3, -100)))
    assert torch.equal(inside == 0, labels == 3)


def test_a_batch_without_a_single_position_that_counts_has_zero_divergence_and_gradients(backend):
    models = kl_problem(2, 9, has_bias=True)
    models.labels.fill_(-100)
    assert not any(x.any() for x in measure(models, backend).values())


def test_labels_only_say_which_positions_count(backend):
    models = kl_problem(2, 9)
    other = models.labels.where(~models.keep, (models.labels + 17) % 200).int()
    assert torch.equal(models.run_kl(backend), models.run_kl(backend, labels=other))


# Which gradients come back


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden weight", "weight bias"])
def test_only_what_is_trained_gets_a_gradient_and_the_same_one(trained, backend):
    models = kl_problem(2, 9, has_bias=True)
    leaves, expected = models.leaves(trained=tuple(trained.split())), measure(models, backend)
    models.run_kl(backend, leaves).backward(models.grad)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]) if name in trained.split() else leaf.grad is None


def test_nothing_to_train_needs_no_graph(backend):
    models = kl_problem(2, 9)
    frozen = models.run_kl(backend)
    assert not frozen.requires_grad
    with torch.no_grad():
        inside = models.run_kl(backend, models.leaves())
    assert not inside.requires_grad
    assert torch.equal(frozen, inside)


def test_a_reference_with_parameters_is_taken_where_no_gradient_is_recorded(backend):
    models = kl_problem(2, 9)
    expected = models.run_kl(backend)
    models.ref.weight = torch.nn.Parameter(models.ref.weight)
    with torch.no_grad():
        assert torch.equal(models.run_kl(backend), expected)


def test_a_second_backward_through_one_forward_gives_the_same(backend):
    models = kl_problem(2, 9, has_bias=True, softcap=3.0)
    leaves = models.leaves()
    kl = models.run_kl(backend, leaves)
    first = torch.autograd.grad(kl, list(leaves.values()), models.grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(kl, list(leaves.values()), models.grad)))


def test_inputs_are_left_alone(backend):
    models, copy = (kl_problem(2, 9, has_bias=True, softcap=3.0) for _ in range(2))
    leaves = models.leaves()
    measure(models, backend, leaves=leaves)
    assert_equal(leaves, copy.tensors)
    assert_equal(models.ref.tensors, copy.ref.tensors)
    assert torch.equal(models.labels, copy.labels)
    assert torch.equal(models.grad, copy.grad)


@each_dtype
def test_two_runs_are_bitwise_equal(dtype, backend):
    models = kl_problem(3, 15, dtype=dtype, has_bias=True, softcap=5.0)
    assert_equal(*(measure(models, backend) for _ in range(2)))


# Memory layout and dtypes


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("whose", BOTH)
def test_non_contiguous_inputs_give_the_same(whose, name, backend):
    models = kl_problem(2, 9, has_bias=True)
    expected, x = measure(models, backend), getattr(model(models, whose), name)
    strided = torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    setattr(model(models, whose), name, strided)
    leaves = {name: x.detach().requires_grad_() for name, x in models.tensors.items()}
    assert_equal(measure(models, backend, leaves=leaves), expected)


def test_default_dtype_changes_nothing(backend):
    models = kl_problem(2, 9)
    expected = measure(models, backend)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_equal(measure(models, backend), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_autocast_casts_both_models_and_gradients_come_back_in_the_parameters_dtype(dtype, backend):
    models, narrow = kl_problem(2, 9, has_bias=True), kl_problem(2, 9, has_bias=True, dtype=dtype)
    models.ref.hidden = models.ref.hidden.to(dtype)
    leaves, by_hand = models.leaves(), models.leaves()
    with torch.autocast(DEVICE.type, dtype=dtype):
        kl = models.run_kl(backend, leaves)
    expected = narrow.run_kl(backend, {name: x.to(dtype) for name, x in by_hand.items()})
    assert kl.dtype == torch.float32
    assert torch.equal(kl, expected)
    kl.backward(models.grad)
    expected.backward(models.grad)
    assert_equal(*({name: x.grad for name, x in given.items()} for given in (leaves, by_hand)))
    assert {x.grad.dtype for x in leaves.values()} == {torch.float32}


# What is refused
BAD_INPUTS = {
    "hidden of another width": ({"hidden": torch.zeros(2, 3, 9)}, ValueError, "hidden", "H = 8"),
    "weight without entries": ({"weight": torch.zeros(0, 8)}, ValueError, "weight", "[V, H]"),
    "bias of another length": ({"bias": torch.zeros(11)}, ValueError, "bias", "[V] = [10]"),
    "ref_hidden is None": ({"ref_hidden": None}, TypeError, "ref_hidden", "NoneType"),
    "ref_hidden is int": (
        {"ref_hidden": torch.zeros(2, 3, 6, dtype=torch.int32)},
        TypeError,
        "ref_hidden",
        "int32",
    ),
    "ref_hidden of another width": (
        {"ref_hidden": torch.zeros(2, 3, 7)},
        ValueError,
        "ref_hidden",
        "H = 6, the width of ref_weight; got [2, 3, 7]",
    ),
    "ref_hidden of other tokens": (
        {"ref_hidden": torch.zeros(2, 4, 6)},
        ValueError,
        "ref_hidden",
        "the tokens of hidden, [2, 3]; got [2, 4, 6]",
    ),
    "ref_weight is a list": ({"ref_weight": [0.0]}, TypeError, "ref_weight", "torch.Tensor; got list"),
    "ref_weight is a vector": ({"ref_weight": torch.zeros(6)}, ValueError, "ref_weight", "[V, H]"),
    "ref_weight of another vocabulary": (
        {"ref_weight": torch.zeros(11, 6)},
        ValueError,
        "ref_weight",
        "V = 10, the vocabulary of weight; got [11, 6]",
    ),
    "ref_weight of another dtype": (
        {"ref_weight": torch.zeros(10, 6, dtype=torch.bfloat16)},
        TypeError,
        "ref_weight",
        "dtype of ref_hidden, torch.float32; got torch.bfloat16",
    ),
    "a reference of another dtype": (
        {
            "ref_hidden": torch.zeros(2, 3, 6, dtype=torch.bfloat16),
            "ref_weight": torch.zeros(10, 6, dtype=torch.bfloat16),
        },
        TypeError,
        "ref_hidden",
        "dtype of hidden, torch.float32; got torch.bfloat16",
    ),
    "a reference on another device": (
        {
            "ref_hidden": torch.zeros(2, 3, 6, device="meta"),
            "ref_weight": torch.zeros(10, 6, device="meta"),
        },
        ValueError,
        "ref_hidden",
        "device of hidden, cpu; got meta",
    ),
    "ref_bias of another length": ({"ref_bias": torch.zeros(9)}, ValueError, "ref_bias", "[V] = [10]"),
    "ref_bias of another dtype": (
        {"ref_bias": torch.zeros(10, dtype=torch.float64)},
        TypeError,
        "ref_bias",
        "dtype of ref_weight",
    ),
    "ref_hidden requires grad": (
        {"ref_hidden": torch.zeros(2, 3, 6, requires_grad=True)},
        ValueError,
        "ref_hidden",
        "constant; got a tensor that requires grad: detach it",
    ),
    "ref_weight is a parameter": (
        {"ref_weight": torch.nn.Parameter(torch.zeros(10, 6))},
        ValueError,
        "ref_weight",
        "detach it",
    ),
    "ref_bias requires grad": (
        {"ref_bias": torch.zeros(10, requires_grad=True)},
        ValueError,
        "ref_bias",
        "detach it",
    ),
    "labels of another shape": (
        {"labels": torch.zeros(2, 4, dtype=torch.int64)},
        ValueError,
        "labels",
        "[2, 3], the shape of hidden",
    ),
    "labels is float": ({"labels": torch.zeros(2, 3)}, TypeError, "labels", "int64 or int32"),
    "a label out of range": (
        {"labels": torch.tensor([[0, 1, 2], [3, 10, 4]])},
        ValueError,
        "labels",
        "got 10 at position [1, 1]",
    ),
    "no position to shift": (
        {
            "hidden": torch.zeros(2, 0, 8),
            "ref_hidden": torch.zeros(2, 0, 6),
            "labels": torch.zeros(2, 0, dtype=torch.int64),
            "shift": True,
        },
        ValueError,
        "labels",
        "at least one position",
    ),
    "shift is a number": ({"shift": 1}, TypeError, "shift", "True or False"),
    "ignore_index is None": ({"ignore_index": None}, TypeError, "ignore_index", "int"),
    "temperature is zero": ({"temperature": 0.0}, ValueError, "temperature", "> 0"),
    "softcap is negative": ({"softcap": -1.0}, ValueError, "softcap", "> 0"),
    "logit_scale is NaN": ({"logit_scale": math.nan}, ValueError, "logit_scale", "finite"),
    "an unknown backend": ({"backend": "cuda"}, ValueError, "backend", "'triton'"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_by_name(case):
    changes, exception, name, said = BAD_INPUTS[case]
    inputs = {
        "hidden": torch.zeros(2, 3, 8),
        "weight": torch.zeros(10, 8),
        "ref_hidden": torch.zeros(2, 3, 6),
        "ref_weight": torch.zeros(10, 6),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
    }
    with pytest.raises(exception, match=rf"^{name} must (be|have) ") as refused:
        linear_kl(**inputs | changes)
    assert said in str(refused.value)


def test_no_tensor_is_as_large_as_the_logits():
    models = kl_problem(2048, hidden_size=16, ref_hidden_size=16, vocab_size=8192)
    with Largest() as largest:
        models.run_kl("torch", models.leaves()).sum().backward()
    assert 0 < largest.elements <= 2048 * 8192 / 4
