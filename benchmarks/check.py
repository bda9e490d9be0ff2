"""Is a peer right? Its loss and gradients against float64, before anything is timed.

The gradients are compared on a sample of their rows, so that no `[N, V]` tensor is needed. `throughput.py`
calls `sampled_step` twice, in float64 for the truth and in the batch's dtype for what that dtype allows, then
`errors_of` for each peer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F

from benchmarks.inputs import Batch

# A peer fails when its error exceeds this multiple of the error of plain PyTorch in the same dtype. Two fp32
# GEMMs differ by a factor of 2 (MKL and oneDNN, 512 terms); a wrong rounding or a lost term costs far more.
ERROR_FACTOR = 4.0
# In bf16 that leaves room for gradients that are 10 % too long, and for a beta that is. Rounding is nearly
# unbiased: it changes the length of a gradient, and the mean loss, much less than it changes their elements.
# These are limits around the truth, or around what bf16 logits make of it: their rounding, summed over the
# tokens of a sequence, shifts u; at 16 entries per row, loss and gradients of eager PyTorch, TRL and Liger
# are off by 4 %, all by the same.
SCALE_LIMIT = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
LOSS_SCALE_LIMIT = 2e-2
HIDDEN_ROWS = 64
VOCAB_ROWS = 256
EDGES = (0, 127, 128, 2047, 2048, -1)  # rows that are always looked at: the ends, and those of tiles
TOKENS_PER_TILE, VOCAB_PER_TILE = 1024, 8192  # 64 MiB of float64 logits


@dataclass
class SampledStep:
    """Loss of each pair and the sampled rows of the gradients of their mean."""

    losses: torch.Tensor  # [B]
    dhidden: torch.Tensor  # [R, H]
    dweight: torch.Tensor | None  # [K, H]


@dataclass(frozen=True)
class Scale:
    """By what part a step is too large (or, negative, too small).

    `loss`: of the mean |loss|; gradients g of the truth t: <g, t> / <t, t> - 1 over the sampled rows.
    """

    loss: float = 0.0
    dhidden: float = 0.0
    dweight: float | None = 0.0

    def beyond(self, limit: Scale, center: Scale) -> list[str]:
        """What differs from `center` by more than the limit. NaN always does."""
        return [
            name
            for name, value in vars(self).items()
            if value is not None and not abs(value - getattr(center, name)) <= getattr(limit, name)
        ]


@dataclass(frozen=True)
class Errors:
    """`loss`: absolute, of the mean; the gradients: relative L2 norm over the sampled rows."""

    loss: float
    dhidden: float
    dweight: float | None
    scale: Scale = field(default_factory=Scale)
    not_finite: tuple[str, ...] = ()  # gradients with NaN or infinity in any row

    @property
    def norms(self) -> dict[str, float | None]:
        return {"loss": self.loss, "dhidden": self.dhidden, "dweight": self.dweight}

    def multiples_of(self, other: Errors) -> dict[str, float | None]:
        """Each error over that of the other; None where one is missing or the other is 0."""
        others = other.norms
        return {
            name: error / others[name] if error is not None and others[name] else None
            for name, error in self.norms.items()
        }

    def exceeded(self, bound: Bound) -> list[str]:
        """The names of the errors above their bound, those of the scale last. NaN exceeds every bound."""
        limits = bound.errors.norms
        norms = [
            name for name, error in self.norms.items() if error is not None and not error <= limits[name]
        ]
        beyond = self.scale.beyond(bound.scale, Scale())
        # Near the truth or near plain PyTorch in everything: near one here and the other there is wrong.
        if not self.scale.beyond(bound.scale, bound.plain_scale):
            beyond = []
        return norms + [f"scale of {name}" for name in beyond]

    def verdict(self, bound: Bound) -> str:
        """What is wrong, or nothing."""
        exceeded = self.exceeded(bound)
        norms = " and ".join(name for name in exceeded if name in self.norms)
        scales = " and ".join(name for name in exceeded if name not in self.norms)
        wrong = [f"error of {names} beyond the bound" for names in (norms, scales) if names]
        wrong += [f"NaN or infinity in {' and '.join(self.not_finite)}"] if self.not_finite else []
        return f"wrong: {'; '.join(wrong)}" if wrong else ""


Limits = TypeVar("Limits", Errors, Scale)


@dataclass(frozen=True)
class Bound:
    """The largest errors that pass."""

    errors: Errors
    scale: Scale  # the largest distance from the truth, or from `plain_scale`
    plain_scale: Scale  # of plain PyTorch in the same dtype

    def at_tau(self, tau: float) -> Bound:
        """This bound for a certified backward with `tau`, which is eps/64 of a dtype whose eps is 64·tau."""
        eps = 64 * tau
        scale = SCALE_LIMIT[torch.bfloat16] * eps / torch.finfo(torch.bfloat16).eps
        return replace(
            self,
            errors=with_gradients_at_least(self.errors, ERROR_FACTOR * eps),
            scale=with_gradients_at_least(self.scale, scale),
        )


def with_gradients_at_least(limits: Limits, least: float) -> Limits:
    dweight = None if limits.dweight is None else max(limits.dweight, least)
    return replace(limits, dhidden=max(limits.dhidden, least), dweight=dweight)


@dataclass(frozen=True)
class Sample:
    """Which rows of the gradients are looked at."""

    rows: torch.Tensor  # [R], of hidden
    vocab: torch.Tensor  # [K], half of them labels: the other rows have almost no gradient


def choose_sample(batch: Batch, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def some_of(values: torch.Tensor, count: int) -> torch.Tensor:
        return values[torch.randperm(len(values), generator=generator)[:count].to(values.device)]

    def edges_of(values: torch.Tensor) -> torch.Tensor:
        return values[[edge for edge in EDGES if edge < len(values)]]

    labels = batch.labels
    tokens = torch.arange(len(labels), device=labels.device)
    vocab = torch.arange(batch.weight.shape[0], device=labels.device)
    rows = torch.cat([some_of(tokens, HIDDEN_ROWS), edges_of(tokens)])
    used, any_of = some_of(labels.unique(), VOCAB_ROWS // 2), some_of(vocab, VOCAB_ROWS // 2)
    return Sample(rows=rows.unique(), vocab=torch.cat([used, any_of, edges_of(vocab)]).unique())


@torch.no_grad()
def sampled_step(
    batch: Batch, sample: Sample, dtype: torch.dtype, tick: Callable[[int], object] = lambda tokens: None
) -> SampledStep:
    """The step as eager PyTorch in `dtype` would take it: logits and their gradient are rounded to `dtype`,
    the softmax is fp32 (float64 for float64). `tick` is told how many tokens went through a vocabulary tile.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, labels, sequences, transform = batch.hidden, batch.labels, batch.sequences, batch.transform

    def logits(rows: torch.Tensor, vocab: torch.Tensor) -> torch.Tensor:
        bias = None if batch.bias is None else batch.bias[vocab].to(dtype)
        return transform(F.linear(rows.to(dtype), batch.weight[vocab].to(dtype), bias).to(wide))

    def dlogits(
        z: torch.Tensor, lse: torch.Tensor, g: torch.Tensor, labels: torch.Tensor, vocab: torch.Tensor
    ) -> torch.Tensor:
        dz = g[:, None] * ((labels[:, None] == vocab).to(wide) - (z - lse[:, None]).exp())
        return (dz * transform.slope(z)).to(dtype)

    lse = torch.full(labels.shape, float("-inf"), dtype=wide, device=labels.device)
    target = torch.zeros_like(lse)
    for vocab in vocab_tiles(batch.weight):
        for rows in torch.arange(len(labels), device=labels.device).split(TOKENS_PER_TILE):
            z = logits(hidden[rows], vocab)
            lse[rows] = torch.logaddexp(lse[rows], z.logsumexp(-1))
            local = labels[rows] - vocab[0]
            inside = (local >= 0) & (local < len(vocab))
            target[rows[inside]] = z[inside, local[inside]]
            tick(len(rows))

    logps = sequences.sums(target - lse).requires_grad_()  # [2B]
    with torch.enable_grad():
        losses = batch.losses(logps)
        (slopes,) = torch.autograd.grad(losses.mean(), logps)
    g = sequences.per_token(slopes)  # [N]

    rows = sample.rows
    dhidden = torch.zeros(len(rows), hidden.shape[1], dtype=wide, device=labels.device)
    for vocab in vocab_tiles(batch.weight):
        dz = dlogits(logits(hidden[rows], vocab), lse[rows], g[rows], labels[rows], vocab)
        # Rounding the sum of each tile would make this less exact than TRL's head, which has fp32 sums.
        dhidden += dz.to(wide) @ batch.weight[vocab].to(dtype).to(wide)

    dweight = None
    if batch.weight.requires_grad:
        z = logits(hidden, sample.vocab)
        dweight = dlogits(z, lse, g, labels, sample.vocab).T @ hidden.to(dtype)
    return SampledStep(losses.detach(), dhidden.to(dtype), dweight)


