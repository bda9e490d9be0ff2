"""The peers of the benchmark: each computes the loss of a `Batch` its own way.

A peer raises `Unavailable`, with the reason, where it cannot run or not on this batch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.inputs import Batch, transformed
from focalkern import FusedFocalPOLoss
from focalkern.records import LogitTransform

QUACK_ROWS = 4096  # QuACK's default chunk


class PeerLoss(NamedTuple):
    """What a peer computes from a batch."""

    loss: torch.Tensor
    # Of the (token, vocabulary block) pairs, filled in by the backward; None of a peer that drops none.
    kept_share: torch.Tensor | None = None


LossFn = Callable[[Batch], PeerLoss]


class Unavailable(Exception):
    """The peer cannot run here, or not on this batch."""


class Peer(NamedTuple):
    """One way to compute the loss, and its name in the table."""

    name: str
    loss: LossFn
    compiled: bool = False  # by torch.compile, whose own memory at the first call is not the peer's


def gradients_of(loss: LossFn, batch: Batch) -> list[torch.Tensor]:
    return [*batch.gradients(loss(batch).loss).values()]


def loss_of_tokens(batch: Batch, logps: torch.Tensor) -> PeerLoss:  # [N]
    """The objective in plain PyTorch, for a peer that gives the log-prob of each token."""
    return PeerLoss(batch.losses(batch.sequences.sums(logps)).mean())


def eager(batch: Batch) -> PeerLoss:
    """TRL's way before its fused head: logits, upcast to fp32, gather minus logsumexp."""
    logits = transformed(F.linear(batch.hidden, batch.weight, batch.bias).float(), batch.transform)
    target = logits.gather(-1, batch.labels[:, None])[:, 0]
    lse = torch.cat([sequence.logsumexp(-1) for sequence in logits.split(batch.sequences.lengths)])
    return loss_of_tokens(batch, target - lse)


def compiled(batch: Batch) -> PeerLoss:
    """The log-probs of eager PyTorch through torch.compile, for exactly the shapes of the batch."""
    require_compiler(batch.hidden.device.type)
    logps = compiled_logps()(batch.hidden, batch.weight, batch.bias, batch.labels, batch.transform)
    return loss_of_tokens(batch, logps)


@cache
def compiled_logps() -> Callable[..., torch.Tensor]:
    def token_logps(hidden, weight, bias, labels, transform):
        logits = transformed(F.linear(hidden, weight, bias).float(), transform)
        return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)

    return torch.compile(token_logps, dynamic=False)


def require_compiler(device_type: str) -> None:
    """Raise `Unavailable` where torch.compile does not work, for want of a C++ compiler for one."""
    if problem := compiler_problem(device_type):
        raise Unavailable(f"torch.compile does not work here: {problem}")


@cache
def compiler_problem(device_type: str) -> str:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(16, device=device_type))
    except Exception as error:  # what it raises depends on what is missing
        return first_line(error)
    return ""


