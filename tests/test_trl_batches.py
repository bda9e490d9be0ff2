"""Batches by tokens: what the sampler draws, and trainings whose batches differ in their number of pairs."""

from __future__ import annotations

import warnings
from copy import deepcopy

import numpy as np
import pytest

pytest.importorskip("trl")

from datasets import Dataset
from trl_tiny import (
    RECORDS,
    KillAt,
    Killed,
    Recording,
    assert_same_history,
    assert_same_run,
    focal_trainer,
    history,
    llama,
    near,
    recorded,
    seeded,
)

from focalkern.trl import PackedPreferenceCollator
from focalkern.trl.batches import TokenBatchSampler, pair_tokens
from focalkern.trl.collator import SharedPromptCollator

RTOL = 1e-5
LIMIT = 100  # four batches, of one pair or two
BY_TOKENS = {"padding_free": True, "max_tokens_per_batch": LIMIT, "per_device_train_batch_size": 8}
SHARED = {"padding_free": False, "share_prompt": True}
BY_PAIRS = {"padding_free": True, "per_device_train_batch_size": len(RECORDS)}


def lengths(pairs: int, seed: int = 0) -> np.ndarray:
    """Long-tailed, as those of preference data; up to 4000."""
    return np.random.default_rng(seed).lognormal(6.5, 0.6, pairs).clip(20, 4000).astype(np.int64)


def epoch_of(sampler: TokenBatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


# ----------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("pairs", "limit"), [(1000, 4000), (1000, 16384), (61, 5000), (8, 10**6)])
def test_every_pair_comes_once_an_epoch_within_the_limit(pairs, limit, ranks):
    tokens = lengths(pairs)
    sampler = TokenBatchSampler(tokens, limit, ranks)
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(pairs))
        assert max(tokens[batch].sum() for batch in batches) <= limit
        assert all(batches)
        assert len(batches) == len(sampler)  # whatever the epoch
        assert len(batches) % ranks == 0


def test_batches_are_filled_with_pairs_of_like_length():
    tokens = lengths(2000)
    batches = list(TokenBatchSampler(tokens, 16384))
    share = tokens.sum() / (16384 * len(batches))
    spread = np.mean([tokens[batch].max() / tokens[batch].min() for batch in batches])
    assert share > 0.9
    assert spread < 1.3


def test_seed_and_epoch_draw_pairs_and_order():
    def pairs_together(batches):
        return {frozenset(batch) for batch in batches}

    tokens = lengths(1000)
    first, other = TokenBatchSampler(tokens, 8192, seed=7), TokenBatchSampler(tokens, 8192, seed=8)
    again = TokenBatchSampler(tokens, 8192, seed=7)
    assert epoch_of(first, 1) == epoch_of(first, 1) == epoch_of(again, 1)
    for batches in (epoch_of(first, 0), epoch_of(other, 1)):
        in_common = pairs_together(batches) & pairs_together(epoch_of(first, 1))
        assert len(in_common) < 0.1 * len(batches)
    # Not from the longest on.
    longest = [tokens[batch].max() for batch in epoch_of(first, 0)]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3


@pytest.mark.parametrize(
    ("tokens", "limit", "ranks", "message"),
    [
        ([5, 90, 7], 89, 1, "max_tokens_per_batch must hold the longest pair, 90 tokens in row 1"),
        ([50, 50, 50], 60, 2, "max_tokens_per_batch=60 makes 3 batches of one pair, which 2 ranks"),
        ([50], 60, 2, "give train_dataset a multiple of 2 pairs"),
    ],
)
def test_what_cannot_be_batched_is_refused_by_name(tokens, limit, ranks, message):
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(np.array(tokens), limit, ranks)


IDS = [
    {"prompt_ids": [11, 12], "chosen_ids": [13, 14, 15, 16, 17], "rejected_ids": [18]},
    {"prompt_ids": [], "chosen_ids": [21], "rejected_ids": [22, 23]},
    {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5], "rejected_ids": [6, 7, 8, 9]},
]


@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 8, 5, 3])
def test_tokens_of_a_pair_are_those_of_its_batch(max_length, mode, share_prompt):
    rows = Dataset.from_list(IDS)
    collate = PackedPreferenceCollator(max_length, mode)
    if share_prompt:
        collate = SharedPromptCollator(max_length, mode, one_row=True)
    expected = [collate([row])["input_ids"].numel() for row in rows]
    assert pair_tokens(rows, max_length, mode, share_prompt).tolist() == expected
    assert pair_tokens(rows.select([2]), max_length, mode, share_prompt).tolist() == expected[2:]


# ----------------------------------------------------------------------------------------------- the training


def models() -> tuple:
    model = seeded(llama)
    return model, near(model)


def batches_of(run: Recording) -> list[list[str]]:
    return [[str(example["chosen_ids"]) for example in batch] for batch in run.examples]


