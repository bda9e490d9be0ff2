"""Preference batches: sequences packed one after the other, or pairs with their prompt once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from focalkern.shared_prompts import PAIR_IDS, cut_sequence, share_prompts

REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class PackedPreferenceCollator:
    """Concatenates the chosen sequences of a batch of B pairs and then the rejected ones.

    Takes what TRL's `DataCollatorForPreference` takes: `prompt_ids`, `chosen_ids`, `rejected_ids`, perhaps
    `ref_chosen_logps` and `ref_rejected_logps`. Returns, with N the tokens of the batch:

    - `sequence_lengths` [2B] int64. The first entry, since trainers read the size of a batch off the first.
    - `input_ids`, `completion_mask` [1, N]; the first token of a sequence, which nothing predicts, is never
      in it.
    - `completion_lengths` [2B] int64, with such a first token.
    - `position_ids` [1, N], which begin at 0 with every sequence: what attention tells sequences apart by.
    - `cu_seqlens` [2B + 1] int32, the boundaries.
    - with `flash_attention`, `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, which spare
      it from looking for the boundaries in every layer.

    Args:
        max_length: longer sequences are cut.
        truncation_mode: "keep_start" or "keep_end".
    """

    max_length: int | None = None
    truncation_mode: str = "keep_start"
    flash_attention: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL's own truncation and order, without its padding.
        padded = DataCollatorForPreference(
            pad_token_id=0, max_length=self.max_length, truncation_mode=self.truncation_mode
        )(examples)
        lengths = padded["attention_mask"].sum(1)
        is_token = padded["attention_mask"].bool()
        completion_lengths = padded["completion_mask"].sum(1)
        padded["completion_mask"][:, 0] = 0
        position_ids = torch.arange(is_token.shape[1]).expand_as(is_token)
        boundaries = torch.tensor([0, *accumulate(lengths.tolist())], dtype=torch.int32)
        batch = {
            "sequence_lengths": lengths,
            "input_ids": padded["input_ids"][is_token][None],
            "completion_mask": padded["completion_mask"][is_token][None],
            "position_ids": position_ids[is_token][None],
            "cu_seqlens": boundaries,
            "completion_lengths": completion_lengths,
        }
        if self.flash_attention:
            longest = int(lengths.max())
            batch |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch | {name: padded[name] for name in REF_LOGPS if name in padded}


@dataclass
class SharedPromptCollator:
    """Lays the B pairs of a batch out by `focalkern.share_prompts`.

    Takes what `PackedPreferenceCollator` takes. Returns:

    - `sequence_lengths` [2B] int64, prompts included, and the first entry as there.
    - the tensors of `SharedPrompts`; its labels as `completion_labels` [1, N].
    - `completion_lengths` [2B] int64, as there.

    Args:
        max_length: longer sequences are cut.
        truncation_mode: "keep_start" or "keep_end".
        one_row: as in `share_prompts`.
    """

    max_length: int | None = None
    truncation_mode: str = "keep_start"
    one_row: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        prompts, *completions = ([example[name] for example in examples] for name in PAIR_IDS)
        cut: dict[str, Any] = {"max_length": self.max_length, "truncation_mode": self.truncation_mode}
        shared = share_prompts(prompts, *completions, **cut, one_row=self.one_row)
        lengths = torch.tensor(
            [
                [len(ids) for ids in cut_sequence(prompt, completion, **cut)]
                for side in completions
                for prompt, completion in zip(prompts, side, strict=True)
            ]
        )
        batch: dict[str, Any] = {"sequence_lengths": lengths.sum(1), **shared._asdict()}
        batch["completion_lengths"] = lengths[:, 1]
        # Not "labels": by that name trainers count tokens, and wait for the ranks.
        batch["completion_labels"] = batch.pop("labels")[None]
        names = (name for name in REF_LOGPS if name in examples[0])
        return batch | {name: torch.tensor([example[name] for example in examples]) for name in names}
