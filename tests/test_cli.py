"""The command `focalkern`: its recipes, dry runs, training and resuming, help and errors. All on the CPU."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("trl")

import datasets
from safetensors.torch import load_file
from tiny import write_jsonl
from transformers import AutoModelForCausalLM

import focalkern
from focalkern import recipes
from focalkern.cli import main as cli
from focalkern.cli import models, train
from focalkern.cli.job import Job, read_job
from focalkern.trl import ProgressPlot

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
PAGE = (ROOT / "docs/training.md").read_text(encoding="utf-8")
QUIET = ["--disable_tqdm", "true"]


def job_of(*arguments: object) -> Job:
    """As `plan` and `check` read it."""
    parser = cli._own_parser("train", train)
    return read_job(parser, SimpleNamespace(), list(map(str, arguments))).job


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with a Llama as "model", and "data" with train.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("small")
    models.write_tiny(models.load_config("meta-llama/Meta-Llama-3-8B-Instruct"), folder)
    return folder


def options(small: Path, out: Path, **changes: object) -> list[str]:
    given = {"model_name_or_path": small / "model", "dataset_name": small / "data", "output_dir": out}
    given |= {"use_cpu": True, "bf16": False, "max_steps": 4, "report_to": "none", "learning_rate": 1e-3}
    given |= {"per_device_train_batch_size": 2, "logging_steps": 1, **changes}
    return [*(str(x) for name, value in given.items() for x in (f"--{name}", value)), *QUIET]


# ------------------------------------------------------------------------------------------------ the recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_the_paper_s(path):
    text = path.read_text(encoding="utf-8")
    constant, schedule = re.match(
        r".*focalkern\.recipes\.(\w+)(?:\.loss\(schedule=(\w+)\))?\n", text
    ).groups()
    recipe, job = getattr(recipes, constant), job_of(path)
    loss_options = {"total_steps": 1} if recipe.method == "dynamic" else {}
    if schedule:
        loss_options["schedule"] = getattr(focalkern, schedule)
    config, expected = job.config, recipe.loss(**loss_options)
    loss = config.focal_loss()
    for name in ("beta", "gamma", "modulation", "margin", "alpha", "reference_free", "length_normalize"):
        found, wanted = getattr(loss, name), getattr(expected, name)
        assert found == (wanted if name == "gamma" else pytest.approx(wanted)), name
    assert (job.model_name, job.script.dataset_name) == (recipe.model, recipe.dataset)
    assert config.num_train_epochs == recipe.epochs
    gpus = 1 if job.model.use_peft else 8
    pairs = gpus * config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert pairs == recipe.batch_size
    # α-DPO, App. C.1
    assert (config.lr_scheduler_type, config.warmup_steps, config.max_length) == ("cosine", 0.1, 2048)
    assert job.model.use_peft or config.learning_rate == recipe.learning_rate
    assert config.precompute_ref_log_probs == (config.needs_reference and not job.model.use_peft)
    assert path.stem in config.output_dir
    assert 0 < config.save_steps < 1
    assert config.save_total_limit == 1
    assert (config.eval_strategy, config.report_to, config.seed) == ("steps", ["tensorboard"], 42)


def test_every_row_of_the_papers_has_a_recipe():
    rows = [
        path.read_text(encoding="utf-8").splitlines()[0].rsplit("focalkern.recipes.")[1] for path in RECIPES
    ]
    schedules = ("", ".loss(schedule=LinearGamma)", ".loss(schedule=ExponentialGamma)")
    named = {name for name, value in vars(recipes).items() if isinstance(value, recipes.Recipe)}
    named.remove("SIMPO_MISTRAL_BASE_7B")  # of SimPO's paper alone
    of_dynamic = {name for name in named if recipes.__dict__[name].method == "dynamic"}
    assert set(rows) == (named - of_dynamic) | {name + s for name in of_dynamic for s in schedules}
    assert len(rows) == len(set(rows)) + 2  # LoRA's for two sizes of GPU


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_value_of_a_paper_names_its_source(path):
    values = "model_name_or_path dataset_name beta gamma gamma_schedule gamma_max gamma_min gamma_rate alpha"
    values += " gamma_beta_ratio learning_rate num_train_epochs lr_scheduler_type warmup_steps max_length"
    lines = {line.split(":")[0]: line for line in path.read_text(encoding="utf-8").splitlines()}
    assert {"model_name_or_path", "beta", "learning_rate"} <= lines.keys()
    assert not [line for name, line in lines.items() if name in values.split() and "  # " not in line]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_dry_and_leaves_nothing_behind(path, tmp_path, monkeypatch, capsys):
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delattr(ProgressPlot, "on_log")  # it draws at the end too
    assert cli.main(["train", str(path), "--dry-run", *QUIET]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Dry run: a tiny model and built-in pairs")
    (losses,) = re.findall(r"Losses: \[(.*), (.*)\]", printed)
    assert all(map(math.isfinite, map(float, losses)))
    assert not [*tmp_path.rglob("*/*"), *(tmp_path / "cache").glob("*")]


# ------------------------------------------------------------------------------------- training, and resuming

STATEFUL = {"gamma_schedule": "cosine", "gamma_max": 0.4, "alpha": 0.5, "beta": 2.5, "gamma_beta_ratio": 0.4}
STATEFUL |= {"reference_free": True, "length_normalize": True, "save_steps": 2, "save_total_limit": 2}
STATEFUL |= {"resume_from_checkpoint": "true", "eval_strategy": "steps", "eval_steps": 2}


class Killed(Exception):
    pass


class Recorder(ProgressPlot):
    """Writes down the steps that a process begins."""

    steps: ClassVar[list[int]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


class KillsAtStep3(Recorder):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed


def losses(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    kept = ("step", "loss", "eval_loss", "focal/gamma", "alpha/mean", "alpha/std", "rewards/margins")
    return [{name: entry[name] for name in kept if name in entry} for entry in state["log_history"]]


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch, capsys):
    """By the same command: γ(t), α-DPO's statistics, losses and weights, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main(["train", *options(small, whole, **STATEFUL)]) == 0
    assert f"No checkpoint in {whole}: the run starts anew" in capsys.readouterr().out
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(train, "ProgressPlot", KillsAtStep3)
        cli.main(["train", *options(small, killed, **STATEFUL)])
    assert not (killed / "model.safetensors").exists()
    (killed / "checkpoint-3").mkdir()  # whose writing was interrupted
    monkeypatch.setattr(train, "ProgressPlot", Recorder)
    assert cli.main(["train", *options(small, killed, **STATEFUL)]) == 0
    assert Recorder.steps == [0, 1, 2, 2, 3]
    # The last entry but one is the mean loss since the start of the process.
    ours, theirs = ([entry for entry in losses(x) if len(entry) > 1] for x in (killed, whole))
    assert ours == theirs
    assert [entry["step"] for entry in theirs if "loss" in entry] == [1, 2, 3, 4]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_a_run_leaves_and_that_no_other_starts_among_it(small, tmp_path, capsys):
    out = tmp_path / "out"
    given = options(small, out, gamma=0.2, save_steps=2, eval_strategy="steps", eval_steps=3)
    assert cli.main(["train", *given]) == 0
    assert f"The model is in {out}." in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (small / "model", out))
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert {"progress.png", "trainer_state.json", "tokenizer.json", "checkpoint-4"} <= {
        x.name for x in out.iterdir()
    }
    assert [entry["step"] for entry in losses(out) if "eval_loss" in entry] == [3, 4]  # and at the end
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in (
        f"fine-tuned version of `{small / 'model'}`, trained on `{small / 'data'}` with FocalPO ([FocalPO: ",
        "https://aclanthology.org/2025.acl-short.21",
        "| beta | 0.1 |\n| gamma | 0.2 |\n",
        "| learning_rate | 0.001 |",
        "| pairs a step | 2 |",
        "After 4 steps, ",
        f"focalkern: {focalkern.__version__}",
        "@misc{liu2025",
    ):
        assert text in card
    assert "None" not in card
    with pytest.raises(SystemExit, match=f"output_dir {out} has checkpoints: --resume_from_checkpoint true"):
        cli.main(["train", *given])


