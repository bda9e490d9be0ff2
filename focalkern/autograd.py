"""First derivatives in reverse mode, and nothing else: the base of every autograd Function of the library.

Used by `focalkern.kl`, `focalkern.logps`, `focalkern.pairs` and `focalkern.distributed`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn

import torch

_INSTEAD = "use the plain PyTorch of focalkern.reference there, or torch's own linear and log_softmax"


class FirstOrderFunction(torch.autograd.Function):
    """An autograd Function that raises where anything but a first derivative, in reverse mode, is asked for.

    Torch's `once_differentiable` raises only where the incoming gradient requires grad, which that of a sum
    does not: a penalty on the gradient would get no gradient, without a word.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.backward = staticmethod(_once(cls.backward))  # type: ignore[method-assign]

    @staticmethod
    def jvp(ctx, *tangents) -> NoReturn:
        raise NotImplementedError(f"focalkern has no forward-mode derivatives: {_INSTEAD}")


def check_first_order(*grads: torch.Tensor | None) -> None:
    """Raise in a backward of which a graph is asked for, or that is given several gradients at once."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "focalkern has no second derivatives, and create_graph=True asks for them (gradient penalties,"
            f" Hessians): {_INSTEAD}"
        )
    if any(grad is not None and _is_batched(grad) for grad in grads):
        raise RuntimeError(
            "focalkern's backward takes one gradient at a time, and vmap, is_grads_batched=True and"
            f" vectorize=True bring several: call torch.autograd.grad for each, or {_INSTEAD}"
        )


def _is_batched(grad: torch.Tensor) -> bool:
    # That of is_grads_batched is still of the kind before torch.func.
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)


def _once(backward: Callable) -> Callable:
    @functools.wraps(backward)
    def checked(ctx, *grads):
        check_first_order(*grads)
        return backward(ctx, *grads)

    return checked
