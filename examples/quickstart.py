"""Preference training with the fused loss, from real text to a plot, in minutes on two CPU cores.

    python examples/quickstart.py                                              # what `make demo` runs
    python examples/quickstart.py --data pairs.jsonl --model PATH_OR_ID        # your data, your model

The demo makes preference pairs from the docstrings of Python's standard library (see `preference_data.py`),
trains a tokenizer and a small Llama on them, and from there trains twice, with DPO (γ = 0) and with FocalPO.
`train_preferences` is the training loop: it shows how `FusedFocalPOLoss` is used.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from preference_data import (
    IGNORE_INDEX,
    Batch,
    DataError,
    Pair,
    PreferenceSet,
    docstring_pairs,
    encode_pairs,
    read_pairs,
    split_pairs,
)
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

import focalkern
from focalkern import FocalPOOutput, FusedFocalPOLoss, linear_logps

HELD_OUT = 1000  # pairs, but no more than a sixth of all
EVALUATIONS = 8  # on the held-out pairs, over the course of a training run
TIE = 1e-4  # two rewards closer than this differ by rounding
SFT_LR = 2e-3  # of the small model
SMALL_MODEL = {"batch_size": 32, "lr": 5e-4, "beta": 0.5, "sft_steps": None}
GIVEN_MODEL = {"batch_size": 8, "lr": 1e-6, "beta": 0.1, "sft_steps": 0}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        run(args)
    except DataError as error:
        raise SystemExit(f"{error}\nNothing was trained.") from None
    except OSError as error:
        raise SystemExit(str(error)) from None


def run(args: argparse.Namespace) -> None:
    policy, train, held_out = prepare(args)
    start = {name: tensor.to("cpu", copy=True) for name, tensor in policy.model.state_dict().items()}

    runs = []
    for name, gamma in {"DPO": 0.0, "FocalPO": args.gamma}.items():
        policy.model.load_state_dict(start)
        runs.append(train_preferences(f"{name} (γ={gamma:g})", gamma, policy, train, held_out, args))

    save(runs, policy, args)
    show(runs, args)


def prepare(args: argparse.Namespace) -> tuple[Policy, PreferenceSet, PreferenceSet]:
    """The model to start from and the pairs, training and held-out, with their reference log-probs."""
    torch.manual_seed(args.seed)
    pairs = read_pairs(args.data) if args.data else docstring_pairs(args.seed)
    train_pairs, held_out_pairs = split_pairs(pairs, min(HELD_OUT, math.ceil(len(pairs) / 6)), args.seed)
    example = train_pairs[0]
    print(f"A pair of {len(pairs)}:")
    for part in ("prompt", "chosen", "rejected"):
        print(f"  {part:9} {textwrap.shorten(str(getattr(example, part)), 160, placeholder=' …')}")
    policy = load_policy(args) if args.model else small_policy(train_pairs, args)
    train = encode("training", train_pairs, policy, args)
    held_out = encode("held-out", held_out_pairs, policy, args)
    policy.check(train.batch([0]))
    args.out.mkdir(parents=True, exist_ok=True)

    fine_tune(policy, train, args)
    train.ref_logps = sequence_logps(policy, train)
    held_out.ref_logps = sequence_logps(policy, held_out)
    return policy, train, held_out


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Preference training: FocalPO beside DPO.")
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="JSONL",
        help="lines of prompt, chosen, rejected, as TRL has them; default: docstrings",
    )
    add("--model", metavar="PATH_OR_ID", help="trained whole and in fp32; default: a small Llama")
    add("--out", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    add(
        "--sft-steps",
        type=at_least(0),
        help="steps of supervised fine-tuning before; default: one pass, none with --model",
    )
    add("--steps", type=at_least(1), help="preference training steps per method; default: one pass")
    add("--batch-size", type=at_least(1), help=f"in pairs; {default_help('batch_size')}")
    add("--lr", type=float, help=f"of preference training; {default_help('lr')}")
    add("--beta", type=float, help=default_help("beta"))
    add("--gamma", type=float, default=0.05, help="of FocalPO; default: %(default)s")
    add("--max-length", type=at_least(2), default=512, help="in tokens; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(arguments)
    for name, default in (GIVEN_MODEL if args.model else SMALL_MODEL).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    try:
        FusedFocalPOLoss(beta=args.beta, gamma=args.gamma)
    except ValueError as error:
        parser.error(str(error))
    return args


def default_help(name: str) -> str:
    return f"default: {SMALL_MODEL[name]}, with --model {GIVEN_MODEL[name]}"


def at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return parse


# ------------------------------------------------------------------------------------------------- the model


class Policy:
    """A causal LM as the fused loss sees it: the last hidden states, and the LM head not applied to them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        # No dropout, in training neither: policy and reference are to differ by the training alone.
        self.model = model.eval()
        self.tokenizer = tokenizer
        head = model.get_output_embeddings()
        self.weight = head.weight  # [V, H]
        self.bias = getattr(head, "bias", None)  # [V]
        config = model.config.get_text_config()
        multiplier = getattr(config, "logit_scale", None) or 1.0  # Cohere
        divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
        self.logit_options = {
            "softcap": getattr(config, "final_logit_softcapping", None),  # Gemma
            "logit_scale": multiplier / divisor,
        }

    def hidden(self, batch: Batch) -> torch.Tensor:  # [S, T, H]
        # `base_model` is `model.model` of a Llama, whatever the architecture calls it.
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        return self.model.base_model(**inputs).last_hidden_state

    def logps(self, batch: Batch) -> torch.Tensor:  # [S, T-1], 0 where a token is not scored
        hidden = self.hidden(batch)
        return linear_logps(
            hidden, self.weight, batch.labels, bias=self.bias, shift=True, **self.logit_options
        ).logps

    @torch.no_grad()
    def check(self, batch: Batch) -> None:
        """Refuse a model that does more to its logits than `logit_options` says."""
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1].float()
        targets = batch.labels[:, 1:]
        logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        logps = logps.masked_fill(targets == IGNORE_INDEX, 0.0)
        if not torch.allclose(self.logps(batch), logps, rtol=1e-3, atol=1e-3):
            name = type(self.model).__name__
            raise DataError(f"{name} is not supported: it transforms its logits in a way unknown here")


