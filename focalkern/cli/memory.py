"""Bytes of tensors: counted while a model runs, on real tensors or on fake ones that take no memory.

Used by `focalkern plan`, which runs a few layers on fake tensors, and by `focalkern check`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

_FLASH = "focalkern_counted"  # in place of FlashAttention, which fake tensors on a CPU cannot run


class LiveBytes(TorchDispatchMode):
    """Counts the storages that live while it is on. Those of `ignored` tensors are left out."""

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {id(x.untyped_storage()): 0 for x in ignored}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, id(storage))

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _FlashAttention(torch.autograd.Function):
    """Allocates what FlashAttention does: the output and a logsumexp, dq in fp32, dk and dv."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        dq = torch.empty_like(q, dtype=torch.float32)
        return dq.to(q.dtype), torch.empty_like(k), torch.empty_like(v)


def _flash(module: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return _FlashAttention.apply(*(x.transpose(1, 2).contiguous() for x in (q, k, v))), None


AttentionInterface.register(_FLASH, _flash)
AttentionMaskInterface.register(_FLASH, lambda *_, **__: None)


def fake_tensors() -> FakeTensorMode:
    """A context in which tensors have shapes and no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True)
class Activations:
    """Bytes of a step beside weights, their gradients and the head."""

    forward_peak: float
    kept: float  # when the forward has ended
    backward_peak: float

    def extrapolated(self, other: Activations, steps: float) -> Activations:
        """Steps from self in the direction of other: all are linear in layers, and in sequences."""
        values = {}
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            values[field.name] = here + steps * (there - here)
        return Activations(**values)


@dataclass(frozen=True)
class Run:
    """How the layers are run."""

    dtype: torch.dtype  # of the weights
    autocast: bool  # to bf16
    checkpointing: bool
    is_padded: bool = True
    wrap: Callable[[PreTrainedModel], Any] = lambda model: model  # adds an adapter


def activations(config: PretrainedConfig, run: Run, sequences: int, length: int) -> Activations:
    """Of a backbone with this configuration, by running its first layers on fake tensors."""
    layers, kinds = config.num_hidden_layers, getattr(config, "layer_types", None) or [""]
    # Layers of every kind, and as many again: after these, memory grows by the same with all that follow.
    few = min(1 + max(map(kinds.index, kinds)), layers)
    more = min(2 * few, layers)
    found = _of_layers(config, run, sequences, length, few)
    if few == layers:
        return found
    other = _of_layers(config, run, sequences, length, more)
    return found.extrapolated(other, (layers - few) / (more - few))


def _of_layers(config: PretrainedConfig, run: Run, sequences: int, length: int, layers: int) -> Activations:
    model = on_meta(config, run.dtype, layers, run.wrap)
    with fake_tensors():
        model = model.to_empty(device="cpu").train()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if run.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        ids = torch.zeros(sequences, length, dtype=torch.int64)
        mask = {"attention_mask": torch.ones_like(ids)} if run.is_padded else {}
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast):
                hidden = base.base_model(ids, **mask, use_cache=False).last_hidden_state
            forward_peak, kept = live.peak, live.now
            live.peak = 0
            hidden.backward(torch.empty_like(hidden))
        return Activations(forward_peak, kept, live.peak)


def on_meta(
    config: PretrainedConfig,
    dtype: torch.dtype,
    layers: int | None = None,
    wrap: Callable[[PreTrainedModel], Any] = lambda model: model,
) -> Any:
    """The model, or its first layers, without memory."""
    config = deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if "flash" in (config._attn_implementation or ""):
        config._attn_implementation = _FLASH
    with torch.device("meta"):
        return wrap(AutoModelForCausalLM.from_config(config, dtype=dtype))