def test_a_recipe_takes_fields_from_the_command_line(small, tmp_path, monkeypatch):
    """And docs/training.md merges the adapter that it leaves."""
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "pairs.jsonl", models.pairs()[:8])
    changes = {"eval_strategy": "no", "attn_implementation": "sdpa", "gradient_accumulation_steps": 1}
    changes |= {"dataset_name": data, "save_strategy": "no", "lora_r": 4, "max_steps": 1}
    out = Path("runs/llama3-8b-focalpo-lora-24gb")
    given = options(small, out, **changes)
    assert cli.main(["train", str(ROOT / "examples/recipes/llama3-8b-focalpo-lora-24gb.yaml"), *given]) == 0
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} >= {"down_proj", "q_proj"}
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(compile(block, "docs/training.md", "exec"), {})
    assert load_file("merged/model.safetensors").keys() == load_file(small / "model/model.safetensors").keys()


def test_batches_by_tokens_take_the_place_of_the_recipe_s():
    recipe = ROOT / "examples/recipes/llama3-8b-focalpo.yaml"
    args = job_of(recipe, "--max_tokens_per_batch", 8192, "--use_cpu", "true", "--bf16", "false").config
    assert (args.max_tokens_per_batch, args.per_device_train_batch_size) == (8192, 8)
    with pytest.raises(SystemExit, match="per_device_train_batch_size counts only with"):
        job_of(recipe, "--max_tokens_per_batch=8192", "--per_device_train_batch_size=4", "--use_cpu=true")


