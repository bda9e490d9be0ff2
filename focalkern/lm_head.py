"""`lm_head_logps`: `linear_logps` of an LM head module, run inside the module's own call.

There the weight is whole, whatever shards, gathers or offloads it; the head of a transformers model
(`focalkern.trl.head`) runs the same way.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from focalkern import checks
from focalkern.compiler import not_compiled
from focalkern.logps.operator import LinearLogps, linear_logps
from focalkern.low_rank import LowRankUpdate
from focalkern.trial import agree, evaluating


def lm_head_logps(
    lm_head: nn.Module,
    hidden: torch.Tensor,  # [..., T, H]
    labels: torch.Tensor,  # [..., T]
    *,
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backward: str = "certified",
    tau: str | float = "auto",
    backend: str = "auto",
    outputs: Sequence[str] = (),
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
) -> LinearLogps:
    """`linear_logps` of a head module: for models that DeepSpeed (ZeRO-3), FSDP2 or accelerate shard.

    They bring the weight by hooks on the module's call, in forward and in backward, and at any other time it
    is not there; so the operator runs in place of the module's forward. To be called in the forward of the
    model that they have wrapped, which returns the loss, in a tuple or dict if there is more: the backward is
    to start from what comes back, and DeepSpeed looks for it nowhere else.

        class Policy(nn.Module):
            def forward(self, input_ids, labels, **refs):  # refs: ref_chosen_logps, ref_rejected_logps
                hidden = self.model.model(input_ids).last_hidden_state
                tokens = lm_head_logps(self.model.lm_head, hidden, labels, shift=True)
                out = self.loss_fn.from_logps(tokens, labels, **refs, shift=True)
                return out.loss, out

        loss, out = engine(input_ids, labels, **refs)
        engine.backward(loss)  # DeepSpeed; loss.backward() otherwise

    With FSDP2 and DDP the forward may as well return `tokens`, and the loss be computed outside; it should
    where a mixed-precision policy of FSDP2 casts what the forward is given, as refs of −300 nats in bf16 are
    off by one.

    Args:
        lm_head: a `torch.nn.Linear` [V, H], or one with plain LoRA of PEFT, or PEFT's trained copy of it
            (`modules_to_save`) or of some of its rows (`trainable_token_indices`), with the adapters that are
            active now. A tensor-parallel one too, as in `linear_logps`; its own conversions of inputs and
            outputs do not take place. A head with a forward or an output hook of its own is tried on a few
            random rows, once, and must give what `torch.nn.Linear` does. Output hooks do not run in the fused
            call, which makes no logits; those of engines do.
        hidden: `[..., T, H]` in the dtype of the head's weight, unless autocast or FSDP2 casts both.
        labels, ignore_index, shift, temperature, softcap, logit_scale, backward, tau, backend, outputs,
            cu_seqlens: as in `linear_logps`.

    Returns:
        `LinearLogps`, for the losses' `from_logps`.

    Raises:
        TypeError: lm_head is not a linear layer, or computes more than one, or is quantised, or carries
            another adapter than these.
        RuntimeError: FSDP2 has sharded the weight, and would not gather it for this call.
        ValueError, TypeError: as `linear_logps`, naming the argument.
    """

    def logps(hidden, weight, bias, update):
        return linear_logps(
            hidden,
            weight,
            on_host_or_beside(hidden, labels),
            bias=bias,
            ignore_index=ignore_index,
            shift=shift,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            backward=backward,
            tau=tau,
            backend=backend,
            outputs=outputs,
            update=update,
            cu_seqlens=None if cu_seqlens is None else on_host_or_beside(hidden, cu_seqlens),
        )

    for name, value in (("hidden", hidden), ("labels", labels)):
        if not checks.is_dtensor(value):
            checks.check_tensor(name, value)
    return call_head(lm_head, hidden, logps)


def on_host_or_beside(hidden: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Labels on the host stay there, so that their forward does not wait for the device of hidden."""
    return given if given.device.type == "cpu" else given.to(hidden.device)


