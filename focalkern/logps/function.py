"""`linear_logps` of dense rows as an autograd Function: forward, then an exact or a certified backward."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from focalkern.autograd import FirstOrderFunction
from focalkern.distributed import AsyncReduction, VocabShard
from focalkern.logps.certificate import BackwardRecord, DroppedMass
from focalkern.logps.selection import count_pairs, list_pairs, select_pairs
from focalkern.logps.shards import reduced_over_shards, targets_of_shard
from focalkern.records import (
    Forward,
    Gradients,
    Head,
    KeptPairs,
    LogitTransform,
    Needs,
    RowGradients,
    RowValues,
    Saved,
)

# What a certified backward may allocate for gradients of logits and their products: with the lists of pairs
# and the block statistics, 8192 × 4096 × 128256 stays below 300 MiB.
WORKSPACE_BYTES = 224 * 2**20
# The share of kept pairs above which the backward is the exact one. Estimated for GPUs: by count of
# operations and bytes on an H200, the two take as long somewhere from 0.4 to 0.5. On CPUs the certified
# backward is faster up to 0.85, and accuracy stops it: in bf16 its error is 0.07, 0.23, 0.53 and 0.73 times
# that of bf16 logits at a share of 0.07, 0.22, 0.42 and 0.70, and on another model it was 1.16 times at 0.45
# (docs/certified-backward.md).
EXACT_ABOVE_KEPT_SHARE = 0.4


@dataclass(frozen=True)
class LogpsCall:
    """The arguments of one call that are not tensors."""

    transform: LogitTransform
    outputs: tuple[str, ...]
    tau: float  # 0: the backward is exact
    record: BackwardRecord | None  # of a certified backward
    backend: str
    shard: VocabShard | None  # where the rows of weight are not the whole vocabulary


class LinearLogpsFunction(FirstOrderFunction):
    """logps_t = z[t, y_t] − logsumexp_v z[t, v], without holding z.

        z = T(hidden @ weightᵀ + update_hidden @ update_weightᵀ + bias)

    Returns the members of `RowValues`; logps and entropy are differentiable in all that z is made of.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,  # [n, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        update_hidden: torch.Tensor | None,  # [n, R]
        update_weight: torch.Tensor | None,  # [V, R]
        targets: torch.Tensor,  # [n] int64
        call: LogpsCall,
    ):
        ctx.set_materialize_grads(False)
        head, form = Head(hidden, weight, bias, update_hidden, update_weight), form_of(call.backend)
        with torch.autocast(hidden.device.type, enabled=False):
            if call.shard is None:
                blocks = form.block_statistics(head, targets, call.transform, call.outputs)
                values, saved = form.reduced(blocks, targets, head, call.outputs)
            else:
                whole, targets = targets, targets_of_shard(targets, call.shard, head.vocab_size)
                blocks = form.block_statistics(head, targets, call.transform, call.outputs)
                values, saved = reduced_over_shards(blocks, whole, targets, head.vocab_size, call.shard)
        if not call.tau:
            saved = saved._replace(block_lse=None)
        ctx.save_for_backward(*head, targets, *saved)
        ctx.call = call
        ctx.mark_non_differentiable(*(x for x in values[2:] if x is not None))
        return tuple(values)

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy, *_):
        if grad_logps is None and grad_entropy is None:
            return (None,) * 7
        # Unpacked once: under activation checkpointing or offloading, each time costs, or is an error.
        tensors, call = ctx.saved_tensors, ctx.call
        head, targets, saved = Head(*tensors[:5]), tensors[5], Saved(*tensors[6:])
        grads = RowGradients(
            logps=torch.zeros_like(saved.lse) if grad_logps is None else grad_logps.contiguous(),
            entropy=None if grad_entropy is None else grad_entropy.contiguous(),
        )
        with torch.autocast(head.hidden.device.type, enabled=False):
            forward = Forward(head, targets, call.transform, saved)
            gradients = _gradients(forward, grads, call, Needs(*ctx.needs_input_grad[:5]))
        return *gradients, None, None


def _gradients(forward: Forward, grads: RowGradients, call: LogpsCall, needs: Needs) -> Gradients:
    """By an exact or a certified backward, and recorded as that."""
    form, pairs, dropped, reduction, share = form_of(call.backend), None, None, None, 1.0
    if call.shard is not None:
        reduction = AsyncReduction(call.shard.process_group)
        share = forward.head.vocab_size / call.shard.vocab_size
    if forward.saved.block_lse is not None and grads.entropy is None and forward.targets.numel():
        pairs, dropped = _select(forward, grads.logps, call.tau, share)
        if reduction is not None:
            reduction.start(dropped.totals)

    if pairs is None:
        gradients = form.exact_backward(forward, grads, needs, reduction)
    else:
        gradients = form.certified_backward(
            forward, grads.logps, pairs, call.tau, needs, reduction, WORKSPACE_BYTES
        )
    if reduction is not None:
        reduction.wait()
    if call.record is not None:
        call.record.fill(dropped)
    return gradients


def _select(
    forward: Forward, g: torch.Tensor, tau: float, share: float
) -> tuple[KeptPairs | None, DroppedMass]:
    """The pairs that are kept, None where they are too many."""
    saved = forward.saved
    assert saved.block_lse is not None
    rest_mass = saved.one_minus_p if saved.rest_mass is None else saved.rest_mass
    selection = select_pairs(saved.block_lse, saved.lse, rest_mass, forward.targets, g, tau, share)
    counts = count_pairs(selection.keep)
    if counts.share > EXACT_ABOVE_KEPT_SHARE:
        return None, DroppedMass.nothing(counts, g)
    return list_pairs(selection.keep, counts), DroppedMass.of(selection, counts, g)


def row_values(head: Head, targets: torch.Tensor, call: LogpsCall) -> RowValues:
    """The values of the rows, differentiable."""
    return RowValues(*LinearLogpsFunction.apply(*head, targets, call))


def form_of(backend: str) -> ModuleType:
    """The module that has block_statistics, reduced, exact_backward and certified_backward."""
    if backend == "triton":
        from focalkern.logps import triton_form

        return triton_form
    from focalkern.logps import torch_form

    return torch_form
