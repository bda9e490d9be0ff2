"""The head under a preference loss: what `FusedFocalPOLoss` and `FusedPairLoss` have in common.

From hidden states, head and labels to the log-probs of B chosen and B rejected sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from focalkern import checks
from focalkern.autograd import SequenceSumFunction
from focalkern.backends import Backend, LogitTransform, select_backend
from focalkern.certificate import Certificate, DroppedMass, certify
from focalkern.functional import LinearLogps, autocast_head, head_logps
from focalkern.layout import Sequences, aligned_labels, sequence_ranges, tail_weights


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
        max_t |g_t|·δ_t · max_v ‖W_v‖₂, times the largest slope of the logit transform. Waits for the device.
        For this the output holds the weight it was given: one that would else be freed lives as long as it.

        Raises:
            RuntimeError: before `loss.backward()` has run, or after the weight has been changed in place
                (not seen where it was changed through `.data`).
        """
        return certify(self.dropped)


@dataclass(frozen=True)
class PairBatch:
    """A checked preference batch; nothing of size has been computed yet."""

    hidden: torch.Tensor  # [2B, T, H], or packed [N, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    given_weight: torch.Tensor  # before autocast
    labels: torch.Tensor  # aligned
    sequences: Sequences
    backend: Backend

    @property
    def pairs(self) -> int:
        return self.sequences.lengths.numel() // 2

    def sums(self, values: torch.Tensor) -> torch.Tensor:  # [2B]
        """Per-token values, 0 where ignored, summed over each sequence; differentiable."""
        return SequenceSumFunction.apply(values.reshape(-1), self.sequences, self.backend)


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
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B], [B]
        """`ref_chosen_logps` and `ref_rejected_logps`, summed as this loss sums the policy's.

        Arguments as of the loss, with the hidden states and the head of the reference model.
        """
        batch = self.batch(hidden, weight, labels, bias, shift, cu_seqlens)
        chosen, rejected = self.sequence_logps(batch, self.token_logps(batch).logps).chunk(2)
        return chosen, rejected

    def batch(
        self,
        hidden: torch.Tensor,  # [2B, T, H], or packed [N, H]
        weight: torch.Tensor,  # [V, H]
        labels: torch.Tensor,  # [2B, T], or packed [N]
        bias: torch.Tensor | None,  # [V]
        shift: bool,
        cu_seqlens: torch.Tensor | None,  # [2B + 1]
    ) -> PairBatch:
        given_weight = weight
        hidden, weight, bias = autocast_head(hidden, weight, bias)
        checks.check_head(hidden, weight, bias)
        checks.check_labels(labels, hidden)
        checks.check_pair_layout(hidden, labels, shift, cu_seqlens)
        labels = aligned_labels(labels, self.ignore_index, shift, cu_seqlens)
        sequences = sequence_ranges(labels, self.ignore_index, cu_seqlens)
        backend = select_backend(self.backend, hidden)
        return PairBatch(hidden, weight, bias, given_weight, labels, sequences, backend)

    def token_logps(self, batch: PairBatch, outputs: tuple[str, ...] = ()) -> LinearLogps:
        return head_logps(
            batch.hidden,
            batch.weight,
            batch.bias,
            batch.labels,
            self.ignore_index,
            LogitTransform(self.temperature, self.softcap, self.logit_scale),
            self.backward,
            self.tau,
            batch.backend,
            outputs,
            batch.given_weight,
        )

    def sequence_logps(self, batch: PairBatch, token_logps: torch.Tensor) -> torch.Tensor:  # [2B]
        if self.ld_alpha is not None:
            labels, dtype = batch.labels, token_logps.dtype
            weights = tail_weights(labels, self.ignore_index, batch.sequences, self.ld_alpha, dtype)
            token_logps = token_logps.reshape(-1) * weights
        return batch.sums(token_logps)

    def reduced(self, losses: torch.Tensor) -> torch.Tensor:
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()
