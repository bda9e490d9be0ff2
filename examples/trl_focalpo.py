"""Preference training of a causal LM with TRL: FocalPO, DynamicFocalPO, α-DPO, SimPO, or any of TRL's losses.

    python examples/trl_focalpo.py --model_name_or_path PATH_OR_ID --dataset_name PATH_OR_ID --output_dir out
    accelerate launch --config_file examples/accelerate/zero3.yaml examples/trl_focalpo.py --config RECIPE

Every field of `FocalPOConfig` (with TRL's `DPOConfig`), of TRL's `ModelConfig` (LoRA, quantisation,
attention) and `ScriptArguments` is an option: `--help` lists them. The dataset is one of the Hugging Face
Hub, a JSON Lines file with "prompt", "chosen" and "rejected", each plain text or a conversation, or a
folder with train.jsonl and test.jsonl, to evaluate too. Without a GPU add --use_cpu, without FlashAttention
--attn_implementation sdpa. RECIPE is one of examples/recipes: the papers' own hyper-parameters for 7B and 8B
models. For several GPUs there are ZeRO-2, ZeRO-3 and FSDP2 in examples/accelerate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import DatasetDict, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from focalkern.trl import FocalPOConfig, FocalPOTrainer


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and the commands above on lines of their own."""


def main(arguments: Sequence[str] | None = None) -> FocalPOTrainer:
    parser = TrlParser(
        (ScriptArguments, FocalPOConfig, ModelConfig), description=__doc__, formatter_class=HelpFormatter
    )
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    script, config, model = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    if model.model_name_or_path is None or script.dataset_name is None:
        parser.error("--model_name_or_path and --dataset_name must be given")
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    dataset = load(script)
    wanted = [script.dataset_train_split] + [script.dataset_test_split] * (config.eval_strategy != "no")
    missing = [name for name in wanted if name not in dataset]
    if missing:
        parser.error(
            f"{script.dataset_name} has the splits {list(dataset)}, not {missing}: give a folder with"
            " train.jsonl and test.jsonl, or name its splits by --dataset_train_split, --dataset_test_split"
        )
    trainer = FocalPOTrainer(
        model.model_name_or_path,
        args=config,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if config.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)
    trainer.accelerator.print(f"The model is in {config.output_dir}.")
    if hasattr(trainer, "end"):  # from transformers 5.18: closes trackers and process group
        trainer.end()
    return trainer


def load(script: ScriptArguments) -> DatasetDict:
    path = Path(script.dataset_name)
    for file in [path] if path.is_file() else sorted(path.glob("*.jsonl")):
        if file.suffix == ".jsonl":
            check_lines(file)
    if script.dataset_name.endswith((".jsonl", ".json")):
        return load_dataset("json", data_files={script.dataset_train_split: script.dataset_name})
    return load_dataset(script.dataset_name, script.dataset_config, streaming=script.dataset_streaming)


def check_lines(file: Path) -> None:
    """Exit with the number of the first line that is not a JSON object."""
    if not file.stat().st_size:
        raise SystemExit(f"{file} is empty")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ValueError("not an object with prompt, chosen and rejected")
            except ValueError as error:
                raise SystemExit(f"{file}, line {number}: {error}") from None


if __name__ == "__main__":
    main()
