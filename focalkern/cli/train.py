"""Train a model by a recipe, alone or behind `accelerate launch -m focalkern` and `torchrun -m focalkern`.

    focalkern train RECIPE [--field value ...]
    accelerate launch --config_file examples/accelerate/zero3.yaml -m focalkern train RECIPE

Every field of FocalPOConfig (with TRL's DPOConfig), ModelConfig and ScriptArguments is an option that
overrides the recipe. Those most in use:
  --model_name_or_path M     a folder, or an id of the Hugging Face Hub
  --dataset_name D           an id, a .jsonl file, or a folder with train.jsonl and test.jsonl
  --output_dir O             the model, its checkpoints and card, progress.png
  --learning_rate, --beta, --gamma, --max_length, --max_steps, --per_device_train_batch_size
  --resume_from_checkpoint C a checkpoint's folder, or "true" for the last one in output_dir
  --attn_implementation sdpa without FlashAttention; --use_cpu --bf16 false without a GPU
"""

from __future__ import annotations

import argparse

from focalkern.cli.job import Job, on_this_machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="two steps of a tiny model of the same architecture on 64 built-in pairs, offline",
    )


def overrides(arguments: argparse.Namespace) -> list[str]:
    return on_this_machine(arguments) if arguments.dry_run else []


def run(arguments: argparse.Namespace) -> int:
    job: Job = arguments.job
    train, held_out = job.data()
    trainer = job.trainer(train, held_out)
    trainer.train(resume_from_checkpoint=job.config.resume_from_checkpoint)
    trainer.save_model(job.config.output_dir)
    return 0
