"""`focalkern plan`: its bytes against what small models allocate on the CPU, and what it says."""

from __future__ import annotations

import dataclasses
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft import LoraConfig
from PIL import Image
from trl_tiny import TOKENIZER, random_model, settings, trainer_of

from focalkern import linear_logps
from focalkern.cli import budget
from focalkern.cli.budget import GIB, Budget, Engine
from focalkern.cli.main import main
from focalkern.cli.memory import LiveBytes, activations
from focalkern.trl import FocalPOConfig

# Under a device torch learns its constructors once; not when conftest has poisoned `torch.empty`.
with torch.device("meta"):
    torch.empty(1)

ROOT = Path(__file__).resolve().parents[1]
LENGTH, PAIRS = 64, 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "vocab_size": 512,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_implementation": "eager", "sliding_window": 16}
MODELS = {"Llama": {}, "Mistral": {"sliding_window": 16}, "Gemma2": GEMMA}
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def near(found: float, expected: float, tolerance: float = 0.15) -> bool:
    print(f"{found / expected - 1:+.1%}")
    return abs(found / expected - 1) <= tolerance


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 512, (2 * PAIRS, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # without padding transformers makes no mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_activations_are_those_that_autograd_saves(kind, precision):
    autocast, dtype = precision == "autocast", torch.bfloat16 if precision == "bf16" else torch.float32
    model = random_model(kind, **SIZES, **MODELS[kind]).train().to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        output = model.model(**batch(), use_cache=False)  # keeps all alive
    expected = sum(storage.nbytes() for storage in saved.values())
    found = activations(model.config, None, dtype, autocast, False, True, 2 * PAIRS, LENGTH)
    assert near(found.kept, expected), output


@pytest.mark.parametrize("kind", MODELS)
def test_checkpoints_and_the_layer_that_is_run_again(kind):
    model = random_model(kind, **SIZES, **MODELS[kind]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held = [x for p in model.parameters() for x in (p, p.grad)]
    with LiveBytes([*held, *model.buffers()]) as live:
        hidden = model.model(**batch(), use_cache=False).last_hidden_state
        kept, live.peak = live.now, 0
        hidden.sum().backward()
    found = activations(model.config, None, torch.float32, False, True, True, 2 * PAIRS, LENGTH)
    assert near(found.kept, kept)
    assert near(found.backward_peak, live.peak)


def budget_of(model, tmp_path, peft_config=None, gpus=1, **changes) -> Budget:
    config = deepcopy(model.config)
    args = FocalPOConfig(
        **settings(
            tmp_path,
            **{
                "per_device_train_batch_size": PAIRS,
                "gradient_accumulation_steps": 2,
                "max_steps": 2,
                "max_length": LENGTH,
                "optim": "adamw_torch",
                "reference_free": True,
                **changes,
            },
        )
    )
    return Budget("tiny", config, args, torch.float32, gpus, 40 * GIB, peft_config)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpoints", "no checkpoints"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_a_step_of_the_trainer_takes_what_was_planned(kind, checkpointing, peft_config, tmp_path):
    model = random_model(kind, **{**SIZES, **MODELS[kind], "vocab_size": len(TOKENIZER)})
    planned = budget_of(model, tmp_path, peft_config, gradient_checkpointing=checkpointing)
    text = " blue." * LENGTH  # cut to max_length
    pairs = [{"prompt": "The", "chosen": text, "rejected": rejected} for rejected in (text[:-2], " green.")]
    records = (pairs[:1] * (PAIRS - 1) + pairs[1:]) * 4
    trainer = trainer_of(planned.args, model, records=records, peft_config=peft_config)
    step, peaks = trainer.training_step, []

    def measured(*args, **kwargs):
        held = [*trainer.model.parameters(), *trainer.model.buffers()]
        states = [x for state in trainer.optimizer.state.values() for x in state.values()]
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        with LiveBytes([*held, *states, *gradients]) as live:
            loss = step(*args, **kwargs)
        peaks.append(live.peak + sum(x.nbytes for x in gradients))
        optimizer.append(sum(x.nbytes for x in states if torch.is_tensor(x)))
        return loss

    optimizer: list[int] = []
    trainer.training_step = measured
    trainer.train()
    found = planned.per_gpu(Engine.of("ddp"))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert found["parameters"] == sum(p.nbytes for p in trainer.model.parameters())
    assert near(found["optimizer state"], optimizer[-1])
    step_bytes = found["gradients"] + found["activations kept"] + found["a layer, or the head"]
    assert near(step_bytes, max(peaks))
    assert found["gradients"] == sum(p.nbytes for p in trained)


HEAD = budget.Sizes(vocab=8192, hidden=256)


def measured_head(head, trained: bool) -> int:
    """Bytes of forward and backward, from hidden [2, 256, H] whose tokens are all in completions."""
    hidden = torch.randn(2, 257, HEAD.hidden).requires_grad_()
    weight = torch.randn(HEAD.vocab, HEAD.hidden).requires_grad_(trained)
    labels = torch.randint(0, HEAD.vocab, (2, 257))
    with LiveBytes([hidden, weight, labels]) as live:
        head(hidden, weight, labels).sum().backward()
    return live.peak


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_fused_head(trained, monkeypatch):
    # The torch form's workspace: two tiles of logits, of 4096 vocabulary entries.
    monkeypatch.setattr(budget, "WORKSPACE_BYTES", 2 * 4 * 4096 * 512)
    sizes = dataclasses.replace(HEAD, head_is_trained=trained)
    outputs = ("entropy", "mean_logits", "is_top1")

    def head(hidden, weight, labels):
        return linear_logps(hidden, weight, labels, shift=True, backward="exact", outputs=outputs).logps

    assert near(budget.fused_head(sizes, 512, torch.float32), measured_head(head, trained))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_plain_head(trained):
    sizes = dataclasses.replace(HEAD, head_is_trained=trained)

    def head(hidden, weight, labels):
        logits = torch.nn.functional.linear(hidden, weight)
        return torch.nn.functional.cross_entropy(logits.mT.float(), labels, reduction="none")

    assert near(budget.plain_head(sizes, 514, torch.float32), measured_head(head, trained))


# ------------------------------------------------------------------------------------------- the cost model


def bytes_per_parameter(name: str, tmp_path: Path, **changes) -> float:
    planned = budget_of(random_model(**SIZES), tmp_path, gpus=8, bf16=True, **changes)
    parts = planned._states(Engine.of(name))
    return sum(parts[row] for row in ("parameters", "gradients", "optimizer state")) / planned.sizes.total


@pytest.mark.parametrize(
    ("name", "expected"),  # docs/scaling.md; without an engine, weights are in fp32
    [("ddp", 16), ("zero2", 2 + 2 / 8 + 12 / 8), ("zero3", 16 / 8), ("fsdp2", 16 / 8)],
)
def test_states_of_a_parameter(name, expected, tmp_path):
    assert bytes_per_parameter(name, tmp_path) == pytest.approx(expected)


def test_an_optimizer_of_8_bits(tmp_path):
    assert bytes_per_parameter("zero3", tmp_path, optim="adamw_bnb_8bit") == pytest.approx(10 / 8)


def test_a_reference_model_counts_unless_its_log_probs_are_precomputed(tmp_path):
    model, options = random_model(**SIZES), {"reference_free": False, "bf16": True}
    with_model, precomputed, lora = (
        budget_of(model, tmp_path, gpus=4, **options),
        budget_of(model, tmp_path, gpus=4, precompute_ref_log_probs=True, **options),
        budget_of(model, tmp_path, LORA, gpus=4, **options),
    )
    found = with_model._states(Engine.of("zero3"))["reference model"]
    assert found == pytest.approx(2 * with_model.sizes.total / 4)
    for other in (precomputed, lora):
        assert other._states(Engine.of("zero3"))["reference model"] == 0
    host = with_model.host(Engine.of("zero2"))["while loading"]
    assert host == 2 * precomputed.host(Engine.of("zero2"))["while loading"]


@pytest.mark.parametrize(("what", "expected"), [("optimizer", 14 / 4), ("parameters", 2 / 4)])
def test_what_is_offloaded_is_on_the_host(what, expected, tmp_path):
    planned = budget_of(random_model(**SIZES), tmp_path, gpus=4, bf16=True)
    plain = Engine.of("zero3")
    offloaded = dataclasses.replace(plain, **{f"offloads_{what}": True})
    saved = planned.total(plain) - planned.total(offloaded)
    assert saved == pytest.approx(expected * planned.sizes.total)
    assert planned.host(offloaded)["offloaded"] == pytest.approx(4 * saved)
    assert planned.host(plain)["offloaded"] == 0


@pytest.mark.parametrize(("name", "expected"), [("zero2", 16), ("zero3", 14), ("fsdp2", 16)])
def test_bytes_of_a_checkpoint_per_parameter(name, expected, tmp_path):
    planned = budget_of(random_model(**SIZES), tmp_path, gpus=4, bf16=True)
    assert planned.checkpoint(Engine.of(name)) == expected * planned.sizes.total


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "LoRA"])
def test_a_checkpoint_has_the_size_that_was_planned(peft_config, tmp_path):
    model = random_model(**{**SIZES, "vocab_size": len(TOKENIZER), "hidden_size": 256})
    planned = budget_of(model, tmp_path, peft_config, save_strategy="steps", save_steps=2)
    trainer_of(planned.args, model, peft_config=peft_config).train()
    files = [*tmp_path.glob("checkpoint-2/*.safetensors"), tmp_path / "checkpoint-2/optimizer.pt"]
    assert len(files) == 2
    assert near(planned.checkpoint(Engine.of("ddp")), sum(file.stat().st_size for file in files))


