"""The options that every public function of a head shares, checked where they are made."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

from focalkern import checks
from focalkern.records import LogitTransform

BACKWARDS = ("certified", "exact")
BACKENDS = ("auto", "triton", "torch")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Described in `linear_logps`.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    backward: str = "certified"
    tau: str | float = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        checks.check_integer("ignore_index", self.ignore_index)
        checks.check_number("temperature", self.temperature, low=0.0, exclude_low=True)
        if self.softcap is not None:
            checks.check_number("softcap", self.softcap, low=0.0, exclude_low=True)
        checks.check_number("logit_scale", self.logit_scale)
        checks.check_choice("backward", self.backward, BACKWARDS)
        if not isinstance(self.tau, str):
            checks.check_number("tau", self.tau, low=0.0)
        elif self.tau != "auto":
            raise ValueError(f"tau must be 'auto' or a number >= 0; got {self.tau!r}")
        checks.check_choice("backend", self.backend, BACKENDS)

    @property
    def transform(self) -> LogitTransform:
        softcap = None if self.softcap is None else float(self.softcap)
        return LogitTransform(float(self.temperature), softcap, float(self.logit_scale))

    @property
    def is_certified(self) -> bool:
        return self.backward == "certified"

    def threshold(self, dtype: torch.dtype) -> float:
        """τ of the certified backward for hidden of this dtype; 0 is an exact backward."""
        if not self.is_certified or dtype == torch.float64:
            return 0.0
        return automatic_tau(dtype) if isinstance(self.tau, str) else float(self.tau)


def changed_options(module: object) -> dict[str, object]:
    """The constructor arguments that a module keeps under their names and that differ from their defaults."""
    defaults = {name: p.default for name, p in inspect.signature(type(module)).parameters.items()}
    values = {name: getattr(module, name) for name in defaults if hasattr(module, name)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def listed(options: dict[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def automatic_tau(dtype: torch.dtype) -> float:
    """`tau="auto"`: 2^-13 for bf16, 2^-16 for fp16, 2^-29 for fp32."""
    return torch.finfo(dtype).eps / 64
