"""Random problems for the tests of the operators and losses: tokens and a head, two models, preference pairs.

Each knows what the library makes of it (`run`) and what the reference does (`plain`); `tolerance` compares.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from conftest import BACKENDS, DEVICE, LOW_PRECISION
from tolerance import assert_as_accurate

from focalkern import (
    FusedFocalPOLoss,
    FusedPairLoss,
    LinearLogps,
    LowRankUpdate,
    linear_kl,
    linear_logps,
    reference,
)
from focalkern.records import OUTPUTS

NAMES = ("hidden", "weight", "bias", "update_hidden", "update_weight")
EPS = torch.finfo(torch.float32).eps
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "negative logit_scale": {"logit_scale": -0.5},
    "all of them": {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.9},
}
Leaves = dict[str, torch.Tensor]

DTYPES = [torch.float32, *LOW_PRECISION]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def with_float64(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Each backend with these dtypes, and the torch backend, the only one to take it, with float64."""
    dtypes_of = {"torch": (*dtypes, torch.float64), "triton": dtypes}
    cases = [(backend, dtype) for backend in BACKENDS for dtype in dtypes_of[backend]]
    return pytest.mark.parametrize(("backend", "dtype"), cases, ids=str)


each_dtype_and_float64 = with_float64(*DTYPES)
each_wide_dtype = with_float64(torch.float32)


@dataclass(eq=False)
class Problem:
    """Tokens, the head that predicts their labels, and dL/dlogps; for a KL also the reference's."""

    hidden: torch.Tensor  # [..., T, H]
    weight: torch.Tensor  # [V, H]
    labels: torch.Tensor  # [..., T]
    grad: torch.Tensor  # [..., T]
    bias: torch.Tensor | None = None  # [V]
    update_hidden: torch.Tensor | None = None  # [..., T, R]
    update_weight: torch.Tensor | None = None  # [V, R]
    transform: dict = field(default_factory=dict)  # temperature, softcap, logit_scale
    ref: Problem | None = None

    @property
    def tensors(self) -> Leaves:
        return {name: x for name in NAMES if (x := getattr(self, name)) is not None}

    @property
    def keep(self) -> torch.Tensor:  # bool, of the labels' shape
        return self.labels != -100

    def leaves(self, dtype: torch.dtype | None = None, trained: tuple[str, ...] = NAMES) -> Leaves:
        """Fresh copies of the tensors of the head."""
        return {
            name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_(name in trained)
            for name, x in self.tensors.items()
        }

    def run(self, backend: str, leaves: Leaves | None = None, **options) -> LinearLogps:
        """`linear_logps`."""
        x = self.tensors if leaves is None else leaves
        update = LowRankUpdate(x["update_hidden"], x["update_weight"]) if "update_hidden" in x else None
        options = {"labels": self.labels, "backend": backend, **self.transform, **options}
        return linear_logps(x["hidden"], x["weight"], bias=x.get("bias"), update=update, **options)

    def plain(self, leaves: Leaves) -> LinearLogps:
        """The reference's `linear_logps`."""
        x = leaves
        update = LowRankUpdate(x["update_hidden"], x["update_weight"]) if "update_hidden" in x else None
        options = {"bias": x.get("bias"), "update": update, **self.transform}
        return LinearLogps(**reference.linear_logps(x["hidden"], x["weight"], self.labels, **options))

    def run_kl(self, backend: str, leaves: Leaves | None = None, **options) -> torch.Tensor:
        """`linear_kl`."""
        x, ref = self.tensors if leaves is None else leaves, self.ref.tensors
        options = {"labels": self.labels, "backend": backend, **self.transform, **options}
        biases = {"bias": x.get("bias"), "ref_bias": ref.get("bias")}
        return linear_kl(x["hidden"], x["weight"], ref["hidden"], ref["weight"], **biases, **options)

    def plain_kl(self, leaves: Leaves) -> torch.Tensor:
        x, ref = leaves, {name: x.to(leaves["hidden"].dtype) for name, x in self.ref.tensors.items()}
        biases = {"bias": x.get("bias"), "ref_bias": ref.get("bias")}
        tensors = (x["hidden"], x["weight"], ref["hidden"], ref["weight"], self.labels)
        return reference.linear_kl(*tensors, **biases, **self.transform)

    def products(self) -> tuple[torch.Tensor, torch.Tensor]:  # [n, H + R], [V, H + R]
        """What the logits of the completion tokens are the product of, in float64."""
        x = {name: tensor.detach().double() for name, tensor in self.tensors.items()}
        hidden, weight = [x["hidden"][self.keep]], [x["weight"]]
        if "update_hidden" in x:
            hidden.append(x["update_hidden"][self.keep])
            weight.append(x["update_weight"])
        return torch.cat(hidden, -1), torch.cat(weight, -1)

    def logits(self) -> torch.Tensor:  # [n, V]
        """Before their transform, in float64."""
        hidden, weight = self.products()
        return torch.nn.functional.linear(hidden, weight, None if self.bias is None else self.bias.double())

    def largest_logit(self) -> float:
        """fp32 knows a logit, and what is made of it, to one ulp of this size."""
        scale = abs(self.transform.get("logit_scale", 1.0)) / self.transform.get("temperature", 1.0)
        return self.logits().abs().amax().item() * scale if self.keep.any() else 0.0

    def moves(self, terms: torch.Tensor, dz: torch.Tensor) -> dict[str, float]:
        """How many ulps each gradient moves when each of the terms [n, V] that dz is the sum of moves by one
        of the largest logit: terms of the sums cancel."""
        hidden, weight = self.products()
        width = self.hidden.shape[-1]
        moved = (terms @ weight.abs(), terms.T @ hidden.abs())
        (dhidden, dweight), (of_hidden, of_weight) = (dz @ weight, dz.T @ hidden), moved

        def ratio(moved: torch.Tensor, gradient: torch.Tensor) -> float:
            return self.largest_logit() * (moved.norm() / gradient.norm().clamp(min=1e-300)).item()

        return {
            "hidden": ratio(of_hidden[:, :width], dhidden[:, :width]),
            "weight": ratio(of_weight[:, :width], dweight[:, :width]),
            "bias": ratio(terms.sum(0), dz.sum(0)),
            "update_hidden": ratio(of_hidden[:, width:], dhidden[:, width:]),
            "update_weight": ratio(of_weight[:, width:], dweight[:, width:]),
        }


