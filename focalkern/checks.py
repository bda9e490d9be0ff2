"""Argument checks of the public functions: what was expected, what came, and the argument's name.

Values on a GPU are not looked at here: `focalkern.rows` brings all that are needed in one transfer.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist

from focalkern.records import OUTPUTS

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    exclude_low: bool = False,
    exclude_high: bool = False,
    kind: str = "a number",
) -> None:
    """A finite real number in [low, high], the ends left out as told."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {kind}; got {type(value).__name__} {value!r}")
    number = float(value)
    too_low = number <= low if exclude_low else number < low
    too_high = number >= high if exclude_high else number > high
    if not math.isfinite(number) or too_low or too_high:
        bounds = [f"{'>' if exclude_low else '>='} {low:g}"] if low > -math.inf else []
        bounds += [f"{'<' if exclude_high else '<='} {high:g}"] if high < math.inf else []
        raise ValueError(
            f"{name} must be finite{''.join(' and ' + bound for bound in bounds)}; got {value!r}"
        )


def check_integer(name: str, value: object, low: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int; got {type(value).__name__} {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}; got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__} {value!r}")


def check_outputs(outputs: object) -> tuple[str, ...]:
    names = (outputs,) if isinstance(outputs, str) else outputs
    if not isinstance(names, Iterable):
        choices = ", ".join(map(repr, OUTPUTS))
        raise TypeError(f"outputs must be names out of {choices}; got {type(outputs).__name__}")
    names = tuple(names)
    for name in names:
        check_choice("outputs", name, OUTPUTS)
    return names


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    # There is none before this module has been imported, which takes its time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _is_fake(value: torch.Tensor) -> bool:
    # Where nothing is traced, its module may not have been imported.
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(value, module.FakeTensor)


def check_tensor(name: str, value: object, hint: str = "") -> torch.Tensor:
    """A plain tensor, outside of what traces or transforms functions of tensors."""
    if is_dtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor; got a DTensor: only linear_logps and the losses take one, as the"
            " weight of a head that is split by vocabulary"
        )
    if not isinstance(value, torch.Tensor):
        part = next((part for part in ("last_hidden_state", "weight") if hasattr(value, part)), None)
        hint = f": take its .{part}" if part else hint
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}{hint}")
    if _is_fake(value):
        raise TypeError(
            f"{name} must hold values, which focalkern reads; got a FakeTensor: call it outside of what"
            " torch.export or FakeTensorMode traces"
        )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name} came in a transform of torch.func (grad, vmap, jvp, ...), and focalkern takes none: call"
            " loss.backward() or torch.autograd.grad, or use the plain PyTorch of focalkern.reference there"
        )
    return value


def check_first_tensor(name: str, value: object) -> None:
    """The tensor of a call whose device the others must be on."""
    if check_tensor(name, value).is_meta:
        raise TypeError(
            f"{name} must hold values, which focalkern reads; got a meta tensor: load the weights, or"
            " initialise them after to_empty, before the model is called"
        )


def check_head(
    hidden: torch.Tensor,  # [..., H]
    weight: torch.Tensor,  # [V, H]
    bias: torch.Tensor | None,  # [V]
    prefix: str = "",  # of the arguments' names
) -> None:
    """Shapes, dtypes and devices of the head's inputs, after autocast."""
    for name, value in (("hidden", hidden), ("weight", weight)):
        name = prefix + name
        check_tensor(name, value)
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64; got {value.dtype}")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(
            f"{prefix}weight must be [V, H] with V, H > 0; got {_shape(weight)}"
            + (" (a parameter sharded by ZeRO-3 or FSDP? gather it first)" if not weight.numel() else "")
        )
    if hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        is_vocabulary = hidden.shape[-1:] == weight.shape[:1]
        raise ValueError(
            f"{prefix}hidden must be [..., H] with H = {weight.shape[1]}, the width of {prefix}weight;"
            f" got {_shape(hidden)}" + (" (logits, or a transposed weight?)" if is_vocabulary else "")
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{prefix}weight must have the dtype of {prefix}hidden, {hidden.dtype}; got {weight.dtype}"
            " (autocast casts both)"
        )
    _check_device(f"{prefix}weight", weight, hidden)
    if bias is not None:
        check_tensor(f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias must be [V] = [{weight.shape[0]}]; got {_shape(bias)}")
        if bias.dtype != weight.dtype:
            raise TypeError(
                f"{prefix}bias must have the dtype of {prefix}weight, {weight.dtype}; got {bias.dtype}"
            )
        _check_device(f"{prefix}bias", bias, hidden)


def check_update(
    update_hidden: torch.Tensor,  # [..., R]
    update_weight: torch.Tensor,  # [V, R]
    hidden: torch.Tensor,  # [..., H]
    weight: torch.Tensor,  # [V, H]
) -> None:
    """A low-rank update beside the head, all after autocast: same tokens, same vocabulary, one rank."""
    for name, value in (("update.hidden", update_hidden), ("update.weight", update_weight)):
        check_tensor(name, value)
        if value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}; got {value.dtype}"
                " (autocast casts both)"
            )
        _check_device(name, value, hidden)
    vocab_size = weight.shape[0]
    if update_weight.dim() != 2 or update_weight.shape[0] != vocab_size or not update_weight.numel():
        raise ValueError(
            f"update.weight must be [V, R] with V = {vocab_size}, the vocabulary of weight, and R > 0;"
            f" got {_shape(update_weight)}"
        )
    expected = [*hidden.shape[:-1], update_weight.shape[1]]
    if list(update_hidden.shape) != expected:
        raise ValueError(
            f"update.hidden must be [..., T, R] = {expected}, the tokens of hidden and the rank of"
            f" update.weight; got {_shape(update_hidden)}"
        )


