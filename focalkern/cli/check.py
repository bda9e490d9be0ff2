"""Look at a recipe's data, model and loss on one device, before GPUs are rented for it.

    focalkern check RECIPE [--field value ...]
    focalkern check RECIPE --dry-run    # with a tiny model of the same architecture

Prints the data report, a pair with its mask, the first loss and its expected value, the fused head beside
plain logits, and a backward of the longest batch. Each finding says what to do. Exit status 1 with any.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import textwrap
import warnings
from collections.abc import Iterable
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
from focalkern.lm_head import HeadParts, call_head, resolve_head
from focalkern.logps.operator import LinearLogps
from focalkern.trial import evaluating
from focalkern.trl import FocalPOTrainer
from focalkern.trl.batches import tokens_of
from focalkern.trl.config import FOCALPO
from focalkern.trl.data import STREAMED_ROWS, token_ids
from focalkern.trl.head import backbone_of
from focalkern.trl.packing import sequence_places

# What passes for rounding: of losses, relative; of log-probs, mean nats per token; of gradients, relative.
LOSS = 0.02
LOGPS = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
GRADIENTS = {torch.float32: 1e-2, torch.bfloat16: 0.1}
_SHOWN = 46  # characters of a text

Batch = dict[str, Any]
Refs = tuple[torch.Tensor | None, torch.Tensor | None]


class _Trainer(FocalPOTrainer):
    """Leaves the reference's log-probs of the whole data set to the training."""

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "a tiny model of the same architecture, offline, on built-in pairs"
    parser.add_argument("--dry-run", action="store_true", help=help)


def overrides(arguments: argparse.Namespace) -> list[str]:
    fields = train.overrides(arguments) if arguments.dry_run else on_this_machine(arguments)
    return [*fields, "--report_to", "none", "--push_to_hub", "false"]


def run(arguments: argparse.Namespace) -> int:
    if PartialState().num_processes > 1:
        fail("check runs in one process: start it without accelerate launch or torchrun")
    with contextlib.ExitStack() as stack:
        if arguments.dry_run:
            train.make_small(arguments.job, stack.enter_context(train.scratch()))
        findings = check_job(arguments.job)
    for number, finding in enumerate(findings, start=1):
        print(textwrap.fill(f"FINDING {number}: {finding}", 100, subsequent_indent="  "))
    print(f"{len(findings)} findings." if findings else "No findings.")
    return 1 if findings else 0


def check_job(job: Job) -> list[str]:
    """Findings on a trainer of the job, or the reason why there is none."""
    data, held_out = job.data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainer's: `check` reads them off its reports
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer = _Trainer(**job.trainer_options(), train_dataset=data, eval_dataset=held_out)
        except (OSError, ImportError, ValueError, TypeError) as error:
            return [str(error)]
        return check(trainer)


def check(trainer: FocalPOTrainer) -> list[str]:
    """Print how a trainer's start looks, and return what is wrong with it, and what to do."""
    reports, rows = trainer.data_reports.values(), trainer.train_dataset
    print(*(str(report).splitlines()[0] for report in reports), sep="\n")
    findings = [text for report in reports for text in report.warnings()]
    if not isinstance(rows, Dataset):
        rows = Dataset.from_list(list(rows.take(STREAMED_ROWS)))

    def batch_of(indices: Iterable[int]) -> Batch:
        return trainer._prepare_inputs(trainer.data_collator([rows[i] for i in indices]))

    lengths = _lengths(rows, trainer.args.max_length)
    print(f"{lengths.sum(1).mean():.0f} tokens per pair on average, {lengths.max()} in the longest sequence")
    first = range(min(2, len(rows)))
    longest = _longest(trainer, rows, lengths)
    print(*_shown(trainer, batch_of(first)), sep="\n")
    findings += _too_long(trainer, int(lengths.max()))
    findings += _weights(trainer)
    out_of_range = _out_of_range(trainer, rows)
    if out_of_range:  # the model cannot be run
        return findings + out_of_range
    parts = ((_reference_and_loss, first), (_fused_and_plain, first), (_largest, longest.tolist()))
    for part, indices in parts:
        try:
            findings += part(trainer, batch_of(indices))
        except torch.OutOfMemoryError as error:
            findings.append(
                f"{len(indices)} pairs do not fit on this device with the whole model, even without gradients"
                f" and optimizer: lower max_length or {_size_of_batches(trainer)}, or see focalkern plan for"
                f" several GPUs ({str(error).splitlines()[0]})"
            )
            break
        except (ValueError, TypeError) as error:
            findings.append(str(error))
    return findings


# ------------------------------------------------------------------------------------------------- the data


