"""`linear_logps`: values, layouts, masks, ties, which gradients come back, and that every run gives the same.

Gradients over random problems are in `test_gradients.py`, numerical hazards in `test_numerics.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, LOW_PRECISION
from tolerance import assert_as_accurate

from focalkern import linear_logps, reference

DTYPES = [torch.float32, *LOW_PRECISION]
OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "negative logit_scale": {"logit_scale": -0.5},
    "all of them": {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.9},
}


class Head:
    """Random hidden states, head and labels; a third of the labels is masked."""

    def __init__(
        self,
        *shape: int,
        hidden_size: int = 24,
        vocab_size: int = 300,
        dtype: torch.dtype = torch.float32,
        has_bias: bool = False,
        sharpness: float = 3.0,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator)

        self.hidden = draw(*shape, hidden_size).to(DEVICE, dtype)
        self.weight = (draw(vocab_size, hidden_size) * sharpness / hidden_size**0.5).to(DEVICE, dtype)
        self.bias = draw(vocab_size).to(DEVICE, dtype) if has_bias else None
        self.labels = torch.randint(vocab_size, shape, generator=generator).to(DEVICE)
        self.labels[(torch.rand(shape, generator=generator) < 1 / 3).to(DEVICE)] = -100
        self.grad = draw(*shape).to(DEVICE)

    def leaves(self, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Fresh copies of hidden, weight and bias (where there is one) that ask for a gradient."""
        tensors = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def run(head: Head, backend: str, leaves: list[torch.Tensor] | None = None, **options):
    hidden, weight, bias = [*(leaves or [head.hidden, head.weight, head.bias]), None][:3]
    labels = options.pop("labels", head.labels)
    return linear_logps(hidden, weight, labels, bias=bias, backend=backend, **options)


def run_reference(head: Head, leaves: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    hidden, weight, bias = [*leaves, None][:3]
    labels = options.pop("labels", head.labels)
    return reference.linear_logps(hidden, weight, labels, bias, **options)


def gradients(value: torch.Tensor, grad: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, leaves, grad.to(value.dtype)))


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def weighted(logps, entropy, grad_logps, grad_entropy) -> torch.Tensor:
    pairs = ((logps, grad_logps), (entropy, grad_entropy))
    return sum((x * grad).sum() for x, grad in pairs if grad is not None)


def logit_scale(head: Head, options: dict) -> float:
    """Size of the largest logit: fp32 knows a logit, and what is made of it, to one ulp of that size."""
    x = head.hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    return x.abs().max().item() * abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)


def conditioning(head: Head, grad_logps, grad_entropy, **options) -> list[float]:
    """How many ulps dhidden, dweight and dbias move when the logits move by one: terms of the sums cancel."""
    hidden, weight, bias = [*(x.detach() for x in head.leaves(torch.float64)), 0.0][:3]
    x = (hidden @ weight.T + bias).requires_grad_()
    values = reference.linear_logps(
        x, torch.eye(len(weight), dtype=x.dtype, device=x.device), head.labels, **options
    )

    def gradient(*grads) -> torch.Tensor:
        loss = weighted(values["logps"], values["entropy"], *grads)
        return torch.autograd.grad(loss, x, retain_graph=True)[0].flatten(0, -2)

    # dz of the entropy is −p·(log p + entropy): rounding of the bracket leaves p, as in dz of the log-probs.
    terms = [(grad_logps, None), (None, grad_entropy), (grad_entropy, None)]
    size = sum(gradient(*grads).abs() for grads in terms if grads != (None, None))
    dz, hidden = gradient(grad_logps, grad_entropy), hidden.flatten(0, -2)
    ratios = [
        (size @ weight.abs()).norm() / (dz @ weight).norm(),
        (size.T @ hidden.abs()).norm() / (dz.T @ hidden).norm(),
        size.sum(0).norm() / dz.sum(0).norm(),
    ]
    return [logit_scale(head, options) * ratio.item() for ratio in ratios]


