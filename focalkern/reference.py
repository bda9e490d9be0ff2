"""The definition in plain PyTorch: holds the `[tokens, vocab]` logits, leaves the gradient to autograd.

Slow and short on purpose. Every test compares with it, in float64 where it can, and so does `focalkern check`
on a user's model. Nothing else in the library calls it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from focalkern.low_rank import LowRankUpdate


def linear_logps(
    hidden: torch.Tensor,  # [..., H]
    weight: torch.Tensor,  # [V, H]
    labels: torch.Tensor,  # [...]
    bias: torch.Tensor | None = None,  # [V]
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    update: LowRankUpdate | None = None,
) -> dict[str, torch.Tensor]:
    """Per-token log-probs and the optional outputs, 0/False where ignored; labels are aligned with hidden."""
    keep = labels != ignore_index
    # The rows that count: NaN elsewhere takes no part.
    low_rank = None if update is None else update.hidden[keep] @ update.weight.T
    z, log_p = _head(hidden[keep], weight, bias, temperature, softcap, logit_scale, low_rank)

    target = labels[keep]
    values = {
        "logps": log_p.gather(-1, target[:, None]).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logits": z.to(log_p.dtype).mean(-1),
        "is_top1": z.argmax(-1) == target,
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, dim=-1),
    }
    return {name: value.new_zeros(labels.shape).masked_scatter(keep, value) for name, value in values.items()}


def linear_kl(
    hidden: torch.Tensor,  # [..., H]
    weight: torch.Tensor,  # [V, H]
    ref_hidden: torch.Tensor,  # [..., H_ref]
    ref_weight: torch.Tensor,  # [V, H_ref]
    labels: torch.Tensor,  # [...]
    bias: torch.Tensor | None = None,  # [V]
    ref_bias: torch.Tensor | None = None,  # [V]
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """Per-token KL(ref ‖ policy), 0 where ignored; labels are aligned with hidden."""
    keep = labels != ignore_index
    transform = (temperature, softcap, logit_scale)
    _, log_p = _head(hidden[keep], weight, bias, *transform)
    _, ref_log_p = _head(ref_hidden[keep], ref_weight, ref_bias, *transform)
    kl = F.kl_div(log_p, ref_log_p, reduction="none", log_target=True).sum(-1)
    return kl.new_zeros(labels.shape).masked_scatter(keep, kl)


def _head(
    hidden: torch.Tensor,  # [n, H]
    weight: torch.Tensor,  # [V, H]
    bias: torch.Tensor | None,  # [V]
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    low_rank: torch.Tensor | None = None,  # [n, V], what an update adds to the logits
) -> tuple[torch.Tensor, torch.Tensor]:  # [n, V], [n, V]
    """Transformed logits, and their log-softmax in fp32 (fp64 for fp64 inputs)."""
    z = F.linear(hidden, weight, bias)
    z = (z if low_rank is None else z + low_rank) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    return z, torch.log_softmax(z if z.dtype == torch.float64 else z.float(), dim=-1)


def pair_losses(
    chosen_logps: torch.Tensor,  # [B] sums over completion tokens
    rejected_logps: torch.Tensor,  # [B]
    ref_chosen_logps: torch.Tensor | float,  # [B]; 0 when reference-free
    ref_rejected_logps: torch.Tensor | float,
    chosen_lengths: torch.Tensor | float = 1.0,  # [B]; 1 when not length-normalised
    rejected_lengths: torch.Tensor | float = 1.0,
    beta: float = 0.1,
    gamma: float = 0.05,
    modulation: str = "focalpo",
    margin: float | torch.Tensor = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:  # [B]
    """Loss of each pair, as FocalPO Eq. 3 and 4 write it (α-DPO Eq. 12 for the margin)."""
    score_w = (chosen_logps - ref_chosen_logps) / chosen_lengths
    score_l = (rejected_logps - ref_rejected_logps) / rejected_lengths
    u = beta * (score_w - score_l) - margin

    def loss(u: torch.Tensor) -> torch.Tensor:
        p, one_minus_p = torch.sigmoid(u), torch.sigmoid(-u)
        w = {"focalpo": p**gamma, "inverse": one_minus_p**-gamma, "focal": one_minus_p**gamma}[modulation]
        return -w * F.logsigmoid(u)

    return (1 - label_smoothing) * loss(u) + label_smoothing * loss(-u)


def focalpo_loss(
    hidden: torch.Tensor,  # [2B, T, H]
    weight: torch.Tensor,  # [V, H]
    labels: torch.Tensor,  # [2B, T]
    bias: torch.Tensor | None = None,
    ref_chosen_logps: torch.Tensor | None = None,
    ref_rejected_logps: torch.Tensor | None = None,
    *,
    length_normalize: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    update: LowRankUpdate | None = None,
    **objective,
) -> torch.Tensor:  # [B]
    """Losses of B pairs from hidden states: `linear_logps`, a sum over each sequence, `pair_losses`."""
    head_options = (ignore_index, temperature, softcap, logit_scale, update)
    logps = linear_logps(hidden, weight, labels, bias, *head_options)["logps"]
    chosen_logps, rejected_logps = logps.sum(-1).chunk(2)
    chosen_lengths, rejected_lengths = (
        (labels != ignore_index).sum(-1).chunk(2) if length_normalize else (1.0, 1.0)
    )
    return pair_losses(
        chosen_logps,
        rejected_logps,
        0.0 if ref_chosen_logps is None else ref_chosen_logps,
        0.0 if ref_rejected_logps is None else ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
        **objective,
    )
