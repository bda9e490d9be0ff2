"""Benchmark input: losses, and batches whose softmax is as sharp as a trained LM's.

`throughput.py` makes a `Case` of each comparison: a `Recipe`, as sharp as asked for by `calibrate`, or a
`FromFile` with the `Capture` of a real model. The peers receive its `batch`.
"""

from __future__ import annotations

import bisect
import functools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from focalkern import FusedFocalPOLoss
from focalkern.records import LogitTransform
from focalkern.reference import pair_losses

ROWS_PER_CHUNK = 256  # rows whose logits are held at once
CALIBRATION_ROWS = 128
# Entries of at least this probability are counted: sharpness as the authors of CCE state it.
PRESENT = 2.0**-12
# The reference model's log-probs differ from the policy's by this much per sequence (standard deviation), so
# that u = beta * (score_w - score_l) of DPO is of order one and no pair is saturated.
SCORE_STD = 10.0
# Averages over tokens differ from pair to pair by this much through fp32 rounding alone, in units of their
# size: then M* is 0, as in `focalkern.pairs.adaptive_margin`.
ROUNDING = 8 * torch.finfo(torch.float32).eps
SATURATED_U = 20.0  # dL/du = -sigmoid(-20) = -2e-9: next to no gradient
UNTRAINED_STD = 0.02  # of the weights as transformers initialises them (`initializer_range`)


def transformed(logits: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """What a model makes of `hidden @ weight.T + bias`: a scale (Cohere, Granite), then a softcap (Gemma)."""
    logits = logits if transform.logit_scale == 1 else transform.logit_scale * logits
    cap = transform.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True)
class Shape:
    """Size of an LM head, and what its model does to the logits."""

    name: str
    hidden: int
    vocab: int
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def transform(self) -> LogitTransform:
        return LogitTransform(softcap=self.softcap, logit_scale=self.logit_scale)


_MODELS = (
    Shape("llama3-8b", 4096, 128256),
    Shape("mistral-7b", 4096, 32768),
    Shape("gemma2-9b", 3584, 256000, softcap=30.0),
    Shape("qwen2.5-7b", 3584, 152064),
)
SHAPES = {shape.name: shape for shape in _MODELS}


# The preference losses, by the name that `--loss` takes. Without momentum, the running mean and deviation of
# alpha-DPO's margins are those of the batch.
OBJECTIVES = {
    "dpo": FusedFocalPOLoss.dpo(),
    "focalpo": FusedFocalPOLoss(),
    "alpha-dpo": FusedFocalPOLoss.alpha_dpo(ema_momentum=0.0),
    "simpo": FusedFocalPOLoss.simpo(),
}


def losses_by_formula(
    objective: FusedFocalPOLoss,
    logps: torch.Tensor,  # [2B] sums over the tokens of a sequence, chosen first; fp32 or float64
    ref_logps: torch.Tensor,  # [2B]
    lengths: torch.Tensor,  # [2B]
) -> torch.Tensor:  # [B]
    ref_logps = ref_logps.to(logps.dtype)
    if objective.length_normalize:
        logps, ref_logps = logps / lengths, ref_logps / lengths
    margin = objective.margin
    if objective.alpha:
        margin = margin + objective.alpha * adaptive_margin(objective.beta, logps.detach(), ref_logps)
    refs = (0.0, 0.0) if objective.reference_free else ref_logps.chunk(2)
    return pair_losses(*logps.chunk(2), *refs, beta=objective.beta, gamma=objective.gamma, margin=margin)