def load_policy(args: argparse.Namespace) -> Policy:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return Policy(model.to(args.device), AutoTokenizer.from_pretrained(args.model))


def small_policy(pairs: Sequence[Pair], args: argparse.Namespace) -> Policy:
    """A Llama of a million parameters with random weights, and a tokenizer trained on the pairs."""
    tokenizer = train_tokenizer(pairs)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=args.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Policy(LlamaForCausalLM(config).to(args.device), tokenizer)


def train_tokenizer(pairs: Sequence[Pair]) -> PreTrainedTokenizerBase:
    """Byte-level BPE that puts BOS before plain text, with a minimal chat template."""
    bos, eos = "<s>", "</s>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[bos, eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for pair in pairs for text in pair.texts()), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    chat_template = (
        "{{ bos_token }}"
        "{% for message in messages %}{{ message.role }}:\n{{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=chat_template
    )


def encode(name: str, pairs: Sequence[Pair], policy: Policy, args: argparse.Namespace) -> PreferenceSet:
    longest = getattr(policy.model.config.get_text_config(), "max_position_embeddings", args.max_length)
    encoded, left_out = encode_pairs(pairs, policy.tokenizer, min(args.max_length, longest))
    for reason, count in left_out.items():
        print(f"{name}: {count} of {len(pairs)} pairs left out, {reason}")
    if not encoded:
        raise DataError(f"{name}: no pairs are left")
    print(f"{name}: {len(encoded)} pairs")
    return PreferenceSet(encoded, args.batch_size, args.device)


# ----------------------------------------------------------------------------------------------- the training


def fine_tune(policy: Policy, train: PreferenceSet, args: argparse.Namespace) -> None:
    """SFT: plain language modelling on prompt + chosen."""
    steps = train.steps_per_pass if args.sft_steps is None else args.sft_steps
    if steps == 0:
        return
    optimizer, scheduler = adamw(policy.model, args.lr if args.model else SFT_LR, steps)
    for indices in (bar := tqdm(train.shuffled(steps, args.seed), "SFT", steps)):
        batch = train.sft_batch(indices)
        loss = -policy.logps(batch).sum() / (batch.labels[:, 1:] != IGNORE_INDEX).sum()
        update(loss, policy.model, optimizer, scheduler)
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def sequence_logps(policy: Policy, data: PreferenceSet) -> torch.Tensor:  # [2, pairs]
    """Log-probs of the chosen and the rejected completions. Taken once, they replace a reference model."""
    sums = torch.zeros(2, len(data), device=data.device)
    for indices in tqdm(data.by_length(), "reference log-probs"):
        sums[:, indices] = policy.logps(data.batch(indices)).sum(-1).view(2, -1)
    return sums


