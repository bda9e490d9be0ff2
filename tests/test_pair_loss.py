"""`FusedPairLoss` and `check_pair_loss`: layouts, references, reductions, the output, state, refusals.

The losses that come with the library are held by `test_methods.py`; here a few stand for all functions.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
from conftest import DEVICE, LOW_PRECISION
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import EPS, Leaves, assert_equal, batch
from tolerance import assert_as_accurate

from focalkern import Certificate, FusedFocalPOLoss, FusedPairLoss, check_pair_loss, methods
from focalkern.pairs.pair_loss import Pairs

VALUES = ("losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "prob")


def assert_same(actual, expected, size: float = 40.0) -> None:
    """Equal but for the order of a sum, `size` being that of the sums of log-probs."""
    atol = 8 * EPS * size * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


class RunningBCO(torch.nn.Module):
    """BCO with its δ, the running mean of the rewards, and a learned scale."""

    delta: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("delta", torch.zeros(()))
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pairs: Pairs) -> torch.Tensor:
        chosen, rejected = (self.scale * r for r in methods._rewards(pairs))
        if self.training:
            mean = (chosen.detach().mean() + rejected.detach().mean()) / 2
            self.delta.mul_(0.5).add_(mean, alpha=0.5)
        good, bad = chosen - self.delta, rejected - self.delta
        return -torch.nn.functional.logsigmoid(good) - torch.nn.functional.logsigmoid(-bad)


def assert_all_same(actual: Leaves, expected: Leaves) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_same(actual[name], expected[name])


# Beside FusedFocalPOLoss


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "mean", "beta": 0.1},
        {"reduction": "sum", "beta": 0.5},
        {"temperature": 0.7},
        {"softcap": 4.0},
        {"logit_scale": 0.5},
        {"ignore_index": 3},
        {"backward": "exact"},
    ],
    ids=str,
)
def test_of_dpo_it_is_the_other_class_s_dpo(options, backend):
    pairs = batch(has_bias=True)
    if "ignore_index" in options:
        pairs.labels[~pairs.keep] = options["ignore_index"]
    actual, gradients = pairs.step(FusedPairLoss(methods.dpo, backend=backend, **options))
    expected, expected_gradients = pairs.step(FusedFocalPOLoss.dpo(backend=backend, **options))
    for name in (*VALUES, "loss", *([] if "backward" in options else ["kept_share", "dropped_mass"])):
        assert_same(getattr(actual, name), getattr(expected, name))
    assert_all_same(gradients, expected_gradients)
    assert actual.lengths.tolist() == expected.lengths.tolist()


# Layouts


@pytest.mark.parametrize(
    ("lengths", "shift", "ld_alpha"),
    [
        ((4, 2, 5, 1, 5, 3), False, 0.3),
        ((4, 2, 5, 1, 5, 3), True, None),
        ((4, 0, 5, 1, 5, 3), False, None),
        ((4, 0, 5, 1, 5, 3), True, 0.3),
        ((0, 0, 5, 0, 0, 4), True, 0.3),
        ((0, 0, 5, 0, 0, 4), False, None),
    ],
    ids=str,
)
def test_packed_gives_the_same_as_padded(lengths, shift, ld_alpha, backend):
    pairs = batch(lengths)
    mixed = methods.weighted_sum((methods.ipo, 1.0), (methods.sft, 0.5))
    loss_fn = FusedPairLoss(mixed, beta=0.5, ld_alpha=ld_alpha, backend=backend)
    padded, expected = pairs.step(loss_fn, shift=shift)
    packed, gradients = pairs.step(loss_fn, layout="packed", shift=shift)
    for name in (*VALUES, "chosen_weight", "rejected_weight"):
        assert_same(getattr(packed, name), getattr(padded, name))
    assert packed.lengths.tolist() == padded.lengths.tolist()
    assert_all_same(gradients, expected)


def test_shift_equals_slicing(backend):
    pairs = batch((4, 3, 5, 4))
    loss_fn = FusedPairLoss(methods.orpo, ld_alpha=0.5, backend=backend)
    shifted = pairs.loss(loss_fn, shift=True)
    sliced = pairs.loss(loss_fn, hidden=pairs.hidden[:, :-1], labels=pairs.labels[:, 1:])
    for name in VALUES:
        assert torch.equal(getattr(shifted, name), getattr(sliced, name))


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_per_token_fields_have_the_shape_of_the_shifted_labels(layout, shift, backend):
    pairs = batch()
    out, _ = pairs.step(FusedPairLoss(methods.dpo, backend=backend), layout=layout, shift=shift)
    assert out.dropped_mass.shape == ((6, 5 - shift) if layout == "padded" else (sum(pairs.lengths),))
    assert out.logps_gradient.shape == (6,)


# LD-DPO and references


def ld_sums(logps: torch.Tensor, labels: torch.Tensor, ld_alpha: float) -> torch.Tensor:
    """LD-DPO's sums of log-probs, sequence by sequence."""
    pairs = len(logps) // 2
    tokens = [row[label != -100] for row, label in zip(logps, labels, strict=True)]
    shared = [min(len(tokens[i % pairs]), len(tokens[i % pairs + pairs])) for i in range(2 * pairs)]
    sums = [x[:n].sum() + ld_alpha * x[n:].sum() for x, n in zip(tokens, shared, strict=True)]
    return torch.stack(sums)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.3, 1.0])