@contextlib.contextmanager
def importing(package: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # QuACK raises more than ImportError where its DSL does not fit the machine
        raise Unavailable(f"{package} cannot be imported: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def trl(batch: Batch) -> PeerLoss:
    """TRL's fused head with its default vocabulary chunk, asked for the log-probs alone."""
    with importing("TRL with a fused LM head (>= 1.16)"):
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    head = (batch.hidden, batch.weight, batch.bias, batch.labels)
    temperature, softcap, scale = 1.0, batch.transform.softcap, batch.transform.logit_scale
    options = (temperature, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, scale, ("log_probs",))
    return loss_of_tokens(batch, ChunkedLogProbFunction.apply(*head, *options)[0])


def liger(batch: Batch) -> PeerLoss:
    """Liger's `LigerFusedLinearDPOLoss` and SimPO's: compiled, one pair at a time, sequences padded.

    Its DPO computes the reference log-probs from the reference model's hidden states: a GEMM that no other
    peer has to do. Here it is given the log-probs in their place.
    """
    require_compiler(batch.hidden.device.type)
    with importing("liger-kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearSimPOLoss
        from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase
    given_reference(LigerFusedLinearPreferenceBase)
    require(batch, "Liger's head", "bias")
    objective = batch.objective
    if objective.gamma or objective.alpha:
        raise Unavailable("Liger has no FocalPO and no alpha-DPO")
    hidden, labels = batch.sequences.padded(batch.hidden), batch.sequences.padded(batch.labels, fill=-100)
    if objective.reference_free:
        options = {"beta": objective.beta, "gamma": objective.margin, "compute_nll_loss": False}
        head, reference = LigerFusedLinearSimPOLoss(**options), {}
    else:
        head = LigerFusedLinearDPOLoss(beta=objective.beta)
        reference = {"ref_input": batch.ref_logps[:, None].expand_as(labels)}
    return PeerLoss(head(batch.weight, hidden, labels, bias=batch.bias, **reference)[0])


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


def cce(impl: str, batch: Batch) -> PeerLoss:
    """Apple's Cut Cross-Entropy, per token: its kernels ("cce"), or its "torch_compile" of plain PyTorch.

    The kernels filter by default: tiles whose softmax is below eps/32 are left out of the backward.
    """
    if impl == "torch_compile":
        require_compiler(batch.hidden.device.type)
    elif not batch.hidden.is_cuda:
        raise Unavailable("CCE's kernels need a CUDA device")
    elif batch.hidden.dtype == torch.float32:
        raise Unavailable("CCE's kernels take bf16 and fp16 alone")
    with importing("cut-cross-entropy"):
        from cut_cross_entropy import linear_cross_entropy
    require(batch, "CCE", "softcap")
    options = {"softcap": batch.transform.softcap, "reduction": "none", "impl": impl}
    return loss_of_tokens(batch, -linear_cross_entropy(batch.hidden, batch.weight, batch.labels, **options))


def torch_lce(rows: int | None, batch: Batch) -> PeerLoss:
    """PyTorch 2.13's `linear_cross_entropy` per token, in "auto" chunks or, faster, in chunks of `rows`.

    The log-probs are rounded to the dtype of the inputs, which for large ones exceeds the bound of the loss.
    """
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"PyTorch {torch.__version__} has no chunked linear_cross_entropy (2.13 has)")
    require(batch, "linear_cross_entropy", "bias")
    options = {"reduction": "none", "options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)}
    given = (batch.hidden, batch.weight, batch.labels)
    nll = F.linear_cross_entropy(*given, linear_bias=batch.bias, **options)
    return loss_of_tokens(batch, -nll.float())


def quack(fused: bool, batch: Batch) -> PeerLoss:
    """QuACK's chunked linear cross-entropy, with the gradients fused into its GEMMs (`fused`) or in steps.

    Its loss is one sum: it is called once for each sequence, and holds the gradients of all until the
    backward. Written from the source of 0.6.5; not yet run.
    """
    if not batch.hidden.is_cuda or torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("QuACK's linear cross-entropy is for Hopper GPUs")
    with importing("quack-kernels (>= 0.6)"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy, scaled_exp_lce_supported
    require(batch, "QuACK's chunked linear cross-entropy")
    if fused and not scaled_exp_lce_supported(batch.hidden, batch.weight, QUACK_ROWS, "sum"):
        raise Unavailable("QuACK's fused pipeline takes bf16 and a vocabulary of whole tiles alone")
    lengths = batch.sequences.lengths
    if not fused and any(length % 8 for length in lengths):
        raise Unavailable("QuACK's chunks need sequences of a multiple of 8 tokens")
    sequences = zip(batch.hidden.split(lengths), batch.labels.split(lengths), strict=True)
    nll_of = partial(chunked_linear_cross_entropy, reduction="sum", use_scaled_exp=fused)
    sums = [nll_of(hidden, batch.weight, labels, QUACK_ROWS) for hidden, labels in sequences]
    return PeerLoss(batch.losses(-torch.stack(sums).float()).mean())


def require(batch: Batch, name: str, *has: str) -> None:
    """Raise `Unavailable` where the head of the batch has what this peer has not."""
    asked = {
        "softcap": batch.transform.softcap is not None,
        "logit scale": batch.transform.logit_scale != 1,
        "bias": batch.bias is not None,
    }
    for what, is_asked in asked.items():
        if is_asked and what not in has:
            raise Unavailable(f"{name} has no {what}")


def ours(backend: str, backward: str, batch: Batch) -> PeerLoss:
    if backend == "triton" and not batch.hidden.is_cuda:
        raise Unavailable("the triton backend needs a CUDA device")
    loss_fn = configured(batch.objective, batch.transform, backend, backward)
    given = (batch.hidden, batch.weight, batch.labels, batch.bias, *batch.ref_logps.chunk(2))
    out = loss_fn(*given, cu_seqlens=batch.sequences.cu_seqlens)
    return PeerLoss(out.loss, out.kept_share)


@cache
def configured(
    objective: FusedFocalPOLoss, transform: LogitTransform, backend: str, backward: str
) -> FusedFocalPOLoss:
    loss_fn = copy.deepcopy(objective)
    for name, value in {**transform._asdict(), "backend": backend, "backward": backward}.items():
        setattr(loss_fn, name, value)
    return loss_fn


# By the name that `--only` takes.
PEERS = {
    "triton": Peer("focalkern (triton)", partial(ours, "triton", "certified")),
    "triton-exact": Peer("focalkern (triton, exact)", partial(ours, "triton", "exact")),
    "torch": Peer("focalkern (torch)", partial(ours, "torch", "certified")),
    "torch-exact": Peer("focalkern (torch, exact)", partial(ours, "torch", "exact")),
    "eager": Peer("eager PyTorch", eager),
    "compile": Peer("compiled PyTorch", compiled, compiled=True),
    "trl": Peer("TRL head", trl),
    "liger": Peer("Liger", liger, compiled=True),
    "cce": Peer("CCE", partial(cce, "cce")),
    "cce-compile": Peer("CCE (torch_compile)", partial(cce, "torch_compile"), compiled=True),
    "torch-lce": Peer("PyTorch LCE", partial(torch_lce, None)),
    "torch-lce-rows": Peer("PyTorch LCE, 2048 rows", partial(torch_lce, 2048)),
    "quack": Peer("QuACK chunked", partial(quack, False)),
    "quack-fused": Peer("QuACK fused", partial(quack, True)),
}