def _lengths(rows: Dataset, max_length: int | None) -> np.ndarray:  # [pairs, 2]
    """Tokens of both sequences of each pair, as the collator cuts them."""
    found = [[len(prompt) + len(ids) for ids in completions] for prompt, *completions in token_ids(rows)]
    return np.minimum(found, np.inf if max_length is None else max_length).astype(int)


def _size_of_batches(trainer: FocalPOTrainer) -> str:
    by_tokens = trainer.args.max_tokens_per_batch is not None
    return "max_tokens_per_batch" if by_tokens else "per_device_train_batch_size"


def _longest(trainer: FocalPOTrainer, rows: Dataset, lengths: np.ndarray) -> np.ndarray:
    """Rows of the longest pairs that a training batch holds."""
    order = lengths.max(1).argsort(kind="stable")[::-1]
    size = getattr(trainer.args, _size_of_batches(trainer))
    if trainer.args.max_tokens_per_batch is not None:
        size = np.searchsorted(tokens_of(rows, trainer.args)[order].cumsum(), size, side="right")
    return order[:size]


def _too_long(trainer: FocalPOTrainer, longest: int) -> list[str]:
    positions = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or longest <= positions:
        return []
    return [
        f"the longest sequence has {longest} tokens, and the model was made for {positions}: set"
        f" max_length={positions} or less"
    ]


def _out_of_range(trainer: FocalPOTrainer, rows: Dataset) -> list[str]:
    size = min(trainer.model.get_input_embeddings().weight.shape[0], _head(trainer).linear.out_features)
    for i, parts in enumerate(token_ids(rows)):
        highest = max(int(ids.max(initial=0)) for ids in parts)
        if highest >= size:
            token = trainer._tokenizer.convert_ids_to_tokens(highest)
            return [
                f"row {i} of the train dataset has the token {token!r} with id {highest}, and the model has"
                f" {size} embeddings: take this model's tokenizer, or resize_token_embeddings() and save it"
            ]
    return []


def _shown(trainer: FocalPOTrainer, batch: Batch) -> list[str]:
    """Both sequences of the first pair, around the place where the mask ends."""
    ids, labels = list(batch["input_ids"].cpu()), list(trainer._labels(batch).cpu())
    if "cu_seqlens" in batch:
        ids = [batch["input_ids"].cpu().flatten()[places] for places in sequence_places(batch)]
        # With shared prompts the labels begin at the end of the prompt.
        labels = [
            nn.functional.pad(x, (len(tokens) - len(x), 0), value=-100)
            for x, tokens in zip(labels[0].split(batch["cu_seqlens"].diff().tolist()), ids, strict=True)
        ]
    lines = []
    for name, i in (("chosen", 0), ("rejected", len(ids) // 2)):
        is_scored = labels[i] != -100
        texts = ids[i][: int(is_scored.int().argmax())], ids[i][is_scored]
        masked, scored = (repr(trainer._tokenizer.decode(text))[1:-1] for text in texts)
        if len(masked) > _SHOWN:
            masked = f"... {masked[-_SHOWN:]}"
        if len(scored) > _SHOWN:
            scored = f"{scored[: _SHOWN // 2]} ... {scored[-_SHOWN // 2 :]}"
        lines += [f"  {name:<9} masked: {masked}", f"  {'':<9} scored: {scored}"]
    return lines


# ------------------------------------------------------------------------------------------------ the model


def _base(trainer: FocalPOTrainer) -> Any:
    model = trainer.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(trainer: FocalPOTrainer) -> HeadParts:
    return resolve_head(_base(trainer).get_output_embeddings())


def _computed(trainer: FocalPOTrainer) -> torch.dtype:
    """That the head's product is in."""
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return narrow.get(trainer.accelerator.mixed_precision, _head(trainer).linear.weight.dtype)


def _allowed(table: dict[torch.dtype, float], trainer: FocalPOTrainer) -> float:
    return table[torch.float32 if _computed(trainer).itemsize >= 4 else torch.bfloat16]


def _weights(trainer: FocalPOTrainer) -> list[str]:
    """Dtypes, adapters, and whether anything is trained."""
    head, computed = _head(trainer), _computed(trainer)
    dtypes = {p.dtype for p in backbone_of(_base(trainer)).parameters() if p.ndim > 1}
    own, body, computed_in = (
        ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in each))
        for each in ({head.linear.weight.dtype}, dtypes, {computed})
    )
    adapters = f", with {len(head.adapters)} adapter" if head.adapters else ""
    print(f"head: {list(head.linear.weight.shape)} in {own}, computed in {computed_in}{adapters}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer._warn_of_lost_updates()
    findings = [str(warning.message) for warning in caught]
    if head.linear.weight.dtype not in dtypes:
        findings.append(f"the head is {own} and the layers are {body}: load all in one (--dtype float32)")
    if not any(p.requires_grad for p in trainer.model.parameters()):
        findings.append("no parameter is trained: give some requires_grad=True, or an adapter")
    return findings


def _references(trainer: FocalPOTrainer, batch: Batch) -> Refs:
    if not trainer.args.needs_reference:
        return None, None
    return trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)


