"""The head under a preference loss: what `FusedFocalPOLoss` and `FusedPairLoss` have in common.

From hidden states, head and labels to the log-probs of B chosen and B rejected sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from focalkern import checks
from focalkern.autograd import SequenceSumFunction
from focalkern.backends import Backend, LogitTransform, select_backend
from focalkern.certificate import Certificate, DroppedMass, certify
from focalkern.distributed import SumOverSlices, VocabShard, check_group, check_same_pairs, copies_within
from focalkern.functional import CheckedHead, LinearLogps, checked_head, head_logps
from focalkern.layout import Sequences, aligned_labels, sequence_ranges, tail_weights
from focalkern.low_rank import LowRankUpdate


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
    dropped: DroppedMass | None = field(default=None, repr=False)  # behind `certificate()`

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
class PairTokens:
    """Where the tokens of B checked pairs are; nothing of size has been computed yet."""

    labels: torch.Tensor  # aligned
    sequences: Sequences
    backend: Backend
    like: torch.Tensor  # a tensor of the batch: its device is everyone's
    sequence_group: dist.ProcessGroup | None  # ranks that each hold a slice of every sequence

    @property
    def pairs(self) -> int:
        return self.sequences.lengths.numel() // 2

    def sums(self, values: torch.Tensor) -> torch.Tensor:  # [2B]
        """Per-token values, 0 where ignored, summed over each sequence; differentiable."""
        sums = SequenceSumFunction.apply(values.reshape(-1), self.sequences, self.backend)
        return self.over_slices(sums)

    def over_slices(self, sums: torch.Tensor) -> torch.Tensor:  # [2B]
        """Sums over the tokens of this rank, summed over the ranks that have the others."""
        return sums if self.sequence_group is None else SumOverSlices.apply(sums, self.sequence_group)


class PairHead(nn.Module):
    """A loss on B pairs, B chosen sequences and then their B rejected, over a fused LM head."""

    def __init__(
        self,
        ignore_index: int,
        reduction: str,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        backward: str,
        tau: str | float,
        backend: str,
        ld_alpha: float | None = None,
    ) -> None:
        super().__init__()
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        checks.check_head_options(ignore_index, temperature, softcap, logit_scale, backward, tau, backend)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.temperature = float(temperature)
        self.softcap = softcap
        self.logit_scale = float(logit_scale)
        self.backward = backward
        self.tau = tau
        self.backend = backend
        if ld_alpha is not None:
            checks.check_number("ld_alpha", ld_alpha, low=0.0, high=1.0)
        self.ld_alpha = ld_alpha

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
        head, tokens = self.head_inputs(
            hidden, weight, labels, bias, shift, cu_seqlens, update, vocab_shard, sequence_group
        )
        return self.sums_of_pairs(tokens, self.token_logps(head, tokens).logps)

    def head_inputs(
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
    ) -> tuple[CheckedHead, PairTokens]:
        head = checked_head(hidden, weight, labels, bias, update, vocab_shard)
        checks.check_pair_layout("hidden", head.hidden, shift, cu_seqlens, features=", H")
        vocab_group = None if head.vocab_shard is None else head.vocab_shard.process_group
        return head, self._tokens(head.labels, shift, cu_seqlens, head.hidden, vocab_group, sequence_group)

    def given_logps(
        self,
        token_logps: LinearLogps,
        labels: torch.Tensor,  # [2B, T], or packed [N]
        shift: bool,
        cu_seqlens: torch.Tensor | None,  # [2B + 1]
        sequence_group: dist.ProcessGroup | None = None,
    ) -> PairTokens:
        """The tokens of log-probs that have been computed already, as `linear_logps` returns them."""
        if not isinstance(token_logps, LinearLogps):
            raise TypeError(
                f"token_logps must be what linear_logps returns, or LinearLogps(logps) of your own;"
                f" got {type(token_logps).__name__}"
                + (": take its token_logps()" if hasattr(token_logps, "token_logps") else "")
            )
        logps = token_logps.logps
        if logps.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"token_logps.logps must be fp32, as linear_logps returns them; got {logps.dtype}: a sum of"
                " them would be off by whole nats. Where a model's outputs are cast (FSDP2's output_dtype),"
                " have them left in fp32"
            )
        checks.check_label_dtype(labels)
        checks.check_pair_layout("labels", labels, shift, cu_seqlens)
        tokens = self._tokens(labels, shift, cu_seqlens, logps, token_logps.vocab_group, sequence_group)
        if logps.shape != tokens.labels.shape or logps.device != labels.device:
            raise ValueError(
                "token_logps must be of these labels (shifted alike, on their device),"
                f" {list(tokens.labels.shape)} on {labels.device};"
                f" got {list(logps.shape)} on {logps.device}"
            )
        return tokens

    def _tokens(
        self,
        labels: torch.Tensor,
        shift: bool,
        cu_seqlens: torch.Tensor | None,
        like: torch.Tensor,
        vocab_group: dist.ProcessGroup | None,
        sequence_group: dist.ProcessGroup | None,
    ) -> PairTokens:
        labels = aligned_labels(labels, self.ignore_index, shift, cu_seqlens)
        sequences = sequence_ranges(labels, self.ignore_index, cu_seqlens)
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
            check_same_pairs(sequence_group, labels, sequences.lengths.numel())
            dist.all_reduce(sequences.lengths, group=sequence_group)
        return PairTokens(labels, sequences, select_backend(self.backend, like), like, sequence_group)

    def token_logps(
        self, head: CheckedHead, tokens: PairTokens, outputs: tuple[str, ...] = ()
    ) -> LinearLogps:
        return head_logps(
            head,
            tokens.labels,
            self.ignore_index,
            LogitTransform(self.temperature, self.softcap, self.logit_scale),
            self.backward,
            self.tau,
            tokens.backend,
            outputs,
        )

    def sequence_logps(self, tokens: PairTokens, token_logps: torch.Tensor) -> torch.Tensor:  # [2B]
        if self.ld_alpha is not None:
            labels, dtype = tokens.labels, token_logps.dtype
            weights = tail_weights(labels, self.ignore_index, tokens.sequences, self.ld_alpha, dtype)
            token_logps = token_logps.reshape(-1) * weights
        return tokens.sums(token_logps)

    def sums_of_pairs(
        self, tokens: PairTokens, token_logps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B], [B]
        chosen, rejected = self.sequence_logps(tokens, token_logps).chunk(2)
        return chosen, rejected

    def reduced(self, losses: torch.Tensor) -> torch.Tensor:
        if self.reduction == "none":
            return losses
        # A rank without pairs adds 0, and not NaN, to what others have.
        return losses.sum() if self.reduction == "sum" else losses.sum() / max(losses.numel(), 1)
