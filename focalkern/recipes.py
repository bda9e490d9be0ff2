"""The papers' hyper-parameters per model, as named constants: `ALPHA_DPO_GEMMA2_IT_9B.loss()` is the loss.

`margin` and `alpha` of the losses stand outside β, those of the SimPO and α-DPO code inside: `margin =
beta·gamma_beta_ratio`, `alpha = beta·alpha`. The tables of α-DPO's App. C.1 (3 and 4) are quoted as its
authors' training configurations have them, which state every value.
"""

from __future__ import annotations

from dataclasses import dataclass

from focalkern.pairs.focalpo import FusedFocalPOLoss

_FOCALPO = "FocalPO, section 4 and App. C"
_DYNAMIC = "DynamicFocalPO, section 5 and Table 3"
_SIMPO = "SimPO, its authors' README (FocalPO section 4 and α-DPO App. C.1 follow it)"
_ALPHA_DPO = "α-DPO, App. C.1 and its authors' training configurations"


@dataclass(frozen=True)
class Recipe:
    """How a paper trained a model; α-DPO adds: Adam, a cosine schedule with 10 % warm-up, 2048 tokens."""

    method: str  # the preset of `FusedFocalPOLoss`, or "focalpo" for the class itself
    model: str
    learning_rate: float
    source: str
    settings: tuple[tuple[str, float], ...]  # options of the loss
    batch_size: int = 128  # pairs
    epochs: int = 1

    @property
    def options(self) -> dict[str, float]:
        return dict(self.settings)

    def loss(self, **options) -> FusedFocalPOLoss:
        """The loss; `options` come on top, `total_steps` among them where γ has a schedule.

        Each for itself: another beta leaves margin and alpha as they are.
        """
        make = FusedFocalPOLoss if self.method == "focalpo" else getattr(FusedFocalPOLoss, self.method)
        return make(**{**self.options, **options})


def _recipe(method: str, model: str, learning_rate: float, source: str, **options: float) -> Recipe:
    return Recipe(method, model, learning_rate, source, tuple(options.items()))


def _simpo(model: str, beta: float, gamma_beta_ratio: float, learning_rate: float) -> Recipe:
    return _recipe("simpo", model, learning_rate, _SIMPO, beta=beta, margin=beta * gamma_beta_ratio)


def _alpha_dpo(
    model: str, beta: float, gamma_beta_ratio: float, alpha: float, learning_rate: float
) -> Recipe:
    margin = beta * gamma_beta_ratio
    return _recipe(
        "alpha_dpo", model, learning_rate, _ALPHA_DPO, beta=beta, margin=margin, alpha=beta * alpha
    )


MISTRAL_BASE, MISTRAL_INSTRUCT = "HuggingFaceH4/mistral-7b-sft-beta", "mistralai/Mistral-7B-Instruct-v0.2"
LLAMA3_INSTRUCT, GEMMA2_IT = "meta-llama/Meta-Llama-3-8B-Instruct", "google/gemma-2-9b-it"

DPO_MISTRAL_BASE_7B = _recipe("dpo", MISTRAL_BASE, 5e-7, _FOCALPO, beta=0.01)

FOCALPO_MISTRAL_BASE_7B = _recipe("focalpo", MISTRAL_BASE, 5e-7, _FOCALPO, beta=0.01, gamma=0.05)
# FocalPO names no β for Llama-3 ("the setting of SimPO"); DynamicFocalPO has 0.1 for the same setting.
FOCALPO_LLAMA3_INSTRUCT_8B = _recipe(
    "focalpo", LLAMA3_INSTRUCT, 6e-7, f"{_FOCALPO}; beta: {_DYNAMIC}", beta=0.1, gamma=0.05
)

DYNAMIC_MISTRAL_BASE_7B = _recipe(
    "dynamic", MISTRAL_BASE, 5e-7, _DYNAMIC, beta=0.01, gamma_max=0.1, gamma_min=0.01
)
DYNAMIC_LLAMA3_INSTRUCT_8B = _recipe(
    "dynamic", LLAMA3_INSTRUCT, 6e-7, _DYNAMIC, beta=0.1, gamma_max=0.1, gamma_min=0.01
)

SIMPO_MISTRAL_BASE_7B = _simpo("alignment-handbook/zephyr-7b-sft-full", 2.0, 0.8, 3e-7)
SIMPO_MISTRAL_INSTRUCT_7B = _simpo(MISTRAL_INSTRUCT, 2.5, 0.1, 5e-7)
SIMPO_LLAMA3_INSTRUCT_8B = _simpo(LLAMA3_INSTRUCT, 2.5, 0.55, 1e-6)

ALPHA_DPO_MISTRAL_INSTRUCT_7B = _alpha_dpo(MISTRAL_INSTRUCT, 2.5, 0.15, 0.05, 6e-7)
ALPHA_DPO_LLAMA3_INSTRUCT_8B = _alpha_dpo(LLAMA3_INSTRUCT, 2.5, 0.6, 0.2, 1e-6)
ALPHA_DPO_LLAMA3_INSTRUCT_8B_V02 = _alpha_dpo(LLAMA3_INSTRUCT, 10.0, 0.4, 0.2, 1e-6)
ALPHA_DPO_GEMMA2_IT_9B = _alpha_dpo(GEMMA2_IT, 10.0, 0.4, 0.05, 8e-7)
