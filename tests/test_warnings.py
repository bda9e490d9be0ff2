"""What is valid and hardly meant: said once, with what to do."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import DEVICE
from problems import batch

import focalkern.backends
from focalkern import FusedFocalPOLoss, FusedPairLoss, checks, linear_kl, linear_logps, methods, reference
from focalkern.backends import select_backend


@pytest.fixture(autouse=True)
def nothing_said_before():
    checks.warn_once.cache_clear()
    yield
    checks.warn_once.cache_clear()


def messages(function) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return caught


def test_a_schedule_that_nobody_moves_is_pointed_out_after_ten_batches():
    pairs, loss_fn = batch((2, 1)), FusedFocalPOLoss.dynamic(1000)

    def step():
        return loss_fn(pairs.hidden, pairs.weight, pairs.labels, **pairs.refs)

    said = [len(messages(step)) for _ in range(12)]
    assert said == [0] * 9 + [1, 0, 0]


def test_accumulation_over_many_batches_is_told_by_set_step_0():
    pairs, loss_fn = batch((2, 1)), FusedFocalPOLoss.dynamic(1000)
    loss_fn.set_step(0)
    assert not messages(
        lambda: [loss_fn(pairs.hidden, pairs.weight, pairs.labels, **pairs.refs) for _ in range(20)]
    )


def test_a_resumed_schedule_that_nobody_moves_is_pointed_out_too():
    pairs, trained, resumed = batch((2, 1)), *(FusedFocalPOLoss.dynamic(1000) for _ in range(2))
    trained.set_step(337)
    resumed.load_state_dict(trained.state_dict())
    (said,) = messages(
        lambda: [resumed(pairs.hidden, pairs.weight, pairs.labels, **pairs.refs) for _ in range(12)]
    )
    assert "gamma has stayed at step 337 of its schedule for 10 batches: call set_step(t)" in str(
        said.message
    )
    assert said.filename == __file__


@pytest.mark.parametrize("loss_fn", [FusedFocalPOLoss(), FusedPairLoss(methods.dpo)], ids=["focal", "pair"])
@pytest.mark.parametrize("given", [False, True], ids=["forward", "from_logps"])
def test_a_batch_without_any_label_is_said_once(given, loss_fn):
    pairs = batch()
    ignored = torch.full_like(pairs.labels, -100)

    def step(labels):
        if given:
            tokens = linear_logps(pairs.hidden, pairs.weight, labels)
            return loss_fn.from_logps(tokens, labels, **pairs.refs)
        return loss_fn(pairs.hidden, pairs.weight, labels, **pairs.refs)

    assert not messages(lambda: step(pairs.labels))
    (said,) = messages(lambda: [step(ignored), step(ignored)])
    assert str(said.message).startswith("labels leave no completion token in a batch")
    assert said.filename == __file__


def test_code_without_a_module_name_is_warned_as_any_other():
    (said,) = messages(lambda: exec("warn('a word')", {"warn": checks.warn}))
    assert str(said.message) == "a word"
    assert said.filename == "<string>"


class OnGPU:
    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


CANNOT = {
    "an older GPU": "compute capability 8.0",
    "no triton": "not installed",
}


@pytest.mark.parametrize("reason", CANNOT)
def test_a_gpu_that_takes_the_torch_backend_is_told_once(reason, monkeypatch):
    monkeypatch.setattr(focalkern.backends, "HAS_TRITON", reason != "no triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    chosen = []
    (said,) = messages(lambda: chosen.extend(select_backend("auto", OnGPU()) for _ in range(3)))
    assert chosen == ["torch"] * 3
    assert str(said.message).startswith(
        "backend='auto' takes the torch backend, the slower one: triton needs"
    )
    assert CANNOT[reason] in str(said.message)
    assert not messages(lambda: select_backend("torch", OnGPU()))


def test_a_gpu_that_runs_triton_and_a_cpu_are_told_nothing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(focalkern.backends, "HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not messages(lambda: select_backend("auto", OnGPU()))
    assert select_backend("auto", OnGPU()) == "triton"
    assert not messages(lambda: select_backend("auto", torch.zeros(1)))


def test_heads_with_other_padding_are_told_how_to_cut_and_then_exact(backend):
    """Qwen2.5 has 151936 or 152064 rows for one vocabulary."""
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 4, 8), torch.randn(2, 4, 12)
    weight, ref_weight, ref_bias = torch.randn(130, 8), torch.randn(150, 12), torch.randn(150)
    labels = torch.randint(130, (2, 4))

    hidden, ref_hidden, weight, ref_weight, ref_bias, labels = (
        x.to(DEVICE) for x in (hidden, ref_hidden, weight, ref_weight, ref_bias, labels)
    )
    with pytest.raises(ValueError, match=r"^ref_weight must be .* cut the larger .* both have: \[:130\]"):
        linear_kl(hidden, weight, ref_hidden, ref_weight, labels, ref_bias=ref_bias, backend=backend)
    with pytest.raises(ValueError, match=r"^ref_weight must be .* cut the larger .* both have: \[:130\]"):
        linear_kl(ref_hidden, ref_weight, hidden, weight, labels, bias=ref_bias, backend=backend)

    leaf = ref_weight.requires_grad_()  # the larger one, and trained
    found = linear_kl(ref_hidden, leaf[:130], hidden, weight, labels, bias=ref_bias[:130], backend=backend)
    found.sum().backward()
    exact = leaf.detach().double().requires_grad_()
    expected = reference.linear_kl(
        ref_hidden.double(), exact[:130], hidden.double(), weight.double(), labels, ref_bias[:130].double()
    )
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
