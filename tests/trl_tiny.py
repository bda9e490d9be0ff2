"""What the tests of `focalkern.trl` share: tiny models of random weights, pairs of unequal lengths, and runs.

A run is recorded micro-step by micro-step: the examples as they went into the collator, the loss, and every
gradient as it had accumulated by then.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import accelerate.utils.imports
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tiny import TINY
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from focalkern.trl import FocalPOConfig, FocalPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from preference_data import Pair
from quickstart_parts import train_tokenizer

disable_progress_bars()
gc.freeze()  # every run of transformers collects garbage; over all that is loaded here it takes 0.2 s
# Asked sixty times a run, and every time it reads the metadata of the package.
accelerate.utils.imports._is_package_available = cache(accelerate.utils.imports._is_package_available)

COLOURS = {"sky": "blue", "sea": "green", "door": "brown", "hat": "red", "old stone house": "grey"}
COLOURS |= {"moon": "white", "coal": "black"}
RECORDS = [
    {
        "prompt": f"The {thing} is",
        "chosen": f" {colour}." * (1, 9, 2, 4, 1, 6, 3)[i],
        "rejected": f" not {colour}, no." * (1, 1, 3, 2, 5, 1, 2)[i],
    }
    for i, (thing, colour) in enumerate(COLOURS.items())
]
CONVERSATIONS = [
    {"prompt": [{"role": "user", "content": record["prompt"]}]}
    | {key: [{"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected")}
    for record in RECORDS
]
# Of clipped SGD. Ten times as much, and after one step every pair is either won or lost by far.
LEARNING_RATE = 0.005
WINDOW = 8  # of sliding attention: shorter than most sequences
SIZES = {**TINY, "num_hidden_layers": 2, "max_position_embeddings": 128}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0}


def tokenizer_of(records: list[dict]) -> PreTrainedTokenizerBase:
    return train_tokenizer(
        [Pair(record["prompt"], record["chosen"], record["rejected"], "", "") for record in records]
    )


TOKENIZER = tokenizer_of(RECORDS)
VOCAB = len(TOKENIZER)


def llama() -> PreTrainedModel:
    return sharpened(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SIZES)))


def mistral() -> PreTrainedModel:
    return sharpened(MistralForCausalLM(MistralConfig(vocab_size=VOCAB, sliding_window=WINDOW, **SIZES)))


def gemma2() -> PreTrainedModel:
    """Softcaps of attention and head, every other layer with sliding attention, tied embeddings."""
    config = Gemma2Config(
        vocab_size=VOCAB, sliding_window=WINDOW, attn_implementation="eager", **GEMMA, **SIZES
    )
    return sharpened(Gemma2ForCausalLM(config), 5.0)


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=VOCAB, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.3, **SIZES
    )
    return sharpened(MixtralForCausalLM(config))


MODELS = {"llama": llama, "gemma2": gemma2, "mistral": mistral}


def sharpened(model: PreTrainedModel, factor: float = 20.0) -> PreTrainedModel:
    """Logits of some size; a head of its own expects many of the right tokens after the one it stands at."""
    head, embeddings = (m.weight for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    with torch.no_grad():
        head.mul_(factor)
        texts = [record["chosen"] for record in RECORDS[::2]] + [RECORDS[1]["rejected"]]
        for text in texts if head is not embeddings else ():
            ids = TOKENIZER(text)["input_ids"]
            head.index_add_(0, torch.tensor(ids[1:]), torch.nn.functional.normalize(embeddings[ids[:-1]]))
    return model


def random_model(kind: str = "Llama", seed: int = 0, sharpness: float = 20.0, **options) -> PreTrainedModel:
    """Of any architecture of transformers, with logits of some size."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, "num_hidden_layers": 2, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharpness)
    return model


def seeded(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return make()


def near(model: PreTrainedModel, scale: float = 0.3) -> PreTrainedModel:
    """Another model not far away: a reference."""
    other = deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter) * parameter.abs().mean())
    return other


def settings(folder: Path, **changes) -> dict:
    """Options of a run of 3 steps, 2 micro-batches of at most 2 pairs each, over 7 pairs."""
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "max_length": None,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        **changes,
    }


def trainer_of(args, *models, trainer_class=FocalPOTrainer, records=RECORDS, **options):
    dataset = Dataset.from_list(records) if isinstance(records, list) else records
    options = {"train_dataset": dataset, "processing_class": TOKENIZER, **options}
    trainer = trainer_class(*models, args=args, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def focal_trainer(folder: Path, *models, options: dict | None = None, **changes) -> FocalPOTrainer:
    return trainer_of(FocalPOConfig(**settings(folder, **changes)), *models, **(options or {}))


@dataclass
class Recording:
    examples: list[list[dict]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)

    def add(self, loss: torch.Tensor, model: torch.nn.Module) -> None:
        self.losses.append(loss.detach().float())
        trainable = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.gradients.append({name: p.grad.clone() for name, p in trainable if p.grad is not None})


def recorded(trainer, **train_options) -> Recording:
    """Train, and write down every micro-step. The loss of a micro-step is divided by their number."""
    recording = Recording()
    collate, step = trainer.data_collator, trainer.training_step

    def recording_collator(examples):
        recording.examples.append(deepcopy(examples))
        return collate(examples)

    def recording_step(model, *args, **kwargs):
        loss = step(model, *args, **kwargs)
        recording.add(loss, trainer.model)
        return loss

    trainer.data_collator, trainer.training_step = recording_collator, recording_step
    trainer.train(**train_options)
    trainer.data_collator, trainer.training_step = collate, step
    return recording


def assert_same_run(actual: Recording, expected: Recording, rtol: float) -> None:
    """Every loss, and every gradient relative to its norm."""
    assert len(actual.losses) == len(expected.losses) > 0
    for i, (ours, theirs) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        assert (ours - theirs).abs() <= rtol * theirs.abs(), f"loss {i}: {ours:.6g}, expected {theirs:.6g}"
    assert all(any(g[name].any() for g in expected.gradients) for name in expected.gradients[-1])
    for i, (ours, theirs) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            difference, size = (ours[name] - theirs[name]).norm(), theirs[name].norm()
            assert difference <= rtol * size, f"{name} at {i}: off by {difference / size:.1e}"


class Killed(Exception):
    """By `KillAt`, in the middle of a training."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


_OF_THE_CLOCK = ("runtime", "per_second")


def history(trainer) -> list[dict[str, float]]:
    """All that was logged, without what the clock says."""
    logged = trainer.state.log_history
    return [{k: v for k, v in entry.items() if not k.endswith(_OF_THE_CLOCK)} for entry in logged]


def assert_same_history(actual, expected, rtol: float, atol: float, without: tuple[str, ...] = ()) -> None:
    """Whatever `expected` has logged, `actual` has too, with the same values."""
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        for name in theirs.keys() - set(without):
            assert name in ours, f"{name} is not logged"
            difference = abs(ours[name] - theirs[name])
            where = f"{name} at step {theirs['step']}"
            assert difference <= atol + rtol * abs(theirs[name]), f"{where}: {ours[name]} != {theirs[name]}"
