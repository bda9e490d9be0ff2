"""The papers' figures and a comparison of their methods, on the quickstart's model and data.

    python examples/reproduce.py                     # 9 methods, 3 seeds: 12 minutes on two CPU cores
    python examples/reproduce.py --seeds 1 --steps 50
    python examples/reproduce.py --data pairs.jsonl --model PATH_OR_ID

Every method starts from one SFT model; a seed is an order of the training pairs. Besides accuracy, margin and
the KL to the reference this measures DynamicFocalPO's R(t) (Eq. 35), the share of the gradient that comes
from correctly ranked pairs. What came out is told in docs/reproduction.md. Options that --help does not list
are those of `quickstart.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from matplotlib.figure import Figure
from paper_figures import draw_all
from preference_data import Batch, DataError, PreferenceSet
from quickstart import preference_loss, prepare
from quickstart_parts import Policy, adamw, at_least, parse_arguments, update, wins
from tqdm import tqdm

import focalkern
from focalkern import (
    CosineGamma,
    ExponentialGamma,
    FocalPOOutput,
    FusedFocalPOLoss,
    LinearGamma,
    linear_kl,
)
from focalkern.diagnostics import gradient_contribution_ratio, pair_gradient_norms

SIMPO_BETA, GAMMA_BETA_RATIO, ALPHA = 10.0, 0.3, 0.05  # in the units of the SimPO and α-DPO authors' code
STAGES = {"early": (0.0, 0.2), "middle": (0.4, 0.6), "late": (0.8, 1.0)}
# DynamicFocalPO's Table 8, in per cent, of Llama-3-Instruct-8B.
TABLE_8 = {
    "DPO": (44.2, 45.8, 46.1),
    "FocalPO": (62.4, 61.7, 60.9),
    "Dynamic, cosine": (78.3, 62.5, 47.2),
}


def methods(beta: float, gamma: float) -> dict[str, Callable[[int], FusedFocalPOLoss]]:
    """Every method as a function of the number of steps."""
    margin, alpha = SIMPO_BETA * GAMMA_BETA_RATIO, SIMPO_BETA * ALPHA
    dynamic, simpo, alpha_dpo = FusedFocalPOLoss.dynamic, FusedFocalPOLoss.simpo, FusedFocalPOLoss.alpha_dpo
    return {
        "DPO": lambda steps: FusedFocalPOLoss.dpo(beta),
        "FocalPO": lambda steps: FusedFocalPOLoss(beta, gamma),
        "Dynamic, linear": lambda steps: dynamic(steps, beta, schedule=LinearGamma),
        "Dynamic, exponential": lambda steps: dynamic(steps, beta, schedule=ExponentialGamma),
        "Dynamic, cosine": lambda steps: dynamic(steps, beta, schedule=CosineGamma),
        "SimPO": lambda steps: simpo(SIMPO_BETA, margin),
        "α-DPO": lambda steps: alpha_dpo(SIMPO_BETA, margin, alpha),
        "focal × SimPO": lambda steps: simpo(SIMPO_BETA, margin, gamma=gamma),
        "focal × α-DPO": lambda steps: alpha_dpo(SIMPO_BETA, margin, alpha, gamma=gamma),
    }


class RecordedPolicy(Policy):
    """Keeps the last hidden states, and lets their gradient be kept."""

    def hidden(self, batch: Batch) -> torch.Tensor:  # [S, T, H]
        self.last_hidden = super().hidden(batch)
        if self.last_hidden.requires_grad:
            self.last_hidden.retain_grad()
        return self.last_hidden


@dataclass
class Run:
    """One method with one seed: R(t) step by step, and the trained policy on the held-out pairs."""

    method: str
    seed: int
    contribution: list[float] = field(default_factory=list)  # R(t), from the gradient of the hidden states
    # R of the trained policy on held-out pairs, likewise and from each pair's gradient of the parameters.
    final_contribution: float = 0.0
    final_exact_contribution: float = 0.0
    own_accuracy: float = 0.0  # by the method's own reward
    log_ratio_accuracy: float = 0.0  # by log(π_θ/π_ref), DPO's reward, the same for every method
    log_ratio_margin: float = 0.0  # of chosen over rejected, nats
    chosen_kl: float = 0.0  # KL(π_ref ‖ π_θ) per token, nats
    rejected_kl: float = 0.0
    seconds: float = 0.0

    def stage(self, name: str) -> float:
        """Mean of R(t) over a stage of training, without the first step, where log-ratios are level."""
        low, high = (round(share * len(self.contribution)) for share in STAGES[name])
        return statistics.fmean(self.contribution[max(low, 1) : max(high, 2)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=at_least(1), default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="default: %(default)s")
    own, rest = parser.parse_known_args(arguments)
    args = parse_arguments([*rest, "--out", str(own.out)])
    try:
        reproduce(args, own.seeds)
    except (DataError, OSError) as error:
        raise SystemExit(str(error)) from None


def reproduce(args: argparse.Namespace, seeds: int) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    claims = draw_all(args.out)
    policy, train, held_out = prepare(args)
    policy = RecordedPolicy(policy.model, policy.tokenizer)
    reference = copy.deepcopy(policy.model).requires_grad_(False)
    start = {name: tensor.to("cpu", copy=True) for name, tensor in policy.model.state_dict().items()}

    steps = args.steps or train.steps_per_pass
    make = methods(args.beta, args.gamma)
    # By the rewards of the first five and of the others: without a reference, rewards do not start level.
    before = {}
    for method in ("DPO", "SimPO"):
        evaluate(run := Run(method, seed=0), policy, reference, make[method](steps), held_out)
        before[method] = run.own_accuracy
    runs = []
    with tqdm(total=len(make) * seeds * steps, unit="step") as bar:
        for seed in range(seeds):
            for method, loss in make.items():
                policy.model.load_state_dict(start)
                bar.set_description(f"{method}, seed {seed}")
                run = Run(method, seed)
                loss_fn = loss(steps)
                train_one(run, policy, loss_fn, train, steps, args.lr, bar)
                evaluate(run, policy, reference, loss_fn, held_out)
                runs.append(run)

    plot(runs, args.out / "gradient-contribution.png")
    save(runs, claims, before, args)
    show(runs, before)
    print(f"In {args.out}: the papers' figures, gradient-contribution.png, reproduction.json")


def train_one(
    run: Run,
    policy: RecordedPolicy,
    loss_fn: FusedFocalPOLoss,
    train: PreferenceSet,
    steps: int,
    lr: float,
    bar: tqdm,
) -> None:
    loss_fn = configured(loss_fn, policy).train()
    optimizer, scheduler = adamw(policy.model, lr, steps)
    began = time.perf_counter()
    for step, indices in enumerate(train.shuffled(steps, run.seed)):
        loss_fn.set_step(step)
        out = preference_loss(policy, loss_fn, train, indices)
        update(out.loss, policy.model, optimizer, scheduler)
        norms = pair_gradient_norms(policy.last_hidden.grad)
        run.contribution.append(contribution(norms, reward_margins(out)))
        bar.update()
    run.seconds = time.perf_counter() - began


def reward_margins(out: FocalPOOutput) -> torch.Tensor:  # [pairs]
    return out.chosen_rewards - out.rejected_rewards


def contribution(norms: torch.Tensor, margins: torch.Tensor) -> float:
    return gradient_contribution_ratio(norms, margins).item()


def hidden_norms(
    policy: RecordedPolicy, loss_fn: FusedFocalPOLoss, data: PreferenceSet, indices: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:  # [pairs], [pairs]
    """Norm of each pair's gradient of the hidden states, from one backward; and the reward margins."""
    out = preference_loss(policy, loss_fn, data, indices)
    out.loss.backward()
    return pair_gradient_norms(policy.last_hidden.grad), reward_margins(out)


