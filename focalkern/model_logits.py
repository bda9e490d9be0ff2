"""The logit transform in a transformers model's configuration, under the names of `linear_logps`.

Imports nothing of transformers. Public as `focalkern.logit_options`; used by `focalkern.trl.head`.
"""

from __future__ import annotations

from typing import Any

from focalkern import checks

# How architectures name what they do to the product of hidden and weight.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse, Falcon-H1
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling


def logit_options(config: Any) -> dict[str, float | None]:
    """`softcap` and `logit_scale` of a model, from its `config`.

        loss_fn = FusedFocalPOLoss(gamma=0.05, **logit_options(model.config))

    The fields of every architecture that transformers 5.23 has with such a transform are known. A model with
    fields of its own may do more to its logits than this tells.

    Args:
        config: `model.config` of a causal language model, or of one that wraps it (vision).

    Raises:
        TypeError: config is not a configuration of transformers, or a field of it, which is named, no number.
        ValueError: a field of the config is out of range; it is named.
    """
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"config must be a configuration of transformers (model.config); got {type(config).__name__}"
        )
    config = config.get_text_config()
    return {"softcap": softcap_of(config), "logit_scale": logit_scale_of(config)}


def softcap_of(config: Any) -> float | None:
    """Of the logits; None where the model has none.

    Raises:
        TypeError, ValueError: naming the field of the config, if that is not a number > 0.
    """
    for name in _SOFTCAPS:
        value = getattr(config, name, None)
        if value is not None:
            checks.check_number(f"{name} (of the model's config)", value, low=0.0, exclude_low=True)
            return value
    return None


def logit_scale_of(config: Any) -> float:
    """What a model multiplies its logits by, before the softcap.

    Raises:
        TypeError, ValueError: naming the field of the config, if that is not a number, or divides by 0.
    """
    for name in (*_MULTIPLIERS, *_DIVISORS):
        value = getattr(config, name, None)
        if value is None:
            continue
        field = f"{name} (of the model's config)"
        checks.check_number(field, value)
        if name == "logit_scale" and config.model_type == "mpt":  # transformers' MPT does not look at it
            return 1.0
        if name not in _DIVISORS or config.model_type == "hyperclovax":
            return value
        if value == 0:
            raise ValueError(f"{field} must not be 0: the logits are divided by it")
        return 1.0 / value
    return 1.0
