"""`FocalPOConfig`: TRL's `DPOConfig` and every objective of `FusedFocalPOLoss`, checked when it is made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from focalkern import checks
from focalkern.methods import F_DIVERGENCES
from focalkern.options import BACKENDS, BACKWARDS, HeadOptions
from focalkern.pairs.adaptive_margin import IMPLICIT_REFERENCES, needs_reference
from focalkern.pairs.focalpo import FusedFocalPOLoss
from focalkern.pairs.objective import MODULATIONS
from focalkern.schedules import CosineGamma, ExponentialGamma, GammaSchedule, LinearGamma
from focalkern.trl.loss_types import FOCALPO, LOSS_TYPES, SMOOTHED

GAMMA = 0.05
SCHEDULES: dict[str, type[GammaSchedule]] = {
    "linear": LinearGamma,
    "exponential": ExponentialGamma,
    "cosine": CosineGamma,
}
_OF_LOG_RATIOS = frozenset(
    ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
)
# What people will look for under `loss_type`.
_STANDS_FOR = {
    "dpo": "gamma=0.0 (or 'sigmoid', TRL's name for it)",
    "simpo": "gamma=0.0, reference_free=True, length_normalize=True and gamma_beta_ratio",
    "alpha_dpo": "gamma=0.0, reference_free=True, length_normalize=True, gamma_beta_ratio and alpha",
    "dynamic": "gamma_schedule='cosine'",
    "focal": "modulation='focal'",
}
# The one or the other, by the version of transformers.
_SAMPLING = DPOConfig.__dataclass_fields__.keys() & {"train_sampling_strategy", "group_by_length"}
# Options that count only under a condition: where it does not hold, they are refused unless at their default.
_Condition = tuple[tuple[str, ...], str, "Callable[[FocalPOConfig], bool]"]
_COUNTS_WITH: tuple[_Condition, ...] = (
    (
        (
            "gamma",
            "gamma_schedule",
            "gamma_max",
            "gamma_min",
            "gamma_rate",
            "gamma_schedule_steps",
            "modulation",
            "margin",
            "gamma_beta_ratio",
            "alpha",
            "reference_free",
            "length_normalize",
            "ema_momentum",
            "ema_bias_correction",
            "implicit_reference",
            "normalize_margin",
            "stop_gradient",
        ),
        "loss_type 'focalpo'",
        lambda config: FOCALPO in config.loss_type,
    ),
    (
        ("ld_alpha", "use_weighting", "f_divergence_type"),
        "TRL's loss types, without 'focalpo'",
        lambda config: FOCALPO not in config.loss_type,
    ),
    (("gamma",), "gamma_schedule=None", lambda config: config.gamma_schedule is None),
    (
        ("gamma_max", "gamma_min", "gamma_schedule_steps"),
        "gamma_schedule",
        lambda config: config.gamma_schedule is not None,
    ),
    (
        ("gamma_rate",),
        "gamma_schedule='exponential'",
        lambda config: config.gamma_schedule == "exponential",
    ),
    (
        ("implicit_reference", "normalize_margin", "stop_gradient"),
        "alpha > 0",
        lambda config: config.alpha > 0,
    ),
    (
        ("ema_momentum", "ema_bias_correction"),
        "alpha > 0 and normalize_margin",
        lambda config: config.alpha > 0 and config.normalize_margin,
    ),
    (
        ("max_tokens_per_batch",),
        "padding_free=True or share_prompt=True",
        lambda config: config.padding_free or config.share_prompt,
    ),
    (
        (
            "per_device_train_batch_size",
            "auto_find_batch_size",
            "dataloader_drop_last",
            *_SAMPLING,
        ),
        "max_tokens_per_batch=None",
        lambda config: config.max_tokens_per_batch is None,
    ),
    (("tau",), "backward='certified'", lambda config: config.backward == "certified"),
    (
        ("label_smoothing",),
        "a loss_type that has it (DPO with label smoothing is 'focalpo' with gamma=0)",
        lambda config: not {FOCALPO, *SMOOTHED}.isdisjoint(config.loss_type),
    ),
    (("discopop_tau",), "loss_type 'discopop'", lambda config: "discopop" in config.loss_type),
    (
        ("f_alpha_divergence_coef",),
        "f_divergence_type='alpha_divergence'",
        lambda config: config.f_divergence_type == "alpha_divergence",
    ),
)


@dataclass
class FocalPOConfig(DPOConfig):
    """Configuration of `FocalPOTrainer`: everything of TRL's `DPOConfig`, and the fields below.

    Formulas are in `FusedFocalPOLoss` and docs/methods.md. SimPO is `FocalPOConfig(beta=2.0, gamma=0.0,
    reference_free=True, length_normalize=True, gamma_beta_ratio=0.5)`; DPO is `gamma=0.0`.

    Differences to `DPOConfig`: `loss_type` defaults to `["focalpo"]`, which may be mixed with TRL's by
    `loss_weights`; `label_smoothing` is also that of the focal loss; `padding_free=True` works, and
    `share_prompt=True` computes the prompt of a pair once.

    Raises:
        ValueError, TypeError: naming the field, when the configuration is made.
    """

    loss_type: list[str] = field(
        default_factory=lambda: [FOCALPO],
        metadata={
            "help": "Type of loss: `'focalpo'`, the focal / α-margin loss that the options below describe, "
            "or any of TRL's (`'sigmoid'`, `'hinge'`, `'ipo'`, `'exo_pair'`, `'nca_pair'`, `'robust'`, "
            "`'bco_pair'`, `'sppo_hard'`, `'aot'`, `'aot_unpaired'`, `'apo_zero'`, `'apo_down'`, "
            "`'discopop'`, `'sft'`, `'sigmoid_norm'`). Several are added with the weights `loss_weights`."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Whether to concatenate the sequences of a batch, without padding: same numbers. Saves "
            "time with FlashAttention (`attn_implementation='flash_attention_2'`), the more the more the "
            "lengths differ; sdpa and eager attention take a mask that grows with the square of the tokens."
        },
    )
    share_prompt: bool = field(
        default=False,
        metadata={
            "help": "Whether to lay each pair out as prompt, chosen, rejected, and compute the prompt once: "
            "same numbers. Takes the place of `padding_free`. On GPUs with `attn_implementation="
            "'flex_attention'`; with sdpa and eager attention pairs fill rows as long as the longest pair."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens in a training batch of each device, in place of "
            "`per_device_train_batch_size`; needs `padding_free` or `share_prompt`. A pair counts with "
            "prompt + chosen + prompt + rejected as `max_length` cuts them, or with the prompt once; padding "
            "does not count. Pairs of like length come together, each once an epoch. All weigh the same "
            "in an optimizer step, over all ranks and accumulated batches. Evaluation keeps "
            "`per_device_eval_batch_size`."
        },
    )

    # The objective
    gamma: float | None = field(
        default=None,
        metadata={
            "help": "γ >= 0 of the focal weight (SimPO's is `gamma_beta_ratio`); 0 is DPO, SimPO, α-DPO. "
            "Default 0.05, where 'focalpo' has no `gamma_schedule`."
        },
    )
    gamma_schedule: str | None = field(
        default=None,
        metadata={
            "help": "γ(t) of DynamicFocalPO, from `gamma_max` to `gamma_min` in the course of training: "
            "'linear', 'exponential' or 'cosine'. Excludes `gamma`.",
            "choices": list(SCHEDULES),
        },
    )
    gamma_max: float | None = field(
        default=None, metadata={"help": "γ at the first step of the schedule. Default 0.1."}
    )
    gamma_min: float | None = field(
        default=None, metadata={"help": "γ at the last step of the schedule. Default 0.01."}
    )
    gamma_rate: float | None = field(
        default=None, metadata={"help": "Rate of the exponential schedule (α in its paper). Default 3."}
    )
    gamma_schedule_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps that the schedule takes; γ stays at `gamma_min` afterwards. Default: "
            "the steps of the training. Give it where a run will be resumed with other `max_steps` or "
            "`num_train_epochs`."
        },
    )
    modulation: str = field(
        default="focalpo",
        metadata={
            "help": "Focal weight w(p): 'focalpo' p^γ (FocalPO Eq. 4), 'inverse' (1-p)^-γ (Eq. 3), 'focal' "
            "(1-p)^γ.",
            "choices": list(MODULATIONS),
        },
    )
    margin: float | None = field(
        default=None,
        metadata={"help": "Margin m in u = β·(s_w - s_l) - m, outside β. Default 0. See `gamma_beta_ratio`."},
    )
    gamma_beta_ratio: float | None = field(
        default=None,
        metadata={
            "help": "The margin as the authors of SimPO give it, inside β: margin = beta * "
            "gamma_beta_ratio. Excludes `margin`."
        },
    )
    alpha: float = field(
        default=0.0,
        metadata={
            "help": "Weight of α-DPO's adaptive margin, outside β (beta times the alpha of its authors' "
            "code). Above 0 a reference is needed, also with `reference_free`."
        },
    )
    reference_free: bool = field(
        default=False,
        metadata={
            "help": "Whether scores are log-probs, without those of a reference (SimPO). No reference model "
            "is then loaded or run, unless `alpha` or another loss type needs one."
        },
    )
    length_normalize: bool = field(
        default=False,
        metadata={"help": "Whether scores are divided by the number of completion tokens (SimPO, α-DPO)."},
    )
    ema_momentum: float = field(
        default=0.9,
        metadata={"help": "Momentum of the running mean and standard deviation of α-DPO, in [0, 1)."},
    )
    ema_bias_correction: bool = field(
        default=True,
        metadata={"help": "Whether these are corrected for their start at 0; not in the authors' code."},
    )
    implicit_reference: str = field(
        default="policy_over_reference",
        metadata={
            "help": "What α-DPO's margin is made of: 'policy_over_reference', 'policy', 'reference' or "
            "'inverse_reference'. ('sequence_kl' is left to `FusedFocalPOLoss`: it takes the hidden states "
            "of both models.)",
            "choices": [name for name in IMPLICIT_REFERENCES if name != "sequence_kl"],
        },
    )
    normalize_margin: bool = field(
        default=True, metadata={"help": "Whether α-DPO's margin is normalised by its running statistics."}
    )
    stop_gradient: bool = field(
        default=True, metadata={"help": "Whether no gradient goes through α-DPO's margin."}
    )

    # The fused head
    backward: str = field(
        default="certified",
        metadata={
            "help": "Backward of the LM head: 'certified' leaves out the vocabulary blocks that are "
            "negligible to a token and says how much that was; 'exact' leaves nothing out.",
            "choices": list(BACKWARDS),
        },
    )
    tau: str = field(
        default="auto",
        metadata={"help": "Threshold of the certified backward: 'auto' (by dtype), or a number >= 0."},
    )
    backend: str = field(
        default="auto",
        metadata={
            "help": "What the head runs on: 'auto', 'triton' or 'torch'.",
            "choices": list(BACKENDS),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tau, str) and self.tau != "auto":
            try:
                self.tau = float(self.tau)  # type: ignore[assignment]  # as a command line brings it
            except ValueError:
                raise ValueError(f"tau must be 'auto' or a number >= 0; got {self.tau!r}") from None
        if not self.loss_type:
            raise ValueError("loss_type must name a loss; got []")
        for name in self.loss_type:
            if name in _STANDS_FOR:
                raise ValueError(f"loss_type {name!r} is 'focalpo' with {_STANDS_FOR[name]}")
            checks.check_choice("loss_type", name, (FOCALPO, *LOSS_TYPES))
        if len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError(f"loss_type must name every loss once; got {self.loss_type}")
        HeadOptions(backward=self.backward, tau=self.tau, backend=self.backend)
        checks.check_flag("share_prompt", self.share_prompt)
        if self.max_tokens_per_batch is not None:
            self._check_token_batches()
        if FOCALPO in self.loss_type and self.gamma is None and self.gamma_schedule is None:
            self.gamma = GAMMA
        self.check_losses()
        if self.gamma_schedule is not None and (self.metric_for_best_model or "").endswith("loss"):
            warnings.warn(
                f"metric_for_best_model={self.metric_for_best_model!r} compares losses of different γ: with"
                " gamma_schedule the eval_loss moves though the model stays the same. Set"
                " metric_for_best_model='eval_rewards/accuracies'",
                stacklevel=3,
            )

    def check_losses(self) -> None:
        """Raise ValueError or TypeError where the options of the losses are wrong, by name."""
        weights = [1.0] * len(self.loss_type) if self.loss_weights is None else self.loss_weights
        if len(weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights must be {len(self.loss_type)}, one for each loss_type; got {weights}"
            )
        for weight in weights:
            checks.check_number("loss_weights", weight)
        checks.check_number("beta", self.beta, low=0.0, exclude_low=True)
        checks.check_number("alpha", self.alpha, low=0.0)
        self._check_trl_losses()
        for names, condition, holds in _COUNTS_WITH:
            for name in names:
                default = self.__dataclass_fields__[name].default
                if getattr(self, name) != default and not holds(self):
                    raise ValueError(
                        f"{name} counts only with {condition}; got {getattr(self, name)!r}: leave it out, or"
                        f" at {default!r}"
                    )
        if FOCALPO in self.loss_type:
            self._check_focalpo()

    def focal_loss(self) -> FusedFocalPOLoss:
        """The loss of `'focalpo'`. Without `gamma_schedule_steps`, its schedule is yet to get its steps."""
        return FusedFocalPOLoss(
            beta=self.beta,
            gamma=self._gamma(),
            modulation=self.modulation,
            margin=self._margin(),
            alpha=self.alpha,
            reference_free=self.reference_free,
            length_normalize=self.length_normalize,
            label_smoothing=self.label_smoothing,
            backward=self.backward,
            tau=self.tau,
            backend=self.backend,
            ema_momentum=self.ema_momentum,
            ema_bias_correction=self.ema_bias_correction,
            implicit_reference=self.implicit_reference,
            normalize_margin=self.normalize_margin,
            stop_gradient=self.stop_gradient,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses takes reference log-probs."""
        return bool(self.reference_users())

    def reference_users(self) -> str:
        """What takes them; empty where nothing does."""
        users = [name for name in self.loss_type if name not in (FOCALPO, "sft")]
        if self.loss_type == ["sft"]:
            users = ["sft"]  # has no use for one, but the rewards that TRL logs with it do
        if FOCALPO in self.loss_type:
            adaptive = self.alpha > 0 and needs_reference(self.implicit_reference)
            users += [f"alpha={self.alpha}"] * adaptive
            users += ["focalpo without reference_free"] * (not self.reference_free)
        return ", ".join(users)

    def _check_trl_losses(self) -> None:
        """What the losses themselves, or TRL's trainer, would refuse later and by other names."""
        for name in SMOOTHED.keys() & set(self.loss_type):
            bounds: dict[str, Any] = {"low": 0.0, "high": 0.5, **SMOOTHED[name]}
            checks.check_number("label_smoothing", self.label_smoothing, **bounds)
        if "discopop" in self.loss_type:
            checks.check_number("discopop_tau", self.discopop_tau, low=0.0, exclude_low=True)
        if self.ld_alpha is not None:
            checks.check_number("ld_alpha", self.ld_alpha, low=0.0, high=1.0)
        checks.check_choice("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        of_ratios = _OF_LOG_RATIOS.intersection(self.loss_type)
        if self.f_divergence_type != "reverse_kl" and (of_ratios or self.loss_type == ["sft"]):
            raise ValueError(
                f"f_divergence_type must be 'reverse_kl' with loss_type {sorted(of_ratios) or ['sft']}, not "
                f"a function of a difference of scores; got {self.f_divergence_type!r}"
            )
        sorting = sorted({"aot", "aot_unpaired"}.intersection(self.loss_type))
        if self.use_weighting and sorting:
            raise ValueError(
                f"use_weighting must be False with loss_type {sorting}, which sorts the pairs apart; got True"
            )

    def _check_token_batches(self) -> None:
        checks.check_integer("max_tokens_per_batch", self.max_tokens_per_batch, low=1)
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"{name} of accelerator_config must not be True with max_tokens_per_batch: each rank"
                    " makes its own batches"
                )
        sorting = sorted({"aot", "aot_unpaired"}.intersection(self.loss_type))
        if sorting:
            raise ValueError(
                f"max_tokens_per_batch must be None with loss_type {sorting}, which sorts the pairs of a"
                " batch: batches by tokens differ in size, and hold pairs of like length"
            )

    def _check_focalpo(self) -> None:
        if self.implicit_reference == "sequence_kl":
            raise ValueError(
                "implicit_reference='sequence_kl' takes the hidden states of both models, which the "
                "trainer does not keep: use FusedFocalPOLoss and linear_kl in a loop of your own"
            )
        if self.gamma_schedule is not None:
            checks.check_choice("gamma_schedule", self.gamma_schedule, tuple(SCHEDULES))
        if self.gamma_rate is not None:
            checks.check_number("gamma_rate", self.gamma_rate, low=0.0, exclude_low=True)
        if self.gamma_schedule_steps is not None:
            checks.check_integer("gamma_schedule_steps", self.gamma_schedule_steps, low=1)
        if self.margin is not None and self.gamma_beta_ratio is not None:
            raise ValueError(
                "margin and gamma_beta_ratio are two names of one thing, margin = beta * gamma_beta_ratio; "
                f"got margin={self.margin!r} and gamma_beta_ratio={self.gamma_beta_ratio!r}"
            )
        if self.gamma_beta_ratio is not None:
            checks.check_number("gamma_beta_ratio", self.gamma_beta_ratio)
        self.focal_loss()

    def _gamma(self) -> float | GammaSchedule:
        if self.gamma_schedule is None:
            return GAMMA if self.gamma is None else self.gamma
        given: dict[str, Any] = {
            "gamma_max": self.gamma_max,
            "gamma_min": self.gamma_min,
            "rate": self.gamma_rate,
        }
        options = {name: value for name, value in given.items() if value is not None}
        return SCHEDULES[self.gamma_schedule](self.gamma_schedule_steps or 1, **options)

    def _margin(self) -> float:
        if self.gamma_beta_ratio is not None:
            return self.beta * self.gamma_beta_ratio
        return 0.0 if self.margin is None else self.margin