def assert_gradients_match(actual, head: Head, grad_logps, grad_entropy=None, **options) -> None:
    def expected(dtype):
        leaves = head.leaves(dtype)
        values = run_reference(head, leaves, **options)
        return torch.autograd.grad(
            weighted(values["logps"], values["entropy"], grad_logps, grad_entropy), leaves
        )

    names = ["dhidden", "dweight", "dbias"][: len(actual)]
    limits = conditioning(head, grad_logps, grad_entropy, **options)[: len(actual)]
    naive, exact = expected(head.hidden.dtype), expected(torch.float64)
    for values in zip(actual, naive, exact, names, limits, strict=True):
        assert_as_accurate(*values)


def assert_values_match(result, head: Head, **options) -> None:
    naive = run_reference(head, head.leaves(), **options)
    exact = run_reference(head, head.leaves(torch.float64), **options)
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        value = getattr(result, name)
        assert value.shape == head.labels.shape
        if head.hidden.dtype == torch.float64:
            # The reference is no better: both sum H products of the size of a logit.
            allowed = head.hidden.shape[-1] * logit_scale(head, options) * torch.finfo(torch.float64).eps
            torch.testing.assert_close(value, exact[name], rtol=0, atol=allowed)
        else:
            assert value.dtype == torch.float32
            root_mean_square = exact[name].norm().item() / (head.labels != -100).sum().item() ** 0.5
            limit = logit_scale(head, options) / root_mean_square
            assert_as_accurate(value, naive[name], exact[name], name, limit)
    assert result.is_top1.dtype == torch.bool
    assert torch.equal(result.is_top1, exact["is_top1"])


# Values