# DDP, with a static graph, finds the tensors of what a forward returns by pytrees only: unseen, their
# gradients would not be reduced.
_pytree.register_pytree_node(
    LinearLogps,
    lambda tokens: ([getattr(tokens, field.name) for field in fields(tokens)], None),
    lambda values, _: LinearLogps(*values),
)

# Of hidden, weight, bias, and the update that the adapters make up.
HeadFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, LowRankUpdate | None],
    LinearLogps,
]


@not_compiled  # it swaps the forwards of modules
def call_head(
    head: nn.Module,
    hidden: torch.Tensor,  # [..., T, H]
    function: HeadFunction,
    in_fp32: bool = False,  # outside autocast
) -> LinearLogps:
    """`function` inside the calls of the head's modules: their parameters are there, whoever shards them.

    Raises:
        TypeError: the head computes something else than `resolve_head` has found.
    """
    for module in head.modules():
        if would_unmerge(module):
            cast(Any, module).unmerge()  # as PEFT's forward does it
    parts = resolve_head(head)
    _check_gathered(head, parts.linear)
    _try_head(head, parts, hidden, in_fp32)
    return _call_head(head, parts, hidden, function, in_fp32)


def head_logits(
    head: nn.Module,
    hidden: torch.Tensor,  # [..., T, H]
    in_fp32: bool = False,
) -> torch.Tensor:  # [..., T, V]
    """The logits whose log-probs the fused head computes, before their transform: for a few rows."""
    return call_head(head, hidden, _plain_logits, in_fp32).logps


def _plain_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    update: LowRankUpdate | None,
) -> LinearLogps:  # with logits for log-probs
    logits = nn.functional.linear(_split_like(weight, hidden, replicate=True), weight, bias)
    if update is not None:
        low_rank = _split_like(weight, update.hidden, replicate=True)
        logits = logits + nn.functional.linear(low_rank, update.weight)
    return LinearLogps(logits.full_tensor() if checks.is_dtensor(logits) else logits)


