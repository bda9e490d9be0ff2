"""A token's log-prob is a function of its hidden state and the head, whatever else is in the batch.

The Triton kernels give the same bits. Here the interpreter shows it, with a product of tiles whose rows do
not depend on where they stand: BLAS's do, those of tensor cores do not. On CPUs the vendor's product picks
its kernel by the shape of the batch; there the difference is held to a bound.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from problems import DTYPES, EPS, OUTPUTS, Problem, kl_problem, problem

N = 29


@pytest.fixture(autouse=True)
def rows_of_a_product_do_not_depend_on_their_place(monkeypatch):
    if INTERPRETED:

        def product(a, b, dtype=None):
            return np.add.reduce(a[:, None, :].astype(dtype) * b.T[None].astype(dtype), axis=2)

        monkeypatch.setattr(np, "matmul", product)


def rows(tokens: Problem, index: torch.Tensor, shape=(-1,)) -> Problem:
    """These tokens in this order, perhaps as a padded batch."""
    parts = {
        name: x[index].view(*shape, x.shape[-1]) for name, x in tokens.tensors.items() if "hidden" in name
    }
    ref = None if tokens.ref is None else rows(tokens.ref, index, shape)
    return replace(tokens, **parts, labels=tokens.labels[index].view(shape), ref=ref)


def batches():
    """Tokens alone, first, last, several times, in another order."""
    generator = torch.Generator().manual_seed(1)
    indices = ([5], [N - 1, 0], [7] * 5, list(range(18)))
    return [*map(torch.tensor, indices), torch.randperm(N, generator=generator)]


def assert_same(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    if bound == 0.0:
        assert torch.equal(actual, expected)
    elif actual.is_floating_point():
        assert (actual - expected).abs().max() <= bound


def bound_of(tokens: Problem, backend: str) -> float:
    # Measured: up to 2.4 units in the last place of the largest logit (AMD EPYC, torch 2.13, H up to 512).
    return 0.0 if backend == "triton" else 8 * EPS * tokens.largest_logit()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (DTYPES[0], {"hidden_size": 64}),
        (DTYPES[-1], {"hidden_size": 64}),
        (DTYPES[0], {"hidden_size": 100, "vocab_size": 333, "softcap": 5.0, "has_bias": True}),
        (DTYPES[-1], {"hidden_size": 64, "rank": 24}),
        (DTYPES[0], {"hidden_size": 64, "rank": 24}),
    ],
    ids=str,
)
def test_values_do_not_depend_on_the_rest_of_the_batch(dtype, options, backend):
    tokens = problem(N, dtype=dtype, **{"vocab_size": 400, **options})
    tokens.labels.clamp_(min=0)
    for outputs in ((), OUTPUTS):
        whole = tokens.run(backend, outputs=outputs)
        for index in batches():
            found = rows(tokens, index).run(backend, outputs=outputs)
            for name in ("logps", *outputs):
                expected = getattr(whole, name)[index]
                assert_same(getattr(found, name), expected, bound_of(tokens, backend))


def test_log_probs_are_the_same_padded_and_packed(backend):
    tokens = problem(N, hidden_size=64, vocab_size=400)
    tokens.labels.clamp_(min=0)
    packed = rows(tokens, torch.arange(24)).run(backend).logps.view(3, 8)
    padded_index = torch.cat([torch.arange(24).view(3, 8), torch.full((3, 4), N - 1)], dim=1).flatten()
    padded = rows(tokens, padded_index, (3, 12))
    padded.labels[:, 8:] = -100
    assert_same(padded.run(backend).logps[:, :8], packed, bound_of(tokens, backend))


def test_the_kl_does_not_depend_on_the_rest_of_the_batch(backend):
    tokens = kl_problem(N, hidden_size=64, ref_hidden_size=32, vocab_size=400)
    tokens.labels.clamp_(min=0)
    whole = tokens.run_kl(backend)
    for index in batches():
        # KL is up to three times the largest logit here.
        assert_same(rows(tokens, index).run_kl(backend), whole[index], 4 * bound_of(tokens, backend))