def test_reference_logps_are_the_sums_of_the_reference_module(ld_alpha, layout, backend):
    pairs = batch(has_bias=True)
    logps = pairs.plain(pairs.leaves(torch.float64)).logps.detach()
    expected = ld_sums(logps, pairs.labels, 1.0 if ld_alpha is None else ld_alpha)
    loss_fn = FusedPairLoss(methods.dpo, ld_alpha=ld_alpha, backend=backend)
    found = loss_fn.reference_logps(**pairs.in_layout(layout, pairs.leaves()))
    assert [x.shape for x in found] == [(pairs.pairs,)] * 2
    assert not any(x.requires_grad for x in found)
    assert_same(torch.cat(found), expected.float())


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_a_policy_that_is_its_own_reference_has_log_ratios_of_zero(ld_alpha, backend):
    pairs = batch()
    loss_fn = FusedPairLoss(methods.dpo, ld_alpha=ld_alpha, backend=backend)
    refs = loss_fn.reference_logps(pairs.hidden, pairs.weight, pairs.labels)
    out = loss_fn(pairs.hidden, pairs.weight, pairs.labels, None, *refs)
    assert not out.chosen_rewards.any()
    torch.testing.assert_close(out.losses, torch.full_like(out.losses, math.log(2)))
    assert (out.prob == 0.5).all()


@settings(max_examples=10)
@given(ld_alpha=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_ld_alpha_weighs_the_tail_in_value_and_gradient(ld_alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = (*torch.randint(0, 7, (5,), generator=generator).tolist(), 4)
    pairs = batch(lengths, dtype=torch.float64, vocab_size=20)
    loss_fn = FusedPairLoss(methods.ipo, beta=0.5, ld_alpha=ld_alpha, backend="torch")
    out, gradients = pairs.step(loss_fn)

    leaves = pairs.leaves()
    logps = ld_sums(pairs.plain(leaves).logps, pairs.labels, ld_alpha)
    counts = (pairs.labels != -100).sum(-1)
    scores = (logps - torch.cat(list(pairs.refs.values()))) / counts.clamp(min=1)
    chosen, rejected = scores.chunk(2)
    loss = ((chosen - rejected - 1 / (2 * 0.5)) ** 2).mean()
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=1e-9)
    expected = torch.autograd.grad(loss, list(leaves.values()))
    for actual, other in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-6, atol=1e-7 * other.abs().max().item())


@pytest.mark.parametrize(
    ("lengths", "ld_alpha"),
    [((4, 2, 5, 1, 5, 3), 1.0), ((3, 2, 1, 3, 2, 1), 0.3)],
    ids=["ld_alpha 1", "equal lengths"],
)
def test_ld_alpha_without_a_tail_or_a_weight_of_it_is_plain(lengths, ld_alpha, backend):
    pairs = batch(lengths)
    plain, plain_gradients = pairs.step(FusedPairLoss(methods.dpo, backend=backend))
    weighted, gradients = pairs.step(FusedPairLoss(methods.dpo, ld_alpha=ld_alpha, backend=backend))
    for name in (*VALUES, "chosen_weight", "rejected_weight"):
        assert torch.equal(getattr(plain, name), getattr(weighted, name))
    assert_equal(gradients, plain_gradients)


