"""Is a peer right? Its loss and gradients against float64, before anything is timed.

The gradients are compared on a sample of their rows, so that no `[N, V]` tensor is needed. `throughput.py`
calls `sampled_step` twice, in float64 for the truth and in the batch's dtype for what that dtype allows, then
`errors_of` for each peer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from benchmarks.inputs import Batch

# A peer fails when its error exceeds this multiple of the error of plain PyTorch in the same dtype. Two fp32
# GEMMs differ by a factor of 2 (MKL and oneDNN, 512 terms); a wrong rounding or a lost term costs far more.
ERROR_FACTOR = 4.0
HIDDEN_ROWS = 64
VOCAB_ROWS = 256
TOKENS_PER_TILE, VOCAB_PER_TILE = 1024, 8192  # 64 MiB of float64 logits


@dataclass
class SampledStep:
    """Loss of each pair and the sampled rows of the gradients of their mean."""

    losses: torch.Tensor  # [B]
    dhidden: torch.Tensor  # [R, H]
    dweight: torch.Tensor | None  # [K, H]


@dataclass(frozen=True)
class Errors:
    """`loss`: absolute, of the mean; the gradients: relative L2 norm over the sampled rows."""

    loss: float
    dhidden: float
    dweight: float | None

    def multiples_of(self, other: Errors) -> dict[str, float | None]:
        """Each error over that of the other; None where one is missing or the other is 0."""
        others = asdict(other)
        return {
            name: error / others[name] if error is not None and others[name] else None
            for name, error in asdict(self).items()
        }

    def at_tau(self, tau: float) -> Errors:
        """This bound for a certified backward with `tau`, which is eps/64 of a dtype whose eps is 64·tau."""
        least = ERROR_FACTOR * 64 * tau
        dweight = None if self.dweight is None else max(self.dweight, least)
        return Errors(self.loss, max(self.dhidden, least), dweight)

    def exceeded(self, bound: Errors) -> list[str]:
        """The names of the errors above their bound. NaN exceeds every bound."""
        limits = asdict(bound)
        return [
            name for name, error in asdict(self).items() if error is not None and not error <= limits[name]
        ]


@dataclass(frozen=True)
class Sample:
    """Which rows of the gradients are looked at."""

    rows: torch.Tensor  # [R], of hidden
    vocab: torch.Tensor  # [K], half of them labels: the other rows have almost no gradient


def choose_sample(batch: Batch, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def some_of(values: torch.Tensor, count: int) -> torch.Tensor:
        return values[torch.randperm(len(values), generator=generator)[:count].to(values.device)]

    labels = batch.labels
    tokens = torch.arange(len(labels), device=labels.device)
    vocab = torch.arange(batch.weight.shape[0], device=labels.device)
    chosen = torch.cat([some_of(labels.unique(), VOCAB_ROWS // 2), some_of(vocab, VOCAB_ROWS // 2)])
    return Sample(rows=some_of(tokens, HIDDEN_ROWS).sort().values, vocab=chosen.unique())


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
    )


def error_bound(plain: Errors, dtype: torch.dtype) -> Errors:
    """The largest errors that pass: `ERROR_FACTOR` times those of plain PyTorch in the same dtype."""
    smallest = torch.finfo(dtype).eps
    return Errors(
        loss=ERROR_FACTOR * max(plain.loss, torch.finfo(torch.float32).eps),
        dhidden=ERROR_FACTOR * max(plain.dhidden, smallest),
        dweight=None if plain.dweight is None else ERROR_FACTOR * max(plain.dweight, smallest),
    )


def errors_of(
    loss: torch.Tensor, gradients: list[torch.Tensor], sample: Sample, truth: SampledStep
) -> Errors:
    """Errors of one peer's step; `gradients` in the order of `Batch.differentiated`."""
    dhidden = gradients[0][sample.rows]
    return Errors(
        loss=abs(loss.double() - truth.losses.mean()).item(),
        dhidden=relative_error(dhidden, truth.dhidden),
        dweight=None if truth.dweight is None else relative_error(gradients[1][sample.vocab], truth.dweight),
    )
