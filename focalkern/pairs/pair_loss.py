"""`FusedPairLoss`: any loss of (chosen, rejected) pairs, a function of their log-probs, on a fused head.

The losses that come with the library are in `focalkern.methods`, written in the way a user would write one.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.gradcheck import GradcheckError, gradcheck

from focalkern import checks
from focalkern.autograd import check_first_order
from focalkern.compiler import not_compiled
from focalkern.distributed import VocabShard
from focalkern.logps.operator import LinearLogps
from focalkern.low_rank import LowRankUpdate
from focalkern.options import changed_options, listed
from focalkern.pairs.base import PairLossBase, PairOutput, PairRows


@dataclass(frozen=True)
class Pairs:
    """What a pair loss is a function of: B pairs, `[B]` fp32 each (fp64 for fp64 inputs).

    `chosen_logps` and `rejected_logps` are sums over completion tokens in nats (weighted with `ld_alpha`,
    where that is set) and carry the gradient. What is missing raises ValueError when asked for, by the name
    of the argument that would bring it.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor  # completion tokens
    rejected_lengths: torch.Tensor
    beta: float
    ref_chosen_logps: torch.Tensor | None = None
    ref_rejected_logps: torch.Tensor | None = None
    # Unweighted sums [2B] of per-token values of `linear_logps`, by name; "logps" is always there.
    token_sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # f′ of an f-divergence other than reverse KL, of log(π_θ/π_ref).
    score_of_log_ratio: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def chosen_log_ratios(self) -> torch.Tensor:
        """log(π_θ/π_ref), for losses that are not functions of a difference of scores."""
        return self.chosen_logps - self.references()[0]

    @property
    def rejected_log_ratios(self) -> torch.Tensor:
        return self.rejected_logps - self.references()[1]

    @property
    def chosen_scores(self) -> torch.Tensor:
        """log(π_θ/π_ref), or f′(π_θ/π_ref) of the divergence in place of reverse KL."""
        return self._score(self.chosen_logps, "ref_chosen_logps")

    @property
    def rejected_scores(self) -> torch.Tensor:
        return self._score(self.rejected_logps, "ref_rejected_logps")

    @property
    def chosen_mean_logps(self) -> torch.Tensor:
        """Log-prob per completion token; 0 where there is none."""
        return self.chosen_logps / self.chosen_lengths.clamp(min=1)

    @property
    def rejected_mean_logps(self) -> torch.Tensor:
        return self.rejected_logps / self.rejected_lengths.clamp(min=1)

    def references(self) -> tuple[torch.Tensor, torch.Tensor]:  # [B], [B]
        """The reference log-probs, for losses that are not functions of a difference of scores."""
        if self.score_of_log_ratio is not None:
            raise ValueError(
                "f_divergence must be 'reverse_kl' with this loss: for others log Z(x) only cancels in a"
                " difference of scores"
            )
        return self._reference("ref_chosen_logps"), self._reference("ref_rejected_logps")

    def sums(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:  # [B], [B]
        """Plain sums over completion tokens of an output of `linear_logps`: of chosen, of rejected."""
        if name not in self.token_sums:
            raise ValueError(
                f"outputs must name {name!r}, which this loss needs; got {list(self.token_sums)}"
            )
        chosen, rejected = self.token_sums[name].chunk(2)
        return chosen, rejected

    def _score(self, logps: torch.Tensor, name: str) -> torch.Tensor:
        log_ratios = logps - self._reference(name)
        return log_ratios if self.score_of_log_ratio is None else self.score_of_log_ratio(log_ratios)

    def _reference(self, name: str) -> torch.Tensor:
        ref_logps = getattr(self, name)
        if ref_logps is None:
            shape = list(self.chosen_logps.shape)
            raise ValueError(f"{name} must be given, [B] = {shape}: this loss needs a reference")
        return ref_logps


PairLoss = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PairLossOutput(PairOutput):
    """What `FusedPairLoss` returns; the fields that every loss has are described in `PairOutput`.

    `losses` is what the function returned: `[B]`, `[2B]` or 0-dim. `chosen_rewards` and `rejected_rewards`
    are β·(logps − ref_logps), without a reference β·logps; `prob` is σ of their difference.
    """

    logps_gradient: torch.Tensor  # [2B] dloss/dlogps, NaN until `loss.backward()` fills it in place

    @property
    def chosen_weight(self) -> torch.Tensor:  # [B]
        """−dloss/d`pairs.chosen_logps`, after `loss.backward()`; negative, it pushes the chosen down."""
        return -self.logps_gradient.chunk(2)[0]

    @property
    def rejected_weight(self) -> torch.Tensor:  # [B]
        """dloss/d`pairs.rejected_logps`, after `loss.backward()`; negative, it pushes the rejected up."""
        return self.logps_gradient.chunk(2)[1]


class FusedPairLoss(PairLossBase):
    """A function of the sequence log-probs of B pairs as a loss on hidden states, labels and LM head.

        def hinge(pairs):                                        # from focalkern.methods
            return torch.relu(1 - pairs.beta * (pairs.chosen_scores - pairs.rejected_scores))

        loss_fn = FusedPairLoss(hinge, beta=0.1)
        out = loss_fn(hidden, weight, labels, ref_chosen_logps=..., ref_rejected_logps=...)
        out.loss.backward()

    As a decorator, `@FusedPairLoss`, it makes a function the loss with the default options. Options of the
    function itself are set by `functools.partial(function, option=...)`. Autograd differentiates the
    function, and the fused head takes what comes out, one number per token. `check_pair_loss` compares that
    with finite differences.

    Args:
        function: `function(pairs, **tensors)` → losses `[B]`, one per sequence `[2B]`, or 0-dim; `pairs` is a
            `Pairs`, `tensors` are the named tensors given to the call. An `nn.Module` may keep state: it is
            in `state_dict()` and follows `train()` and `eval()`.
        beta: β > 0, `pairs.beta`.
        outputs: per-token outputs of `linear_logps` that the function takes as `pairs.sums(name)`.
        ld_alpha: in [0, 1]: tokens beyond the length that both sequences of a pair have weigh this much in
            `chosen_logps` and `rejected_logps` (LD-DPO, Liu et al. 2024); None, or 1, is the plain sum. Those
            of the reference must be weighted likewise: `reference_logps` does it.
        ignore_index, reduction, temperature, softcap, logit_scale, backward, tau, backend: as in
            `FusedFocalPOLoss`; the reduction is over what the function returns.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        function: PairLoss,
        beta: float = 0.1,
        *,
        outputs: tuple[str, ...] = (),
        ld_alpha: float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        backward: str = "certified",
        tau: str | float = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            reduction,
            ld_alpha,
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            backward=backward,
            tau=tau,
            backend=backend,
        )
        check_function(function)
        checks.check_number("beta", beta, low=0.0, exclude_low=True)
        self.function = function
        self.beta = float(beta)
        self.outputs = checks.check_outputs(outputs)

    def extra_repr(self) -> str:
        options = changed_options(self)
        if isinstance(options.pop("function"), torch.nn.Module):  # listed below, as a part
            return listed(options)
        return ", ".join(filter(None, (described(self.function), listed(options))))

    @not_compiled
    def forward(
        self,
        hidden: torch.Tensor,  # [2B, T, H], or packed [N, H]
        weight: torch.Tensor,  # [V, H]
        labels: torch.Tensor,  # [2B, T], or packed [N]
        bias: torch.Tensor | None = None,  # [V]
        ref_chosen_logps: torch.Tensor | None = None,  # [B]
        ref_rejected_logps: torch.Tensor | None = None,  # [B]
        shift: bool = False,
        cu_seqlens: torch.Tensor | None = None,  # [2B + 1]
        update: LowRankUpdate | None = None,
        vocab_shard: VocabShard | None = None,
        sequence_group: dist.ProcessGroup | None = None,
        **tensors: torch.Tensor,  # [B, ...] or 0-dim
    ) -> PairLossOutput:
        """Loss of B pairs; arguments as in `FusedFocalPOLoss`.

        Args:
            ref_chosen_logps, ref_rejected_logps: needed where the function takes them.
            tensors: given to the function by name: one value per pair `[B, ...]`, or 0-dim; with their
                gradients, if they require them. Under `sequence_group` each rank has all of these, and of the
                gradients of the function's own parameters: they are not to be summed over the group.

        Raises:
            ValueError, TypeError: naming the argument; from the function, whatever it raises.
        """
        inputs, batch = self.checked(
            hidden, weight, labels, bias, shift, cu_seqlens, update, vocab_shard, sequence_group
        )
        self._check(batch, ref_chosen_logps, ref_rejected_logps, tensors)
        logps = self.row_logps(inputs, batch, self.outputs)
        return self._loss(batch, logps, ref_chosen_logps, ref_rejected_logps, tensors)

    @not_compiled
    def from_logps(
        self,
        token_logps: LinearLogps,
        labels: torch.Tensor,  # [2B, T], or packed [N]
        ref_chosen_logps: torch.Tensor | None = None,  # [B]
        ref_rejected_logps: torch.Tensor | None = None,  # [B]
        shift: bool = False,
        cu_seqlens: torch.Tensor | None = None,  # [2B + 1]
        sequence_group: dist.ProcessGroup | None = None,
        **tensors: torch.Tensor,  # [B, ...] or 0-dim
    ) -> PairLossOutput:
        """The loss from what `linear_logps` returned for these labels, as `FusedFocalPOLoss.from_logps`.

        Raises:
            ValueError, TypeError: naming the argument; `outputs` that this loss needs and that
                `linear_logps` was not asked for.
        """
        batch, logps = self.given_logps(token_logps, labels, shift, cu_seqlens, sequence_group)
        for name in self.outputs:
            if getattr(token_logps, name) is None:
                raise ValueError(f"token_logps must have {name!r}: linear_logps(..., outputs=({name!r},))")
        self._check(batch, ref_chosen_logps, ref_rejected_logps, tensors)
        return self._loss(batch, logps, ref_chosen_logps, ref_rejected_logps, tensors)

    def _check(
        self,
        batch: PairRows,
        ref_chosen_logps: torch.Tensor | None,  # [B]
        ref_rejected_logps: torch.Tensor | None,  # [B]
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        for name, ref in (("ref_chosen_logps", ref_chosen_logps), ("ref_rejected_logps", ref_rejected_logps)):
            checks.check_ref_logps(name, ref, batch.pairs, None, batch.like)
        if (ref_chosen_logps is None) != (ref_rejected_logps is None):
            raise ValueError(
                "ref_chosen_logps and ref_rejected_logps must be given both, or neither; got one"
            )
        for name, tensor in tensors.items():
            checks.check_pair_tensor(name, tensor, batch.pairs, batch.like)

    def _loss(
        self,
        batch: PairRows,
        row_logps: LinearLogps,
        ref_chosen_logps: torch.Tensor | None,  # [B]
        ref_rejected_logps: torch.Tensor | None,  # [B]
        tensors: Mapping[str, torch.Tensor],
    ) -> PairLossOutput:
        logps = self.sequence_logps(batch, row_logps)
        gradient = torch.full_like(logps, torch.nan)
        if logps.requires_grad:
            logps.register_hook(functools.partial(_fill, gradient))
        sums = {name: batch.sequence_sums(getattr(row_logps, name).to(logps.dtype)) for name in self.outputs}
        sums["logps"] = logps if self.ld_alpha is None else batch.sequence_sums(row_logps.logps)
        chosen_logps, rejected_logps = logps.chunk(2)
        chosen_lengths, rejected_lengths = batch.lengths.chunk(2)
        pairs = Pairs(
            chosen_logps,
            rejected_logps,
            chosen_lengths,
            rejected_lengths,
            self.beta,
            None if ref_chosen_logps is None else ref_chosen_logps.to(logps.dtype),
            None if ref_rejected_logps is None else ref_rejected_logps.to(logps.dtype),
            sums,
        )
        losses = _losses(self.function, pairs, tensors)
        with torch.no_grad():
            chosen_rewards = self.beta * (pairs.chosen_logps - _or_zero(pairs.ref_chosen_logps))
            rejected_rewards = self.beta * (pairs.rejected_logps - _or_zero(pairs.ref_rejected_logps))
        return PairLossOutput(
            **self.shared_fields(batch, row_logps, logps, losses),
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            prob=torch.sigmoid(chosen_rewards - rejected_rewards),
            logps_gradient=gradient,
        )


def check_pair_loss(
    function: PairLoss,
    *,
    pairs: int = 4,
    beta: float = 0.1,
    outputs: tuple[str, ...] = (),
    reference: bool = True,
    tensors: Mapping[str, torch.Tensor] | None = None,
    skip: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Compare a function's gradient with finite differences, on random pairs in float64.

    It is checked in `chosen_logps`, `rejected_logps`, in the sums of "logps" and of "entropy" where `outputs`
    names it, and in the floating-point `tensors`. Finite differences see what stands under a stop-gradient:
    name such an input in `skip`, and put a module with running statistics in eval mode. A module is called as
    a fresh copy each time, so that its state does not move in between.

    Args:
        function: what `FusedPairLoss` takes.
        pairs, beta, outputs, tensors: of the `Pairs` and of the call.
        reference: whether there are reference log-probs.
        skip: inputs that are not checked.

    Raises:
        ValueError: the losses have the wrong shape or are not finite, or a gradient is wrong: in which input.
        TypeError: naming the argument.
    """
    check_function(function)
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float, count: int = pairs) -> torch.Tensor:
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        return low + (high - low) * uniform

    chosen_lengths, rejected_lengths = draw(5, 20).long(), draw(5, 20).long()
    logps = {"chosen_logps": draw(-40, -5), "rejected_logps": draw(-40, -5)}
    refs = [value + draw(-5, 5) if reference else None for value in logps.values()]
    sums = {name: draw(-40, -5, 2 * pairs) for name in (*outputs, "logps")}
    given = {name: x.detach().double() if x.is_floating_point() else x for name, x in (tensors or {}).items()}

    def losses(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        own = {name: inputs.get(name, x) for name, x in given.items()}
        token_sums = {name: inputs.get(name, x) for name, x in sums.items()}
        chosen, rejected = (inputs.get(name, x) for name, x in logps.items())
        at = Pairs(chosen, rejected, chosen_lengths, rejected_lengths, beta, refs[0], refs[1], token_sums)
        return _losses(copy.deepcopy(function), at, own)

    differentiable = {name: x for name, x in sums.items() if name in ("logps", "entropy")}
    inputs = logps | differentiable | {name: x for name, x in given.items() if x.is_floating_point()}
    unknown = set(skip) - set(inputs)
    if unknown:
        raise ValueError(f"skip must name inputs out of {list(inputs)}; got {sorted(unknown)}")
    value = losses({})
    if not torch.isfinite(value).all():
        raise ValueError(
            f"function {function_name(function)} must return finite losses; got {value.tolist()}"
        )
    tiny = torch.finfo(torch.float64).tiny
    scale = 1 / value.detach().abs().max().clamp(min=tiny)  # a tolerance of gradcheck is absolute
    for name in (name for name in inputs if name not in skip):
        leaf = inputs[name].clone().requires_grad_()
        if not losses({name: leaf}).requires_grad:
            if not torch.equal(losses({name: leaf.detach() + 1e-3}), value):
                what = f"gradient of {function_name(function)} in {name} is missing"
                raise ValueError(f"{what}: was it detached? If that is meant, skip={(name,)}")
            continue
        try:
            gradcheck(lambda x, name=name: losses({name: x}) * scale, leaf)
        except GradcheckError as error:
            what = f"gradient of {function_name(function)} in {name} is wrong"
            if isinstance(function, torch.nn.Module) and function.training:
                what += " in training mode (what moves running statistics is to be checked in eval mode)"
            raise ValueError(f"{what}: {error}") from None


def check_function(function: Any) -> None:
    """A function, or a module itself: through a partial or a bound method its state would be lost."""
    if not callable(function):
        hint = ", such as one of focalkern.methods" if isinstance(function, str) else ""
        raise TypeError(f"function must be callable{hint}; got {type(function).__name__}")
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    inner = getattr(inner, "__self__", inner)
    if isinstance(inner, torch.nn.Module) and inner is not function:
        raise TypeError("function must be a module itself, or its state would be lost; got a part of one")
    taken = RESERVED_NAMES.intersection(parameters_of(function))
    if taken:
        raise TypeError(
            f"function must call its tensors other than the loss's arguments; got {sorted(taken)}"
        )


def parameters_of(function: PairLoss) -> dict[str, inspect.Parameter]:
    """Parameters of a function other than the first, `pairs`."""
    called = function.forward if isinstance(function, torch.nn.Module) else function
    return dict(list(inspect.signature(called).parameters.items())[1:])


def _losses(
    function: PairLoss, pairs: Pairs, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:  # [B], [2B] or 0-dim
    losses = function(pairs, **tensors)
    count = pairs.chosen_logps.numel()
    if not isinstance(losses, torch.Tensor):
        raise TypeError(
            f"function {function_name(function)} must return a tensor; got {type(losses).__name__}"
        )
    if losses.shape not in ((count,), (2 * count,), ()):
        raise ValueError(
            f"function {function_name(function)} must return losses of shape [B] = [{count}], [2B] or [];"
            f" got {list(losses.shape)}"
        )
    return losses


def function_name(function: PairLoss) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def described(function: PairLoss) -> str:
    """The name, and the options that `functools.partial` set."""
    options = listed(function.keywords) if isinstance(function, functools.partial) else ""
    return function_name(function) + (f"({options})" if options else "")


def _fill(buffer: torch.Tensor, gradient: torch.Tensor) -> None:
    check_first_order(gradient)
    buffer.copy_(gradient)


# What `FusedPairLoss` takes by name itself.
RESERVED_NAMES = frozenset(inspect.signature(FusedPairLoss.forward).parameters) - {"tensors"}


def _or_zero(ref_logps: torch.Tensor | None) -> torch.Tensor | float:
    return 0.0 if ref_logps is None else ref_logps
