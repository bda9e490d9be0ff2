"""The loss of a `FocalPOConfig`: the focal loss, losses of `focalkern.methods`, or a weighted sum of them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from focalkern import methods
from focalkern.logps.operator import LinearLogps
from focalkern.pairs.base import PairOutput
from focalkern.pairs.focalpo import FusedFocalPOLoss
from focalkern.pairs.pair_loss import FusedPairLoss, PairLoss
from focalkern.trl.config import FocalPOConfig
from focalkern.trl.loss_types import FOCALPO, LOSS_TYPES, OF_ALL_TOKENS, SMOOTHED

# What cannot change once the trainer is made, and what to do.
_FIXED = {
    "loss_type": "loss_types cannot change once the trainer is made: name every loss in FocalPOConfig, and"
    " set loss_weights, where 0 switches one off",
    "use_weighting": "use_weighting cannot change once the trainer is made, since the head computes what it"
    " needs: give it to FocalPOConfig",
}


class MixedLoss(nn.Module):
    """Σ weight·loss over the loss types of a configuration, all from one pass through the head.

    `focal` is the `FusedFocalPOLoss` among them, or None. Its step and its statistics are the state. The
    fields of the configuration are read at every call, from a copy that `set_option` changes.
    """

    def __init__(self, args: FocalPOConfig) -> None:
        super().__init__()
        self.args, self.options = args, copy.copy(args)
        self.focal: FusedFocalPOLoss | None = args.focal_loss() if FOCALPO in args.loss_type else None

    def set_option(self, name: str, value: Any) -> None:
        """Change a field of the configuration, checked as a new configuration is."""
        current = getattr(self.options, name)
        value = list(value) if isinstance(value, tuple) else value
        if type(value) is type(current) and value == current:
            return
        if name in _FIXED:
            raise ValueError(_FIXED[name])
        changed = copy.copy(self.options)
        setattr(changed, name, value)
        changed.check_losses()
        self.options = changed
        if self.focal is not None:
            self.focal.beta, self.focal.label_smoothing = changed.beta, changed.label_smoothing
            if changed.gamma_beta_ratio is not None:
                self.focal.margin = changed.beta * changed.gamma_beta_ratio

    def reference_logps(
        self, token_logps: LinearLogps, labels: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B], [B]
        """Sums of a reference model's log-probs, weighted as those of the policy will be."""
        loss = self._others() or self.focal
        assert loss is not None
        batch, logps = loss.given_logps(token_logps, labels, True, cu_seqlens)
        chosen, rejected = loss.sequence_logps(batch, logps).chunk(2)
        return chosen, rejected

    def forward(
        self,
        token_logps: LinearLogps,
        labels: torch.Tensor,  # [2B, T], or packed [N]: input ids, prompt and padding = -100
        ref_logps: tuple[torch.Tensor | None, torch.Tensor | None],  # [B] each
        cu_seqlens: torch.Tensor | None,  # [2B + 1]
        completion_lengths: torch.Tensor,  # [2B] as TRL counts: with a first token that nothing predicts
    ) -> tuple[torch.Tensor, PairOutput]:
        """The loss, and the output of the focal loss or, where there is none, that of the others."""
        outs: list[PairOutput] = []
        losses: list[torch.Tensor] = []
        if self.focal is not None:
            outs.append(self.focal.from_logps(token_logps, labels, *ref_logps, True, cu_seqlens))
            losses.append(self._weights()[FOCALPO] * outs[-1].loss)
        others = self._others()
        if others is not None:
            lengths: dict[str, Any] = {}
            if not OF_ALL_TOKENS.isdisjoint(self.options.loss_type):
                names = ("chosen_tokens", "rejected_tokens")
                lengths = dict(zip(names, completion_lengths.chunk(2), strict=True))
            outs.append(others.from_logps(token_logps, labels, *ref_logps, True, cu_seqlens, **lengths))
            losses.append(outs[-1].loss)
        return functools.reduce(torch.add, losses), outs[0]

    def _weights(self) -> dict[str, float]:
        names = self.options.loss_type
        return dict(zip(names, self.options.loss_weights or [1.0] * len(names), strict=True))

    def _others(self) -> FusedPairLoss | None:
        """All but the focal loss."""
        options = self.options
        terms = [(self._pair_loss(name), w) for name, w in self._weights().items() if name != FOCALPO]
        if not terms:
            return None
        function: PairLoss = methods.weighted_sum(*terms)
        if options.f_divergence_type != "reverse_kl":
            is_alpha = options.f_divergence_type == "alpha_divergence"
            function = methods.with_f_divergence(
                function, options.f_divergence_type, options.f_alpha_divergence_coef if is_alpha else None
            )
        if options.use_weighting:
            function = methods.with_wpo_weights(function)
        return FusedPairLoss(
            function,
            options.beta,
            outputs=("log_sum_sq_probs",) if options.use_weighting else (),
            ld_alpha=options.ld_alpha,
            backend=options.backend,
        )

    def _pair_loss(self, name: str) -> PairLoss:
        """The function of a loss type, with the options that it takes."""
        taken = {}
        if name in SMOOTHED:
            taken["label_smoothing"] = self.options.label_smoothing
        if name == "discopop":
            taken["discopop_tau"] = self.args.discopop_tau  # which TRL reads there at every step
        return functools.partial(LOSS_TYPES[name], **taken)
