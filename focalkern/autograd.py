"""The operators as `torch.autograd.Function`s: log-probs of a head's tokens, KL of two heads, loss of a pair.

Those of heads know nothing of preferences, those of pairs nothing of heads. Called by `focalkern.functional`,
`focalkern.kl`, `focalkern.pair_head` and `focalkern.loss`; all hand the work to a backend.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from focalkern.backends import (
    Backend,
    HeadForward,
    HeadInputs,
    KLForward,
    LogitTransform,
    PairForward,
    PairObjective,
)
from focalkern.certificate import DroppedMass, LeftOut
from focalkern.distributed import PendingSums, VocabShard, head_forward_of_shards, rows_of_shard
from focalkern.layout import Rows, Sequences, sequence_of_output
from focalkern.selection import count_pairs, list_pairs, row_gradients, select_pairs

# What a certified backward may allocate for gradients of logits and their products: with the lists of pairs
# and the block statistics, 8192 × 4096 × 128256 stays below 300 MiB.
WORKSPACE_BYTES = 224 * 2**20


class LinearLogpsFunction(torch.autograd.Function):
    """logps_t = z[t, y_t] − logsumexp_v z[t, v], without holding z.

        z = T(hidden @ weightᵀ + update_hidden @ update_weightᵀ + bias)

    Returns (logps, entropy, mean_logits, is_top1, log_sum_sq_probs), flat over the output positions, None
    where not asked for. The first two are differentiable in all that z is made of.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,  # [M, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        update_hidden: torch.Tensor | None,  # [M, R]
        update_weight: torch.Tensor | None,  # [V, R]
        rows: Rows,
        transform: LogitTransform,
        outputs: tuple[str, ...],
        tau: float,  # 0: the backward is exact
        dropped: DroppedMass | None,
        backend: Backend,
        shard: VocabShard | None,  # where the rows of weight are not the whole vocabulary
    ):
        ctx.set_materialize_grads(False)
        head = HeadInputs(hidden, weight, bias, update_hidden, update_weight)
        rest_mass = None
        with torch.autocast(hidden.device.type, enabled=False):
            if shard is None:
                result: HeadForward = backend.head_forward(head, rows, transform, outputs)
            else:
                own_rows = rows_of_shard(rows, shard, weight)
                result, rest_mass = head_forward_of_shards(
                    head, rows, own_rows, transform, outputs, shard, backend
                )
                rows = own_rows
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            update_hidden,
            update_weight,
            rows.hidden_index,
            rows.output_index,
            rows.targets,
            rows.count,
            result.lse,
            result.one_minus_p,
            rest_mass,
            result.block_lse if tau > 0 else None,
            result.entropy,
        )
        ctx.output_shape, ctx.transform, ctx.tau, ctx.dropped, ctx.backend, ctx.shard = (
            rows.output_shape,
            transform,
            tau,
            dropped,
            backend,
            shard,
        )
        silent = (result.mean_logits, result.is_top1, result.log_sum_sq_probs)
        ctx.mark_non_differentiable(*(x for x in silent if x is not None))
        return result.logps, result.entropy, *silent

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy, *_):
        no_grad_for_options = (None,) * 7
        if grad_logps is None and grad_entropy is None:
            return *(None,) * 5, *no_grad_for_options
        # Unpacked once: under activation checkpointing or offloading, each time costs, or is an error.
        *tensors, lse, one_minus_p, rest_mass, block_lse, entropy = ctx.saved_tensors
        head, rows = HeadInputs(*tensors[:5]), Rows(*tensors[5:], ctx.output_shape)
        forward = (head, rows, ctx.transform, lse, one_minus_p)
        needs, backend, dropped = ctx.needs_input_grad[:5], ctx.backend, ctx.dropped
        sums, share = None, 1.0
        if ctx.shard is not None:
            sums = PendingSums(ctx.shard.process_group)
            share = head.weight.shape[0] / ctx.shard.vocab_size
        with torch.autocast(head.hidden.device.type, enabled=False):
            g = pairs = left_out = None
            if block_lse is not None and grad_entropy is None and rows.targets.numel():
                g = row_gradients(grad_logps, rows)
                rest_mass = one_minus_p if rest_mass is None else rest_mass
                selection = select_pairs(block_lse, lse, rest_mass, rows.targets, g, ctx.tau, share)
                counts = count_pairs(selection, rows)
                if counts.share <= backend.EXACT_ABOVE_KEPT_SHARE:
                    pairs = list_pairs(selection, counts)
                    left_out = LeftOut.of(selection, counts, g)
                else:
                    left_out = LeftOut.nothing(counts, g)
                del selection
                if sums is not None:
                    sums.start(left_out.sums)
            if pairs is None:
                gradients = backend.head_backward(*forward, entropy, grad_logps, grad_entropy, needs, sums)
            else:
                gradients = backend.head_backward_certified(
                    *forward, g, pairs, ctx.tau, needs, WORKSPACE_BYTES, sums
                )
            if sums is not None:
                sums.wait()
            if dropped is not None:
                dropped.fill(left_out, rows)
        return *gradients, *no_grad_for_options


