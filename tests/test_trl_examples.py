"""The TRL script with its recipes, and the benchmark of a step: both run, on a tiny model and on the CPU."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from ranks import run_ranks
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
ON_CPU = "--use_cpu --bf16 false"
SHORT = f"{ON_CPU} --max_steps 2 --per_device_train_batch_size 2 --report_to none --disable_tqdm true"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    seeded(llama).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("records", [RECORDS, CONVERSATIONS], ids=["plain", "conversations"])
def test_the_script_trains_and_saves(records, model_folder, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", records)
    out = tmp_path / "out"
    given = f"--model_name_or_path {model_folder} --dataset_name {data} --output_dir {out} --gamma 0.2"
    trainer = trl_focalpo.main([*given.split(), "--learning_rate", "1e-2", *SHORT.split()])
    assert trainer.state.global_step == 2
    assert trainer.loss_fn.focal.gamma == 0.2
    before, after = weights(Path(model_folder)), weights(out)
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_the_script_trains_lora_on_the_head(model_folder, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", RECORDS)
    given = f"--model_name_or_path {model_folder} --dataset_name {data} --output_dir {tmp_path / 'out'}"
    lora = "--use_peft --lora_r 4 --lora_target_modules q_proj lm_head --padding_free true"
    trainer = trl_focalpo.main([*given.split(), *lora.split(), *SHORT.split()])
    head = trainer.model.get_output_embeddings()
    assert head.lora_B["default"].weight.any()  # it starts at 0


def test_the_script_trains_on_two_ranks(model_folder, tmp_path):
    """As docs/trl.md launches it, but for the number of processes and the precision."""
    pytest.importorskip("deepspeed")
    data = write_jsonl(tmp_path / "pairs.jsonl", RECORDS)
    out = tmp_path / "out"
    config = ("--config_file", str(ROOT / "examples/accelerate/zero3.yaml"), "--main_process_port", "0")
    changes = ("--num_processes", "2", "--mixed_precision", "no")
    given = f"--model_name_or_path {model_folder} --dataset_name {data} --output_dir {out} {SHORT}"
    run_ranks(
        ROOT / "examples/trl_focalpo.py",
        *given.split(),
        *("--learning_rate", "1e-2"),
        launcher=(sys.executable, "-m", "accelerate.commands.launch", *config, *changes),
    )
    before, after = weights(Path(model_folder)), weights(out)
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("arguments", [[], ["--dataset_name", "x"], ["--model_name_or_path", "x"]])
def test_the_script_says_what_is_missing(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        trl_focalpo.main([*arguments, "--output_dir", str(tmp_path), *ON_CPU.split()])
    assert "--model_name_or_path and --dataset_name must be given" in capsys.readouterr().err


def test_the_script_says_which_splits_there_are(model_folder, tmp_path, capsys):
    data = write_jsonl(tmp_path / "pairs.jsonl", RECORDS)
    given = f"--model_name_or_path {model_folder} --dataset_name {data} --output_dir {tmp_path / 'out'}"
    with pytest.raises(SystemExit):
        trl_focalpo.main([*given.split(), "--eval_strategy", "steps", *SHORT.split()])
    assert "has the splits ['train'], not ['test']" in capsys.readouterr().err


def test_the_script_evaluates_on_a_folder(model_folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", RECORDS)
    given = f"--model_name_or_path {model_folder} --dataset_name {tmp_path / 'data'}"
    options = f"--output_dir {tmp_path / 'out'} --eval_strategy steps --eval_steps 2"
    trainer = trl_focalpo.main([*given.split(), *options.split(), *SHORT.split()])
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


def test_there_are_recipes():
    assert len(RECIPES) >= 5


def test_the_benchmark_of_a_step_runs_and_its_trainers_agree(tmp_path, monkeypatch, capsys):
    # Memory in this process: a fresh one would take longer to start than all the rest.
    monkeypatch.setattr(trl_step, "in_fresh_process", lambda function, *given: function(*given))
    path = tmp_path / "step.json"
    size = "--hidden 32 --layers 1 --vocab 4500 --pairs 3 --repeats 2 --dtype fp32 --entries 20"
    assert trl_step.main([*size.split(), "--json", str(path)]) == 0
    (found,) = json.loads(path.read_text())["comparisons"]
    assert list(found["rows"]) == list(trl_step.NAMES)
    assert found["tokens"] < found["padded_positions"]
    for row in found["rows"].values():
        assert row["agrees"]
        assert len(row["ms"]["samples"]) == 2
        assert row["tokens_per_s"] == pytest.approx(1e3 * found["tokens"] / row["ms"]["median"], rel=1e-3)
    assert found["rows"][trl_step.PACKED]["kept_share"] == 1  # in fp32 next to nothing may be left out
    assert "FocalPOTrainer, packed" in capsys.readouterr().out


def test_the_benchmark_says_where_gradients_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_step, "in_fresh_process", lambda function, *given: function(*given))
    other_loss = partial(FocalPOConfig, modulation="focal")
    monkeypatch.setattr(trl_step, "FocalPOConfig", lambda gamma, **options: other_loss(gamma=1.0, **options))
    size = "--hidden 32 --layers 1 --vocab 4500 --pairs 3 --repeats 1 --dtype fp32 --entries 20"
    assert trl_step.main(size.split()) == 1
