"""What a model and a configuration need for batches without padding: packed sequences, or shared prompts.

Called by `FocalPOTrainer` when it is made. A model is tried before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from packaging.version import Version
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from focalkern.shared_prompts import shared_attention_mask
from focalkern.trial import evaluating, same_to_rounding
from focalkern.trl.collator import PackedPreferenceCollator, SharedPromptCollator
from focalkern.trl.config import FocalPOConfig
from focalkern.trl.head import is_whole, replaced

# Architectures that pass the trial, for models that are sharded when they come.
PACKABLE = frozenset(
    (
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    )
)
Batch = dict[str, Any]
Collator = PackedPreferenceCollator | SharedPromptCollator
# Two pairs: of unequal lengths, so that a token of another sequence stands wherever one could be seen.
_EXAMPLES = [
    {"prompt_ids": [0, 1, 2], "chosen_ids": [3, 4, 5, 6], "rejected_ids": [7, 3]},
    {"prompt_ids": [8, 2], "chosen_ids": [5], "rejected_ids": [1, 6, 4]},
]
# The first release whose FlexAttention casts under autocast, as sdpa does.
_TORCH, _AUTOCAST = Version(torch.__version__), Version("2.13")
_COMPILATIONS = 32
_WINDOW = 3  # of sliding attention while a model is tried: shorter than these sequences


def layout_of(args: FocalPOConfig) -> str | None:
    """The field that asks for batches without padding."""
    return "share_prompt" if args.share_prompt else "padding_free" if args.padding_free else None


def collator_of(args: FocalPOConfig) -> Collator:
    if args.share_prompt:
        return SharedPromptCollator(args.max_length, args.truncation_mode)
    return PackedPreferenceCollator(args.max_length, args.truncation_mode)


def check_packing(
    args: FocalPOConfig,
    model: Any,
    sample: dict[str, Any],
    data_collator: Any,
    compute_metrics: Any,
    peft_config: Any,
) -> None:
    """Raise ValueError for what goes with padded rows alone."""
    if not isinstance(model, str) and is_peft_model(model):
        peft_config = model.active_peft_config
    for name, given, why in (
        ("data_collator", data_collator is not None, f"it has its own, {type(collator_of(args)).__name__}"),
        ("pad_to_multiple_of", args.pad_to_multiple_of is not None, "it counts for padded sequences"),
        ("compute_metrics", compute_metrics is not None, "it takes the logits of padded rows"),
        ("images", "image" in sample or "images" in sample, "they belong to padded rows"),
        (
            "neftune_noise_alpha",
            args.neftune_noise_alpha is not None,
            "its noise is scaled by the length of a row, here of several sequences",
        ),
        (
            "prompt learning",
            getattr(peft_config, "is_prompt_learning", False),
            "its tokens would come once, not before each sequence",
        ),
    ):
        if given:
            raise ValueError(f"{name} must not be given with {layout_of(args)}=True: {why}")


def prepare_model(
    model: PreTrainedModel,
    collator: Collator,
    trainer_device: torch.device,
    is_autocast: bool,
    logits_of: Callable[[Batch], torch.Tensor],
) -> None:
    """Set the collator up for a model, and try the model on a few tokens.

    Args:
        is_autocast: whether the model is to run under autocast.
        logits_of: the model's logits of a batch, without autocast.

    Raises:
        ValueError: the attention implementation, or the model, cannot tell sequences apart.
    """
    implementation = model.config._attn_implementation
    takes_masks = not getattr(model, "_is_stateful", False) and model._supports_attention_backend
    name = "padding_free"
    if isinstance(collator, SharedPromptCollator):
        name = "share_prompt"
        if takes_masks:
            shared_attention_mask(model.config, *torch.ones(2, 1, 1, dtype=torch.int64))
        if implementation == "flex_attention":
            _check_flex_attention(model, trainer_device, is_autocast)
            collator.one_row = True
            # Every mask, dtype and mode of autograd is a compilation. Beyond the limit, 8 by default,
            # attention would hold all scores, with a warning.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, _COMPILATIONS)
    elif "flash" in implementation:
        collator.flash_attention = True
    if not (takes_masks and sequences_are_apart(model, collator, logits_of)):
        raise ValueError(
            f"{name} must be False with {type(model).__name__}: its layers do not keep the sequences of a row"
            " apart, or it could not be seen"
        )


def _check_flex_attention(model: PreTrainedModel, device: torch.device, is_autocast: bool) -> None:
    """Raise ValueError where FlexAttention would fail in the first step, or compute something else."""
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0) or 0.0
    for given, why in (
        (device.type == "cpu", "on a CPU, where it has no backward"),
        (dropout > 0, f"with attention_dropout={dropout}, which it does not know"),
        (len(devices) > 1, "with a model on several devices, between which its masks do not move"),
        (
            is_autocast and model.dtype == torch.float32 and _TORCH < _AUTOCAST,
            f"with autocast over fp32 weights before torch 2.13; this is {torch.__version__}",
        ),
    ):
        if given:
            raise ValueError(
                "attn_implementation must be 'sdpa' or 'eager', not 'flex_attention', with share_prompt=True"
                f" {why}"
            )


def sequences_are_apart(
    model: PreTrainedModel, collator: Collator, logits_of: Callable[[Batch], torch.Tensor]
) -> bool:
    """Whether each sequence of a batch has its logits of a padded batch, and no gradient from the others.

    Not every architecture hands the position ids to its attention mask (transformers 5.23: AFMoE does not).
    One that is sharded on a rank cannot be run here, and must be known.
    """
    config = model.config.get_text_config()
    # The ranks decide together: one may hold all weights while the others hold none.
    if not all(gather_object([is_whole(model)])):
        return config.model_type in PACKABLE
    embedded: list[torch.Tensor] = []

    def leaf(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which models may scale in place

    embeddings = model.get_input_embeddings()
    with ExitStack() as stack:
        hook = embeddings.register_forward_hook(leaf)
        stack.callback(hook.remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        if getattr(config, "sliding_window", None) is not None:
            stack.enter_context(replaced(config, sliding_window=_WINDOW))
        if isinstance(collator, SharedPromptCollator) or embeddings.weight.device.type == "cpu":
            # The mask is tried, not the kernel: FlexAttention would compile for these few tokens.
            stack.enter_context(replaced(config, _attn_implementation="eager"))
        cut = (collator.max_length, collator.truncation_mode)
        padded = logits_of(DataCollatorForPreference(0, *cut)(_EXAMPLES))
        if not padded.isfinite().all():
            return True  # weights with NaN: the loss will say so
        batch = collator(_EXAMPLES)
        logits, inputs = logits_of(batch).flatten(0, 1), embedded[-1]
        if isinstance(collator, SharedPromptCollator) and _ignores_positions(model, batch, logits, logits_of):
            return False
        for row, places in enumerate(sequence_places(batch)):
            found, expected = logits[places], padded[row, : len(places)]
            alone = logits_of({"input_ids": batch["input_ids"].flatten()[places][None]})[0]
            if not same_to_rounding(found, expected, alone, inputs.dtype):
                return False
            (gradient,) = torch.autograd.grad(found.float().square().sum(), inputs, retain_graph=True)
            foreign = gradient.flatten(0, 1).abs().sum(-1) > 0
            foreign[places] = False
            if foreign.any():
                return False
    return True


def _ignores_positions(
    model: PreTrainedModel, batch: Batch, logits: torch.Tensor, logits_of: Callable[[Batch], torch.Tensor]
) -> bool:
    """Whether other positions under the same mask leave every bit of the logits as it is."""
    positions = batch["position_ids"]
    mask = shared_attention_mask(model.config, positions, batch["seen_until"])
    moved = {"input_ids": batch["input_ids"], "position_ids": 2 * positions, "attention_mask": mask}
    return torch.equal(logits_of(moved).flatten(0, 1), logits)


def sequence_places(batch: Batch) -> list[torch.Tensor]:
    """Where the tokens of each sequence stand among the flattened rows, its prompt included."""
    if "hidden_index" not in batch:
        return list(torch.arange(batch["input_ids"].numel()).split(batch["sequence_lengths"].tolist()))
    without_prompts = batch["hidden_index"].cpu().split(batch["cu_seqlens"].diff().tolist())
    found = []
    for index, length in zip(without_prompts, batch["sequence_lengths"].tolist(), strict=True):
        missing = length - len(index)
        found.append(torch.cat([torch.arange(missing) + (index[:1] - missing), index]))
    return found
