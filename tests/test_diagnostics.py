"""The diagnostics of the papers against their definitions, pair by pair in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from problems import Batch, batch
from tolerance import relative_error

from focalkern import FusedFocalPOLoss, FusedPairLoss
from focalkern.diagnostics import gradient_contribution_ratio, pair_gradient_norms, pair_metrics
from focalkern.methods import dpo

LENGTHS = (4, 2, 5, 6, 3, 5)


def far_apart(pairs: Batch) -> dict[str, torch.Tensor]:
    """References that make the first pair badly misranked, the last well ranked."""
    offsets = torch.linspace(600, -600, pairs.pairs, device=DEVICE)
    return {"ref_chosen_logps": offsets - 20, "ref_rejected_logps": -offsets - 20}


def test_metrics_are_means_over_the_pairs(backend):
    pairs = batch(LENGTHS)
    out = pairs.loss(FusedFocalPOLoss(beta=0.1, gamma=0.5, backend=backend), **far_apart(pairs))
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
    pairs, loss_fn = batch(LENGTHS), FusedFocalPOLoss(backend=backend)
    refs = loss_fn.reference_logps(pairs.hidden, pairs.weight, pairs.labels)
    out = loss_fn(pairs.hidden, pairs.weight, pairs.labels, None, *refs)
    assert pair_metrics(out)["rewards/accuracies"] == 0.5


def test_the_adaptive_margin_is_reported(backend):
    pairs = batch(LENGTHS)
    out = pairs.loss(FusedFocalPOLoss.alpha_dpo(backend=backend), **far_apart(pairs))
    assert pair_metrics(out)["adaptive_margin"] == out.adaptive_margin.mean()


def test_metrics_of_a_pair_loss_know_its_weights_after_the_backward(backend):
    pairs = batch(LENGTHS)
    sign = torch.tensor([1.0, 1.0, -1.0], device=DEVICE)
    loss_fn = FusedPairLoss(lambda x: dpo(x) * sign, backend=backend, backward="exact")
    out = pairs.loss(loss_fn, pairs.leaves())
    assert pair_metrics(out)["chosen_weight"].isnan()
    assert pair_metrics(out)["flipped"].isnan()
    out.loss.backward()
    # −dL/dlogps_w = β·(1 − p), with the sign of the pair, over the number of pairs.
    expected = 0.1 * (1 - out.prob) * sign / 3
    for name in ("chosen_weight", "rejected_weight"):
        torch.testing.assert_close(pair_metrics(out)[name], expected.mean(), rtol=1e-5, atol=1e-8)
    assert pair_metrics(out)["flipped"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(("gamma", "layout"), [(0.0, "padded"), (0.5, "padded"), (0.5, "packed")])
def test_gradient_contribution_ratio_is_that_of_each_pair_by_itself(gamma, layout, backend):
    pairs = batch(LENGTHS)
    # Two of three pairs ranked right, all with a gradient to speak of.
    ratios = torch.tensor([8.0, -4.0, 3.0], device=DEVICE)
    logps = pairs.run(backend).logps.sum(-1)
    pairs.refs = dict(zip(pairs.refs, (logps - torch.cat([ratios, -ratios])).chunk(2), strict=True))
    inputs = pairs.in_layout(layout)
    inputs["hidden"] = inputs["hidden"].clone().requires_grad_()
    out = pairs.loss(FusedFocalPOLoss(gamma=gamma, backend=backend, backward="exact"), inputs)
    out.loss.backward()
    norms = pair_gradient_norms(inputs["hidden"].grad, cu_seqlens=inputs.get("cu_seqlens"))
    ratio = gradient_contribution_ratio(norms, out.chosen_rewards - out.rejected_rewards)

    leaves = pairs.leaves(torch.float64)
    losses = pairs.plain_losses(leaves, gamma=gamma) / pairs.pairs
    gradients = [torch.autograd.grad(loss, leaves["hidden"], retain_graph=True)[0] for loss in losses]
    expected = torch.stack([gradient.norm() for gradient in gradients])
    right = out.prob.double() > 0.5
    assert 0 < right.sum() < pairs.pairs
    assert relative_error(norms, expected) <= 1e-5
    assert ratio.item() == pytest.approx((expected[right].sum() / expected.sum()).item(), rel=1e-5)


def test_a_margin_of_the_loss_does_not_change_what_is_ranked_correctly(backend):
    pairs = batch(LENGTHS)
    out, gradients = pairs.step(FusedFocalPOLoss.simpo(2.0, margin=50.0, backend=backend))
    assert (out.prob < 0.5).all()
    margins = out.chosen_rewards - out.rejected_rewards
    assert 0 < (margins > 0).sum() < pairs.pairs
    norms = pair_gradient_norms(gradients["hidden"])
    expected = norms[margins > 0].sum() / norms.sum()
    assert gradient_contribution_ratio(norms, margins).item() == pytest.approx(expected.item())


def test_pairs_that_are_level_count_for_half():
    assert gradient_contribution_ratio(torch.ones(4), torch.tensor([0.0, 0.0, 1.0, -1.0])) == 0.5


def test_gamma_of_the_schedule_is_reported(backend):
    loss_fn = FusedFocalPOLoss.dynamic(10, backend=backend)
    loss_fn.set_step(5)
    out = batch(LENGTHS).loss(loss_fn)
    assert out.gamma == loss_fn.current_gamma
    assert pair_metrics(out)["gamma"].item() == pytest.approx(loss_fn.current_gamma)


def test_wrong_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^dhidden must be \[2B, T, H\]"):
        pair_gradient_norms(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"^dhidden must be \[N, H\]"):
        pair_gradient_norms(torch.zeros(2, 4, 5), cu_seqlens=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"^norms must be \[B\] like margins, \[3\]; got \[2\]"):
        gradient_contribution_ratio(torch.zeros(2), torch.zeros(3))
