"""What a model and a configuration need for batches without padding: packed sequences, or shared prompts.

Called by `FocalPOTrainer` when it is made. A model is tried before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import is_peft_model
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
_WINDOW = 3  # of sliding attention while a model is tried: shorter than these sequences


def layout_of(args: FocalPOConfig) -> str | None:
    """The field that asks for batches without padding."""
    return "share_prompt" if args.share_prompt else "padding_free" if args.padding_free else None


def collator_of(args: FocalPOConfig) -> Collator:
    if args.share_prompt:
        return SharedPromptCollator(args.max_length, args.truncation_mode, one_row=False)
    return PackedPreferenceCollator(args.max_length, args.truncation_mode)


def check_packing(
    args: FocalPOConfig,
    model: Any,
    sample: dict[str, Any],
    is_streamed: bool,
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
    if is_streamed and args.world_size > 1 and args.accelerator_config.dispatch_batches is not False:
        raise ValueError(
            f"dispatch_batches of accelerator_config must be False with {layout_of(args)}=True, several ranks"
            " and a streamed train_dataset: else the main process cuts batches along their rows"
        )


def prepare_model(
    model: PreTrainedModel,
    collator: Collator,
    device: torch.device,
    dtype: torch.dtype,
    logits_of: Callable[[Batch], torch.Tensor],
) -> None:
    """Set the collator up for a model, and try the model on a few tokens.

    Args:
        dtype: of the model's products.
        logits_of: the model's logits of a batch.

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
        if implementation == "flex_attention" and device.type == "cpu":
            raise ValueError(
                "attn_implementation must be 'sdpa' or 'eager' with share_prompt=True on a CPU: FlexAttention"
                " has no backward there; got 'flex_attention'"
            )
        collator.one_row |= implementation == "flex_attention"
    elif "flash" in implementation:
        collator.flash_attention = True
    if not (takes_masks and sequences_are_apart(model, collator, dtype, logits_of)):
        raise ValueError(
            f"{name} must be False with {type(model).__name__}: its layers do not tell the sequences of a row"
            " apart, or it could not be seen"
        )


def sequences_are_apart(
    model: PreTrainedModel,
    collator: Collator,
    dtype: torch.dtype,
    logits_of: Callable[[Batch], torch.Tensor],
) -> bool:
    """Whether each sequence of a batch has its logits of a padded batch, and no gradient from the others.

    Not every architecture hands the position ids to its attention mask (transformers 5.23: AFMoE does not).
    One that is sharded already cannot be run here, and must be known.
    """
    config = model.config.get_text_config()
    if not is_whole(model):
        return config.model_type in PACKABLE
    embedded: list[torch.Tensor] = []

    def leaf(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which models may scale in place

    with ExitStack() as stack:
        hook = model.get_input_embeddings().register_forward_hook(leaf)
        stack.callback(hook.remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        if getattr(config, "sliding_window", None) is not None:
            stack.enter_context(replaced(config, sliding_window=_WINDOW))
        cut = (collator.max_length, collator.truncation_mode)
        padded = logits_of(DataCollatorForPreference(0, *cut)(_EXAMPLES))
        batch = collator(_EXAMPLES)
        logits = logits_of(batch).flatten(0, 1)
        for row, places in enumerate(sequence_places(batch)):
            found = logits[places]
            if not same_to_rounding(found, padded[row, : len(places)], dtype):
                return False
            size = found.float().square().sum()
            (gradient,) = torch.autograd.grad(size, embedded[-1], retain_graph=True)
            foreign = gradient.flatten(0, 1).abs().sum(-1) > 0
            foreign[places] = False
            if foreign.any():
                return False
    return True


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