def transformed(x: torch.Tensor, transform: dict) -> tuple[torch.Tensor, torch.Tensor | float]:
    """z = T(x) and dz/dx."""
    scale, temperature = transform.get("logit_scale", 1.0), transform.get("temperature", 1.0)
    softcap = transform.get("softcap")
    if softcap is None:
        return x * scale / temperature, scale / temperature
    tanh = torch.tanh(x * scale / softcap)
    return softcap * tanh / temperature, (1 - tanh**2) * scale / temperature


def problem(
    *shape: int,
    hidden_size: int = 24,
    vocab_size: int = 200,  # a whole block and a part of one
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    has_bias: bool = False,
    sharpness: float = 3.0,
    seed: int = 0,
    **transform,
) -> Problem:
    """Random tokens, a third of them masked, and a head whose update is about as large as its weight."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def head(width: int) -> list[torch.Tensor]:
        hidden, weight = draw(*shape, width), draw(vocab_size, width) * sharpness / width**0.5
        return [hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)]

    labels = torch.randint(vocab_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 1 / 3] = -100

    hidden, weight = head(hidden_size)
    update_hidden, update_weight = head(rank) if rank else (None, None)
    return Problem(
        hidden=hidden,
        weight=weight,
        bias=draw(vocab_size).to(DEVICE, dtype) if has_bias else None,
        update_hidden=update_hidden,
        update_weight=update_weight,
        labels=labels.to(DEVICE),
        grad=draw(*shape).float().to(DEVICE),
        transform=transform,
    )


def sharp_problem(tokens: int = 40, **options) -> Problem:
    """A softmax so sharp that most blocks hold next to nothing; large, small and no gradients."""
    made = problem(tokens, **{"hidden_size": 48, "vocab_size": 1400, "sharpness": 10.0, **options})
    made.grad[1::4] *= 1e-4
    made.grad[2::5] = 0.0
    return made


def kl_problem(
    *shape: int, hidden_size: int = 24, ref_hidden_size: int = 40, seed: int = 0, **options
) -> Problem:
    """A policy and its reference."""
    made = problem(*shape, hidden_size=hidden_size, seed=seed, **options)
    made.ref = problem(*shape, hidden_size=ref_hidden_size, seed=seed + 1, **options)
    return made


@dataclass(eq=False)
class Batch(Problem):
    """Preference pairs: the first half of the sequences is chosen, the second half rejected."""

    lengths: tuple[int, ...] = ()
    refs: dict[str, torch.Tensor] = field(default_factory=dict)  # [B] each

    @property
    def pairs(self) -> int:
        return len(self.lengths) // 2

    @property
    def real(self) -> torch.Tensor:  # [2B, T]
        """Where there is no padding."""
        place = torch.arange(self.labels.shape[1], device=DEVICE)
        return place < torch.tensor(self.lengths, device=DEVICE)[:, None]

    def in_layout(self, layout: str, leaves: Leaves | None = None) -> dict[str, torch.Tensor]:
        """hidden, weight, labels (and bias), "padded" or "packed" with cu_seqlens."""
        x = {"labels": self.labels, **(self.tensors if leaves is None else leaves)}
        if layout == "padded":
            return x
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], device=DEVICE)
        packed = {name: x[name][self.real] for name in ("hidden", "labels")}
        return {**x, **packed, "cu_seqlens": cu_seqlens}

    def loss(self, loss_fn: FusedFocalPOLoss | FusedPairLoss, leaves: Leaves | None = None, **arguments):
        """The output of a loss."""
        x = self.tensors if leaves is None else leaves
        return loss_fn(**{"labels": self.labels, **x, **self.refs, **arguments})

    def step(self, loss_fn: FusedFocalPOLoss | FusedPairLoss, upstream=1.0, layout="padded", **arguments):
        """The output of a loss, and the gradients of hidden, weight and bias after its backward."""
        leaves = self.leaves()
        out = self.loss(loss_fn, self.in_layout(layout, leaves), **arguments)
        (out.loss * upstream).sum().backward()
        return out, {name: x.grad for name, x in leaves.items()}

    def plain_losses(self, leaves: Leaves, **options) -> torch.Tensor:  # [B]
        """The reference's losses."""
        refs = {} if options.pop("reference_free", False) else self.refs
        options = {**self.transform, **options}
        return reference.focalpo_loss(labels=self.labels, **leaves, **refs, **options)


