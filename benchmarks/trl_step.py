"""A DPO step in TRL: as it is, under `focalkern.trl.patch()`, and with `FocalPOTrainer`.

    python benchmarks/trl_step.py --json result.json   # a tiny Llama, vocabulary of 128256: some minutes
    python benchmarks/trl_step.py --lengths ultrafeedback --dtype fp32   # layers dominate: 8 minutes
    python benchmarks/trl_step.py --quick              # whether all of it runs

A step is `training_step` of a real trainer on docstrings of Python's standard library, without that of the
optimizer. Loss and gradients are compared with those of TRL in fp32. Steps are timed in one interleaved run;
memory, beyond model and gradients, in a process of its own. The weights are random; the final norm's scale
makes the softmax as sharp as a trained model's. On a CPU TRL's head computes every position, on a GPU only
those of completions. With `--lengths` the docstrings are cut to lengths from log-normal distributions.
"""

from __future__ import annotations

import contextlib
import itertools
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
from benchmarks.inputs import sharpening
from benchmarks.measure import PeakMemory, Step, in_fresh_process, interleaved_times, peak_extra_bytes
from benchmarks.report import MIB, environment, lengths_table, write_json
from focalkern.cli.models import load_config
from focalkern.trl import FocalPOConfig, FocalPOTrainer, patch

TRL, PATCHED = "TRL", "TRL under patch()"
PADDED, PACKED, SHARED = "FocalPOTrainer", "FocalPOTrainer, packed", "FocalPOTrainer, shared"
NAMES = (TRL, PATCHED, PADDED, PACKED, SHARED)
CPU = torch.device("cpu")
# Of loss and gradient, relative to TRL's in fp32: what fp32 may be off by, and what 16 bits may, in multiples
# of TRL's own error.
FP32_ERROR = 1e-4
ERROR_FACTOR = 1.2
MODEL_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
SIDES = ("prompt", "chosen", "rejected")
# In tokens: means of SIDES; standard deviations of the logarithms; the longest sequence.
LENGTHS = {
    "ultrafeedback": ((160, 300, 300), (1.0, 0.6, 0.6), 1024),
    "long-prompts": ((1500, 200, 200), (0.2, 0.6, 0.6), 2048),
}
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Setup:
    """What is measured; a fresh process builds it again."""

    hidden: int
    layers: int
    vocab: int
    pairs: int
    lengths: str = "text"  # as it is, or cut to LENGTHS
    dtype: str = "bf16"  # autocast over fp32 weights, as TRL trains by default
    repeats: int = 5
    entries: int = 50  # softmax entries above 2^-12 per token
    scale: float = 1.0  # of the final norm


LAYERS = Setup(hidden=384, layers=12, vocab=32768, pairs=4, repeats=3)  # which dominate
SETUPS = {
    "text": Setup(hidden=256, layers=2, vocab=128256, pairs=16),
    "ultrafeedback": LAYERS,
    "long-prompts": replace(LAYERS, pairs=2, repeats=2),
}
QUICK = Setup(hidden=64, layers=1, vocab=8192, pairs=4, repeats=2)