def test_under_ld_alpha_the_plain_sums_are_those_of_linear_logps(backend):
    pairs = batch()
    seen = {}

    def watching(pairs: Pairs) -> torch.Tensor:
        seen["plain"], seen["weighted"] = torch.cat(pairs.sums("logps")), pairs.chosen_logps
        return methods.dpo(pairs)

    loss_fn = FusedPairLoss(watching, ld_alpha=0.25, backend=backend)
    pairs.loss(loss_fn)
    plain = FusedPairLoss(methods.dpo, backend=backend).reference_logps(
        pairs.hidden, pairs.weight, pairs.labels
    )
    assert torch.equal(seen["plain"], torch.cat(plain))
    assert not torch.equal(seen["weighted"], plain[0])


# Reductions


REDUCED = {
    "[B]": (methods.ipo, (3,)),
    "[2B]": (lambda pairs: methods.kto(pairs, kl=torch.tensor(0.2, device=DEVICE)), (6,)),
    "[]": (methods.sft, ()),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("function", "shape"), REDUCED.values(), ids=REDUCED)
def test_the_reduction_is_over_what_the_function_returns(function, shape, reduction, backend):
    pairs = batch()
    loss_fn = FusedPairLoss(function, beta=0.5, reduction=reduction, backend=backend)
    out, gradients = pairs.step(loss_fn)
    assert out.losses.shape == shape
    assert torch.equal(out.loss, out.losses if reduction == "none" else getattr(out.losses, reduction)())
    assert out.loss.requires_grad
    assert out.losses.requires_grad == (reduction == "none")

    _, of_sum = pairs.step(FusedPairLoss(function, beta=0.5, reduction="sum", backend=backend))
    count = math.prod(shape) if reduction == "mean" else 1
    assert_all_same({name: count * x for name, x in gradients.items()}, of_sum)


def test_without_reduction_each_loss_has_its_own_upstream_factor(backend):
    pairs = batch()
    leaves = pairs.leaves()
    out = pairs.loss(FusedPairLoss(methods.dpo, reduction="none", backend=backend), leaves)
    out.loss[1].backward()
    touched = leaves["hidden"].grad.flatten(1).any(1)
    assert touched.tolist() == [False, True, False] * 2
    assert out.chosen_weight.ne(0).tolist() == [False, True, False]


# What the output says


def test_the_weights_are_filled_by_backward_and_are_autograd_s(backend):
    pairs = batch()
    leaves = pairs.leaves()
    out = pairs.loss(FusedPairLoss(methods.nca_pair, beta=0.5, backend=backend), leaves)
    assert out.chosen_weight.isnan().all()
    assert out.rejected_weight.isnan().all()
    out.loss.backward()

    logps = [x.double().requires_grad_() for x in (out.chosen_logps, out.rejected_logps)]
    lengths = out.lengths.chunk(2)
    losses = methods.nca_pair(Pairs(*logps, *lengths, 0.5, *(x.double() for x in pairs.refs.values())))
    chosen, rejected = torch.autograd.grad(losses.mean(), logps)
    torch.testing.assert_close(out.chosen_weight, -chosen.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.rejected_weight, rejected.float(), rtol=1e-5, atol=1e-6)
    assert not out.logps_gradient.requires_grad


def test_the_weights_count_what_comes_through_the_plain_sums_too(backend):
    pairs = batch()
    out, _ = pairs.step(FusedPairLoss(methods.sft, backend=backend))
    tokens = pairs.keep[: pairs.pairs].sum().item()
    torch.testing.assert_close(out.chosen_weight, torch.full_like(out.chosen_weight, 1 / tokens))
    assert not out.rejected_weight.any()


@pytest.mark.parametrize("has_reference", [True, False])
def test_rewards_and_prob_are_those_of_the_log_ratios(has_reference, backend):
    pairs = batch()
    if not has_reference:
        pairs.refs = {}
    out = pairs.loss(FusedPairLoss(methods.cpo, beta=0.3, backend=backend))
    ref_chosen, ref_rejected = pairs.refs.values() if has_reference else (0, 0)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * (out.chosen_logps - ref_chosen))
    torch.testing.assert_close(out.rejected_rewards, 0.3 * (out.rejected_logps - ref_rejected))
    torch.testing.assert_close(out.prob, torch.sigmoid(out.chosen_rewards - out.rejected_rewards))
    assert not any(getattr(out, name).requires_grad for name in VALUES)


