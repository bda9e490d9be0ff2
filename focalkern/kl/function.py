"""`linear_kl` of dense rows as an autograd Function."""

from __future__ import annotations

from types import ModuleType

import torch

from focalkern.autograd import FirstOrderFunction
from focalkern.records import Head, KLForward, LogitTransform, Needs


class LinearKLFunction(FirstOrderFunction):
    """KL(ref ‖ policy) of each row [n], without holding either's logits.

    Differentiable in hidden, weight and bias of the policy; the reference is a constant.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,  # [n, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        ref_hidden: torch.Tensor,  # [n, H_ref]
        ref_weight: torch.Tensor,  # [V, H_ref]
        ref_bias: torch.Tensor | None,  # [V]
        transform: LogitTransform,
        backend: str,
    ):
        ctx.set_materialize_grads(False)
        tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        with torch.autocast(hidden.device.type, enabled=False):
            result = form_of(backend).forward(Head(*tensors[:3]), Head(*tensors[3:]), transform)
        ctx.save_for_backward(*tensors, *result)
        ctx.transform, ctx.backend = transform, backend
        return result.kl

    @staticmethod
    def backward(ctx, grad_kl):
        if grad_kl is None:
            return (None,) * 8
        # Unpacked once: under activation checkpointing or offloading, each time costs, or is an error.
        tensors = ctx.saved_tensors
        policy, ref, saved = Head(*tensors[:3]), Head(*tensors[3:6]), KLForward(*tensors[6:])
        needs = Needs(*ctx.needs_input_grad[:3])
        with torch.autocast(policy.hidden.device.type, enabled=False):
            gradients = form_of(ctx.backend).backward(
                policy, ref, ctx.transform, saved, grad_kl.contiguous(), needs
            )
        return *gradients[:3], *(None,) * 5


def form_of(backend: str) -> ModuleType:
    if backend == "triton":
        from focalkern.kl import triton_form

        return triton_form
    from focalkern.kl import torch_form

    return torch_form
