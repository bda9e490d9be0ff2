"""`FusedFocalPOLoss`: the preference loss from hidden states and head, for a trainer or a custom loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from focalkern import checks
from focalkern.compiler import not_compiled
from focalkern.distributed import VocabShard, check_group, copies_within
from focalkern.logps.operator import LinearLogps
from focalkern.low_rank import LowRankUpdate
from focalkern.pairs.adaptive_margin import (
    IMPLICIT_REFERENCES,
    RunningMoments,
    implicit_margin,
    needs_reference,
)
from focalkern.pairs.base import PairLossBase, PairOutput, PairRows
from focalkern.pairs.functions import PairLossFunction
from focalkern.pairs.objective import MODULATIONS
from focalkern.records import PairConstants, PairObjective
from focalkern.schedules import CosineGamma, GammaSchedule

_BATCHES_BEFORE_WARNING = 10


@dataclass(frozen=True, kw_only=True)
class FocalPOOutput(PairOutput):
    """What `FusedFocalPOLoss` returns; the fields that every loss has are described in `PairOutput`.

    Per pair, [B]: `prob` is p = σ(u), `weight` −dL/du of the pair's own loss, `adaptive_margin` α·M* of α-DPO
    (None where α is 0). `gamma` is the γ that was used.
    """

    weight: torch.Tensor
    gamma: float
    adaptive_margin: torch.Tensor | None = None


class _PairInputs(NamedTuple):
    """What a call brings beside the policy, [B] each."""

    ref_chosen_logps: torch.Tensor | None
    ref_rejected_logps: torch.Tensor | None
    chosen_kl: torch.Tensor | None
    rejected_kl: torch.Tensor | None


class FusedFocalPOLoss(PairLossBase):
    """Focal / α-margin preference loss of (chosen, rejected) pairs, fused with the LM head.

        score   s = logps − ref_logps, divided by the number of completion tokens when `length_normalize`
        margin  m = margin + α·M*,  M* = (M − μ)/σ under stop-gradient,
                M = β·[(logps_w − ref_w) − (logps_l − ref_l)], length-normalised like s (α-DPO Eq. 10-12)
        logit   u = β·(s_w − s_l) − m,   p = σ(u)
        loss    L = −w(p)·log p;   (1−ε)·L(u) + ε·L(−u) with label smoothing ε

    | modulation  | w(p)       | source                          |
    |-------------|------------|---------------------------------|
    | `"focalpo"` | p^γ        | FocalPO Eq. 4; γ = 0 is DPO     |
    | `"inverse"` | (1−p)^(−γ) | FocalPO Eq. 3                   |
    | `"focal"`   | (1−p)^γ    | FocalPO Fig. 4; the focal loss  |

    Worth knowing: with "focalpo", dL/du changes sign where p < e^(−1/γ) (γ = 0.1: p < 4.5e-5). Below, the
    loss pushes a misranked pair further down; `out.weight < 0` counts such pairs.

    Args:
        beta: β > 0.
        gamma: γ >= 0, or γ(t): a `GammaSchedule` (DynamicFocalPO), moved by `set_step`.
        modulation: w(p), see the table.
        margin: m, outside β as in α-DPO Eq. 12 (`margin = beta·gamma_beta_ratio` of the SimPO authors' code).
        alpha: α >= 0, weight of α-DPO's adaptive margin, outside β too (`alpha = beta·alpha` of its authors'
            code). Above 0 the reference log-probs are needed also when `reference_free`.
        reference_free: score without reference log-probs (SimPO); those given are then not used in it.
        length_normalize: divide each score by the number of completion tokens (SimPO, α-DPO).
        label_smoothing: ε in [0, 0.5].
        ignore_index: label of the positions that take no part; may lie inside [0, V).
        reduction: "mean", "sum" or "none" over pairs.
        temperature, softcap, logit_scale: the logit transform, see `linear_logps`.
        backward, tau, backend: see `linear_logps`.
            The certified backward, the default, leaves out what is negligible beside the largest gradient of
            the batch; `out.certificate()` bounds the error. For training from scratch use "exact": rows of
            dweight that nothing needs come out as exact zeros.
        ema_momentum, ema_bias_correction: of the running μ and σ of M, see `RunningMoments`. Each batch in
            training mode moves them before it uses them, again if activation checkpointing runs the loss
            again; eval mode leaves them alone. M* is 0 where σ is 0 to rounding, or not known yet. Without
            bias correction they start at 0, as in the authors' code: σ is ten times too small at first.
        implicit_reference: what M is made of. Other than the default, ablations of α-DPO's Table 2 and
            App. C.4: "policy", M = β·(logps_w − logps_l); "reference" and "inverse_reference",
            M = ±β·(ref_w − ref_l); "sequence_kl", TDPO's δ = β·(KL_l − KL_w) of `chosen_kl`, `rejected_kl`.
        normalize_margin: False puts M itself for M*.
        stop_gradient: False lets the gradient through M (never through μ and σ).
        process_group: the ranks whose pairs make up one batch of the statistics; None is the default group of
            torch.distributed, where it is initialised. In training mode all of them must call together. Ranks
            that share their pairs, by `vocab_shard` or `sequence_group`, count once; where others do (whole
            heads on tensor-parallel ranks), give the data-parallel ranks.

    `state_dict()` holds the step of the schedule and the statistics.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        beta: float = 0.1,
        gamma: float | GammaSchedule = 0.05,
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
        implicit_reference: str = "policy_over_reference",
        normalize_margin: bool = True,
        stop_gradient: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            reduction,
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            backward=backward,
            tau=tau,
            backend=backend,
        )
        checks.check_number("beta", beta, low=0.0, exclude_low=True)
        checks.check_choice("modulation", modulation, MODULATIONS)
        checks.check_number("margin", margin)
        checks.check_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
        if not isinstance(gamma, GammaSchedule):
            checks.check_number("gamma", gamma, low=0.0, kind="a number or a GammaSchedule")
        checks.check_number("alpha", alpha, low=0.0)
        checks.check_number("ema_momentum", ema_momentum, low=0.0, high=1.0, exclude_high=True)
        checks.check_choice("implicit_reference", implicit_reference, tuple(IMPLICIT_REFERENCES))
        for name, flag in (
            ("reference_free", reference_free),
            ("length_normalize", length_normalize),
            ("ema_bias_correction", ema_bias_correction),
            ("normalize_margin", normalize_margin),
            ("stop_gradient", stop_gradient),
        ):
            checks.check_flag(name, flag)
        self.beta = float(beta)
        self.gamma = gamma if isinstance(gamma, GammaSchedule) else float(gamma)
        self.modulation = modulation
        self.margin = float(margin)
        self.alpha = float(alpha)
        self.reference_free = reference_free
        self.length_normalize = length_normalize
        self.label_smoothing = float(label_smoothing)
        self.implicit_reference = implicit_reference
        self.normalize_margin = normalize_margin
        self.stop_gradient = stop_gradient
        if process_group is not None:
            check_group("process_group", process_group)
        self.margin_statistics = RunningMoments(float(ema_momentum), ema_bias_correction, process_group)
        self._step = 0
        self._batches_without_a_step = 0.0

    @classmethod
    def dpo(cls, beta: float = 0.1, **options) -> FusedFocalPOLoss:
        """DPO: −log σ(β·Δ), that is γ = 0. `options` are those of the class."""
        return cls(beta=beta, **{"gamma": 0.0, **options})

    @classmethod
    def simpo(cls, beta: float = 2.0, margin: float = 1.0, **options) -> FusedFocalPOLoss:
        """SimPO: reference-free, length-normalised, with a margin; γ = 0 unless given.

        The defaults are the authors' β = 2 and gamma_beta_ratio = 0.5; `margin = beta·gamma_beta_ratio`,
        which does not follow another β by itself.
        """
        fixed = {"gamma": 0.0, "reference_free": True, "length_normalize": True}
        return cls(beta=beta, margin=margin, **{**fixed, **options})

    @classmethod
    def alpha_dpo(
        cls, beta: float = 10.0, margin: float = 4.0, alpha: float = 0.5, **options
    ) -> FusedFocalPOLoss:
        """α-DPO, Eq. 12: SimPO with the adaptive margin; γ = 0 unless given. Needs the reference log-probs.

        The defaults are the paper's β = 10 and α = 5e-2 (App. C.1) with the gamma_beta_ratio = 0.4 that its
        authors' configurations take with this β. Their margins stand inside β, these outside:
        `margin = beta·gamma_beta_ratio`, `alpha = beta·alpha`; so another β wants another margin and α.
        Values per model are in `focalkern.recipes`.
        """
        return cls.simpo(beta, margin, **{"alpha": alpha, **options})

    @classmethod
    def dynamic(
        cls,
        total_steps: int,
        beta: float = 0.1,
        gamma_max: float = 0.1,
        gamma_min: float = 0.01,
        schedule: Callable[[int, float, float], GammaSchedule] = CosineGamma,
        **options,
    ) -> FusedFocalPOLoss:
        """DynamicFocalPO: FocalPO with γ(t) from `gamma_max` to `gamma_min` in `total_steps` optimizer steps.

        The defaults are those of its Table 3 for Llama-3-Instruct-8B. `set_step` moves it at every step.
        For another rate: `schedule=functools.partial(ExponentialGamma, rate=5.0)`.
        """
        if not callable(schedule):
            raise TypeError(f"schedule must be a class such as CosineGamma; got {type(schedule).__name__}")
        return cls(beta=beta, gamma=schedule(total_steps, gamma_max, gamma_min), **options)

    def set_step(self, step: int) -> None:
        """Move γ(t) to optimizer step `step` >= 0; a `gamma` that is a number does not depend on it.

        To be called before each step, with 0 before the first: ten batches in training mode without any call
        are warned of, once.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        checks.check_integer("step", step, low=0)
        self._step = int(step)
        self._batches_without_a_step = -math.inf

    @property
    def current_gamma(self) -> float:
        """γ at the current step."""
        if not isinstance(self.gamma, GammaSchedule):
            return self.gamma
        gamma = self.gamma(self._step)
        checks.check_number(f"gamma at step {self._step}", gamma, low=0.0)
        return float(gamma)

    @not_compiled
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
        chosen_kl: torch.Tensor | None = None,  # [B]
        rejected_kl: torch.Tensor | None = None,  # [B]
        update: LowRankUpdate | None = None,
        vocab_shard: VocabShard | None = None,
        sequence_group: dist.ProcessGroup | None = None,
    ) -> FocalPOOutput:
        """Loss of B pairs: the first B sequences are chosen, the last B their rejected.

        Args:
            hidden: `[2B, T, H]`, or packed `[N, H]` with `cu_seqlens`; fp32, fp16 or bf16.
            weight: `[V, H]`, dtype of hidden: the head. Under autocast both are cast to the autocast dtype.
            labels: `[2B, T]` or `[N]`, int64 or int32: completion tokens in [0, V), `ignore_index` elsewhere.
            bias: `[V]`, dtype of weight.
            ref_chosen_logps, ref_rejected_logps: `[B]` floating point, constants: the reference model's sums
                over the same completion tokens. Needed unless neither score nor margin has a reference.
            shift: labels are the input ids with the prompt masked; position t predicts label t+1.
            cu_seqlens: `[2B + 1]` int32 or int64, boundaries of the packed sequences, from 0 to N.
            chosen_kl, rejected_kl: `[B]` Σ_t KL(π_ref ‖ π_θ) over the completion tokens in nats, as
                `linear_kl(...).sum(-1)` has it; needed, and taken, by `implicit_reference="sequence_kl"`
                alone; under `sequence_group` those of the slice.
            update: a low-rank update of the weight, such as LoRA's; see `LowRankUpdate`.
            vocab_shard: where the rows of weight stand in the vocabulary, for a head that is split over
                ranks; see `VocabShard`. A DTensor weight, `Shard(0)`, brings it itself.
            sequence_group: ranks that each hold a slice of the tokens of the same B pairs (sequence or
                context parallelism), in any order; labels stand beside the hidden states that predict them
                (no `shift`), `cu_seqlens` is of the slice. Everything per pair comes out the same on all of
                them, and the gradients as each rank's part: those of a weight that all ranks have are to be
                summed over the group, not averaged.

        Raises:
            ValueError, TypeError: naming the argument.

        On CUDA the forward waits for the device once, and not where labels (and `cu_seqlens`) are on the
        host; a certified backward waits once, or twice where its workspace does not hold dz. Ranks of a split
        head or of `sequence_group` wait once more for one another.
        """
        inputs, batch = self.checked(
            hidden, weight, labels, bias, shift, cu_seqlens, update, vocab_shard, sequence_group
        )
        given = _PairInputs(ref_chosen_logps, ref_rejected_logps, chosen_kl, rejected_kl)
        self._check(batch, given)
        return self._loss(batch, self.row_logps(inputs, batch), given)

    @not_compiled
    def from_logps(
        self,
        token_logps: LinearLogps,
        labels: torch.Tensor,  # [2B, T], or packed [N]
        ref_chosen_logps: torch.Tensor | None = None,  # [B]
        ref_rejected_logps: torch.Tensor | None = None,  # [B]
        shift: bool = False,
        cu_seqlens: torch.Tensor | None = None,  # [2B + 1]
        chosen_kl: torch.Tensor | None = None,  # [B]
        rejected_kl: torch.Tensor | None = None,  # [B]
        sequence_group: dist.ProcessGroup | None = None,
    ) -> FocalPOOutput:
        """The loss from what `linear_logps` returned for these labels; arguments as of `forward`.

        For several losses on one head, and for heads that run elsewhere, as inside a model's own forward. The
        options of the head (softcap, backward, ...) are those that `linear_logps` was given: one that is set
        here to something else is refused. `labels` may ignore tokens that `linear_logps` did not, as for
        losses with masks of their own. Log-probs of your own, `LinearLogps(logps)`, are taken as they are.
        Packed, `token_logps.logps` is `[N]`, 0 at the last position of each sequence. Labels on a GPU are
        waited for once here, too.
        """
        batch, logps = self.given_logps(token_logps, labels, shift, cu_seqlens, sequence_group)
        given = _PairInputs(ref_chosen_logps, ref_rejected_logps, chosen_kl, rejected_kl)
        self._check(batch, given)
        return self._loss(batch, logps, given)

    def _check(self, batch: PairRows, given: _PairInputs) -> None:
        if self.length_normalize:
            batch.check_completions()
        unless = None
        if self.alpha and needs_reference(self.implicit_reference):
            unless = "alpha=0 and reference_free=True"
        elif not self.reference_free:
            unless = "reference_free=True"
        needs_kl = self.alpha > 0 and self.implicit_reference == "sequence_kl"
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            checks.check_ref_logps(name, getattr(given, name), batch.pairs, unless, batch.like)
        for name in ("chosen_kl", "rejected_kl"):
            kl = getattr(given, name)
            if (kl is not None) != needs_kl:
                raise ValueError(
                    f"{name} must be given, [B] = [{batch.pairs}], with alpha > 0 and"
                    " implicit_reference='sequence_kl', and else not;"
                    f" got {None if kl is None else 'a tensor'}"
                )
            if kl is not None:
                checks.check_per_pair(name, kl, batch.pairs, batch.like)

    def _loss(self, batch: PairRows, row_logps: LinearLogps, given: _PairInputs) -> FocalPOOutput:
        logps = self.sequence_logps(batch, row_logps)
        ref_logps = _concatenated(given.ref_chosen_logps, given.ref_rejected_logps, logps.dtype)
        adaptive_margin = None
        if self.alpha:
            kl = _concatenated(given.chosen_kl, given.rejected_kl, logps.dtype)
            kl = None if kl is None else batch.over_slices(kl)
            copies = copies_within(
                self.margin_statistics.process_group, row_logps.vocab_group, batch.sequence_group
            )
            adaptive_margin = self._adaptive_margin(logps, ref_logps, kl, batch.lengths, copies)
        objective = self._objective()
        constants = PairConstants(batch.lengths, None if self.reference_free else ref_logps)
        losses, prob, slope, rewards = PairLossFunction.apply(
            logps, adaptive_margin, constants, objective, batch.backend
        )
        chosen_rewards, rejected_rewards = rewards.chunk(2)
        return FocalPOOutput(
            **self.shared_fields(batch, row_logps, logps, losses),
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            prob=prob,
            weight=-slope,
            gamma=objective.gamma,
            adaptive_margin=None if adaptive_margin is None else adaptive_margin.detach(),
        )

    def _adaptive_margin(
        self,
        logps: torch.Tensor,  # [2B]
        ref_logps: torch.Tensor | None,  # [2B]
        kl: torch.Tensor | None,  # [2B]
        lengths: torch.Tensor,  # [2B]
        copies: int,  # ranks that have these pairs
    ) -> torch.Tensor:  # [B]
        """α·M* (α-DPO Eq. 11-12); `margin_statistics` takes in the batch first."""
        if self.length_normalize:
            logps = logps / lengths
            ref_logps = None if ref_logps is None else ref_logps / lengths
            kl = None if kl is None else kl / lengths
        margin, rounding = implicit_margin(self.implicit_reference, self.beta, logps, ref_logps, kl)
        if self.stop_gradient:
            margin = margin.detach()
        if self.normalize_margin:
            if self.training:
                rounding = self.margin_statistics.update(margin.detach(), rounding, copies)
            margin = self.margin_statistics.standardized(margin, rounding)
        return self.alpha * margin

    def _objective(self) -> PairObjective:
        if self.training and isinstance(self.gamma, GammaSchedule):
            self._batches_without_a_step += 1
            if self._batches_without_a_step == _BATCHES_BEFORE_WARNING:
                checks.warn(
                    f"gamma has stayed at step {self._step} of its schedule for {_BATCHES_BEFORE_WARNING}"
                    " batches: call set_step(t) before every optimizer step t, the first of which is 0 (where"
                    " gradients are accumulated over more batches, set_step(0) says so)"
                )
        return PairObjective(
            beta=self.beta,
            gamma=self.current_gamma,
            modulation=self.modulation,
            margin=self.margin,
            length_normalize=self.length_normalize,
            label_smoothing=self.label_smoothing,
        )

    def get_extra_state(self) -> torch.Tensor:
        # Not a buffer: one on a GPU could not be read without waiting for it.
        return torch.tensor(self._step, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        checks.check_integer("step", int(state), low=0)
        self._step = int(state)


def _concatenated(
    chosen: torch.Tensor | None, rejected: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:  # [2B]
    return None if chosen is None or rejected is None else torch.cat([chosen, rejected]).to(dtype)
