"""Bytes of tensors: counted while a model runs, on real tensors or on fake ones that take no memory.

Used by `focalkern plan`, which runs a few layers on fake tensors, and by `focalkern check`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig

from focalkern.autograd import FirstOrderFunction

_FLASH = "focalkern_counted"  # in place of FlashAttention and FlexAttention, which take no fake tensors


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


class Activations(NamedTuple):
    """Bytes of a step beside weights, their gradients and the head."""

    forward_peak: float
    kept: float  # when the forward has ended
    backward_peak: float

    def extrapolated(self, other: Activations, steps: float) -> Activations:
        """Steps from here in the direction of the other: all grow linearly with layers and with sequences."""
        return Activations(*(a + steps * (b - a) for a, b in zip(self, other, strict=True)))


def activations(
    config: PretrainedConfig,
    peft_config: Any,
    dtype: torch.dtype,  # of the weights
    autocast: bool,  # to bf16
    checkpointing: bool,
    is_padded: bool,
    sequences: int,
    length: int,
) -> Activations:
    """Of the model's backbone, by running its first layers on fake tensors."""

    def of(layers: int) -> Activations:
        model = on_meta(config, dtype, peft_config, layers)
        with fake_tensors():
            model = model.to_empty(device="cpu").train()
            base = model if peft_config is None else model.get_base_model()
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            ids = torch.zeros(sequences, length, dtype=torch.int64)
            mask = {"attention_mask": torch.ones_like(ids)} if is_padded else {}
            with LiveBytes([*model.parameters(), *model.buffers()]) as live:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    hidden = base.base_model(ids, **mask, use_cache=False).last_hidden_state
                forward_peak, kept = live.peak, live.now
                live.peak = 0
                hidden.backward(torch.empty_like(hidden))
            return Activations(forward_peak, kept, live.peak)

    layers, kinds = config.num_hidden_layers, getattr(config, "layer_types", None) or [""]
    # Layers of every kind, and as many again: after these, memory grows by the same with all that follow.
    few = min(1 + max(map(kinds.index, kinds)), layers)
    more = min(2 * few, layers)
    return of(few) if few == more else of(few).extrapolated(of(more), (layers - few) / (more - few))


def fake_tensors() -> FakeTensorMode:
    """A context in which tensors have shapes and take no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def keeps_no_scores(config: PretrainedConfig) -> bool:
    """Whether attention takes memory that grows with the tokens, not with their square."""
    return "flash" in config._attn_implementation or config._attn_implementation == "flex_attention"


def on_meta(
    config: PretrainedConfig, dtype: torch.dtype, peft_config: Any = None, layers: int | None = None
) -> Any:
    """The model, or its first layers, without memory."""
    config = deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if keeps_no_scores(config):
        config._attn_implementation = _FLASH
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if peft_config is None:
            return model
        from peft import get_peft_model

        return get_peft_model(model, deepcopy(peft_config))


class _FlashAttention(FirstOrderFunction):
    """Allocates what they do: the output and a logsumexp, then dq in fp32, dk and dv."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        dq = torch.empty_like(q, dtype=torch.float32)
        return dq.to(q.dtype), torch.empty_like(k), torch.empty_like(v)


def _flash(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return _FlashAttention.apply(*(x.transpose(1, 2).contiguous() for x in (q, k, v))), None


AttentionInterface.register(_FLASH, _flash)
AttentionMaskInterface.register(_FLASH, lambda *_, **__: None)
