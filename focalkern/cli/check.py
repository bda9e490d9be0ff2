"""Look at a recipe's data, model and loss on one device, before GPUs are rented for it.

    focalkern check RECIPE [--field value ...]

Prints the data report, one pair with its mask, the first loss beside its expected value, the fused head beside
plain logits, and a backward of the longest batch. Exit status 1 with any finding.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import textwrap
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn

from focalkern import LowRankUpdate, logit_options, reference
from focalkern.cli import train
from focalkern.cli.job import Job, fail, on_this_machine
from focalkern.cli.memory import LiveBytes
from focalkern.lm_head import call_head, resolve_head
from focalkern.logps.operator import LinearLogps
from focalkern.trl import FocalPOTrainer
from focalkern.trl.config import FOCALPO
from focalkern.trl.data import STREAMED_ROWS, token_ids
from focalkern.trl.head import backbone_of

# What passes for rounding: of losses, relative; of log-probs, mean nats per token; of gradients, relative.
LOSS = 0.02
LOGPS = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
GRADIENTS = {torch.float32: 1e-2, torch.bfloat16: 0.1}
_SHOWN = 46  # characters of a text on each side of the mask


class _Trainer(FocalPOTrainer):
    """Computes the reference's log-probs for the batches that are looked at, not for the whole data set."""

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny model of the same architecture, on built-in pairs"
    )


def overrides(arguments: argparse.Namespace) -> list[str]:
    return train.overrides(arguments) if arguments.dry_run else on_this_machine(arguments)


def run(arguments: argparse.Namespace) -> int:
    if PartialState().num_processes > 1:
        fail("check runs in one process: start it without accelerate launch or torchrun")
    with train.dry_run(arguments.job) if arguments.dry_run else contextlib.nullcontext():
        findings = check_job(arguments.job)
    for number, finding in enumerate(findings, start=1):
        print(textwrap.fill(f"FINDING {number}: {finding}", 100, subsequent_indent="  "))
    print(f"{len(findings)} findings." if findings else "No findings.")
    return 1 if findings else 0


def check_job(job: Job) -> list[str]:
    """Findings on a trainer of the job, or the reason why there is none."""
    data, held_out = job.data()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the trainer prints its report, and warns, of what is looked at below
        try:
            trainer = _Trainer(**job.trainer_options(), train_dataset=data, eval_dataset=held_out)
        except (ValueError, TypeError) as error:
            return [str(error)]
    return check(trainer)


def check(trainer: FocalPOTrainer) -> list[str]:
    """Print how a trainer's start looks; what is wrong with it, and what to do."""
    findings = [text for report in trainer.data_reports.values() for text in report.warnings()]
    for report in trainer.data_reports.values():
        print(str(report).splitlines()[0])
    lengths = _Lengths(trainer)
    print(
        f"{lengths.per_pair.mean():.0f} tokens per pair on average, the longest sequence has"
        f" {lengths.longest.max()}"
    )
    batch = _batch(trainer, range(min(2, len(lengths.rows))))
    print(*_shown(trainer, batch), sep="\n")
    findings += lengths.findings
    findings += _dtype(trainer)
    if lengths.out_of_range:
        return findings  # the model cannot be run on them
    most = trainer.args.per_device_train_batch_size
    longest = _batch(trainer, lengths.longest.argsort(kind="stable")[::-1][:most].tolist())
    for part, given in ((_reference_and_loss, batch), (_against_plain, batch), (_longest, longest)):
        try:
            findings += part(trainer, given)
        except torch.OutOfMemoryError as error:
            findings.append(
                f"{most} pairs do not fit on this device with the whole model, even"
                " without gradients and optimizer: lower max_length or per_device_train_batch_size; for"
                f" several GPUs see focalkern plan ({str(error).splitlines()[0]})"
            )
            break
        except (ValueError, TypeError) as error:
            findings.append(str(error))
    return findings


# ---------------------------------------------------------------------------------------------------- the data


