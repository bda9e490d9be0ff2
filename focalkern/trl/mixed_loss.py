"""The loss of a `FocalPOConfig`: the focal loss, losses of `focalkern.methods`, or a weighted sum of them."""

from __future__ import annotations

import functools

import torch
from torch import nn

from focalkern import methods
from focalkern.logps.operator import LinearLogps
from focalkern.pairs.base import PairOutput
from focalkern.pairs.focalpo import FusedFocalPOLoss
from focalkern.pairs.pair_loss import FusedPairLoss, PairLoss
from focalkern.trl.config import FocalPOConfig
from focalkern.trl.loss_types import FOCALPO, LOSS_TYPES, SMOOTHED


class MixedLoss(nn.Module):
    """Σ weight·loss over the loss types of a configuration, all from one pass through the head.

    `focal` is the `FusedFocalPOLoss` among them, or None. Its step and its statistics are the state.
    """

    def __init__(self, config: FocalPOConfig) -> None:
        super().__init__()
        weights = dict(
            zip(config.loss_type, config.loss_weights or [1.0] * len(config.loss_type), strict=True)
        )
        self.focal: FusedFocalPOLoss | None = None
        self.others: FusedPairLoss | None = None
        if FOCALPO in weights:
            self.focal = config.focal_loss()
            self.focal_weight = weights.pop(FOCALPO)
        if weights:
            function = methods.weighted_sum(
                *((_pair_loss(name, config), weight) for name, weight in weights.items())
            )
            if config.f_divergence_type != "reverse_kl":
                is_alpha = config.f_divergence_type == "alpha_divergence"
                function = methods.with_f_divergence(
                    function,
                    config.f_divergence_type,
                    config.f_alpha_divergence_coef if is_alpha else None,
                )
            if config.use_weighting:
                function = methods.with_wpo_weights(function)
            self.others = FusedPairLoss(
                function,
                config.beta,
                outputs=("log_sum_sq_probs",) if config.use_weighting else (),
                ld_alpha=config.ld_alpha,
                backend=config.backend,
            )

    def reference_logps(
        self, token_logps: LinearLogps, labels: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B], [B]
        """Sums of a reference model's log-probs, weighted as those of the policy will be."""
        loss = self.others or self.focal
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
    ) -> tuple[torch.Tensor, PairOutput]:
        """The loss, and the output of the focal loss or, where there is none, that of the others."""
        outs: list[PairOutput] = []
        losses: list[torch.Tensor] = []
        if self.focal is not None:
            outs.append(self.focal.from_logps(token_logps, labels, *ref_logps, True, cu_seqlens))
            losses.append(self.focal_weight * outs[-1].loss)
        if self.others is not None:
            outs.append(self.others.from_logps(token_logps, labels, *ref_logps, True, cu_seqlens))
            losses.append(outs[-1].loss)
        return functools.reduce(torch.add, losses), outs[0]


def _pair_loss(name: str, config: FocalPOConfig) -> PairLoss:
    """The function of a loss type, with the options that it takes."""
    options = {}
    if name in SMOOTHED:
        options["label_smoothing"] = config.label_smoothing
    if name == "discopop":
        options["discopop_tau"] = config.discopop_tau
    return functools.partial(LOSS_TYPES[name], **options)
