"""`focalkern plan`: its bytes against what small models allocate on the CPU, and what it says."""

from __future__ import annotations

import dataclasses
from copy import deepcopy

import pytest
import torch

pytest.importorskip("trl")

from peft import LoraConfig
from trl_tiny import TOKENIZER, random_model, settings, trainer_of

from focalkern import linear_logps
from focalkern.cli import budget
from focalkern.cli.budget import GIB, Budget, Engine
from focalkern.cli.memory import LiveBytes, activations
from focalkern.trl import FocalPOConfig

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


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_activations_are_those_that_autograd_saves(kind, autocast):
    model = random_model(kind, **SIZES, **MODELS[kind]).train()
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
    found = activations(model.config, None, torch.float32, autocast, False, True, 2 * PAIRS, LENGTH)
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
