"""γ(t) of DynamicFocalPO: what `FusedFocalPOLoss` takes as `gamma` in place of a number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from focalkern import checks


@dataclass(frozen=True)
class GammaSchedule(ABC):
    """γ(t), falling from `gamma_max` at t = 0 to `gamma_min`; the defaults are DynamicFocalPO's Table 3's.

    t counts optimizer steps, so gradient accumulation does not advance it. After `total_steps` γ stays at
    `gamma_min`. For a schedule of your own, derive from this class and define `decay`.

    Args:
        total_steps: T > 0.
        gamma_max: γ at the start, >= `gamma_min`.
        gamma_min: γ at the end, >= 0.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    total_steps: int
    gamma_max: float = 0.1
    gamma_min: float = 0.01

    def __post_init__(self) -> None:
        checks.check_integer("total_steps", self.total_steps, low=1)
        checks.check_number("gamma_min", self.gamma_min, low=0.0)
        checks.check_number("gamma_max", self.gamma_max, low=0.0)
        if self.gamma_max < self.gamma_min:
            raise ValueError(f"gamma_max must be >= gamma_min = {self.gamma_min}; got {self.gamma_max}")

    @abstractmethod
    def decay(self, progress: float) -> float:
        """(γ − γ_min)/(γ_max − γ_min) at progress = t/T in [0, 1]."""

    def __call__(self, step: int) -> float:
        checks.check_integer("step", step, low=0)
        if step > self.total_steps:
            return float(self.gamma_min)
        return self.gamma_min + (self.gamma_max - self.gamma_min) * self.decay(step / self.total_steps)


@dataclass(frozen=True)
class LinearGamma(GammaSchedule):
    """γ(t) = γ_max − (γ_max − γ_min)·t/T (DynamicFocalPO Eq. 3)."""

    def decay(self, progress: float) -> float:
        return 1.0 - progress


@dataclass(frozen=True)
class ExponentialGamma(GammaSchedule):
    """γ(t) = γ_min + (γ_max − γ_min)·e^(−rate·t/T) (DynamicFocalPO Eq. 4, where `rate` > 0 is called α).

    At t = T it is still (γ_max − γ_min)·e^(−rate) above `gamma_min`, 5 % of the way at rate 3; after T it is
    `gamma_min`.
    """

    rate: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_number("rate", self.rate, low=0.0, exclude_low=True)

    def decay(self, progress: float) -> float:
        return math.exp(-self.rate * progress)


@dataclass(frozen=True)
class CosineGamma(GammaSchedule):
    """γ(t) = γ_min + (γ_max − γ_min)·(1 + cos(π·t/T))/2 (DynamicFocalPO Eq. 5, the paper's choice)."""

    def decay(self, progress: float) -> float:
        return (1.0 + math.cos(math.pi * progress)) / 2