def test_no_grad_gives_the_same_values(backend):
    pairs = batch()
    loss_fn = FusedPairLoss(methods.dpo, backend=backend)
    with torch.no_grad():
        quiet = pairs.loss(loss_fn, pairs.leaves())
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.loss, pairs.step(loss_fn)[0].loss)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_changes_nothing(trained, backend):
    pairs = batch()
    loss_fn = FusedPairLoss(methods.dpo, backend=backend)
    leaves = pairs.leaves(trained=(trained,))
    pairs.loss(loss_fn, leaves).loss.backward()
    _, both = pairs.step(loss_fn)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name != trained else torch.equal(leaf.grad, both[name])


def test_two_runs_are_bitwise_equal(backend):
    pairs = batch()
    loss_fn = FusedPairLoss(methods.orpo, ld_alpha=0.5, backend=backend)
    assert_equal(pairs.step(loss_fn)[1], pairs.step(loss_fn)[1])


def test_the_certificate_needs_a_backward_and_is_exact_here(backend):
    pairs = batch()
    out = pairs.loss(FusedPairLoss(methods.dpo, backend=backend), pairs.leaves())
    assert out.dropped_mass.isnan().all()
    assert out.kept_share.isnan()
    with pytest.raises(RuntimeError, match="backward"):
        out.certificate()
    out.loss.backward()
    assert out.certificate() == Certificate(0.0, 0.0, 1.0, 0.0)
    assert not out.dropped_mass.any()
    assert out.kept_share == 1


def test_the_certificate_tells_what_the_same_weights_leave_out_in_the_other_class(backend):
    pairs = batch(vocab_size=1400)
    pairs.weight *= 4  # blocks of 128 entries of very different mass
    options = {"tau": 1e-2, "backend": backend}
    actual, _ = pairs.step(FusedPairLoss(methods.dpo, **options))
    expected, _ = pairs.step(FusedFocalPOLoss.dpo(**options))
    assert 0 < actual.kept_share < 1
    assert actual.kept_share == expected.kept_share
    assert_same(actual.dropped_mass, expected.dropped_mass, size=1.0)
    assert actual.certificate().dhidden_bound == pytest.approx(expected.certificate().dhidden_bound, rel=1e-4)


def test_an_exact_backward_has_no_dropped_mass(backend):
    out, _ = batch().step(FusedPairLoss(methods.dpo, backward="exact", backend=backend))
    assert out.dropped_mass is out.kept_share is None
    assert out.certificate().kept_share == 1.0


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_gives_float32_values_and_gradients_in_the_parameters_dtype(dtype, backend):
    pairs = batch()
    loss_fn = FusedPairLoss(methods.orpo, outputs=("entropy",), backend=backend)
    leaves, by_hand = pairs.leaves(), pairs.leaves()
    with torch.autocast(DEVICE.type, dtype=dtype):
        out = loss_fn(labels=pairs.labels, **leaves)
    out.loss.backward()
    expected = loss_fn(labels=pairs.labels, **{n: x.to(dtype) for n, x in by_hand.items()})
    expected.loss.backward()
    for name in (*VALUES, "chosen_weight", "rejected_weight"):
        assert getattr(out, name).dtype == torch.float32
        assert torch.equal(getattr(out, name), getattr(expected, name))
    assert {x.grad.dtype for x in leaves.values()} == {torch.float32}
    assert_equal(*({name: x.grad for name, x in given.items()} for given in (leaves, by_hand)))


# Functions


def test_sums_of_outputs_are_those_of_the_tokens_and_carry_their_gradient(backend):
    def with_entropy(pairs: Pairs) -> torch.Tensor:
        chosen, rejected = pairs.sums("entropy")
        return methods.dpo(pairs) - 0.3 * chosen + 0.1 * rejected

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = pairs.leaves(dtype)
        found = pairs.plain(leaves)
        logps, entropy = found.logps.sum(-1), found.entropy.sum(-1)
        refs = (x.to(dtype) for x in pairs.refs.values())
        inputs = Pairs(*logps.chunk(2), *pairs.keep.sum(-1).chunk(2), 0.1, *refs, {"entropy": entropy})
        return list(torch.autograd.grad(with_entropy(inputs).mean(), list(leaves.values())))

    pairs = batch()
    out, actual = pairs.step(FusedPairLoss(with_entropy, outputs=("entropy",), backend=backend))
    assert torch.isfinite(out.loss)
    for values in zip(actual.values(), gradients(torch.float32), gradients(torch.float64), strict=True):
        assert_as_accurate(*values, conditioning=0.1 * 40)


