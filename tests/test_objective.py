"""The pairwise objective: its values against the definition, its accuracy where naive formulas fail, and what
the papers prove of it.

`exact` evaluates the definition in multiple precision and differentiates it numerically: it shares no formula
for the slope with the library.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from focalkern import reference
from focalkern.pairs.functions import PairLossFunction, SequenceSumFunction
from focalkern.pairs.objective import MODULATIONS, modulated_nll, pair_loss, sequence_scores
from focalkern.records import PairConstants, PairObjective

GAMMAS = (0.0, 0.05, 0.5, 1.0)
EPS = torch.finfo(torch.float64).eps


def exact(u: float, gamma: float, modulation: str) -> tuple[mpmath.mpf, mpmath.mpf]:
    """−w(p)·log p and its derivative in u."""

    def loss(u):
        log_p, log_q = -mpmath.log1p(mpmath.exp(-u)), -mpmath.log1p(mpmath.exp(u))
        log_w = {"focalpo": gamma * log_p, "inverse": -gamma * log_q, "focal": gamma * log_q}[modulation]
        return -mpmath.exp(log_w) * log_p

    # e^-|u| beside 1 takes 0.43·|u| digits; beyond |u| = 1000 it underflows in float64.
    with mpmath.workdps(60 + int(min(abs(u), 1000) / 2)):
        return loss(mpmath.mpf(u)), mpmath.diff(loss, mpmath.mpf(u))


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def objective(**changes) -> PairObjective:
    fields = {
        "beta": 0.7,
        "gamma": 0.5,
        "modulation": "focalpo",
        "margin": 0.0,
        "length_normalize": False,
        "label_smoothing": 0.0,
    }
    return PairObjective(**{**fields, **changes})


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("gamma", [*GAMMAS, 2.0])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_loss_and_slope_are_those_of_the_definition(modulation, gamma, label_smoothing):
    u = torch.linspace(-4, 4, 161, dtype=torch.float64, requires_grad=True)
    expected = reference.pair_losses(
        u, 0.0, 0.0, 0.0, beta=1.0, gamma=gamma, modulation=modulation, label_smoothing=label_smoothing
    )
    (expected_slope,) = torch.autograd.grad(expected.sum(), u)

    loss, slope = pair_loss(u.detach(), gamma, modulation, label_smoothing)

    # The definition takes 1 − σ(u), off by eps·e^|u|, and its slope ("inverse") cancels once more by as much.
    allowed = 16 * EPS * torch.exp(2 * u.detach().abs())
    assert ((loss - expected).abs() <= allowed * (1 + expected)).all()
    assert ((slope - expected_slope).abs() <= allowed * (1 + expected_slope.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_loss_and_slope_are_accurate_where_naive_formulas_cancel_or_overflow(modulation, gamma, dtype):
    # 2.3, 2.5: from the difference 1 − r to its series. 20: from log softplus(−u) to −u. 88: e^u overflows.
    magnitudes = [0.0, 1e-4, 0.1, 1.0, 2.0, 2.29, 2.31, 2.49, 2.51, 3.0, 5.0, 10.0, 15.0, 16.7, 19.9, 20.1]
    magnitudes += [30.0, 40.5, 60.0, 80.0, 89.0, 120.0, 1e3, 1e4]
    u = torch.tensor([sign * x for x in magnitudes for sign in (1, -1)], dtype=dtype)
    finfo = torch.finfo(dtype)
    rounded_gamma = torch.tensor(gamma, dtype=dtype).item()

    loss, slope = modulated_nll(u, gamma, modulation)

    for i, value in enumerate(u.tolist()):
        exact_loss, exact_slope = exact(value, rounded_gamma, modulation)
        scale = abs(exact_slope)
        if modulation == "focalpo":
            # 1 + γ log p is zero at the change of sign: there the slope is as accurate as its two terms.
            nll = mpmath.log1p(mpmath.exp(-value))
            scale = mpmath.exp(-gamma * nll) / (1 + mpmath.exp(value)) * (1 + gamma * nll)
        # An exponent of the size of |u|, formed in a few roundings, and 1 − r, which starts at 0.04: 25 eps.
        allowed = (32 + 2 * abs(value)) * finfo.eps
        assert abs(loss[i].item() - exact_loss) <= allowed * exact_loss + finfo.tiny, f"loss at u = {value}"
        assert abs(slope[i].item() - exact_slope) <= allowed * scale + finfo.tiny, f"slope at u = {value}"


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_loss_and_slope_stay_finite_for_any_logit_in_fp32(modulation, gamma):
    magnitude = torch.logspace(-6, 4, 2001)
    u = torch.cat([magnitude, -magnitude, torch.zeros(1), torch.arange(0.0, 120.0, 0.25)])
    loss, slope = modulated_nll(u, gamma, modulation)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize(
    ("modulation", "gamma", "u", "loss_limit", "slope_limit"),
    [
        # DPO: the hinge.
        ("focalpo", 0.0, 1e4, 0.0, 0.0),
        ("focalpo", 0.0, -1e4, 1e4, -1.0),
        # p^γ wins over log p at both ends.
        ("focalpo", 0.05, 1e4, 0.0, 0.0),
        ("focalpo", 0.05, -1e4, 0.0, 0.0),
        ("focalpo", 1.0, -1e4, 0.0, 0.0),
        # −log p / (1−p)^γ ~ e^((γ−1)u): for γ = 1 it tends to 1 and stays there.
        ("inverse", 0.05, 1e4, 0.0, 0.0),
        ("inverse", 0.5, 1e4, 0.0, 0.0),
        ("inverse", 1.0, 1e4, 1.0, 0.0),
        ("inverse", 0.5, -1e4, 1e4, -1.0),
        ("inverse", 1.0, -1e4, 1e4, -1.0),
        # 1 − p is 1 for a misranked pair.
        ("focal", 1.0, 1e4, 0.0, 0.0),
        ("focal", 1.0, -1e4, 1e4, -1.0),
        ("focal", 0.5, -1e4, 1e4, -1.0),
    ],
)
def test_extreme_logits_give_the_limits(modulation, gamma, u, loss_limit, slope_limit):
    loss, slope = modulated_nll(torch.tensor([u]), gamma, modulation)
    # The loss may be formed as exp(log 1e4): its exponent, of size 9, is rounded.
    assert loss.item() == pytest.approx(loss_limit, rel=10 * torch.finfo(torch.float32).eps)
    assert slope.item() == slope_limit


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gamma": 0.0},
        {"label_smoothing": 0.2},
        {"length_normalize": True},
        {"margin": 0.4},
        {"length_normalize": True, "margin": 0.4, "label_smoothing": 0.1, "gamma": 1.0},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.parametrize("reference_free", [False, True])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_gradient_in_the_log_probs_passes_gradcheck(modulation, reference_free, changes):
    torch.manual_seed(0)
    # Three pairs of unequal length, one rejected sequence with a masked token that belongs to its range.
    offsets = torch.tensor([0, 4, 5, 8, 10, 13, 15])
    lengths = torch.tensor([4, 1, 3, 2, 2, 2])
    logps = -2 * torch.rand(15, dtype=torch.float64)
    ref_logps = None if reference_free else -4 * torch.rand(6, dtype=torch.float64)
    chosen = objective(modulation=modulation, **changes)

    def losses(logps, margin):
        sums = SequenceSumFunction.apply(logps, offsets, "torch")
        return PairLossFunction.apply(sums, margin, PairConstants(lengths, ref_logps), chosen, "torch")[0]

    margin = torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(losses, (logps.requires_grad_(), margin.requires_grad_()))


def test_score_is_the_log_ratio_per_token_when_length_normalised():
    logps, ref_logps = torch.tensor([-6.0, -9.0]), torch.tensor([-2.0, -3.0])
    lengths = torch.tensor([4, 3])
    assert sequence_scores(logps, ref_logps, lengths, False).tolist() == [-4.0, -6.0]
    assert sequence_scores(logps, ref_logps, lengths, True).tolist() == [-1.0, -2.0]
    assert sequence_scores(logps, None, lengths, False).tolist() == [-6.0, -9.0]
    assert sequence_scores(logps, None, lengths, True).tolist() == [-1.5, -3.0]


# What the papers prove


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_gamma_zero_is_dpo_in_loss_and_gradient(modulation):
    """DynamicFocalPO Prop. 1, at its end point: −log σ(β·Δ) and its autograd gradient."""
    torch.manual_seed(0)
    logps = torch.randn(8, dtype=torch.float64, requires_grad=True)
    ref_logps = torch.randn(8, dtype=torch.float64)
    lengths = torch.ones(8, dtype=torch.int64)
    dpo = objective(gamma=0.0, modulation=modulation)
    losses = PairLossFunction.apply(logps, None, PairConstants(lengths, ref_logps), dpo, "torch")[0]
    (gradient,) = torch.autograd.grad(losses.sum(), logps)

    chosen, rejected = (logps - ref_logps).chunk(2)
    expected = -torch.nn.functional.logsigmoid(dpo.beta * (chosen - rejected))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logps)
    # Both sides are a handful of float64 operations on numbers of size 1.
    torch.testing.assert_close(losses, expected, rtol=16 * EPS, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=16 * EPS, atol=0)


@pytest.mark.parametrize("gamma", [1e-1, 1e-2, 1e-4, 1e-8])
def test_focalpo_tends_to_dpo_at_first_order_in_gamma(gamma):
    """DynamicFocalPO Prop. 1, with its rate: 1 − p^γ ≤ γ·nll, so both differences are O(γ)."""
    u = torch.linspace(-30, 30, 241, dtype=torch.float64)
    loss, slope = modulated_nll(u, gamma, "focalpo")
    nll, dpo_slope = modulated_nll(u, 0.0, "focalpo")
    rounding = 64 * EPS  # of exponents up to 30
    assert (nll - loss >= -rounding * nll).all()
    assert (nll - loss <= (gamma * nll + rounding) * nll).all()
    assert ((slope - dpo_slope).abs() <= (2 * gamma * nll + rounding) * dpo_slope.abs()).all()


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.1, 0.5, 0.9, 1.0])
def test_focalpo_is_bounded_by_entropy_and_dpo(gamma):
    """FocalPO Eq. 7 with q = 1, DynamicFocalPO Eq. 8, pair by pair: L ≤ γ·H[p] + (1−γ)·L_DPO."""
    u = torch.linspace(-60, 60, 1201, dtype=torch.float64)
    loss, _ = modulated_nll(u, gamma, "focalpo")
    dpo, _ = modulated_nll(u, 0.0, "focalpo")
    p, q = torch.sigmoid(u), torch.sigmoid(-u)
    bound = gamma * (torch.special.entr(p) + torch.special.entr(q)) + (1 - gamma) * dpo
    # An equality for γ = 0, and almost one for p near 1: rounding of either side.
    assert (loss <= bound * (1 + 8 * EPS)).all()


@pytest.mark.parametrize("gamma", [0.05, 0.1, 0.5, 1.0])
class TestGradientScalingFactor:
    """DynamicFocalPO Lemma 2: ρ = |p^γ (1 + γ log p)|, the slope in units of DPO's."""

    @staticmethod
    def signed_factor(u: list[float] | torch.Tensor, gamma: float) -> torch.Tensor:
        u = torch.as_tensor(u, dtype=torch.float64)
        return modulated_nll(u, gamma, "focalpo")[1] / modulated_nll(u, 0.0, "focalpo")[1]

    def test_never_exceeds_one(self, gamma):
        factor = self.signed_factor(torch.linspace(-700, 700, 5601), gamma).abs()
        # (iii); the exponents reach 700, whose rounding shows as 700·eps.
        assert factor.max() <= 1 + 1400 * EPS

    def test_vanishes_for_misranked_pairs(self, gamma):
        # (i): at p = e^(−30/γ) it is 29·e^−30.
        factor = self.signed_factor([-30 / gamma], gamma).abs().item()
        assert factor == pytest.approx(29 * math.exp(-30), rel=1e-9)

    def test_is_one_for_well_ranked_pairs(self, gamma):
        # (ii): 1 − p^γ (1 + γ log p) ≈ 2γ(1−p) = 2e-16·γ at u = 36.
        assert self.signed_factor([36.0], gamma).item() == pytest.approx(1.0, abs=64 * EPS)

    def test_changes_sign_at_p_equal_exp_of_minus_one_over_gamma(self, gamma):
        p = math.exp(-1 / gamma)
        below, above = self.signed_factor([logit(p * (1 - 1e-6)), logit(p * (1 + 1e-6))], gamma)
        assert below < 0 < above

    def test_is_most_negative_at_p_equal_exp_of_minus_two_over_gamma(self, gamma):
        # Eq. 26: −e^−2. Flat there, so that only rounding of the exponent 2/γ shows.
        lowest = logit(math.exp(-2 / gamma))
        at, left, right = self.signed_factor([lowest, lowest - 0.1 / gamma, lowest + 0.1 / gamma], gamma)
        assert at.item() == pytest.approx(-math.exp(-2), rel=(16 + 4 / gamma) * EPS)
        assert at < left
        assert at < right


@pytest.mark.parametrize("gamma", [0.05, 0.1, 0.5, 1.0])
def test_only_focalpo_pushes_misranked_pairs_down(gamma):
    """dL/du > 0 exactly where p < e^(−1/γ); the other two modulations never change sign."""
    u = torch.linspace(-80, 30, 2201, dtype=torch.float64)
    turning_point = logit(math.exp(-1 / gamma))
    slope = modulated_nll(u, gamma, "focalpo")[1]
    assert ((slope > 0) == (u < turning_point)).all()
    assert (modulated_nll(u, gamma, "inverse")[1] < 0).all()
    assert (modulated_nll(u, gamma, "focal")[1] < 0).all()
