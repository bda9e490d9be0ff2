"""`FusedFocalPOLoss`: the preference loss from hidden states and head, for a trainer or a custom loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from focalkern import checks
from focalkern.autograd import PairLossFunction
from focalkern.backends import LogitTransform, PairObjective, select_backend
from focalkern.certificate import Certificate, DroppedMass, certify
from focalkern.functional import autocast_head, head_logps
from focalkern.layout import aligned_labels, sequence_ranges


@dataclass(frozen=True)
class FocalPOOutput:
    """What `FusedFocalPOLoss` returns. fp32 (fp64 for fp64 inputs); only `loss` is differentiable.

    Per pair, [B]: `losses`, `chosen_logps` and `rejected_logps` (sums over completion tokens, in nats),
    `chosen_rewards` and `rejected_rewards` (β·score), `prob` (p = σ(u)), `weight` (−dL/du of the pair's own
    loss). Per sequence, [2B]: `lengths` in completion tokens. Per token, in the shape of the (shifted)
    labels: `dropped_mass`, 0 where ignored; it and the 0-dim `kept_share` are NaN until `loss.backward()`
    fills them in place, and None when the backward is exact. With `reduction="none"`, `loss` is `losses`,
    both differentiable.
    """

    loss: torch.Tensor
    losses: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    prob: torch.Tensor
    weight: torch.Tensor
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


class FusedFocalPOLoss(nn.Module):
    """Focal / α-margin preference loss of (chosen, rejected) pairs, fused with the LM head.

        score  s = logps − ref_logps, divided by the number of completion tokens when `length_normalize`
        logit  u = β·(s_w − s_l) − margin,   p = σ(u)
        loss   L = −w(p)·log p;   (1−ε)·L(u) + ε·L(−u) with label smoothing ε

    | modulation  | w(p)       | source                          |
    |-------------|------------|---------------------------------|
    | `"focalpo"` | p^γ        | FocalPO Eq. 4; γ = 0 is DPO     |
    | `"inverse"` | (1−p)^(−γ) | FocalPO Eq. 3                   |
    | `"focal"`   | (1−p)^γ    | FocalPO Fig. 4; the focal loss  |

    Worth knowing: with "focalpo", dL/du changes sign where p < e^(−1/γ) (γ = 0.1: p < 4.5e-5). Below, the
    loss pushes a misranked pair further down; `out.weight < 0` counts such pairs.

    Args:
        beta: β > 0.
        gamma: γ >= 0.
        modulation: w(p), see the table.
        margin: m, outside β as in α-DPO Eq. 12 (`margin = beta·gamma_beta_ratio` of the SimPO authors' code).
        alpha: weight of α-DPO's adaptive margin; not yet available, must be 0.
        reference_free: score without reference log-probs (SimPO); those given are then not used.
        length_normalize: divide each score by the number of completion tokens (SimPO, α-DPO).
        label_smoothing: ε in [0, 0.5].
        ignore_index: label of the positions that take no part; may lie inside [0, V).
        reduction: "mean", "sum" or "none" over pairs.
        temperature, softcap, logit_scale: the logit transform, see `linear_logps`.
        backward, tau, backend: see `linear_logps`.
            The certified backward, the default, leaves out what is negligible beside the largest gradient of
            the batch; `out.certificate()` bounds the error. For training from scratch use "exact": rows of
            dweight that nothing needs come out as exact zeros.
        ema_momentum, ema_bias_correction: of α-DPO's running statistics; without effect while alpha is 0.

    Raises:
        ValueError, TypeError: naming the argument.
        NotImplementedError: alpha other than 0.
    """

    def __init__(
        self,
        beta: float = 0.1,
        gamma: float = 0.05,
        modulation: str = "focalpo",
        margin: float = 0.0,
        alpha: float = 0.0,
        reference_free: bool = False,
        length_normalize: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        backward: str = "certified",
        tau: str | float = "auto",
        ema_momentum: float = 0.9,
        ema_bias_correction: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.check_objective_options(beta, gamma, modulation, margin, label_smoothing, reduction)
        checks.check_flag("reference_free", reference_free)
        checks.check_flag("length_normalize", length_normalize)
        checks.check_number("ema_momentum", ema_momentum, low=0.0, high=1.0)
        checks.check_flag("ema_bias_correction", ema_bias_correction)
        checks.check_head_options(ignore_index, temperature, softcap, logit_scale, backward, tau, backend)
        checks.check_number("alpha", alpha, low=0.0)
        if alpha:
            raise NotImplementedError(
                f"alpha must be 0: the adaptive margin of α-DPO is not available yet; got {alpha}"
            )
        self.beta = float(beta)
        self.gamma = float(gamma)
        self.modulation = modulation
        self.margin = float(margin)
        self.alpha = float(alpha)
        self.reference_free = reference_free
        self.length_normalize = length_normalize
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.temperature = float(temperature)
        self.softcap = softcap
        self.logit_scale = float(logit_scale)
        self.backward = backward
        self.tau = tau
        self.ema_momentum = float(ema_momentum)
        self.ema_bias_correction = ema_bias_correction
        self.backend = backend

    @classmethod
    def dpo(cls, beta: float = 0.1, **options) -> FusedFocalPOLoss:
        """DPO: −log σ(β·Δ), that is γ = 0. `options` are those of the class."""
        return cls(beta=beta, **{"gamma": 0.0, **options})

    @classmethod
    def simpo(cls, beta: float = 2.0, margin: float = 1.0, **options) -> FusedFocalPOLoss:
        """SimPO: reference-free, length-normalised, with a margin; γ = 0 unless given.

        The defaults are the authors' β = 2 and gamma_beta_ratio = 0.5; `margin = beta·gamma_beta_ratio`.
        """
        fixed = {"gamma": 0.0, "reference_free": True, "length_normalize": True}
        return cls(beta=beta, margin=margin, **{**fixed, **options})

    def extra_repr(self) -> str:
        names = (
            "beta",
            "gamma",
            "modulation",
            "margin",
            "reference_free",
            "length_normalize",
            "reduction",
            "backward",
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @torch.compiler.disable
    def forward(
        self,
        hidden: torch.Tensor,  # [2B, T, H], or packed [N, H]
        weight: torch.Tensor,  # [V, H]
        labels: torch.Tensor,  # [2B, T], or packed [N]
        bias: torch.Tensor | None = None,  # [V]
        ref_chosen_logps: torch.Tensor | None = None,  # [B]
        ref_rejected_logps: torch.Tensor | None = None,  # [B]
        shift: bool = False,
        cu_seqlens: torch.Tensor | None = None,  # [2B + 1]
    ) -> FocalPOOutput:
        """Loss of B pairs: the first B sequences are chosen, the last B their rejected.

        Args:
            hidden: `[2B, T, H]`, or packed `[N, H]` with `cu_seqlens`; fp32, fp16 or bf16.
            weight: `[V, H]`, dtype of hidden: the head. Under autocast both are cast to the autocast dtype.
            labels: `[2B, T]` or `[N]`, int64 or int32: completion tokens in [0, V), `ignore_index` elsewhere.
            bias: `[V]`, dtype of weight.
            ref_chosen_logps, ref_rejected_logps: `[B]` floating point, constants: the reference model's sums
                over the same completion tokens. Needed unless `reference_free`.
            shift: labels are the input ids with the prompt masked; position t predicts label t+1.
            cu_seqlens: `[2B + 1]` int32 or int64, boundaries of the packed sequences, from 0 to N.

        Raises:
            ValueError, TypeError: naming the argument. On CUDA, a label out of range, unordered `cu_seqlens`
                or an empty completion under `length_normalize` fail the step with a device-side assertion
                instead: with the Triton backend only a certified backward waits for the device, once.
        """
        given_weight = weight
        hidden, weight, bias = autocast_head(hidden, weight, bias)
        checks.check_head(hidden, weight, bias)
        checks.check_labels(labels, hidden)
        checks.check_pair_layout(hidden, labels, shift, cu_seqlens)
        pairs = (hidden.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1) // 2
        required = not self.reference_free
        checks.check_ref_logps("ref_chosen_logps", ref_chosen_logps, pairs, required, hidden)
        checks.check_ref_logps("ref_rejected_logps", ref_rejected_logps, pairs, required, hidden)

        labels = aligned_labels(labels, self.ignore_index, shift, cu_seqlens)
        sequences = sequence_ranges(labels, self.ignore_index, cu_seqlens)
        if self.length_normalize:
            checks.check_completions(sequences.lengths)
        backend = select_backend(self.backend, hidden)
        head = head_logps(
            hidden,
            weight,
            bias,
            labels,
            self.ignore_index,
            LogitTransform(self.temperature, self.softcap, self.logit_scale),
            self.backward,
            self.tau,
            backend,
            (),
            given_weight,
        )

        ref_logps = None
        if not self.reference_free and ref_chosen_logps is not None and ref_rejected_logps is not None:
            ref_logps = torch.cat([ref_chosen_logps, ref_rejected_logps]).to(head.logps.dtype)
        losses, prob, slope, logps, rewards = PairLossFunction.apply(
            head.logps.reshape(-1),
            ref_logps,
            sequences,
            self._objective(),
            backend,
        )
        loss = losses if self.reduction == "none" else getattr(losses, self.reduction)()
        chosen_logps, rejected_logps = logps.chunk(2)
        chosen_rewards, rejected_rewards = rewards.chunk(2)
        return FocalPOOutput(
            loss=loss,
            losses=losses if self.reduction == "none" else losses.detach(),
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            prob=prob,
            weight=-slope,
            lengths=sequences.lengths,
            dropped_mass=head.dropped_mass,
            kept_share=head.kept_share,
            dropped=head.dropped,
        )

    def _objective(self) -> PairObjective:
        return PairObjective(
            self.beta, self.gamma, self.modulation, self.margin, self.length_normalize, self.label_smoothing
        )