def _fused(trainer: FocalPOTrainer, batch: Batch) -> LinearLogps:
    with trainer.accelerator.autocast():
        return trainer._pair_tokens(trainer._forward(trainer.model, batch), batch)[0]


def _plain(trainer: FocalPOTrainer, batch: Batch) -> LinearLogps:
    """By all logits, in fp32, of the hidden states and weights that the fused head is given."""
    model, dtype, targets = _base(trainer), _computed(trainer), trainer._labels(batch)[:, 1:]

    def exact(x: Any) -> Any:
        return None if x is None else x.to(dtype).to(torch.promote_types(dtype, torch.float32))

    def logps(hidden: Any, weight: Any, bias: Any, update: LowRankUpdate | None) -> LinearLogps:
        if update is not None:
            update = LowRankUpdate(exact(update.hidden[:, :-1]), exact(update.weight))
        with torch.autocast(hidden.device.type, enabled=False):
            found = reference.linear_logps(
                exact(hidden[:, :-1]),
                exact(weight),
                targets,
                exact(bias),
                update=update,
                **logit_options(model.config),  # type: ignore[arg-type]
            )
        return LinearLogps(found["logps"])

    with trainer.accelerator.autocast():
        hidden = backbone_of(model)(**trainer._model_inputs(model, batch)).last_hidden_state
        if "hidden_index" in batch:
            hidden = hidden.flatten(0, 1)[batch["hidden_index"]][None]
        tokens = call_head(model.get_output_embeddings(), hidden, logps)
    return tokens.reshaped(lambda x: nn.functional.pad(x[0], (0, 1))) if "cu_seqlens" in batch else tokens


