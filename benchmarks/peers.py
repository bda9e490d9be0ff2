"""The peers of the benchmark: each computes the DPO loss of a `Batch` its own way.

A peer is a loader. `throughput.py` calls it once; it imports what the peer needs and returns the loss
function, or raises `Unavailable` with the reason why the peer cannot run here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.inputs import Batch, Shape, apply_softcap

BETA = 0.1

LossFn = Callable[[Batch], torch.Tensor]


class Unavailable(Exception):
    """The peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One way to compute the loss: its name in the table, how to get it, what it holds besides gradients."""

    name: str
    load: Callable[[str], LossFn]  # takes the device type
    held_bytes: Callable[[int, int], int]  # of (tokens, vocab): roughly, as measured on a CPU, rounded up

    def estimated_bytes(self, shape: Shape, tokens: int, dtype: torch.dtype, frozen_head: bool) -> int:
        """Memory beyond the inputs that a step may need, gradients included; rather too high than too low."""
        gradients = tokens * shape.hidden + (0 if frozen_head else shape.vocab * shape.hidden)
        # A peer may sum a gradient in fp32 and round it afterwards.
        return self.held_bytes(tokens, shape.vocab) + gradients * (4 + dtype.itemsize)


def dpo_loss(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(beta * ((logps_w - ref_w) - (logps_l - ref_l))), mean over pairs; arguments `[2B]`."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def load_eager(device_type: str) -> LossFn:
    """As TRL's trainers did it before their fused head: logits, upcast to fp32, gather minus logsumexp."""

    def loss(batch: Batch) -> torch.Tensor:
        logits = apply_softcap(F.linear(batch.hidden, batch.weight).float(), batch.softcap)  # [2B, T, V]
        target = logits.gather(-1, batch.labels[..., None])[..., 0]
        lse = torch.stack([sequence.logsumexp(-1) for sequence in logits])
        return dpo_loss((target - lse).sum(-1), batch.ref_logps)

    return loss


def load_trl(device_type: str) -> LossFn:
    """TRL's fused head with its default vocabulary chunk, asked for the log-probs alone."""
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        raise Unavailable(f"TRL with a fused LM head (>= 1.16) cannot be imported: {error}") from error

    def loss(batch: Batch) -> torch.Tensor:
        logps = ChunkedLogProbFunction.apply(
            batch.hidden.flatten(0, 1),
            batch.weight,
            None,  # bias
            batch.labels.flatten(),
            1.0,  # temperature
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            batch.softcap,
            1.0,  # logit scale
            ("log_probs",),
        )[0]
        return dpo_loss(logps.view_as(batch.labels).sum(-1), batch.ref_logps)

    return loss


def load_focalkern(device_type: str, backend: str, backward: str) -> LossFn:
    """This library, at gamma = 0, which is DPO."""
    if backend == "triton" and device_type != "cuda":
        raise Unavailable("the triton backend needs a CUDA device")
    try:
        from focalkern import FusedFocalPOLoss
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from error

    @functools.cache
    def configured(softcap: float | None) -> FusedFocalPOLoss:
        loss = FusedFocalPOLoss(beta=BETA, gamma=0.0, softcap=softcap, backend=backend, backward=backward)
        return loss.to(device_type)

    def loss(batch: Batch) -> torch.Tensor:
        ref_chosen, ref_rejected = batch.ref_logps.chunk(2)
        return configured(batch.softcap)(
            batch.hidden,
            batch.weight,
            batch.labels,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
        ).loss

    return loss


def all_peers(backward: str) -> dict[str, Peer]:
    """Every peer by the name that `--only` takes; `backward` is focalkern's mode."""

    def focalkern(backend: str) -> Peer:
        return Peer(
            name=f"focalkern ({backend})",
            load=lambda device_type: load_focalkern(device_type, backend, backward),
            held_bytes=lambda tokens, vocab: 12 * tokens * min(vocab, 4096),
        )

    return {
        "triton": focalkern("triton"),
        "torch": focalkern("torch"),
        "eager": Peer("eager PyTorch", load_eager, lambda tokens, vocab: 16 * tokens * vocab),
        "trl": Peer("TRL head", load_trl, lambda tokens, vocab: 36 * min(tokens, 4096) * min(vocab, 32768)),
    }