class _Lengths:
    """Tokens of each pair as the collator cuts them, and whether the model has an embedding for all."""

    def __init__(self, trainer: FocalPOTrainer) -> None:
        rows = trainer.train_dataset
        if not isinstance(rows, Dataset):
            rows = Dataset.from_list(list(rows.take(STREAMED_ROWS)))
        self.rows, most = rows, trainer.args.max_length or np.inf
        both, highest, row = [], -1, 0
        for i, parts in enumerate(token_ids(rows)):
            prompt, *completions = map(len, parts)
            both.append([min(prompt + completion, most) for completion in completions])
            top = max(int(ids.max(initial=-1)) for ids in parts)
            if top > highest:
                highest, row = top, i
        self.per_pair, self.longest = np.array(both).sum(1), np.array(both, dtype=int).max(1)
        config = trainer.model.config.get_text_config()
        size = min(
            trainer.model.get_input_embeddings().weight.shape[0],
            resolve_head(_base(trainer).get_output_embeddings()).linear.out_features,
        )
        self.out_of_range = highest >= size
        self.findings = []
        if self.out_of_range:
            token = trainer._tokenizer.convert_ids_to_tokens(highest)
            self.findings.append(
                f"row {row} of the train dataset has the token {token!r} with id {highest}, and the model has"
                f" {size} embeddings: take the tokenizer of this model, or resize_token_embeddings and save it"
            )
        positions = getattr(config, "max_position_embeddings", None) or np.inf
        if self.longest.max() > positions:
            self.findings.append(
                f"the longest sequence has {self.longest.max()} tokens, and the model was made for {positions}:"
                f" set max_length={positions} or less"
            )


def _batch(trainer: FocalPOTrainer, indices: Any) -> dict[str, Any]:
    rows = trainer.train_dataset
    if isinstance(rows, Dataset):
        examples = [rows[i] for i in indices]
    else:
        taken = list(rows.take(max(indices) + 1))
        examples = [taken[i] for i in indices]
    return trainer._prepare_inputs(trainer.data_collator(examples))