def test_fsdp2_as_it_is_configured(tmp_path):
    planned = budget_of(random_model(**SIZES), tmp_path, gpus=4, bf16=True)
    engine, total = Engine.of("fsdp2"), planned.sizes.total
    kept = dataclasses.replace(engine, reshards=False)
    assert planned._states(kept)["parameters gathered"] == 2 * total
    assert planned._states(engine)["parameters gathered"] < 2 * total
    once = dataclasses.replace(engine, loads_once=True, saves_whole=False)
    assert planned.host(engine)["while loading"] == 4 * planned.host(once)["while loading"] == 16 * total
    assert planned.host(engine)["while saving"] == 12 * total
    assert planned.host(once)["while saving"] == 0


@pytest.mark.parametrize(
    ("attention", "pairs", "times"),
    [("sdpa", 5, 1), ("eager", 5, 1), ("flash_attention_2", 1, 5), ("flex_attention", 1, 5)],
)
def test_larger_batches_are_extrapolated(attention, pairs, times, tmp_path):
    model = random_model(**SIZES)
    model.config._attn_implementation = attention
    planned = budget_of(model, tmp_path)
    options = (torch.float32, False, True)
    ran = activations(planned.config, None, *options, True, 2 * pairs, times * LENGTH)
    assert list(planned._activations(*options, pairs, times * LENGTH)) == pytest.approx(list(ran), rel=0.02)