def check_lora(hidden: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: object) -> None:
    for name, value in (("hidden", hidden), ("a", a), ("b", b)):
        check_tensor(name, value)
    check_number("scaling", scaling)
    if a.dim() != 2 or not a.numel() or hidden.dim() < 2 or a.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"a must be [R, H] with the H of hidden, {_shape(hidden)}; got {_shape(a)}"
            + (" (a parameter sharded by ZeRO-3 or FSDP? gather it first)" if not a.numel() else "")
        )
    if b.dim() != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(f"b must be [V, R] with R = {a.shape[0]}, the rank of a; got {_shape(b)}")
    if a.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"a must have the dtype of hidden, {hidden.dtype}; got {a.dtype} (autocast casts both)"
        )
    _check_device("a", a, hidden)


def check_ref_head(
    ref_hidden: torch.Tensor,  # [..., H_ref]
    ref_weight: torch.Tensor,  # [V, H_ref]
    ref_bias: torch.Tensor | None,  # [V]
    hidden: torch.Tensor,  # [..., H]
    weight: torch.Tensor,  # [V, H]
) -> None:
    """A reference model beside the policy's head, both after autocast: same tokens, same vocabulary."""
    check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden must be [..., H_ref] with the tokens of hidden, {list(hidden.shape[:-1])};"
            f" got {_shape(ref_hidden)}"
        )
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight must be [V, H_ref] with V = {weight.shape[0]}, the vocabulary of weight;"
            f" got {_shape(ref_weight)} (one vocabulary with other padding? cut the larger weight, and"
            f" its bias, to the rows that both have: [:{min(weight.shape[0], ref_weight.shape[0])}])"
        )
    if ref_hidden.dtype != hidden.dtype:
        raise TypeError(
            f"ref_hidden must have the dtype of hidden, {hidden.dtype}; got {ref_hidden.dtype}"
            " (autocast casts both)"
        )
    _check_device("ref_hidden", ref_hidden, hidden)
    for name, value in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must be a constant; got a tensor that requires grad: detach it")


def check_labels(labels: torch.Tensor, hidden: torch.Tensor) -> None:
    """dtype, shape and device, which may be the host; values are looked at by `focalkern.rows`."""
    check_label_dtype(labels)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must be {list(hidden.shape[:-1])}, the shape of hidden without its last dimension;"
            f" got {_shape(labels)}"
        )
    _check_device("labels", labels, hidden, or_host=True)


def check_label_dtype(labels: torch.Tensor) -> None:
    check_tensor("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32; got {labels.dtype}")