def test_the_page_lists_every_recipe():
    rows = re.findall(r"^\| [^|]+ \| `(\S+-)`: (.*) \|$", PAGE, re.M)
    listed = [prefix + name for prefix, names in rows for name in re.findall(r"`(\S+)`", names)]
    assert sorted(listed) == sorted(path.stem for path in RECIPES)


# ------------------------------------------------------------------------------------------- help, and errors


def test_help_fits_a_screen_and_all_of_it_is_trl_s(capsys):
    printed = {}
    for arguments in ("--help", "train --help", "env --help", "train --help-all"):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments.split())
        assert not ended.value.code
        printed[arguments] = capsys.readouterr().out.splitlines()
    everything = printed.pop("train --help-all")
    assert len(everything) > 900
    for name in ("--gamma_schedule", "--lora_target_modules", "--dataset_train_split", "--dry-run"):
        assert any(name in line for line in everything)
    for lines in printed.values():
        assert 5 < len(lines) <= 24
        assert max(map(len, lines)) <= 100
    assert "--resume_from_checkpoint" in "".join(printed["train --help"])


def test_env_names_versions(capsys):
    assert cli.main(["env"]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["focalkern"] == focalkern.__version__
    assert printed["torch"] == metadata.version("torch")


GIVEN = ["--model_name_or_path", "x", "--dataset_name", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model_name_or_path must be given, in a RECIPE or as --model_name_or_path"),
        (["--model_name_or_path", "x"], "dataset_name must be given"),
        (["nowhere.yaml"], "nowhere.yaml is not a file: RECIPE is a YAML file"),
        ([*GIVEN, "--gama", "1"], "the command line has 'gama', which is no field: did you mean gamma"),
        ([*GIVEN, "--beta", "-1"], "beta must be finite and > 0"),
        ([*GIVEN, "--beta", "much"], "argument --beta: invalid float value: 'much'"),
        ([*GIVEN, "--loss_type", "simpo"], "loss_type 'simpo' is 'focalpo' with gamma=0.0"),
        ([*GIVEN, "--report_to", "nobody"], "report_to names nobody, which is not installed"),
        ([*GIVEN, "--resume_from_checkpoint", "x"], "resume_from_checkpoint must be a folder, or true; x is"),
        ([*GIVEN, "--dataset_name", "nowhere"], "dataset_name 'nowhere' cannot be loaded"),
        ([*GIVEN, "--dataset_name", "nowhere.jsonl"], "dataset_name 'nowhere.jsonl' cannot be loaded"),
    ],
)
def test_what_is_wrong_with_a_command_is_said_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *arguments, "--use_cpu", "--bf16", "false", "--output_dir", "out"])
    said = capsys.readouterr().err if ended.value.code == 2 else str(ended.value.code)
    assert message in said


