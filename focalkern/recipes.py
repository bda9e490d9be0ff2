"""The papers' hyper-parameters per model, as named constants: `ALPHA_DPO_GEMMA2_IT_9B.loss()` is the loss.

examples/recipes has them as files for `focalkern train`; a test holds both together.

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
    dataset: str
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


def _recipe(
    method: str, start: tuple[str, str], learning_rate: float, source: str, **options: float
) -> Recipe:
    return Recipe(method, *start, learning_rate, source, tuple(options.items()))


def _simpo(start: tuple[str, str], beta: float, gamma_beta_ratio: float, learning_rate: float) -> Recipe:
    return _recipe("simpo", start, learning_rate, _SIMPO, beta=beta, margin=beta * gamma_beta_ratio)


def _alpha_dpo(
    start: tuple[str, str], beta: float, gamma_beta_ratio: float, alpha: float, learning_rate: float
) -> Recipe:
    margin = beta * gamma_beta_ratio
    return _recipe(
        "alpha_dpo", start, learning_rate, _ALPHA_DPO, beta=beta, margin=margin, alpha=beta * alpha
    )


# Model and data. FocalPO, footnotes 4 to 7; α-DPO, footnotes 1 to 3.
MISTRAL_BASE = ("HuggingFaceH4/mistral-7b-sft-beta", "trl-lib/ultrafeedback_binarized")
LLAMA3_INSTRUCT = ("meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback-armorm")
MISTRAL_INSTRUCT = ("mistralai/Mistral-7B-Instruct-v0.2", "princeton-nlp/mistral-instruct-ultrafeedback")
GEMMA2_IT = ("google/gemma-2-9b-it", "princeton-nlp/gemma2-ultrafeedback-armorm")
# SimPO's first settings, from its README and training configurations: ranked by PairRM in place of ArmoRM.
LLAMA3_INSTRUCT_V01 = (LLAMA3_INSTRUCT[0], "princeton-nlp/llama3-ultrafeedback")
ZEPHYR_BASE = ("alignment-handbook/zephyr-7b-sft-full", "HuggingFaceH4/ultrafeedback_binarized")

DPO_MISTRAL_BASE_7B = _recipe("dpo", MISTRAL_BASE, 5e-7, _FOCALPO, beta=0.01)
# FocalPO's Table 1 has the results of SimPO's DPO on these data.
DPO_LLAMA3_INSTRUCT_8B = _recipe("dpo", LLAMA3_INSTRUCT, 3e-7, _SIMPO, beta=0.01)

FOCALPO_MISTRAL_BASE_7B = _recipe("focalpo", MISTRAL_BASE, 5e-7, _FOCALPO, beta=0.01, gamma=0.05)
# FocalPO names no β for Llama-3 ("the setting of SimPO"); DynamicFocalPO has 0.1 for the same setting.
FOCALPO_LLAMA3_INSTRUCT_8B = _recipe(
    "focalpo", LLAMA3_INSTRUCT, 6e-7, f"{_FOCALPO}; beta: {_DYNAMIC}", beta=0.1, gamma=0.05
)

# With `schedule=LinearGamma` or `ExponentialGamma` in `loss()` the paper's other two.
DYNAMIC_MISTRAL_BASE_7B = _recipe(
    "dynamic", MISTRAL_BASE, 5e-7, _DYNAMIC, beta=0.01, gamma_max=0.1, gamma_min=0.01
)
DYNAMIC_LLAMA3_INSTRUCT_8B = _recipe(
    "dynamic", LLAMA3_INSTRUCT, 6e-7, _DYNAMIC, beta=0.1, gamma_max=0.1, gamma_min=0.01
)

SIMPO_MISTRAL_BASE_7B = _simpo(ZEPHYR_BASE, 2.0, 0.8, 3e-7)
SIMPO_MISTRAL_INSTRUCT_7B = _simpo(MISTRAL_INSTRUCT, 2.5, 0.1, 5e-7)
SIMPO_LLAMA3_INSTRUCT_8B = _simpo(LLAMA3_INSTRUCT_V01, 2.5, 0.55, 1e-6)
SIMPO_LLAMA3_INSTRUCT_8B_V02 = _simpo(LLAMA3_INSTRUCT, 10.0, 0.3, 1e-6)
SIMPO_GEMMA2_IT_9B = _simpo(GEMMA2_IT, 10.0, 0.5, 8e-7)

ALPHA_DPO_MISTRAL_INSTRUCT_7B = _alpha_dpo(MISTRAL_INSTRUCT, 2.5, 0.15, 0.05, 6e-7)
ALPHA_DPO_LLAMA3_INSTRUCT_8B = _alpha_dpo(LLAMA3_INSTRUCT_V01, 2.5, 0.6, 0.2, 1e-6)
ALPHA_DPO_LLAMA3_INSTRUCT_8B_V02 = _alpha_dpo(LLAMA3_INSTRUCT, 10.0, 0.4, 0.2, 1e-6)
ALPHA_DPO_GEMMA2_IT_9B = _alpha_dpo(GEMMA2_IT, 10.0, 0.4, 0.05, 8e-7)
