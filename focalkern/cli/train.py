"""Train a model by a recipe: alone, or on several GPUs by `accelerate launch` and `torchrun`.

    focalkern train RECIPE [--field value ...]
    accelerate launch --config_file CONFIG -m focalkern train RECIPE

Every field of FocalPOConfig and of TRL's ModelConfig overrides the recipe, such as:
  --model_name_or_path M     a folder, or an id of the Hugging Face Hub
  --dataset_name D           an id, a .jsonl file, or a folder with train.jsonl and test.jsonl
  --output_dir O             the model, its checkpoints and card, progress.png
  --learning_rate, --beta, --gamma, --max_length, --max_steps, --per_device_train_batch_size
  --resume_from_checkpoint C a checkpoint's folder, or "true" for the last one in output_dir
  --attn_implementation sdpa --use_cpu --bf16 false without a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from focalkern.cli import models
from focalkern.cli.job import Job, fail, on_this_machine
from focalkern.trl import FocalPOConfig, FocalPOTrainer, ProgressPlot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="two steps of a tiny model of the same architecture, offline, on 64 built-in pairs",
    )


def overrides(arguments: argparse.Namespace) -> list[str]:
    if not arguments.dry_run:
        return []
    fields = "--max_steps 2 --gradient_accumulation_steps 2 --logging_steps 1 --report_to none"
    fields += " --precompute_ref_batch_size 16"
    if not torch.cuda.is_available():
        fields += " --attn_implementation eager"  # the one that has every model's softcaps
    return [*fields.split(), "--push_to_hub", "false", *on_this_machine(arguments)]


def run(arguments: argparse.Namespace) -> int:
    job: Job = arguments.job
    if not arguments.dry_run:
        trainer = train(job)
        trainer.accelerator.print(f"The model is in {job.config.output_dir}.")
    else:
        with scratch() as folder:
            make_small(job, folder)
            trainer = train(job)
            trainer.accelerator.wait_for_everyone()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.accelerator.print(f"The dry run is done, its files are gone. Losses: {losses}")
    trainer.accelerator.end_training()  # closes trackers and process group
    return 0


def train(job: Job) -> FocalPOTrainer:
    """The trained trainer. Its model, card, log and plot are in `output_dir`."""
    config = job.config
    missing = set(config.report_to) - set(get_available_reporting_integrations())
    if missing:
        fail(
            f"report_to names {', '.join(missing)}, which is not installed: --report_to none does without;"
            ' tensorboard comes with pip install ".[watch]" in the clone'
        )
    checkpoint = _checkpoint(config)
    train_data, held_out = job.data()
    callbacks = []
    try:
        callbacks = [ProgressPlot()]
    except ImportError as error:
        PartialState().print(f"No progress.png: {error}")
    trainer = job.trainer(train_data, held_out, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(config.output_dir)
    trainer.save_state()
    trainer.create_model_card(Path(config.output_dir).name, job.script.dataset_name)
    return trainer


def _checkpoint(config: FocalPOConfig) -> str | None:
    """The folder to resume from. A run does not start among the checkpoints of another."""
    asked, folder = config.resume_from_checkpoint, config.output_dir  # a recipe's true is a bool
    last = _last_checkpoint(Path(folder))
    if asked in (None, False, "false"):
        if last is not None:
            fail(
                f"output_dir {folder} has checkpoints: --resume_from_checkpoint true goes on from {last};"
                " give another --output_dir to start anew"
            )
        return None
    if asked not in (True, "true"):
        if not Path(asked).is_dir():
            fail(f"resume_from_checkpoint must be a folder, or true; {asked} is none")
        return asked
    if last is None:
        PartialState().print(f"No checkpoint in {folder}: the run starts anew.")
    return last


def _last_checkpoint(folder: Path) -> str | None:
    """The last that is whole: of a checkpoint the trainer's state is written last."""
    steps = {
        int(step): state.parent
        for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        if (step := state.parent.name.rpartition("-")[2]).isdecimal()
    }
    return str(steps[max(steps)]) if steps else None


def make_small(job: Job, folder: Path) -> None:
    """Swap model and data of the job for small ones in `folder`, and write there alone."""
    PartialState().print("Dry run: a tiny model and built-in pairs; those of the job are not read.")
    if PartialState().is_local_main_process:
        models.write_tiny(job.model_config(), folder)
    PartialState().wait_for_everyone()
    job.model.model_name_or_path, job.model.model_revision = str(folder / "model"), "main"
    job.config.model_init_kwargs = {**(job.config.model_init_kwargs or {}), "revision": "main"}
    job.script.dataset_name, job.script.dataset_config = str(folder / "data"), None
    job.script.dataset_train_split, job.script.dataset_test_split = "train", "test"
    job.cache_dir, job.config.output_dir = str(folder / "cache"), str(folder / "out")
    job.config.resume_from_checkpoint = None


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that the ranks of a machine share, and that is gone afterwards."""
    state = PartialState()
    made = [tempfile.mkdtemp(prefix="focalkern-") if state.is_main_process else None]
    folder = Path(broadcast_object_list(made)[0])
    folder.mkdir(exist_ok=True)  # on other machines
    try:
        yield folder
    finally:
        if state.is_local_main_process:
            shutil.rmtree(folder, ignore_errors=True)
