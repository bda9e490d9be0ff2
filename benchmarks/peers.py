"""The peers of the benchmark: each computes the loss of a `Batch` its own way.

A peer's loader is called once for each comparison: it imports the peer's package and returns the loss
function. Both raise `Unavailable` with the reason where the peer cannot run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.inputs import Batch, LogitTransform, transformed
from benchmarks.objectives import Objective
from focalkern import FusedFocalPOLoss

LCE_ROWS = 2048  # tokens per chunk of torch's linear_cross_entropy, in the faster of its two settings
QUACK_ROWS = 4096  # QuACK's default chunk


@dataclass(frozen=True)
class PeerLoss:
    """What a peer computes from a batch."""

    loss: torch.Tensor
    # Of the (token, vocabulary block) pairs, filled in by the backward; None of a peer that drops none.
    kept_share: torch.Tensor | None = None


LossFn = Callable[[Batch], PeerLoss]


class Unavailable(Exception):
    """The peer cannot run here, or not on this batch; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One way to compute the loss: its name in the table, and how to get it."""

    name: str
    load: Callable[[str], LossFn]  # takes the device type
    compiled: bool = False  # by torch.compile, whose own memory at the first call is not the peer's


def gradients_of(loss: LossFn, batch: Batch) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss(batch).loss, batch.differentiated()))


def loss_of_tokens(batch: Batch, logps: torch.Tensor) -> PeerLoss:  # [N]
    """The objective in plain PyTorch, for a peer that gives the log-prob of each token."""
    return PeerLoss(batch.losses(batch.sequences.sums(logps)).mean())


def load_eager(device_type: str) -> LossFn:
    """TRL's way before its fused head: logits, upcast to fp32, gather minus logsumexp."""

    def loss(batch: Batch) -> PeerLoss:
        logits = transformed(F.linear(batch.hidden, batch.weight, batch.bias).float(), batch.transform)
        target = logits.gather(-1, batch.labels[:, None])[:, 0]
        lse = torch.cat([sequence.logsumexp(-1) for sequence in logits.split(batch.sequences.lengths)])
        return loss_of_tokens(batch, target - lse)

    return loss


def load_compiled(device_type: str) -> LossFn:
    """The log-probs of eager PyTorch through torch.compile in its default mode, for exactly the shapes of the
    batch: it fuses what follows the GEMM of the logits, and keeps them for the backward."""
    require_compiler(device_type)

    @functools.partial(torch.compile, dynamic=False)
    def token_logps(hidden, weight, bias, labels, transform):
        logits = transformed(F.linear(hidden, weight, bias).float(), transform)
        return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)

    def loss(batch: Batch) -> PeerLoss:
        logps = token_logps(batch.hidden, batch.weight, batch.bias, batch.labels, batch.transform)
        return loss_of_tokens(batch, logps)

    return loss


def require_compiler(device_type: str) -> None:
    """Raise `Unavailable` where torch.compile does not work, for want of a C++ compiler for one.

    What was compiled for other batches is forgotten: after 8 recompilations torch would run eagerly.
    """
    if problem := compiler_problem(device_type):
        raise Unavailable(f"torch.compile does not work here: {problem}")
    torch.compiler.reset()


@functools.cache
def compiler_problem(device_type: str) -> str:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(16, device=device_type))
    except Exception as error:  # what it raises depends on what is missing
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


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
        return loss_of_tokens(batch, logps)

    return loss


