"""The two operators as `torch.autograd.Function`s: log-probs of the head's tokens, and the loss of each pair.

The first knows nothing of preferences, the second nothing of heads. Called by `focalkern.functional` and
`focalkern.loss`; both hand the work to a backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from focalkern.backends import Backend, HeadForward, LogitTransform, PairForward, PairObjective
from focalkern.layout import Rows, Sequences, sequence_of_output


@dataclass(frozen=True)
class DroppedMass:
    """What a certified backward left out; NaN until that backward has run, then filled in place."""

    per_token: torch.Tensor  # fp32, shape of the (shifted) labels
    kept_share: torch.Tensor  # [] fp32

    @classmethod
    def pending(cls, shape: torch.Size, device: torch.device) -> DroppedMass:
        nan = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        return cls(nan, torch.full((), torch.nan, dtype=torch.float32, device=device))

    def fill_exact(self) -> None:
        self.per_token.zero_()
        self.kept_share.fill_(1.0)


class LinearLogpsFunction(torch.autograd.Function):
    """logps_t = z[t, y_t] − logsumexp_v z[t, v] with z = T(hidden @ weightᵀ + bias), without holding z.

    Returns (logps, entropy, mean_logits, is_top1, log_sum_sq_probs), flat over the output positions, None
    where not asked for. The first two are differentiable in hidden, weight and bias.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,  # [M, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        rows: Rows,
        transform: LogitTransform,
        outputs: tuple[str, ...],
        dropped: DroppedMass | None,
        backend: Backend,
    ):
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            result: HeadForward = backend.head_forward(hidden, weight, bias, rows, transform, outputs)
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            rows.hidden_index,
            rows.output_index,
            rows.targets,
            rows.count,
            result.lse,
            result.one_minus_p,
            result.entropy,
        )
        ctx.output_shape, ctx.transform, ctx.dropped, ctx.backend = (
            rows.output_shape,
            transform,
            dropped,
            backend,
        )
        silent = (result.mean_logits, result.is_top1, result.log_sum_sq_probs)
        ctx.mark_non_differentiable(*(x for x in silent if x is not None))
        return result.logps, result.entropy, *silent

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy, *_):
        no_grad_for_options = (None,) * 5
        if grad_logps is None and grad_entropy is None:
            return None, None, None, *no_grad_for_options
        hidden, weight, bias, hidden_index, output_index, targets, count, lse, one_minus_p, entropy = (
            ctx.saved_tensors
        )
        rows = Rows(hidden_index, output_index, targets, count, ctx.output_shape)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = ctx.backend.head_backward(
                hidden,
                weight,
                bias,
                rows,
                ctx.transform,
                lse,
                one_minus_p,
                entropy,
                grad_logps,
                grad_entropy,
                ctx.needs_input_grad[:3],
            )
        if ctx.dropped is not None:
            ctx.dropped.fill_exact()
        return *gradients, *no_grad_for_options


class PairLossFunction(torch.autograd.Function):
    """L = −w(p)·log p of each pair from per-token log-probs, with the analytic dL/du (FocalPO Eq. 4 and 6).

    Returns the fields of `PairForward` but the last; only the losses are differentiable, in the log-probs
    alone.
    """

    @staticmethod
    def forward(
        ctx,
        logps: torch.Tensor,  # [outputs] flat, 0 where ignored
        ref_logps: torch.Tensor | None,  # [2B]
        sequences: Sequences,
        objective: PairObjective,
        backend: Backend,
    ):
        result: PairForward = backend.pair_forward(logps, sequences, ref_logps, objective)
        ctx.save_for_backward(result.grad_logps, sequences.offsets)
        ctx.output_count = logps.numel()
        constants = (result.prob, result.slope, result.logps, result.rewards)
        ctx.mark_non_differentiable(*constants)
        return result.losses, *constants

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, *_):
        grad_logps, offsets = ctx.saved_tensors
        per_sequence = grad_logps * grad_losses.repeat(2)
        return per_sequence[sequence_of_output(offsets, ctx.output_count)], None, None, None, None
