"""`linear_logps`: per-token log-probs of an LM head, the operator under every loss of the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from focalkern import checks
from focalkern.autograd import LinearLogpsFunction
from focalkern.backends import Backend, LogitTransform, select_backend
from focalkern.certificate import Certificate, DroppedMass, certify
from focalkern.distributed import VocabShard, check_shard, own_shard
from focalkern.layout import aligned_labels, pick_rows
from focalkern.low_rank import LowRankUpdate
from focalkern.selection import automatic_tau


@dataclass(frozen=True)
class LinearLogps:
    """What `linear_logps` returns; per token, in the shape of the (shifted) labels, 0/False where ignored."""

    logps: torch.Tensor  # fp32 (fp64 for fp64 inputs), differentiable
    entropy: torch.Tensor | None = None  # −Σ_v p_v log p_v in nats, differentiable
    mean_logits: torch.Tensor | None = None  # mean over the vocabulary of the transformed logits z
    is_top1: torch.Tensor | None = None  # bool: the label is the (first) maximum of z
    log_sum_sq_probs: torch.Tensor | None = None  # log Σ_v p_v²
    dropped_mass: torch.Tensor | None = None  # fp32, NaN until the backward has run; None when exact
    kept_share: torch.Tensor | None = None  # [] fp32, likewise
    dropped: DroppedMass | None = field(default=None, repr=False)  # behind `certificate()`
    # The ranks that share a head, and so these tokens.
    vocab_group: dist.ProcessGroup | None = field(default=None, repr=False)

    def certificate(self) -> Certificate:
        """Summary of what the backward left out, as `FocalPOOutput`'s, which see: it may wait for ranks."""
        return certify(self.dropped, self.dropped_mass)


@torch.compiler.disable
def linear_logps(
    hidden: torch.Tensor,  # [..., T, H]
    weight: torch.Tensor,  # [V, H]
    labels: torch.Tensor,  # [..., T]
    *,
    bias: torch.Tensor | None = None,  # [V]
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backward: str = "certified",
    tau: str | float = "auto",
    backend: str = "auto",
    outputs: Sequence[str] = (),
    update: LowRankUpdate | None = None,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    vocab_shard: VocabShard | None = None,
) -> LinearLogps:
    """Per-token log-probs of `labels` under an LM head, without holding the `[tokens, vocab]` logits.

        z = logit_scale·(hidden @ weightᵀ + bias);  z = softcap·tanh(z/softcap);  z = z/temperature
        logps_t = z[t, y_t] − logsumexp_v z[t, v]

    With `update`, hidden @ weightᵀ + update.hidden @ update.weightᵀ stands for hidden @ weightᵀ; no merged
    copy of weight is made, and a frozen weight costs no gradient of its size.

    Args:
        hidden: `[..., T, H]` fp32, fp16 or bf16 (fp64 with the torch backend): the last hidden states.
        weight: `[V, H]`, dtype of hidden: the head. Under autocast both are cast to the autocast dtype.
        labels: `[..., T]` int64 or int32, in [0, V) or `ignore_index`.
        bias: `[V]`, dtype of weight.
        shift: labels are the input ids (prompt masked), position t predicts label t+1, outputs are `[..., T −
            1]`. One dimension is one sequence, unless `cu_seqlens` says otherwise.
        backward: "certified" leaves out the blocks of 128 vocabulary entries whose |g_t|·P[t, block] is at
            most tau·min(max|g|, 2·mean|g|), except the label's own (g_t = dloss/dlogps_t, P the block's
            probability), and `dropped_mass` tells how much that was. "exact" never leaves anything out.
        tau: threshold of the certified backward, >= 0. "auto" is eps/64 of the dtype: 2^-13 for bf16, 2^-16
            for fp16, 2^-29 for fp32. With 0, in fp64, through the entropy, and where little could be left
            out, the backward is the exact one.
        backend: "triton", "torch", or "auto": triton on CUDA where it is installed, else torch.
        outputs: any of "entropy", "mean_logits", "is_top1", "log_sum_sq_probs".
        update: a low-rank update of the head, e.g. `LowRankUpdate.lora(hidden, a, b)`; both its tensors have
            the dtype of hidden, or are cast to the autocast dtype. The bound of `certificate()` is on the
            error of dhidden as it comes through weight; that of d(update.hidden) has the same form with
            max_v ‖update.weight_v‖₂.
        cu_seqlens: `[S + 1]` int32 or int64, boundaries of packed sequences, for hidden `[N, H]` and labels
            `[N]`; outputs are `[N]`, under `shift` 0 at the last position of each sequence.
        vocab_shard: where the rows of weight stand in the vocabulary, for a head that is split over ranks,
            all of which call together; see `VocabShard`. A DTensor weight, `Shard(0)`, brings it itself.

    Returns:
        `LinearLogps`: `.logps` and the named outputs, in fp32, shape of the (shifted) labels, 0/False where
        ignored. Masked positions take no part, NaN there included; NaN or inf elsewhere in hidden or weight,
        or in those of update, gives NaN.

    Raises:
        ValueError, TypeError: naming the argument. On CUDA, a label out of range fails the step with a
            device-side assertion instead: with the Triton backend only a certified backward waits for the
            device, once.
    """
    checks.check_head_options(ignore_index, temperature, softcap, logit_scale, backward, tau, backend)
    outputs = checks.check_outputs(outputs)
    head = checked_head(hidden, weight, labels, bias, update, vocab_shard)
    checks.check_shift(shift, head.labels, cu_seqlens)
    if cu_seqlens is not None:
        checks.check_packed_hidden(head.hidden)
        checks.check_cu_seqlens(cu_seqlens, head.hidden)
    return head_logps(
        head,
        aligned_labels(head.labels, ignore_index, shift, cu_seqlens),
        ignore_index,
        LogitTransform(float(temperature), softcap, float(logit_scale)),
        backward,
        tau,
        select_backend(backend, head.hidden),
        outputs,
    )


