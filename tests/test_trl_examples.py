"""The TRL script with its recipes, and the benchmark of a step: both run, on a tiny model and on the CPU."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from tiny import write_jsonl
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, TrlParser
from trl_tiny import CONVERSATIONS, RECORDS, TOKENIZER, llama, seeded

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import trl_focalpo

from benchmarks import trl_step
from focalkern import recipes
from focalkern.trl import FocalPOConfig

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
assert len(RECIPES) >= 5
ON_CPU = "--use_cpu --bf16 false"
SHORT = f"{ON_CPU} --max_steps 2 --per_device_train_batch_size 2 --report_to none --disable_tqdm true"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    seeded(llama).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def run_script(model: str, data: Path, out: Path, options: str = ""):
    given = f"--model_name_or_path {model} --dataset_name {data} --output_dir {out} {options} {SHORT}"
    return trl_focalpo.main(given.split())


def test_the_script_trains_and_saves(model_folder, tmp_path):
    data, out = write_jsonl(tmp_path / "pairs.jsonl", RECORDS), tmp_path / "out"
    trainer = run_script(model_folder, data, out, "--gamma 0.2 --learning_rate 1e-2")
    assert trainer.state.global_step == 2
    assert trainer.loss_fn.focal.gamma == 0.2
    before, after = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (model_folder, out))
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_the_script_trains_lora_on_the_head(model_folder, tmp_path):
    lora = "--use_peft --lora_r 4 --lora_target_modules q_proj lm_head --padding_free true"
    data = write_jsonl(tmp_path / "pairs.jsonl", RECORDS)
    trainer = run_script(model_folder, data, tmp_path / "out", lora)
    assert trainer.model.get_output_embeddings().lora_B["default"].weight.any()  # it starts at 0


@pytest.mark.parametrize("arguments", [[], ["--dataset_name", "x"], ["--model_name_or_path", "x"]])
def test_the_script_says_what_is_missing(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        trl_focalpo.main([*arguments, "--output_dir", str(tmp_path), *ON_CPU.split()])
    assert "--model_name_or_path and --dataset_name must be given" in capsys.readouterr().err


def test_the_script_says_which_splits_there_are(model_folder, tmp_path, capsys):
    data = write_jsonl(tmp_path / "pairs.jsonl", RECORDS)
    with pytest.raises(SystemExit):
        run_script(model_folder, data, tmp_path / "out", "--eval_strategy steps")
    assert "has the splits ['train'], not ['test']" in capsys.readouterr().err


def test_the_script_evaluates_conversations_of_a_folder(model_folder, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", CONVERSATIONS)
    options = "--eval_strategy steps --eval_steps 2"
    trainer = run_script(model_folder, tmp_path / "data", tmp_path / "out", options)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_the_paper_s(path):
    parser = TrlParser((ScriptArguments, FocalPOConfig, ModelConfig))
    arguments = ["--config", str(path), *ON_CPU.split()]
    _, config, model = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    constant = path.read_text(encoding="utf-8").splitlines()[0].rsplit("focalkern.recipes.", 1)[1]
    recipe = getattr(recipes, constant)
    steps = {"total_steps": 1} if recipe.method == "dynamic" else {}
    loss, expected = config.focal_loss(), recipe.loss(**steps)
    for name in ("beta", "gamma", "modulation", "margin", "alpha", "reference_free", "length_normalize"):
        assert getattr(loss, name) == pytest.approx(getattr(expected, name)), name
    assert model.model_name_or_path == recipe.model
    assert config.learning_rate == recipe.learning_rate
    assert config.num_train_epochs == recipe.epochs
    pairs = 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert pairs == recipe.batch_size
    assert config.needs_reference == config.precompute_ref_log_probs


@pytest.fixture
def step_benchmark(monkeypatch):
    """`trl_step.main --quick` on a smaller model, and memory in this process: a fresh one starts slowly."""
    monkeypatch.setattr(trl_step, "in_fresh_process", lambda function, *given: function(*given))
    monkeypatch.setattr(trl_step, "QUICK", trl_step.Setup(32, 1, 4500, 3, entries=20))
    return lambda *options: trl_step.main(["--quick", "--dtype", "fp32", *options])


def test_the_benchmark_of_a_step_runs_and_its_trainers_agree(step_benchmark, tmp_path, capsys):
    path = tmp_path / "step.json"
    assert step_benchmark("--json", str(path)) == 0
    (found,) = json.loads(path.read_text())["comparisons"]
    assert list(found["rows"]) == list(trl_step.NAMES)
    assert found["tokens"] < found["padded_positions"]
    for row in found["rows"].values():
        assert row["agrees"]
        assert len(row["ms"]["samples"]) == 2
        assert row["tokens_per_s"] == pytest.approx(1e3 * found["tokens"] / row["ms"]["median"], rel=1e-3)
    assert found["rows"][trl_step.PACKED]["kept_share"] == 1  # in fp32 next to nothing may be left out
    assert "FocalPOTrainer, packed" in capsys.readouterr().out


def test_the_benchmark_says_where_gradients_differ(step_benchmark, monkeypatch):
    other_loss = partial(FocalPOConfig, modulation="focal")
    monkeypatch.setattr(trl_step, "FocalPOConfig", lambda gamma, **options: other_loss(gamma=1.0, **options))
    assert step_benchmark() == 1