def _shown(trainer: FocalPOTrainer, batch: dict[str, Any]) -> list[str]:
    """The sequences of the first pair, around the place where the mask ends."""
    labels, decode = trainer._labels(batch).cpu(), trainer._tokenizer.decode
    ids, first = batch["input_ids"].cpu(), [0, len(batch["input_ids"]) // 2]
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].tolist()
        ids, labels = ([x[0, a:b] for a, b in zip(bounds, bounds[1:], strict=False)] for x in (ids, labels))
        first = [0, len(ids) // 2]
    lines = []
    for name, i in zip(("chosen", "rejected"), first, strict=True):
        scored = labels[i] != -100
        start = int(scored.nonzero()[0]) if scored.any() else len(scored)
        end = start + int(scored.sum())
        before, after = repr(decode(ids[i][:start]))[1:-1], repr(decode(ids[i][start:end]))[1:-1]
        tail = after if len(after) <= _SHOWN else f"{after[: _SHOWN // 2]} ... {after[-_SHOWN // 2 :]}"
        head = before if len(before) <= _SHOWN else f"... {before[-_SHOWN:]}"
        lines += [f"  {name:<9} masked: {head}", f"  {'':<9} scored: {tail}"]
    return lines


# --------------------------------------------------------------------------------------------------- the model


def _base(trainer: FocalPOTrainer) -> Any:
    model = trainer.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _dtype(trainer: FocalPOTrainer) -> list[str]:
    """Of the head and the other weights."""
    head = resolve_head(_base(trainer).get_output_embeddings())
    weight, trained = head.linear.weight, sum(p.requires_grad for p in trainer.model.parameters())
    adapters = f", {len(head.adapters)} adapter on it" if head.adapters else ""
    print(
        f"head: {list(weight.shape)} in {_name(weight.dtype)}, computed in {_name(_computed(trainer))}{adapters}"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer._warn_of_lost_updates()
    findings = [str(warning.message) for warning in caught]
    body = {p.dtype for p in backbone_of(_base(trainer)).parameters() if p.is_floating_point() and p.ndim > 1}
    if weight.dtype not in body:
        findings.append(
            f"the head's weight is {_name(weight.dtype)} and the layers' are"
            f" {', '.join(sorted(map(_name, body)))}: load all in one dtype (--dtype float32)"
        )
    if not trained:
        findings.append("no parameter is trained: all have requires_grad=False")
    return findings


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _computed(trainer: FocalPOTrainer) -> torch.dtype:
    weight = resolve_head(_base(trainer).get_output_embeddings()).linear.weight
    return torch.bfloat16 if trainer.accelerator.mixed_precision == "bf16" else weight.dtype


def _tolerance(table: dict[torch.dtype, float], trainer: FocalPOTrainer) -> float:
    return table[torch.float32 if _computed(trainer).itemsize >= 4 else torch.bfloat16]


Refs = tuple[torch.Tensor | None, torch.Tensor | None]


def _references(trainer: FocalPOTrainer, batch: dict[str, Any]) -> Refs:
    if not trainer.args.needs_reference:
        return None, None
    return trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)


def _loss(
    trainer: FocalPOTrainer, batch: dict[str, Any], tokens: LinearLogps, refs: Refs
) -> tuple[torch.Tensor, Any]:
    """As in the first step: running statistics are those of the start, and stay it."""
    labels, cu_seqlens = trainer._labels(batch), batch.get("cu_seqlens")
    lengths = batch.get("completion_lengths", batch["completion_mask"].sum(1))
    labels = labels if cu_seqlens is None else labels[0]
    return copy.deepcopy(trainer.loss_fn).train()(tokens, labels, refs, cu_seqlens, lengths)


def _fused(trainer: FocalPOTrainer, batch: dict[str, Any]) -> LinearLogps:
    with trainer.accelerator.autocast():
        return trainer._pair_tokens(trainer._forward(trainer.model, batch), batch)[0]


def _plain(trainer: FocalPOTrainer, batch: dict[str, Any]) -> LinearLogps:
    """By all logits, in fp32, of the hidden states and weights that the fused head is given."""
    model, dtype = _base(trainer), _computed(trainer)
    targets = trainer._labels(batch)[:, 1:]

    def exact(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(dtype).to(torch.promote_types(dtype, torch.float32))

    def logps(hidden: Any, weight: Any, bias: Any, update: LowRankUpdate | None) -> LinearLogps:
        if update is not None:
            update = LowRankUpdate(*map(exact, (update.hidden[:, :-1], update.weight)))
        with torch.autocast(hidden.device.type, enabled=False):
            found = reference.linear_logps(
                exact(hidden[:, :-1]),
                exact(weight),
                targets,
                exact(bias),
                update=update,
                **logit_options(model.config),
            )
        return LinearLogps(found["logps"])

    with trainer.accelerator.autocast():
        hidden = backbone_of(model)(**trainer._model_inputs(batch)).last_hidden_state
        tokens = call_head(model.get_output_embeddings(), hidden, logps)
    return tokens.reshaped(lambda x: nn.functional.pad(x[0], (0, 1))) if "cu_seqlens" in batch else tokens


def _sums(trainer: FocalPOTrainer, batch: dict[str, Any], tokens: LinearLogps) -> Refs:
    labels, cu_seqlens = trainer._labels(batch), batch.get("cu_seqlens")
    labels = labels if cu_seqlens is None else labels[0]
    return trainer.loss_fn.reference_logps(tokens, labels, cu_seqlens)


@torch.no_grad()
def _reference_and_loss(trainer: FocalPOTrainer, batch: dict[str, Any]) -> list[str]:
    """Whether the policy starts as the reference, and the loss where it must."""
    findings = []
    trainer.model.train()
    tokens, refs = _fused(trainer, batch), _references(trainer, batch)
    sums = _sums(trainer, batch, tokens)
    if refs[0] is not None:
        count = (trainer._labels(batch) != -100).sum()
        off = float(sum((a - b).abs().sum() for a, b in zip(sums, refs, strict=True)) / count)
        print(f"reference: equals the policy up to {off:.1e} nats per token")
        if not off <= _tolerance(LOGPS, trainer):
            findings.append(
                f"the reference differs from the starting policy by {off:.2g} nats per token: give it the same"
                " weights and dtype (no adapter that is not new, no dropout)"
            )
    loss, out = _loss(trainer, batch, tokens, refs)
    expected = _expected(trainer, _sums(trainer, batch, _plain(trainer, batch)), out.lengths)
    print(f"first loss: {loss:.4f}" + (f", expected {expected:.4f}" if expected is not None else ""))
    if not loss.isfinite():
        findings.append(f"the first loss is {loss:.4g}: look for NaN or infinity in the model's weights")
    elif expected is not None and not abs(loss - expected) <= LOSS * abs(expected):
        findings.append(
            f"the first loss is {loss:.4f}, and must be {expected:.4f} with a reference equal to the policy:"
            " see the reference, the dropout of the model and the findings above"
        )
    return findings


def _expected(trainer: FocalPOTrainer, logps: Refs, lengths: torch.Tensor) -> float | None:
    """The definition's loss of the policy as its own reference: 0.5^γ·log 2 without a margin.

    An adaptive margin is 0 there.
    """
    focal = trainer.loss_fn.focal
    if focal is None or trainer.args.loss_type != [FOCALPO]:
        return None
    chosen, rejected = logps
    losses = reference.pair_losses(
        chosen,
        rejected,
        *((0.0, 0.0) if focal.reference_free else (chosen, rejected)),
        *(lengths.chunk(2) if focal.length_normalize else (1.0, 1.0)),
        beta=focal.beta,
        gamma=focal.current_gamma,
        modulation=focal.modulation,
        margin=focal.margin,
        label_smoothing=focal.label_smoothing,
    )
    return float(losses.mean())


def _against_plain(trainer: FocalPOTrainer, batch: dict[str, Any]) -> list[str]:
    """Log-probs, loss, and gradients of the head and of what it is given, by the fused head and by logits."""
    refs, found = _references(trainer, batch), {}
    trainer.model.train()
    parts = resolve_head(_base(trainer).get_output_embeddings())
    own = {id(p) for module in (*parts.modules, *(a.a for a in parts.adapters)) for p in module.parameters()}
    named = {n: p for n, p in trainer.model.named_parameters() if id(p) in own and p.requires_grad}
    for name, logps in (("fused", _fused), ("plain", _plain)):
        hidden: list[torch.Tensor] = []

        def cut(module: Any, args: Any, output: Any, hidden: list[torch.Tensor] = hidden) -> Any:
            hidden.append(output.last_hidden_state.detach().requires_grad_())
            output.last_hidden_state = hidden[-1]
            return output

        hook = backbone_of(_base(trainer)).register_forward_hook(cut)
        try:
            tokens = logps(trainer, batch)
        finally:
            hook.remove()
        loss, _ = _loss(trainer, batch, tokens, refs)
        gradients = torch.autograd.grad(loss, [hidden[-1], *named.values()], allow_unused=True)
        found[name] = loss.detach(), tokens.logps.detach(), gradients
    (loss, logps, gradients), (plain_loss, plain_logps, plain_gradients) = found["fused"], found["plain"]
    count = (trainer._labels(batch) != -100).sum()
    off = float((logps - plain_logps).abs().sum() / count)
    errors = {
        name: _error(*pair)
        for name, *pair in zip(("hidden states", *named), gradients, plain_gradients, strict=True)
    }
    worst = max(errors, key=lambda name: errors[name])
    print(
        f"fused against plain: loss {loss:.4f} and {plain_loss:.4f}, log-probs within {off:.1e} nats per token,"
        f" gradients within {100 * errors[worst]:.2g} %"
    )
    what = (
        "the model computes something that the fused head does not; report it, and train with TRL's own head"
    )
    findings = []
    if not (off <= _tolerance(LOGPS, trainer) and abs(loss - plain_loss) <= LOSS * abs(plain_loss)):
        findings.append(f"log-probs of the fused head are {off:.2g} nats per token off plain ones: {what}")
    if not errors[worst] <= _tolerance(GRADIENTS, trainer):
        findings.append(f"the gradient of {worst} is {100 * errors[worst]:.2g} % off the plain one: {what}")
    return findings


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    size = expected.float().norm()
    return float((found.float() - expected.float()).norm() / size) if size else float(found.float().norm())


def _longest(trainer: FocalPOTrainer, batch: dict[str, Any]) -> list[str]:
    """Forward and backward of the longest batch; each gradient is looked at and freed."""
    model, args, findings = trainer.model.train(), trainer.args, []
    if args.gradient_checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable(args.gradient_checkpointing_kwargs or None)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norms: dict[str, torch.Tensor] = {}

    def freeing(name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            norms[name] = parameter.grad.float().norm()
            parameter.grad = None

        return hook

    on_gpu = trainer.accelerator.device.type == "cuda"
    counter = contextlib.nullcontext() if on_gpu else LiveBytes()
    with ExitStack() as stack:
        for name, parameter in trained.items():
            stack.callback(parameter.register_post_accumulate_grad_hook(freeing(name)).remove)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with counter:
            loss, out = _loss(trainer, batch, _fused(trainer, batch), _references(trainer, batch))
            loss.backward()
    peak = torch.cuda.max_memory_allocated() if on_gpu else counter.peak  # type: ignore[union-attr]
    print(
        f"longest batch: {len(out.lengths) // 2} pairs, {batch['input_ids'].numel():,} tokens, loss {loss:.4f};"
        f" peak {_size(peak)} of weights and activations on one device"
    )
    broken = [name for name, norm in norms.items() if not norm.isfinite()]
    if broken or not loss.isfinite():
        findings.append(
            f"the longest batch has loss {loss:.4g} and {len(broken)} gradients that are not finite"
            f" {broken[:2]}: lower max_length, or take bf16 in place of fp16"
        )
    missing = [name for name in trained if name not in norms]
    if missing:
        findings.append(
            f"{len(missing)} trained parameters get no gradient, {missing[0]} among them: freeze them, or take"
            " their adapters off"
        )
    return findings
