"""The TRL example, and the benchmark of a step: both run, on a tiny model and on the CPU."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("trl")

from trl.trainer.dpo_trainer import DataCollatorForPreference

from focalkern.cli import models, train
from focalkern.cli.job import read_job
from focalkern.cli.main import _own_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import trl_focalpo

from benchmarks import trl_step
from focalkern.shared_prompts import _bool_mask
from focalkern.trl import FocalPOConfig
from focalkern.trl.collator import PackedPreferenceCollator, SharedPromptCollator

RECIPE = Path(__file__).resolve().parents[1] / "examples/recipes/llama3-8b-focalpo.yaml"


def test_the_example_is_the_recipe():
    job = read_job(_own_parser("train", train), SimpleNamespace(), [str(RECIPE)]).job
    assert (job.model_name, job.script.dataset_name) == (trl_focalpo.MODEL, trl_focalpo.DATA)
    ours = FocalPOConfig(**trl_focalpo.OPTIONS, use_cpu=True).to_dict()
    theirs = job.config.to_dict()
    assert ours.pop("model_init_kwargs").items() <= theirs.pop("model_init_kwargs").items()
    assert ours == theirs


def test_the_example_trains(tmp_path):
    models.write_tiny(models.load_config(trl_focalpo.MODEL), tmp_path)
    changes = {"max_steps": 2, "gradient_accumulation_steps": 1, "report_to": "none", "disable_tqdm": True}
    changes |= {"use_cpu": True, "model_init_kwargs": None, "output_dir": str(tmp_path / "out")}
    trainer = trl_focalpo.main(str(tmp_path / "model"), str(tmp_path / "data"), **changes)
    assert trainer.state.global_step == 2
    assert any("eval_rewards/accuracies" in entry for entry in trainer.state.log_history)
    assert {"model.safetensors", "progress.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.fixture
def step_benchmark(monkeypatch):
    """`trl_step.main --quick` on a smaller model, and memory in this process: a fresh one starts slowly."""
    monkeypatch.setattr(trl_step, "in_fresh_process", lambda function, *given: function(*given))
    few = partial(trl_step.docstring_pairs, library=Path(asyncio.__file__).parent)
    monkeypatch.setattr(trl_step, "docstring_pairs", few)
    monkeypatch.setattr(trl_step, "QUICK", trl_step.Setup(32, 1, 4500, 3, repeats=2, entries=20))
    return lambda *options: trl_step.main(["--quick", "--dtype", "fp32", *options])


@pytest.mark.parametrize("lengths", ["text", "ultrafeedback"])
def test_the_benchmark_of_a_step_runs_and_its_trainers_agree(
    lengths, step_benchmark, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(trl_step.LENGTHS, "ultrafeedback", ((16, 9, 9), (1.0, 0.6, 0.6), 300))
    path = tmp_path / "step.json"
    assert step_benchmark("--json", str(path), "--lengths", lengths) == 0
    (found,) = json.loads(path.read_text())["comparisons"]
    assert list(found["rows"]) == list(trl_step.NAMES)
    assert found["tokens"] < found["padded_positions"]
    for row in found["rows"].values():
        assert row["agrees"]
        assert len(row["ms"]["samples"]) == 2
        assert row["tokens_per_s"] == pytest.approx(1e3 * found["tokens"] / row["ms"]["median"], rel=1e-3)
    assert found["rows"][trl_step.PACKED]["kept_share"] == 1  # in fp32 next to nothing may be left out
    positions = [row["positions"] for row in found["rows"].values()]
    padded = found["padded_positions"]
    assert positions[:4] == [padded, padded, padded, found["tokens"]] and positions[4] < padded
    operations = [row["operations"] for row in found["rows"].values()]
    assert operations[0] > operations[1] == operations[2]
    assert 1 < found["llama_8b_over_padded"][trl_step.PACKED] < found["llama_8b_over_padded"][trl_step.SHARED]
    assert "FocalPOTrainer, packed" in capsys.readouterr().out


@pytest.mark.parametrize("lengths", trl_step.LENGTHS)
def test_pairs_have_the_lengths_asked_for(lengths):
    means, _, longest = trl_step.LENGTHS[lengths]
    drawn = trl_step.drawn(lengths, 64)
    for mean, found in zip(means, zip(*drawn, strict=True), strict=True):
        assert mean == pytest.approx(sum(found) / 64, rel=0.1)
    assert max(prompt + max(completions) for prompt, *completions in drawn) <= longest
    cut = trl_step.cut_text(lengths, 2)
    assert [[len(ids) for ids in pair.values()] for pair in cut] == trl_step.drawn(lengths, 2)
    assert len({tuple(ids) for pair in cut for ids in pair.values()}) == 6


def test_operations_are_those_of_the_model():
    model = trl_step.llama(trl_step.Setup(hidden=128, layers=3, vocab=500, pairs=1))
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(2, 7, dtype=torch.int64))
    parts = [(14, 0, 0), (0, 2 * 7**2, 0), (0, 0, 14)]
    layers, attention, head = (trl_step.step_operations(model.config, *part) for part in parts)
    assert layers / 4 + attention / 4.5 + head / 5 == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_an_8b_model_is_counted_in_the_layouts_of_the_collators(monkeypatch):
    pairs = [
        {"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r}
        for p, c, r in ((5, 3, 2), (1, 2, 4))
    ]
    counted = []
    monkeypatch.setattr(trl_step, "step_operations", lambda config, *counts: counted.append(counts) or 1)
    padded = DataCollatorForPreference(pad_token_id=0)(pairs)
    trl_step.ratios_8b(padded["attention_mask"], padded["completion_mask"])
    packed, shared = PackedPreferenceCollator()(pairs), SharedPromptCollator(one_row=True)(pairs)
    seen = _bool_mask(shared["position_ids"], shared["seen_until"], None).sum()
    of_each = sum(n * (n + 1) // 2 for n in packed["sequence_lengths"].tolist())
    assert counted == [(4 * 8, of_each, 11), (23, of_each, 11), (shared["input_ids"].numel(), seen, 11)]


def test_the_benchmark_says_where_gradients_differ(step_benchmark, monkeypatch):
    other_loss = partial(FocalPOConfig, modulation="focal")
    monkeypatch.setattr(trl_step, "FocalPOConfig", lambda gamma, **options: other_loss(gamma=1.0, **options))
    assert step_benchmark() == 1