def test_a_tensor_of_the_call_gets_its_gradient(backend):
    pairs = batch()
    offset = torch.tensor([0.5, -1.0, 0.0], device=DEVICE, requires_grad=True)
    out, _ = pairs.step(FusedPairLoss(methods.odpo, backend=backend), offset=offset)
    u = (out.chosen_rewards - out.rejected_rewards - offset).detach()
    torch.testing.assert_close(offset.grad, torch.sigmoid(-u) / pairs.pairs, rtol=1e-5, atol=1e-6)


def test_a_module_keeps_its_state_and_leaves_it_alone_in_eval(backend):
    pairs = batch()
    loss_fn = FusedPairLoss(RunningBCO(), beta=0.5, backend=backend).to(DEVICE)
    out, _ = pairs.step(loss_fn)
    mean = (out.chosen_rewards + out.rejected_rewards).mean() / 2
    torch.testing.assert_close(loss_fn.state_dict()["function.delta"], mean / 2)

    loss_fn.eval()
    before = loss_fn.function.delta.clone()
    pairs.step(loss_fn)
    assert torch.equal(loss_fn.function.delta, before)
    loss_fn.train()
    pairs.step(loss_fn)
    assert not torch.equal(loss_fn.function.delta, before)

    other = FusedPairLoss(RunningBCO(), beta=0.5, backend=backend).to(DEVICE)
    other.load_state_dict(loss_fn.state_dict())
    assert torch.equal(pairs.step(other.eval())[0].loss, pairs.step(loss_fn.eval())[0].loss)


@pytest.mark.parametrize(
    "combine",
    [
        lambda function: methods.weighted_sum((function, 1.0), (methods.sft, 0.5)),
        methods.with_wpo_weights,
        lambda function: methods.with_wpo_weights(methods.weighted_sum((function, 1.0))),
    ],
    ids=["sum", "WPO", "both"],
)
def test_a_module_inside_another_loss_keeps_its_state_too(combine, backend):
    pairs = batch()
    outputs = ("log_sum_sq_probs",)
    loss_fn = FusedPairLoss(combine(RunningBCO()), outputs=outputs, backend=backend)
    pairs.step(loss_fn)
    (state,) = (value for name, value in loss_fn.state_dict().items() if name.endswith("delta"))
    assert state != 0
    assert [p.grad is not None for p in loss_fn.parameters()] == [True]
    before = state.clone()
    pairs.step(loss_fn.eval())
    assert torch.equal(state, before)
    resumed = FusedPairLoss(combine(RunningBCO()), outputs=outputs, backend=backend).eval()
    resumed.load_state_dict(loss_fn.state_dict())
    assert torch.equal(pairs.step(resumed)[0].losses, pairs.step(loss_fn)[0].losses)


@pytest.mark.parametrize(
    "function",
    [
        methods.with_f_divergence(methods.dpo, "js_divergence"),
        methods.with_wpo_weights(partial(methods.robust, label_smoothing=0.1)),
        methods.weighted_sum((methods.dpo, 1.0), (methods.sft, 0.5)),
    ],
    ids=["f-divergence", "WPO", "sum"],
)
def test_losses_made_of_others_can_be_pickled(function, backend):
    pairs = batch()
    loss_fn = FusedPairLoss(function, outputs=("log_sum_sq_probs",), backend=backend)
    again = pickle.loads(pickle.dumps(loss_fn))
    assert torch.equal(pairs.step(again)[0].losses, pairs.step(loss_fn)[0].losses)


