"""`FusedFocalPOLoss`: every field of its output and its gradient against the reference, in every layout.

Gradients over random problems are in `test_gradients.py`, the objective's numerics in `test_objective.py`.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import DEVICE, LOW_PRECISION
from problems import EPS, Batch, Leaves, assert_equal, batch, each_dtype, each_wide_dtype
from tolerance import assert_as_accurate

from focalkern import Certificate, FocalPOOutput, FusedFocalPOLoss, linear_logps, reference
from focalkern.pairs.objective import MODULATIONS

FIELDS = ("losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "prob", "weight")
OBJECTIVES = {
    "plain": {},
    "margin": {"margin": 0.7},
    "negative margin": {"margin": -0.3},
    "length_normalize": {"length_normalize": True, "beta": 2.0},
    "label_smoothing": {"label_smoothing": 0.2},
    "half label_smoothing": {"label_smoothing": 0.5},
    "reference_free": {"reference_free": True},
    "SimPO": {"reference_free": True, "length_normalize": True, "beta": 2.0, "margin": 1.0},
    "everything": {"length_normalize": True, "label_smoothing": 0.1, "margin": 0.4, "beta": 1.5},
}
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "packed"])
SHIFTS = pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])


def expected_fields(pairs: Batch, gamma: float, modulation: str, options: dict) -> dict[str, torch.Tensor]:
    """Each field by its definition, in float64; `weight` by autograd."""
    objective = {"beta": 0.1, "margin": 0.0, "label_smoothing": 0.0, **options}
    reference_free = objective.pop("reference_free", False)
    normalize = objective.pop("length_normalize", False)
    logps = pairs.plain(pairs.leaves(torch.float64)).logps.detach().sum(-1)
    lengths = pairs.keep.sum(-1)
    refs = torch.cat(list(pairs.refs.values())).double()
    divisor = lengths if normalize else torch.ones_like(lengths)
    score = (logps if reference_free else logps - refs) / divisor
    score_w, score_l = score.chunk(2)
    u = (objective["beta"] * (score_w - score_l) - objective["margin"]).requires_grad_()
    # `pair_losses` of u itself: β = 1, no reference, no margin.
    own = reference.pair_losses(
        u, 0, 0, 0, beta=1, gamma=gamma, modulation=modulation, label_smoothing=objective["label_smoothing"]
    )
    chosen_logps, rejected_logps = logps.chunk(2)
    chosen_rewards, rejected_rewards = (objective["beta"] * score).chunk(2)
    return {
        "losses": own,
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "prob": torch.sigmoid(u),
        "weight": -torch.autograd.grad(own.sum(), u, retain_graph=True)[0],
        "lengths": lengths,
    }


def assert_fields_match(out: FocalPOOutput, expected: dict[str, torch.Tensor], beta: float, dtype) -> None:
    """Every field follows the sums of log-probs by a factor of no more than max(1, β): losses, p and dL/du
    have slopes below 1 for γ ≤ 1. A sum is known to a few ulps of its size: T roundings of T terms."""
    size = max(expected["chosen_logps"].abs().max().item(), expected["rejected_logps"].abs().max().item())
    allowed = 8 * torch.finfo(dtype).eps * size * max(1.0, beta)
    for name in FIELDS:
        actual, exact = getattr(out, name), expected[name].detach()
        assert actual.dtype == dtype, name
        torch.testing.assert_close(
            actual.detach().double(), exact, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert out.lengths.tolist() == expected["lengths"].tolist()


def fields(out: FocalPOOutput) -> dict[str, torch.Tensor]:
    return {name: getattr(out, name).detach() for name in (*FIELDS, "lengths")}


# Values


@pytest.mark.parametrize(
    ("modulation", "objective"),
    [
        *zip(MODULATIONS * 3, OBJECTIVES, strict=True),
        *((modulation, "everything") for modulation in MODULATIONS[:2]),
    ],
)
@each_wide_dtype
def test_every_field_matches_its_definition(backend, dtype, modulation, objective):
    options, pairs = OBJECTIVES[objective], batch(dtype=dtype, has_bias=True)
    loss_fn = FusedFocalPOLoss(gamma=0.5, modulation=modulation, backend=backend, **options)
    expected = expected_fields(pairs, 0.5, modulation, options)
    assert_fields_match(pairs.loss(loss_fn), expected, loss_fn.beta, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduction_is_over_pairs_and_only_the_loss_is_differentiable(reduction, backend):
    pairs = batch()
    out = pairs.loss(FusedFocalPOLoss(reduction=reduction, backend=backend), pairs.leaves())
    assert torch.equal(out.loss, out.losses if reduction == "none" else getattr(out.losses, reduction)())
    assert out.losses.shape == (pairs.pairs,)
    assert out.loss.requires_grad
    assert out.losses.requires_grad == (reduction == "none")
    for name in (*FIELDS[1:], "lengths", "dropped_mass", "kept_share"):
        assert not getattr(out, name).requires_grad, name


def test_log_probs_are_sums_also_when_length_normalised(backend):
    plain = batch().loss(FusedFocalPOLoss(backend=backend))
    normalised = batch().loss(FusedFocalPOLoss(length_normalize=True, backend=backend))
    assert torch.equal(plain.chosen_logps, normalised.chosen_logps)
    assert torch.equal(plain.rejected_logps, normalised.rejected_logps)


def test_given_references_are_not_used_when_reference_free(backend):
    pairs, loss_fn = batch(), FusedFocalPOLoss(reference_free=True, backend=backend)
    without = pairs.loss(loss_fn, ref_chosen_logps=None, ref_rejected_logps=None)
    assert_equal(fields(pairs.loss(loss_fn)), fields(without))


@pytest.mark.parametrize("ref_dtype", [torch.float64, torch.float16])
def test_references_may_have_another_dtype(ref_dtype, backend):
    pairs, loss_fn = batch(), FusedFocalPOLoss(backend=backend)
    refs = {name: x.to(ref_dtype) for name, x in pairs.refs.items()}
    expected = pairs.loss(loss_fn, **{name: x.float() for name, x in refs.items()})
    assert_equal(fields(pairs.loss(loss_fn, **refs)), fields(expected))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"softcap": 4.0},
        {"logit_scale": 0.5},
        {"ignore_index": 3},
        {"temperature": 1.5, "softcap": 3.0, "logit_scale": 2.0},
    ],
    ids="+".join,
)
def test_head_options_reach_the_log_probs(options, backend):
    pairs = batch(has_bias=True)
    if "ignore_index" in options:
        pairs.labels[~pairs.keep] = options["ignore_index"]
    out = pairs.loss(FusedFocalPOLoss(backend=backend, **options))
    actual = torch.cat([out.chosen_logps, out.rejected_logps])
    # T = 5 terms, added in another order.
    expected = pairs.run(backend, **options).logps.sum(-1)
    torch.testing.assert_close(actual, expected, rtol=5 * EPS, atol=0)
    assert out.lengths.tolist() == (pairs.labels != options.get("ignore_index", -100)).sum(-1).tolist()


# Gradients


def plain_gradients(pairs: Batch, dtype: torch.dtype, scale=1.0, **options) -> Leaves:
    leaves = pairs.leaves(dtype)
    losses = pairs.plain_losses(leaves, **options)
    return dict(zip(leaves, torch.autograd.grad((losses * scale).sum(), leaves.values()), strict=True))


def gradients(pairs: Batch, scale=1.0, **options) -> Leaves:
    return pairs.step(FusedFocalPOLoss(**options), scale)[1]


@pytest.mark.parametrize(
    ("modulation", "length_normalize"),
    [*zip(MODULATIONS, (False, True, False), strict=True), ("focalpo", True)],
)
@each_dtype
def test_gradient_matches_autograd_of_the_reference(dtype, modulation, length_normalize, backend):
    pairs = batch(dtype=dtype, has_bias=True)
    options = {"modulation": modulation, "length_normalize": length_normalize, "gamma": 0.5, "beta": 0.3}
    out, actual = pairs.step(FusedFocalPOLoss(backend=backend, reduction="sum", **options))
    naive, exact = (plain_gradients(pairs, x, **options) for x in (dtype, torch.float64))
    # The sums of log-probs, of this size, move u by their rounding times β, and the slope by no more.
    conditioning = 0.3 * 2 * out.chosen_logps.abs().max().item()
    for name, value in actual.items():
        assert_as_accurate(value, naive[name], exact[name], name, conditioning)


@pytest.mark.parametrize(
    ("reduction", "factor"), [("mean", -4.0), ("sum", 0.5)]
)  # powers of two do not round
def test_gradient_scales_with_the_upstream_factor(reduction, factor, backend):
    options = {"reduction": reduction, "backend": backend}
    once = {name: factor * x for name, x in gradients(batch(), **options).items()}
    assert_equal(once, gradients(batch(), factor, **options))


def test_gradient_of_the_mean_is_that_of_the_sum_over_the_number_of_pairs(backend):
    pairs = batch((4, 3, 2, 3, 2, 1, 4, 3))  # 4 pairs: 1/4 is exact
    mean = {name: 4 * x for name, x in gradients(pairs, backend=backend).items()}
    assert_equal(mean, gradients(pairs, reduction="sum", backend=backend))


def test_without_reduction_each_pair_has_its_own_upstream_factor(backend):
    pairs = batch()
    scale = torch.tensor([0.5, -2.0, 0.0], device=DEVICE)
    actual = gradients(pairs, scale, reduction="none", backend=backend)
    naive, exact = (plain_gradients(pairs, dtype, scale) for dtype in (torch.float32, torch.float64))
    for name, value in actual.items():
        # β times the size of the sums of log-probs
        assert_as_accurate(value, naive[name], exact[name], name, conditioning=0.1 * 40)
    ignored = scale.repeat(2) == 0
    assert not actual["hidden"][ignored].any()
    assert actual["hidden"][~ignored].any()


def test_no_grad_gives_the_same_values(backend):
    pairs, loss_fn = batch(), FusedFocalPOLoss(backend=backend)
    with torch.no_grad():
        quiet = pairs.loss(loss_fn, pairs.leaves())
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.loss, pairs.loss(loss_fn, pairs.leaves()).loss)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_changes_nothing(trained, backend):
    pairs = batch()
    leaves = pairs.leaves(trained=(trained,))
    pairs.loss(FusedFocalPOLoss(backend=backend), leaves).loss.backward()
    both = gradients(pairs, backend=backend)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name != trained else torch.equal(leaf.grad, both[name])


def test_two_runs_are_bitwise_equal(backend):
    assert_equal(*(gradients(batch(has_bias=True), backend=backend) for _ in range(2)))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_gives_float32_losses_and_gradients_in_the_parameters_dtype(dtype, backend):
    pairs, loss_fn = batch(), FusedFocalPOLoss(backend=backend)
    leaves, by_hand = pairs.leaves(), pairs.leaves()
    with torch.autocast(DEVICE.type, dtype=dtype):
        out = pairs.loss(loss_fn, leaves)
    out.loss.backward()
    expected = pairs.loss(loss_fn, {name: x.to(dtype) for name, x in by_hand.items()})
    expected.loss.backward()
    assert {getattr(out, name).dtype for name in FIELDS} == {torch.float32}
    assert_equal(fields(out), fields(expected))
    assert {x.grad.dtype for x in leaves.values()} == {torch.float32}
    assert_equal(*({name: x.grad for name, x in given.items()} for given in (leaves, by_hand)))


# Layouts


@pytest.mark.parametrize(
    ("lengths", "shift"),
    [
        ((4, 2, 5, 1, 5, 3), False),
        ((4, 2, 5, 1, 5, 3), True),
        ((4, 0, 5, 1, 5, 3), False),  # an empty sequence in the middle
        ((4, 0, 5, 1, 5, 3), True),
        ((0, 2, 5, 1, 5, 3), True),  # at the start
        ((4, 2, 5, 1, 5, 0), True),  # at the end
        ((0, 0, 5, 0, 0, 4), False),  # several in a row
        ((0, 0, 5, 0, 0, 4), True),
        ((1, 1, 1, 1), True),  # nothing left to predict
        ((0, 7), True),
        ((7, 0), False),
    ],
    ids=str,
)
def test_packed_gives_the_same_as_padded(lengths, shift, backend):
    pairs, loss_fn = batch(lengths), FusedFocalPOLoss(backend=backend)
    padded, expected = pairs.step(loss_fn, shift=shift)
    packed, actual = pairs.step(loss_fn, layout="packed", shift=shift)
    # The rows of the head are the same; only the sums over a sequence may be taken in another order.
    size = max(padded.chosen_logps.abs().max().item(), padded.rejected_logps.abs().max().item())
    for name in FIELDS:
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name), rtol=0, atol=8 * EPS * size)
    assert packed.lengths.tolist() == padded.lengths.tolist()
    for name, value in actual.items():
        atol = 8 * EPS * (1 + size) * expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_a_packed_batch_of_empty_sequences_has_the_loss_of_a_tie(cu_dtype, backend):
    pairs = batch((0, 0, 0, 0))
    inputs = pairs.in_layout("packed", pairs.leaves())
    inputs["cu_seqlens"] = inputs["cu_seqlens"].to(cu_dtype)
    refs = {name: torch.zeros(2, device=DEVICE) for name in pairs.refs}
    out = pairs.loss(FusedFocalPOLoss(gamma=0.0, backend=backend), inputs, **refs)
    # log 2 is rounded once or twice.
    torch.testing.assert_close(out.losses.cpu(), torch.tensor([2.0, 2.0]).log(), rtol=2e-7, atol=0)
    dhidden, dweight = torch.autograd.grad(out.loss, (inputs["hidden"], inputs["weight"]))
    assert not dweight.any()
    assert dhidden.shape == (0, 16)


@pytest.mark.parametrize("length_normalize", [False, True])
def test_shift_equals_slicing(length_normalize, backend):
    pairs = batch((4, 3, 5, 4))
    loss_fn = FusedFocalPOLoss(length_normalize=length_normalize, backend=backend)
    spoiled = pairs.labels.clone()
    spoiled[:, 0] = 10**6  # predicted by nothing: may be anything
    shifted, found = pairs.step(loss_fn, labels=spoiled, shift=True)
    leaves = pairs.leaves()
    sliced = pairs.loss(loss_fn, leaves | {"hidden": leaves["hidden"][:, :-1]}, labels=pairs.labels[:, 1:])
    sliced.loss.backward()
    assert_equal(fields(shifted), fields(sliced))
    assert_equal(found, {name: x.grad for name, x in leaves.items()})
    assert not found["hidden"][:, -1].any()


def test_packed_shift_does_not_look_at_first_labels_or_across_a_border(backend):
    pairs, loss_fn = batch((4, 3, 5, 2)), FusedFocalPOLoss(backend=backend)
    inputs = pairs.in_layout("packed")
    spoiled = inputs["labels"].clone()
    spoiled[inputs["cu_seqlens"][:-1]] = 10**6
    actual, expected = (
        pairs.loss(loss_fn, inputs, labels=x, shift=True) for x in (spoiled, inputs["labels"])
    )
    assert_equal(fields(actual), fields(expected))


def test_strided_cu_seqlens_give_the_same(backend):
    pairs, loss_fn = batch(), FusedFocalPOLoss(backend=backend)
    inputs = pairs.in_layout("packed")
    strided = inputs["cu_seqlens"].repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    assert_equal(fields(pairs.loss(loss_fn, inputs)), fields(pairs.loss(loss_fn, inputs, cu_seqlens=strided)))


@SHIFTS
@LAYOUTS
def test_per_token_fields_have_the_shape_of_the_shifted_labels(layout, shift, backend):
    pairs = batch()
    out = pairs.loss(FusedFocalPOLoss(backend=backend), pairs.in_layout(layout), shift=shift)
    assert out.dropped_mass.shape == ((6, 5 - shift) if layout == "padded" else (sum(pairs.lengths),))
    assert out.kept_share.shape == ()


# The certificate


def test_certificate_needs_a_backward(backend):
    pairs = batch()
    out = pairs.loss(FusedFocalPOLoss(backend=backend), pairs.leaves())
    assert out.dropped_mass.isnan().all()
    assert out.kept_share.isnan()
    with pytest.raises(RuntimeError, match="backward"):
        out.certificate()
    out.loss.backward()
    assert not out.dropped_mass.any()
    assert out.kept_share == 1
    assert out.certificate() == Certificate(0.0, 0.0, 1.0, 0.0)


def test_certificate_of_an_exact_backward_is_zero_without_one(backend):
    pairs = batch()
    out = pairs.loss(FusedFocalPOLoss(backward="exact", backend=backend), pairs.leaves())
    assert out.dropped_mass is out.kept_share is None
    assert out.certificate() == Certificate(0.0, 0.0, 1.0, 0.0)
    assert "100.0%" in str(out.certificate())


def test_certificate_of_an_empty_batch_is_zero(backend):
    pairs = batch()
    pairs.labels.fill_(-100)
    out, _ = pairs.step(FusedFocalPOLoss(backend=backend))
    assert out.certificate() == Certificate(0.0, 0.0, 1.0, 0.0)


# The module


def test_dpo_preset_is_gamma_zero(backend):
    pairs = batch()
    out = pairs.loss(FusedFocalPOLoss.dpo(beta=0.3, backend=backend))
    ref_chosen, ref_rejected = pairs.refs.values()
    u = 0.3 * ((out.chosen_logps - ref_chosen) - (out.rejected_logps - ref_rejected))
    # u is of size 10: a few roundings of it.
    torch.testing.assert_close(out.losses, -torch.nn.functional.logsigmoid(u), rtol=0, atol=40 * EPS)
    assert FusedFocalPOLoss.dpo().beta == 0.1


def test_simpo_preset_is_reference_free_length_normalised_with_a_margin(backend):
    loss_fn = FusedFocalPOLoss.simpo(beta=2.5, margin=1.2, backend=backend)
    out = batch().loss(loss_fn, ref_chosen_logps=None, ref_rejected_logps=None)
    mean_w, mean_l = (torch.cat([out.chosen_logps, out.rejected_logps]) / out.lengths).chunk(2)
    expected = -torch.nn.functional.logsigmoid(2.5 * (mean_w - mean_l) - 1.2)
    torch.testing.assert_close(out.losses, expected, rtol=0, atol=40 * EPS)
    torch.testing.assert_close(out.chosen_rewards, 2.5 * mean_w, rtol=0, atol=40 * EPS)


@pytest.mark.parametrize("preset", ["dpo", "simpo"])
def test_presets_take_the_options_of_the_class(preset):
    loss_fn = getattr(FusedFocalPOLoss, preset)(gamma=0.05, modulation="focal", softcap=30.0)
    assert (loss_fn.gamma, loss_fn.modulation, loss_fn.softcap) == (0.05, "focal", 30.0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_loss_computes_the_same(copied, backend):
    loss_fn = FusedFocalPOLoss(gamma=0.5, margin=0.3, softcap=4.0, backend=backend)
    assert_equal(*(fields(batch().loss(x)) for x in (loss_fn, copied(loss_fn))))


def test_repr_shows_what_was_configured():
    text = repr(FusedFocalPOLoss(beta=0.25, gamma=0.125, modulation="inverse", margin=0.5, backward="exact"))
    assert text.startswith("FusedFocalPOLoss(")
    for part in ("beta=0.25", "gamma=0.125", "modulation='inverse'", "margin=0.5", "backward='exact'"):
        assert part in text


def test_compiled_training_step_gives_the_same_as_eager(backend):
    torch.manual_seed(0)
    pairs = batch()
    body = torch.nn.Linear(16, 16).to(DEVICE)
    head = torch.nn.Linear(16, 150, bias=False).to(DEVICE)
    loss_fn = FusedFocalPOLoss(backend=backend)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        states = torch.tanh(body(hidden))
        out = loss_fn(states, head.weight, pairs.labels, shift=True, **pairs.refs)
        options = {"shift": True, "backend": backend, "outputs": ("entropy",)}
        tokens = linear_logps(states, head.weight, pairs.labels, **options)
        return 2 * out.loss - 0.01 * tokens.logps.mean() - 0.1 * tokens.entropy.mean()

    def measure(step) -> list[torch.Tensor]:
        loss = step(pairs.hidden)
        return [loss.detach(), *torch.autograd.grad(loss, [*body.parameters(), *head.parameters()])]

    eager, compiled = measure(step), measure(torch.compile(step, backend="aot_eager"))
    for actual, expected in zip(compiled, eager, strict=True):
        # The same operations around the same kernels, at most regrouped.
        torch.testing.assert_close(actual, expected, rtol=0, atol=8 * EPS * expected.abs().max().item())