def batch(
    lengths: tuple[int, ...] = (4, 2, 5, 1, 5, 3),
    hidden_size: int = 16,
    vocab_size: int = 150,
    dtype: torch.dtype = torch.float32,
    has_bias: bool = False,
    sharpness: float = 3.0,
    seed: int = 0,
    is_near: bool = False,
    **transform,
) -> Batch:
    """Random pairs of sequences of unequal length, padded; of 4 tokens and more the first is the prompt. If
    `is_near`, their references are near the policy's log-probs."""
    shape = (len(lengths), max(*lengths, 1))
    made = problem(
        *shape,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        dtype=dtype,
        has_bias=has_bias,
        sharpness=sharpness,
        seed=seed,
        **transform,
    )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab_size, shape, generator=generator)
    for row, length in zip(labels, lengths, strict=True):
        row[length:] = -100
        row[: int(length > 3)] = -100
    made.labels = labels.to(DEVICE)
    refs = torch.randn(len(lengths), generator=generator).to(DEVICE)
    refs += made.plain(made.leaves(torch.float64)).logps.detach().sum(-1) if is_near else -20
    names = ("ref_chosen_logps", "ref_rejected_logps")
    return Batch(**vars(made), lengths=lengths, refs=dict(zip(names, refs.chunk(2), strict=True)))


# What came out, beside the reference


def outcome(
    problem: Problem, values: LinearLogps, leaves: Leaves, upstream: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Values that were asked for and gradients, by name; `upstream` is of logps if not given."""
    upstream = {"logps": problem.grad} if upstream is None else upstream
    total = sum((getattr(values, name) * grad).sum() for name, grad in upstream.items())
    trained = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(total, list(trained.values()))
    found = {name: getattr(values, name) for name in ("logps", *OUTPUTS)}
    found = {name: value.detach() for name, value in found.items() if value is not None}
    return {**found, **dict(zip(trained, gradients, strict=True))}


def conditioning(
    problem: Problem, exact: dict[str, torch.Tensor], upstream: dict[str, torch.Tensor] | None = None
) -> dict[str, float]:
    """How many ulps each value and gradient moves when the logits move by one; `exact` are the values."""
    upstream = {"logps": problem.grad} if upstream is None else upstream
    keep, zero = problem.keep, problem.grad.new_zeros(())
    z, slope = transformed(problem.logits(), problem.transform)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    g, g_entropy = (upstream.get(name, zero).expand(keep.shape)[keep, None] for name in ("logps", "entropy"))
    target = torch.nn.functional.one_hot(problem.labels[keep], p.shape[1])
    of_logps = (target - p) * slope
    # dz of the entropy is −p·(log p + entropy): rounding of the bracket leaves p, as in dz of the log-probs.
    of_entropy = -p * (log_p + torch.special.entr(p).sum(-1, keepdim=True)) * slope
    terms = g.abs() * of_logps.abs() + g_entropy.abs() * (of_entropy.abs() + of_logps.abs())
    limits = problem.moves(terms, g * of_logps + g_entropy * of_entropy)
    for name in {"logps", *OUTPUTS} & exact.keys():
        root_mean_square = exact[name].double().norm().item() / max(len(z), 1) ** 0.5
        limits[name] = problem.largest_logit() / (root_mean_square or 1.0)
    return limits


def assert_accurate(
    problem: Problem, backend: str, upstream: dict[str, torch.Tensor] | None = None, **options
) -> LinearLogps:
    """Values and gradients of the library as accurate as the reference's in the same dtype."""
    leaves = problem.leaves()
    result = problem.run(backend, leaves, **options)
    assert_matches(problem, outcome(problem, result, leaves, upstream), upstream)
    return result


def assert_matches(
    problem: Problem, actual: dict[str, torch.Tensor], upstream: dict[str, torch.Tensor] | None = None
) -> None:
    """Values and gradients, by name, as accurate as the reference's in the same dtype."""
    in_dtype, in_float64 = problem.leaves(), problem.leaves(torch.float64)
    naive = outcome(problem, problem.plain(in_dtype), in_dtype, upstream)
    exact = outcome(problem, problem.plain(in_float64), in_float64, upstream)
    limits = conditioning(problem, exact, upstream)
    for name, value in actual.items():
        assert value.shape == exact[name].shape
        if name == "is_top1":
            assert value.dtype == torch.bool
            assert torch.equal(value, exact[name])
        else:
            assert_as_accurate(value, naive[name], exact[name], name, limits[name])


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same bits under the same names."""
    assert actual.keys() == expected.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name
