"""What a list of loss types stands for: the focal loss, losses of `focalkern.methods`, a weighted sum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from focalkern import methods
from focalkern.functional import LinearLogps
from focalkern.loss import FusedFocalPOLoss
from focalkern.pair_head import PairOutput
from focalkern.pair_loss import FusedPairLoss, PairLoss

if TYPE_CHECKING:
    from focalkern.trl.config import FocalPOConfig

FOCALPO = "focalpo"


def _plain(function: PairLoss) -> Callable[[FocalPOConfig], PairLoss]:
    return lambda config: function


def _smoothed(function: PairLoss) -> Callable[[FocalPOConfig], PairLoss]:
    return lambda config: functools.partial(function, label_smoothing=config.label_smoothing)


# TRL's loss types, each as TRL computes it: "sigmoid" has no label smoothing there.
LOSS_TYPES: dict[str, Callable[[FocalPOConfig], PairLoss]] = {
    "sigmoid": _plain(methods.dpo),
    "hinge": _plain(methods.hinge),
    "ipo": _plain(methods.ipo),
    "exo_pair": _smoothed(methods.exo_pair),
    "nca_pair": _plain(methods.nca_pair),
    "robust": _smoothed(methods.robust),
    "bco_pair": _plain(methods.bco_pair),
    "sppo_hard": _plain(methods.sppo_hard),
    "aot": _smoothed(methods.aot),
    "aot_unpaired": _smoothed(methods.aot_unpaired),
    "apo_zero": _plain(methods.apo_zero),
    "apo_down": _plain(methods.apo_down),
    "discopop": lambda config: functools.partial(methods.discopop, discopop_tau=config.discopop_tau),
    "sft": _plain(methods.sft),
    "sigmoid_norm": _plain(methods.sigmoid_norm),
}


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
                *((LOSS_TYPES[name](config), weight) for name, weight in weights.items())
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
        head = self.others or self.focal
        assert head is not None
        tokens = head.given_logps(token_logps, labels, True, cu_seqlens)
        return head.sums_of_pairs(tokens, token_logps.logps)

    def forward(
        self,
        token_logps: LinearLogps,
        labels: torch.Tensor,  # [2B, T], or packed [N]: input ids, prompt and padding = -100
        ref_logps: tuple[torch.Tensor | None, torch.Tensor | None],  # [B] each
        cu_seqlens: torch.Tensor | None,  # [2B + 1]
    ) -> tuple[torch.Tensor, PairOutput]:
        """The loss, and the output of the focal loss or, where there is none, that of the others."""
        options = {"shift": True, "cu_seqlens": cu_seqlens}
        outs: list[PairOutput] = []
        losses: list[torch.Tensor] = []
        if self.focal is not None:
            outs.append(self.focal.from_logps(token_logps, labels, *ref_logps, **options))
            losses.append(self.focal_weight * outs[-1].loss)
        if self.others is not None:
            outs.append(self.others.from_logps(token_logps, labels, *ref_logps, **options))
            losses.append(outs[-1].loss)
        return functools.reduce(torch.add, losses), outs[0]