def check_shift(shift: bool, labels: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> None:
    check_flag("shift", shift)
    if shift and labels.shape[-1] == 0 and cu_seqlens is None:
        raise ValueError(f"labels must have at least one position to shift; got {_shape(labels)}")


def check_pair_layout(
    name: str, tokens: torch.Tensor, shift: bool, cu_seqlens: torch.Tensor | None, features: str = ""
) -> None:
    """`tokens`, the argument `name`: padded [2B, T, ...], or packed [N, ...] with cu_seqlens.

    `features` are the dimensions that it has behind those of the tokens, such as ", H".
    """
    check_flag("shift", shift)
    dims = tokens.dim() - bool(features)
    if cu_seqlens is None:
        if dims != 2:
            raise ValueError(
                f"{name} must be [2B, T{features}], or [N{features}] with cu_seqlens; got {_shape(tokens)}"
            )
        if tokens.shape[0] % 2 or (tokens.shape[0] == 0 and not _is_one_of_ranks()):
            raise ValueError(
                f"{name} must hold an even number of sequences, B chosen then B rejected;"
                f" got {_shape(tokens)}"
            )
        if shift and tokens.shape[1] == 0:
            raise ValueError(f"{name} must have T > 0 positions to shift; got {_shape(tokens)}")
        return
    if dims != 1:
        raise ValueError(f"{name} must be [N{features}] when cu_seqlens is given; got {_shape(tokens)}")
    check_tensor("cu_seqlens", cu_seqlens)
    is_odd = cu_seqlens.dim() == 1 and cu_seqlens.numel() % 2 == 1
    if not is_odd or (cu_seqlens.numel() == 1 and not _is_one_of_ranks()):
        raise ValueError(f"cu_seqlens must be [2B + 1], B chosen then B rejected; got {_shape(cu_seqlens)}")
    check_cu_seqlens(cu_seqlens, tokens)


def _is_one_of_ranks() -> bool:
    """Alone, a batch without pairs is a mistake; among ranks, one that has none takes part all the same."""
    return dist.is_available() and dist.is_initialized()


def check_packed_hidden(hidden: torch.Tensor) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [N, H] when cu_seqlens is given; got {_shape(hidden)}")


def check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: torch.Tensor) -> None:
    """Boundaries of packed sequences, for `tokens` [N, ...]."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"cu_seqlens must be int64 or int32; got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < (1 if _is_one_of_ranks() else 2):
        raise ValueError(
            f"cu_seqlens must be [S + 1], the boundaries of S sequences; got {_shape(cu_seqlens)}"
        )
    _check_device("cu_seqlens", cu_seqlens, tokens, or_host=True)


def check_completions(lengths: torch.Tensor) -> None:
    """Length normalisation divides by the number of completion tokens: 0/0 is an error, not a value."""
    empty = (lengths == 0).nonzero().squeeze(-1).tolist()
    if empty:
        raise ValueError(
            "labels must leave at least one completion token in every sequence when length_normalize=True;"
            f" got none in sequences {empty}"
        )


def check_ref_logps(
    name: str,
    ref_logps: torch.Tensor | None,
    pairs: int,
    required_unless: str | None,  # what would make it unnecessary; None where it is
    like: torch.Tensor,
) -> None:
    if ref_logps is None:
        if required_unless is not None:
            raise ValueError(
                f"{name} must be given, [B] = [{pairs}] sums over completion tokens, unless"
                f" {required_unless}; got None"
            )
        return
    check_per_pair(name, ref_logps, pairs, like)
    if ref_logps.dtype in (torch.bfloat16, torch.float16):
        warn(
            f"{name} is {ref_logps.dtype}, in which a sum of log-probs is off by up to whole nats: keep it in"
            " fp32 (what a forward is given FSDP2's mixed precision casts, unless cast_forward_inputs=False)"
        )
    if ref_logps.requires_grad:
        raise ValueError(f"{name} must be a constant; got a tensor that requires grad: detach it")


def check_per_pair(name: str, value: torch.Tensor, pairs: int, like: torch.Tensor) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {value.dtype}")
    if value.shape != (pairs,):
        raise ValueError(f"{name} must be [B] = [{pairs}]; got {_shape(value)}")
    _check_device(name, value, like)


def check_pair_tensor(name: str, value: torch.Tensor, pairs: int, like: torch.Tensor) -> None:
    check_tensor(name, value, hint=" (set options of the function by functools.partial)")
    if value.dim() and value.shape[0] != pairs:
        raise ValueError(f"{name} must be [B, ...] with B = {pairs}, or 0-dim; got {_shape(value)}")
    _check_device(name, value, like)


def warn(message: str) -> None:
    """A warning of the caller: it points to the first frame outside the library and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("focalkern", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@functools.cache
def warn_once(message: str) -> None:
    """Once in a process, whatever calls for it."""
    warn(message)


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def _check_device(name: str, tensor: torch.Tensor, hidden: torch.Tensor, or_host: bool = False) -> None:
    if tensor.device != hidden.device and not (or_host and tensor.device.type == "cpu"):
        host = ", or on the CPU" if or_host else ""
        raise ValueError(
            f"{name} must be on the device of hidden, {hidden.device}{host}; got {tensor.device}"
            + (", which holds no values: load the weights first" if tensor.is_meta else "")
        )
