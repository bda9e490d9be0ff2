"""γ(t) of DynamicFocalPO: the three schedules against Eq. 3 to 5, and how the loss follows and saves them."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from problems import Batch, batch
from tolerance import relative_error

from focalkern import CosineGamma, ExponentialGamma, FusedFocalPOLoss, GammaSchedule, LinearGamma
from focalkern.pairs import focalpo

SCHEDULES = {
    LinearGamma: lambda t, T: 0.1 - (0.1 - 0.01) * t / T,
    ExponentialGamma: lambda t, T: 0.01 + (0.1 - 0.01) * math.exp(-3 * t / T),
    CosineGamma: lambda t, T: 0.01 + 0.5 * (0.1 - 0.01) * (1 + math.cos(math.pi * t / T)),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.__name__)
@pytest.mark.parametrize("total_steps", [1, 7, 1000])
def test_gamma_follows_the_papers_equation_with_its_table_3_defaults(schedule, total_steps):
    gamma = schedule(total_steps)
    for step in {0, 1, total_steps // 2, total_steps}:
        assert gamma(step) == pytest.approx(SCHEDULES[schedule](step, total_steps), rel=1e-15, abs=1e-17)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.__name__)
def test_gamma_falls_and_stays_at_its_minimum_after_the_last_step(schedule):
    gamma = schedule(50, gamma_max=0.5, gamma_min=0.2)
    values = [gamma(step) for step in range(60)]
    assert values[0] == 0.5
    assert all(after <= before for before, after in itertools.pairwise(values))
    assert values[51:] == [0.2] * 9


def test_rate_of_the_exponential_schedule():
    assert ExponentialGamma(10, 1.0, 0.0, rate=5.0)(4) == pytest.approx(math.exp(-2.0), rel=1e-15)


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be >= 1; got 0"),
        ({"total_steps": 10.0}, TypeError, "total_steps must be an int; got float"),
        ({"total_steps": True}, TypeError, "total_steps must be an int; got bool"),
        ({"total_steps": 10, "gamma_max": -0.1}, ValueError, "gamma_max must be .* >= 0"),
        ({"total_steps": 10, "gamma_min": -0.1}, ValueError, "gamma_min must be .* >= 0"),
        ({"total_steps": 10, "gamma_max": 0.005}, ValueError, "gamma_max must be >= gamma_min = 0.01"),
        ({"total_steps": 10, "gamma_max": math.nan}, ValueError, "gamma_max must be finite"),
        ({"total_steps": 10, "gamma_min": "0"}, TypeError, "gamma_min must be a number"),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.__name__)
def test_bad_arguments_are_refused_by_name(schedule, options, exception, message):
    with pytest.raises(exception, match=f"^{message}"):
        schedule(**options)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf])
def test_bad_rate_is_refused(rate):
    with pytest.raises(ValueError, match=r"^rate must be finite and > 0"):
        ExponentialGamma(10, rate=rate)


def test_gamma_must_be_a_number_or_a_schedule():
    with pytest.raises(TypeError, match=r"^gamma must be a number"):
        FusedFocalPOLoss(gamma=lambda step: 0.1)


# In the loss


def losses_at(loss_fn: FusedFocalPOLoss, pairs: Batch) -> torch.Tensor:
    return pairs.loss(loss_fn).losses


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.__name__)
def test_a_scheduled_loss_is_focalpo_with_the_gamma_of_its_step(schedule, backend):
    pairs = batch()
    gamma = schedule(10, gamma_max=0.9, gamma_min=0.3)
    scheduled = FusedFocalPOLoss(gamma=gamma, backend=backend)
    for step in (0, 4, 10, 11):
        scheduled.set_step(step)
        fixed = FusedFocalPOLoss(gamma=gamma(step), backend=backend)
        assert scheduled.current_gamma == gamma(step)
        assert torch.equal(losses_at(scheduled, pairs), losses_at(fixed, pairs))


def test_the_dynamic_preset_is_the_papers_cosine():
    loss_fn = FusedFocalPOLoss.dynamic(100)
    assert loss_fn.gamma == CosineGamma(100, 0.1, 0.01)
    assert loss_fn.beta == 0.1
    assert not loss_fn.reference_free
    other = FusedFocalPOLoss.dynamic(
        100, beta=0.01, schedule=LinearGamma, gamma_max=0.2, length_normalize=True
    )
    assert other.gamma == LinearGamma(100, 0.2, 0.01)
    assert other.length_normalize


def test_only_set_step_moves_gamma(backend):
    """Gradient accumulation, evaluation and calls of the loss do not."""
    pairs = batch()
    loss_fn = FusedFocalPOLoss(gamma=LinearGamma(4), backend=backend)
    before = loss_fn.current_gamma
    for _ in range(3):
        losses_at(loss_fn, pairs)
    assert loss_fn.current_gamma == before
    loss_fn.set_step(2)
    assert loss_fn.current_gamma == LinearGamma(4)(2)


def test_the_step_is_saved_and_resumed_exactly():
    pairs = batch()
    trained = FusedFocalPOLoss(gamma=CosineGamma(1000))
    trained.set_step(337)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    resumed = FusedFocalPOLoss(gamma=CosineGamma(1000))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.current_gamma == trained.current_gamma != CosineGamma(1000)(0)
    assert torch.equal(losses_at(resumed, pairs), losses_at(trained, pairs))


def test_the_step_survives_a_copy_and_a_parent_module():
    loss_fn = FusedFocalPOLoss(gamma=CosineGamma(10))
    loss_fn.set_step(5)
    assert copy.deepcopy(loss_fn).current_gamma == loss_fn.current_gamma
    parent, other = torch.nn.Module(), torch.nn.Module()
    parent.loss, other.loss = loss_fn, FusedFocalPOLoss(gamma=CosineGamma(10))
    other.load_state_dict(parent.bfloat16().state_dict())
    assert other.loss.current_gamma == CosineGamma(10)(5)


@pytest.mark.parametrize(
    ("step", "exception"),
    [(-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError), (torch.tensor(1), TypeError)],
)
def test_a_bad_step_is_refused(step, exception):
    with pytest.raises(exception, match=r"^step must be"):
        FusedFocalPOLoss(gamma=CosineGamma(10)).set_step(step)


def test_a_schedule_that_nobody_moves_is_pointed_out(monkeypatch):
    monkeypatch.setattr(focalpo, "_BATCHES_BEFORE_WARNING", 3)
    pairs = batch((2, 1))
    forgotten, moved = (FusedFocalPOLoss.dynamic(10) for _ in range(2))
    moved.set_step(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            losses_at(moved, pairs)
        losses_at(forgotten.eval(), pairs)
        losses_at(forgotten.train(), pairs)
        losses_at(forgotten, pairs)
    with pytest.warns(UserWarning, match=r"^gamma has stayed at step 0.*call set_step"):
        losses_at(forgotten, pairs)


def test_the_preset_takes_a_class_for_its_schedule():
    with pytest.raises(TypeError, match=r"^schedule must be a class such as CosineGamma; got str"):
        FusedFocalPOLoss.dynamic(10, schedule="cosine")


def test_a_schedule_of_ones_own(backend):
    @dataclass(frozen=True)
    class Halved(GammaSchedule):
        def decay(self, progress: float) -> float:
            return 1.0 if progress < 0.5 else 0.0

    loss_fn = FusedFocalPOLoss(gamma=Halved(10), backend=backend)
    assert loss_fn.current_gamma == 0.1
    loss_fn.set_step(5)
    assert loss_fn.current_gamma == 0.01

    @dataclass(frozen=True)
    class Negative(GammaSchedule):
        def decay(self, progress: float) -> float:
            return -2.0

    with pytest.raises(ValueError, match=r"^gamma at step 0 must be .*>= 0"):
        losses_at(FusedFocalPOLoss(gamma=Negative(10), backend=backend), batch())


def test_towards_gamma_zero_the_schedule_reaches_dpo(backend):
    """DynamicFocalPO Prop. 1: with gamma_min = 0 the end of training is DPO, in loss and gradient."""
    pairs = batch()
    gradients = []
    for loss_fn in (
        FusedFocalPOLoss(gamma=CosineGamma(10, gamma_min=0.0), backend=backend),
        FusedFocalPOLoss.dpo(backend=backend),
    ):
        loss_fn.set_step(10)
        gradients.append(pairs.step(loss_fn)[1]["hidden"])
    assert relative_error(*gradients) <= 1e-6
