"""The parts of `quickstart.py` around its training loop: options, model and tokenizer, metrics, report."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from preference_data import IGNORE_INDEX, Batch, DataError, Pair, PreferenceSet, described, encode_pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim import AdamW
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

from focalkern import FocalPOOutput, FusedFocalPOLoss, linear_logps, logit_options

SFT_LR = 2e-3
TIE = 1e-4  # two rewards closer than this differ by rounding
SMALL_MODEL = {"batch_size": 32, "lr": 5e-4, "beta": 0.5}
GIVEN_MODEL = {"batch_size": 8, "lr": 1e-6, "beta": 0.1}


# ----------------------------------------------------------------------------------------------- the options


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Preference training: FocalPO beside DPO.")
    add = parser.add_argument
    add("--data", type=Path, metavar="JSONL", help="prompt, chosen, rejected a line; default: docstrings")
    add("--model", metavar="PATH_OR_ID", help="trained whole and in fp32; default: a small Llama")
    add("--out", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
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
    """A causal LM as the fused loss takes it: last hidden states, and the LM head beside them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        # No dropout, in training neither: policy and reference are to differ by the training alone.
        self.model = model.eval()
        self.tokenizer = tokenizer
        head = model.get_output_embeddings()
        self.weight = head.weight  # [V, H]
        self.bias = getattr(head, "bias", None)  # [V]
        config = model.config.get_text_config()
        self.max_length = getattr(config, "max_position_embeddings", math.inf)
        self.logit_options = logit_options(model.config)

    def hidden(self, batch: Batch) -> torch.Tensor:  # [S, T, H]
        # `base_model` is `model.model` of a Llama, whatever the architecture calls it.
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        return self.model.base_model(**inputs).last_hidden_state

    def logps(self, batch: Batch) -> torch.Tensor:  # [S, T-1], 0 where a token is not scored
        options = {"bias": self.bias, "shift": True, **self.logit_options}
        return linear_logps(self.hidden(batch), self.weight, batch.labels, **options).logps

    @torch.no_grad()
    def sequence_logps(self, data: PreferenceSet) -> torch.Tensor:  # [2, pairs]
        """Log-probs of the chosen and the rejected completions."""
        sums = torch.zeros(2, len(data), device=data.device)
        for indices in tqdm(data.by_length(), "reference log-probs"):
            sums[:, indices] = self.logps(data.batch(indices)).sum(-1).view(2, -1)
        return sums

    @torch.no_grad()
    def through_head(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:  # [n, H], [n, V]
        """What enters the head where it predicts a scored token, and the logits that the model makes of it.

        Raises:
            DataError: the model does more to its logits than `logit_options` says.
        """
        scored = batch.labels[:, 1:] != IGNORE_INDEX
        entered = []

        def pick(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            entered.append(inputs[0][:, :-1][scored])
            return (entered[-1][None],)  # no other logits are computed

        hook = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            logits = self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[0]
        finally:
            hook.remove()
        softcap, scale = self.logit_options["softcap"], self.logit_options["logit_scale"]
        expected = scale * F.linear(entered[0], self.weight, self.bias).float()
        expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
        rounding = max(1e-4, 4 * torch.finfo(self.weight.dtype).eps) * expected.abs().max().item()
        if len(entered) > 1 or not torch.allclose(logits.float(), expected, rtol=0, atol=rounding):
            name = type(self.model).__name__
            raise DataError(f"{name} is not supported: it transforms its logits in a way unknown here")
        return entered[0], logits


def load_policy(name: str, device: str, dtype: torch.dtype | str = torch.float32) -> Policy:
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except ValueError as error:
        raise DataError(f"{name} cannot be loaded as a causal LM: {error}") from error
    if model.get_output_embeddings() is None:
        raise DataError(f"{name}: {type(model).__name__} has no output embeddings")
    return Policy(model.to(device), tokenizer)


def small_policy(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Policy:
    """A Llama of a million parameters with random weights."""
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
    max_length = min(args.max_length, policy.max_length)
    encoded, found = encode_pairs(pairs, policy.tokenizer, max_length)
    if not encoded:
        raise DataError(
            f"no {name} pairs are left: {described(found)} (more than {max_length} tokens are too long)"
        )
    print(f"{name} pairs: {described(found)}")
    return PreferenceSet(encoded, args.batch_size, args.device)


def supervised_fine_tuning(policy: Policy, train: PreferenceSet, seed: int) -> None:
    """One pass of plain language modelling on prompt + chosen."""
    steps = train.steps_per_pass
    optimizer, scheduler = adamw(policy.model, SFT_LR, steps)
    for indices in (bar := tqdm(train.shuffled(steps, seed), "SFT", steps)):
        batch = train.sft_batch(indices)
        loss = -policy.logps(batch).sum() / (batch.labels[:, 1:] != IGNORE_INDEX).sum()
        update(loss, policy.model, optimizer, scheduler)
        bar.set_postfix(loss=f"{loss.item():.3f}")


def adamw(model: PreTrainedModel, lr: float, steps: int) -> tuple[AdamW, LRScheduler]:
    optimizer = AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)


def update(loss: torch.Tensor, model: PreTrainedModel, optimizer: AdamW, scheduler: LRScheduler) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    scheduler.step()


# ------------------------------------------------------------------------------------------------ the metrics


@dataclass
class Run:
    """One preference training: its loss step by step, and its metrics on the held-out pairs."""

    name: str
    losses: list[float] = field(default_factory=list)
    held_out: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # step: metric: [pairs]

    @property
    def before(self) -> dict[str, torch.Tensor]:
        return self.held_out[0]

    @property
    def after(self) -> dict[str, torch.Tensor]:
        return self.held_out[max(self.held_out)]


def pair_metrics(outs: Sequence[FocalPOOutput]) -> dict[str, torch.Tensor]:
    """Metrics of a policy, each [pairs]."""
    reward_margins = torch.cat([out.chosen_rewards - out.rejected_rewards for out in outs])
    return {
        "loss": torch.cat([out.losses for out in outs]),
        "reward accuracy": wins(reward_margins),
        "reward margin": reward_margins,
        "logp accuracy": wins(torch.cat([out.chosen_logps - out.rejected_logps for out in outs])),
    }


def wins(margins: torch.Tensor) -> torch.Tensor:
    """1 where chosen is ahead, 0 where rejected is, one half where they are level, as all rewards begin."""
    return torch.where(margins.abs() < TIE, 0.5, (margins > 0).double())


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean over the pairs and its standard error."""
    spread = values.std().item() if len(values) > 1 else math.nan
    return values.mean().item(), spread / math.sqrt(len(values))


# ------------------------------------------------------------------------------------------------- the report


def show_example(pair: Pair, count: int) -> None:
    print(f"A pair of {count}:")
    for part in ("prompt", "chosen", "rejected"):
        print(f"  {part:9} {textwrap.shorten(str(getattr(pair, part)), 160, placeholder=' …')}")


def report(runs: Sequence[Run], policy: Policy, args: argparse.Namespace) -> None:
    """Write plot, metrics and model into a folder, and print what came out."""
    plot(runs, args.out / "quickstart.png")
    (args.out / "metrics.json").write_text(as_json(runs, args), encoding="utf-8")
    policy.model.save_pretrained(args.out / "model")
    policy.tokenizer.save_pretrained(args.out / "model")
    show(runs)
    print(f"In {args.out}: quickstart.png, metrics.json, model/ (trained with {runs[-1].name})")


def show(runs: Sequence[Run]) -> None:
    first, last = runs
    print(f"{len(first.before['loss'])} held-out pairs: before → after training ± standard error")
    print(f"{'':18}" + "".join(f"{run.name:>26}" for run in runs))
    for metric in first.before:
        cells = (f"{decimals(run.before[metric].mean())} → {estimate(run.after[metric])}" for run in runs)
        print(f"{metric:18}" + "".join(f"{cell:>26}" for cell in cells))
    print("Accuracy: share of pairs with chosen ahead of rejected, a tie counts one half.")
    print("  reward accuracy: by β·(logp − reference logp); before training all are ties")
    print("  logp accuracy: by logp alone, without the reference")
    print("The two losses are different functions of the same rewards: compare the other rows.")
    gain = last.after["reward accuracy"] - first.after["reward accuracy"]  # by pairs: common luck cancels
    print(f"{last.name} − {first.name}, reward accuracy pair by pair: {estimate(gain)}")


def estimate(values: torch.Tensor) -> str:
    return " ± ".join(map(decimals, mean_and_error(values)))


def decimals(number: float | torch.Tensor) -> str:
    return f"{round(float(number), 3) + 0.0:.3f}"  # + 0.0: no "-0.000"


def as_json(runs: Sequence[Run], args: argparse.Namespace) -> str:
    found = [
        {
            "name": run.name,
            "training_loss": run.losses,
            "held_out": [
                {"step": step} | {name: mean_and_error(values) for name, values in metrics.items()}
                for step, metrics in run.held_out.items()
            ],
        }
        for run in runs
    ]
    record = {"arguments": vars(args), "held_out_pairs": len(runs[0].before["loss"]), "runs": found}
    return json.dumps(record, indent=2, default=str)


def plot(runs: Sequence[Run], path: Path) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    loss_axes, *metric_axes = figure.subplots(1, 3)
    window = max(1, len(runs[0].losses) // 10)
    for run, style in zip(runs, ("--o", "-o"), strict=True):
        losses = torch.tensor(run.losses).unfold(0, window, 1).mean(-1)
        loss_axes.plot(range(window, len(run.losses) + 1), losses, style.rstrip("o"), label=run.name)
        for axes, metric in zip(metric_axes, ("reward accuracy", "reward margin"), strict=True):
            means, errors = zip(*(mean_and_error(at[metric]) for at in run.held_out.values()), strict=True)
            axes.errorbar(
                list(run.held_out), means, errors, fmt=style, markersize=4, capsize=3, label=run.name
            )
            axes.set_title(f"held-out {metric} ± standard error")
    loss_axes.set_title(f"training loss, mean of {window} steps")
    for axes in (loss_axes, *metric_axes):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
