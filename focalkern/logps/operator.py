"""`linear_logps`: per-token log-probs of an LM head, the operator under every loss of the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from focalkern import checks
from focalkern.autocast import autocast_head, autocast_tensors
from focalkern.backends import select_backend
from focalkern.compiler import not_compiled
from focalkern.distributed import VocabShard
from focalkern.logps.certificate import BackwardRecord, Certificate, certify
from focalkern.logps.function import LogpsCall, row_values
from focalkern.logps.shards import check_shard, own_shard
from focalkern.low_rank import LowRankUpdate
from focalkern.options import HeadOptions
from focalkern.records import Head, RowValues
from focalkern.rows import Rows, kept_labels, pick_rows, sent


@dataclass(frozen=True)
class LinearLogps:
    """What `linear_logps` returns; per token, in the shape of the (shifted) labels, 0/False where ignored."""

    logps: torch.Tensor  # fp32 (fp64 for fp64 inputs), differentiable
    entropy: torch.Tensor | None = None  # −Σ_v p_v log p_v in nats, differentiable
    mean_logits: torch.Tensor | None = None  # mean over the vocabulary of the transformed logits z
    is_top1: torch.Tensor | None = None  # bool: the label is the (first) maximum of z
    log_sum_sq_probs: torch.Tensor | None = None  # log Σ_v p_v²
    dropped_mass: torch.Tensor | None = None  # fp32, NaN until the backward has run; None when exact
    kept_share: torch.Tensor | None = None  # [] fp32, NaN until then; None when exact
    dropped: BackwardRecord | None = field(default=None, repr=False)  # behind `certificate()`
    # The ranks that share a head, and so these tokens.
    vocab_group: dist.ProcessGroup | None = field(default=None, repr=False)
    # How they were made, for `from_logps`; None where that is not known, as of log-probs of your own.
    options: HeadOptions | None = field(default=None, repr=False)
    labels: torch.Tensor | None = field(default=None, repr=False)  # as `kept_labels` gives them

    def certificate(self) -> Certificate:
        """Summary of what the backward left out; as `FocalPOOutput.certificate`, it may wait for ranks."""
        return certify(self.dropped, self.dropped_mass)

    @property
    def known_labels(self) -> torch.Tensor | None:
        """`labels`, unless logps were replaced by some of another shape."""
        return self.labels if self.labels is not None and self.labels.shape == self.logps.shape else None

    def reshaped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LinearLogps:
        """The values of the tokens in another shape: `function` slices, permutes or pads by 0, for "ignored".

        The labels go with the values. The fields that the backward fills in place keep their shape.
        """
        values = {name: getattr(self, name) for name in RowValues._fields}
        labels = self.known_labels
        values["labels"] = None if labels is None else sent(labels, self.logps.device)
        changed: dict[str, Any] = {name: None if x is None else function(x) for name, x in values.items()}
        return replace(self, **changed)


@not_compiled
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
        weight: `[V, H]`, dtype of hidden: the head. Under autocast both are cast to the autocast dtype. One
            that is not contiguous is copied, and the copy kept for the backward.
        labels: `[..., T]` int64 or int32, in [0, V) or `ignore_index`; on the device of hidden, or the CPU.
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
        or in those of update, gives NaN. With the Triton backend and a whole head, a token's values have the
        same bits whatever else is in the batch (one architecture, dtype and set of options).

    Raises:
        ValueError, TypeError: naming the argument.

    On CUDA the forward waits for the device once, to learn how many tokens are completions, and not where
    labels and `cu_seqlens` are on the host; a certified backward waits once, or twice where its workspace
    does not hold dz. The ranks of a split head wait once more for one another.
    """
    options = HeadOptions(
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        backward=backward,
        tau=tau,
        backend=backend,
    )
    outputs = checks.check_outputs(outputs)
    inputs = checked_inputs(hidden, weight, labels, bias, update, vocab_shard)
    checks.check_shift(shift, inputs.labels, cu_seqlens)
    if cu_seqlens is not None:
        checks.check_packed_hidden(inputs.hidden)
        checks.check_cu_seqlens(cu_seqlens, inputs.hidden)
    chosen = select_backend(options.backend, inputs.hidden)
    rows = inputs.rows(options.ignore_index, shift, cu_seqlens)
    tokens = logps_of_rows(inputs, rows, options, outputs, chosen).reshaped(rows.spread)
    return replace(
        tokens, options=options, labels=kept_labels(inputs.labels, ignore_index, shift, cu_seqlens)
    )


