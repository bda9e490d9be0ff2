"""The TRL example, and the benchmark of a step: both run, on a tiny model and on the CPU."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

from focalkern.cli import models, train
from focalkern.cli.job import read_job
from focalkern.cli.main import _own_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import trl_focalpo

from benchmarks import trl_step
from focalkern.trl import FocalPOConfig

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
