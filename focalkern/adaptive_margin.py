"""α-DPO's adaptive margin α·M*: the implicit reference behind M, and the running statistics that make it M*.

Called by `focalkern.loss` between the sums over sequences and the loss of each pair. All of it is one value
per pair and stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

# π̂_ref = U·π_θ^(α·a)·π_ref^(α·b), the implicit references of α-DPO's Table 2, as (a, b). The last has no such
# form: TDPO's δ in place of M (Eq. 18).
IMPLICIT_REFERENCES: dict[str, tuple[int, int] | None] = {
    "policy_over_reference": (1, -1),
    "policy": (1, 0),
    "reference": (0, 1),
    "inverse_reference": (0, -1),
    "sequence_kl": None,
}

# How far M may be from 0 by rounding alone, in units of eps times the log-probs that it is a difference of.
_ROUNDING = 8.0


def needs_reference(implicit_reference: str) -> bool:
    exponents = IMPLICIT_REFERENCES[implicit_reference]
    return exponents is not None and exponents[1] != 0


def implicit_margin(
    implicit_reference: str,
    beta: float,
    logps: torch.Tensor,  # [2B] of the policy, per token when length-normalised
    ref_logps: torch.Tensor | None,  # [2B] likewise
    kl: torch.Tensor | None,  # [2B] Σ_t KL(π_ref ‖ π_θ), likewise
) -> tuple[torch.Tensor, torch.Tensor]:  # [B], []
    """M = β·(log π̂_w − log π̂_l)/α, and how large it may be by rounding alone.

    "policy_over_reference" is Eq. 10, M = β·[(logps_w − ref_w) − (logps_l − ref_l)]; "sequence_kl" is Eq. 18,
    δ = β·(KL_l − KL_w).
    """
    exponents = IMPLICIT_REFERENCES[implicit_reference]
    if exponents is None:
        assert kl is not None
        log_reference, parts = -kl, [kl]
    else:
        parts = [exponents[0] * logps]
        if ref_logps is not None and exponents[1]:
            parts.append(exponents[1] * ref_logps)
        log_reference = sum(parts[1:], start=parts[0])
    chosen, rejected = log_reference.chunk(2)
    size = torch.stack([part.detach().abs().amax() for part in parts]).sum()
    return beta * (chosen - rejected), _ROUNDING * torch.finfo(logps.dtype).eps * beta * size


class RunningMoments(nn.Module):
    """Mean and standard deviation over training: exponential averages of the batches' own.

    A batch is that of all ranks of the process group. Its standard deviation is the unbiased one; one pair
    alone has none and leaves the average as it is, as does a batch with NaN or inf. With bias correction the
    averages are divided by the sum of their weights, 1 − momentum^k after k batches; without, they start from
    0, as in the code of α-DPO's authors, and σ is too small by that factor.
    """

    mean: torch.Tensor  # [] Σ weight·value
    mean_weight: torch.Tensor  # [] Σ weight
    std: torch.Tensor  # []
    std_weight: torch.Tensor  # []

    def __init__(
        self, momentum: float, bias_correction: bool, process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.bias_correction = bias_correction
        self.process_group = process_group
        for name in ("mean", "mean_weight", "std", "std_weight"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, values: torch.Tensor) -> None:  # [B]
        """Take in one batch; waits for the other ranks, not for the device."""
        self._follow(values.device)
        count, mean, std = self._batch_moments(values.to(self.mean))
        finite = torch.isfinite(mean) & torch.isfinite(std)
        for average, weight, value, counts in (
            (self.mean, self.mean_weight, mean, finite & (count > 0)),
            (self.std, self.std_weight, std, finite & (count > 1)),
        ):
            step = (1.0 - self.momentum) * counts.to(average.dtype)
            average.copy_(torch.where(counts, torch.lerp(average, value, step), average))
            weight.add_(step * (1.0 - weight))

    def standardized(self, values: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:  # [B]
        """(values − μ)/σ, and 0 where σ is not above `rounding`: then the values differ by nothing else."""
        self._follow(values.device)
        mean, std = self.mean, self.std
        if self.bias_correction:
            tiny = torch.finfo(mean.dtype).tiny
            mean, std = mean / self.mean_weight.clamp(min=tiny), std / self.std_weight.clamp(min=tiny)
        # Divided by inf, NaN stays NaN.
        std = torch.where(std > rounding.to(std), std, torch.inf)
        return ((values.to(mean) - mean) / std).to(values)

    def _batch_moments(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Count, mean and unbiased standard deviation over all ranks."""
        mean = values.mean()
        moments = torch.stack([mean.new_full((), values.numel()), mean, (values - mean).square().sum()])[None]
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size(self.process_group)
            gathered = moments.new_empty(ranks, 3)
            dist.all_gather_into_tensor(gathered, moments, group=self.process_group)
            moments = gathered
        counts, means, squares = moments.unbind(1)
        count = counts.sum()
        mean = (counts * means).sum() / count
        sum_of_squares = squares.sum() + (counts * (means - mean).square()).sum()
        return count, mean, (sum_of_squares / (count - 1).clamp(min=1)).sqrt()

    def _follow(self, device: torch.device) -> None:
        """The module has nothing else that would make anyone move it to the device of the model."""
        if self.mean.device != device:
            self.to(device)  # on "mps" it stays where it is

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RunningMoments:
        # Moved, but not rounded, by `.to(torch.bfloat16)` of a module that holds this one.
        for name, buffer in self._buffers.items():
            assert buffer is not None
            device = fn(torch.zeros((), device=buffer.device)).device
            if buffer.is_meta or device.type == "meta":
                self._buffers[name] = torch.zeros_like(buffer, device=device)
            elif device.type != "mps":  # which has no float64
                self._buffers[name] = buffer.to(device)
        return self