def test_a_recipe_by_its_name_is_told_where_it_is(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=r"did you mean examples/recipes/llama3-8b-simpo\.yaml\?"):
        cli.main(["train", "llama3-8b-simpo"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_the_options_of_a_cpu_are_named():
    with pytest.raises(SystemExit, match="no CUDA device: --dry-run needs none; --use_cpu"):
        cli.main(["train", *GIVEN, "--bf16", "true"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama: 1", "has 'gama', which is no field: did you mean gamma"),
        ("- beta", "must hold lines 'field: value'; got list"),
        ("beta: [", "while parsing"),
        ("beta: -1.0\nmodel_name_or_path: x\ndataset_name: x", "beta must be finite and > 0"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_in_a_line(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="focalkern: ") as ended:
        cli.main(["train", str(tmp_path / "recipe.yaml"), "--use_cpu", "--bf16", "false"])
    assert message in str(ended.value)


def test_a_recipe_resumes_by_true(small, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for value in ("true", "false"):
        recipe.write_text(f"resume_from_checkpoint: {value}", encoding="utf-8")
        job = job_of(recipe, *options(small, tmp_path / "out"))
        assert train._checkpoint(job.config) is None
        assert ("the run starts anew" in capsys.readouterr().out) == (value == "true")


def test_a_stream_of_a_file(tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", models.pairs()[:8])
    found, _ = job_of("--model_name_or_path", "x", "--dataset_name", data, "--dataset_streaming").data()
    assert isinstance(found, datasets.IterableDataset)


def test_a_missing_split_is_named(small, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", models.pairs()[:8])
    given = options(small, tmp_path / "out", dataset_name=data, eval_strategy="steps")
    with pytest.raises(SystemExit, match=r"has the splits \['train'\], not \['test'\].*--eval_strategy no"):
        cli.main(["train", *given])


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"model_name_or_path": "./no/model"}, models.pairs()[:8], "no/model"),
        ({}, [{"question": "a", "answer": "b"}] * 8, "chosen"),
    ],
    ids=["model", "columns"],
)
def test_what_makes_no_trainer_is_said_without_a_traceback(changes, rows, message, small, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(SystemExit, match=f"focalkern: .*{message}"):
        cli.main(["train", *options(small, tmp_path / "out", dataset_name=data, **changes)])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": "a",\n', "line 3: Expecting"),
        (b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}\n', "line 1: 'utf-8' codec"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n[1]\n', "line 2: not an object"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_the_line_that_cannot_be_read_is_named(lines, message, folder, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines)
    job = job_of("--model_name_or_path", "x", "--dataset_name", tmp_path if folder else path)
    with pytest.raises(SystemExit, match=rf"train\.jsonl.*{message}"):
        job.data()


def test_without_trl_the_command_says_what_to_install():
    code = """if True:
        import runpy, sys
        sys.modules |= {"trl": None, "matplotlib": None}
        for command in ("env", "train"):
            sys.argv[1:] = [command]
            try:
                runpy.run_module("focalkern", run_name="__main__")
            except SystemExit as ended:
                print(command, ended.code)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-2:] == ["env 0", "train 2"]
    assert 'focalkern train needs the trl extra: pip install ".[trl]"' in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the weights that are published under the name
    [
        ("HuggingFaceH4/mistral-7b-sft-beta", 7_241_732_096),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("google/gemma-2-9b-it", 9_241_705_984),
    ],
)
def test_the_recipes_models_are_known_without_a_network(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.load_config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert name in {job_of(path).model_name for path in RECIPES}


def test_a_folder_s_own_configuration_is_taken(small):
    assert models.load_config(str(small / "model")).hidden_size == 32


def test_the_small_model_keeps_what_tells_its_architecture_apart():
    config = models.tiny(models.load_config("google/gemma-2-9b-it"), models.byte_tokenizer())
    assert (config.final_logit_softcapping, config.attn_logit_softcapping) == (30.0, 50.0)
    assert config.tie_word_embeddings
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.head_dim == config.query_pre_attn_scalar == 16


def test_there_are_64_pairs_that_differ():
    rows = models.pairs()
    assert len({row["prompt"] for row in rows}) == len(rows) == 64
    assert all(row["chosen"] != row["rejected"] for row in rows)