def test_a_training_takes_its_batches_from_the_sampler(tmp_path):
    trainer = focal_trainer(
        tmp_path, *models(), **BY_TOKENS, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=1
    )
    loader = trainer.get_train_dataloader()
    run = recorded(trainer)
    rows = [str(row["chosen_ids"]) for row in trainer.train_dataset]
    steps = len(loader)
    assert steps == 4
    assert trainer.state.global_step == trainer.state.max_steps == 2 * steps == len(run.losses)
    assert trainer.state.epoch == 2.0
    epochs = batches_of(run)[:steps], batches_of(run)[steps:]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == sorted(rows)
    assert epochs[0] != epochs[1]
    assert len({len(batch) for batch in run.examples}) > 1
    assert max(trainer.data_collator(batch)["input_ids"].numel() for batch in run.examples) <= LIMIT


@pytest.mark.parametrize("layout", [{}, SHARED], ids=["packed", "shared"])
def test_pairs_weigh_the_same_in_whichever_batch_they_come(layout, tmp_path):
    """A step over the batches of an epoch, and over one batch of all pairs: loss, gradients and metrics."""
    model, ref = models()
    totals, logged = [], []
    for options, batches in ((BY_PAIRS, 1), (BY_TOKENS, 4)):
        options = {**options, **layout, "gradient_accumulation_steps": batches, "max_steps": 1, "gamma": 0.3}
        trainer = focal_trainer(tmp_path, deepcopy(model), deepcopy(ref), **options)
        run = recorded(trainer)
        totals.append(Recording(losses=[sum(run.losses)], gradients=[run.gradients[-1]]))
        logged.append(history(trainer)[:1])
    sizes = [len(batch) for batch in run.examples]
    assert sum(sizes) == len(RECORDS)
    assert len(set(sizes)) > 1
    assert_same_run(totals[1], totals[0], RTOL)
    of_tokens = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "total_flos")
    of_tokens += ("focal/dropped_mass", "focal/kept_share")
    assert_same_history(logged[1], logged[0], RTOL, RTOL, without=of_tokens)
    assert logged[1][0]["loss"] == pytest.approx(float(totals[0].losses[0]), rel=RTOL)


def test_metrics_of_several_steps_weigh_by_pairs_whatever_is_evaluated_between(tmp_path):
    common = BY_TOKENS | {"gradient_accumulation_steps": 1, "max_steps": 4}
    each = focal_trainer(tmp_path, *models(), **common)
    run = recorded(each)
    options = {"eval_dataset": Dataset.from_list(RECORDS)}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 4}
    together = focal_trainer(tmp_path, *models(), options=options, **common | evaluated)
    together.train()
    sizes = [len(batch) for batch in run.examples]
    assert len(set(sizes)) > 1
    (found,) = [entry for entry in history(together) if "rewards/margins" in entry]
    for name in ("rewards/margins", "logps/chosen", "entropy", "focal/kept_share"):
        values = [entry[name] for entry in history(each)[:4]]
        assert found[name] == pytest.approx(np.average(values, weights=sizes), rel=RTOL)


def test_the_pairs_of_a_step_are_told_on_average(tmp_path):
    trainer = focal_trainer(tmp_path, *models(), **BY_TOKENS)
    assert trainer.get_total_train_batch_size(trainer.args) == 4  # 7 pairs, 4 batches, 2 a step
    trainer.create_model_card("a-model")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| max_tokens_per_batch | 100 |\n| pairs a step, on average | 4 |" in card


@pytest.mark.parametrize(("accumulated", "saved"), [(1, 6), (2, 3)])
def test_a_run_that_was_killed_goes_on_with_the_same_batches(accumulated, saved, tmp_path):
    """From the middle of the second epoch on."""
    common = BY_TOKENS | {"gradient_accumulation_steps": accumulated, "gamma": 0.3}
    common |= {"save_strategy": "steps", "save_steps": saved, "max_steps": -1, "num_train_epochs": 2}
    common |= {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear"}

    def trainer(folder, *callbacks):
        return focal_trainer(folder, *models(), options={"callbacks": list(callbacks)}, **common)

    whole = trainer(tmp_path / "whole")
    run = recorded(whole)
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", KillAt(saved + 1)).train()
    resumed = trainer(tmp_path / "killed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rest = recorded(resumed, resume_from_checkpoint=True)
    assert not any("max_tokens_per_batch" in str(warning.message) for warning in caught)
    assert batches_of(rest) == batches_of(run)[-2:]
    assert history(resumed)[:-1] == history(whole)[:-1]  # the last is a summary of its own process


def test_a_run_that_goes_on_with_other_batches_is_warned_of(tmp_path):
    common = {"gradient_accumulation_steps": 1, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    focal_trainer(tmp_path, *models(), **BY_TOKENS, **common).train()
    for options in (BY_TOKENS | {"max_tokens_per_batch": 2 * LIMIT}, BY_TOKENS | {"data_seed": 7}, BY_PAIRS):
        other = focal_trainer(tmp_path, *models(), **options, **common | {"max_steps": 2})
        with pytest.warns(UserWarning, match="max_tokens_per_batch=(200|100|None) does not make the batches"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
