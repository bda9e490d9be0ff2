"""Packed batches, and batches with shared prompts, against the padded ones of TRL's collator."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from trl.trainer.dpo_trainer import DataCollatorForPreference

from focalkern.trl import PackedPreferenceCollator, SharedPromptCollator
from focalkern.trl.packing import sequence_places

EXAMPLES = [
    {"prompt_ids": [11, 12], "chosen_ids": [13, 14, 15, 16, 17], "rejected_ids": [18]},
    {"prompt_ids": [], "chosen_ids": [21], "rejected_ids": [22, 23]},
    {"prompt_ids": [0, 0, 0], "chosen_ids": [0], "rejected_ids": [0, 0, 0, 0]},
    {"prompt_ids": [31], "chosen_ids": [32], "rejected_ids": [33]},
]
SETTINGS = [(None, "keep_start"), (4, "keep_start"), (4, "keep_end"), (1, "keep_end")]


@pytest.mark.parametrize(("max_length", "truncation_mode"), SETTINGS)
def test_a_batch_holds_what_the_padded_one_holds(max_length, truncation_mode):
    padded = DataCollatorForPreference(99, max_length, truncation_mode)(EXAMPLES)
    packed = PackedPreferenceCollator(max_length, truncation_mode)(EXAMPLES)
    rows = range(2 * len(EXAMPLES))
    boundaries = packed["cu_seqlens"].tolist()
    assert boundaries[0] == 0
    assert boundaries[-1] == packed["input_ids"].shape[1]
    for row, start, end in zip(rows, boundaries[:-1], boundaries[1:], strict=True):
        tokens = padded["attention_mask"][row].bool()
        assert packed["sequence_lengths"][row] == end - start == tokens.sum()
        assert torch.equal(packed["input_ids"][0, start:end], padded["input_ids"][row, tokens])
        assert packed["position_ids"][0, start:end].tolist() == list(range(end - start))
        mask = packed["completion_mask"][0, start:end]
        assert mask[0] == 0  # which nothing predicts, were it not for the sequence before
        assert torch.equal(mask[1:], padded["completion_mask"][row, tokens][1:])
    assert torch.equal(packed["completion_lengths"], padded["completion_mask"].sum(1))


@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize(("max_length", "truncation_mode"), SETTINGS)
def test_a_batch_of_shared_prompts_holds_what_the_padded_one_holds(max_length, truncation_mode, one_row):
    padded = DataCollatorForPreference(99, max_length, truncation_mode)(EXAMPLES)
    shared = SharedPromptCollator(max_length, truncation_mode, one_row)(EXAMPLES)
    assert next(iter(shared)) == "sequence_lengths"  # the first tells the size of the batch
    assert torch.equal(shared["sequence_lengths"], padded["attention_mask"].sum(1))
    assert torch.equal(shared["completion_lengths"], padded["completion_mask"].sum(1))
    pieces = shared["completion_labels"][0].split(shared["cu_seqlens"].diff().tolist())
    for row, places in enumerate(sequence_places(shared)):
        tokens = padded["attention_mask"][row].bool()
        assert torch.equal(shared["input_ids"].flatten()[places], padded["input_ids"][row, tokens])
        assert torch.equal(shared["position_ids"].flatten()[places], torch.arange(len(places)))
        labels = padded["input_ids"].masked_fill(padded["completion_mask"] == 0, -100)[row, tokens]
        assert torch.equal(pieces[row][1:], labels[len(labels) - len(pieces[row]) :][1:])
        assert pieces[row][0] == -100


def test_shapes_and_order_are_as_trainers_take_them():
    batch = PackedPreferenceCollator()(EXAMPLES)
    names = ["sequence_lengths", "input_ids", "completion_mask", "position_ids", "cu_seqlens"]
    names += ["completion_lengths"]
    assert list(batch) == names  # the first tells the size of the batch
    assert batch["sequence_lengths"].shape == (8,)
    assert batch["cu_seqlens"].dtype == torch.int32
    for name in names[1:4]:
        assert batch[name].shape == (1, 28)
        assert batch[name].dtype == torch.int64


@pytest.mark.parametrize("collator", [PackedPreferenceCollator(), SharedPromptCollator()])
def test_reference_log_probs_are_handed_on(collator):
    logps = [-1.5, -2.0, -40.25, -3.0]
    examples = [
        {**example, "ref_chosen_logps": x, "ref_rejected_logps": 2 * x}
        for example, x in zip(EXAMPLES, logps, strict=True)
    ]
    batch = collator(examples)
    assert batch["ref_chosen_logps"].tolist() == logps
    assert batch["ref_rejected_logps"].tolist() == [2 * x for x in logps]


def test_flash_attention_is_told_the_boundaries():
    plain = PackedPreferenceCollator(4)(EXAMPLES)
    batch = PackedPreferenceCollator(4, flash_attention=True)(EXAMPLES)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert torch.equal(batch[name], plain["cu_seqlens"])
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert not {"cu_seq_lens_q", "max_length_q"} & plain.keys()


def test_examples_are_left_as_they_are():
    before = [dict(example) for example in EXAMPLES]
    for collator in (PackedPreferenceCollator(2), SharedPromptCollator(2)):
        collator(EXAMPLES)
    assert before == EXAMPLES