def load_liger(device_type: str) -> LossFn:
    """Liger's `LigerFusedLinearDPOLoss` and SimPO's: one pair at a time, gradients already in the forward.

    By default it is compiled, and a chunk is one pair. Its DPO computes the reference log-probs itself, from
    hidden states and head of the reference model: a GEMM over all logits that no other peer has to do. Here
    it is given them, in the place of these hidden states. Shorter sequences are padded.
    """
    require_compiler(device_type)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearSimPOLoss
        from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase
    except ImportError as error:
        raise Unavailable(f"liger-kernel cannot be imported: {error}") from error
    given_reference(LigerFusedLinearPreferenceBase)

    def loss(batch: Batch) -> PeerLoss:
        require_plain_logits("Liger's head", batch.transform)
        objective = batch.objective
        hidden, labels = batch.sequences.padded(batch.hidden), batch.sequences.padded(batch.labels, fill=-100)
        reference = {}
        if objective.name == "dpo":
            head = LigerFusedLinearDPOLoss(beta=objective.beta)
            reference["ref_input"] = batch.ref_logps[:, None].expand_as(labels)
        elif objective.name == "simpo":
            options = {"beta": objective.beta, "gamma": objective.margin, "compute_nll_loss": False}
            head = LigerFusedLinearSimPOLoss(**options)
        else:
            raise Unavailable(f"Liger has no {objective.name}")
        return PeerLoss(head(batch.weight, hidden, labels, bias=batch.bias, **reference)[0])

    return loss


def given_reference(base: Any) -> None:
    """Let Liger's losses take the reference log-probs, `[2B, T]` with equal columns, as `ref_input`.

    They hand each chunk's part of it to `chunk_forward`, together with the reference's head, here None.
    """
    if hasattr(base, "chunk_forward_of_hidden"):
        return
    base.chunk_forward_of_hidden = staticmethod(base.chunk_forward)

    def chunk_forward(input_chunk, weight, target_chunk, bias=None, **options):
        if weight is not None:
            return base.chunk_forward_of_hidden(input_chunk, weight, target_chunk, bias, **options)
        chosen, rejected = input_chunk[:, 0].chunk(2)
        return chosen, rejected, None, None, 0.0

    base.chunk_forward = staticmethod(chunk_forward)


def load_cce(device_type: str, impl: str) -> LossFn:
    """Apple's Cut Cross-Entropy, per token: its kernels ("cce"), or its "torch_compile" of plain PyTorch.

    The kernels with their default filter (`filter_eps="high"`): tiles whose softmax is below eps/32 are left
    out of the backward. It computes dweight also where the head is frozen.
    """
    if impl == "cce" and device_type != "cuda":
        raise Unavailable("CCE's kernels need a CUDA device")
    if impl == "torch_compile":
        require_compiler(device_type)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"cut-cross-entropy cannot be imported: {error}") from error

    def loss(batch: Batch) -> PeerLoss:
        if impl == "cce" and batch.hidden.dtype == torch.float32:
            raise Unavailable("CCE's kernels take bf16 and fp16 alone")
        if batch.bias is not None:
            raise Unavailable("CCE has no bias")
        require_plain_logits("CCE", LogitTransform(logit_scale=batch.transform.logit_scale))
        options = {"softcap": batch.transform.softcap, "reduction": "none", "impl": impl}
        return loss_of_tokens(
            batch, -linear_cross_entropy(batch.hidden, batch.weight, batch.labels, **options)
        )

    return loss


