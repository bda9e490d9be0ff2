"""The fused head inside a transformers model: `model(..., labels=labels, fused_lm_head=True)`.

In place of TRL's `add_fused_lm_head`, with its signature and its output. The head module is looked up and
called at every forward, so that adapters, and hooks that gather its weight, take part. Used by the trainer
and by `patch`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from focalkern.backends import select_backend
from focalkern.compiler import not_compiled
from focalkern.lm_head import (
    call_head,
    check_variants,
    dtypes_of,
    head_logits,
    on_host_or_beside,
    resolve_head,
    would_unmerge,
)
from focalkern.logps.certificate import BackwardRecord
from focalkern.logps.operator import LinearLogps, linear_logps
from focalkern.low_rank import LowRankUpdate
from focalkern.model_logits import logit_scale_of, softcap_of
from focalkern.options import HeadOptions
from focalkern.records import OUTPUTS, LogitTransform
from focalkern.torch_logits import transform_logits
from focalkern.trial import agree, evaluating, picked, spread

# Beside `log_probs`, which is always there: what `linear_logps` has too, and one of our own.
_OUTPUTS = (*OUTPUTS, "mean_logits_everywhere")


@dataclass
class FusedHeadOutput(FusedCausalLMOutput):
    """TRL's output of a fused head, and what the certified backward leaves out.

    `dropped_mass`, of the shape of `log_probs`, and the 0-dim `kept_share` are NaN until the backward has
    run, and None when it is exact. `mean_logits_everywhere` [S, T] is `mean_logits` at every position, those
    without a label and the last one included.
    """

    mean_logits_everywhere: torch.Tensor | None = None
    dropped_mass: torch.Tensor | None = None
    kept_share: torch.Tensor | None = None
    dropped: BackwardRecord | None = None  # behind `certificate()` of what comes of it
    vocab_group: dist.ProcessGroup | None = None  # the ranks that share the head

    def token_logps(self) -> LinearLogps:
        """As `linear_logps` returned it, for the losses' `from_logps`."""
        assert self.log_probs is not None
        return LinearLogps(
            self.log_probs,
            self.entropy,
            self.mean_logits,
            self.is_top1,
            self.log_sum_sq_probs,
            self.dropped_mass,
            self.kept_share,
            self.dropped,
            self.vocab_group,
        )


