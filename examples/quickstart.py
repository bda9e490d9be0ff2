"""Preference training with the fused loss: DPO and FocalPO on real text, in minutes on two CPU cores.

    python examples/quickstart.py                                              # what `make demo` runs
    python examples/quickstart.py --data pairs.jsonl --model PATH_OR_ID        # your data, your model

Without arguments the pairs are docstrings of Python's standard library, and the model is a small Llama that
first learns the chosen ones. `preference_data.py` reads and batches the pairs. `quickstart_parts.py` has the
options, the model, the metrics and the plot.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import quickstart_parts as parts
import torch
from preference_data import DataError, PreferenceSet, docstring_pairs, read_pairs, split_pairs
from tqdm import tqdm

from focalkern import FocalPOOutput, FusedFocalPOLoss

HELD_OUT = 1000  # pairs, but no more than a sixth of all
EVALUATIONS = 8  # on the held-out pairs, over the course of a training


def main(arguments: Sequence[str] | None = None) -> None:
    args = parts.parse_arguments(arguments)
    try:
        policy, train, held_out = prepare(args)
    except (DataError, OSError) as error:
        raise SystemExit(f"Nothing was trained: {error}") from None

    start = {name: tensor.to("cpu", copy=True) for name, tensor in policy.model.state_dict().items()}
    runs = []
    for name, gamma in {"DPO": 0.0, "FocalPO": args.gamma}.items():
        policy.model.load_state_dict(start)
        loss_fn = FusedFocalPOLoss(beta=args.beta, gamma=gamma, **policy.logit_options)
        runs.append(train_preferences(f"{name} (γ={gamma:g})", loss_fn, policy, train, held_out, args))
    parts.report(runs, policy, args)


def prepare(args: argparse.Namespace) -> tuple[parts.Policy, PreferenceSet, PreferenceSet]:
    """The model to start from, and the training and the held-out pairs with their reference log-probs."""
    torch.manual_seed(args.seed)
    pairs = read_pairs(args.data) if args.data else docstring_pairs(args.seed)
    train_pairs, held_out_pairs = split_pairs(pairs, min(HELD_OUT, math.ceil(len(pairs) / 6)), args.seed)
    parts.show_example(train_pairs[0], len(pairs))
    if args.model:
        policy = parts.load_policy(args.model, args.device)
    else:
        policy = parts.small_policy(parts.train_tokenizer(train_pairs), args)
    train = parts.encode("training", train_pairs, policy, args)
    held_out = parts.encode("held-out", held_out_pairs, policy, args)
    policy.through_head(train.batch([0]))  # refuses a model whose logits are not those of the loss
    args.out.mkdir(parents=True, exist_ok=True)

    if not args.model:
        parts.supervised_fine_tuning(policy, train, args.seed)
    # The reference is the model as it is now. Its log-probs, taken once, replace a second model.
    train.ref_logps = policy.sequence_logps(train)
    held_out.ref_logps = policy.sequence_logps(held_out)
    return policy, train, held_out


def train_preferences(
    name: str,
    loss_fn: FusedFocalPOLoss,
    policy: parts.Policy,
    train: PreferenceSet,
    held_out: PreferenceSet,
    args: argparse.Namespace,
) -> parts.Run:
    steps = args.steps or train.steps_per_pass
    evaluate_at = {round(steps * share / EVALUATIONS) for share in range(1, EVALUATIONS + 1)}
    optimizer, scheduler = parts.adamw(policy.model, args.lr, steps)
    run = parts.Run(name, held_out={0: evaluate(policy, loss_fn, held_out)})
    for step, indices in enumerate(bar := tqdm(train.shuffled(steps, args.seed), name, steps), start=1):
        out = preference_loss(policy, loss_fn, train, indices)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        run.losses.append(out.loss.item())
        if step in evaluate_at:
            run.held_out[step] = evaluate(policy, loss_fn, held_out)
        accuracy = run.after["reward accuracy"].mean()
        bar.set_postfix(loss=f"{out.loss:.3f}", held_out_accuracy=f"{accuracy:.3f}")
    return run


@torch.no_grad()
def evaluate(policy: parts.Policy, loss_fn: FusedFocalPOLoss, data: PreferenceSet) -> dict[str, torch.Tensor]:
    outs = [preference_loss(policy, loss_fn, data, indices) for indices in data.by_length()]
    return parts.pair_metrics(outs)


def preference_loss(
    policy: parts.Policy, loss_fn: FusedFocalPOLoss, data: PreferenceSet, indices: list[int]
) -> FocalPOOutput:
    """Loss of some of the pairs: from hidden states and head, where a plain loss would start from logits."""
    batch = data.batch(indices)
    return loss_fn(
        policy.hidden(batch),  # [2B, T, H]
        policy.weight,  # [V, H]
        batch.labels,  # [2B, T]
        bias=policy.bias,
        ref_chosen_logps=data.ref_logps[0, indices],
        ref_rejected_logps=data.ref_logps[1, indices],
        shift=True,
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where a terminal has no γ
    main()