def preference_loss(
    policy: Policy,
    loss_fn: FusedFocalPOLoss,
    data: PreferenceSet,
    indices: list[int],
    hidden: torch.Tensor | None = None,  # where they are already there
) -> FocalPOOutput:
    """Loss of some of the pairs: from hidden states and head, where a plain loss would start from logits."""
    batch = data.batch(indices)
    return loss_fn(
        policy.hidden(batch) if hidden is None else hidden,
        policy.weight,
        batch.labels,
        bias=policy.bias,
        ref_chosen_logps=data.ref_logps[0, indices],
        ref_rejected_logps=data.ref_logps[1, indices],
        shift=True,
    )


def train_preferences(
    name: str,
    gamma: float,
    policy: Policy,
    train: PreferenceSet,
    held_out: PreferenceSet,
    args: argparse.Namespace,
) -> Run:
    loss_fn = FusedFocalPOLoss(beta=args.beta, gamma=gamma, **policy.logit_options)
    steps = args.steps or train.steps_per_pass
    optimizer, scheduler = adamw(policy.model, args.lr, steps)
    evaluate_at = {round(steps * share / EVALUATIONS) for share in range(1, EVALUATIONS + 1)}
    run = Run(name, gamma, evaluations=[evaluate(0, policy, loss_fn, held_out)])
    for step, indices in enumerate(bar := tqdm(train.shuffled(steps, args.seed), name, steps), start=1):
        began = time.perf_counter()
        out = preference_loss(policy, loss_fn, train, indices)
        update(out.loss, policy.model, optimizer, scheduler)
        run.losses.append(out.loss.item())
        run.seconds += time.perf_counter() - began
        run.tokens += train.tokens(indices)
        if step in evaluate_at:
            run.evaluations.append(evaluate(step, policy, loss_fn, held_out))
        accuracy = run.evaluations[-1].estimates()["reward_accuracy"].mean
        bar.set_postfix(loss=f"{run.losses[-1]:.3f}", held_out_accuracy=f"{accuracy:.3f}")
    return run


def adamw(model: PreTrainedModel, lr: float, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)