class SequenceSumFunction(torch.autograd.Function):
    """Sums of per-token log-probs over each sequence."""

    @staticmethod
    def forward(
        ctx,
        logps: torch.Tensor,  # [outputs] flat, 0 where ignored
        sequences: Sequences,
        backend: Backend,
    ):
        ctx.save_for_backward(sequences.offsets)
        ctx.output_count = logps.numel()
        return backend.sequence_sums(logps, sequences)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sums):
        (offsets,) = ctx.saved_tensors
        return grad_sums[sequence_of_output(offsets, ctx.output_count)], None, None


class PairLossFunction(torch.autograd.Function):
    """L = −w(p)·log p of each pair from its log-probs, with the analytic dL/du (FocalPO Eq. 4 and 6).

    Returns the fields of `PairForward` but the last; only the losses are differentiable, in the log-probs
    and the adaptive margin.
    """

    @staticmethod
    def forward(
        ctx,
        logps: torch.Tensor,  # [2B] sums over completion tokens
        ref_logps: torch.Tensor | None,  # [2B]
        lengths: torch.Tensor,  # [2B]
        adaptive_margin: torch.Tensor | None,  # [B]
        objective: PairObjective,
        backend: Backend,
    ):
        result: PairForward = backend.pair_forward(logps, ref_logps, lengths, adaptive_margin, objective)
        ctx.save_for_backward(result.grad_logps, result.slope)
        constants = (result.prob, result.slope, result.rewards)
        ctx.mark_non_differentiable(*constants)
        return result.losses, *constants

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, *_):
        grad_logps, slope = ctx.saved_tensors
        grad_margin = -slope * grad_losses if ctx.needs_input_grad[3] else None
        return grad_logps * grad_losses.repeat(2), None, None, grad_margin, None, None


class LinearKLFunction(torch.autograd.Function):
    """KL(ref ‖ policy) of each token, flat over the output positions, without holding either's logits.

    Differentiable in hidden, weight and bias of the policy; the reference is a constant.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,  # [M, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        ref_hidden: torch.Tensor,  # [M, H_ref]
        ref_weight: torch.Tensor,  # [V, H_ref]
        ref_bias: torch.Tensor | None,  # [V]
        rows: Rows,
        transform: LogitTransform,
        backend: Backend,
    ):
        ctx.set_materialize_grads(False)
        policy, ref = HeadInputs(hidden, weight, bias), HeadInputs(ref_hidden, ref_weight, ref_bias)
        with torch.autocast(hidden.device.type, enabled=False):
            result: KLForward = backend.kl_forward(policy, ref, rows, transform)
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            ref_hidden,
            ref_weight,
            ref_bias,
            rows.hidden_index,
            rows.output_index,
            rows.targets,
            rows.count,
            result.lse,
            result.ref_lse,
        )
        ctx.output_shape, ctx.transform, ctx.backend = rows.output_shape, transform, backend
        return result.kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_kl):
        no_grad_for_constants = (None,) * 6
        if grad_kl is None:
            return None, None, None, *no_grad_for_constants
        # Unpacked once: under activation checkpointing or offloading, each time costs, or is an error.
        *tensors, hidden_index, output_index, targets, count, lse, ref_lse = ctx.saved_tensors
        policy, ref = HeadInputs(*tensors[:3]), HeadInputs(*tensors[3:])
        rows = Rows(hidden_index, output_index, targets, count, ctx.output_shape)
        with torch.autocast(policy.hidden.device.type, enabled=False):
            needs = (*ctx.needs_input_grad[:3], False, False)
            gradients = ctx.backend.kl_backward(
                policy, ref, rows, ctx.transform, lse, ref_lse, grad_kl, needs
            )
        return *gradients[:3], *no_grad_for_constants
