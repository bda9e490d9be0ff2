"""The kernels that take their tiles by TMA give what the others give, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED
from tolerance import relative_error

pytest.importorskip("triton", reason="no triton on this platform")

from csrc_triton import launch
from focalkern import LowRankUpdate, linear_logps
from focalkern.backends import triton_tma

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="TMA kernels run under the interpreter, or on Hopper")

VOCAB, HIDDEN = 384, 192  # narrower products have tiles of their own


@pytest.fixture
def by_tma(monkeypatch):
    """Switches the launch table to TMA; gives the list of the launches that follow it."""
    launched = []
    real = triton_tma.with_scratch_memory
    monkeypatch.setattr(triton_tma, "with_scratch_memory", lambda *args: (launched.append(1), real(*args)))

    def switch_on():
        for kernel in launch.TMA_KERNELS:
            monkeypatch.setitem(launch._INTERPRET, kernel, launch.Launch(32, 128, 32, 1, 1, tma=True))
        return launched

    return switch_on


def batch(dtype=torch.float32, length=45, vocab_size=VOCAB, row_of_weight=HIDDEN):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, length, HIDDEN, generator=generator)
    weight = torch.randn(vocab_size, row_of_weight, generator=generator) / 4
    labels = torch.randint(vocab_size, (2, length), generator=generator)
    labels[:, ::3] = -100
    weight = weight.to(dtype)[:, :HIDDEN].requires_grad_()
    return hidden.to(dtype).requires_grad_(), weight, labels


def logps_and_gradients(hidden, weight, labels, **options):
    logps = linear_logps(hidden, weight, labels, backend="triton", backward="exact", **options).logps
    return logps, *torch.autograd.grad(logps.sum(), (hidden, weight))


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0, "temperature": 0.7},
    "bias": {"bias": torch.linspace(-1, 1, VOCAB)},
    "shift": {"shift": True},
}


@pytest.mark.parametrize(
    ("options", "dtype", "length"),
    [
        *((name, torch.float32, 45) for name in OPTIONS),
        ("plain", torch.float16, 45),
        ("plain", torch.float32, 5),
        ("plain", torch.float32, 1),
        ("shift", torch.float32, 1),
    ],
    ids=str,
)
def test_logps_and_gradients_are_those_of_the_other_kernels(options, dtype, length, by_tma):
    inputs = batch(dtype, length)
    options = {name: x.to(dtype) if name == "bias" else x for name, x in OPTIONS[options].items()}
    plain = logps_and_gradients(*inputs, **options)
    launched = by_tma()
    for found, expected in zip(logps_and_gradients(*inputs, **options), plain, strict=True):
        assert relative_error(found, expected) <= 2 * torch.finfo(dtype).eps + 1e-6
    # Forward, dz and both products. With a softcap, dz has a smaller tile and pointers, and 0 past the count
    # in fewer rows than dweight would read by TMA.
    has_labels = (inputs[2][:, "shift" in options :] != -100).any()
    assert len(launched) == (2 if "softcap" in options else 4) or not has_labels


HEADS = {
    "a vocabulary of parts of a block": batch(vocab_size=VOCAB + 16),
    "rows of weight that are not aligned": batch(row_of_weight=HIDDEN + 1),
}


@pytest.mark.parametrize("head", HEADS)
def test_what_tma_cannot_read_goes_through_pointers(head, by_tma):
    plain = logps_and_gradients(*HEADS[head])
    launched = by_tma()
    for found, expected in zip(logps_and_gradients(*HEADS[head]), plain, strict=True):
        assert relative_error(found, expected) < 1e-6
    assert not launched


def test_a_low_rank_update_goes_through_pointers(by_tma):
    hidden, weight, labels = batch()
    a, b = torch.randn(4, HIDDEN), torch.randn(VOCAB, 4)

    def run():
        return logps_and_gradients(hidden, weight, labels, update=LowRankUpdate.lora(hidden, a, b))

    plain = run()
    launched = by_tma()
    found = run()
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, plain, strict=True))
    assert not launched


def test_nan_at_a_masked_position_takes_no_part(by_tma):
    hidden, weight, labels = batch()
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    assert by_tma() is not None
    logps, dhidden, dweight = logps_and_gradients(hidden, weight, labels)
    assert logps.isfinite().all() and dweight.isfinite().all()
    assert not dhidden[labels == -100].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_out_as_nan(value, by_tma):
    hidden, weight, labels = batch()
    with torch.no_grad():
        hidden[0, 1, 3] = value
        weight[:, 3] = -weight[:, 3].abs()  # every product with +inf is -inf: a softmax would not notice
    by_tma()
    logps = linear_logps(hidden, weight, labels, backend="triton").logps
    assert logps[0, 1].isnan()
    assert logps.isnan().sum() == 1


def test_two_runs_are_bitwise_equal(by_tma):
    by_tma()
    inputs = batch()
    assert all(map(torch.equal, logps_and_gradients(*inputs), logps_and_gradients(*inputs)))


def test_only_kernels_with_a_form_for_tma_have_entries_with_it():
    for widths in launch.LAUNCH_TABLE.values():
        for entries in widths.values():
            assert {name for name, entry in entries.items() if entry.tma} <= set(launch.TMA_KERNELS)