def _arguments(trainer: FocalPOTrainer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels and boundaries as the losses take them."""
    labels, cu_seqlens = trainer._labels(batch), batch.get("cu_seqlens")
    return labels if cu_seqlens is None else labels[0], cu_seqlens


def _loss(trainer: FocalPOTrainer, batch: Batch, tokens: LinearLogps, refs: Refs) -> tuple[torch.Tensor, Any]:
    """That of the first step. Running statistics stay at their start."""
    labels, cu_seqlens = _arguments(trainer, batch)
    lengths = trainer._completion_lengths(batch)
    return copy.deepcopy(trainer.loss_fn).train()(tokens, labels, refs, cu_seqlens, lengths)


@torch.no_grad()
def _reference_and_loss(trainer: FocalPOTrainer, batch: Batch) -> list[str]:
    """Whether the policy starts as the reference, and with the loss that it must have."""
    findings = []
    trainer.model.train()
    tokens, refs = _fused(trainer, batch), _references(trainer, batch)
    if refs[0] is not None:
        sums = trainer.loss_fn.reference_logps(tokens, *_arguments(trainer, batch))
        off = _mean_error(trainer, batch, torch.cat(sums), torch.cat(refs))  # type: ignore[arg-type]
        print(f"reference: equals the policy up to {off:.1e} nats per token")
        if not off <= _allowed(LOGPS, trainer):
            findings.append(
                f"the reference differs from the starting policy by {off:.2g} nats per token: give it the"
                " same weights and dtype (no adapter that is not new, no dropout)"
            )
    loss, out = _loss(trainer, batch, tokens, refs)
    plain = trainer.loss_fn.reference_logps(_plain(trainer, batch), *_arguments(trainer, batch))
    expected = _expected(trainer, plain, out.lengths)
    print(f"first loss: {loss:.4f}" + ("" if expected is None else f", expected {expected:.4f}"))
    if not loss.isfinite():
        findings.append(f"the first loss is {loss:.4g}: look for NaN or infinity in the model's weights")
    elif expected is not None and not abs(loss - expected) <= LOSS * abs(expected):
        findings.append(
            f"the first loss is {loss:.4f}, and must be {expected:.4f} while the policy equals its reference:"
            " see the findings above, and switch dropout off"
        )
    return findings


def _mean_error(trainer: FocalPOTrainer, batch: Batch, found: torch.Tensor, expected: torch.Tensor) -> float:
    """Nats per completion token."""
    return float((found - expected).abs().sum() / (trainer._labels(batch) != -100).sum())


def _expected(
    trainer: FocalPOTrainer, logps: tuple[torch.Tensor, torch.Tensor], lengths: torch.Tensor
) -> float | None:
    """The definition's loss of a policy that is its own reference: 0.5^γ·log 2 without a margin.

    An adaptive margin is 0 there. None for TRL's losses.
    """
    focal = trainer.loss_fn.focal
    if focal is None or trainer.args.loss_type != [FOCALPO]:
        return None
    own = (0.0, 0.0) if focal.reference_free else logps
    lengths_of = lengths.chunk(2) if focal.length_normalize else (1.0, 1.0)
    losses = reference.pair_losses(
        logps[0],
        logps[1],
        own[0],
        own[1],
        lengths_of[0],
        lengths_of[1],
        focal.beta,
        focal.current_gamma,
        focal.modulation,
        focal.margin,
        focal.label_smoothing,
    )
    return float(losses.mean())


def _fused_and_plain(trainer: FocalPOTrainer, batch: Batch) -> list[str]:
    """Log-probs, loss, and gradients of the head and of its input, by the fused head and by all logits."""
    refs, head, found = _references(trainer, batch), _head(trainer), []
    modules = (*head.modules, *(adapter.a for adapter in head.adapters))
    of_head = {id(p) for module in modules for p in module.parameters() if p.requires_grad}
    named = {name: p for name, p in trainer.model.named_parameters() if id(p) in of_head}
    for logps in (_fused, _plain):
        hidden: list[torch.Tensor] = []

        def leaf(module: nn.Module, args: Any, output: Any, hidden: list[torch.Tensor] = hidden) -> Any:
            hidden.append(output.last_hidden_state.detach().requires_grad_())
            output.last_hidden_state = hidden[-1]
            return output

        hook = backbone_of(_base(trainer)).register_forward_hook(leaf)
        try:
            with evaluating(trainer.model):  # without dropout
                tokens = logps(trainer, batch)
        finally:
            hook.remove()
        loss, _ = _loss(trainer, batch, tokens, refs)
        gradients = torch.autograd.grad(loss, [hidden[-1], *named.values()])
        found.append((loss.detach(), tokens.logps.detach(), gradients))
    (loss, fused, gradients), (plain_loss, plain, plain_gradients) = found
    off = _mean_error(trainer, batch, fused, plain)
    errors = {
        name: float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
        for name, a, b in zip(("hidden states", *named), gradients, plain_gradients, strict=True)
    }
    worst = max(errors, key=lambda name: errors[name])
    print(
        f"fused and plain head: loss {loss:.4f} and {plain_loss:.4f}; log-probs differ by {off:.1e} nats per"
        f" token, gradients by {100 * errors[worst]:.2g} %"
    )
    findings, what = [], "report it with the output of focalkern env, and train with TRL's own head"
    if not (off <= _allowed(LOGPS, trainer) and abs(loss - plain_loss) <= LOSS * abs(plain_loss)):
        findings.append(f"log-probs of the fused head are {off:.2g} nats per token off plain ones: {what}")
    if not errors[worst] <= _allowed(GRADIENTS, trainer):
        findings.append(f"the gradient of {worst} is {100 * errors[worst]:.2g} % off the plain one: {what}")
    return findings


def _largest(trainer: FocalPOTrainer, batch: Batch) -> list[str]:
    """Forward and backward of the longest pairs; each gradient is looked at and freed."""
    model, args = trainer.model.train(), trainer.args
    if args.gradient_checkpointing:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # of older transformers
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable(args.gradient_checkpointing_kwargs or None)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    norms: dict[str, torch.Tensor] = {}

    def free(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        norms[trained[id(parameter)]] = parameter.grad.float().norm()
        parameter.grad = None

    on_gpu, live = trainer.accelerator.device.type == "cuda", LiveBytes()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.ExitStack() as stack:
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            stack.callback(parameter.register_post_accumulate_grad_hook(free).remove)
        if not on_gpu:
            stack.enter_context(live)
        loss, out = _loss(trainer, batch, _fused(trainer, batch), _references(trainer, batch))
        loss.backward()
    peak = torch.cuda.max_memory_allocated() if on_gpu else live.peak
    print(
        f"longest batch: {len(out.lengths) // 2} pairs, {batch['input_ids'].numel():,} tokens, loss"
        f" {loss:.4f}; peak {peak / 2**20:,.1f} MiB of weights and activations on one device"
    )
    findings = []
    broken = [name for name, norm in norms.items() if not norm.isfinite()]
    if broken or not loss.isfinite():
        findings.append(
            f"the longest batch has loss {loss:.4g} and {len(broken)} gradients that are not finite: look at"
            " its pairs, lower max_length, or take bf16 in place of fp16"
        )
    missing = [name for name in trained.values() if name not in norms]
    if missing:
        findings.append(
            f"{len(missing)} trained parameters get no gradient, {missing[0]} among them: freeze them, or"
            " take their adapters off"
        )
    return findings
