"""The diagnostics of the papers against their definitions, pair by pair in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from test_loss import Batch
from tolerance import relative_error

from focalkern import FusedFocalPOLoss, FusedPairLoss, reference
from focalkern.diagnostics import gradient_contribution_ratio, pair_gradient_norms, pair_metrics
from focalkern.methods import dpo

LENGTHS = (4, 2, 5, 6, 3, 5)


def far_apart(batch: Batch) -> dict[str, torch.Tensor]:
    """References that make the first pair badly misranked, the last well ranked."""
    offsets = torch.linspace(600, -600, batch.pairs, device=DEVICE)
    return {"ref_chosen_logps": offsets - 20, "ref_rejected_logps": -offsets - 20}


def test_metrics_are_means_over_the_pairs(backend):
    batch = Batch(LENGTHS)
    refs = far_apart(batch)
    out = FusedFocalPOLoss(beta=0.1, gamma=0.5, backend=backend)(
        batch.hidden, batch.weight, batch.labels, **refs
    )
    metrics = pair_metrics(out)
    margins = out.chosen_rewards - out.rejected_rewards
    assert metrics["rewards/margins"] == margins.mean()
    assert metrics["rewards/accuracies"].item() == pytest.approx((margins > 0).float().mean().item())
    assert metrics["prob"] == out.prob.mean()
    assert metrics["weight"] == out.weight.mean()
    # p < e^(−1/γ) is where FocalPO's gradient changes sign.
    assert metrics["flipped"] == (out.prob < torch.exp(torch.tensor(-1 / 0.5))).float().mean() > 0
    assert metrics["logps/chosen"] == out.chosen_logps.mean()
    assert "adaptive_margin" not in metrics
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def test_equal_rewards_count_one_half(backend):
    batch = Batch(LENGTHS)
    loss_fn = FusedFocalPOLoss(backend=backend)
    refs = loss_fn.reference_logps(batch.hidden, batch.weight, batch.labels)
    out = loss_fn(batch.hidden, batch.weight, batch.labels, None, *refs)
    assert pair_metrics(out)["rewards/accuracies"] == 0.5


def test_the_adaptive_margin_is_reported(backend):
    batch = Batch(LENGTHS)
    out = FusedFocalPOLoss.alpha_dpo(backend=backend)(
        batch.hidden, batch.weight, batch.labels, **far_apart(batch)
    )
    assert pair_metrics(out)["adaptive_margin"] == out.adaptive_margin.mean()


def test_metrics_of_a_pair_loss_know_its_weights_after_the_backward(backend):
    batch = Batch(LENGTHS)
    leaves = batch.leaves()

    def wrong_way(pairs):
        sign = torch.tensor([1.0, 1.0, -1.0], device=DEVICE)
        return dpo(pairs) * sign

    loss_fn = FusedPairLoss(wrong_way, backend=backend, backward="exact")
    out = loss_fn(labels=batch.labels, **leaves, **batch.refs)
    assert pair_metrics(out)["chosen_weight"].isnan()
    assert pair_metrics(out)["flipped"].isnan()
    out.loss.backward()
    # −dL/dlogps_w = β·(1 − p), with the sign of the pair, over the number of pairs.
    expected = 0.1 * (1 - out.prob) * torch.tensor([1.0, 1.0, -1.0], device=DEVICE) / 3
    for name in ("chosen_weight", "rejected_weight"):
        torch.testing.assert_close(pair_metrics(out)[name], expected.mean(), rtol=1e-5, atol=1e-8)
    assert pair_metrics(out)["flipped"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_gradient_contribution_ratio_is_that_of_each_pair_by_itself(gamma, packed, backend):
    batch = Batch(LENGTHS)
    # Two of three pairs ranked right, all with a gradient to speak of.
    refs = {
        "ref_chosen_logps": torch.tensor([-5.0, -40.0, -45.0], device=DEVICE),
        "ref_rejected_logps": torch.tensor([-30.0, -20.0, -10.0], device=DEVICE),
    }
    inputs, options = {"hidden": batch.hidden, "labels": batch.labels}, {}
    if packed:
        hidden, labels, cu_seqlens = batch.packed()
        inputs, options = {"hidden": hidden, "labels": labels}, {"cu_seqlens": cu_seqlens}
    inputs["hidden"] = inputs["hidden"].clone().requires_grad_()
    loss_fn = FusedFocalPOLoss(gamma=gamma, backend=backend, backward="exact")
    out = loss_fn(weight=batch.weight, **inputs, **refs, **options)
    out.loss.backward()
    norms = pair_gradient_norms(inputs["hidden"].grad, **options)
    ratio = gradient_contribution_ratio(norms, out.chosen_rewards - out.rejected_rewards)

    expected = []
    for pair in range(batch.pairs):
        leaves = batch.leaves(torch.float64)
        losses = reference.focalpo_loss(
            labels=batch.labels, **leaves, **{k: x.double() for k, x in refs.items()}, gamma=gamma
        )
        (gradient,) = torch.autograd.grad(losses[pair] / batch.pairs, leaves["hidden"])
        expected.append(gradient.norm())
    expected = torch.stack(expected)
    right = out.prob.double() > 0.5
    assert 0 < right.sum() < batch.pairs
    assert relative_error(norms, expected) <= 1e-5
    assert ratio.item() == pytest.approx((expected[right].sum() / expected.sum()).item(), rel=1e-5)


def test_a_margin_of_the_loss_does_not_change_what_is_ranked_correctly(backend):
    batch = Batch(LENGTHS)
    hidden = batch.hidden.clone().requires_grad_()
    out = FusedFocalPOLoss.simpo(2.0, margin=50.0, backend=backend)(hidden, batch.weight, batch.labels)
    out.loss.backward()
    assert (out.prob < 0.5).all()
    margins = out.chosen_rewards - out.rejected_rewards
    assert 0 < (margins > 0).sum() < batch.pairs
    norms = pair_gradient_norms(hidden.grad)
    expected = norms[margins > 0].sum() / norms.sum()
    assert gradient_contribution_ratio(norms, margins).item() == pytest.approx(expected.item())


def test_pairs_that_are_level_count_for_half():
    assert gradient_contribution_ratio(torch.ones(4), torch.tensor([0.0, 0.0, 1.0, -1.0])) == 0.5


def test_gamma_of_the_schedule_is_reported(backend):
    batch = Batch(LENGTHS)
    loss_fn = FusedFocalPOLoss.dynamic(10, backend=backend)
    loss_fn.set_step(5)
    out = loss_fn(batch.hidden, batch.weight, batch.labels, **batch.refs)
    assert out.gamma == loss_fn.current_gamma
    assert pair_metrics(out)["gamma"].item() == pytest.approx(loss_fn.current_gamma)


def test_wrong_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^dhidden must be \[2B, T, H\]"):
        pair_gradient_norms(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"^dhidden must be \[N, H\]"):
        pair_gradient_norms(torch.zeros(2, 4, 5), cu_seqlens=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"^norms must be \[B\] like margins, \[3\]; got \[2\]"):
        gradient_contribution_ratio(torch.zeros(2), torch.zeros(3))