def test_operations_are_those_of_the_layers(tmp_path):
    planned = budget_of(random_model(**SIZES), tmp_path, gradient_checkpointing=True, num_train_epochs=2)
    body = planned.sizes.layers * planned.sizes.layer
    assert 1 < planned.flops(10, 100) / (2 * 10 * 100 * 8 * body) < 1.6  # attention and head besides


ACCELERATE = ROOT / "examples/accelerate"


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_an_accelerate_file_is_its_engine(name):
    assert Engine.of(str(ACCELERATE / f"{name}.yaml")) == Engine.of(name)


def test_offloading_is_read_from_the_file(tmp_path):
    text = (ACCELERATE / "zero3.yaml").read_text().replace("optimizer_device: none", "optimizer_device: cpu")
    (tmp_path / "offload.yaml").write_text(text)
    assert Engine.of(str(tmp_path / "offload.yaml")).offloads_optimizer
    text = (ACCELERATE / "zero3.yaml").read_text().replace("zero_stage: 3", "zero_stage: 1")
    (tmp_path / "one.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"one.yaml must configure ZeRO-2, ZeRO-3, FSDP"):
        Engine.of(str(tmp_path / "one.yaml"))


# ---------------------------------------------------------------------------------------------- the command

RECIPES = ROOT / "examples/recipes"


def run(options: str, recipe: str = "llama3-8b-focalpo") -> int:
    return main(["plan", str(RECIPES / f"{recipe}.yaml"), *options.split()])


def test_a_recipe_that_fits(tmp_path, capsys):
    assert run(f"--plot {tmp_path / 'plan.png'}") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "8.03 billion parameters, all trained" in printed
    assert "128 pairs a step" in printed
    table = [line.split("|")[2:-1] for line in printed.splitlines() if "|" in line]
    engines, _, *cells = ([cell.strip() for cell in row] for row in table)
    assert engines == ["ddp", "zero2", "zero3 *", "fsdp2"]
    *parts, total, _, _, _ = (float(row[2]) for row in cells)
    assert sum(parts) == pytest.approx(total, abs=0.5)
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.size[0] == 960
        assert len(picture.convert("RGB").getcolors(2**20)) > 8  # the parts


def test_a_recipe_that_does_not_fit_says_what_does(capsys):
    assert run("--engine zero2 --per_device_train_batch_size 8") == 1
    printed = capsys.readouterr().out
    assert "does NOT fit" in printed
    found = [line.split(":")[0] for line in printed.split("What fits:\n")[1].splitlines()]
    assert any("--engine zero3" in line for line in found)
    assert any("--per_device_train_batch_size" in line for line in found)
    assert any("--use_peft" in line for line in found)
    for options in found:
        batch = "" if "batch" in options else "--per_device_train_batch_size 8"
        assert run(f"{options} {batch} --row") == 0


def test_nothing_fits(capsys):
    assert run("--gpus 1 --gpu-memory 10GB") == 1
    assert "take more GPUs, or larger ones" in capsys.readouterr().out


def test_all_engines_are_tried_on_two_gpus(tmp_path):
    planned = budget_of(random_model(**SIZES), tmp_path, gpus=2)
    changes = [change for change, _ in planned.alternatives(Engine.of("ddp"))]
    tried = [change.split()[1] for change in changes if "peft" not in change]
    assert tried == list(budget.ENGINES)


REFUSED = {
    "--engine zero9": "--engine must be one of",
    "--gpu-memory 1GB": "must be more than 2GB, such as 40GB; got '1GB'",
    "--gpus 0": "--gpus must be at least 1; got 0",
    "--mfu 0": "--mfu: must be a number above 0; got '0'",
    "--pairs many": "--pairs: must be a number above 0; got 'many'",
    "--engine ddp --gpus 1 --gpu-memory 999 --plot nowhere/x.png": "--plot nowhere/x.png cannot be drawn: ",
    "--attn_implementation sdpa": "a plan knows no attn_implementation='sdpa': it needs flex_attention",
    "--optim adafactor": "a plan knows no optim='adafactor'",
    "--padding_free true --max_tokens_per_batch 4096 --per_device_train_batch_size 8": (
        "a plan knows no max_tokens_per_batch=4096"
    ),
    "--load_in_4bit true": "a plan knows no load_in_4bit=True",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_a_plan_does_not_know_is_said(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(options)
    assert REFUSED[options] in f"{stopped.value}{capsys.readouterr().err}"
