"""Benchmark input: hidden states, head and preference batch whose softmax is as sharp as a trained LM's.

`throughput.py` calls `calibrate`, then `preference_batch`. A memory measurement, in a process of its own,
rebuilds the same tensors from the `Recipe`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

ROWS_PER_CHUNK = 256  # rows whose logits are held at once
CALIBRATION_ROWS = 128
# Entries of at least this probability are counted: sharpness as the authors of CCE state it.
PRESENT = 2.0**-12
# The reference model's log-probs differ from the policy's by this much per sequence (standard deviation), so
# that u = beta * (score_w - score_l) is of order one and no pair is saturated.
SCORE_STD = 10.0


@dataclass(frozen=True)
class Shape:
    """Size of an LM head."""

    name: str
    hidden: int
    vocab: int
    softcap: float | None = None


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama3-8b", 4096, 128256),
        Shape("mistral-7b", 4096, 32768),
        Shape("gemma2-9b", 3584, 256000, softcap=30.0),
        Shape("qwen2.5-7b", 3584, 152064),
    )
}


@dataclass(frozen=True)
class Recipe:
    """All that it takes to build the same hidden states and head again, bit for bit on the same device."""

    shape: Shape
    tokens: int
    pairs: int
    dtype: torch.dtype
    device: str
    scale: float = 1.0
    seed: int = 0

    def build(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `[2B, T, H]` and head `[V, H]`.

        The logit of token v is `scale * N(0, 1) - log(1 + v)`: Gaussian evidence from the context on top of
        Zipf's law, with ids ordered by frequency as a tokenizer's are. A trained LM of the same sharpness has
        smaller logits (its evidence is not Gaussian): the rounding of bf16 logits shows less there than here.
        """
        shape = self.shape
        generator = torch.Generator(self.device).manual_seed(self.seed)
        weight = torch.randn(shape.vocab, shape.hidden, generator=generator, device=self.device)
        weight.sub_(weight.mean(dim=1, keepdim=True)).div_(math.sqrt(shape.hidden))
        log_rank = torch.arange(1, shape.vocab + 1, device=self.device).log()
        # Every hidden state has the all-ones direction in it, which nothing but the frequency answers to.
        weight.sub_((log_rank / shape.hidden)[:, None])
        hidden = torch.randn(self.tokens, shape.hidden, generator=generator, device=self.device)
        hidden.mul_(self.scale).add_(1.0)
        hidden = hidden.view(2 * self.pairs, self.tokens // (2 * self.pairs), shape.hidden)
        return hidden.to(self.dtype), weight.to(self.dtype)


@dataclass
class Batch:
    """What every peer receives: the same tensors, labels aligned with the hidden states, nothing masked."""

    hidden: torch.Tensor  # [2B, T, H], chosen first, then their rejected
    weight: torch.Tensor  # [V, H]
    labels: torch.Tensor  # [2B, T]
    ref_logps: torch.Tensor  # [2B] fp32
    softcap: float | None

    def requires_grad_(self, frozen_head: bool) -> Batch:
        self.hidden.requires_grad_()
        self.weight.requires_grad_(not frozen_head)
        return self

    def differentiated(self) -> list[torch.Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    def sample(self, tokens: int, vocab: int) -> Batch:
        """A batch of the same kind on a small part of this one, to warm a peer up."""
        part = Batch(
            hidden=self.hidden.detach()[:, :tokens].clone(),
            weight=self.weight.detach()[:vocab].clone(),
            labels=self.labels[:, :tokens] % min(vocab, self.weight.shape[0]),
            ref_logps=self.ref_logps,
            softcap=self.softcap,
        )
        return part.requires_grad_(frozen_head=not self.weight.requires_grad)


@dataclass(frozen=True)
class Sharpness:
    """How peaked the softmax is: means over the sampled rows."""

    rows: int
    nll: float
    entropy: float
    entries: float  # above 2^-12 per row

    def __str__(self) -> str:
        return (
            f"NLL {self.nll:.2f}, entropy {self.entropy:.2f}, "
            f"{self.entries:.0f} entries above 2^-12 per row (mean of {self.rows} rows)"
        )


def apply_softcap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def calibrate(recipe: Recipe, entries: float) -> Recipe:
    """The recipe whose softmax has about this many entries above 2^-12 per row, by bisection of its scale."""
    sample = replace(
        recipe, tokens=CALIBRATION_ROWS, pairs=1, dtype=torch.float32, scale=1.0, seed=recipe.seed + 1
    )
    context, weight = sample.build()
    evidence = (context.flatten(0, 1) - 1.0) @ weight.T  # [rows, V]
    frequency = weight.sum(dim=1)  # [V]

    def entries_at(scale: float) -> float:
        logps = apply_softcap(scale * evidence + frequency, recipe.shape.softcap).log_softmax(-1)
        return (logps > math.log(PRESENT)).sum(-1).double().mean().item()

    # Below a scale of 3 the count may fall again: a flat softmax over a large vocabulary has no such entry.
    low, high = 3.0, 64.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if entries_at(middle) > entries else (low, middle)
    return replace(recipe, scale=round(low, 3))


@torch.no_grad()
def preference_batch(recipe: Recipe) -> tuple[Batch, Sharpness]:
    """A batch and its sharpness. The labels are drawn from the softmax itself: the NLL is the entropy."""
    hidden, weight = recipe.build()
    generator = torch.Generator(recipe.device).manual_seed(recipe.seed + 2)
    labels = torch.empty(recipe.tokens, dtype=torch.long, device=recipe.device)
    logps = torch.empty(recipe.tokens, dtype=torch.float32, device=recipe.device)
    sharpness = None
    for start in range(0, recipe.tokens, ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        logits = apply_softcap((hidden.flatten(0, 1)[rows] @ weight.T).float(), recipe.shape.softcap)
        row_logps = logits.log_softmax(-1)
        probs = row_logps.exp()
        uniform = torch.rand(len(probs), 1, generator=generator, device=recipe.device)
        drawn = torch.searchsorted(probs.cumsum(-1), uniform).clamp_(max=recipe.shape.vocab - 1)
        labels[rows] = drawn[:, 0]
        logps[rows] = row_logps.gather(-1, drawn)[:, 0]
        if sharpness is None:
            sharpness = Sharpness(
                rows=len(probs),
                nll=-logps[rows].mean().item(),
                entropy=-(probs * row_logps).sum(-1).mean().item(),
                entries=(probs > PRESENT).sum(-1).double().mean().item(),
            )
    assert sharpness is not None
    labels = labels.view(hidden.shape[:2])
    scores = SCORE_STD * torch.randn(len(labels), generator=generator, device=recipe.device)
    ref_logps = logps.view(hidden.shape[:2]).sum(-1) - scores
    return Batch(hidden, weight, labels, ref_logps, recipe.shape.softcap), sharpness