def update(
    loss: torch.Tensor, model: PreTrainedModel, optimizer: torch.optim.Optimizer, scheduler: LRScheduler
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    scheduler.step()


# --------------------------------------------------------------------------------------------- the evaluation


@dataclass(frozen=True)
class Estimate:
    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Estimate:
        spread = values.std().item() if len(values) > 1 else math.nan
        return cls(values.mean().item(), spread / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{decimals(self.mean)} ± {decimals(self.standard_error)}"


def decimals(number: float) -> str:
    return f"{round(number, 3) + 0.0:.3f}"  # + 0.0: no "-0.000"


@dataclass(frozen=True)
class Evaluation:
    """A policy on the held-out pairs, pair by pair."""

    step: int
    losses: torch.Tensor  # [pairs]
    reward_margins: torch.Tensor  # [pairs], chosen − rejected reward
    logp_margins: torch.Tensor  # [pairs], chosen − rejected log-prob, the reference not subtracted

    def estimates(self) -> dict[str, Estimate]:
        return {
            "loss": Estimate.of(self.losses),
            "reward_accuracy": Estimate.of(wins(self.reward_margins)),
            "reward_margin": Estimate.of(self.reward_margins),
            "logp_accuracy": Estimate.of(wins(self.logp_margins)),
        }


@dataclass
class Run:
    """One preference training: its losses step by step, its evaluations from before to after, its speed."""

    name: str
    gamma: float
    evaluations: list[Evaluation]
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0  # of training steps; evaluations do not count


def wins(margins: torch.Tensor) -> torch.Tensor:
    """1 where chosen is ahead, 0 where rejected is, one half where they are level, as all rewards begin."""
    return torch.where(margins.abs() < TIE, 0.5, (margins > 0).double())


@torch.no_grad()
def evaluate(step: int, policy: Policy, loss_fn: FusedFocalPOLoss, data: PreferenceSet) -> Evaluation:
    outs = [preference_loss(policy, loss_fn, data, indices) for indices in data.by_length()]
    return Evaluation(
        step,
        losses=torch.cat([out.losses for out in outs]),
        reward_margins=torch.cat([out.chosen_rewards - out.rejected_rewards for out in outs]),
        logp_margins=torch.cat([out.chosen_logps - out.rejected_logps for out in outs]),
    )


def difference(runs: Sequence[Run]) -> Estimate:
    """Reward accuracy of the last run minus that of the first; by pairs, so that common luck cancels."""
    first, last = (wins(run.evaluations[-1].reward_margins) for run in (runs[0], runs[-1]))
    return Estimate.of(last - first)


# ------------------------------------------------------------------------------------------------- the report


def show(runs: Sequence[Run], args: argparse.Namespace) -> None:
    held_out = len(runs[0].evaluations[0].losses)
    table = Table(title=f"{held_out} held-out pairs: before → after training ± standard error")
    table.add_column()
    for run in runs:
        table.add_column(run.name, justify="right")
    before = [run.evaluations[0].estimates() for run in runs]
    after = [run.evaluations[-1].estimates() for run in runs]
    for metric in before[0]:
        cells = (
            f"{decimals(start[metric].mean)} → {end[metric]}"
            for start, end in zip(before, after, strict=True)
        )
        table.add_row(metric.replace("_", " "), *cells)
    table.add_row("training tokens/s", *(f"{run.tokens / run.seconds:,.0f}" for run in runs))
    Console().print(table)
    print("Accuracy: share of pairs with chosen ahead of rejected, a tie counts one half.")
    print("  reward accuracy: by β·(logp − reference logp); before training all are ties")
    print("  logp accuracy: by logp alone, without the reference")
    print("The two losses are different functions of the same rewards: compare the other rows.")
    print(f"{runs[-1].name} − {runs[0].name}, reward accuracy pair by pair: {difference(runs)}")
    print(f"In {args.out}: quickstart.png, metrics.json, model/ (trained with {runs[-1].name})")


def save(runs: Sequence[Run], policy: Policy, args: argparse.Namespace) -> None:
    plot(runs, args.out / "quickstart.png")
    metrics = {
        "arguments": vars(args),
        "versions": {module.__name__: module.__version__ for module in (focalkern, torch, transformers)},
        "python": platform.python_version(),
        "runs": [describe(run) for run in runs],
        "reward_accuracy_difference": asdict(difference(runs)),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, default=str), encoding="utf-8")
    policy.model.save_pretrained(args.out / "model")
    policy.tokenizer.save_pretrained(args.out / "model")


def describe(run: Run) -> dict[str, Any]:
    held_out = [
        {"step": evaluation.step}
        | {metric: asdict(value) for metric, value in evaluation.estimates().items()}
        for evaluation in run.evaluations
    ]
    return {
        "name": run.name,
        "gamma": run.gamma,
        "tokens_per_second": run.tokens / run.seconds,
        "training_loss": run.losses,
        "held_out_pairs": len(run.evaluations[0].losses),
        "held_out": held_out,
    }


def plot(runs: Sequence[Run], path: Path) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    loss_axes, *metric_axes = figure.subplots(1, 3)
    window = max(1, len(runs[0].losses) // 10)
    for run, style in zip(runs, ("--o", "-o"), strict=True):
        losses = torch.tensor(run.losses).unfold(0, window, 1).mean(-1)
        loss_axes.plot(range(window, len(run.losses) + 1), losses, style.rstrip("o"), label=run.name)
        steps = [evaluation.step for evaluation in run.evaluations]
        for axes, metric in zip(metric_axes, ("reward_accuracy", "reward_margin"), strict=True):
            values = [evaluation.estimates()[metric] for evaluation in run.evaluations]
            means, errors = [value.mean for value in values], [value.standard_error for value in values]
            axes.errorbar(steps, means, errors, fmt=style, markersize=4, capsize=3, label=run.name)
            axes.set_title(f"held-out {metric.replace('_', ' ')} ± standard error")
    loss_axes.set_title(f"training loss, mean of {window} steps")
    for axes in (loss_axes, *metric_axes):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where a terminal has no γ
    main()
