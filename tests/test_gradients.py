"""Gradient checks: loss and log-probs of the library against plain PyTorch, over random problems.

Low precision is measured as PyTorch's own: the error against float64 is at most twice that of the reference
in the same dtype (`tolerance.assert_as_accurate`). The objective alone is checked in `test_objective.py`.
"""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given
from hypothesis import strategies as st
from problems import DTYPES, Batch, Problem, assert_accurate, batch, problem
from tolerance import assert_as_accurate

from focalkern import FusedFocalPOLoss
from focalkern.pairs.objective import MODULATIONS


def measure_plain(pairs: Batch, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    leaves = pairs.leaves(dtype)
    losses = pairs.plain_losses(leaves, **options)
    return {
        "losses": losses.detach(),
        **dict(zip(leaves, torch.autograd.grad(losses.mean(), leaves.values()), strict=True)),
    }


def check_loss(pairs: Batch, backend: str, objective: dict, backward="certified") -> None:
    loss_fn = FusedFocalPOLoss(**objective, **pairs.transform, backend=backend, backward=backward)
    out, gradients = pairs.step(loss_fn)
    naive, exact = (measure_plain(pairs, dtype, **objective) for dtype in (pairs.hidden.dtype, torch.float64))
    # u moves by β times the rounding of the summed log-probs, and loss and slope by no more than u.
    conditioning = objective["beta"] * (out.chosen_logps + out.rejected_logps).abs().max().item()
    for name, value in {"losses": out.losses.detach(), **gradients}.items():
        # Plain PyTorch has NaN where a factor of w(p)·log p overflows: its error is then no measure. The
        # floor is.
        measure = naive[name] if torch.isfinite(naive[name]).all() else exact[name]
        assert_as_accurate(value, measure, exact[name], name, conditioning)


# Sizes around the edges of the kernels' tiles (rows 16 and 128, vocabulary 128 and 256, hidden size 32 and
# 64).
if INTERPRETED:
    LENGTHS, HIDDEN_SIZES, VOCAB_SIZES = [1, 2, 7, 17], [1, 16, 33, 64], [1, 2, 127, 128, 129, 300, 515]
else:
    LENGTHS, HIDDEN_SIZES, VOCAB_SIZES = (
        [1, 2, 7, 40, 130],
        [1, 16, 33, 64, 200],
        [1, 2, 127, 128, 129, 515, 4099],
    )

sizes = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from(HIDDEN_SIZES),
        "vocab_size": st.sampled_from(VOCAB_SIZES),
        "dtype": st.sampled_from(DTYPES),
        "has_bias": st.booleans(),
        "sharpness": st.sampled_from([0.0, 1.0, 6.0]),
        "seed": st.integers(0, 1000),
    }
)
transforms = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 2.0]),
        "softcap": st.sampled_from([2.0, 30.0]),
        "logit_scale": st.sampled_from([0.25, 3.0]),
    },
)
objectives = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.01, 0.1, 2.0]),
        "gamma": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "modulation": st.sampled_from(MODULATIONS),
    },
    optional={
        "margin": st.sampled_from([0.5, -1.0]),
        "label_smoothing": st.sampled_from([0.1, 0.5]),
        "length_normalize": st.just(True),
        "reference_free": st.just(True),
    },
)


@given(
    length=st.sampled_from(LENGTHS),
    is_shorter=st.integers(1, 3).flatmap(lambda pairs: st.tuples(*[st.booleans()] * (2 * pairs))),
    sizes=sizes,
    transform=transforms,
    objective=objectives,
)
def test_loss_and_its_gradients_are_as_accurate_as_plain_pytorch(
    length, is_shorter, sizes, transform, objective, backend
):
    least = int(objective.get("length_normalize", False))  # an empty sequence has no mean
    lengths = tuple(max(length - shorter, least) for shorter in is_shorter)
    check_loss(batch(lengths, **sizes, **transform), backend, objective)


@given(
    shape=st.tuples(st.integers(1, 6), st.sampled_from(LENGTHS)),
    sizes=sizes,
    transform=transforms,
    with_entropy=st.booleans(),
)
def test_logps_entropy_and_their_gradients_are_as_accurate_as_plain_pytorch(
    shape, sizes, transform, with_entropy, backend
):
    head = problem(*shape, **sizes, **transform)
    check_logps(head, backend, with_entropy)


def check_logps(head: Problem, backend: str, with_entropy: bool) -> None:
    upstream = {"logps": head.grad} | ({"entropy": head.grad.flip(0)} if with_entropy else {})
    assert_accurate(head, backend, upstream, outputs=("entropy",) if with_entropy else ())


@pytest.mark.parametrize(("modulation", "dtype"), zip(MODULATIONS, (DTYPES * 2)[:3], strict=True), ids=str)
def test_loss_over_several_tiles_and_chunks(modulation, dtype, backend):
    """More rows and vocabulary than one tile or chunk of either backend holds, at the sharpness of a trained
    LM."""
    lengths = (40, 33, 17, 40) if INTERPRETED else (700, 600, 500, 400)
    options = {"hidden_size": 64, "vocab_size": 4500, "has_bias": True, "sharpness": 4.0}
    pairs = batch(lengths, dtype=dtype, is_near=True, **options)
    objective = {"modulation": modulation, "gamma": 0.5, "beta": 0.1}
    for backward in ("certified", "exact") if dtype == torch.float32 else ("certified",):
        check_loss(pairs, backend, objective, backward)


@pytest.mark.skipif(not INTERPRETED, reason="tiles of the Triton kernels: in the interpreted run")
@pytest.mark.parametrize("tile", [(32, 256, 64), (128, 128, 16)], ids=str)
def test_tiles_of_other_shapes_than_the_interpreters(tile, backend, monkeypatch):
    """On a GPU most tiles span two vocabulary blocks; the last one may lie past the vocabulary."""
    from csrc_triton import launch

    monkeypatch.setattr(launch, "_INTERPRET", dict.fromkeys(launch.KERNELS, launch.Launch(*tile, 1, 1)))
    for vocab_size in (257, 385):
        head = problem(4, 9, hidden_size=33, vocab_size=vocab_size, has_bias=True, softcap=5.0)
        check_logps(head, backend, with_entropy=True)


def test_gradcheck_of_the_whole_loss_in_float64():
    pairs = batch(
        (3, 2, 4, 1), hidden_size=3, vocab_size=140, dtype=torch.float64, has_bias=True, sharpness=1.0
    )
    options = {"softcap": 3.0, "temperature": 0.7, "label_smoothing": 0.1, "gamma": 0.5, "beta": 0.3}
    loss_fn, leaves = FusedFocalPOLoss(backend="torch", **options), pairs.leaves()

    def run(*inputs):
        return pairs.loss(loss_fn, dict(zip(leaves, inputs, strict=True))).loss

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))