@dataclass
class Contestant:
    """A trainer and its batch, ready for one step after the other."""

    trainer: DPOTrainer
    model: torch.nn.Module
    inputs: dict[str, Any]

    def step(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss and gradients; the model keeps none."""
        loss = self.trainer.training_step(self.model, dict(self.inputs), None)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return loss, gradients


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", choices=SETUPS, default="text", help="of prompts and completions")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number there")
    parser.add_argument("--quick", action="store_true", help="a small model, 4 pairs, 2 rounds")
    options = parser.parse_args(argv)
    settle()
    setup = replace(QUICK if options.quick else SETUPS[options.lengths], lengths=options.lengths)
    about = {**environment("cpu"), "repeats": setup.repeats}
    comparisons = [compare(replace(setup, dtype=dtype)) for dtype in options.dtype]
    if options.json:
        write_json({**about, "comparisons": comparisons}, options.json)
        print(f"written to {options.json}")
    return 0 if all(row["agrees"] for found in comparisons for row in found["rows"].values()) else 1


def settle() -> None:
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def compare(setup: Setup) -> dict[str, Any]:
    setup = replace(setup, scale=scale_for(setup))
    found = {"setup": asdict(setup), **timed(setup)}
    for name in tqdm(NAMES, desc=f"{setup.dtype}, memory", leave=False):
        memory = in_fresh_process(memory_of, name, setup)
        found["rows"][name] |= {"extra_mib": memory.extra / MIB, "extra_is_upper_limit": memory.upper_limit}
    show(found)
    return found


def timed(setup: Setup) -> dict[str, Any]:
    """The batch and, for each of NAMES, errors, times and operations."""
    contestants, in_fp32 = {name: build(name, setup) for name in NAMES}, replace(setup, dtype="fp32")
    errors = errors_of(contestants, contestants[TRL] if setup == in_fp32 else build(TRL, in_fp32))
    steps = {name: Step(contestant.step) for name, contestant in contestants.items()}
    times = interleaved_times(steps, CPU, 0, setup.repeats)  # the first step of each is behind it
    batch = contestants[TRL].inputs
    is_token, is_completion = batch["attention_mask"], batch["completion_mask"]
    tokens, completion_tokens = int(is_token.sum()), int(is_completion[:, 1:].sum())
    allowed = {what: max(FP32_ERROR, ERROR_FACTOR * error) for what, error in errors[TRL].items()}
    rows: dict[str, Any] = {}
    for name, contestant in contestants.items():
        seconds = times[name]["both_ms"]["median"] / 1000
        count, width = contestant.inputs["input_ids"].shape
        head_rows = count * (width - 1) if name == TRL else completion_tokens
        scores = count * width**2  # a dense mask skips none
        kept = contestant.trainer._metrics["train"].get("focal/kept_share")
        rows[name] = {
            "ms": times[name]["both_ms"],
            "tokens_per_s": tokens / seconds,
            "positions": count * width,
            "operations": step_operations(contestant.model.config, count * width, scores, head_rows),
            "kept_share": float(kept[-1]) if kept else None,
            **errors[name],
            "agrees": all(error <= allowed[what] for what, error in errors[name].items()),
        }
    return {
        "tokens": tokens,
        "completion_tokens": completion_tokens,
        "padded_positions": is_token.numel(),
        "longest": int(is_token.sum(1).max()),
        "llama_8b_over_padded": ratios_8b(is_token, is_completion),
        "rows": rows,
    }


def ratios_8b(is_token: torch.Tensor, is_completion: torch.Tensor) -> dict[str, float]:
    """Operations of an 8B model, padded over each layout; attention skips hidden scores. Masks [2B, T]."""
    config, lengths, head_rows = load_config(MODEL_8B), is_token.sum(1), int(is_completion.sum())
    prompts = (lengths - is_completion.sum(1))[: len(lengths) // 2]
    seen, seen_twice = (int((n * (n + 1) // 2).sum()) for n in (lengths, prompts))
    tokens = int(lengths.sum())
    padded = step_operations(config, is_token.numel(), seen, head_rows)
    packed = step_operations(config, tokens, seen, head_rows)
    shared = step_operations(config, tokens - int(prompts.sum()), seen - seen_twice, head_rows)
    return {PACKED: padded / packed, SHARED: padded / shared}


def step_operations(config: Any, positions: int, scores: int, head_rows: int) -> float:
    """Of the products of layers, attention ([scores] for each head) and head; an addition counts as one.

    Policy and reference make four forwards. Attention computes its scores again, and the head its logits.
    """
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    layer = 4 * 2 * weights * positions + 4.5 * 4 * queries * scores
    return config.num_hidden_layers * layer + 5 * 2 * config.hidden_size * config.vocab_size * head_rows


def show(found: dict[str, Any]) -> None:
    print(*lengths_table(found), sep="\n\n")
    columns = ["kept_share", "loss_error", "gradient_error", "agrees"]
    errors = pd.DataFrame.from_dict(found["rows"], orient="index")[columns]
    print(f"\nErrors relative to TRL in fp32:\n{errors.to_string(float_format='{:.3g}'.format)}\n")


def build(name: str, setup: Setup) -> Contestant:
    """One of NAMES, with models of its own, and the first batch of the data."""
    pairs, tokenizer = text()
    options = {
        "output_dir": tempfile.gettempdir(),  # nothing is written there
        "report_to": "none",
        "use_cpu": True,
        "bf16": setup.dtype == "bf16",
        "per_device_train_batch_size": setup.pairs,
        "max_length": MAX_LENGTH,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    rows = [{name: getattr(pair, name) for name in SIDES} for pair in pairs[: setup.pairs]]
    given = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    models = (llama(setup), llama(setup, perturbation=0.05))
    if name in (TRL, PATCHED):
        with patch() if name == PATCHED else contextlib.nullcontext():
            trainer = DPOTrainer(*models, args=DPOConfig(**options), **given)
    else:
        args = FocalPOConfig(gamma=0.0, padding_free=name == PACKED, share_prompt=name == SHARED, **options)
        trainer = FocalPOTrainer(*models, args=args, **given)
    cut = cut_text(setup.lengths, setup.pairs) if setup.lengths in LENGTHS else None
    batch = trainer.data_collator(cut or list(trainer.train_dataset))
    model = trainer.accelerator.prepare_model(trainer.model)
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # as `train` would say
    return Contestant(trainer, model, batch)


@lru_cache
def text() -> tuple[list[Pair], Any]:
    pairs = docstring_pairs(seed=0)
    return pairs, train_tokenizer(pairs[:2000])


def cut_text(lengths: str, count: int) -> list[dict[str, list[int]]]:
    """Pairs of docstrings, one after the other, cut to these lengths."""
    pairs, tokenizer = text()
    ids = itertools.chain.from_iterable(tokenizer(pair.prompt + pair.chosen).input_ids for pair in pairs)
    return [
        {f"{name}_ids": list(itertools.islice(ids, n)) for name, n in zip(SIDES, pair, strict=True)}
        for pair in drawn(lengths, count)
    ]


def drawn(lengths: str, count: int) -> list[list[int]]:
    """[count, 3]: of prompt, chosen and rejected. Each has its mean in the batch, before it is cut."""
    means, deviations, longest = (torch.tensor(each) for each in LENGTHS[lengths])
    draws = (torch.randn(count, 3, generator=torch.Generator().manual_seed(0)) * deviations).exp()
    prompts, completions = (draws * means / draws.mean(0)).ceil().int().tensor_split([1], dim=1)
    prompts = prompts.clamp(max=longest - 256)  # room for the completions
    return torch.cat([prompts, completions.minimum(longest - prompts)], dim=1).tolist()


def llama(setup: Setup, perturbation: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setup.vocab,
        hidden_size=setup.hidden,
        intermediate_size=3 * setup.hidden,
        num_hidden_layers=setup.layers,
        num_attention_heads=max(setup.hidden // 64, 1),
        max_position_embeddings=MAX_LENGTH,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(setup.scale)
        for parameter in model.model.layers.parameters():
            parameter.add_(perturbation * parameter.abs().mean() * torch.randn_like(parameter))
    return model


@torch.no_grad()
def scale_for(setup: Setup) -> float:
    """Of the final norm, for about as many softmax entries above 2^-12 as asked for."""
    pairs, tokenizer = text()
    ids = tokenizer(str(pairs[0].prompt) + str(pairs[0].chosen), return_tensors="pt").input_ids
    logits = llama(setup)(ids[:, :128]).logits[0]
    return sharpening(lambda scale: scale * logits, setup.entries, 16, 4096)


def errors_of(contestants: dict[str, Contestant], truth: Contestant) -> dict[str, dict[str, float]]:
    """Of loss and gradient (norms over all parameters), relative to those of `truth`."""
    true_loss, true_gradients = truth.step()
    size = torch.nn.utils.get_total_norm(true_gradients)
    found = {}
    for name, contestant in contestants.items():
        loss, gradients = contestant.step()
        errors = [mine - true for mine, true in zip(gradients, true_gradients, strict=True)]
        found[name] = {
            "loss_error": (abs(loss - true_loss) / abs(true_loss)).item(),
            "gradient_error": (torch.nn.utils.get_total_norm(errors) / size).item(),
        }
    return found


def memory_of(name: str, setup: Setup) -> PeakMemory:
    """Extra memory of a step; runs in a process of its own."""
    settle()
    contestant = build(name, setup)
    # Libraries and thread stacks come with the first step, whatever its size.
    small = contestant.trainer.data_collator([contestant.trainer.train_dataset[0]])
    replace(contestant, inputs=small).step()
    return peak_extra_bytes(lambda: contestant.step()[1], CPU)


if __name__ == "__main__":
    sys.exit(main())
