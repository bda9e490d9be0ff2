"""The two operators as `torch.autograd.Function`s: log-probs of the head's tokens, and the loss of each pair.

The first knows nothing of preferences, the second nothing of heads. Called by `focalkern.functional` and
`focalkern.loss`; both hand the work to a backend.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from focalkern.backends import Backend, HeadForward, LogitTransform, PairForward, PairObjective
from focalkern.certificate import DroppedMass
from focalkern.layout import Rows, Sequences, sequence_of_output
from focalkern.selection import count_pairs, list_pairs, row_gradients, select_pairs

# What a certified backward may allocate for gradients of logits and their products.
WORKSPACE_BYTES = 256 * 2**20


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
        tau: float,  # 0: the backward is exact
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
            result.block_lse if tau > 0 else None,
            result.entropy,
        )
        ctx.output_shape, ctx.transform, ctx.tau, ctx.dropped, ctx.backend = (
            rows.output_shape,
            transform,
            tau,
            dropped,
            backend,
        )
        silent = (result.mean_logits, result.is_top1, result.log_sum_sq_probs)
        ctx.mark_non_differentiable(*(x for x in silent if x is not None))
        return result.logps, result.entropy, *silent

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy, *_):
        no_grad_for_options = (None,) * 6
        if grad_logps is None and grad_entropy is None:
            return None, None, None, *no_grad_for_options
        # Unpacked once: under activation checkpointing or offloading, each time costs, or is an error.
        hidden, weight, bias, *rows, lse, one_minus_p, block_lse, entropy = ctx.saved_tensors
        rows = Rows(*rows, ctx.output_shape)
        head = (hidden, weight, bias, rows, ctx.transform, lse, one_minus_p)
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            g = pairs = None
            if block_lse is not None and grad_entropy is None and rows.targets.numel():
                g = row_gradients(grad_logps, rows)
                selection = select_pairs(block_lse, lse, one_minus_p, rows.targets, g, ctx.tau)
                counts = count_pairs(selection, rows)
                if counts.share <= ctx.backend.EXACT_ABOVE_KEPT_SHARE:
                    pairs = list_pairs(selection, counts)
                    if ctx.dropped is not None:
                        ctx.dropped.fill(selection, counts, rows)
                del selection
            if pairs is None:
                if ctx.dropped is not None:
                    ctx.dropped.fill_exact()
                gradients = ctx.backend.head_backward(*head, entropy, grad_logps, grad_entropy, needs)
            else:
                gradients = ctx.backend.head_backward_certified(
                    *head, g, pairs, ctx.tau, needs, WORKSPACE_BYTES
                )
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
