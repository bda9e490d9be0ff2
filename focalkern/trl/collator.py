"""Packed (padding-free) preference batches: the sequences of a batch one after the other, as one row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference


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
        names = ("ref_chosen_logps", "ref_rejected_logps")
        return batch | {name: padded[name] for name in names if name in padded}