def adaptive_margin(beta: float, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:  # [B]
    """M* of alpha-DPO, Eq. 11; 0 where the pairs differ by rounding alone, and of one pair."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    margin = beta * (chosen - rejected)
    rounding = ROUNDING * beta * (logps.abs().max() + ref_logps.abs().max())
    std = margin.std(correction=min(1, len(margin) - 1))
    return torch.where(std > rounding, (margin - margin.mean()) / std, 0.0)


@dataclass(frozen=True)
class Case:
    """One comparison: input, gradients and loss. Small, and pickled: every process builds the same tensors.

    The subclass says where hidden states and head come from: `batch()` builds them, `about()` describes them.
    """

    shape: Shape
    tokens: int
    pairs: int
    dtype: torch.dtype
    device: str
    saturated: int = 0  # pairs
    frozen_head: bool = False
    loss: str = "dpo"

    def _batch(
        self,
        hidden: torch.Tensor,  # [N, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        cu_seqlens: torch.Tensor,  # [2B + 1]
        labels_of: Callable[[slice, torch.Tensor], torch.Tensor],  # of some rows, given their probabilities
        scores_of: Callable[[torch.Tensor], torch.Tensor],  # logps - ref_logps, given logps; all [2B]
    ) -> Batch:
        transform, sequences = self.shape.transform, Sequences(cu_seqlens)
        labels = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy, entries = 0.0, 0
        for start in range(0, len(hidden), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            row_logps = transformed(F.linear(hidden[rows], weight, bias).float(), transform).log_softmax(-1)
            probs = row_logps.exp()
            labels[rows] = labels_of(rows, probs)
            logps[rows] = row_logps.gather(-1, labels[rows, None])[:, 0]
            entries += (probs > PRESENT).sum().item()
            entropy -= probs.mul_(row_logps).sum(-1).double().sum().item()
        sharpness = {
            "nll": -logps.double().mean().item(),
            "entropy": entropy / len(hidden),
            "entries": entries / len(hidden),
        }
        sums = sequences.sums(logps)
        ref_logps = sums - saturated(scores_of(sums), self.saturated)
        hidden.requires_grad_()
        weight.requires_grad_(not self.frozen_head)
        head, objective = (hidden, weight, bias), OBJECTIVES[self.loss]
        return Batch(*head, labels, sequences, ref_logps, transform, objective, sharpness)


@dataclass(frozen=True)
class Recipe(Case):
    """Generated input, bit for bit the same on the same device."""

    scale: float | None = 1.0  # None: random weights, of an untrained model
    seed: int = 0

    def build(self) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Hidden states `[N, H]` and head `[V, H]`, without a bias.

        The logit of token v is `scale * N(0, 1) - log(1 + v)`: Gaussian evidence from the context on top of
        Zipf's law, with ids ordered by frequency as a tokenizer's are. Untrained: `N(0, 0.02^2 * H)`, which
        makes a softmax that is almost flat.
        """
        shape = self.shape
        generator = torch.Generator(self.device).manual_seed(self.seed)
        weight = torch.randn(shape.vocab, shape.hidden, generator=generator, device=self.device)
        if self.scale is None:
            weight.mul_(UNTRAINED_STD)
        else:
            weight.sub_(weight.mean(dim=1, keepdim=True)).div_(math.sqrt(shape.hidden))
            log_rank = torch.arange(1, shape.vocab + 1, device=self.device).log()
            # Every hidden state has the all-ones direction in it, which nothing but the frequency answers to.
            weight.sub_((log_rank / shape.hidden)[:, None])
        hidden = torch.randn(self.tokens, shape.hidden, generator=generator, device=self.device)
        if self.scale is not None:
            hidden.mul_(self.scale).add_(1.0)
        return hidden.to(self.dtype), weight.to(self.dtype), None

    def batch(self) -> Batch:
        """Sequences of one length. The labels are drawn from the softmax itself: the NLL is the entropy."""
        generator = torch.Generator(self.device).manual_seed(self.seed + 2)

        def draw(rows: slice, probs: torch.Tensor) -> torch.Tensor:
            uniform = torch.rand(len(probs), 1, generator=generator, device=self.device)
            return torch.searchsorted(probs.cumsum(-1), uniform).clamp_(max=self.shape.vocab - 1)[:, 0]

        def scores(logps: torch.Tensor) -> torch.Tensor:
            return SCORE_STD * torch.randn(len(logps), generator=generator, device=self.device)

        length = self.tokens // (2 * self.pairs)
        cu_seqlens = torch.arange(0, self.tokens + 1, length, device=self.device)
        return self._batch(*self.build(), cu_seqlens, draw, scores)

    def about(self) -> dict[str, Any]:
        kind = "untrained" if self.scale is None else "LM-like"
        return {"kind": kind, "seed": self.seed, "scale": self.scale}


@dataclass(frozen=True)
class Capture:
    """A file of `capture.py`: the completion tokens of B preference pairs, and the head they go into.

    Packed: the chosen sequences one behind the other, then their rejected in the same order.
    """

    hidden: torch.Tensor  # [N, H], each beside its label; in the model's dtype, as are weight and bias
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    labels: torch.Tensor  # [N]
    cu_seqlens: torch.Tensor  # [2B + 1]
    ref_logps: torch.Tensor  # [2B] fp32, sums over completion tokens
    softcap: float | None
    logit_scale: float
    model: str
    reference: str  # the model that ref_logps are of
    data: str

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Capture:
        """Tensors are mapped, not read; `ValueError` says why the file cannot be used."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except (RuntimeError, pickle.UnpicklingError, EOFError):
            content = None
        if not isinstance(content, dict) or set(content) != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} was not written by benchmarks/capture.py") from None
        return cls(**content)

    @property
    def pairs(self) -> int:
        return (len(self.cu_seqlens) - 1) // 2

    @property
    def shape(self) -> Shape:
        vocab, hidden = self.weight.shape
        return Shape(self.model, hidden, vocab, self.softcap, self.logit_scale)


@dataclass(frozen=True, kw_only=True)
class FromFile(Case):
    """A capture in a dtype, on a device."""

    path: Path

    def batch(self) -> Batch:
        capture = Capture.load(self.path)
        # Copies: pages of the mapped file would count as memory of the step that touches them first.
        head = (
            x if x is None else x.to(self.device, self.dtype, copy=True)
            for x in (capture.hidden, capture.weight, capture.bias)
        )
        others = (capture.cu_seqlens, capture.labels, capture.ref_logps)
        cu_seqlens, labels, ref_logps = (x.to(self.device) for x in others)
        return self._batch(
            *head, cu_seqlens, lambda rows, probs: labels[rows], lambda logps: logps - ref_logps
        )

    def about(self) -> dict[str, Any]:
        capture = Capture.load(self.path)
        names = {name: getattr(capture, name) for name in ("model", "reference", "data")}
        return {"kind": "captured", "file": self.path.name, **names}


@dataclass(frozen=True)
class Sequences:
    """The 2B sequences of a batch, chosen first, then their rejected, packed one behind the other."""

    cu_seqlens: torch.Tensor  # [2B + 1]

    @functools.cached_property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def padded(self, values: torch.Tensor, fill: float = 0) -> torch.Tensor:  # [N, ...] -> [2B, longest, ...]
        """No copy if all sequences are as long."""
        if min(self.lengths) == max(self.lengths):
            return values.view(len(self.lengths), -1, *values.shape[1:])
        return pad_sequence(values.split(self.lengths), batch_first=True, padding_value=fill)

    def sums(self, per_token: torch.Tensor) -> torch.Tensor:  # [N] -> [2B]
        return self.padded(per_token).sum(-1)


@dataclass
class Batch:
    """What every peer receives: the completion tokens alone, packed, labels aligned with hidden states."""

    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V], a constant: its gradient is not measured
    labels: torch.Tensor  # [N]
    sequences: Sequences
    ref_logps: torch.Tensor  # [2B] fp32
    transform: LogitTransform
    objective: FusedFocalPOLoss
    sharpness: dict[str, float]  # of the softmax: nll, entropy and entries above 2^-12, means over the rows

    def losses(self, logps: torch.Tensor) -> torch.Tensor:  # [2B] -> [B]
        return losses_by_formula(self.objective, logps, self.ref_logps, self.sequences.cu_seqlens.diff())

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """dhidden, and dweight unless the head is frozen."""
        inputs = [self.hidden, self.weight] if self.weight.requires_grad else [self.hidden]
        return dict(zip(("dhidden", "dweight"), torch.autograd.grad(loss, inputs), strict=False))


def calibrate(recipe: Recipe, entries: float) -> Recipe:
    """The recipe whose softmax has about this many entries above 2^-12 per row."""
    return replace(recipe, scale=_scale(recipe.shape, recipe.device, recipe.seed, entries))


@functools.cache
def _scale(shape: Shape, device: str, seed: int, entries: float) -> float:  # of any tokens and dtype
    sample = Recipe(shape, CALIBRATION_ROWS, 1, torch.float32, device, seed=seed + 1)
    context, weight, _ = sample.build()
    evidence, frequency = (context - 1.0) @ weight.T, weight.sum(dim=1)  # [rows, V], [V]

    def logits_at(scale: float) -> torch.Tensor:
        return transformed(torch.add(frequency, evidence, alpha=scale), shape.transform)

    return sharpening(logits_at, entries, 3, 64)


def sharpening(logits_at: Callable[[float], torch.Tensor], entries: float, least: int, most: int) -> float:
    """The scale, by bisection, at which a row of logits has about this many softmax entries above 2^-12.

    Below `least` the count may fall again: a flat softmax over a large vocabulary has no such entry.
    """

    def entries_at(scale: float) -> float:
        z = logits_at(scale)
        return (z > z.logsumexp(-1, keepdim=True) + math.log(PRESENT)).sum(-1).double().mean().item()

    thousandths = range(1000 * least, 1000 * most)
    return least + bisect.bisect(thousandths, -entries, key=lambda x: -entries_at(x / 1000)) / 1000


def saturated(scores: torch.Tensor, pairs: int) -> torch.Tensor:  # [2B]
    """The scores (logps - ref_logps) with the first `pairs` pairs at `u = SATURATED_U`."""
    scores = scores.clone()
    chosen, rejected = scores.chunk(2)
    half = SATURATED_U / OBJECTIVES["dpo"].beta / 2
    chosen[:pairs], rejected[:pairs] = half, -half
    return scores
