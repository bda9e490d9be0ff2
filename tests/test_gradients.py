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
from problems import DTYPES, Batch, Leaves, Problem, assert_accurate, batch, problem
from tolerance import assert_as_accurate

from focalkern import FusedFocalPOLoss
from focalkern.pairs.objective import MODULATIONS


def check_loss(pairs: Batch, backend: str, objective: dict, backwards: tuple[str, ...] = ("certified",)):
    def plain(dtype: torch.dtype) -> Leaves:
        leaves = pairs.leaves(dtype)
        losses = pairs.plain_losses(leaves, **objective)
        gradients = torch.autograd.grad(losses.mean(), list(leaves.values()))
        return {"losses": losses.detach(), **dict(zip(leaves, gradients, strict=True))}

    naive, exact = plain(pairs.hidden.dtype), plain(torch.float64)
    for backward in backwards:
        options = {**objective, **pairs.transform, "backend": backend, "backward": backward}
        out, gradients = pairs.step(FusedFocalPOLoss(**options))
        log_prob_mass = (out.chosen_logps + out.rejected_logps).abs().max().item()
        # u moves by β times the rounding of the summed log-probs, and loss and slope by no more than u.
        conditioning = objective["beta"] * log_prob_mass
        for name, value in {"losses": out.losses, **gradients}.items():
            # Plain PyTorch has NaN where a factor of w(p)·log p overflows: its error is then no measure. The
            # floor is.
            measure = naive[name] if torch.isfinite(naive[name]).all() else exact[name]
            assert_as_accurate(value, measure, exact[name], name, conditioning)


def check_logps(tokens: Problem, backend: str, with_entropy: bool) -> None:
    outputs = ("entropy",) if with_entropy else ()
    upstream = dict(zip(("logps", *outputs), (tokens.grad, tokens.grad.flip(-1)), strict=False))
    assert_accurate(tokens, backend, upstream, outputs=outputs)


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

lengths = st.lists(st.tuples(*[st.sampled_from(LENGTHS)] * 2), min_size=1, max_size=3)
sizes = st.fixed_dictionaries(
    {
        "lengths": lengths.map(lambda pairs: tuple(length for pair in pairs for length in pair)),
        "hidden_size": st.sampled_from(HIDDEN_SIZES),
        "vocab_size": st.sampled_from(VOCAB_SIZES),
        "dtype": st.sampled_from(DTYPES),
        "has_bias": st.booleans(),
        "sharpness": st.sampled_from([0.0, 1.0, 6.0]),
        "is_near": st.booleans(),
        "seed": st.integers(0, 1000),
    },
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


@given(sizes=sizes, objective=objectives, masked=st.sampled_from([0.0, 0.5, 1.0]))
def test_loss_and_its_gradients_are_as_accurate_as_plain_pytorch(sizes, objective, masked, backend):
    pairs = batch(**sizes)
    mask(pairs, masked)
    if objective.get("length_normalize"):
        pairs.labels[:, 0] = 0
    check_loss(pairs, backend, objective)


@given(sizes=sizes, with_entropy=st.booleans(), masked=st.sampled_from([0.0, 0.5, 1.0]))
def test_logps_entropy_and_their_gradients_are_as_accurate_as_plain_pytorch(
    sizes, with_entropy, masked, backend
):
    tokens = batch(**sizes)
    mask(tokens, masked)
    check_logps(tokens, backend, with_entropy)


def mask(tokens: Batch, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    is_masked = torch.rand(tokens.labels.shape, generator=generator) < share
    tokens.labels[is_masked.to(tokens.labels.device)] = -100


@pytest.mark.parametrize(("modulation", "dtype"), [*zip(MODULATIONS, (DTYPES * 2)[:3], strict=True)], ids=str)
def test_loss_over_several_tiles_and_chunks(modulation, dtype, backend, monkeypatch):
    """More rows and vocabulary than one tile or chunk of either backend holds, at the sharpness of a trained
    LM."""
    length, vocab_size = 520, 4500
    if INTERPRETED:  # where tiles are small, and so can be chunks
        from focalkern import triton_launch

        length, vocab_size = 13, 700
        monkeypatch.setattr(triton_launch, "_LEAST_CHUNK", 256)
        monkeypatch.setattr(triton_launch, "_DZ_BYTES", 0)
        assert triton_launch.vocab_chunk(4 * length, vocab_size, dtype.itemsize) == 256
    pairs = batch(
        (length,) * 4, hidden_size=64, vocab_size=vocab_size, dtype=dtype, has_bias=True, sharpness=4.0
    )
    objective = {"modulation": modulation, "gamma": 0.5, "beta": 0.1}
    check_loss(pairs, backend, objective, ("certified", "exact"))


@pytest.mark.skipif(not INTERPRETED, reason="tiles of the Triton kernels: in the interpreted run")
@pytest.mark.parametrize("tile", [(32, 256, 64), (128, 128, 16)], ids=str)
def test_tiles_of_other_shapes_than_the_interpreters(tile, backend, monkeypatch):
    """On a GPU most tiles span two vocabulary blocks; the last one may lie past the vocabulary."""
    from csrc_triton import launch

    monkeypatch.setattr(launch, "_INTERPRET", dict.fromkeys(launch.KERNELS, launch.Launch(*tile, 1, 1)))
    for vocab_size in (257, 385):
        tokens = problem(4, 9, hidden_size=33, vocab_size=vocab_size, has_bias=True, softcap=5.0)
        check_logps(tokens, backend, with_entropy=True)


def test_gradcheck_of_the_whole_loss_in_float64():
    pairs = batch((3, 3, 2, 3), hidden_size=5, vocab_size=140, dtype=torch.float64, has_bias=True)
    options = {"softcap": 3.0, "temperature": 0.7, "label_smoothing": 0.1, "backend": "torch"}
    loss_fn = FusedFocalPOLoss(gamma=0.5, beta=0.3, **options)
    leaves = pairs.leaves()

    def run(*inputs):
        return pairs.loss(loss_fn, dict(zip(leaves, inputs, strict=True))).loss

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))
