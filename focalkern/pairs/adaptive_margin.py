"""α-DPO's adaptive margin α·M*: the implicit reference behind M, and the running statistics that make it M*.

Called by `FusedFocalPOLoss` between the sums over sequences and the loss of each pair. All of it is one value
per pair and stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from focalkern.distributed import all_gather
from focalkern.options import changed_options, listed

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
    # Of no pairs at all it is 0.
    size = torch.stack([torch.nn.functional.pad(part.detach().abs(), (0, 1)).amax() for part in parts]).sum()
    return beta * (chosen - rejected), _ROUNDING * torch.finfo(logps.dtype).eps * beta * size


class RunningMoments(nn.Module):
    """Mean and standard deviation over training: exponential averages of the batches' own.

    A batch is that of all ranks of the process group, and its standard deviation the unbiased one. One pair
    alone counts with its distance from the mean so far; the very first one has none. A batch with NaN or inf
    does not count.

    With bias correction the averages are divided by the sum of their weights, 1 − momentum^k after k batches,
    and a batch whose values differ by no more than rounding says nothing of σ: such are all before the first
    update of the policy, however many it is accumulated over. Without, the averages start from 0, as in the
    code of α-DPO's authors, and σ is too small by that factor.
    """

    mean: torch.Tensor  # [] Σ weight·value
    mean_weight: torch.Tensor  # [] Σ weight
    std: torch.Tensor  # []
    std_weight: torch.Tensor  # []

    def __init__(
        self,
        momentum: float = 0.9,
        bias_correction: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.bias_correction = bias_correction
        self.process_group = process_group
        for name in ("mean", "mean_weight", "std", "std_weight"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def extra_repr(self) -> str:
        return listed(changed_options(self))

    @torch.no_grad()
    def update(
        self,
        values: torch.Tensor,  # [B]
        rounding: torch.Tensor,  # []
        copies: int = 1,
    ) -> torch.Tensor:  # []
        """Take in one batch; waits for the other ranks, not for the device.

        `rounding` is what the values may be by rounding alone; the largest of all ranks is returned. `copies`
        is how many ranks have each value.
        """
        self._follow(values.device)
        count, mean, std, most_rounding = self._batch_moments(
            values.to(self.mean), rounding.to(self.mean), copies
        )
        known = self.mean_weight > 0
        std = torch.where(count > 1, std, (mean - self._unbiased(self.mean, self.mean_weight)).abs())
        finite = torch.isfinite(mean) & torch.isfinite(std)
        tells_std = finite & ((count > 1) | known)
        if self.bias_correction:
            tells_std &= std > most_rounding
        for average, weight, value, counts in (
            (self.mean, self.mean_weight, mean, finite),
            (self.std, self.std_weight, std, tells_std),
        ):
            step = (1.0 - self.momentum) * counts.to(average.dtype)
            average.copy_(torch.where(counts, torch.lerp(average, value, step), average))
            weight.add_(step * (1.0 - weight))
        return most_rounding

    def standardized(self, values: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:  # [B]
        """(values − μ)/σ, and 0 where σ is not above `rounding`: then the values differ by nothing else."""
        self._follow(values.device)
        mean, std = self.moments()
        unbiased_std = self._unbiased(self.std, self.std_weight)
        # Divided by inf, NaN stays NaN.
        std = torch.where(unbiased_std > rounding.to(std), std, torch.inf)
        return ((values.to(mean) - mean) / std).to(values)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:  # [], []
        """μ and σ as values are standardised with; 0 where they are not known yet."""
        if not self.bias_correction:
            return self.mean, self.std
        return self._unbiased(self.mean, self.mean_weight), self._unbiased(self.std, self.std_weight)

    def _unbiased(self, average: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return average / weight.clamp(min=torch.finfo(weight.dtype).tiny)

    def _batch_moments(
        self, values: torch.Tensor, rounding: torch.Tensor, copies: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Count, mean and unbiased standard deviation over all ranks, and the largest rounding."""
        mean = values.sum() / max(values.numel(), 1)  # of a rank without pairs 0
        squares = (values - mean).square().sum()
        own = torch.stack([mean.new_full((), values.numel()), mean, squares, rounding])
        among_ranks = dist.is_available() and dist.is_initialized()
        moments = all_gather(own, self.process_group) if among_ranks else own[None]
        counts, means, sums_of_squares, roundings = moments.unbind(1)
        mean = (counts * means).sum() / counts.sum()
        sum_of_squares = sums_of_squares.sum() + (counts * (means - mean).square()).sum()
        count, sum_of_squares = counts.sum() / copies, sum_of_squares / copies
        return count, mean, (sum_of_squares / (count - 1).clamp(min=1)).sqrt(), roundings.amax()

    def _follow(self, device: torch.device) -> None:
        """The module has nothing else that would make anyone move it to the device of the model."""
        if self.mean.device != device:
            with torch.inference_mode(False):  # buffers made there could not be updated in training
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

    def __deepcopy__(self, memo: dict) -> RunningMoments:
        copied = type(self)(self.momentum, self.bias_correction, self.process_group)  # the group is shared
        copied.to(self.mean.device).load_state_dict(self.state_dict())
        return copied.train(self.training)