def vocab_tiles(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.arange(len(weight), device=weight.device).split(VOCAB_PER_TILE)


def ticks(batch: Batch) -> int:
    """What `tick` of one `sampled_step` sums to."""
    return batch.labels.numel() * -(-batch.weight.shape[0] // VOCAB_PER_TILE)


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def scale_of(
    loss: torch.Tensor, dhidden: torch.Tensor, dweight: torch.Tensor | None, truth: SampledStep
) -> Scale:
    """The gradients on the sampled rows."""

    def along(value: torch.Tensor, exact: torch.Tensor) -> float:
        exact = exact.double().flatten()
        return (value.double().flatten() @ exact / (exact @ exact) - 1).item()

    return Scale(
        loss=((loss.double() - truth.losses.mean()) / truth.losses.abs().mean()).item(),
        dhidden=along(dhidden, truth.dhidden),
        dweight=None if dweight is None or truth.dweight is None else along(dweight, truth.dweight),
    )


def plain_errors(truth: SampledStep, same_dtype: SampledStep) -> Errors:
    """What plain PyTorch in the dtype of the batch gets wrong."""
    # One mean loss may be right by luck. The root mean square over the pairs is not, and bounds its error. So
    # may a pair be whose loss is large: fp32 rounds it by this much.
    loss = (same_dtype.losses.double() - truth.losses).square().mean().sqrt()
    rounding = torch.finfo(torch.float32).eps * truth.losses.abs().max()
    return Errors(
        loss=torch.maximum(loss, rounding).item(),
        dhidden=relative_error(same_dtype.dhidden, truth.dhidden),
        dweight=None
        if truth.dweight is None or same_dtype.dweight is None
        else relative_error(same_dtype.dweight, truth.dweight),
        scale=scale_of(same_dtype.losses.double().mean(), same_dtype.dhidden, same_dtype.dweight, truth),
    )


def error_bound(plain: Errors, dtype: torch.dtype) -> Bound:
    """`ERROR_FACTOR` times the errors of plain PyTorch in the same dtype, and what the scale may be."""
    smallest, limit = torch.finfo(dtype).eps, SCALE_LIMIT[dtype]
    errors = Errors(
        loss=ERROR_FACTOR * max(plain.loss, torch.finfo(torch.float32).eps),
        dhidden=ERROR_FACTOR * max(plain.dhidden, smallest),
        dweight=None if plain.dweight is None else ERROR_FACTOR * max(plain.dweight, smallest),
    )
    scale = Scale(LOSS_SCALE_LIMIT, limit, None if plain.dweight is None else limit)
    return Bound(errors, scale, plain.scale)


def errors_of(
    loss: torch.Tensor, gradients: list[torch.Tensor], sample: Sample, truth: SampledStep
) -> Errors:
    """Errors of one peer's step; `gradients` in the order of `Batch.differentiated`."""
    dhidden = gradients[0][sample.rows]
    dweight = None if truth.dweight is None else gradients[1][sample.vocab]
    named = zip(("dhidden", "dweight"), gradients, strict=False)
    return Errors(
        loss=abs(loss.double() - truth.losses.mean()).item(),
        dhidden=relative_error(dhidden, truth.dhidden),
        dweight=None if dweight is None else relative_error(dweight, truth.dweight),
        scale=scale_of(loss, dhidden, dweight, truth),
        not_finite=tuple(name for name, gradient in named if not all_finite(gradient)),
    )


def all_finite(gradient: torch.Tensor) -> bool:
    """In one reduction, without the mask that `isfinite` makes; NaN is the extreme of what has one."""
    return all(extreme.isfinite().item() for extreme in torch.aminmax(gradient.detach()))
