"""Gradient checks: loss and log-probs of the library against plain PyTorch, over random problems.

Low precision is measured as PyTorch's own: the error against float64 is at most twice that of the reference
in the same dtype (`tolerance.assert_as_accurate`). The objective alone is checked in `test_objective.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from conftest import DEVICE, INTERPRETED, LOW_PRECISION
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from focalkern import FusedFocalPOLoss, linear_logps, reference
from focalkern.pairs.objective import MODULATIONS

DTYPES = [torch.float32, *LOW_PRECISION]


@dataclass
class Problem:
    """A random head and preference batch; the tensors are drawn in float64 and rounded to the dtype."""

    pairs: int
    length: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    has_bias: bool
    completion_share: float
    sharpness: float
    head: dict = field(default_factory=dict)
    objective: dict = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        sequences = 2 * self.pairs
        scale = self.sharpness / self.hidden_size**0.5
        self.hidden = draw(sequences, self.length, self.hidden_size).to(self.dtype)
        self.weight = (draw(self.vocab_size, self.hidden_size) * scale).to(self.dtype)
        self.bias = draw(self.vocab_size).to(self.dtype) if self.has_bias else None
        shape = (sequences, self.length)
        self.labels = torch.randint(self.vocab_size, shape, generator=generator)
        masked = torch.rand(shape, generator=generator) > self.completion_share
        if self.objective.get("length_normalize"):
            masked[:, -1] = False
        self.labels[masked] = -100
        self.ref_logps = 3 * draw(2, self.pairs)
        self.grad_logps, self.grad_entropy = draw(*shape), draw(*shape)

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [self.hidden, self.weight] + ([self.bias] if self.bias is not None else [])
        return [x.detach().to(DEVICE, dtype, copy=True).requires_grad_() for x in tensors]


def values_and_gradients(problem, dtype, run):
    """What `run(hidden, weight, bias)` computes and the gradients of its scalar, by name."""
    inputs = problem.inputs(dtype)
    hidden, weight, bias = [*inputs, None][:3]
    scalar, value = run(hidden, weight, bias)
    scalar.backward()
    names = ["value", "dhidden", "dweight", "dbias"]
    return dict(zip(names, [value.detach()] + [x.grad for x in inputs], strict=False))


def check(problem, fused, plain, conditioning=0.0):
    actual = values_and_gradients(problem, problem.dtype, fused)
    naive = values_and_gradients(problem, problem.dtype, plain)
    exact = values_and_gradients(problem, torch.float64, plain)
    assert all(torch.isfinite(value).all() for value in actual.values())
    for name, value in actual.items():
        # Plain PyTorch has NaN where a factor of w(p)·log p overflows: its error is then no measure. The
        # floor is.
        measure = naive[name] if torch.isfinite(naive[name]).all() else exact[name]
        assert_as_accurate(value, measure, exact[name], name, conditioning)


def check_loss(problem, backend, backward="certified"):
    labels, refs = problem.labels.to(DEVICE), problem.ref_logps.to(DEVICE, torch.float32)
    loss_fn = FusedFocalPOLoss(**problem.objective, **problem.head, backend=backend, backward=backward)
    log_prob_mass = 0.0

    def fused(hidden, weight, bias):
        out = loss_fn(hidden, weight, labels, bias, *refs)
        nonlocal log_prob_mass
        log_prob_mass = (out.chosen_logps + out.rejected_logps).abs().max().item()
        return out.loss, out.losses

    def plain(hidden, weight, bias):
        options = dict(problem.objective)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        used_refs = [None, None] if options.pop("reference_free", False) else refs.to(dtype)
        losses = reference.focalpo_loss(hidden, weight, labels, bias, *used_refs, **options, **problem.head)
        return losses.mean(), losses

    fused(*[*problem.inputs(problem.dtype), None][:3])
    # u moves by β times the rounding of the summed log-probs, and loss and slope by no more than u.
    check(problem, fused, plain, conditioning=problem.objective["beta"] * log_prob_mass)


def check_logps(problem, backend, with_entropy):
    labels = problem.labels.to(DEVICE)
    grad_logps, grad_entropy = problem.grad_logps.to(DEVICE), problem.grad_entropy.to(DEVICE)

    def weighted(logps, entropy):
        values = torch.stack([logps, entropy]) if with_entropy else logps[None]
        weights = torch.stack([grad_logps, grad_entropy])[: len(values)]
        return (values * weights.to(values.dtype)).sum(), values

    def fused(hidden, weight, bias):
        outputs = ("entropy",) if with_entropy else ()
        options = {"outputs": outputs, "backend": backend, **problem.head}
        result = linear_logps(hidden, weight, labels, bias=bias, **options)
        return weighted(result.logps, result.entropy)

    def plain(hidden, weight, bias):
        result = reference.linear_logps(hidden, weight, labels, bias, **problem.head)
        return weighted(result["logps"], result["entropy"])

    check(problem, fused, plain)


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

heads = st.fixed_dictionaries(
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
problems = st.builds(
    Problem,
    pairs=st.integers(1, 3),
    length=st.sampled_from(LENGTHS),
    hidden_size=st.sampled_from(HIDDEN_SIZES),
    vocab_size=st.sampled_from(VOCAB_SIZES),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    completion_share=st.sampled_from([0.0, 0.5, 1.0]),
    sharpness=st.sampled_from([0.0, 1.0, 6.0]),
    head=heads,
    objective=objectives,
    seed=st.integers(0, 1000),
)


@given(problem=problems)
def test_loss_and_its_gradients_are_as_accurate_as_plain_pytorch(problem, backend):
    check_loss(problem, backend)


@given(problem=problems, with_entropy=st.booleans())
def test_logps_entropy_and_their_gradients_are_as_accurate_as_plain_pytorch(problem, with_entropy, backend):
    check_logps(problem, backend, with_entropy)


@pytest.mark.parametrize(("modulation", "dtype"), [*zip(MODULATIONS, (DTYPES * 2)[:3], strict=True)], ids=str)
def test_loss_over_several_tiles_and_chunks(modulation, dtype, backend):
    """More rows and vocabulary than one tile or chunk of either backend holds, at the sharpness of a trained
    LM."""
    sizes = (
        {"length": 40, "hidden_size": 64, "vocab_size": 4500}
        if INTERPRETED
        else {"length": 700, "hidden_size": 64, "vocab_size": 9000}
    )
    objective = {"modulation": modulation, "gamma": 0.5, "beta": 0.1}
    problem = Problem(
        2, dtype=dtype, has_bias=True, completion_share=0.8, sharpness=4.0, objective=objective, **sizes
    )
    check_loss(problem, backend)
    check_loss(problem, backend, backward="exact")


@pytest.mark.skipif(not INTERPRETED, reason="tiles of the Triton kernels: in the interpreted run")
@pytest.mark.parametrize("tile", [(32, 256, 64), (128, 128, 16)], ids=str)
def test_tiles_of_other_shapes_than_the_interpreters(tile, backend, monkeypatch):
    """On a GPU most tiles span two vocabulary blocks; the last one may lie past the vocabulary."""
    from csrc_triton import launch

    monkeypatch.setattr(launch, "_INTERPRET", dict.fromkeys(launch.KERNELS, launch.Launch(*tile, 1, 1)))
    for vocab_size in (257, 385):
        problem = Problem(2, 9, 33, vocab_size, torch.float32, True, 0.7, 3.0, {"softcap": 5.0})
        check_logps(problem, backend, with_entropy=True)


def test_gradcheck_of_the_whole_loss_in_float64():
    problem = Problem(2, 3, 5, 140, torch.float64, True, 0.7, 1.0)
    loss_fn = FusedFocalPOLoss(
        gamma=0.5, beta=0.3, softcap=3.0, temperature=0.7, label_smoothing=0.1, backend="torch"
    )
    refs = problem.ref_logps.to(DEVICE)
    labels = problem.labels.to(DEVICE)

    def run(*inputs):
        hidden, weight, bias = inputs
        return loss_fn(hidden, weight, labels, bias, *refs).loss

    assert torch.autograd.gradcheck(run, problem.inputs(torch.float64))
