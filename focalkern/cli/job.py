"""`Job`: a recipe and the options over it, as TRL's parser reads them, and what a trainer is made of.

Called by the commands: `train` runs a job, `plan` and `check` look at it.
"""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PretrainedConfig
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from focalkern.cli import models
from focalkern.trl import FocalPOConfig, FocalPOTrainer


def fail(message: object) -> NoReturn:
    """End the command with a line that says what to do."""
    raise SystemExit(f"focalkern: {message}")


@dataclass
class Job:
    """What a recipe says, checked and with every default filled in."""

    script: ScriptArguments
    config: FocalPOConfig
    model: ModelConfig
    recipe: str | None = None
    cache_dir: str | None = None  # of the data; that of the datasets library by default

    @property
    def model_name(self) -> str:
        """Folder or id of the model to start from."""
        assert self.model.model_name_or_path is not None  # read_job has seen to it
        return self.model.model_name_or_path

    def data(self) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
        """The training pairs, and the held-out ones where the job evaluates."""
        dataset = _load(self.script, self.cache_dir)
        train, test = self.script.dataset_train_split, self.script.dataset_test_split
        evaluates = self.config.eval_strategy != "no"
        missing = [name for name in [train] + [test] * evaluates if name not in dataset]
        if missing:
            fail(
                f"{self.script.dataset_name} has the splits {list(dataset)}, not {missing}: give a folder"
                " with train.jsonl and test.jsonl, or name its splits by --dataset_train_split and"
                " --dataset_test_split; --eval_strategy no trains without held-out pairs"
            )
        return dataset[train], dataset[test] if evaluates else None

    def model_config(self) -> PretrainedConfig:
        """Without weights, and for the recipes' models without a network or an account."""
        return models.load_config(self.model_name, self.model.model_revision, self.config.trust_remote_code)

    def trainer_options(self) -> dict[str, Any]:
        """Arguments of `FocalPOTrainer`, but for the data."""
        return {
            "model": self.model_name,
            "args": self.config,
            "quantization_config": get_quantization_config(self.model),
            "peft_config": get_peft_config(self.model),
        }

    def trainer(
        self, train: Dataset | IterableDataset, held_out: Dataset | IterableDataset | None, **options: Any
    ) -> FocalPOTrainer:
        """Fails with a line where model, data or options do not make one."""
        data = {"train_dataset": train, "eval_dataset": held_out}
        try:
            return FocalPOTrainer(**self.trainer_options(), **data, **options)
        except (OSError, ImportError, ValueError, TypeError) as error:
            fail(error)


def read_job(own: argparse.ArgumentParser, command: ModuleType, arguments: list[str]) -> argparse.Namespace:
    """What the command's parser finds, with the job as `job`; exits with a line where something is wrong."""
    parser = TrlParser(
        (ScriptArguments, FocalPOConfig, ModelConfig),
        parents=[own],
        conflict_handler="resolve",  # of -h
        prog=own.prog,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    given, unknown = parser.parse_known_args(arguments)
    if given.help_all:
        parser.print_help()
        parser.exit()
    fields = {action.dest for action in parser._actions} - {action.dest for action in own._actions}
    try:
        if unknown:
            _refuse(unknown[0].partition("=")[0].lstrip("-"), fields, "the command line")
        overrides = getattr(command, "overrides", on_this_machine)(given)
        if given.recipe:
            _check_recipe(given.recipe, fields)
            overrides += ["--config", given.recipe]
        if _given("max_tokens_per_batch", arguments) and not _given("per_device_train_batch_size", arguments):
            # In place of the recipe's batches.
            default = FocalPOConfig.__dataclass_fields__["per_device_train_batch_size"].default
            overrides += ["--per_device_train_batch_size", str(default)]
        script, config, model, options = parser.parse_args_and_config([*arguments, *overrides])
        for field, value in (
            ("model_name_or_path", model.model_name_or_path),
            ("dataset_name", script.dataset_name),
        ):
            if value is None:
                fail(f"{field} must be given, in a RECIPE or as --{field}")
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        if "use_cpu" in str(error):  # transformers' words for: bf16 and no GPU
            fail("no CUDA device: --dry-run needs none; --use_cpu --bf16 false --attn_implementation sdpa"
                 " trains on the CPU")  # fmt: skip
        fail(error)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    options.job = Job(script, config, model, given.recipe)
    return options


def on_this_machine(arguments: argparse.Namespace | None = None) -> list[str]:
    """For a look at a job made for GPUs: without one, transformers refuses bf16 but for the CPU."""
    return [] if torch.cuda.is_available() else ["--use_cpu", "true"]


def _given(field: str, arguments: list[str]) -> bool:
    return any(argument.partition("=")[0] == f"--{field}" for argument in arguments)


def _check_recipe(path: str, fields: set[str]) -> None:
    file = Path(path)
    if not file.is_file():
        near = sorted(str(found) for found in Path("examples/recipes").glob(f"*{file.stem}*.yaml"))
        hint = f"did you mean {', '.join(near)}?" if near else "RECIPE is a YAML file, as in examples/recipes"
        fail(f"{path} is not a file: {hint}")
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        fail(f"{path} must hold lines 'field: value'; got {type(recipe).__name__}")
    for field in recipe:
        if field not in fields | {"env"}:
            _refuse(field, fields, path)


def _refuse(field: str, fields: set[str], where: str) -> NoReturn:
    near = difflib.get_close_matches(field, fields, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "--help-all lists the fields"
    fail(f"{where} has {field!r}, which is no field: {hint}")


def _load(script: ScriptArguments, cache_dir: str | None) -> DatasetDict:
    name = script.dataset_name
    path = Path(name)
    for file in [path] if path.is_file() else sorted(path.glob("*.jsonl")):
        if file.suffix == ".jsonl":
            _check_lines(file)
    options = {"streaming": script.dataset_streaming, "cache_dir": cache_dir}
    try:
        if name.endswith((".jsonl", ".json")):
            return load_dataset("json", data_files={script.dataset_train_split: name}, **options)
        return load_dataset(name, script.dataset_config, **options)
    # No such file, folder or id, no account for it, no network; lines that differ in their fields.
    except (OSError, ValueError, DatasetsError) as error:
        fail(f"dataset_name {name!r} cannot be loaded: {error.__cause__ or error}")


def _check_lines(file: Path) -> None:
    """Fail with the number of the first line that is not a JSON object."""
    if not file.stat().st_size:
        fail(f"{file} is empty")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ValueError("not an object with prompt, chosen and rejected")
            except ValueError as error:
                fail(f"{file}, line {number}: {error}")
