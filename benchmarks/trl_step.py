"""A DPO step in TRL: as it is, under `focalkern.trl.patch()`, and with `FocalPOTrainer`, padded and packed.

    python benchmarks/trl_step.py --json result.json   # a tiny Llama, vocabulary of 128256: some minutes
    python benchmarks/trl_step.py --quick              # whether all of it runs

A step is `training_step` of a real trainer on docstrings of Python's standard library: forward of policy and
reference, loss, metrics, backward. The optimizer's step is the same for all and left out. Loss and gradients
are compared with those of TRL in fp32. Steps are timed in one interleaved run. Memory, beyond model and
gradients, is measured in a process of its own. The weights are random, and the final norm's scale makes the
softmax as sharp as a trained model's. Only 4096 words of the vocabulary are ever a label. On a CPU TRL's head
computes every position, on a GPU only those of completions.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from preference_data import Pair, docstring_pairs
from quickstart_parts import train_tokenizer

from benchmarks import parser_of
from benchmarks.inputs import PRESENT
from benchmarks.measure import PeakMemory, Step, in_fresh_process, interleaved_times, peak_extra_bytes
from benchmarks.report import MIB, environment, write_json
from focalkern.trl import FocalPOConfig, FocalPOTrainer, patch

TRL, PATCHED = "TRL", "TRL under patch()"
PADDED, PACKED = "FocalPOTrainer", "FocalPOTrainer, packed"
NAMES = (TRL, PATCHED, PADDED, PACKED)
CPU = torch.device("cpu")
# Of loss and gradient, relative to TRL's in fp32: what fp32 may be off by, and what 16 bits may, in multiples
# of TRL's own error.
FP32_ERROR = 1e-4
ERROR_FACTOR = 1.2


@dataclass(frozen=True)
class Setup:
    """What is measured: everything that a fresh process needs to build it again."""

    hidden: int
    layers: int
    vocab: int
    pairs: int
    dtype: str = "bf16"  # autocast over fp32 weights, as TRL trains by default
    entries: int = 50  # softmax entries above 2^-12 per token
    scale: float = 1.0  # of the final norm


SETUP, REPEATS = Setup(hidden=256, layers=2, vocab=128256, pairs=16), 5
QUICK, QUICK_REPEATS = Setup(hidden=64, layers=1, vocab=8192, pairs=4), 2


@dataclass
class Contestant:
    """A trainer and its batch, ready for one step after the other."""

    trainer: DPOTrainer
    model: torch.nn.Module
    inputs: dict[str, Any]

    def step(self) -> torch.Tensor:
        return self.trainer.training_step(self.model, dict(self.inputs), None)

    def gradients(self) -> list[torch.Tensor]:
        """Those of the last step; the model is then without."""
        found = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return found


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    parser.add_argument("--quick", action="store_true", help="a small model, 4 pairs, 2 rounds")
    options = parser.parse_args(argv)
    settle()
    setup, repeats = (QUICK, QUICK_REPEATS) if options.quick else (SETUP, REPEATS)
    about = {**environment("cpu"), "repeats": repeats}
    comparisons = [compare(replace(setup, dtype=dtype), repeats) for dtype in options.dtype]
    if options.json:
        write_json({**about, "comparisons": comparisons}, options.json)
        print(f"written to {options.json}")
    return 0 if all(row["agrees"] for found in comparisons for row in found["rows"].values()) else 1


def settle() -> None:
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def compare(setup: Setup, repeats: int) -> dict[str, Any]:
    setup = replace(setup, scale=scale_for(setup))
    found = {"setup": asdict(setup), **timed(setup, repeats)}
    for name in tqdm(NAMES, desc=f"{setup.dtype}, memory", leave=False):
        memory = in_fresh_process(memory_of, name, setup)
        found["rows"][name] |= {"extra_mib": memory.extra / MIB, "extra_is_upper_limit": memory.upper_limit}
    show(found)
    return found


def timed(setup: Setup, repeats: int) -> dict[str, Any]:
    """The batch and, for each of the four, errors and times."""
    with tempfile.TemporaryDirectory() as folder:
        contestants = {name: build(name, setup, folder) for name in NAMES}
        errors = errors_of(contestants, build(TRL, replace(setup, dtype="fp32"), folder))
    steps = {name: Step(contestant.step, None) for name, contestant in contestants.items()}
    with tqdm(total=len(NAMES) * (repeats + 1), desc=f"{setup.dtype}, time", leave=False) as bar:

        def tick() -> None:
            for contestant in contestants.values():
                contestant.gradients()
            bar.update()

        times = interleaved_times(steps, CPU, 1, repeats, tick)
    batch = contestants[TRL].inputs
    tokens = int(batch["attention_mask"].sum())
    allowed = {what: max(FP32_ERROR, ERROR_FACTOR * error) for what, error in errors[TRL].items()}
    rows = {
        name: {
            "ms": times[name]["both_ms"],
            "tokens_per_s": 1000 * tokens / times[name]["both_ms"]["median"],
            "kept_share": kept_share(contestant),
            **errors[name],
            "agrees": all(error <= allowed[what] for what, error in errors[name].items()),
        }
        for name, contestant in contestants.items()
    }
    return {
        "tokens": tokens,
        "completion_tokens": int(batch["completion_mask"][:, 1:].sum()),
        "padded_positions": batch["attention_mask"].numel(),
        "rows": rows,
    }


def kept_share(contestant: Contestant) -> float | None:
    recorded = contestant.trainer._metrics["train"].get("focal/kept_share")
    return float(recorded[-1]) if recorded else None


def show(found: dict[str, Any]) -> None:
    setup, rows = found["setup"], found["rows"]
    print(
        f"A DPO step in {setup['dtype']}: Llama, {setup['layers']} layers of {setup['hidden']}, "
        f"vocabulary {setup['vocab']};\n{setup['pairs']} pairs, {found['tokens']} tokens, "
        f"{found['completion_tokens']} of completions, {found['padded_positions']} positions when padded"
    )
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.insert(0, "x TRL", rows[TRL]["ms"]["median"] / table["ms"].map(lambda times: times["median"]))
    print(table.drop(columns="ms").to_string(float_format="{:.3g}".format))
    print(
        "x TRL: by medians; extra_mib: memory beyond model and gradients; errors: relative to TRL in fp32\n"
    )


def build(name: str, setup: Setup, folder: str) -> Contestant:
    """One of the four, with models of its own, and the first batch of the data."""
    pairs, tokenizer = text(setup.pairs)
    options = {
        "output_dir": folder,
        "report_to": "none",
        "use_cpu": True,
        "bf16": setup.dtype == "bf16",
        "per_device_train_batch_size": setup.pairs,
        "max_length": 512,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    given = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    models = (llama(setup), llama(setup, perturbation=0.05))
    if name in (TRL, PATCHED):
        with patch() if name == PATCHED else contextlib.nullcontext():
            trainer = DPOTrainer(*models, args=DPOConfig(**options), **given)
    else:
        args = FocalPOConfig(gamma=0.0, padding_free=name == PACKED, **options)
        trainer = FocalPOTrainer(*models, args=args, **given)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(setup.pairs)])
    model = trainer.accelerator.prepare_model(trainer.model)
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # as `train` would say
    return Contestant(trainer, model, batch)


@lru_cache
def text(count: int) -> tuple[list[Pair], Any]:
    pairs = docstring_pairs(seed=0)
    return pairs[:count], train_tokenizer(pairs[:2000])


def llama(setup: Setup, perturbation: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setup.vocab,
        hidden_size=setup.hidden,
        intermediate_size=3 * setup.hidden,
        num_hidden_layers=setup.layers,
        num_attention_heads=max(setup.hidden // 64, 1),
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(setup.scale)
        for parameter in model.model.layers.parameters():
            parameter.add_(perturbation * parameter.abs().mean() * torch.randn_like(parameter))
    return model


@torch.no_grad()
def scale_for(setup: Setup) -> float:
    """Of the final norm, for about as many softmax entries above 2^-12 as asked for; by bisection."""
    pairs, tokenizer = text(setup.pairs)
    ids = tokenizer(str(pairs[0].prompt) + str(pairs[0].chosen), return_tensors="pt").input_ids
    logits = llama(setup)(ids[:, :128]).logits[0]

    def entries_at(scale: float) -> float:
        return ((scale * logits).log_softmax(-1) > math.log(PRESENT)).sum(-1).double().mean().item()

    # Where it is nearly flat there is none; then more and more, and from here on fewer.
    hundredths = range(16_00, 4096_00)
    return bisect.bisect(hundredths, -setup.entries, key=lambda x: -entries_at(x / 100)) / 100 + 16


def errors_of(contestants: dict[str, Contestant], truth: Contestant) -> dict[str, dict[str, float]]:
    """Of loss and gradient (norms over all parameters), relative to those of `truth`."""
    true_loss, true_gradients = truth.step().item(), truth.gradients()
    size = torch.nn.utils.get_total_norm(true_gradients)
    found = {}
    for name, contestant in contestants.items():
        loss, gradients = contestant.step().item(), contestant.gradients()
        errors = [mine - true for mine, true in zip(gradients, true_gradients, strict=True)]
        found[name] = {
            "loss_error": abs(loss - true_loss) / abs(true_loss),
            "gradient_error": (torch.nn.utils.get_total_norm(errors) / size).item(),
        }
    return found


def memory_of(name: str, setup: Setup) -> PeakMemory:
    """Extra memory of a step; runs in a process of its own."""
    settle()
    with tempfile.TemporaryDirectory() as folder:
        contestant = build(name, setup, folder)

        def step() -> list[torch.Tensor]:
            contestant.step()
            return contestant.gradients()

        # Libraries and thread stacks come with the first step, whatever its size.
        batch = contestant.inputs
        contestant.inputs = contestant.trainer.data_collator([contestant.trainer.train_dataset[0]])
        step()
        contestant.inputs = batch
        return peak_extra_bytes(step, CPU)


if __name__ == "__main__":
    sys.exit(main())