@pytest.mark.parametrize(
    "make",
    [
        FusedPairLoss,
        methods.with_wpo_weights,
        lambda function: methods.with_f_divergence(function, "js_divergence"),
        lambda function: methods.weighted_sum((methods.dpo, 1.0), (function, 1.0)),
        check_pair_loss,
    ],
    ids=["FusedPairLoss", "WPO", "f-divergence", "sum", "check_pair_loss"],
)
@pytest.mark.parametrize(
    "part", [lambda m: partial(m, scale=1.0), lambda m: m.forward], ids=["partial", "bound"]
)
def test_a_part_of_a_module_is_refused_because_its_state_would_be_lost(part, make):
    with pytest.raises(TypeError, match=r"^function must be a module itself"):
        make(part(RunningBCO()))


def test_it_is_a_decorator_too():
    @FusedPairLoss
    def decorated(pairs):
        return methods.ipo(pairs)

    pairs = batch()
    assert torch.equal(pairs.step(decorated)[0].losses, pairs.step(FusedPairLoss(methods.ipo))[0].losses)


def test_the_name_of_a_method_is_pointed_to_the_function():
    with pytest.raises(
        TypeError, match=r"^function must be callable, such as one of focalkern.methods; got str"
    ):
        FusedPairLoss("ipo")


def test_check_pair_loss_points_to_eval_mode():
    with pytest.raises(ValueError, match=r"in training mode .* eval mode"):
        check_pair_loss(RunningBCO().double())


def test_a_tensor_that_is_called_like_an_argument_of_the_loss_is_refused():
    def function(pairs, *, labels):
        return pairs.chosen_logps * labels

    with pytest.raises(TypeError, match=r"^function must call its tensors other than.*\['labels'\]"):
        FusedPairLoss(function)


def test_a_parameter_of_the_function_gets_its_gradient(backend):
    pairs = batch()
    loss_fn = FusedPairLoss(RunningBCO(), beta=0.5, backend=backend).to(DEVICE).eval()
    out, _ = pairs.step(loss_fn)
    chosen, rejected = out.chosen_rewards, out.rejected_rewards
    expected = (rejected * torch.sigmoid(rejected) - chosen * torch.sigmoid(-chosen)).mean()
    assert [name for name, _ in loss_fn.named_parameters()] == ["function.scale"]
    torch.testing.assert_close(loss_fn.function.scale.grad, expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    "function",
    [methods.ipo, partial(methods.robust, label_smoothing=0.1), RunningBCO()],
    ids=["function", "partial", "module"],
)
def test_a_copy_of_the_loss_computes_the_same_and_shares_no_state(function, copied, backend):
    pairs = batch()
    options = {"ld_alpha": 0.5, "softcap": 4.0, "outputs": ("entropy",)}
    loss_fn = FusedPairLoss(function, beta=0.3, backend=backend, **options).to(DEVICE)
    other = copied(loss_fn)
    assert torch.equal(pairs.step(loss_fn)[0].losses, pairs.step(other)[0].losses)
    for mine, theirs in zip(loss_fn.buffers(), other.buffers(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()


def test_repr_shows_what_was_configured():
    text = repr(FusedPairLoss(partial(methods.robust, label_smoothing=0.1), beta=0.25, ld_alpha=0.5))
    for part in ("FusedPairLoss(robust(label_smoothing=0.1), ", "beta=0.25", "ld_alpha=0.5"):
        assert part in text
    assert "RunningBCO()" in repr(FusedPairLoss(RunningBCO()))


def test_compiled_training_step_gives_the_same_as_eager(backend):
    pairs = batch()
    loss_fn = FusedPairLoss(methods.ipo, backend=backend)

    def measure(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return 2 * pairs.loss(loss_fn, {"hidden": torch.tanh(hidden), "weight": weight}).loss

    results = []
    for function in (measure, torch.compile(measure, backend="aot_eager")):
        leaves = list(pairs.leaves().values())
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=8 * EPS * eager.abs().max().item())


# What is refused


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"beta": 0.0}, ValueError, "^beta must be finite and > 0; got 0.0"),
        ({"beta": -1}, ValueError, "^beta .*got -1"),
        ({"beta": "0.1"}, TypeError, "^beta must be a number"),
        ({"ld_alpha": -0.1}, ValueError, "^ld_alpha must be finite and >= 0 and <= 1; got -0.1"),
        ({"ld_alpha": 1.1}, ValueError, "^ld_alpha .*got 1.1"),
        ({"outputs": ("logits",)}, ValueError, "^outputs must be one of .*got 'logits'"),
        ({"reduction": "batchmean"}, ValueError, "^reduction .*'batchmean'"),
        ({"tau": -1.0}, ValueError, "^tau"),
        ({"function": None}, TypeError, "^function must be callable; got NoneType"),
        ({"gamma": 0.05}, TypeError, "gamma"),
    ],
    ids=str,
)
def test_an_option_outside_its_domain_is_refused(options, exception, message):
    with pytest.raises(exception, match=message):
        FusedPairLoss(**{"function": methods.dpo, **options})