def load_torch_lce(device_type: str, rows: int | None) -> LossFn:
    """`torch.nn.functional.linear_cross_entropy` per token (PyTorch 2.13), chunked over the tokens.

    In two settings: its "auto" chunks, which on CUDA are of few rows and save memory, and chunks of `rows`.
    Either accumulates in fp32 ("auto"); the log-probs are rounded to the dtype of the inputs, which for large
    ones exceeds the bound of the loss. (With reduction="sum", gradients of every sequence would be held.)
    """
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"PyTorch {torch.__version__} has no chunked linear_cross_entropy (2.13 has)")
    options = {"reduction": "none", "options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)}

    def loss(batch: Batch) -> PeerLoss:
        require_plain_logits("linear_cross_entropy", batch.transform)
        given = (batch.hidden, batch.weight, batch.labels)
        nll = F.linear_cross_entropy(*given, linear_bias=batch.bias, **options)
        return loss_of_tokens(batch, -nll.float())

    return loss


def load_quack(device_type: str, fused: bool) -> LossFn:
    """QuACK's chunked linear cross-entropy, with the gradients fused into its GEMMs (`fused`) or in steps.

    Its loss is one sum, and the gradients are made in the forward: it is called once for each sequence, whose
    log-probs' sum the objective needs, and holds the gradients of every sequence until the backward. Default
    chunk of 4096 tokens, GEMMs tuned at the first call. Written from the source of 0.6.5; not yet run.
    """
    if device_type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("QuACK's linear cross-entropy is for Hopper GPUs")
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy, scaled_exp_lce_supported
    except Exception as error:  # its CuTe DSL raises more than ImportError where it does not fit the machine
        raise Unavailable(f"quack-kernels (>= 0.6) cannot be imported: {first_line(error)}") from error

    def loss(batch: Batch) -> PeerLoss:
        require_plain_logits("QuACK", batch.transform)
        if batch.bias is not None:
            raise Unavailable("QuACK's chunked linear cross-entropy has no bias")
        if fused and not scaled_exp_lce_supported(batch.hidden, batch.weight, QUACK_ROWS, "sum"):
            raise Unavailable("QuACK's fused pipeline takes bf16 and a vocabulary of whole tiles alone")
        lengths = batch.sequences.lengths
        if not fused and any(length % 8 for length in lengths):
            raise Unavailable("QuACK's chunks need sequences of a multiple of 8 tokens")
        sequences = zip(batch.hidden.split(lengths), batch.labels.split(lengths), strict=True)
        sums = [
            chunked_linear_cross_entropy(
                hidden, batch.weight, labels, QUACK_ROWS, reduction="sum", use_scaled_exp=fused
            )
            for hidden, labels in sequences
        ]
        return PeerLoss(batch.losses(-torch.stack(sums).float()).mean())

    return loss


def require_plain_logits(name: str, transform: LogitTransform) -> None:
    if transform.softcap is not None:
        raise Unavailable(f"{name} has no softcap")
    if not math.isclose(transform.logit_scale, 1.0):
        raise Unavailable(f"{name} has no logit scale")


def load_focalkern(device_type: str, backend: str, backward: str, tau: float | str) -> LossFn:
    """This library."""
    if backend == "triton" and device_type != "cuda":
        raise Unavailable("the triton backend needs a CUDA device")

    @functools.cache
    def configured(objective: Objective, transform: LogitTransform) -> FusedFocalPOLoss:
        options = {name: value for name, value in vars(objective).items() if name != "name"}
        # Without momentum, the running mean and deviation of alpha-DPO's margins are those of the batch.
        options |= {"ema_momentum": 0.0, "backend": backend, "backward": backward, "tau": tau}
        return FusedFocalPOLoss(**options, **transform._asdict()).to(device_type)

    def loss(batch: Batch) -> PeerLoss:
        ref_chosen, ref_rejected = batch.ref_logps.chunk(2)
        out = configured(batch.objective, batch.transform)(
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

    def load(function: Callable[..., LossFn], *options: Any) -> Callable[[str], LossFn]:
        return lambda device_type: function(device_type, *options)

    return {
        "triton": Peer("focalkern (triton)", load(load_focalkern, "triton", "certified", tau)),
        "triton-exact": Peer("focalkern (triton, exact)", load(load_focalkern, "triton", "exact", tau)),
        "torch": Peer("focalkern (torch)", load(load_focalkern, "torch", "certified", tau)),
        "torch-exact": Peer("focalkern (torch, exact)", load(load_focalkern, "torch", "exact", tau)),
        "eager": Peer("eager PyTorch", load_eager),
        "compile": Peer("compiled PyTorch", load_compiled, compiled=True),
        "trl": Peer("TRL head", load_trl),
        "liger": Peer("Liger", load_liger, compiled=True),
        "cce": Peer("CCE", load(load_cce, "cce")),
        "cce-compile": Peer("CCE (torch_compile)", load(load_cce, "torch_compile"), compiled=True),
        "torch-lce": Peer("PyTorch LCE", load(load_torch_lce, None)),
        "torch-lce-rows": Peer("PyTorch LCE, 2048 rows", load(load_torch_lce, LCE_ROWS)),
        "quack": Peer("QuACK chunked", load(load_quack, False)),
        "quack-fused": Peer("QuACK fused", load(load_quack, True)),
    }
