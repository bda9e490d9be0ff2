"""`FusedFocalPOLoss`: every field of its output and its gradient against the reference, in every layout.

Gradients over random problems are in `test_gradients.py`, the objective's numerics in `test_objective.py`.
"""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from conftest import DEVICE, LOW_PRECISION
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


class Batch:
    """Random preference pairs with a prompt, completions of unequal length and padding."""

    def __init__(
        self,
        lengths: tuple[int, ...] = (
            4,
            2,
            5,
            1,
            5,
            3,
        ),  # chosen first; of 4 and more the first token is prompt
        hidden_size: int = 16,
        vocab_size: int = 150,
        dtype: torch.dtype = torch.float32,
        has_bias: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        self.lengths = lengths
        self.pairs = len(lengths) // 2
        shape = (len(lengths), max(lengths))
        self.hidden = draw(*shape, hidden_size).to(DEVICE, dtype)
        self.weight = (draw(vocab_size, hidden_size) * 3 / hidden_size**0.5).to(DEVICE, dtype)
        self.bias = draw(vocab_size).to(DEVICE, dtype) if has_bias else None
        self.labels = torch.randint(vocab_size, shape, generator=generator)
        for row, length in zip(self.labels, lengths, strict=True):
            row[length:] = -100
            if length > 3:
                row[0] = -100
        self.labels = self.labels.to(DEVICE)
        self.refs = {
            "ref_chosen_logps": (-20 + draw(self.pairs)).float().to(DEVICE),
            "ref_rejected_logps": (-20 + draw(self.pairs)).float().to(DEVICE),
        }

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {
            name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_()
            for name, x in tensors.items()
            if x is not None
        }

    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [N, H], labels [N] and cu_seqlens: without the padding."""
        real = (
            torch.arange(self.labels.shape[1], device=DEVICE)
            < torch.tensor(self.lengths, device=DEVICE)[:, None]
        )
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], device=DEVICE)
        return self.hidden[real], self.labels[real], cu_seqlens


def expected_fields(batch: Batch, gamma: float, modulation: str, options: dict) -> dict[str, torch.Tensor]:
    """Each field by its definition, in float64; `weight` by autograd."""
    objective = {"beta": 0.1, "margin": 0.0, "label_smoothing": 0.0, **options}
    reference_free = objective.pop("reference_free", False)
    normalize = objective.pop("length_normalize", False)
    leaves = batch.leaves(torch.float64)
    logps = reference.linear_logps(labels=batch.labels, **leaves)["logps"].sum(-1)
    lengths = (batch.labels != -100).sum(-1)
    refs = torch.cat(list(batch.refs.values())).double()
    divisor = lengths if normalize else torch.ones_like(lengths)
    score = (logps if reference_free else logps - refs) / divisor
    score_w, score_l = score.detach().chunk(2)
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
        actual = getattr(out, name)
        assert actual.dtype == dtype, name
        torch.testing.assert_close(
            actual.detach().double(),
            expected[name].detach(),
            rtol=0,
            atol=allowed,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert out.lengths.tolist() == expected["lengths"].tolist()


# Values


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_every_field_matches_its_definition(modulation, objective, backend):
    options = OBJECTIVES[objective]
    batch = Batch()
    loss_fn = FusedFocalPOLoss(gamma=0.5, modulation=modulation, backend=backend, **options)
    out = loss_fn(batch.hidden, batch.weight, batch.labels, **batch.refs)
    expected = expected_fields(batch, 0.5, modulation, options)
    assert_fields_match(out, expected, loss_fn.beta, torch.float32)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_every_field_matches_its_definition_in_float64(modulation, objective):
    options = OBJECTIVES[objective]
    batch = Batch(dtype=torch.float64, has_bias=True)
    loss_fn = FusedFocalPOLoss(gamma=0.5, modulation=modulation, backend="torch", **options)
    out = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, **batch.refs)
    assert_fields_match(out, expected_fields(batch, 0.5, modulation, options), loss_fn.beta, torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduction_is_over_pairs(reduction, backend):
    batch = Batch()
    out = FusedFocalPOLoss(reduction=reduction, backend=backend)(
        batch.hidden, batch.weight, batch.labels, **batch.refs
    )
    expected = out.losses if reduction == "none" else getattr(out.losses, reduction)()
    assert torch.equal(out.loss, expected)
    assert out.losses.shape == (batch.pairs,)


def test_log_probs_are_sums_also_when_length_normalised(backend):
    batch = Batch()
    plain = FusedFocalPOLoss(backend=backend)(batch.hidden, batch.weight, batch.labels, **batch.refs)
    normalised = FusedFocalPOLoss(length_normalize=True, backend=backend)(
        batch.hidden, batch.weight, batch.labels, **batch.refs
    )
    assert torch.equal(plain.chosen_logps, normalised.chosen_logps)
    assert torch.equal(plain.rejected_logps, normalised.rejected_logps)


def test_given_references_are_not_used_when_reference_free(backend):
    batch = Batch()
    loss_fn = FusedFocalPOLoss(reference_free=True, backend=backend)
    with_refs = loss_fn(batch.hidden, batch.weight, batch.labels, **batch.refs)
    without = loss_fn(batch.hidden, batch.weight, batch.labels)
    for name in FIELDS:
        assert torch.equal(getattr(with_refs, name), getattr(without, name))


@pytest.mark.parametrize("ref_dtype", [torch.float64, torch.float16])
def test_references_may_have_another_dtype(ref_dtype, backend):
    batch = Batch()
    refs = {name: x.to(ref_dtype) for name, x in batch.refs.items()}
    loss_fn = FusedFocalPOLoss(backend=backend)
    actual = loss_fn(batch.hidden, batch.weight, batch.labels, **refs)
    expected = loss_fn(batch.hidden, batch.weight, batch.labels, **{n: x.float() for n, x in refs.items()})
    assert actual.losses.dtype == torch.float32
    assert torch.equal(actual.losses, expected.losses)


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
    batch = Batch(has_bias=True)
    if "ignore_index" in options:
        batch.labels[batch.labels == -100] = options["ignore_index"]
    out = FusedFocalPOLoss(backend=backend, **options)(
        batch.hidden, batch.weight, batch.labels, batch.bias, **batch.refs
    )
    logps = linear_logps(
        batch.hidden, batch.weight, batch.labels, bias=batch.bias, backend=backend, **options
    ).logps
    actual = torch.cat([out.chosen_logps, out.rejected_logps])
    # T = 5 terms, added in another order.
    torch.testing.assert_close(actual, logps.sum(-1), rtol=5 * torch.finfo(torch.float32).eps, atol=0)
    assert out.lengths.tolist() == (batch.labels != options.get("ignore_index", -100)).sum(-1).tolist()


# Gradients


def loss_gradients(batch: Batch, loss_fn: FusedFocalPOLoss, scale=1.0) -> list[torch.Tensor]:
    leaves = batch.leaves()
    loss = (loss_fn(labels=batch.labels, **leaves, **batch.refs).loss * scale).sum()
    return list(torch.autograd.grad(loss, list(leaves.values())))


def reference_gradients(batch: Batch, dtype: torch.dtype, scale=1.0, **options) -> list[torch.Tensor]:
    leaves = batch.leaves(dtype)
    losses = reference.focalpo_loss(labels=batch.labels, **leaves, **batch.refs, **options)
    return list(torch.autograd.grad((losses * scale).sum(), list(leaves.values())))


@pytest.mark.parametrize("length_normalize", [False, True], ids=["", "length_normalize"])
@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_gradient_matches_autograd_of_the_reference(dtype, modulation, length_normalize, backend):
    batch = Batch(dtype=dtype, has_bias=True)
    options = {"modulation": modulation, "length_normalize": length_normalize, "gamma": 0.5, "beta": 0.3}
    loss_fn = FusedFocalPOLoss(backend=backend, reduction="sum", **options)
    actual = loss_gradients(batch, loss_fn)
    naive = reference_gradients(batch, dtype, **options)
    exact = reference_gradients(batch, torch.float64, **options)
    # The sums of log-probs, of this size, move u by their rounding times β, and the slope by no more.
    out = loss_fn(labels=batch.labels, **batch.leaves(), **batch.refs)
    conditioning = loss_fn.beta * 2 * out.chosen_logps.abs().max().item()
    for values in zip(actual, naive, exact, ["dhidden", "dweight", "dbias"], strict=True):
        assert_as_accurate(*values, conditioning)


@pytest.mark.parametrize("factor", [-4.0, 0.5])  # powers of two: scaling does not round
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_scales_with_the_upstream_factor(reduction, factor, backend):
    batch = Batch()
    loss_fn = FusedFocalPOLoss(reduction=reduction, backend=backend)
    once, scaled = loss_gradients(batch, loss_fn), loss_gradients(batch, loss_fn, factor)
    for single, multiple in zip(once, scaled, strict=True):
        assert torch.equal(factor * single, multiple)


def test_gradient_of_the_mean_is_that_of_the_sum_over_the_number_of_pairs(backend):
    batch = Batch(lengths=(4, 3, 2, 3, 2, 1, 4, 3))  # 4 pairs: 1/4 is exact
    mean = loss_gradients(batch, FusedFocalPOLoss(backend=backend))
    total = loss_gradients(batch, FusedFocalPOLoss(reduction="sum", backend=backend))
    for a, b in zip(mean, total, strict=True):
        assert torch.equal(4 * a, b)


def test_without_reduction_each_pair_has_its_own_upstream_factor(backend):
    batch = Batch()
    scale = torch.tensor([0.5, -2.0, 0.0], device=DEVICE)
    actual = loss_gradients(batch, FusedFocalPOLoss(reduction="none", backend=backend), scale)
    naive = reference_gradients(batch, torch.float32, scale)
    exact = reference_gradients(batch, torch.float64, scale)
    for values in zip(actual, naive, exact, ["dhidden", "dweight"], strict=True):
        assert_as_accurate(*values, conditioning=0.1 * 40)  # β times the size of the sums of log-probs
    ignored = scale.repeat(2) == 0
    assert not actual[0][ignored].any()
    assert actual[0][~ignored].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_only_the_loss_is_differentiable(reduction, backend):
    batch = Batch()
    out = FusedFocalPOLoss(reduction=reduction, backend=backend)(
        labels=batch.labels, **batch.leaves(), **batch.refs
    )
    assert out.loss.requires_grad
    assert out.losses.requires_grad == (reduction == "none")
    for name in (*FIELDS[1:], "lengths", "dropped_mass", "kept_share"):
        assert not getattr(out, name).requires_grad, name


def test_no_grad_gives_the_same_values(backend):
    batch = Batch()
    loss_fn = FusedFocalPOLoss(backend=backend)
    with torch.no_grad():
        quiet = loss_fn(labels=batch.labels, **batch.leaves(), **batch.refs)
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.loss, loss_fn(labels=batch.labels, **batch.leaves(), **batch.refs).loss)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_changes_nothing(trained, backend):
    batch = Batch()
    loss_fn = FusedFocalPOLoss(backend=backend)
    leaves = batch.leaves()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    loss_fn(labels=batch.labels, **leaves, **batch.refs).loss.backward()
    both = dict(zip(leaves, loss_gradients(batch, loss_fn), strict=True))
    for name, leaf in leaves.items():
        assert leaf.grad is None if name != trained else torch.equal(leaf.grad, both[name])


def test_two_runs_are_bitwise_equal(backend):
    batch = Batch(has_bias=True)
    loss_fn = FusedFocalPOLoss(backend=backend)
    for first, second in zip(loss_gradients(batch, loss_fn), loss_gradients(batch, loss_fn), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_gives_float32_losses_and_gradients_in_the_parameters_dtype(dtype, backend):
    batch = Batch()
    loss_fn = FusedFocalPOLoss(backend=backend)
    leaves, by_hand = batch.leaves(), batch.leaves()
    with torch.autocast(DEVICE.type, dtype=dtype):
        out = loss_fn(labels=batch.labels, **leaves, **batch.refs)
    out.loss.backward()
    expected = loss_fn(labels=batch.labels, **{n: x.to(dtype) for n, x in by_hand.items()}, **batch.refs)
    expected.loss.backward()
    for name in FIELDS:
        assert getattr(out, name).dtype == torch.float32
        assert torch.equal(getattr(out, name), getattr(expected, name))
    for name in leaves:
        assert leaves[name].grad.dtype == torch.float32
        assert torch.equal(leaves[name].grad, by_hand[name].grad)


# Layouts


def run_layouts(batch: Batch, loss_fn: FusedFocalPOLoss, shift: bool):
    """The same pairs padded and packed: output, and dhidden of the packed tokens with dweight, of each."""
    hidden, labels, cu_seqlens = batch.packed()
    real = (
        torch.arange(batch.labels.shape[1], device=DEVICE)
        < torch.tensor(batch.lengths, device=DEVICE)[:, None]
    )
    results = []
    for x, y, layout in ((batch.hidden, batch.labels, {}), (hidden, labels, {"cu_seqlens": cu_seqlens})):
        leaves = [x.detach().clone().requires_grad_(), batch.weight.detach().clone().requires_grad_()]
        out = loss_fn(*leaves, y, shift=shift, **layout, **batch.refs)
        dhidden, dweight = torch.autograd.grad(out.loss, leaves)
        results.append((out, dhidden if layout else dhidden[real], dweight))
    return results


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize(
    "lengths",
    [
        (4, 2, 5, 1, 5, 3),
        (4, 0, 5, 1, 5, 3),  # an empty sequence in the middle
        (0, 2, 5, 1, 5, 3),  # at the start
        (4, 2, 5, 1, 5, 0),  # at the end
        (0, 0, 5, 0, 0, 4),  # several in a row
        (1, 1, 1, 1),  # nothing left to predict when shifted
        (0, 7),
        (7, 0),
    ],
    ids=str,
)
def test_packed_gives_the_same_as_padded(lengths, shift, backend):
    batch = Batch(lengths=lengths)
    loss_fn = FusedFocalPOLoss(backend=backend)
    (padded, padded_dhidden, padded_dweight), (packed, dhidden, dweight) = run_layouts(batch, loss_fn, shift)
    # The rows of the head are the same; only the sums over a sequence may be taken in another order.
    eps = torch.finfo(torch.float32).eps
    size = max(padded.chosen_logps.abs().max().item(), padded.rejected_logps.abs().max().item())
    for name in FIELDS:
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name), rtol=0, atol=8 * eps * size)
    assert packed.lengths.tolist() == padded.lengths.tolist()
    for actual, expected in ((dhidden, padded_dhidden), (dweight, padded_dweight)):
        atol = 8 * eps * (1 + size) * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_a_packed_batch_of_empty_sequences_has_the_loss_of_a_tie(cu_dtype, backend):
    batch = Batch()
    hidden = batch.hidden.new_zeros(0, batch.hidden.shape[-1]).requires_grad_()
    weight = batch.weight.detach().clone().requires_grad_()
    cu_seqlens = torch.zeros(5, dtype=cu_dtype, device=DEVICE)
    refs = {name: torch.zeros(2, device=DEVICE) for name in batch.refs}
    out = FusedFocalPOLoss(gamma=0.0, backend=backend)(
        hidden, weight, torch.zeros(0, dtype=torch.int64, device=DEVICE), cu_seqlens=cu_seqlens, **refs
    )
    # log 2 is rounded once or twice.
    torch.testing.assert_close(out.losses.cpu(), torch.tensor([2.0, 2.0]).log(), rtol=2e-7, atol=0)
    out.loss.backward()
    assert not weight.grad.any()
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("length_normalize", [False, True])
def test_shift_equals_slicing(length_normalize, backend):
    batch = Batch(lengths=(4, 3, 5, 4))
    loss_fn = FusedFocalPOLoss(length_normalize=length_normalize, backend=backend)
    spoiled = batch.labels.clone()
    spoiled[:, 0] = 10**6  # predicted by nothing: may be anything
    shifted_leaves, sliced_leaves = batch.leaves(), batch.leaves()
    shifted = loss_fn(labels=spoiled, shift=True, **shifted_leaves, **batch.refs)
    sliced = loss_fn(
        sliced_leaves["hidden"][:, :-1], sliced_leaves["weight"], batch.labels[:, 1:], **batch.refs
    )
    for name in (*FIELDS, "lengths"):
        assert torch.equal(getattr(shifted, name), getattr(sliced, name))
    shifted.loss.backward()
    sliced.loss.backward()
    for name in shifted_leaves:
        assert torch.equal(shifted_leaves[name].grad, sliced_leaves[name].grad)
    assert not shifted_leaves["hidden"].grad[:, -1].any()


def test_packed_shift_does_not_look_at_first_labels_or_across_a_border(backend):
    batch = Batch(lengths=(4, 3, 5, 2))
    hidden, labels, cu_seqlens = batch.packed()
    loss_fn = FusedFocalPOLoss(backend=backend)
    expected = loss_fn(hidden, batch.weight, labels, shift=True, cu_seqlens=cu_seqlens, **batch.refs)
    spoiled = labels.clone()
    spoiled[cu_seqlens[:-1]] = 10**6
    actual = loss_fn(hidden, batch.weight, spoiled, shift=True, cu_seqlens=cu_seqlens, **batch.refs)
    for name in (*FIELDS, "lengths"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_per_token_fields_have_the_shape_of_the_shifted_labels(layout, shift, backend):
    batch = Batch()
    if layout == "padded":
        inputs = {"hidden": batch.hidden, "labels": batch.labels}
        expected = (6, 5 - shift)
    else:
        hidden, labels, cu_seqlens = batch.packed()
        inputs = {"hidden": hidden, "labels": labels, "cu_seqlens": cu_seqlens}
        expected = (sum(batch.lengths),)
    out = FusedFocalPOLoss(backend=backend)(weight=batch.weight, shift=shift, **inputs, **batch.refs)
    assert out.dropped_mass.shape == expected
    assert out.kept_share.shape == ()


# The certificate


def test_certificate_needs_a_backward(backend):
    batch = Batch()
    out = FusedFocalPOLoss(backend=backend)(labels=batch.labels, **batch.leaves(), **batch.refs)
    assert out.dropped_mass.isnan().all()
    assert out.kept_share.isnan()
    with pytest.raises(RuntimeError, match="backward"):
        out.certificate()
    out.loss.backward()
    assert not out.dropped_mass.any()
    assert out.kept_share == 1
    assert out.certificate() == Certificate(0.0, 0.0, 1.0, 0.0)


def test_certificate_of_an_exact_backward_is_zero_without_one(backend):
    batch = Batch()
    loss_fn = FusedFocalPOLoss(backward="exact", backend=backend)
    out = loss_fn(labels=batch.labels, **batch.leaves(), **batch.refs)
    assert out.dropped_mass is out.kept_share is None
    certificate = out.certificate()
    assert certificate.mean_dropped_mass == certificate.max_dropped_mass == certificate.dhidden_bound == 0.0
    assert certificate.kept_share == 1.0
    assert "100.0%" in str(certificate)


def test_certificate_of_an_empty_batch_is_zero(backend):
    batch = Batch()
    leaves = batch.leaves()
    out = FusedFocalPOLoss(backend=backend)(
        labels=torch.full_like(batch.labels, -100), **leaves, **batch.refs
    )
    out.loss.backward()
    assert out.certificate() == Certificate(0.0, 0.0, 1.0, 0.0)


# The module


def test_dpo_preset_is_gamma_zero(backend):
    batch = Batch()
    out = FusedFocalPOLoss.dpo(beta=0.3, backend=backend)(
        batch.hidden, batch.weight, batch.labels, **batch.refs
    )
    ref_chosen, ref_rejected = batch.refs.values()
    u = 0.3 * ((out.chosen_logps - ref_chosen) - (out.rejected_logps - ref_rejected))
    # u is of size 10: a few roundings of it.
    atol = 40 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out.losses, -torch.nn.functional.logsigmoid(u), rtol=0, atol=atol)
    assert FusedFocalPOLoss.dpo().beta == 0.1


def test_simpo_preset_is_reference_free_length_normalised_with_a_margin(backend):
    batch = Batch()
    loss_fn = FusedFocalPOLoss.simpo(beta=2.5, margin=1.2, backend=backend)
    out = loss_fn(batch.hidden, batch.weight, batch.labels)
    mean_w, mean_l = (torch.cat([out.chosen_logps, out.rejected_logps]) / out.lengths).chunk(2)
    atol = 40 * torch.finfo(torch.float32).eps
    expected = -torch.nn.functional.logsigmoid(2.5 * (mean_w - mean_l) - 1.2)
    torch.testing.assert_close(out.losses, expected, rtol=0, atol=atol)
    torch.testing.assert_close(out.chosen_rewards, 2.5 * mean_w, rtol=0, atol=atol)


@pytest.mark.parametrize("preset", ["dpo", "simpo"])
def test_presets_take_the_options_of_the_class(preset):
    loss_fn = getattr(FusedFocalPOLoss, preset)(gamma=0.05, modulation="focal", softcap=30.0)
    assert (loss_fn.gamma, loss_fn.modulation, loss_fn.softcap) == (0.05, "focal", 30.0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_loss_computes_the_same(copied, backend):
    batch = Batch()
    loss_fn = FusedFocalPOLoss(gamma=0.5, margin=0.3, softcap=4.0, backend=backend)
    first, second = (
        f(batch.hidden, batch.weight, batch.labels, **batch.refs).losses for f in (loss_fn, copied(loss_fn))
    )
    assert torch.equal(first, second)


def test_strided_cu_seqlens_give_the_same(backend):
    batch = Batch()
    hidden, labels, cu_seqlens = batch.packed()
    loss_fn = FusedFocalPOLoss(backend=backend)
    strided = cu_seqlens.repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    first, second = (
        loss_fn(hidden, batch.weight, labels, cu_seqlens=x, **batch.refs).losses
        for x in (cu_seqlens, strided)
    )
    assert torch.equal(first, second)


def test_repr_shows_what_was_configured():
    text = repr(FusedFocalPOLoss(beta=0.25, gamma=0.125, modulation="inverse", margin=0.5, backward="exact"))
    assert text.startswith("FusedFocalPOLoss(")
    for part in ("beta=0.25", "gamma=0.125", "modulation='inverse'", "margin=0.5", "backward='exact'"):
        assert part in text


def test_compiled_training_step_gives_the_same_as_eager(backend):
    torch.manual_seed(0)
    batch = Batch()
    body = torch.nn.Linear(16, 16).to(DEVICE)
    head = torch.nn.Linear(16, 150, bias=False).to(DEVICE)
    loss_fn = FusedFocalPOLoss(backend=backend)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        states = torch.tanh(body(hidden))
        out = loss_fn(states, head.weight, batch.labels, shift=True, **batch.refs)
        tokens = linear_logps(
            states, head.weight, batch.labels, shift=True, backend=backend, outputs=("entropy",)
        )
        return 2 * out.loss - 0.01 * tokens.logps.mean() - 0.1 * tokens.entropy.mean()

    def measure(step) -> list[torch.Tensor]:
        parameters = [*body.parameters(), *head.parameters()]
        loss = step(batch.hidden)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    eager, compiled = measure(step), measure(torch.compile(step, backend="aot_eager"))
    for actual, expected in zip(compiled, eager, strict=True):
        # The same operations around the same kernels, at most regrouped.
        atol = 8 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
