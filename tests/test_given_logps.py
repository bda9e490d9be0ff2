"""Log-probs that were made with another mask, other labels or other options than those of the loss."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import DEVICE
from problems import Batch, batch

from focalkern import FusedFocalPOLoss, FusedPairLoss, LinearLogps, linear_logps, methods, reference

LOSSES = {
    "focal": FusedFocalPOLoss.dpo,
    "pair": partial(FusedPairLoss, methods.dpo),
}
DIFFER = r"^labels differ from those that linear_logps was given"
both_losses = pytest.mark.parametrize("loss", LOSSES)


def exact_dpo(pairs: Batch, labels: torch.Tensor, **transform) -> list[torch.Tensor]:
    """Losses and the gradients of their mean, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (pairs.hidden, pairs.weight)]
    refs = {name: x.double() for name, x in pairs.refs.items()}
    losses = reference.focalpo_loss(*leaves, labels, **refs, beta=0.1, gamma=0.0, **transform)
    return [losses.detach(), *torch.autograd.grad(losses.mean(), leaves)]


def two_masks(pairs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of all completion tokens, and of all but the first of each sequence."""
    first = (pairs.labels != -100).long().argmax(-1, keepdim=True)
    return pairs.labels, pairs.labels.scatter(1, first, -100)


@both_losses
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_head_serves_a_loss_that_ignores_more(packed, loss, backend):
    pairs = batch(lengths=(4, 3, 5, 3, 5, 4))
    labels, fewer = two_masks(pairs)
    leaves = list(pairs.leaves().values())
    hidden, given = leaves[0], {}
    expected = exact_dpo(pairs, fewer)
    if packed:
        sequences, length = labels.shape
        cu_seqlens = torch.arange(sequences + 1, device=DEVICE) * length
        hidden, labels, fewer = hidden.flatten(0, 1), labels.flatten(), fewer.flatten()
        given = {"cu_seqlens": cu_seqlens}
    tokens = linear_logps(hidden, leaves[1], labels, **given, backend=backend)
    out = LOSSES[loss]().from_logps(tokens, fewer, **pairs.refs, **given)
    out.loss.backward()
    for actual, right in zip((out.losses, *(x.grad for x in leaves)), expected, strict=True):
        assert right.any()
        torch.testing.assert_close(actual.double(), right, rtol=1e-4, atol=1e-6)


@both_losses
@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shift"])
def test_a_token_that_the_head_ignored_has_no_log_prob(shift, loss, backend):
    pairs = batch()
    labels, fewer = two_masks(pairs)
    tokens = linear_logps(pairs.hidden, pairs.weight, fewer, shift=shift, backend=backend)
    with pytest.raises(ValueError, match=DIFFER):
        LOSSES[loss]().from_logps(tokens, labels, **pairs.refs, shift=shift)


@both_losses
def test_other_labels_than_those_of_the_head_are_refused(loss):
    pairs = batch()
    tokens = linear_logps(pairs.hidden, pairs.weight, pairs.labels)
    others = torch.where(pairs.labels == -100, -100, (pairs.labels + 1) % len(pairs.weight))
    count = int((others != -100).sum())
    with pytest.raises(ValueError, match=rf"{DIFFER} at {count} tokens"):
        LOSSES[loss]().from_logps(tokens, others, **pairs.refs)


def test_labels_changed_in_place_since_are_refused():
    pairs = batch()
    labels, fewer = two_masks(pairs)
    used = fewer.clone()
    tokens = linear_logps(pairs.hidden, pairs.weight, used)
    used.copy_(labels)
    with pytest.raises(ValueError, match=DIFFER):
        FusedFocalPOLoss().from_logps(tokens, used, **pairs.refs)


@both_losses
def test_two_values_of_ignore_index_may_mean_the_same(loss, backend):
    pairs = batch()
    tokens = linear_logps(pairs.hidden, pairs.weight, pairs.labels, backend=backend)
    minus_one = pairs.labels.masked_fill(pairs.labels == -100, -1).int()
    found = LOSSES[loss](ignore_index=-1).from_logps(tokens, minus_one, **pairs.refs).losses
    assert torch.equal(found, LOSSES[loss]().from_logps(tokens, pairs.labels, **pairs.refs).losses)
    with pytest.raises(ValueError, match=DIFFER):
        LOSSES[loss]().from_logps(tokens, minus_one, **pairs.refs)


# By rows and positions, of the log-probs as of the labels and the hidden states.
RESHAPES = {
    "a slice": lambda x: x[:2],
    "a permutation": lambda x: x[torch.tensor([2, 0, 1, 5, 3, 4], device=DEVICE)],
    "later positions": lambda x: x[:, 1:],
}


@pytest.mark.parametrize("name", RESHAPES)
def test_labels_go_with_log_probs_into_another_shape(name, backend):
    pairs, loss_fn, reshape = batch(), FusedPairLoss(methods.cpo), RESHAPES[name]
    labels = reshape(pairs.labels)
    tokens = linear_logps(pairs.hidden, pairs.weight, pairs.labels.cpu(), backend=backend).reshaped(reshape)
    expected = loss_fn(reshape(pairs.hidden), pairs.weight, labels).losses
    torch.testing.assert_close(loss_fn.from_logps(tokens, labels).losses, expected)
    count = int((labels != -100).sum())
    others = torch.where(labels == -100, -100, (labels + 1) % len(pairs.weight))
    with pytest.raises(ValueError, match=rf"{DIFFER} at {count} tokens"):
        loss_fn.from_logps(tokens, others)


def test_a_position_that_padding_adds_has_no_label(backend):
    """Packed sequences as one that is shifted, [1, N − 1]; the last position predicts nothing."""
    pairs, loss_fn = batch(lengths=(4, 5, 5, 4)), FusedPairLoss(methods.cpo)
    x = pairs.in_layout("packed")
    tokens = linear_logps(x["hidden"][None], x["weight"], x["labels"][None], shift=True, backend=backend)
    tokens = tokens.reshaped(lambda values: torch.nn.functional.pad(values[0], (0, 1)))
    labels, layout = x["labels"], {"cu_seqlens": x["cu_seqlens"]}
    found = loss_fn.from_logps(tokens, labels, shift=True, **layout).losses
    torch.testing.assert_close(found, loss_fn(**x, shift=True).losses)
    aligned = labels.roll(-1)
    aligned[-1] = 0
    with pytest.raises(ValueError, match=rf"{DIFFER} at 1 tokens"):
        loss_fn.from_logps(tokens, aligned, **layout)


def test_log_probs_that_are_replaced_in_another_shape_are_taken_as_they_are():
    pairs, loss_fn = batch(), FusedPairLoss(methods.cpo)
    tokens = linear_logps(pairs.hidden, pairs.weight, pairs.labels)
    for part in (slice(2), slice(1, 5)):
        replaced = replace(tokens, logps=tokens.logps[part])
        expected = loss_fn.from_logps(LinearLogps(tokens.logps[part]), pairs.labels[part]).losses
        assert torch.equal(loss_fn.from_logps(replaced, pairs.labels[part]).losses, expected)


CONFLICTS = {
    "softcap": (5.0, 4.0),
    "logit_scale": (0.5, 0.25),
    "temperature": (2.0, 3.0),
    "backward": ("exact", "certified"),
    "tau": (1e-3, 1e-2),
}


@both_losses
@pytest.mark.parametrize("name", CONFLICTS)
def test_an_option_that_the_head_was_not_given_is_refused(name, loss):
    pairs, (own, other) = batch(), CONFLICTS[name]
    loss_fn = LOSSES[loss](**{name: own})
    default = linear_logps(pairs.hidden, pairs.weight, pairs.labels)
    for tokens in (default, linear_logps(pairs.hidden, pairs.weight, pairs.labels, **{name: other})):
        with pytest.raises(ValueError, match=rf"^{name} must be that of token_logps, .*; got {own!r}: give"):
            loss_fn.from_logps(tokens, pairs.labels, **pairs.refs)
    setattr(loss_fn, name, getattr(LOSSES[loss](), name))
    loss_fn.from_logps(default, pairs.labels, **pairs.refs)


@both_losses
@pytest.mark.parametrize("says_it_too", [False, True], ids=["default", "as the head"])
def test_the_transform_of_the_head_is_that_of_the_loss(says_it_too, loss, backend):
    pairs = batch()
    transform = {"softcap": 5.0, "logit_scale": 0.5, "temperature": 2.0}
    leaves = list(pairs.leaves().values())
    tokens = linear_logps(*leaves, pairs.labels, **transform, backend=backend)
    out = LOSSES[loss](**transform if says_it_too else {}).from_logps(tokens, pairs.labels, **pairs.refs)
    out.loss.backward()
    expected = exact_dpo(pairs, pairs.labels, **transform)
    for actual, right in zip((out.losses, *(x.grad for x in leaves)), expected, strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=1e-4, atol=1e-6)


@both_losses
def test_log_probs_of_ones_own_are_taken_as_they_are(loss, backend):
    pairs = batch()
    own = LinearLogps(reference.linear_logps(pairs.hidden, pairs.weight, pairs.labels, softcap=5.0)["logps"])
    losses = LOSSES[loss](softcap=5.0, backend=backend).from_logps(own, pairs.labels, **pairs.refs).losses
    expected, *_ = exact_dpo(pairs, pairs.labels, softcap=5.0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-6)


def test_values_that_are_replaced_keep_what_they_were_made_with():
    """What a trainer does with log-probs that go through the hooks of a module."""
    pairs = batch()
    tokens = linear_logps(pairs.hidden, pairs.weight, pairs.labels)
    copied = replace(tokens, logps=tokens.logps.clone())
    with pytest.raises(ValueError, match=r"^softcap must be that of token_logps, None"):
        FusedFocalPOLoss(softcap=5.0).from_logps(copied, pairs.labels, **pairs.refs)


# What a test may give each option, other than its default.
OPTIONS = {
    "beta": 0.25,
    "ignore_index": -1,
    "reduction": "sum",
    "temperature": 2.0,
    "softcap": 30.0,
    "logit_scale": 0.5,
    "backward": "exact",
    "tau": 0.01,
    "backend": "torch",
}
OWN_OPTIONS = {
    "focal": {
        "gamma": 0.5,
        "modulation": "focal",
        "margin": 0.5,
        "alpha": 0.5,
        "reference_free": True,
        "length_normalize": True,
        "label_smoothing": 0.1,
        "implicit_reference": "policy",
        "normalize_margin": False,
        "stop_gradient": False,
    },
    "pair": {"outputs": ("entropy",), "ld_alpha": 0.5},
}


@both_losses
def test_repr_shows_the_options_that_are_not_at_their_defaults_and_no_others(loss):
    options = OPTIONS | OWN_OPTIONS[loss]
    names = [name for name in options if not (loss == "focal" and name == "gamma")]  # `dpo` sets it
    assert not any(f"{name}=" in repr(LOSSES[loss]()) for name in names)
    assert all(f"{name}={value!r}" in repr(LOSSES[loss](**options)) for name, value in options.items())
    for name in names:
        text = repr(LOSSES[loss](**{name: options[name]}))
        assert [other for other in names if re.search(rf"\b{other}=", text)] == [name]


def test_repr_shows_the_options_of_the_statistics():
    text = repr(FusedFocalPOLoss(ema_momentum=0.5, ema_bias_correction=False))
    assert "RunningMoments(momentum=0.5, bias_correction=False)" in text
    assert "RunningMoments()" in repr(FusedFocalPOLoss())


def test_repr_shows_the_options_of_functions_inside_others():
    robust = partial(methods.robust, label_smoothing=0.1)
    described = "robust(label_smoothing=0.1)"
    assert repr(FusedPairLoss(robust)) == f"FusedPairLoss({described})"
    for function in (
        methods.weighted_sum((robust, 0.5)),
        methods.with_wpo_weights(robust),
        methods.with_f_divergence(robust, "forward_kl"),
    ):
        assert described in repr(FusedPairLoss(function))