def _call_head(
    head: nn.Module, parts: HeadParts, hidden: torch.Tensor, function: HeadFunction, in_fp32: bool
) -> LinearLogps:
    linear, adapters, trained_rows = parts
    box: list[LinearLogps] = []

    def run(hidden: torch.Tensor, low_rank: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        weight = _replicated(linear.weight)
        bias: torch.Tensor | None = None if linear.bias is None else _replicated(linear.bias)
        context: torch.autocast | nullcontext = nullcontext()
        if in_fp32:
            context = torch.autocast(hidden.device.type, enabled=False)
            hidden, weight = hidden.float(), weight.float()
            bias = None if bias is None else bias.float()
        update = None
        if low_rank is not None:
            factors = torch.cat([_replicated(adapter.b.weight) for adapter in adapters], 1)
            factors = _split_like(weight, factors.to(weight.dtype))
            update = LowRankUpdate(low_rank.to(hidden.dtype), factors)
            for adapter in adapters:
                if adapter.b.bias is not None:
                    added = adapter.scaling * _replicated(adapter.b.bias).to(weight.dtype)
                    added = _split_like(weight, added)
                    bias = added if bias is None else bias + added
        with context:
            if trained_rows is not None:
                update = trained_rows.update(hidden, weight)
                bias = None  # PEFT's forward adds none
            box.append(function(hidden, weight, bias, update))
        # Tensors in a tuple: what hooks on outputs (of ZeRO-3, FSDP) find the gradient by. No views, of which
        # FSDP2 warns: written to in place, they would lose the hook.
        return tuple(x if x is None else x.clone() for x in (box[-1].logps, box[-1].entropy))

    def with_adapters(hidden: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low_rank = [adapter.down(hidden) for adapter in adapters]
        inner = functools.partial(run, low_rank=torch.cat(low_rank, -1) if low_rank else None)
        for module in parts.modules:
            if module is not head:
                inner = functools.partial(_call_in_place_of, module, inner)
        return inner(hidden)

    # Offloaded, or sharded: there the hooks move what comes in, or bring the weight.
    if not linear.weight.is_meta and linear.weight.numel() and not checks.is_dtensor(linear.weight):
        hidden = hidden.to(linear.weight.device)
    result = _call_in_place_of(head, with_adapters, hidden)
    return replace(box.pop(), logps=result[0], entropy=result[1])


# --------------------------------------------------------------------------------- what a head is made of


@dataclass(frozen=True)
class Adapter:
    """One active LoRA of a head: logits += b(a(dropout(hidden)))·scaling."""

    a: nn.Linear  # weight [R, H]
    b: nn.Linear  # weight [V, R], perhaps with a bias [V]
    dropout: nn.Module
    scaling: float

    def down(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., R]
        return self.scaling * self.a(self.dropout(hidden.to(self.a.weight.dtype)))


@dataclass(frozen=True)
class TrainedRows:
    """PEFT's `trainable_token_indices`: other values for a few rows of the weight."""

    index: list[int]
    rows: torch.Tensor  # [R, H]

    def update(self, hidden: torch.Tensor, weight: torch.Tensor) -> LowRankUpdate:
        """hidden·(rows − weight[index]), added to the logits of these tokens: the weight is not copied."""
        if checks.is_dtensor(weight):
            raise TypeError("lm_head must be whole for trainable_token_indices; it is split by vocabulary")
        index = torch.tensor(self.index, device=weight.device)
        change = self.rows.to(weight) - weight[index]
        factors = weight.new_zeros(weight.shape[0], len(index))
        factors[index, torch.arange(len(index), device=index.device)] = 1
        return LowRankUpdate(nn.functional.linear(hidden, change.to(hidden.dtype)), factors)


class HeadParts(NamedTuple):
    """A head as it stands now: its linear layer, and the LoRAs or the trained rows that are active on it."""

    linear: nn.Linear
    adapters: list[Adapter]
    trained_rows: TrainedRows | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """Those whose parameters the fused head reads."""
        return [self.linear, *(adapter.b for adapter in self.adapters)]


def resolve_head(head: nn.Module | None) -> HeadParts:
    """What a head is made of.

    Raises:
        TypeError: it is not a linear layer, or carries something other than plain LoRA or trained rows.
    """
    name = type(head).__name__
    # Of its bases: FSDP2 gives the module that it shards a class of its own.
    if not any(base.__module__.partition(".")[0] == "peft" for base in type(head).__mro__):
        return HeadParts(_linear(head), [])
    from peft.tuners.lora import Linear
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    assert head is not None
    if isinstance(head, ModulesToSaveWrapper):  # a copy of the head that is trained
        active = next((key for key in head.active_adapters if key in head.modules_to_save), None)
        if head.disable_adapters or active is None:
            return HeadParts(_linear(head.original_module), [])
        return HeadParts(_linear(head.modules_to_save[active]), [])
    if isinstance(head, TrainableTokensWrapper):
        head = head.token_adapter
    if isinstance(head, TrainableTokensLayer):
        linear = _linear(head.get_base_layer())
        active = [key for key in head.active_adapters if key in head.trainable_tokens_delta]
        if head.disable_adapters or head.merged or not active:
            return HeadParts(linear, [])
        index = [token for key in active for token in head.token_indices[key]]
        rows = torch.cat([head.trainable_tokens_delta[key] for key in active])
        return HeadParts(linear, [], TrainedRows(index, rows))
    # Others of its kind (AdaLoRA's, those of single parameters) compute something else.
    if not isinstance(head, Linear):
        kind = f"{type(head).__module__}.{name}"
        raise TypeError(f"lm_head must be a linear layer, or one with LoRA; got the adapter {kind}")
    linear = _linear(head.get_base_layer())
    if head.disable_adapters or head.merged:
        return HeadParts(linear, [])
    active = [key for key in head.active_adapters if key in head.lora_A]
    check_variants(head, active)
    return HeadParts(
        linear,
        [
            Adapter(head.lora_A[key], head.lora_B[key], head.lora_dropout[key], head.scaling[key])
            for key in active
        ],
    )


def check_variants(head: Any, adapters: list[str]) -> None:
    """Raise TypeError where one of a LoRA head's adapters is not a plain low-rank update."""
    for key in adapters:
        if key in head.lora_variant:
            name = type(head.lora_variant[key]).__name__
            raise TypeError(f"lm_head must have plain LoRA; adapter {key!r} is {name}: not a low-rank update")


def would_unmerge(module: nn.Module) -> bool:
    """Whether a forward of it changes the model: PEFT's, with an adapter that is disabled but merged."""
    flags = (getattr(module, "merged", False), getattr(module, "disable_adapters", False))
    return flags == (True, True)


def _linear(module: nn.Module | None) -> nn.Linear:
    kind = type(module).__name__
    if not isinstance(module, nn.Linear):
        raise TypeError(f"lm_head must be a torch.nn.Linear for the fused head; got {kind}")
    weight = module.weight
    # Those of torchao and of float8 training have the dtype of what they stand for.
    is_wrapper = is_traceable_wrapper_subclass(weight) and not checks.is_dtensor(weight)
    if is_wrapper or weight.dtype not in checks.DTYPES:
        found = type(weight).__name__ if is_wrapper else weight.dtype
        raise TypeError(
            f"lm_head must not be quantised; its weight is {found}: leave it out of the quantisation"
            " (llm_int8_skip_modules=['lm_head'])"
        )
    others = {name for name, _ in module.named_parameters()} - {"weight", "bias"}
    if others and _own_forward(module) is not nn.Linear.forward:
        raise TypeError(
            f"lm_head must compute what torch.nn.Linear does; got {kind}, with {', '.join(sorted(others))}"
        )
    return module


# -------------------------------------------------------------------------- whether it computes that alone

# Their hooks bring, shard or move what is there, and change no value.
_ENGINES = ("accelerate", "deepspeed", "torch", "transformers")
_TRIED: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


def _try_head(head: nn.Module, parts: HeadParts, hidden: torch.Tensor, in_fp32: bool) -> None:
    """Raise TypeError unless a head with code of its own gives what the fused one computes, on a few rows.

    Once for the same code. There is none, and nothing to try, in nearly every head. The rows are not those of
    hidden, which may be empty or NaN on one rank: all of them try the head at the same call.
    """
    modules = dict.fromkeys((head, *parts.modules))
    foreign = [_reference(code) for module in modules for code in _foreign_code(module)]
    if not foreign or _TRIED.get(head) == foreign:
        return
    rows = _rows_for_trial(parts.linear.in_features).to(hidden.device, hidden.dtype)
    error = None
    try:
        with torch.no_grad(), evaluating(head):
            found = head(rows.to(parts.linear.weight.dtype) if in_fp32 else rows)
            expected = _call_head(head, parts, rows, _plain_logits, in_fp32).logps
        is_same = agree(found[0], expected[0], dtypes_of(rows, found, expected))
    except Exception as raised:
        is_same, error = False, raised
    if not is_same:
        kind = type(parts.linear)
        raise TypeError(
            f"lm_head must compute what torch.nn.Linear does; {kind.__module__}.{kind.__name__}, or what has"
            " replaced its forward, or a forward hook on it, computes something else, which the fused head"
            " does not know"
        ) from error
    if not expected.isnan().any(-1).all():  # as by a weight with NaN: then nothing has been compared
        _TRIED[head] = foreign


def _rows_for_trial(hidden_size: int) -> torch.Tensor:  # [1, 8, H] fp32
    """The same on every rank, of sizes from those of small logits to those that a softcap bends."""
    rows = torch.randn(8, hidden_size, generator=torch.Generator().manual_seed(0), device="cpu")
    return (rows * 2.0 ** torch.arange(-2, 6, device="cpu")[:, None])[None]


def dtypes_of(*tensors: torch.Tensor) -> set[torch.dtype]:
    """Theirs, and that of autocast if it is on."""
    device = tensors[0].device.type
    autocast = {torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set()
    return {x.dtype for x in tensors} | autocast


def _foreign_code(module: nn.Module) -> list[Callable]:
    """The forward, and the hooks on its output, that are neither PyTorch's nor an engine's."""
    forward = _own_forward(module)
    is_known = forward is nn.Linear.forward or _package(forward) == "peft"
    hooks = [hook for hook in module._forward_hooks.values() if _is_foreign(hook)]
    return hooks if is_known else [forward, *hooks]


def _reference(code: Callable) -> object:
    """What tells code apart from other code. Weak, as code may hold the head, whose entry would never go."""
    try:
        return weakref.ref(code)
    except TypeError:  # of a class with slots: tried at every call
        return object()


def _is_foreign(hook: Callable) -> bool:
    return _package(hook) not in _ENGINES


def _own_forward(module: nn.Module) -> Callable:
    """A module's forward, under that of accelerate's hooks and of transformers' tensor parallelism."""
    forward = vars(module).get(_forward_name(module), type(module).forward)
    if getattr(forward, "__module__", "") == "transformers.distributed.tensor_parallel":
        forward = type(module).forward
    return getattr(forward, "__func__", forward)


def _package(code: Callable) -> str:
    code = code.func if isinstance(code, functools.partial) else code
    return (getattr(code, "__module__", None) or type(code).__module__).partition(".")[0]


def _check_gathered(head: nn.Module, linear: nn.Linear) -> None:
    """Raise RuntimeError where FSDP2 has sharded the weight and this call will not gather it.

    Its shards look like those of a tensor-parallel head, and each rank has tokens of its own.
    """
    is_of_fsdp = checks.is_dtensor(linear.weight) and getattr(linear, "_is_fsdp_managed_module", False)
    # Torch's tensor parallelism, or transformers': then FSDP2 has gathered it, and it is sharded still.
    if not is_of_fsdp or _has_hooks_of_layouts(linear) or "forward" in vars(linear):
        return
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, FSDPModule) for module in (head, linear)):
        raise RuntimeError(
            "lm_head must be called while its weight is gathered, and FSDP2 has it sharded: call"
            " lm_head_logps inside the forward of the module that fully_shard was given, or give lm_head to"
            " fully_shard too"
        )


def _has_hooks_of_layouts(module: nn.Module) -> bool:
    return any(_is_hook_of_layouts(hook) for hook in module._forward_hooks.values())


def _is_hook_of_layouts(hook: Callable) -> bool:
    """Of torch's tensor parallelism, which converts what comes in and out: one tensor each, and a DTensor."""
    return getattr(hook, "__module__", None) == "torch.distributed.tensor._api"


def _replicated(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor itself of a DTensor that every rank has whole; the shards of others stay what they are."""
    if checks.is_dtensor(parameter) and all(place.is_replicate() for place in parameter.placements):
        return parameter.full_tensor()
    return parameter


def _split_like(weight: torch.Tensor, whole: torch.Tensor, replicate: bool = False) -> torch.Tensor:
    """What every rank has whole, as is the LoRA of a tensor-parallel head, in the shards of the weight.

    With `replicate` whole still, for a product with them.
    """
    if not checks.is_dtensor(weight) or checks.is_dtensor(whole):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated if replicate else replicated.redistribute(placements=weight.placements)


def _call_in_place_of(module: nn.Module, function: Callable, hidden: torch.Tensor):
    """`function(hidden)` as if it were the module's forward, with its hooks.

    Those of layouts are left out, as the function takes a sharded weight itself; and foreign forward hooks,
    as there are no logits for them to see.
    """
    with (
        _forward_replaced(module, function),
        _without_hooks(module._forward_pre_hooks, _is_hook_of_layouts),
        _without_hooks(module._forward_hooks, lambda hook: _is_hook_of_layouts(hook) or _is_foreign(hook)),
    ):
        return module(hidden)


@contextmanager
def _without_hooks(hooks: dict[int, Callable], is_unwanted: Callable[[Callable], bool]) -> Iterator[None]:
    """Some of a module's `_forward_hooks` or `_forward_pre_hooks` taken out, and then back in their order."""
    own = hooks.copy()
    for key, hook in own.items():
        if is_unwanted(hook):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(own)


@contextmanager
def _forward_replaced(module: nn.Module, function: Callable) -> Iterator[None]:
    name = _forward_name(module)
    own = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def _forward_name(module: nn.Module) -> str:
    # accelerate's own hooks (weights offloaded, spread over devices) wrap the forward and keep it under
    # another name.
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"
