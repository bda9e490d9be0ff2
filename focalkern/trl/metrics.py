"""What `FocalPOTrainer` logs of a batch: TRL's metrics under TRL's names, and those of the focal loss.

All are 0-dim tensors on the device: nothing waits for it until they are logged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from focalkern.diagnostics import pair_values
from focalkern.logps.operator import LinearLogps
from focalkern.pairs.adaptive_margin import RunningMoments
from focalkern.pairs.base import PairOutput
from focalkern.pairs.focalpo import FocalPOOutput
from focalkern.rows import aligned_labels

# The sum over ranks of a tensor.
Reduce = Callable[[torch.Tensor], torch.Tensor]


def token_metrics(
    tokens: LinearLogps,
    labels: torch.Tensor,  # [2B, T], or packed [N]
    cu_seqlens: torch.Tensor | None,  # [2B + 1]
    sum_over_ranks: Reduce,
) -> dict[str, torch.Tensor]:
    """Means over completion tokens of all ranks: entropy, mean logits, accuracy on the chosen ones."""
    mask = aligned_labels(labels, -100, True, cu_seqlens) != -100
    if cu_seqlens is None:
        is_chosen = torch.arange(mask.shape[0], device=mask.device)[:, None] < mask.shape[0] // 2
    else:
        is_chosen = torch.arange(mask.shape[0], device=mask.device) < cu_seqlens[cu_seqlens.shape[0] // 2]
    assert tokens.entropy is not None and tokens.mean_logits is not None and tokens.is_top1 is not None
    # They are 0 where there is no completion token.
    per_token = {
        "chosen": mask & is_chosen,
        "rejected": mask & ~is_chosen,
        "entropy": tokens.entropy.detach(),
        "logits/chosen": tokens.mean_logits * is_chosen,
        "logits/rejected": tokens.mean_logits * ~is_chosen,
        "correct": tokens.is_top1 & is_chosen,
    }
    sums = sum_over_ranks(torch.stack([x.sum(dtype=torch.float32) for x in per_token.values()]))
    total = dict(zip(per_token, sums.unbind(), strict=True))
    return {
        "entropy": _ratio(total["entropy"], total["chosen"] + total["rejected"]),
        "logits/chosen": _ratio(total["logits/chosen"], total["chosen"]),
        "logits/rejected": _ratio(total["logits/rejected"], total["rejected"]),
        "mean_token_accuracy": _ratio(total["correct"], total["chosen"]),
    }


def logged_pair_metrics(
    out: PairOutput, sum_over_ranks: Reduce
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Means over the pairs of all ranks, and the number of pairs. Ranks may differ in theirs."""
    found = pair_values(out)
    values = {name: x for name, x in found.items() if name.startswith(("rewards/", "logps/"))}
    values["rewards/accuracies"] = (found["rewards/margins"] > 0).float()  # to TRL a tie is lost
    if isinstance(out, FocalPOOutput):
        values |= {"focal/weight": found["weight"], "focal/flipped": found["flipped"]}
    per_pair = torch.stack([*values.values(), torch.ones_like(values["rewards/accuracies"])])
    *sums, pairs = sum_over_ranks(per_pair.sum(1)).unbind()
    metrics = {name: total / pairs for name, total in zip(values, sums, strict=True)}
    if isinstance(out, FocalPOOutput):
        metrics["focal/gamma"] = found["gamma"]
    return metrics, pairs


def margin_metrics(statistics: RunningMoments) -> dict[str, torch.Tensor]:
    """μ and σ of α-DPO as the margin is normalised by them."""
    mean, std = statistics.moments()
    return {"alpha/mean": mean.float(), "alpha/std": std.float()}


def backward_metrics(
    dropped_mass: torch.Tensor,  # [...] per token, 0 where ignored
    kept_share: torch.Tensor,  # []
    completion_tokens: torch.Tensor,  # []
    sum_over_ranks: Reduce,
) -> dict[str, torch.Tensor]:
    """What the certified backward left out, once it has run: means over completion tokens of all ranks."""
    tokens = completion_tokens.to(kept_share)
    # Without any completion token the share is 1, as `linear_logps` has it.
    sums = torch.stack([dropped_mass.sum(), (1 - kept_share) * tokens, tokens])
    dropped, left_out, count = sum_over_ranks(sums).unbind()
    return {"focal/dropped_mass": _ratio(dropped, count), "focal/kept_share": 1 - _ratio(left_out, count)}


def _ratio(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return total / count.clamp(min=1)
