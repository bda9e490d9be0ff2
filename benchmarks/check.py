"""The gate: loss and gradients of a peer against float64. `throughput.py` times only peers that pass it.

Gradients are compared on a sample of their rows, and logits are made for a few tokens at a time: no `[N, V]`
tensor exists.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.inputs import Batch, transformed

# A peer fails when its error exceeds this multiple of the error of plain PyTorch in the same dtype. Two fp32
# GEMMs differ by a factor of 2 (MKL and oneDNN, 512 terms); a wrong rounding or a lost term costs far more.
ERROR_FACTOR = 4.0
# In bf16 that leaves room for a gradient that is 10 % too long. So the length of a gradient and the mean loss
# are held to this much of the truth, or of plain PyTorch: bf16 logits shift loss and gradients of eager
# PyTorch, TRL and Liger by the same 4 % at 16 entries per row.
SCALE_IN_EPS, SMALLEST_SCALE, LOSS_SCALE = 1.25, 1e-4, 2e-2
HIDDEN_ROWS, VOCAB_ROWS = 64, 256
EDGES = (0, 127, 128, 2047, 2048, -1)  # rows that are always looked at: the ends, and those of tiles
LOGITS_AT_ONCE = 2**23  # 64 MiB in float64


class Errors(NamedTuple):
    """Distance from the truth; NaN or infinity anywhere in a gradient makes its norm infinite."""

    norms: dict[str, float]  # of the mean loss: absolute; of the gradients: relative L2 over the sampled rows
    scale: dict[str, float]  # by what share each is too large: <g, t> / <t, t> - 1


class Sampled(NamedTuple):
    """Loss of each pair, or their mean, and the sampled rows of the gradients of the mean."""

    losses: torch.Tensor  # [B] or []
    gradients: dict[str, torch.Tensor]  # dhidden [R, H], and dweight [K, H] unless the head is frozen


class Gate:
    """The float64 step of a batch, and the error that plain PyTorch makes in the dtype of the batch."""

    def __init__(self, batch: Batch) -> None:
        self.dtype = batch.hidden.dtype
        self.rows, self.vocab = sampled_rows(batch)
        self.truth = sampled_step(batch, self.rows, self.vocab, torch.float64)
        plain = sampled_step(batch, self.rows, self.vocab, self.dtype)
        self.plain = self._errors(plain)
        # One mean loss may be right by luck. The root mean square over the pairs is not, and bounds its
        # error; fp32 rounds the loss of a single pair by `rounding`.
        rms = (plain.losses.double() - self.truth.losses).square().mean().sqrt()
        rounding = torch.finfo(torch.float32).eps * self.truth.losses.abs().max().clamp(min=1)
        self.plain.norms["loss"] = torch.maximum(rms, rounding).item()
        # The largest norms that pass.
        self.bound = {
            name: ERROR_FACTOR * max(error, 0.0 if name == "loss" else torch.finfo(self.dtype).eps)
            for name, error in self.plain.norms.items()
        }

    def errors(self, loss: torch.Tensor, gradients: dict[str, torch.Tensor]) -> Errors:
        rows = {"dhidden": self.rows, "dweight": self.vocab}
        found = self._errors(Sampled(loss, {name: x[rows[name]] for name, x in gradients.items()}))
        for name, gradient in gradients.items():
            if not gradient.isfinite().all():
                found.norms[name] = math.inf
        return found

    def verdict(self, found: Errors) -> str:
        """What is wrong, or nothing. NaN is beyond every bound."""
        limit = max(SMALLEST_SCALE, SCALE_IN_EPS * torch.finfo(self.dtype).eps)
        wrong = [name for name, error in found.norms.items() if not error <= self.bound[name]]
        for name, scale in found.scale.items():
            distance = min(abs(scale), abs(scale - self.plain.scale[name]))
            if not distance <= (LOSS_SCALE if name == "loss" else limit):
                wrong.append(f"scale of {name}")
        return f"wrong: error of {' and '.join(wrong)} beyond the bound" if wrong else ""

    def _errors(self, step: Sampled) -> Errors:
        truth, loss = self.truth, step.losses.double().mean() - self.truth.losses.mean()
        norms = {"loss": abs(loss).item()}
        scale = {"loss": (loss / truth.losses.abs().mean()).item()}
        for name, exact in truth.gradients.items():
            error = step.gradients[name].double() - exact
            norms[name] = (error.norm() / exact.norm()).item()
            scale[name] = ((error * exact).sum() / exact.square().sum()).item()
        return Errors(norms, scale)


def sampled_rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of hidden, and of weight: half of these are labels, since the others have almost no gradient."""
    generator = torch.Generator().manual_seed(0)

    def some_of(values: torch.Tensor, count: int) -> torch.Tensor:
        return values[torch.randperm(len(values), generator=generator)[:count].to(values.device)]

    def edges_of(values: torch.Tensor) -> torch.Tensor:
        return values[[edge for edge in EDGES if edge < len(values)]]

    tokens, vocab = (torch.arange(len(x), device=x.device) for x in (batch.labels, batch.weight))
    labels = some_of(batch.labels.unique(), VOCAB_ROWS // 2)
    rows = torch.cat([some_of(tokens, HIDDEN_ROWS), edges_of(tokens)])
    return rows.unique(), torch.cat([labels, some_of(vocab, VOCAB_ROWS // 2), edges_of(vocab)]).unique()


@torch.no_grad()
def sampled_step(batch: Batch, rows: torch.Tensor, vocab: torch.Tensor, dtype: torch.dtype) -> Sampled:
    """The step as eager PyTorch in `dtype` takes it: logits and their gradient are rounded to `dtype`, the
    softmax is fp32 (float64 for float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    hidden, labels, sequences = batch.hidden.detach(), batch.labels, batch.sequences
    weight, bias = (x if x is None else x.detach().to(dtype) for x in (batch.weight, batch.bias))

    def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return transformed(F.linear(hidden.to(dtype), weight, bias).to(wide), batch.transform)

    def gradient(z: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor, entries: torch.Tensor):
        p = (z.detach() - lse[tokens, None]).exp()
        is_label = (labels[tokens, None] == entries).to(wide)
        return torch.autograd.grad(z, x, g[tokens, None] * (is_label - p))[0]

    lse, target = torch.empty(2, len(labels), dtype=wide, device=labels.device)
    tokens, entries = (torch.arange(len(x), device=labels.device) for x in (labels, weight))
    description = f"reference in {str(dtype).removeprefix('torch.')}"
    chunks = tokens.split(max(1, LOGITS_AT_ONCE // len(weight)))
    for chunk in tqdm(chunks, desc=description, leave=False, disable=None):
        z = logits(hidden[chunk], weight, bias)
        lse[chunk], target[chunk] = z.logsumexp(-1), z.gather(-1, labels[chunk, None])[:, 0]

    logps = sequences.sums(target - lse).requires_grad_()  # [2B]
    with torch.enable_grad():
        losses = batch.losses(logps)
        (slopes,) = torch.autograd.grad(losses.mean(), logps)
        g = slopes.repeat_interleave(sequences.cu_seqlens.diff())  # [N]
        some = hidden[rows].to(dtype).requires_grad_()
        gradients = {"dhidden": gradient(logits(some, weight, bias), some, rows, entries)}
        if batch.weight.requires_grad:
            some = weight[vocab].requires_grad_()
            z = logits(hidden, some, None if bias is None else bias[vocab])
            gradients["dweight"] = gradient(z, some, tokens, vocab)
    return Sampled(losses.detach(), gradients)
