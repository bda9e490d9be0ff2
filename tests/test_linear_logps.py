"""`linear_logps`: values, layouts, masks, ties, which gradients come back, and that every run gives the same.

Gradients over random problems are in `test_gradients.py`, numerical hazards in `test_numerics.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, LOW_PRECISION
from problems import (
    OUTPUTS,
    TRANSFORMS,
    assert_accurate,
    assert_equal,
    assert_matches,
    each_dtype,
    each_dtype_and_float64,
    outcome,
    problem,
)

from focalkern import linear_logps

SHIFTS = pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])


def measure(head, backend, leaves=None, upstream=None, **options) -> dict[str, torch.Tensor]:
    """All values, and the gradients."""
    leaves = head.leaves() if leaves is None else leaves
    return outcome(head, head.run(backend, leaves, **{"outputs": OUTPUTS, **options}), leaves, upstream)


def values(head, backend, **options) -> dict[str, torch.Tensor]:
    result = head.run(backend, outputs=OUTPUTS, **options)
    return {name: getattr(result, name) for name in ("logps", *OUTPUTS)}


# Values and gradients


@pytest.mark.parametrize(
    ("transform", "has_bias", "differentiated"),
    [
        ("plain", False, "logps"),
        ("plain", True, "entropy"),
        ("temperature", True, "both"),
        ("softcap", True, "logps"),
        ("negative logit_scale", True, "both"),
        ("all of them", True, "logps"),
        ("all of them", True, "entropy"),
        ("all of them", True, "both"),
    ],
)
@each_dtype_and_float64
def test_values_and_gradients_match_the_reference(backend, dtype, transform, has_bias, differentiated):
    head = problem(2, 11, vocab_size=300, dtype=dtype, has_bias=has_bias, **TRANSFORMS[transform])
    upstream = {"logps": head.grad, "entropy": head.grad.flip(0)}
    if differentiated != "both":
        upstream = {differentiated: head.grad}
    result = assert_accurate(head, backend, upstream, outputs=OUTPUTS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.logps.dtype == result.entropy.dtype == result.mean_logits.dtype == wide
    assert result.log_sum_sq_probs.dtype == wide


@pytest.mark.parametrize(
    ("vocab_size", "hidden_size"),
    [(2, 1), (5, 16), (127, 17), (128, 3), (129, 32), (256, 40), (385, 33)],
)
def test_odd_sizes_match_the_reference(vocab_size, hidden_size, backend):
    """V not a multiple of the block of 128 or below it, H not a multiple of any tile."""
    head = problem(1, 18, vocab_size=vocab_size, hidden_size=hidden_size, has_bias=True)
    assert_accurate(head, backend, outputs=OUTPUTS)


def test_a_vocabulary_of_one_is_certain(backend):
    head = problem(2, 4, vocab_size=1, has_bias=True)
    found = measure(head, backend, upstream={"logps": head.grad, "entropy": head.grad})
    assert torch.equal(found.pop("is_top1"), head.keep)
    del found["mean_logits"]
    assert not any(x.any() for x in found.values())


def test_outputs_not_asked_for_are_none(backend):
    result = problem(2, 3).run(backend, outputs=("entropy",))
    assert result.entropy is not None
    assert result.mean_logits is result.is_top1 is result.log_sum_sq_probs is None


def test_one_output_may_be_named_by_a_string(backend):
    head = problem(2, 3)
    alone = head.run(backend, outputs="mean_logits").mean_logits
    assert torch.equal(alone, values(head, backend)["mean_logits"])


def test_label_types_give_the_same(backend):
    head = problem(2, 7)
    assert_equal(values(head, backend, labels=head.labels.int()), values(head, backend))


# Layout and masks


@pytest.mark.parametrize("rank", [0, 5], ids=["", "an update"])
@pytest.mark.parametrize("shape", [(9,), (3, 5), (2, 2, 4), (3, 1)], ids=str)
def test_shift_equals_slicing(shape, rank, backend):
    head = problem(*shape, rank=rank)
    spoiled = head.labels.clone()
    spoiled[..., 0] = 10**6  # predicted by nothing: may be anything
    leaves, own = head.leaves(), head.leaves()
    shifted = head.run(backend, leaves, labels=spoiled, shift=True, outputs=OUTPUTS)
    sliced = {name: x[..., :-1, :] if "hidden" in name else x for name, x in own.items()}
    expected = head.run(backend, sliced, labels=head.labels[..., 1:], outputs=OUTPUTS)
    assert shifted.logps.shape == shifted.dropped_mass.shape == head.labels[..., 1:].shape
    head.grad = head.grad[..., 1:]
    assert_equal(outcome(head, shifted, leaves), outcome(head, expected, own))


@SHIFTS
def test_ignore_index_may_be_a_token(shift, backend):
    head = problem(2, 9, vocab_size=4)
    labels = head.labels.where(head.keep, 3)
    assert (labels == 3).sum() > (~head.keep).sum()  # token 3 itself occurs
    inside = values(head, backend, labels=labels, ignore_index=3, shift=shift)
    assert_equal(inside, values(head, backend, labels=labels.masked_fill(labels == 3, -100), shift=shift))
    assert not inside["logps"][(labels[..., 1:] if shift else labels) == 3].any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@SHIFTS
def test_masked_positions_take_no_part_whatever_they_hold(garbage, shift, backend):
    head = problem(2, 9, has_bias=True, rank=8)
    masked = ~head.keep
    if shift:
        masked = torch.cat([masked[:, 1:], torch.ones_like(masked[:, :1])], dim=1)
        head.grad = head.grad[:, 1:]
    found = []
    for filling in (0.0, garbage):
        head.hidden[masked] = head.update_hidden[masked] = filling
        upstream = {"logps": head.grad, "entropy": head.grad}
        found.append(measure(head, backend, upstream=upstream, shift=shift))
    assert_equal(*found)
    for name in ("logps", *OUTPUTS):
        assert not found[1][name][masked[:, :-1] if shift else masked].any(), name
    for name in ("hidden", "update_hidden"):
        assert not found[1][name][masked].any(), name


def test_a_batch_without_a_single_completion_token_has_zero_log_probs_and_gradients(backend):
    head = problem(2, 5, has_bias=True, rank=8)
    head.labels.fill_(-100)
    found = measure(head, backend, upstream={"logps": head.grad, "entropy": head.grad})
    assert len(found) == 10
    assert not any(x.any() for x in found.values())


# The first maximum wins


@pytest.mark.parametrize(
    "maxima",
    [
        (0,),
        (127,),
        (128,),
        (255,),
        (299,),
        (3, 100),  # one block
        (5, 200),  # first and second block
        (130, 299),  # second and last, partial block
        (127, 128),  # either side of a border
        (0, 299),
        (256, 257),
        (7, 140, 141, 280),
    ],
    ids=str,
)
def test_top1_is_the_first_maximum(maxima, backend):
    # Small integers: the logits are exact, so that equal rows tie whatever the order of summation. All are
    # negative, which padding of a partial block with zeros would not survive.
    weight = torch.full((300, 16), -3.0, device=DEVICE)
    weight[list(maxima)] = -2.0
    other = 200 if 200 not in maxima else 201
    labels = torch.tensor([*maxima, other], device=DEVICE)
    hidden = torch.ones(len(labels), 16, device=DEVICE)
    result = linear_logps(hidden, weight, labels, backend=backend, outputs=("is_top1",))
    assert result.is_top1.tolist() == [True] + [False] * len(maxima)


# Bias of −inf: a vocabulary entry that cannot be sampled


@pytest.mark.parametrize(
    "removed",
    [[0], [299], list(range(128, 256)), list(range(128)), list(range(0, 300, 3)), list(range(2, 300))],
    ids=["first", "last", "a whole block", "the first block", "every third", "all but two"],
)
def test_a_bias_of_minus_inf_removes_the_entry(removed, backend):
    head = problem(1, 12, vocab_size=300, has_bias=True)
    kept = torch.tensor([v for v in range(300) if v not in set(removed)], device=DEVICE)
    # The same head without those entries.
    index = torch.arange(12, device=DEVICE) % len(kept)
    smaller = replace(head, weight=head.weight[kept], bias=head.bias[kept])
    smaller.labels = index.where(head.keep, -100)
    head.labels = kept[index].where(head.keep, -100)
    head.bias[removed] = -math.inf

    upstream = {"logps": head.grad, "entropy": head.grad}
    found = measure(head, backend, upstream=upstream)
    assert (found.pop("mean_logits")[head.keep] == -math.inf).all()
    for name in ("weight", "bias"):
        assert not found[name][removed].any()
        found[name] = found[name][kept]
    assert_matches(smaller, found, upstream)


def test_a_removed_label_is_impossible(backend):
    head = problem(1, 4, has_bias=True)
    head.labels[:] = torch.tensor([5, 6, 7, 8], device=DEVICE)
    head.bias[6] = -math.inf
    found = measure(head, backend, outputs=())
    assert torch.equal(found["logps"] == -math.inf, head.labels == 6)
    assert all(torch.isfinite(found[name]).all() for name in head.tensors)


# Memory layout


LAYOUTS = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "rows of a wider tensor": lambda x: torch.cat([x, torch.full_like(x, math.nan)], dim=-1)[
        ..., : x.shape[-1]
    ],
    "expanded": lambda x: x[..., :1, :].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "rank"),
    [("hidden", 0), ("weight", 0), ("update_hidden", 16), ("update_hidden", 20), ("update_weight", 20)],
)
def test_non_contiguous_inputs_give_the_same(name, rank, layout, backend):
    head = problem(1, 12, rank=rank)
    strided = LAYOUTS[layout](getattr(head, name))
    assert not strided.is_contiguous()
    setattr(head, name, strided.contiguous())
    leaves = head.leaves() | {name: strided.detach().requires_grad_()}
    assert_equal(measure(head, backend, leaves), measure(head, backend))


def test_non_contiguous_bias_gives_the_same(backend):
    head = problem(1, 12, has_bias=True)
    expected = values(head, backend)
    head.bias = torch.stack([head.bias, torch.full_like(head.bias, math.nan)], dim=-1)[:, 0]
    assert not head.bias.is_contiguous()
    assert_equal(values(head, backend), expected)


def test_default_dtype_changes_nothing(backend):
    """Models are often made under a bf16 default; the sums must stay in fp32 all the same."""
    # More vocabulary than one chunk of either backend's backward holds.
    head = problem(1, 5, hidden_size=16, vocab_size=4500)
    expected = measure(head, backend)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_equal(measure(head, backend), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# Which gradients come back


@pytest.mark.parametrize(
    ("trained", "output"),
    [
        ("hidden", "logps"),
        ("weight", "entropy"),
        ("bias", "logps"),
        ("hidden weight", "entropy"),
        ("hidden bias", "logps"),
        ("weight bias", "entropy"),
        ("bias", "entropy"),
        ("weight", "logps"),
    ],
)
def test_only_what_is_trained_gets_a_gradient_and_the_same_one(trained, output, backend):
    head = problem(2, 6, has_bias=True)
    upstream = {output: head.grad}
    expected = measure(head, backend, upstream=upstream)
    leaves = head.leaves(trained=tuple(trained.split()))
    getattr(head.run(backend, leaves, outputs=OUTPUTS), output).backward(head.grad)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]) if name in trained.split() else leaf.grad is None


def test_nothing_to_train_needs_no_graph(backend):
    head = problem(2, 6, rank=8)
    frozen = head.run(backend)
    assert not frozen.logps.requires_grad
    with torch.no_grad():
        inside = head.run(backend, head.leaves(), outputs=("entropy",))
    assert not inside.logps.requires_grad
    assert not inside.entropy.requires_grad
    assert torch.equal(frozen.logps, inside.logps)


def test_only_log_probs_and_entropy_are_differentiable(backend):
    head = problem(2, 6)
    result = head.run(backend, head.leaves(), outputs=OUTPUTS)
    assert result.logps.requires_grad
    assert result.entropy.requires_grad
    for name in ("mean_logits", "is_top1", "log_sum_sq_probs", "dropped_mass", "kept_share"):
        assert not getattr(result, name).requires_grad


def test_an_output_that_is_not_used_costs_no_gradient(backend):
    head = problem(2, 6)
    with_entropy = measure(head, backend, outputs=("entropy",))
    del with_entropy["entropy"]
    assert_equal(with_entropy, measure(head, backend, outputs=()))


# Autocast


@pytest.mark.parametrize("given", ["all float32", "hidden already cast"])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_casts_and_gradients_come_back_in_the_parameters_dtype(dtype, given, backend):
    head = problem(2, 6, has_bias=True, rank=8)
    if given == "hidden already cast":
        head.hidden = head.hidden.to(dtype)
    inside, by_hand = head.leaves(), head.leaves()
    with torch.autocast(DEVICE.type, dtype=dtype):
        result = head.run(backend, inside)
    assert result.logps.dtype == torch.float32
    expected = head.run(backend, {name: x.to(dtype) for name, x in by_hand.items()})
    found = outcome(head, result, inside)
    assert {name: found[name].dtype for name in inside} == {name: x.dtype for name, x in inside.items()}
    assert_equal(found, outcome(head, expected, by_hand))


def test_backward_under_autocast_is_the_same(backend):
    head = problem(2, 6)
    leaves = head.leaves()
    result = head.run(backend, leaves)
    with torch.autocast(DEVICE.type, dtype=LOW_PRECISION[-1]):
        inside = outcome(head, result, leaves)
    assert_equal(inside, measure(head, backend, outputs=()))


# The certificate, and reproducibility


def test_what_was_dropped_is_known_after_the_backward(backend):
    head = problem(2, 6)
    result = head.run(backend, head.leaves())
    assert result.dropped_mass.shape == head.labels.shape
    assert result.dropped_mass.dtype == result.kept_share.dtype == torch.float32
    assert result.kept_share.shape == ()
    assert result.dropped_mass.isnan().all()
    assert result.kept_share.isnan()
    result.logps.backward(head.grad)
    assert not result.dropped_mass.any()
    assert result.kept_share == 1


def test_an_exact_backward_has_nothing_to_certify(backend):
    head = problem(2, 6)
    result = head.run(backend, backward="exact")
    assert result.dropped_mass is result.kept_share is None
    assert_equal(measure(head, backend, backward="exact"), measure(head, backend, tau=0.0))


@each_dtype
def test_two_runs_are_bitwise_equal(dtype, backend):
    head = problem(3, 15, dtype=dtype, has_bias=True, softcap=5.0)
    upstream = {"logps": head.grad, "entropy": head.grad}
    assert_equal(*(measure(head, backend, upstream=upstream) for _ in range(2)))


def test_the_backward_leaves_its_inputs_alone(backend):
    head, copy = (problem(2, 6, has_bias=True, softcap=3.0) for _ in range(2))
    leaves = head.leaves()
    measure(head, backend, leaves)
    assert_equal(leaves, copy.tensors)
    assert torch.equal(head.grad, copy.grad)
    assert torch.equal(head.labels, copy.labels)


def test_a_second_backward_through_one_forward_gives_the_same(backend):
    head = problem(2, 6)
    leaves = head.leaves()
    logps = head.run(backend, leaves).logps
    first = torch.autograd.grad(logps, list(leaves.values()), head.grad, retain_graph=True)
    second = torch.autograd.grad(logps, list(leaves.values()), head.grad)
    assert all(map(torch.equal, first, second))


def test_another_shape_leaves_alone_what_is_not_a_value_of_a_token():
    """The group that shares a head, too: α-DPO's statistics count its ranks once."""
    tokens = replace(problem(2, 6).run("torch", outputs=OUTPUTS), vocab_group=object())
    reshaped = tokens.reshaped(lambda x: x[:, 1:])
    for name in ("logps", *OUTPUTS):
        assert torch.equal(getattr(reshaped, name), getattr(tokens, name)[:, 1:])
    for name in ("dropped_mass", "kept_share", "dropped", "vocab_group"):
        assert getattr(reshaped, name) is getattr(tokens, name)
