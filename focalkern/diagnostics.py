"""What the papers plot of a training run, from the output of a loss and the gradient of its hidden states."""

from __future__ import annotations

import torch

from focalkern.pairs.base import PairOutput
from focalkern.pairs.focalpo import FocalPOOutput
from focalkern.pairs.pair_loss import PairLossOutput
from focalkern.rows import sequence_of


@torch.no_grad()
def pair_metrics(out: PairOutput) -> dict[str, torch.Tensor]:
    """Means over the pairs of a batch, 0-dim tensors on its device: nothing waits for it until they are read.

    | name                           | mean of                                                      |
    |--------------------------------|--------------------------------------------------------------|
    | rewards/chosen, /rejected      | β·score                                                      |
    | rewards/margins                | their difference                                             |
    | rewards/accuracies             | 1 where chosen has the higher reward, ½ where they are equal |
    | logps/chosen, /rejected        | sums over completion tokens                                  |
    | prob                           | p, the probability that chosen is preferred                  |
    | weight                         | −dL/du: the focal weight (FocalPO Eq. 6)                     |
    | flipped                        | 1 where the loss pushes a pair together                      |
    | gamma                          | γ at the step of the schedule                                |
    | adaptive_margin                | α·M* (α-DPO), where the loss has one                         |

    A `FusedPairLoss` has no u: in place of `weight` come `chosen_weight` and `rejected_weight`, −dloss/dlogps
    and dloss/dlogps with all factors of the loss that went backward (β, the mean over pairs, a gradient
    scaler's). `flipped` tells where one of them is negative; the three are NaN before `loss.backward()`.
    """
    return {name: value.mean() for name, value in pair_values(out).items()}


def pair_values(out: PairOutput) -> dict[str, torch.Tensor]:
    """What `pair_metrics` takes the means of: [B] each, γ 0-dim."""
    margins = out.chosen_rewards - out.rejected_rewards
    values = {
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,
        "logps/chosen": out.chosen_logps,
        "logps/rejected": out.rejected_logps,
        "prob": out.prob,
    }
    if isinstance(out, FocalPOOutput):
        values |= {"weight": out.weight, "flipped": (out.weight < 0).to(margins.dtype)}
        values["gamma"] = out.weight.new_full((), out.gamma)
        if out.adaptive_margin is not None:
            values["adaptive_margin"] = out.adaptive_margin
    elif isinstance(out, PairLossOutput):
        least = torch.minimum(out.chosen_weight, out.rejected_weight)
        values |= {
            "chosen_weight": out.chosen_weight,
            "rejected_weight": out.rejected_weight,
            "flipped": torch.where(least.isnan(), torch.nan, (least < 0).to(margins.dtype)),
        }
    return values


@torch.no_grad()
def pair_gradient_norms(
    dhidden: torch.Tensor,  # [2B, T, H], or packed [N, H]
    cu_seqlens: torch.Tensor | None = None,  # [2B + 1]
) -> torch.Tensor:  # [B]
    """‖∂L_i/∂hidden‖₂ of each pair, over the positions of both of its sequences; fp32.

    The hidden states of a pair take part in no other pair's loss, so that these come out of one backward of
    the whole batch, where ‖∇_θ L_i‖ would take one for each pair. `dhidden` is `hidden.grad` after
    `hidden.retain_grad()`.

    Raises:
        ValueError: `dhidden` has the wrong shape.
    """
    if cu_seqlens is None:
        if dhidden.dim() != 3 or dhidden.shape[0] % 2:
            raise ValueError(
                f"dhidden must be [2B, T, H], or [N, H] with cu_seqlens; got {list(dhidden.shape)}"
            )
        squares = dhidden.float().square().sum((1, 2))
    else:
        if dhidden.dim() != 2:
            raise ValueError(f"dhidden must be [N, H] when cu_seqlens is given; got {list(dhidden.shape)}")
        offsets = cu_seqlens.long()
        per_token = dhidden.float().square().sum(-1)
        squares = per_token.new_zeros(offsets.numel() - 1)
        squares.index_add_(0, sequence_of(offsets, per_token.numel()), per_token)
    chosen, rejected = squares.chunk(2)
    return (chosen + rejected).sqrt()


@torch.no_grad()
def gradient_contribution_ratio(
    norms: torch.Tensor,  # [B]
    margins: torch.Tensor,  # [B]
) -> torch.Tensor:  # []
    """R = Σ_{i: margin_i > 0} ‖∇L_i‖ / Σ_i ‖∇L_i‖, the share of correctly ranked pairs (DynamicFocalPO, 35).

    `norms` are those of `pair_gradient_norms`, `margins` is `out.chosen_rewards − out.rejected_rewards`. A
    pair is ranked correctly where the chosen has the higher reward; one that is level counts for half. Where
    the loss has no margin that is p > ½, as Eq. 35 has it; with one, p > ½ asks for more than the right
    order. NaN where all norms are 0.

    Raises:
        ValueError: the shapes differ.
    """
    if norms.shape != margins.shape:
        raise ValueError(f"norms must be [B] like margins, {list(margins.shape)}; got {list(norms.shape)}")
    return (norms * (margins.sign() + 1) / 2).sum() / norms.sum()