def parameter_norms(
    policy: Policy, loss_fn: FusedFocalPOLoss, data: PreferenceSet, indices: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:  # [pairs], [pairs]
    """Norm of each pair's gradient of the parameters, as Eq. 35 has it, from one backward for each pair."""
    parameters = list(policy.model.parameters())
    norms, margins = [], []
    for index in indices:
        out = preference_loss(policy, loss_fn, data, [index])
        gradients = torch.autograd.grad(out.loss, parameters)
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm())
        margins.append(reward_margins(out))
    return torch.stack(norms), torch.cat(margins)


def configured(loss_fn: FusedFocalPOLoss, policy: Policy) -> FusedFocalPOLoss:
    for option, value in policy.logit_options.items():
        setattr(loss_fn, option, value)
    return loss_fn


def evaluate(
    run: Run,
    policy: RecordedPolicy,
    reference: torch.nn.Module,
    loss_fn: FusedFocalPOLoss,
    held_out: PreferenceSet,
) -> None:
    """Fill in what the trained policy does on the held-out pairs."""
    configured(loss_fn, policy).eval()  # α-DPO's statistics stay as training left them
    batches = held_out.by_length()
    some = batches[len(batches) // 4 :: max(1, len(batches) // 4)]
    by_hidden = [hidden_norms(policy, loss_fn, held_out, indices) for indices in some]
    by_parameters = [parameter_norms(policy, loss_fn, held_out, indices) for indices in some]
    run.final_contribution = contribution(*map(torch.cat, zip(*by_hidden, strict=True)))
    run.final_exact_contribution = contribution(*map(torch.cat, zip(*by_parameters, strict=True)))

    frozen = Policy(reference, policy.tokenizer)
    own, margins, kl, tokens = [], [], torch.zeros(2), torch.zeros(2)
    for indices in batches:
        batch = held_out.batch(indices)
        with torch.no_grad():
            out = preference_loss(policy, loss_fn, held_out, indices)
            kl += token_kl(policy, frozen, batch).sum(-1).view(2, -1).sum(-1).cpu()
        own.append(reward_margins(out))
        refs = held_out.ref_logps[:, indices]
        margins.append((out.chosen_logps - refs[0]) - (out.rejected_logps - refs[1]))
        tokens += out.lengths.view(2, -1).sum(-1).cpu()
    run.own_accuracy = wins(torch.cat(own)).mean().item()
    run.log_ratio_accuracy = wins(torch.cat(margins)).mean().item()
    run.log_ratio_margin = torch.cat(margins).mean().item()
    run.chosen_kl, run.rejected_kl = (kl / tokens).tolist()


def token_kl(policy: RecordedPolicy, reference: Policy, batch: Batch) -> torch.Tensor:  # [S, T-1]
    return linear_kl(
        policy.last_hidden,
        policy.weight,
        reference.hidden(batch),
        reference.weight,
        batch.labels,
        bias=policy.bias,
        ref_bias=reference.bias,
        shift=True,
        **policy.logit_options,
    )


# ------------------------------------------------------------------------------------------------- the report


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {run.method: [other for other in runs if other.method == run.method] for run in runs}


def over_seeds(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return f"{mean}±{scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def show(runs: Sequence[Run], before: dict[str, float]) -> None:
    results, stages, proxy = {}, {}, {}
    for method, own in by_method(runs).items():
        results[method] = {
            "own accuracy": over_seeds([run.own_accuracy for run in own]),
            "accuracy": over_seeds([run.log_ratio_accuracy for run in own]),
            "margin": over_seeds([run.log_ratio_margin for run in own], digits=2),
            "KL": over_seeds([run.chosen_kl for run in own], digits=2),
        }
        stages[method] = {stage: over_seeds([run.stage(stage) for run in own], 100, 1) for stage in STAGES}
        stages[method]["Table 8"] = "/".join(map(str, TABLE_8.get(method, ())))
        proxy[method] = {
            "hidden states": over_seeds([run.final_contribution for run in own], 100, 1),
            "parameters": over_seeds([run.final_exact_contribution for run in own], 100, 1),
        }
    level = ", ".join(f"{method} {accuracy:.3f}" for method, accuracy in before.items())
    print(f"""Held-out pairs: mean ± standard deviation over the seeds
{as_table(results)}
own accuracy: by the method's own reward; before training {level} (the others have one of these rewards)
accuracy, margin: by log(π_θ/π_ref), in nats, for all
KL: KL(π_ref ‖ π_θ) of the chosen completions, in nats per token

R(t) in per cent, from the gradient of the hidden states, beside DynamicFocalPO's Table 8
{as_table(stages)}

R in per cent, on held-out pairs after training, from the gradient of
{as_table(proxy)}""")


def as_table(rows: dict[str, dict[str, str]]) -> str:
    return pd.DataFrame.from_dict(rows, orient="index").to_string()


def save(
    runs: Sequence[Run], claims: dict[str, float], before: dict[str, float], args: argparse.Namespace
) -> None:
    record = {
        "arguments": vars(args),
        "versions": {module.__name__: module.__version__ for module in (focalkern, torch, transformers)},
        "python": platform.python_version(),
        "claims": claims,
        "own_accuracy_before": before,
        "runs": [describe(run) for run in runs],
    }
    (args.out / "reproduction.json").write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")


def describe(run: Run) -> dict[str, Any]:
    fields = asdict(run) | {"contribution": [round(share, 4) for share in run.contribution]}
    return fields | {"R": {stage: run.stage(stage) for stage in STAGES}}


def plot(runs: Sequence[Run], path: Path) -> None:
    """R(t) as in DynamicFocalPO's Fig. 5: the mean over the seeds, smoothed over a tenth of the steps."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method, own in by_method(runs).items():
        mean = torch.tensor([run.contribution for run in own]).mean(0)[1:]
        window = max(1, len(mean) // 10)
        smooth = mean.unfold(0, window, 1).mean(-1)
        axes.plot(range(window, len(mean) + 1), smooth, label=method)
    axes.set(xlabel="step", ylabel="R(t): share of the gradient from correctly ranked pairs")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