@dataclass(frozen=True)
class CheckedHead:
    """What log-probs are computed from: plain tensors of this rank, as autocast leaves them, checked."""

    hidden: torch.Tensor  # [..., T, H]
    weight: torch.Tensor  # [V, H], or the rows of a shard
    labels: torch.Tensor  # [..., T], not aligned
    bias: torch.Tensor | None  # [V]
    update: LowRankUpdate | None
    given_weight: torch.Tensor  # as the caller gave it
    vocab_shard: VocabShard | None


def checked_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    update: LowRankUpdate | None,
    vocab_shard: VocabShard | None,
) -> CheckedHead:
    """The inputs as the public functions are given them."""
    given_weight = weight
    hidden, weight, bias, update, labels, vocab_shard = own_shard(
        hidden, weight, bias, update, labels, vocab_shard
    )
    hidden, weight, bias = autocast_head(hidden, weight, bias)
    checks.check_head(hidden, weight, bias)
    update = checked_update(update, hidden, weight)
    checks.check_labels(labels, hidden)
    return CheckedHead(hidden, weight, labels, bias, update, given_weight, vocab_shard)


def autocast_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As autocast does for a linear layer: all three in its dtype, float64 left alone."""
    checks.check_tensor("hidden", hidden)
    return autocast_tensors(hidden.device, hidden, weight, bias)


def autocast_tensors(device: torch.device, *tensors):
    """The tensors, narrow floating-point ones in the dtype that autocast has on the device, if it is on."""
    if not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)

    def cast(x):
        is_narrow = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if is_narrow else x

    return tuple(cast(x) for x in tensors)


def checked_update(
    update: LowRankUpdate | None, hidden: torch.Tensor, weight: torch.Tensor
) -> LowRankUpdate | None:
    """The update as autocast leaves it, checked against hidden and weight, which are so already."""
    if update is None:
        return None
    if not isinstance(update, LowRankUpdate):
        raise TypeError(f"update must be a focalkern.LowRankUpdate; got {type(update).__name__}")
    update = LowRankUpdate(*autocast_tensors(hidden.device, update.hidden, update.weight))
    checks.check_update(update, hidden, weight)
    return update


def head_logps(
    head: CheckedHead,
    labels: torch.Tensor,  # aligned
    ignore_index: int,
    transform: LogitTransform,
    backward: str,
    tau: str | float,
    backend: Backend,
    outputs: tuple[str, ...],
) -> LinearLogps:
    """`linear_logps` behind its checks; what remains to be looked at are the values of the labels."""
    hidden, weight, shard = head.hidden, head.weight, head.vocab_shard
    if shard is not None:
        takes_gradient = hidden.requires_grad and torch.is_grad_enabled()
        options = (hidden.dtype, takes_gradient, transform, backward, tau, outputs, ignore_index)
        check_shard(shard, hidden, weight, labels, options)
    checks.check_label_values(labels, weight.shape[0] if shard is None else shard.vocab_size, ignore_index)
    rows = pick_rows(labels, hidden.shape[-2], ignore_index, synchronize=backend.EXACT_ROW_COUNT)
    dropped, threshold = None, 0.0
    if backward == "certified":
        dropped = DroppedMass(
            rows, head.given_weight, weight.dtype, transform, None if shard is None else shard.process_group
        )
        if hidden.dtype != torch.float64:
            threshold = automatic_tau(hidden.dtype) if isinstance(tau, str) else float(tau)
    flat = hidden.reshape(-1, hidden.shape[-1])
    bias = None if head.bias is None else head.bias.contiguous()
    update_hidden = update_weight = None
    if head.update is not None:
        update_hidden = head.update.hidden.reshape(-1, head.update.hidden.shape[-1])
        update_weight = head.update.weight
    inputs = (flat, weight, bias, update_hidden, update_weight)
    logps, entropy, mean_logits, is_top1, log_sum_sq_probs = (
        x if x is None else x.view(labels.shape)
        for x in LinearLogpsFunction.apply(
            *inputs, rows, transform, outputs, threshold, dropped, backend, shard
        )
    )
    return LinearLogps(
        logps=logps,  # type: ignore[arg-type]  # the only one that is never None
        entropy=entropy,
        mean_logits=mean_logits,
        is_top1=is_top1,
        log_sum_sq_probs=log_sum_sq_probs,
        dropped_mass=None if dropped is None else dropped.per_token,
        kept_share=None if dropped is None else dropped.kept_share,
        dropped=dropped,
        vocab_group=None if shard is None else shard.process_group,
    )