def add_fused_lm_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    backward: str = "certified",
    tau: str | float = "auto",
    backend: str = "auto",
) -> None:
    """Let `model(..., labels=labels, fused_lm_head=True)` return a `FusedHeadOutput` in place of logits.

    Without `fused_lm_head=True` the forward is the model's own, so that generation is untouched. The logit
    transform (softcap, logit scale) is that of the model's config. The model is tried on a few tokens: its
    own logits must be these. A model that cannot be run yet (sharded, offloaded, or asking for images), and
    every model where torch.distributed has several ranks, is tried in its first fused forward.

    Args:
        model: a causal language model of transformers, wrapped by PEFT or not.
        temperature: the logits are divided by it.
        cast_lm_head_to_fp32: run the head in fp32, outside autocast.
        outputs: TRL's names: "log_probs" (always computed), "entropy", "log_sum_sq_probs", "mean_logits",
            "is_top1"; and "mean_logits_everywhere", which costs a product with the mean of the head's rows,
            or, where the logits have a softcap, a forward of the positions without a label.
        backward, tau, backend: as in `linear_logps`.

    Raises:
        TypeError: the head is not a linear layer, or carries an adapter other than plain LoRA or
            `trainable_token_indices`, or the model does something else to its last hidden state, or is an
            encoder-decoder; an option of the wrong type.
        ValueError: an option, an output, or a transform of the logits that is not known.
    """
    unknown = set(outputs) - {"log_probs", *_OUTPUTS}
    if unknown:
        raise ValueError(f"outputs must be out of {('log_probs', *_OUTPUTS)}; got {sorted(unknown)}")
    model = model.get_base_model() if is_peft_model(model) else model
    check_head(model)
    config = model.config.get_text_config()
    _check_vocabulary(model, config)
    options: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap_of(config),
        "logit_scale": logit_scale_of(config),
        "backward": backward,
        "tau": tau,
        "backend": backend,
    }
    HeadOptions(**options)
    if not torch.cuda.is_available():  # else a model may yet be moved there
        select_backend(backend, model.get_output_embeddings().weight)
    replaced = vars(model).get("forward")  # by someone else, for this model

    def own_forward(self, *args, **kwargs):
        return replaced(*args, **kwargs) if replaced else type(self).forward(self, *args, **kwargs)

    fused = _FusedHead(options, cast_lm_head_to_fp32, own_forward)
    fused.is_tried = _tried_on_tokens(model, fused)
    options["outputs"] = tuple(name for name in _OUTPUTS if name in outputs)

    # The signature of the model's own: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return own_forward(self, *args, **kwargs)
        return _fused_forward(self, fused, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


@dataclass
class _FusedHead:
    """What `add_fused_lm_head` has been told of a model, or has learnt."""

    options: dict[str, Any]  # of `module_logps`
    in_fp32: bool
    own_forward: Callable  # of the model, in place of which there is now the fused one
    is_tried: bool = False  # whether its logits are those of the fused head


def _fused_forward(
    model: PreTrainedModel,
    fused: _FusedHead,
    *args,
    labels: torch.Tensor | None = None,  # [S, T] input ids, prompt = -100
    # [S, T] each beside what predicts it, as context parallelism has them
    shift_labels: torch.Tensor | None = None,
    # [N] places in the flattened hidden states that labels [1, N] stand beside: where prompts are shared
    hidden_index: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> FusedHeadOutput:
    shift = shift_labels is None
    targets = labels if shift_labels is None else shift_labels
    if targets is None:
        raise ValueError("labels must be given with fused_lm_head=True; got None")
    config = model.config.get_text_config()
    kwargs["use_cache"] = False
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    if not (fused.is_tried or _would_unmerge(model)):
        count = targets.numel() if hidden_index is None else kwargs["position_ids"].numel()
        _try_model(model, fused, _labelled(targets, shift, hidden_index), count, *args, **kwargs)
        fused.is_tried = True
    backbone = backbone_of(model)(*args, **kwargs)

    head, hidden = model.get_output_embeddings(), backbone.last_hidden_state
    if hidden_index is not None:
        hidden = hidden.flatten(0, 1).index_select(0, hidden_index.to(hidden.device))[None]
    tokens, mean_logits_everywhere = module_logps(head, hidden, targets, shift, fused.in_fp32, fused.options)
    label_mask = (targets[:, 1:] if shift else targets).to(tokens.logps.device) != -100
    count = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -tokens.logps.sum() / count
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = load_balancing_loss_func(
            backbone.router_logits,
            # transformers < 5.6 has the number of GPT-OSS's experts on the model alone
            getattr(config, "num_experts", None) or model.num_experts,
            config.num_experts_per_tok,
            kwargs.get("attention_mask"),  # packed batches have none: every token counts
        )
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedHeadOutput(
        loss=loss,
        log_probs=tokens.logps,
        entropy=tokens.entropy,
        log_sum_sq_probs=tokens.log_sum_sq_probs,
        mean_logits=tokens.mean_logits,
        is_top1=tokens.is_top1,
        label_mask=label_mask,
        aux_loss=aux_loss,
        mean_logits_everywhere=mean_logits_everywhere,
        dropped_mass=tokens.dropped_mass,
        kept_share=tokens.kept_share,
        dropped=tokens.dropped,
        vocab_group=tokens.vocab_group,
    )


def module_logps(
    head: nn.Module,
    hidden: torch.Tensor,  # [S, T, H]
    labels: torch.Tensor,  # [S, T]
    shift: bool,
    in_fp32: bool,
    options: dict,
) -> tuple[LinearLogps, torch.Tensor | None]:
    """`linear_logps` of a head module with whatever adapter is active, run inside the modules' own calls.

    Beside it the mean logits of every position [S, T], where the outputs name them.
    """
    everywhere = "mean_logits_everywhere" in options["outputs"]
    outputs = tuple(name for name in options["outputs"] if name in OUTPUTS)
    if everywhere and options["softcap"] is not None:
        outputs = (*outputs, "mean_logits")
    options = {**options, "outputs": outputs}
    means: torch.Tensor | None = None

    def logps(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        update: LowRankUpdate | None,
    ) -> LinearLogps:
        nonlocal means
        call = functools.partial(linear_logps, hidden, weight, bias=bias, update=update)
        targets = on_host_or_beside(hidden, labels)
        tokens = call(targets, shift=shift, **options)
        if everywhere and options["softcap"] is None:
            means = _mean_logits(hidden, weight, bias, update, options)
        elif everywhere:
            means = _mean_softcapped_logits(call, tokens, targets, shift, options)
        return tokens

    tokens = call_head(head, hidden, logps, in_fp32)
    return tokens, means


@torch.no_grad()
def _mean_logits(
    hidden: torch.Tensor,  # [S, T, H]
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    update: LowRankUpdate | None,
    options: dict,
) -> torch.Tensor:  # [S, T]
    """Without a softcap the mean over the vocabulary is linear: mean_v z = hidden @ mean_v weight."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean = _whole(weight.mean(0, dtype=dtype))
        # By sequences: an fp32 copy of hidden need not be held.
        return torch.stack([sequence.to(dtype) @ mean for sequence in hidden])

    with torch.autocast(hidden.device.type, enabled=False):
        z = product(hidden, weight)
        if update is not None:
            z += product(update.hidden, update.weight)
        if bias is not None:
            z += _whole(bias.mean(dtype=dtype))
        return z * (options["logit_scale"] / options["temperature"])


def _whole(mean: torch.Tensor) -> torch.Tensor:
    """Of all rows of a head that is split by vocabulary."""
    return mean.full_tensor() if isinstance(mean, DTensor) else mean


@torch.no_grad()
def _mean_softcapped_logits(
    call: Callable[..., LinearLogps], tokens: LinearLogps, labels: torch.Tensor, shift: bool, options: dict
) -> torch.Tensor:  # [S, T]
    """With a softcap every logit counts: what the labels have not asked for is computed besides."""
    if shift:
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    options = {**options, "outputs": ("mean_logits",), "backward": "exact"}
    others = torch.zeros_like(labels).masked_fill_(labels != -100, -100)
    means, labelled = call(others, **options).mean_logits, tokens.mean_logits
    assert means is not None
    assert labelled is not None
    means[:, : labelled.shape[1]] += labelled
    return means


class NoAdapter:
    """In place of PEFT's class in TRL's modules: they refuse heads of it, ours those that it cannot run."""


@contextmanager
def replaced(holder: Any, **values: Any) -> Iterator[None]:
    """With other values for these attributes, and then its own again."""
    own = {name: getattr(holder, name) for name in values}
    try:
        for name, value in values.items():
            setattr(holder, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(holder, name, value)


def check_head(model: PreTrainedModel) -> None:
    """Raise TypeError where the fused head could not run, adapters that are not active now included."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder-decoder model; the fused head takes causal language models")
    head = model.get_output_embeddings()
    resolve_head(head)
    check_variants(head, list(getattr(head, "lora_variant", {})))
    if backbone_of(model) is model:
        raise TypeError(f"{name} must have a base_model whose last hidden state its head takes")


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The model below the head; the model itself where there is none."""
    if model.base_model is not model:
        return model.base_model
    return getattr(model, "model", model)  # of Llama 4's text model: its base_model_prefix names nothing


def is_whole(model: nn.Module) -> bool:
    """Whether the model can be run here and now: no parameter is sharded, or offloaded."""
    return not any(p.is_meta or not p.numel() or isinstance(p, DTensor) for p in model.parameters())


# ------------------------------------------------------------------------------------------ whether it fits


def _would_unmerge(model: nn.Module) -> bool:
    return any(would_unmerge(module) for module in model.modules())


class _NotRun(TypeError):
    """The model's own forward has failed."""


def _tried_on_tokens(model: PreTrainedModel, fused: _FusedHead) -> bool:
    """Whether a few tokens were enough to try the model: not if it is sharded, or takes more than tokens.

    Several ranks wait for their first forward, whatever each of them has: with accelerate's loading for FSDP
    the first rank alone has weights yet, and the others' trial would gather shards without it.
    """
    has_ranks = dist.is_initialized() and dist.get_world_size() > 1
    if has_ranks or not is_whole(model) or _would_unmerge(model):
        return False
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.arange(4, 12, device=model.device)[None] % vocab_size
    try:
        _try_model(model, fused, _labelled(ids, True), ids.numel(), input_ids=ids, use_cache=False)
    except _NotRun:
        return False
    return True


@not_compiled
@torch.no_grad()
def _try_model(
    model: PreTrainedModel,
    fused: _FusedHead,
    index: torch.Tensor,  # a few of the flattened positions
    count: int,  # of the positions
    *args,
    **kwargs,
) -> None:
    """Raise TypeError unless the model's logits are its head's of the backbone's last hidden state, scaled
    and capped as the config says: some have a layer in between (ModernBERT's decoder), or another transform.

    A model that wraps a language model may leave out the transform of that one's config: then so do we.
    """
    with evaluating(model):
        found, x, dtypes = _own_and_head_logits(model, fused, index, count, *args, **kwargs)
    options = fused.options
    scale, cap = options["logit_scale"], options["softcap"]
    transforms = [(scale, cap)]
    if model.config.get_text_config() is not model.config:
        transforms += [(1.0, cap), (scale, None), (1.0, None)]
    for scale, cap in transforms:
        expected, _ = transform_logits(x.clone(), LogitTransform(logit_scale=scale, softcap=cap))
        if agree(found, expected, dtypes):
            options |= {"logit_scale": scale, "softcap": cap}
            return
    raise _misfit(model, options)


def _misfit(model: PreTrainedModel, options: dict) -> TypeError:
    return TypeError(
        f"{type(model).__name__} must take its logits from the last hidden state by its output embeddings,"
        f" times {options['logit_scale']:g}, softcap {options['softcap']}; it computes something else, which"
        " the fused head does not know"
    )


def _own_and_head_logits(
    model: PreTrainedModel,
    fused: _FusedHead,
    index: torch.Tensor,  # a few of the flattened positions
    count: int,  # of the positions
    *args,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor, set[torch.dtype]]:  # [n, V] each, and the dtypes behind them
    """Logits by the model's own forward, at a few positions, and by its fused head before the transform.

    Both are of the same hidden states. The head is called for these positions alone.
    """
    head = model.get_output_embeddings()
    states: list[torch.Tensor] = []
    dtypes: list[torch.dtype] = []  # of what the head is given
    weights: list[torch.Tensor] = []  # of the head, as it is in the call

    def pick(module: nn.Module, inputs: tuple) -> tuple:
        hidden = inputs[0]
        if hidden.shape[:-1].numel() == count:
            hidden = picked(hidden, index)
        if fused.in_fp32:
            hidden = hidden.to(resolve_head(module).linear.weight.dtype)
        dtypes.append(hidden.dtype)
        return (hidden, *inputs[1:])

    hooks = [
        backbone_of(model).register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state)),
        head.register_forward_pre_hook(pick, prepend=True),  # before a layout makes a DTensor of it
        head.register_forward_pre_hook(lambda module, _: weights.append(resolve_head(module).linear.weight)),
    ]
    try:
        logits = fused.own_forward(model, *args, **kwargs).logits
        if not states:  # it has called a part of its backbone
            backbone_of(model)(*args, **kwargs)
    except Exception as error:
        raise _NotRun(
            f"{type(model).__name__} must give logits of its own, with which its fused head is compared; it"
            f" raises {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    hidden = picked(states[-1], index)
    if hidden.shape[-1] != resolve_head(head).linear.in_features:
        raise _misfit(model, fused.options)
    if dtypes:
        hidden = hidden.to(dtypes[-1])
    else:  # it uses the weight alone
        logits = picked(logits, index)
    x = head_logits(head, hidden, fused.in_fp32)
    if weights and isinstance(weights[-1], DTensor):
        logits = _of_all_shards(logits, weights[-1], x.shape[-1])
    rounded = dtypes_of(hidden, logits, x)
    return logits[0].to(x.device), x[0].to(torch.promote_types(x.dtype, torch.float32)), rounded


def _labelled(
    labels: torch.Tensor,  # [S, T]
    shift: bool,
    hidden_index: torch.Tensor | None = None,  # [S·T]
) -> torch.Tensor:
    """A few places in the flattened hidden states: with a label, if there are any."""
    if shift:
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    index = (labels != -100).flatten().nonzero()[:, 0]
    index = spread(index if len(index) else torch.arange(labels.numel(), device=labels.device))
    return index if hidden_index is None else hidden_index[index]


def _of_all_shards(logits: torch.Tensor, weight: DTensor, vocab_size: int) -> torch.Tensor:
    """The whole of logits [1, n, V], where a tensor-parallel head leaves each rank its own."""
    if logits.shape[-1] != vocab_size and not isinstance(logits, DTensor):
        places = [Shard(2) if place.is_shard() else place for place in weight.placements]
        shape = torch.Size((*logits.shape[:-1], vocab_size))
        stride = torch.empty(shape, device="meta").stride()
        logits = DTensor.from_local(logits, weight.device_mesh, places, shape=shape, stride=stride)
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def _check_vocabulary(model: PreTrainedModel, config: PretrainedConfig) -> None:
    unpadded = getattr(config, "unpadded_vocab_size", None)
    if unpadded is not None and unpadded != config.vocab_size:
        raise ValueError(
            f"unpadded_vocab_size must be vocab_size, {config.vocab_size}; got {unpadded}: the fused head of"
            f" {type(model).__name__} would give the padding of the vocabulary a probability"
        )
