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

from benchmarks.inputs import BETA, Batch, LogitTransform, Shape


@dataclass(frozen=True)
class PeerLoss:
    """What a peer computes from a batch."""

    loss: torch.Tensor
    # Of the (token, vocabulary block) pairs, filled in by the backward; None of a peer that drops none.
    kept_share: torch.Tensor | None = None


LossFn = Callable[[Batch], PeerLoss]


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


def dpo_loss(logps: torch.Tensor, ref_logps: torch.Tensor) -> PeerLoss:
    """-log sigmoid(beta * ((logps_w - ref_w) - (logps_l - ref_l))), mean over pairs; arguments `[2B]`."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return PeerLoss(-F.logsigmoid(BETA * (chosen - rejected)).mean())


def load_eager(device_type: str) -> LossFn:
    """As TRL's trainers did it before their fused head: logits, upcast to fp32, gather minus logsumexp."""

    def loss(batch: Batch) -> PeerLoss:
        logits = batch.transform(F.linear(batch.hidden, batch.weight, batch.bias).float())  # [N, V]
        target = logits.gather(-1, batch.labels[:, None])[:, 0]
        lse = torch.cat([sequence.logsumexp(-1) for sequence in logits.split(batch.sequences.lengths)])
        return dpo_loss(batch.sequences.sums(target - lse), batch.ref_logps)

    return loss


def load_trl(device_type: str) -> LossFn:
    """TRL's fused head with its default vocabulary chunk, asked for the log-probs alone."""
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        raise Unavailable(f"TRL with a fused LM head (>= 1.16) cannot be imported: {error}") from error

    def loss(batch: Batch) -> PeerLoss:
        logps = ChunkedLogProbFunction.apply(
            batch.hidden,
            batch.weight,
            batch.bias,
            batch.labels,
            1.0,  # temperature
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            batch.transform.softcap,
            batch.transform.logit_scale,
            ("log_probs",),
        )[0]
        return dpo_loss(batch.sequences.sums(logps), batch.ref_logps)

    return loss


def load_focalkern(device_type: str, backend: str, backward: str, tau: float | str) -> LossFn:
    """This library, at gamma = 0, which is DPO."""
    if backend == "triton" and device_type != "cuda":
        raise Unavailable("the triton backend needs a CUDA device")
    try:
        from focalkern import FusedFocalPOLoss
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from error

    @functools.cache
    def configured(transform: LogitTransform) -> FusedFocalPOLoss:
        loss = FusedFocalPOLoss.dpo(
            beta=BETA,
            softcap=transform.softcap,
            logit_scale=transform.logit_scale,
            backward=backward,
            tau=tau,
            backend=backend,
        )
        return loss.to(device_type)

    def loss(batch: Batch) -> PeerLoss:
        ref_chosen, ref_rejected = batch.ref_logps.chunk(2)
        out = configured(batch.transform)(
            batch.hidden,
            batch.weight,
            batch.labels,
            bias=batch.bias,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            cu_seqlens=batch.sequences.cu_seqlens,
        )
        return PeerLoss(out.loss, out.kept_share)

    return loss


def all_peers(tau: float | str = "auto") -> dict[str, Peer]:
    """Every peer by the name that `--only` takes; `tau` is of focalkern's certified backward."""

    def focalkern(backend: str, backward: str) -> Peer:
        return Peer(
            name=f"focalkern ({backend})" if backward == "certified" else f"focalkern ({backend}, exact)",
            load=lambda device_type: load_focalkern(device_type, backend, backward, tau),
            held_bytes=lambda tokens, vocab: 12 * tokens * min(vocab, 4096),
        )

    return {
        "triton": focalkern("triton", "certified"),
        "triton-exact": focalkern("triton", "exact"),
        "torch": focalkern("torch", "certified"),
        "torch-exact": focalkern("torch", "exact"),
        "eager": Peer("eager PyTorch", load_eager, lambda tokens, vocab: 16 * tokens * vocab),
        "trl": Peer("TRL head", load_trl, lambda tokens, vocab: 36 * min(tokens, 4096) * min(vocab, 32768)),
    }
