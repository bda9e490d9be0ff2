"""Sums over sequences, and the loss of each pair, as autograd Functions; neither knows of heads."""

from __future__ import annotations

from types import ModuleType

import torch

from focalkern.autograd import FirstOrderFunction
from focalkern.records import PairConstants, PairObjective
from focalkern.rows import sequence_of


class SequenceSumFunction(FirstOrderFunction):
    """Sums of the values of each sequence's rows."""

    @staticmethod
    def forward(
        ctx,
        values: torch.Tensor,  # [n]
        offsets: torch.Tensor,  # [S + 1]
        backend: str,
    ):
        ctx.save_for_backward(offsets)
        ctx.n = values.numel()
        return form_of(backend).sequence_sums(values.contiguous(), offsets)

    @staticmethod
    def backward(ctx, grad_sums):
        (offsets,) = ctx.saved_tensors
        return grad_sums[sequence_of(offsets, ctx.n)], None, None


class PairLossFunction(FirstOrderFunction):
    """L = −w(p)·log p of each pair from its log-probs, with the analytic dL/du (FocalPO Eq. 4 and 6).

    Returns the members of `PairForward` but the last; only the losses are differentiable, in the log-probs
    and the adaptive margin.
    """

    @staticmethod
    def forward(
        ctx,
        logps: torch.Tensor,  # [2B] sums over completion tokens
        adaptive_margin: torch.Tensor | None,  # [B]
        constants: PairConstants,  # without the adaptive margin
        objective: PairObjective,
        backend: str,
    ):
        constants = constants._replace(adaptive_margin=adaptive_margin)
        result = form_of(backend).pair_forward(logps, constants, objective)
        ctx.save_for_backward(result.grad_logps, result.slope)
        silent = (result.prob, result.slope, result.rewards)
        ctx.mark_non_differentiable(*silent)
        return result.losses, *silent

    @staticmethod
    def backward(ctx, grad_losses, *_):
        grad_logps, slope = ctx.saved_tensors
        grad_margin = -slope * grad_losses if ctx.needs_input_grad[1] else None
        return grad_logps * grad_losses.repeat(2), grad_margin, None, None, None


def form_of(backend: str) -> ModuleType:
    if backend == "triton":
        from focalkern.pairs import triton_form

        return triton_form
    from focalkern.pairs import objective

    return objective
