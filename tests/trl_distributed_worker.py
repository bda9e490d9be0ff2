"""Trainings with `FocalPOTrainer` that test_trl_distributed.py has run by one process, and by several ranks.

    accelerate launch --config_file CONFIG tests/trl_distributed_worker.py INPUTS OUT NAME...

INPUTS has model, reference and pairs, as the test wrote them. A training leaves in OUT/NAME the saved model,
its checkpoints and `history.json`, what it has logged.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, ParallelismConfig
from datasets import Dataset, load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tolerance import relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl_tiny import history, settings, trainer_of

import focalkern.trl
from focalkern.cli import train as command
from focalkern.cli.job import Job
from focalkern.cli.main import main as main_of_the_command
from focalkern.trl import FocalPOConfig, FocalPOTrainer
from focalkern.trl.head import add_fused_lm_head

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
BATCH = 4  # pairs of all ranks
IS_FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"
IS_DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
LORA = LoraConfig(
    r=4,
    lora_alpha=16,
    lora_dropout=0.0,
    init_lora_weights=False,  # of some size from the start
    task_type="CAUSAL_LM",
    target_modules=["lm_head", "q_proj", "down_proj"],
)
BF16 = {"bf16": True, "gamma": 0.3}
# Options of the configuration; the folder of a reference, an adapter, and whose trainer it is.
TRAININGS: dict[str, dict[str, Any]] = {
    "alpha-DPO with a schedule": {
        "reference": "reference",
        "alpha": 0.5,
        "beta": 2.0,
        "margin": 1.0,
        "reference_free": True,
        "length_normalize": True,
        "gamma_schedule": "cosine",
        "gamma_max": 0.5,
        "gamma_min": 0.1,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 2,
        **EVALUATED,
    },
    "packed, precomputed": {
        "reference": "reference",
        "gamma": 0.3,
        "padding_free": True,
        "precompute_ref_log_probs": True,
        "gradient_accumulation_steps": 1,
        **EVALUATED,
    },
    "LoRA on the head": {"peft": LORA, "gamma": 0.3, "share_prompt": True, **EVALUATED},
    "batches by tokens": {
        "reference": "reference",
        "gamma": 0.3,
        "padding_free": True,
        "max_tokens_per_batch": 100,
        "per_device_train_batch_size": 8,  # the default, which does not count
        "gradient_accumulation_steps": 2 // RANKS,  # the same two batches a step
        "max_steps": -1,
        "num_train_epochs": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 3,
    },
    "bf16": {"reference": "reference", **BF16},
    "bf16, LoRA": {"peft": LORA, **BF16},
    "bf16, precomputed": {"reference": "reference", "precompute_ref_log_probs": True, **BF16},
    "bf16, DPO": {"reference": "reference", "bf16": True, "gamma": 0.0},
    "bf16, TRL's DPO": {"reference": "reference", "bf16": True, "trainer": "trl"},
}


def make_trainer(name: str, inputs: Path, folder: Path, **changes) -> FocalPOTrainer | DPOTrainer:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # by the launcher; the options say otherwise or do not
    options = {"reference": None, "peft": None, "trainer": "focal", "in_memory": False, **TRAININGS[name]}
    options |= changes
    reference, peft, owner, in_memory = (
        options.pop(key) for key in ("reference", "peft", "trainer", "in_memory")
    )
    trainer_class, config_class = (
        (DPOTrainer, DPOConfig) if owner == "trl" else (FocalPOTrainer, FocalPOConfig)
    )
    sizes = {f"per_device_{kind}_batch_size": BATCH // RANKS for kind in ("train", "eval")}
    args = config_class(**settings(folder, max_steps=4, **sizes) | options)
    shard_small_models(args)
    cache = str(inputs / f"cache-{os.getppid()}")  # that of another run has the reference log-probs already
    pairs = load_dataset("json", data_files={"train": str(inputs / "pairs.jsonl")}, cache_dir=cache)["train"]
    if in_memory:
        pairs = Dataset.from_list(list(pairs))
    model: Any = str(inputs / "model")
    given = {"peft_config": peft} if peft else {}
    if reference:
        given["ref_model"] = AutoModelForCausalLM.from_pretrained(inputs / reference)
    if peft:
        # The adapters are drawn before the trainer sets its seed, and how much loading a model draws depends
        # on what the process has run before.
        model = AutoModelForCausalLM.from_pretrained(model)
        torch.manual_seed(0)
    return trainer_of(args, model, trainer_class=trainer_class, records=pairs, eval_dataset=pairs, **given)


def shard_small_models(args: DPOConfig) -> None:
    if IS_FSDP:  # which accelerate leaves out on a CPU, where PyTorch has it
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    if IS_DEEPSPEED:  # else it leaves parameters as small as these whole
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def train(name: str, inputs: Path, out: Path, resume_from: Path | None = None, **changes) -> None:
    folder = out / name
    if TRAININGS[name].get("trainer") == "trl":
        with focalkern.trl.patch():
            trainer = make_trainer(name, inputs, folder, **changes)
    else:
        trainer = make_trainer(name, inputs, folder, **changes)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    if RANKS > 1 and (IS_FSDP or getattr(trainer.args.deepspeed_plugin, "zero_stage", 0) == 3):
        check_sharded(trainer.model)
        if trainer.ref_model is not None:
            check_sharded(trainer.accelerator.unwrap_model(trainer.ref_model))
    trainer.save_model(str(folder))
    if trainer.accelerator.is_main_process:
        (folder / "history.json").write_text(json.dumps(history(trainer)), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def check_sharded(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what the last forward has left gathered for a backward
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            local = parameter.to_local().numel()
        else:  # of ZeRO-3
            assert hasattr(parameter, "ds_tensor"), f"{name} is not sharded"
            local = parameter.ds_tensor.numel()
            assert not parameter.ds_persist, f"{name} is kept whole"
        size = getattr(parameter, "ds_numel", parameter.numel())
        assert local <= -(-size // RANKS), f"{name}: {local} of {size} are here"


def resume(name: str, inputs: Path, out: Path) -> None:
    """The rest of a training from its first checkpoint, by trainers that know nothing of it."""
    checkpoint = out / name / f"checkpoint-{TRAININGS[name]['save_steps']}"
    train(name, inputs, out / "resumed", resume_from=checkpoint)


def refused(inputs: Path, out: Path) -> None:
    """What the trainer says to parallelism that cuts sequences, and to pairs that ranks cannot share."""
    messages = {}
    launcher = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": str(RANKS)}
    for name, environment, options in (
        ("cp_size", launcher, {}),
        ("sp_size", {}, {"parallelism_config": ParallelismConfig(sp_size=RANKS)}),
        ("precompute_ref_log_probs", {}, {"precompute_ref_log_probs": True, "in_memory": True}),
    ):
        os.environ |= environment
        try:
            make_trainer("LoRA on the head", inputs, out, **options)
        except ValueError as error:
            messages[name] = str(error)
        for key in environment:
            del os.environ[key]
    if os.environ["RANK"] == "0":
        (out / "refused.json").write_text(json.dumps(messages), encoding="utf-8")


def dry_run(inputs: Path, out: Path) -> None:
    """`focalkern train RECIPE --dry-run`, with a look at its trainer before its files are gone."""
    run_training = command.train

    def trained(job: Job) -> FocalPOTrainer:
        shard_small_models(job.config)
        trainer = run_training(job)
        check_sharded(trainer.model)
        folder = Path(job.config.output_dir)
        if trainer.accelerator.is_main_process:
            before, after = (load_file(f"{x}/model.safetensors") for x in (job.model_name, folder))
            found = {
                "moved": sum(not torch.equal(after[name], x) for name, x in before.items()),
                "parameters": len(before),
                "folder": str(folder),
                "files": sorted(path.name for path in folder.iterdir()),
                "history": history(trainer),
            }
            (out / "dry_run.json").write_text(json.dumps(found), encoding="utf-8")
        return trainer

    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    command.train = trained
    recipe = Path(__file__).parents[1] / "examples/recipes/llama3-8b-dynamic-cosine.yaml"
    # It closes the process group: the last of a launch.
    options = ["--dry-run", "--bf16", "false", "--disable_tqdm", "true"]
    assert main_of_the_command(["train", str(recipe), *options]) == 0


def tensor_parallel_head(inputs: Path, out: Path) -> None:
    """How far a head split by vocabulary is from the whole one, in all that the fused head gives."""
    outputs = ("log_probs", "entropy", "mean_logits", "mean_logits_everywhere")
    whole, split = (AutoModelForCausalLM.from_pretrained(inputs / "model") for _ in range(2))
    parallelize_module(split, init_device_mesh("cpu", (RANKS,)), {"lm_head": ColwiseParallel()})
    ids = torch.arange(48).view(4, 12) % whole.config.vocab_size
    found = []
    for model in (whole, split):
        add_fused_lm_head(model, outputs=outputs)
        output = model(input_ids=ids, labels=ids, fused_lm_head=True)
        output.loss.backward()
        head = model.lm_head.weight.grad
        gradients = {"head": head.full_tensor() if isinstance(head, DTensor) else head}
        gradients["body"] = model.model.layers[0].mlp.up_proj.weight.grad
        found.append({name: getattr(output, name) for name in outputs} | gradients)
    errors = {name: relative_error(found[1][name], found[0][name]) for name in found[0]}
    if os.environ["RANK"] == "0":
        (out / "tensor_parallel_head.json").write_text(json.dumps(errors), encoding="utf-8")


def main(inputs: str, out: str, *names: str) -> None:
    others = {"refused": refused, "tensor-parallel head": tensor_parallel_head, "dry run": dry_run}
    for name in names:
        if name.startswith("ZeRO stage "):
            os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = name[-1]
            os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(name[-1] == "3").lower()
        elif name in others:
            others[name](Path(inputs), Path(out))
        elif name.startswith("resumed "):
            resume(name.removeprefix("resumed "), Path(inputs), Path(out))
        else:
            train(name, Path(inputs), Path(out))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
