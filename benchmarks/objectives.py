"""The losses that the benchmark compares: the reference's definition for all, float64 included."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from focalkern.reference import pair_losses

BETA = 0.1  # of DPO and FocalPO
# Averages over tokens differ from pair to pair by this much through fp32 rounding alone, in units of their
# size: then M* is 0, as in `focalkern.pairs.adaptive_margin`.
ROUNDING = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Objective:
    """A preference loss, by the arguments of `FusedFocalPOLoss` and by its formula."""

    name: str
    beta: float
    gamma: float = 0.0
    margin: float = 0.0
    alpha: float = 0.0
    reference_free: bool = False
    length_normalize: bool = False

    def losses(
        self,
        logps: torch.Tensor,  # [2B] sums over the tokens of a sequence, chosen first; fp32 or float64
        ref_logps: torch.Tensor,  # [2B]
        lengths: torch.Tensor,  # [2B]
    ) -> torch.Tensor:  # [B]
        ref_logps = ref_logps.to(logps.dtype)
        if self.length_normalize:
            logps, ref_logps = logps / lengths, ref_logps / lengths
        margin = self.margin
        if self.alpha:
            margin = margin + self.alpha * self._adaptive_margin(logps.detach(), ref_logps)
        refs = (0.0, 0.0) if self.reference_free else ref_logps.chunk(2)
        return pair_losses(*logps.chunk(2), *refs, beta=self.beta, gamma=self.gamma, margin=margin)

    def _adaptive_margin(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:  # [B]
        """M* of alpha-DPO, Eq. 11; 0 where the pairs differ by rounding alone, and of one pair."""
        chosen, rejected = (logps - ref_logps).chunk(2)
        margin = self.beta * (chosen - rejected)
        rounding = ROUNDING * self.beta * (logps.abs().max() + ref_logps.abs().max())
        std = margin.std() if len(margin) > 1 else torch.zeros_like(rounding)
        return torch.where(std > rounding, (margin - margin.mean()) / std, 0.0)


# The defaults of `FusedFocalPOLoss` and its presets, which are the papers'.
_DEFAULTS = (
    Objective("dpo", BETA),
    Objective("focalpo", BETA, gamma=0.05),
    Objective("alpha-dpo", 10.0, margin=4.0, alpha=0.5, reference_free=True, length_normalize=True),
    Objective("simpo", 2.0, margin=1.0, reference_free=True, length_normalize=True),
)
OBJECTIVES = {objective.name: objective for objective in _DEFAULTS}