def with_bad_arguments() -> list:
    b = 3
    offset, wrong = torch.zeros(b), torch.zeros(b + 1)
    ref = "ref_chosen_logps"
    cases = [
        (
            "odpo",
            {"offset": wrong},
            ValueError,
            r"^offset must be \[B, ...\] with B = 3, or 0-dim; got \[4\]",
        ),
        ("odpo", {"offset": 0.5}, TypeError, "^offset must be a torch.Tensor; got float"),
        ("odpo", {"offset": offset, "margin": offset}, TypeError, "margin"),
        ("odpo", {}, TypeError, "offset"),
        ("dpo", {ref: None}, ValueError, rf"^{ref} and ref_rejected_logps must be given both, or neither"),
        ("dpo", {ref: None, "ref_rejected_logps": None}, ValueError, rf"^{ref} must be given, \[B\] = \[3\]"),
        ("dpo", {ref: wrong}, ValueError, rf"^{ref} must be \[B\] = \[3\]; got \[4\]"),
        ("dpo", {ref: torch.zeros(b, dtype=torch.int64)}, TypeError, f"^{ref} must be floating"),
        ("dpo", {ref: torch.zeros(b, requires_grad=True)}, ValueError, f"^{ref} must be a constant"),
        ("dpo", {"shift": 1}, TypeError, "^shift"),
        ("dpo", {"hidden": torch.zeros(5, 5, 16)}, ValueError, "^labels must be"),
    ]
    return [
        pytest.param(*case, id=f"{case[0]} {next(iter(case[1]), 'nothing')} {i}")
        for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("name", "arguments", "exception", "message"), with_bad_arguments())
def test_an_argument_that_does_not_fit_is_refused(name, arguments, exception, message):
    pairs = batch()
    arguments = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    with pytest.raises(exception, match=message):
        pairs.loss(FusedPairLoss(getattr(methods, name)), **arguments)


def test_outputs_that_the_loss_needs_and_were_not_asked_for_are_named(backend):
    pairs = batch()
    loss_fn = FusedPairLoss(methods.with_wpo_weights(methods.dpo), backend=backend)
    with pytest.raises(ValueError, match=r"^outputs must name 'log_sum_sq_probs'"):
        pairs.loss(loss_fn)


BAD_RETURNS = {
    "a float": (lambda pairs: 0.5, TypeError, "must return a tensor; got float"),
    "a tuple": (lambda pairs: (pairs.chosen_logps,), TypeError, "must return a tensor; got tuple"),
    "a column": (lambda pairs: pairs.chosen_logps[:, None], ValueError, r"shape .*got \[\d, 1\]"),
    "one too few": (
        lambda pairs: pairs.chosen_logps[1:],
        ValueError,
        r"shape \[B\] = \[\d\], \[2B\] or \[\]",
    ),
}


@pytest.mark.parametrize(("function", "exception", "message"), BAD_RETURNS.values(), ids=BAD_RETURNS)
def test_a_return_value_of_another_kind_is_refused(function, exception, message):
    pairs = batch()
    with pytest.raises(
        exception, match=f"^function <lambda> {message}" if exception is TypeError else message
    ):
        FusedPairLoss(function)(pairs.hidden, pairs.weight, pairs.labels)
    with pytest.raises(exception, match=message):
        check_pair_loss(function)


# check_pair_loss


