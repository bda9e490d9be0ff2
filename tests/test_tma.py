"""The kernels that take their tiles by TMA give what the others give, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton", reason="no triton on this platform")

from csrc_triton import launch
from focalkern import FusedFocalPOLoss, linear_logps
from focalkern.backends import triton_tma

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="TMA kernels run under the interpreter, or on Hopper")


@pytest.fixture
def by_tma(monkeypatch):
    """From here on the launch table asks for TMA; gives the list of the launches that followed it."""
    launched = []
    real = triton_tma.with_scratch_memory
    monkeypatch.setattr(triton_tma, "with_scratch_memory", lambda *args: (launched.append(1), real(*args)))

    def switch_on():
        for kernel in launch.TMA_KERNELS:
            entry = launch.Launch(16, 128, 32, 1, 1, tma=True)
            monkeypatch.setitem(launch._INTERPRET, kernel, entry)
        return launched

    return switch_on


def batch(dtype, vocab_size=384, hidden_size=64, stride=None):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 45, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, stride or hidden_size, generator=generator)[:, :hidden_size] / 4
    labels = torch.randint(vocab_size, (2, 45), generator=generator)
    labels[:, ::3] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "temperature": 0.7}, {"bias": True}, {"shift": True}], ids=str
)
def test_logps_and_gradients_are_those_of_the_other_kernels(options, dtype, by_tma):
    hidden, weight, labels = batch(dtype)
    options = dict(options)
    if options.pop("bias", False):
        options["bias"] = torch.randn(384).to(dtype)

    def run():
        logps = linear_logps(hidden, weight, labels, backend="triton", backward="exact", **options).logps
        return logps, *torch.autograd.grad(logps.sum(), (hidden, weight))

    plain = run()
    launched = by_tma()
    for found, expected in zip(run(), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert launched
