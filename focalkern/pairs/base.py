"""What `FusedFocalPOLoss` and `FusedPairLoss` have in common: from hidden states, head and labels to the
log-probs of B chosen and B rejected sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from focalkern import checks
from focalkern.backends import select_backend
from focalkern.distributed import SumOverSlices, VocabShard, check_group, check_same_pairs, copies_within
from focalkern.logps.certificate import BackwardRecord, Certificate, certify
from focalkern.logps.operator import HeadInputs, LinearLogps, checked_inputs, logps_of_rows
from focalkern.low_rank import LowRankUpdate
from focalkern.options import HeadOptions, changed_options, listed
from focalkern.pairs.functions import SequenceSumFunction
from focalkern.rows import Rows, aligned_labels, pick_rows, tail_weights


@dataclass(frozen=True, kw_only=True)
class PairOutput:
    """What every loss of B pairs returns. fp32 (fp64 for fp64 inputs); only `loss` is differentiable.

    Per pair, [B]: `losses`, `chosen_logps` and `rejected_logps` (sums over completion tokens, in nats),
    `chosen_rewards` and `rejected_rewards` (β·score), `prob` (probability that chosen is preferred). Per
    sequence, [2B]: `lengths` in completion tokens. Per token, in the shape of the (shifted) labels:
    `dropped_mass`, 0 where ignored; it and the 0-dim `kept_share` are NaN until `loss.backward()` fills them
    in place, and None when the backward is exact. With `reduction="none"`, `loss` is `losses`, both
    differentiable.
    """

    loss: torch.Tensor
    losses: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    prob: torch.Tensor
    lengths: torch.Tensor
    dropped_mass: torch.Tensor | None
    kept_share: torch.Tensor | None
    dropped: BackwardRecord | None = field(default=None, repr=False)  # behind `certificate()`

    def certificate(self) -> Certificate:
        """Summary of what `loss.backward()` left out, with the bound on the error of any row of dhidden:
        max_t |g_t|·δ_t · max_v ‖W_v‖₂, times the largest slope of the logit transform. Waits for the device,
        and, where the head is split by vocabulary, for the other ranks: all of them must call.
        For this the output holds the weight it was given: one that would else be freed lives as long as it.

        Raises:
            RuntimeError: before `loss.backward()` has run, after the weight has been changed in place (not
                seen where it was changed through `.data`), or where ZeRO-3 or FSDP2 has sharded it again.
        """
        return certify(self.dropped, self.dropped_mass)


@dataclass(frozen=True)
class PairRows:
    """The completion tokens of B checked pairs; nothing of size has been computed yet."""

    rows: Rows  # of this rank
    lengths: torch.Tensor  # [2B] int64, over all ranks that hold slices of the sequences
    backend: str
    like: torch.Tensor  # a tensor of the batch: its device is everyone's
    sequence_group: dist.ProcessGroup | None  # ranks that each hold a slice of every sequence

    @property
    def pairs(self) -> int:
        return self.lengths.numel() // 2

    def check_completions(self) -> None:
        if self.rows.shortest == 0:
            checks.check_completions(self.lengths)

    def sequence_sums(self, values: torch.Tensor) -> torch.Tensor:  # [n] -> [2B]
        """Values of the rows, summed over each sequence; differentiable."""
        return self.over_slices(SequenceSumFunction.apply(values, self.rows.offsets, self.backend))

    def over_slices(self, sums: torch.Tensor) -> torch.Tensor:  # [2B]
        """Sums over the tokens of this rank, summed over the ranks that have the others."""
        return sums if self.sequence_group is None else SumOverSlices.apply(sums, self.sequence_group)


class PairLossBase(nn.Module):
    """A loss on B pairs, B chosen sequences and then their B rejected, over a fused LM head."""

    ignore_index: int
    temperature: float
    softcap: float | None
    logit_scale: float
    backward: str
    tau: str | float
    backend: str

    def __init__(self, reduction: str, ld_alpha: float | None = None, **options) -> None:
        """`options` are those of `HeadOptions`, which stay attributes that may be set."""
        super().__init__()
        checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
        if ld_alpha is not None:
            checks.check_number("ld_alpha", ld_alpha, low=0.0, high=1.0)
        self.reduction = reduction
        self.ld_alpha = ld_alpha
        for name, value in vars(HeadOptions(**options)).items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        return listed(changed_options(self))

    @property
    def head_options(self) -> HeadOptions:
        return HeadOptions(**{name: getattr(self, name) for name in HeadOptions.__dataclass_fields__})

    @torch.no_grad()
    def reference_logps(
        self,
        hidden: torch.Tensor,  # [2B, T, H], or packed [N, H]
        weight: torch.Tensor,  # [V, H]
        labels: torch.Tensor,  # [2B, T], or packed [N]
        bias: torch.Tensor | None = None,  # [V]
        shift: bool = False,
        cu_seqlens: torch.Tensor | None = None,  # [2B + 1]
        update: LowRankUpdate | None = None,
        vocab_shard: VocabShard | None = None,
        sequence_group: dist.ProcessGroup | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B], [B]
        """`ref_chosen_logps` and `ref_rejected_logps`, summed as this loss sums the policy's.

        Arguments as of the loss, with the hidden states and the head of the reference model.
        """
        inputs, batch = self.checked(
            hidden, weight, labels, bias, shift, cu_seqlens, update, vocab_shard, sequence_group
        )
        chosen, rejected = self.sequence_logps(batch, self.row_logps(inputs, batch)).chunk(2)
        return chosen, rejected

    def checked(
        self,
        hidden: torch.Tensor,  # [2B, T, H], or packed [N, H]
        weight: torch.Tensor,  # [V, H]
        labels: torch.Tensor,  # [2B, T], or packed [N]
        bias: torch.Tensor | None,  # [V]
        shift: bool,
        cu_seqlens: torch.Tensor | None,  # [2B + 1]
        update: LowRankUpdate | None,
        vocab_shard: VocabShard | None,
        sequence_group: dist.ProcessGroup | None,
    ) -> tuple[HeadInputs, PairRows]:
        """The inputs of a call, but for the values of the labels."""
        inputs = checked_inputs(hidden, weight, labels, bias, update, vocab_shard)
        checks.check_pair_layout("hidden", inputs.hidden, shift, cu_seqlens, features=", H")
        rows = inputs.rows(self.ignore_index, shift, cu_seqlens)
        vocab_group = None if inputs.shard is None else inputs.shard.process_group
        return inputs, self._pair_rows(rows, inputs.hidden, shift, vocab_group, sequence_group)

    def given_logps(
        self,
        token_logps: LinearLogps,
        labels: torch.Tensor,  # [2B, T], or packed [N]
        shift: bool,
        cu_seqlens: torch.Tensor | None,  # [2B + 1]
        sequence_group: dist.ProcessGroup | None = None,
    ) -> tuple[PairRows, LinearLogps]:
        """The rows of log-probs that have been computed already, as `linear_logps` returns them."""
        if not isinstance(token_logps, LinearLogps):
            raise TypeError(
                f"token_logps must be what linear_logps returns, or LinearLogps(logps) of your own;"
                f" got {type(token_logps).__name__}"
                + (": take its token_logps()" if hasattr(token_logps, "token_logps") else "")
            )
        logps = token_logps.logps
        checks.check_first_tensor("token_logps.logps", logps)
        if logps.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"token_logps.logps must be fp32, as linear_logps returns them; got {logps.dtype}: a sum of"
                " them would be off by whole nats. Where a model's outputs are cast (FSDP2's output_dtype),"
                " have them left in fp32"
            )
        checks.check_label_dtype(labels)
        checks.check_pair_layout("labels", labels, shift, cu_seqlens)
        shape = aligned_labels(labels, self.ignore_index, shift, cu_seqlens).shape
        if logps.shape != shape or labels.device not in (logps.device, torch.device("cpu")):
            raise ValueError(
                "token_logps must be of these labels (shifted alike, on their device unless they are on the"
                f" host), {list(shape)} on {labels.device}; got {list(logps.shape)} on {logps.device}"
            )
        self._check_options(token_logps.options)
        known = token_logps.known_labels
        rows = pick_rows(labels, self.ignore_index, shift, cu_seqlens, logps.device, known)
        batch = self._pair_rows(rows, logps, shift, token_logps.vocab_group, sequence_group)
        return batch, token_logps.reshaped(rows.pick)

    def _check_options(self, of_logps: HeadOptions | None) -> None:
        """Raise where an option of this loss would not take part in log-probs that were made with another."""
        if of_logps is None:
            return
        for option in fields(HeadOptions):
            own, given = getattr(self, option.name), getattr(of_logps, option.name)
            if option.name not in ("ignore_index", "backend") and own not in (option.default, given):
                raise ValueError(
                    f"{option.name} must be that of token_logps, {given!r}; got {own!r}: give it to"
                    " linear_logps, and leave the default here"
                )

    def _pair_rows(
        self,
        rows: Rows,
        like: torch.Tensor,
        shift: bool,
        vocab_group: dist.ProcessGroup | None,
        sequence_group: dist.ProcessGroup | None,
    ) -> PairRows:
        lengths = rows.lengths
        if sequence_group is None and rows.shape.numel() and not rows.targets.numel():
            checks.warn_once(
                "labels leave no completion token in a batch: its loss is a constant, without a gradient (is"
                f" all of it masked by ignore_index = {self.ignore_index}, or are the completions cut off?)"
            )
        if sequence_group is not None:
            check_group("sequence_group", sequence_group)
            if vocab_group is not None and copies_within(vocab_group, sequence_group) > 1:
                raise ValueError(
                    "sequence_group must not share ranks with the group that the head is split over: those"
                    " have the same tokens. Gathered before such a head, sequences are whole, and need none"
                )
            for name, given, why in (
                ("shift", shift, "the label of a slice's last position is in the next slice: shift first"),
                ("ld_alpha", self.ld_alpha is not None, "a slice does not know how many tokens come before"),
            ):
                if given:
                    raise ValueError(f"{name} must not be given with sequence_group: {why}")
            check_same_pairs(sequence_group, like.device, lengths.numel())
            dist.all_reduce(lengths, group=sequence_group)
        return PairRows(
            rows=rows,
            lengths=lengths,
            backend=select_backend(self.backend, like),
            like=like,
            sequence_group=sequence_group,
        )

    def row_logps(self, inputs: HeadInputs, batch: PairRows, outputs: tuple[str, ...] = ()) -> LinearLogps:
        return logps_of_rows(inputs, batch.rows, self.head_options, outputs, batch.backend)

    def sequence_logps(self, batch: PairRows, logps: LinearLogps) -> torch.Tensor:  # [2B]
        values = logps.logps
        if self.ld_alpha is not None:
            values = values * tail_weights(batch.rows, self.ld_alpha, values.dtype)
        return batch.sequence_sums(values)

    def shared_fields(
        self,
        batch: PairRows,
        row_logps: LinearLogps,
        logps: torch.Tensor,  # [2B]
        losses: torch.Tensor,
    ) -> dict[str, Any]:
        """The fields of `PairOutput` that do not depend on what the loss is."""
        loss = losses
        if self.reduction != "none":
            # A rank without pairs adds 0, and not NaN, to what others have.
            loss = losses.sum() / (1 if self.reduction == "sum" else max(losses.numel(), 1))
            losses = losses.detach()
        chosen_logps, rejected_logps = logps.detach().chunk(2)
        return {
            "loss": loss,
            "losses": losses,
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "lengths": batch.lengths,
            "dropped_mass": row_logps.dropped_mass,
            "kept_share": row_logps.kept_share,
            "dropped": row_logps.dropped,
        }