class WrongSlope(torch.autograd.Function):
    """x² with the slope of x³/3."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return upstream * x**2


def wrong_in_rejected(pairs: Pairs) -> torch.Tensor:
    return pairs.chosen_logps**2 + WrongSlope.apply(pairs.rejected_logps)


def wrong_in_offset(pairs: Pairs, *, offset: torch.Tensor) -> torch.Tensor:
    return methods.dpo(pairs) + WrongSlope.apply(offset)


def detached_chosen(pairs: Pairs) -> torch.Tensor:
    return torch.relu(1 - 0.1 * (pairs.chosen_logps.detach() - pairs.rejected_logps))


def all_detached(pairs: Pairs) -> torch.Tensor:
    return methods.dpo(pairs).detach()


def not_finite(pairs: Pairs) -> torch.Tensor:
    return torch.log(pairs.chosen_logps)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (wrong_in_rejected, "^gradient of wrong_in_rejected in rejected_logps is wrong"),
        (partial(wrong_in_rejected), "^gradient of wrong_in_rejected in rejected_logps is wrong"),
        (wrong_in_offset, "^gradient of wrong_in_offset in offset is wrong"),
        (detached_chosen, "^gradient of detached_chosen in chosen_logps is missing: was it detached"),
        (all_detached, "^gradient of all_detached in chosen_logps is missing: was it detached"),
        (not_finite, "^function not_finite must return finite losses; got .*nan"),
    ],
    ids=["rejected", "partial", "tensor", "detached", "all detached", "NaN"],
)
def test_check_pair_loss_finds_it(function, message):
    needs_offset = function is wrong_in_offset
    with pytest.raises(ValueError, match=message):
        check_pair_loss(function, tensors={"offset": torch.arange(4.0)} if needs_offset else None)


class Doubled(torch.autograd.Function):
    """The identity with twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda pairs: -pairs.sums("logps")[0].detach(), "in logps is missing"),
        (lambda pairs: Doubled.apply(pairs.sums("logps")[1]), "in logps is wrong"),
        (lambda pairs: Doubled.apply(pairs.sums("entropy")[0]), "in entropy is wrong"),
        (lambda pairs: 1e-9 * Doubled.apply(pairs.chosen_logps), "in chosen_logps is wrong"),
    ],
    ids=["detached sum", "sum", "entropy", "small scale"],
)
def test_check_pair_loss_looks_at_sums_and_at_small_losses_too(function, message):
    with pytest.raises(ValueError, match=message):
        check_pair_loss(function, outputs=("entropy",))


def test_check_pair_loss_skips_what_it_is_told_to():
    wpo = methods.with_wpo_weights(methods.dpo)
    outputs = ("log_sum_sq_probs",)
    with pytest.raises(ValueError, match=r"in logps is missing.*skip=\('logps',\)"):
        check_pair_loss(wpo, outputs=outputs)
    check_pair_loss(wpo, outputs=outputs, skip=("logps",))
    with pytest.raises(ValueError, match=r"^skip must name inputs out of .*got \['margin'\]"):
        check_pair_loss(methods.dpo, skip=("margin",))


def test_check_pair_loss_says_what_the_function_would_need():
    with pytest.raises(ValueError, match=r"^ref_chosen_logps must be given"):
        check_pair_loss(methods.dpo, reference=False)
    with pytest.raises(ValueError, match=r"^outputs must name 'entropy'"):
        check_pair_loss(lambda pairs: pairs.sums("entropy")[0])
    check_pair_loss(lambda pairs: pairs.sums("entropy")[0] + pairs.chosen_logps, outputs=("entropy",))


class Fading(torch.nn.Module):
    """DPO that counts for less with every call."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, pairs: Pairs, **tensors: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (methods.odpo if tensors else methods.dpo)(pairs, **tensors) / self.calls


@pytest.mark.parametrize(
    ("module", "tensors"),
    [(Fading(), {}), (Fading(), {"offset": torch.ones(4)}), (RunningBCO().double().eval(), {})],
    ids=["Fading", "Fading with a tensor", "RunningBCO"],
)
def test_check_pair_loss_lets_the_state_of_a_module_alone(module, tensors):
    before = copy.deepcopy(module.state_dict())
    check_pair_loss(module, tensors=tensors)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_check_pair_loss_takes_any_number_of_pairs_and_integer_tensors(seed):
    def grouped(pairs: Pairs, *, group: torch.Tensor) -> torch.Tensor:
        assert group.dtype == torch.int64
        return methods.dpo(pairs) * (1 + group)

    for pairs, beta in itertools.product((1, 7), (0.1, 2.0)):
        check_pair_loss(grouped, pairs=pairs, beta=beta, tensors={"group": torch.arange(pairs)}, seed=seed)