@dataclass(frozen=True)
class HeadInputs:
    """What log-probs are computed from: plain tensors of this rank, as autocast leaves them, checked."""

    hidden: torch.Tensor  # [..., T, H]
    weight: torch.Tensor  # [V, H], or the rows of a shard
    labels: torch.Tensor  # [..., T], not aligned
    bias: torch.Tensor | None  # [V]
    update: LowRankUpdate | None
    given_weight: torch.Tensor  # as the caller gave it
    shard: VocabShard | None

    def rows(self, ignore_index: int, shift: bool, cu_seqlens: torch.Tensor | None) -> Rows:
        """The completion tokens; their labels are yet to be checked."""
        return pick_rows(self.labels, ignore_index, shift, cu_seqlens, self.hidden.device)


def checked_inputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    update: LowRankUpdate | None,
    vocab_shard: VocabShard | None,
) -> HeadInputs:
    """The inputs as the public functions are given them."""
    given_weight = weight
    hidden, weight, bias, update, labels, vocab_shard = own_shard(
        hidden, weight, bias, update, labels, vocab_shard
    )
    hidden, weight, bias = autocast_head(hidden, weight, bias)
    checks.check_head(hidden, weight, bias)
    update = checked_update(update, hidden, weight)
    checks.check_labels(labels, hidden)
    return HeadInputs(
        hidden=hidden,
        weight=weight,
        labels=labels,
        bias=bias,
        update=update,
        given_weight=given_weight,
        shard=vocab_shard,
    )


def checked_update(
    update: LowRankUpdate | None, hidden: torch.Tensor, weight: torch.Tensor
) -> LowRankUpdate | None:
    """The update as autocast leaves it, checked against hidden and weight, which are so already."""
    if update is None:
        return None
    if not isinstance(update, LowRankUpdate):
        raise TypeError(f"update must be a focalkern.LowRankUpdate; got {type(update).__name__}")
    update = LowRankUpdate(*autocast_tensors(hidden.device, update.hidden, update.weight))
    checks.check_update(update.hidden, update.weight, hidden, weight)
    return update


def logps_of_rows(
    inputs: HeadInputs, rows: Rows, options: HeadOptions, outputs: tuple[str, ...], backend: str
) -> LinearLogps:
    """`linear_logps` of rows whose labels are yet to be checked."""
    hidden, weight, shard, update = inputs.hidden, inputs.weight, inputs.shard, inputs.update
    vocab_size, transform = weight.shape[0], options.transform
    if shard is not None:
        vocab_size = shard.vocab_size
        of_update = () if update is None else (update.hidden, update.weight)
        takes_gradient = [x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, *of_update)]
        tau = options.threshold(hidden.dtype)
        same = (hidden.dtype, takes_gradient, options.ignore_index, transform, options.backward, tau, outputs)
        check_shard(shard, hidden, len(weight), rows, same)
    rows.check_targets(vocab_size, options.ignore_index)

    record = None
    if options.is_certified:
        group = None if shard is None else shard.process_group
        record = BackwardRecord(rows, inputs.given_weight, weight.dtype, transform, group)
    head = Head(
        hidden=rows.gather(hidden),
        weight=weight.contiguous(),
        bias=None if inputs.bias is None else inputs.bias.contiguous(),
        update_hidden=None if update is None else rows.gather(update.hidden),
        update_weight=None if update is None else update.weight.contiguous(),
    )
    call = LogpsCall(
        transform=transform,
        outputs=outputs,
        tau=options.threshold(hidden.dtype),
        record=record,
        backend=backend,
        shard=shard,
    )
    return LinearLogps(
        *row_values(head, rows.targets, call),
        dropped_mass=None if record is None else record.per_token,
        kept_share=None if record is None else record.kept_share,
        dropped=record,
        vocab_group=None if shard is None else shard.process_group,
    )
