"""The file of a model's hidden states: `capture.py` writes it, `throughput.py --capture` runs from it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import Batch, Sequences, Shape, Sharpness, Source, label_logps, saturated


class CaptureError(ValueError):
    """The file cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Capture:
    """What the file holds: the completion tokens of B preference pairs, and the head they go into.

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
        """Tensors are mapped, not read: only what is looked at comes from the disk."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError as error:
            raise CaptureError(f"{path}: {error.strerror or error}") from None
        except (RuntimeError, pickle.UnpicklingError, EOFError):
            content = None
        if not isinstance(content, dict) or set(content) != {field.name for field in fields(cls)}:
            raise CaptureError(f"{path} was not written by benchmarks/capture.py") from None
        return cls(**content)

    @property
    def pairs(self) -> int:
        return (len(self.cu_seqlens) - 1) // 2

    @property
    def shape(self) -> Shape:
        vocab, hidden = self.weight.shape
        return Shape(self.model, hidden, vocab, self.softcap, self.logit_scale)


@dataclass(frozen=True)
class CapturedInput(Source):
    """A capture in a dtype, on a device."""

    path: Path

    def batch(self, saturated_pairs: int = 0) -> tuple[Batch, Sharpness]:
        capture, transform = Capture.load(self.path), self.shape.transform
        # Copies: pages of the mapped file would count as memory of the step that touches them first.
        hidden, weight, bias = (
            x if x is None else x.to(self.device, self.dtype, copy=True)
            for x in (capture.hidden, capture.weight, capture.bias)
        )
        labels = capture.labels.to(self.device)
        _, logps, sharpness = label_logps(hidden, weight, bias, transform, lambda rows, _: labels[rows])
        sequences = Sequences(capture.cu_seqlens.to(self.device))
        sums, ref_logps = sequences.sums(logps), capture.ref_logps.to(self.device)
        ref_logps = sums - saturated(sums - ref_logps, saturated_pairs)
        return Batch(hidden, weight, bias, labels, sequences, ref_logps, transform), sharpness

    def about(self) -> dict[str, Any]:
        capture = Capture.load(self.path)
        names = {name: getattr(capture, name) for name in ("model", "reference", "data")}
        return {"kind": "captured", "file": self.path.name, **names}