@pytest.mark.parametrize(
    ("transform", "has_bias"), [("plain", False), *((transform, True) for transform in TRANSFORMS)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_outputs_match_the_reference(dtype, transform, has_bias, backend):
    head, options = Head(2, 11, dtype=dtype, has_bias=has_bias), TRANSFORMS[transform]
    assert_values_match(run(head, backend, outputs=OUTPUTS, **options), head, **options)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_all_outputs_match_the_reference_in_float64(transform):
    head, options = Head(2, 11, dtype=torch.float64, has_bias=True), TRANSFORMS[transform]
    assert_values_match(run(head, "torch", outputs=OUTPUTS, **options), head, **options)


@pytest.mark.parametrize(
    ("vocab_size", "hidden_size"),
    [(2, 1), (5, 16), (127, 17), (128, 3), (129, 32), (256, 40), (385, 33)],
)
def test_odd_sizes_match_the_reference(vocab_size, hidden_size, backend):
    """V not a multiple of the block of 128 or below it, H not a multiple of any tile."""
    head = Head(1, 18, vocab_size=vocab_size, hidden_size=hidden_size, has_bias=True)
    leaves = head.leaves()
    result = run(head, backend, leaves, outputs=OUTPUTS)
    assert_values_match(result, head)
    assert_gradients_match(gradients(result.logps, head.grad, leaves), head, head.grad)


def test_a_vocabulary_of_one_is_certain(backend):
    head = Head(2, 4, vocab_size=1, has_bias=True)
    leaves = head.leaves()
    result = run(head, backend, leaves, outputs=OUTPUTS)
    keep = head.labels == 0
    assert not result.logps.any()
    assert not result.entropy.any()
    assert not result.log_sum_sq_probs.any()
    assert torch.equal(result.is_top1, keep)
    for gradient in gradients(result.logps + result.entropy, head.grad, leaves):
        assert not gradient.any()


def test_outputs_not_asked_for_are_none(backend):
    result = run(Head(2, 3), backend, outputs=("entropy",))
    assert result.entropy is not None
    assert result.mean_logits is result.is_top1 is result.log_sum_sq_probs is None


def test_one_output_may_be_named_by_a_string(backend):
    head = Head(2, 3)
    assert torch.equal(
        run(head, backend, outputs="mean_logits").mean_logits, run(head, backend, outputs=OUTPUTS).mean_logits
    )


def test_label_types_give_the_same(backend):
    head = Head(2, 7)
    narrow = run(head, backend, labels=head.labels.int(), outputs=OUTPUTS)
    wide = run(head, backend, outputs=OUTPUTS)
    assert_equal([getattr(narrow, x) for x in OUTPUTS], [getattr(wide, x) for x in OUTPUTS])
    assert torch.equal(narrow.logps, wide.logps)


# Layout and masks


@pytest.mark.parametrize("shape", [(9,), (3, 5), (2, 2, 4), (3, 1)], ids=str)
def test_shift_equals_slicing(shape, backend):
    head = Head(*shape)
    leaves, sliced_leaves = head.leaves(), head.leaves()
    labels = head.labels.clone()
    labels[..., 0] = 10**6  # predicted by nothing: may be anything
    shifted = run(head, backend, leaves, labels=labels, shift=True, outputs=OUTPUTS)
    sliced = linear_logps(
        sliced_leaves[0][..., :-1, :],
        sliced_leaves[1],
        head.labels[..., 1:],
        backend=backend,
        outputs=OUTPUTS,
    )
    assert shifted.logps.shape == shifted.dropped_mass.shape == head.labels[..., 1:].shape
    names = ("logps", *OUTPUTS)
    assert_equal([getattr(shifted, x) for x in names], [getattr(sliced, x) for x in names])
    grad = head.grad[..., 1:]
    assert_equal(gradients(shifted.logps, grad, leaves), gradients(sliced.logps, grad, sliced_leaves))


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
def test_ignore_index_may_be_a_token(shift, backend):
    head = Head(2, 9, vocab_size=4)
    labels = head.labels.where(head.labels != -100, 3)
    assert (labels == 3).sum() > (head.labels == -100).sum()  # token 3 itself occurs
    inside = run(head, backend, labels=labels, ignore_index=3, shift=shift, outputs=OUTPUTS)
    outside = run(head, backend, labels=labels.masked_fill(labels == 3, -100), shift=shift, outputs=OUTPUTS)
    names = ("logps", *OUTPUTS)
    assert_equal([getattr(inside, x) for x in names], [getattr(outside, x) for x in names])
    assert not inside.logps[(labels[..., 1:] if shift else labels) == 3].any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
def test_masked_positions_take_no_part_whatever_they_hold(garbage, shift, backend):
    head = Head(2, 9, has_bias=True)
    masked = head.labels == -100
    if shift:
        masked = torch.cat([masked[:, 1:], torch.ones_like(masked[:, :1])], dim=1)
    grad = head.grad[:, 1:] if shift else head.grad

    def measure(filling: float):
        head.hidden[masked] = filling
        leaves = head.leaves()
        result = run(head, backend, leaves, shift=shift, outputs=OUTPUTS)
        return result, gradients(result.logps + result.entropy, grad, leaves)

    clean, clean_gradients = measure(0.0)
    spoiled, spoiled_gradients = measure(garbage)
    names = ("logps", *OUTPUTS)
    assert_equal([getattr(spoiled, x) for x in names], [getattr(clean, x) for x in names])
    assert_equal(spoiled_gradients, clean_gradients)
    for name in names:
        assert not getattr(spoiled, name)[masked[:, :-1] if shift else masked].any()
    assert not spoiled_gradients[0][masked].any()


def test_a_batch_without_a_single_completion_token_has_zero_log_probs_and_gradients(backend):
    head = Head(2, 5, has_bias=True)
    leaves = head.leaves()
    result = run(head, backend, leaves, labels=torch.full_like(head.labels, -100), outputs=OUTPUTS)
    for name in ("logps", *OUTPUTS):
        assert not getattr(result, name).any()
    for gradient in gradients(result.logps + result.entropy, head.grad, leaves):
        assert not gradient.any()


# The first maximum wins


@pytest.mark.parametrize(
    "maxima",
    [
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
    hidden = torch.ones(1, 16, device=DEVICE)
    weight = torch.full((300, 16), -3.0, device=DEVICE)
    weight[list(maxima)] = -2.0
    other = 200 if 200 not in maxima else 201
    labels = torch.tensor([*maxima, other], device=DEVICE)
    result = linear_logps(
        hidden.expand(len(labels), -1), weight, labels, backend=backend, outputs=("is_top1",)
    )
    assert result.is_top1.tolist() == [True] + [False] * len(maxima)


@pytest.mark.parametrize("label", [0, 127, 128, 255, 299])
def test_a_lone_maximum_is_top1(label, backend):
    hidden = torch.ones(2, 16, device=DEVICE)
    weight = torch.full((300, 16), -3.0, device=DEVICE)
    weight[label] = -2.0
    labels = torch.tensor([label, (label + 1) % 300], device=DEVICE)
    result = linear_logps(hidden, weight, labels, backend=backend, outputs=("is_top1",))
    assert result.is_top1.tolist() == [True, False]


# Bias of −inf: a vocabulary entry that cannot be sampled


@pytest.mark.parametrize(
    "removed",
    [[0], [299], list(range(128, 256)), list(range(128)), list(range(0, 300, 3)), list(range(2, 300))],
    ids=["first", "last", "a whole block", "the first block", "every third", "all but two"],
)
def test_a_bias_of_minus_inf_removes_the_entry(removed, backend):
    head = Head(1, 12, has_bias=True)
    kept = torch.tensor([v for v in range(300) if v not in set(removed)], device=DEVICE)
    # The same head without those entries.
    smaller = Head(1, 12, vocab_size=len(kept), has_bias=True)
    smaller.hidden, smaller.weight, smaller.bias = head.hidden, head.weight[kept], head.bias[kept]
    head.labels = kept[smaller.labels.clamp(min=0)].where(smaller.labels != -100, -100)
    head.bias[removed] = -math.inf

    leaves = head.leaves()
    result = run(head, backend, leaves, outputs=OUTPUTS)
    total = weighted(result.logps, result.entropy, head.grad, head.grad)
    dhidden, dweight, dbias = torch.autograd.grad(total, leaves)
    assert (result.mean_logits[head.labels != -100] == -math.inf).all()
    assert not dweight[removed].any()
    assert not dbias[removed].any()
    result = replace(result, mean_logits=run(smaller, backend, outputs=("mean_logits",)).mean_logits)
    assert_values_match(result, smaller)
    assert_gradients_match([dhidden, dweight[kept], dbias[kept]], smaller, head.grad, head.grad)


def test_a_removed_label_is_impossible(backend):
    head = Head(1, 4, has_bias=True)
    head.labels[:] = torch.tensor([5, 6, 7, 8], device=DEVICE)
    head.bias[6] = -math.inf
    leaves = head.leaves()
    logps = run(head, backend, leaves).logps
    assert torch.equal(logps == -math.inf, head.labels == 6)
    for gradient in gradients(logps, head.grad, leaves):
        assert torch.isfinite(gradient).all()


# Memory layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "every other column", "rows of a wider tensor", "expanded"])
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_non_contiguous_inputs_give_the_same(name, layout, dtype, backend):
    head = Head(1, 12, dtype=dtype)
    x = getattr(head, name)
    if layout == "transposed":
        strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "every other column":
        strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "rows of a wider tensor":
        strided = torch.cat([x, torch.full_like(x, math.nan)], dim=-1)[..., : x.shape[-1]]
    else:
        strided = x[..., :1, :].expand_as(x)
    assert not strided.is_contiguous()
    setattr(head, name, strided)
    leaves = [x.detach().requires_grad_() for x in (head.hidden, head.weight)]
    result = run(head, backend, leaves, outputs=OUTPUTS)
    actual = gradients(result.logps, head.grad, leaves)
    setattr(head, name, strided.contiguous())
    if layout != "expanded":  # equal rows of weight: the label is top-1 or not by rounding
        assert_values_match(result, head)
    assert_gradients_match(actual, head, head.grad)


def test_non_contiguous_bias_gives_the_same(backend):
    head = Head(1, 12, has_bias=True)
    expected = run(head, backend, outputs=OUTPUTS)
    head.bias = torch.stack([head.bias, torch.full_like(head.bias, math.nan)], dim=-1)[:, 0]
    assert not head.bias.is_contiguous()
    actual = run(head, backend, outputs=OUTPUTS)
    for name in ("logps", *OUTPUTS):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def test_default_dtype_changes_nothing(backend):
    """Models are often made under a bf16 default; the sums must stay in fp32 all the same."""
    # More vocabulary than one chunk of either backend's backward holds.
    head = Head(1, 5, hidden_size=16, vocab_size=4500)
    results = []
    for default in (torch.float32, torch.bfloat16):
        leaves = [x.detach().requires_grad_() for x in (head.hidden, head.weight)]
        torch.set_default_dtype(default)
        try:
            result = run(head, backend, leaves, outputs=OUTPUTS)
            results.append([result.logps, result.entropy, *gradients(result.logps, head.grad, leaves)])
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Which gradients come back


@pytest.mark.parametrize("output", ["logps", "entropy"])
@pytest.mark.parametrize(
    "trained",
    [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "bias"), ("weight", "bias")],
    ids="+".join,
)
def test_only_what_is_trained_gets_a_gradient_and_the_same_one(trained, output, backend):
    head = Head(2, 6, has_bias=True)

    def measure(*names: str) -> dict[str, torch.Tensor | None]:
        leaves = dict(zip(["hidden", "weight", "bias"], head.leaves(), strict=True))
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in names)
        result = run(head, backend, list(leaves.values()), outputs=OUTPUTS)
        getattr(result, output).backward(head.grad)
        return {name: leaf.grad for name, leaf in leaves.items()}

    alone, all_of_them = measure(*trained), measure("hidden", "weight", "bias")
    for name, gradient in alone.items():
        if name in trained:
            assert torch.equal(gradient, all_of_them[name])
        else:
            assert gradient is None


def test_nothing_to_train_needs_no_graph(backend):
    head = Head(2, 6)
    frozen = run(head, backend)
    assert not frozen.logps.requires_grad
    with torch.no_grad():
        inside = run(head, backend, head.leaves(), outputs=("entropy",))
    assert not inside.logps.requires_grad
    assert not inside.entropy.requires_grad
    assert torch.equal(frozen.logps, inside.logps)


def test_only_log_probs_and_entropy_are_differentiable(backend):
    head = Head(2, 6)
    result = run(head, backend, head.leaves(), outputs=OUTPUTS)
    assert result.logps.requires_grad
    assert result.entropy.requires_grad
    for name in ("mean_logits", "is_top1", "log_sum_sq_probs", "dropped_mass", "kept_share"):
        assert not getattr(result, name).requires_grad


@pytest.mark.parametrize("with_logps", [False, True], ids=["alone", "with logps"])
@pytest.mark.parametrize("transform", ["plain", "all of them"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_through_the_entropy_matches_the_reference(dtype, transform, with_logps, backend):
    head, options = Head(2, 9, dtype=dtype, has_bias=True), TRANSFORMS[transform]
    grad_logps = head.grad.flip(0) if with_logps else None
    leaves = head.leaves()
    result = run(head, backend, leaves, outputs=("entropy",), **options)
    total = weighted(result.logps, result.entropy, grad_logps, head.grad)
    assert_gradients_match(torch.autograd.grad(total, leaves), head, grad_logps, head.grad, **options)


def test_an_output_that_is_not_used_costs_no_gradient(backend):
    head = Head(2, 6)
    with_entropy, without = head.leaves(), head.leaves()
    logps = run(head, backend, with_entropy, outputs=("entropy",)).logps
    actual = gradients(logps, head.grad, with_entropy)
    assert_equal(actual, gradients(run(head, backend, without).logps, head.grad, without))


# Autocast


@pytest.mark.parametrize("given", ["all float32", "hidden already cast"])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_casts_and_gradients_come_back_in_the_parameters_dtype(dtype, given, backend):
    head = Head(2, 6, has_bias=True)
    if given == "hidden already cast":
        head.hidden = head.hidden.to(dtype)
    inside, by_hand = head.leaves(), head.leaves()
    with torch.autocast(DEVICE.type, dtype=dtype):
        logps = run(head, backend, inside).logps
    assert logps.dtype == torch.float32
    expected = run(head, backend, [x.to(dtype) for x in by_hand]).logps
    assert torch.equal(logps, expected)
    actual_gradients = gradients(logps, head.grad, inside)
    assert [x.dtype for x in actual_gradients] == [x.dtype for x in inside]
    assert_equal(actual_gradients, gradients(expected, head.grad, by_hand))


def test_backward_under_autocast_is_the_same(backend):
    head = Head(2, 6)
    inside, outside = head.leaves(), head.leaves()
    logps = run(head, backend, inside).logps
    with torch.autocast(DEVICE.type, dtype=LOW_PRECISION[-1]):
        actual = gradients(logps, head.grad, inside)
    assert_equal(actual, gradients(run(head, backend, outside).logps, head.grad, outside))


# The certificate, and reproducibility


def test_what_was_dropped_is_known_after_the_backward(backend):
    head = Head(2, 6)
    leaves = head.leaves()
    result = run(head, backend, leaves)
    assert result.dropped_mass.shape == head.labels.shape
    assert result.dropped_mass.dtype == result.kept_share.dtype == torch.float32
    assert result.kept_share.shape == ()
    assert result.dropped_mass.isnan().all()
    assert result.kept_share.isnan()
    result.logps.backward(head.grad)
    assert not result.dropped_mass.any()
    assert result.kept_share == 1


def test_an_exact_backward_has_nothing_to_certify(backend):
    head = Head(2, 6)
    certified, exact = head.leaves(), head.leaves()
    result = run(head, backend, exact, backward="exact")
    assert result.dropped_mass is result.kept_share is None
    actual = gradients(result.logps, head.grad, exact)
    assert_equal(actual, gradients(run(head, backend, certified, tau=0.0).logps, head.grad, certified))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bitwise_equal(dtype, backend):
    head = Head(3, 15, dtype=dtype, has_bias=True)

    def measure():
        leaves = head.leaves()
        result = run(head, backend, leaves, outputs=OUTPUTS, softcap=5.0)
        values = [result.logps, result.entropy, result.mean_logits, result.log_sum_sq_probs]
        return values + gradients(result.logps + result.entropy, head.grad, leaves)

    assert_equal(measure(), measure())


def test_the_backward_leaves_its_inputs_alone(backend):
    head = Head(2, 6, has_bias=True)
    leaves, copies = head.leaves(), head.leaves()
    grad, labels = head.grad.clone(), head.labels.clone()
    gradients(run(head, backend, leaves, softcap=3.0).logps, head.grad, leaves)
    assert_equal(leaves, copies)
    assert torch.equal(grad, head.grad)
    assert torch.equal(labels, head.labels)


def test_a_second_backward_through_one_forward_gives_the_same(backend):
    head = Head(2, 6)
    leaves = head.leaves()
    logps = run(head, backend, leaves).logps
    first = torch.autograd.grad(logps, leaves, head.grad, retain_graph=True)
    assert_equal(list(first), gradients(logps, head.grad, leaves))


def test_another_shape_leaves_alone_what_is_not_a_value_of_a_token():
    """The group that shares a head, too: α-DPO's statistics count its ranks once."""
    tokens = run(Head(2, 6), "torch", outputs=OUTPUTS)
    tokens = replace(tokens, vocab_group=object())
    reshaped = tokens.reshaped(lambda x: x[:, 1:])
    for name in ("logps", *OUTPUTS):
        assert torch.equal(getattr(reshaped, name), getattr(tokens, name)[:, 1:])
    for name in ("dropped_mass", "kept_share", "dropped", "vocab_group"):
        assert getattr(reshaped, name) is getattr(tokens, name)
