"""What the checks of parallel heads have in common: a batch, ways to compare, and the list of them.

Run by several ranks, which `parallel_worker` starts; each check is a test case of `test_parallel_heads`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from tolerance import relative_error

from focalkern import FusedFocalPOLoss, FusedPairLoss
from focalkern.methods import hinge

# The interpreter of the kernels takes a while for each tile.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if IS_INTERPRETED else "torch"
LENGTHS = (12, 5, 8, 11) if IS_INTERPRETED else (24, 9, 17, 12, 24, 5)
V, H, T, PAIRS = 1000, 48, max(LENGTHS), len(LENGTHS) // 2
PROMPT = 2
IGNORED = -100
EXACT = 1e-6  # relative L2, of fp32 sums in another order
TOPICS = 8
GAP = 18.0  # between logits of one topic and of the others
TAU = 2.0**-22  # in fp32: what it leaves out does not show at `EXACT`, and most blocks are left out

Check = Callable[[], None]
CHECKS: dict[str, dict[str, Check]] = {}


def check_of(group: str, cases: Mapping[str, Mapping[str, Any]] | None = None) -> Callable:
    """Make a function a check that all ranks of the group run, or several, one for each case."""

    def register(function: Callable) -> Callable:
        name = function.__name__.replace("_", " ")
        checks = CHECKS.setdefault(group, {})
        if cases is None:
            checks[name] = function
        for case, options in (cases or {}).items():
            checks[f"{name}: {case}"] = partial(function, **options)
        return function

    return register


@dataclass
class Batch:
    """Pairs of unequal lengths. Every token is sure of one topic, of eight that the vocabulary is made of in
    order: blocks of other topics have next to no mass."""

    hidden: torch.Tensor  # [2B, T, H], or packed [N, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor  # [V]
    labels: torch.Tensor  # [2B, T] or [N], aligned
    cu_seqlens: torch.Tensor | None
    ref: torch.Tensor  # [2B]

    @property
    def references(self) -> dict[str, torch.Tensor]:
        chosen, rejected = self.ref.chunk(2)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_batch(
    packed: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, vocab_size: int = V
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(normal, generator)

    def of_topic(tokens: torch.Tensor) -> torch.Tensor:
        return GAP**0.5 * torch.nn.functional.one_hot(tokens * TOPICS // vocab_size, TOPICS)

    weight, bias = draw(vocab_size, H), 0.3 * draw(vocab_size)
    weight[:, :TOPICS] = of_topic(torch.arange(vocab_size))
    labels = torch.randint(vocab_size, (2 * PAIRS, T), generator=generator)
    # One token in six is not what its position expects, but one of the other half of the vocabulary.
    expected = torch.where(draw(2 * PAIRS, T) > -1, labels, (labels + vocab_size // 2) % vocab_size)
    hidden = 0.2 * draw(2 * PAIRS, T, H) + 0.1 * weight[expected]
    hidden[..., :TOPICS] = of_topic(expected)
    for row, length in zip(labels, LENGTHS, strict=True):
        row[length:] = IGNORED
        row[:PROMPT] = IGNORED
    ref = -50 - 10 * torch.rand(2 * PAIRS, generator=generator)
    cu_seqlens = None
    if packed:
        is_in = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
        hidden, labels = hidden[is_in], labels[is_in]
        cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    return Batch(hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels, cu_seqlens, ref)


def in_float64(batch: Batch) -> Batch:
    return replace(
        batch, hidden=batch.hidden.double(), weight=batch.weight.double(), bias=batch.bias.double()
    )


@cache
def alone() -> dist.ProcessGroup:
    """A group of this rank only, for what one process computes by itself."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def unsure_hinge(pairs):
    """A loss that takes the entropy too."""
    chosen, rejected = pairs.sums("entropy")
    hinge = torch.relu(1 - pairs.beta * (pairs.chosen_scores - pairs.rejected_scores))
    return hinge + 0.01 * (chosen - 0.5 * rejected)


def make_loss(kind: str, group: dist.ProcessGroup | None = None, **options):
    options = {"tau": TAU, "backend": BACKEND} | options
    if kind == "α-DPO":
        return FusedFocalPOLoss.alpha_dpo(2.0, 0.5, 0.4, process_group=group, **options)
    return {
        "FocalPO": lambda: FusedFocalPOLoss(beta=0.1, gamma=0.5, label_smoothing=0.1, **options),
        "DPO": lambda: FusedFocalPOLoss.dpo(**options),
        "SimPO": lambda: FusedFocalPOLoss.simpo(**options),
        "pair loss": lambda: FusedPairLoss(hinge, **options),
        "pair loss with entropies": lambda: FusedPairLoss(unsure_hinge, outputs=("entropy",), **options),
    }[kind]()


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def agree(
    name: str,
    actual: torch.Tensor,
    expected: torch.Tensor,  # of one process
    exact: torch.Tensor | None = None,  # in float64, where fp32 alone is further from it than `EXACT`
) -> None:
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)}, not {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, not {expected.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), f"{name} differs"
        return
    error, most = relative_error(actual, expected), EXACT
    if exact is not None and error > most:
        error, most = relative_error(actual, exact), EXACT + 1.25 * relative_error(expected, exact)
    assert error <= most, f"{name}: {error:.2e} relative, at most {most:.1e} expected"


def agree_in_fields(
    actual: object,
    expected: object,
    *left_out: str,
    exact: object = None,  # in float64, as in `agree`
) -> None:
    """The tensors of two outputs of a loss."""
    for field in fields(actual):  # type: ignore[arg-type]
        value = getattr(actual, field.name)
        if isinstance(value, torch.Tensor) and field.name not in left_out:
            agree(field.name, value, getattr(expected, field.name), getattr(exact, field.name, None))


def same_on_ranks(**values: torch.Tensor) -> None:
    """Bit by bit."""
    for name, value in values.items():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value.detach())
        assert all(torch.equal(other, gathered[0]) for other in gathered), f"{name} differs between the ranks"


def raised_on_ranks(error: type[Exception], match: str, call: Callable[[], object]) -> None:
    """The call raises on every rank; one that does not would leave the others waiting."""
    message = "nothing"
    try:
        call()
    except error as raised:
        message = str(raised)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, message)
    assert all(re.search(match, other) for other in gathered), f"{match!r} expected; raised {gathered}"


@contextmanager
def recorded(*places: tuple[Any, str]) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Calls of functions of these modules or classes, in order: name and arguments, copies of tensors."""
    events: list[tuple[str, tuple[Any, ...]]] = []

    def recording(name: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            copies = (x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)
            events.append((name, tuple(copies)))
            return function(*args, **kwargs)

        return wrapper

    originals = [(place, name, getattr(place, name)) for place, name in places if hasattr(place, name)]
    for place, name, function in originals:
        setattr(place, name, recording(name, function))
    try:
        yield events
    finally:
        for place, name, function in originals:
            setattr(place, name, function)
