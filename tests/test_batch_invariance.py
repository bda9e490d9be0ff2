"""A token's log-prob is a function of its hidden state and the head, whatever else is in the batch.

The Triton kernels give the same bits. Here the interpreter shows it, with a product of tiles whose rows do
not depend on where they stand: BLAS's do, those of tensor cores do not. On CPUs the vendor's product picks
its kernel by the shape of the batch; there the difference is held to a bound.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DEVICE, INTERPRETED, LOW_PRECISION

from focalkern import LowRankUpdate, linear_kl, linear_logps

OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
N = 29
VARIANTS = {
    "plain": {},
    "odd sizes, softcap, bias": {"hidden_size": 100, "vocab_size": 333, "softcap": 5.0, "has_bias": True},
    "outputs": {"outputs": OUTPUTS},
    "an update": {"rank": 24},
}


@pytest.fixture(autouse=True)
def rows_of_a_product_do_not_depend_on_their_place(monkeypatch):
    if INTERPRETED:

        def product(a, b, dtype=None):
            return np.add.reduce(a[:, None, :].astype(dtype) * b.T[None].astype(dtype), axis=2)

        monkeypatch.setattr(np, "matmul", product)


class Tokens:
    def __init__(self, dtype, hidden_size=64, vocab_size=400, has_bias=False, rank=0, **options):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.hidden, self.weight = draw(N, hidden_size), draw(vocab_size, hidden_size) / 4
        self.labels = torch.randint(vocab_size, (N,), generator=generator).to(DEVICE)
        self.bias = draw(vocab_size) if has_bias else None
        self.update = (draw(N, rank), draw(vocab_size, rank) / 4) if rank else None
        self.options = options
        self.ref_hidden, self.ref_weight = draw(N, 32), draw(vocab_size, 32)

    @property
    def largest_logit(self) -> float:
        return (self.hidden.double() @ self.weight.double().t()).abs().max().item()

    def values(self, backend, index, labels=None, shape=None):
        """What `linear_logps` gives for these tokens, in this order; `shape` is that of a padded batch."""
        shape = shape or (len(index),)
        labels = self.labels[index] if labels is None else labels
        update = None
        if self.update is not None:
            update = LowRankUpdate(self.update[0][index].view(*shape, -1), self.update[1])
        result = linear_logps(
            self.hidden[index].view(*shape, -1),
            self.weight,
            labels.view(shape),
            bias=self.bias,
            update=update,
            backend=backend,
            **self.options,
        )
        names = ("logps", *self.options.get("outputs", ()))
        return {name: getattr(result, name).flatten() for name in names}


def batches():
    """Tokens alone, first, last, several times, in another order; and the padded batch of masked ones."""
    generator = torch.Generator().manual_seed(1)
    indices = ([5], [N - 1, 0], [7] * 5, list(range(18)))
    return [*map(torch.tensor, indices), torch.randperm(N, generator=generator)]


def assert_same(actual, expected, bound):
    for name, value in actual.items():
        if bound == 0.0:
            assert torch.equal(value, expected[name]), name
        elif value.is_floating_point():
            assert (value - expected[name]).abs().max() <= bound, name


def bound_of(tokens, backend) -> float:
    # Measured: up to 2.4 units in the last place of the largest logit (AMD EPYC, torch 2.13, H up to 512).
    return 0.0 if backend == "triton" else 8 * torch.finfo(torch.float32).eps * tokens.largest_logit


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probs_do_not_depend_on_the_rest_of_the_batch(variant, dtype, backend):
    tokens = Tokens(dtype, **VARIANTS[variant])
    whole = tokens.values(backend, torch.arange(N))
    for index in batches():
        expected = {name: value[index] for name, value in whole.items()}
        assert_same(tokens.values(backend, index), expected, bound_of(tokens, backend))


def test_log_probs_are_the_same_padded_and_packed(backend):
    tokens = Tokens(torch.float32)
    packed = tokens.values(backend, torch.arange(24))["logps"].view(3, 8)
    padded_index = torch.cat([torch.arange(24).view(3, 8), torch.full((3, 4), N - 1)], dim=1).flatten()
    labels = tokens.labels[padded_index].view(3, 12)
    labels[:, 8:] = -100
    padded = tokens.values(backend, padded_index, labels, (3, 12))["logps"].view(3, 12)[:, :8]
    assert_same({"logps": padded}, {"logps": packed}, bound_of(tokens, backend))


def test_the_kl_does_not_depend_on_the_rest_of_the_batch(backend):
    tokens = Tokens(torch.float32)

    def kl(index):
        heads = (tokens.hidden[index], tokens.weight, tokens.ref_hidden[index], tokens.ref_weight)
        return linear_kl(*heads, tokens.labels[index], backend=backend)

    whole = kl(torch.arange(N))
    for index in batches():
        # KL is up to three times the largest logit here.
        assert_same({"kl": kl(index)}, {"kl": whole[index]}, 4 * bound_of(tokens, backend))
