"""`patch()`: TRL's own trainers on the fused head of this library. `unpatch()` undoes it.

SFT, DPO, KTO, GRPO and RLOO have a fused head of TRL's: it is replaced. CPO and ORPO hold the logits: their
forward is replaced by one that does not.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import trl
from accelerate.state import AcceleratorState
from accelerate.utils import is_peft_model
from packaging.version import Version
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from focalkern.options import HeadOptions
from focalkern.trl.head import FusedHeadOutput, NoAdapter, add_fused_lm_head, replaced
from focalkern.trl.sharding import keep_output_dtype

_HEAD = "add_fused_lm_head"
_REFUSAL = "BaseTunerLayer"  # the class of the heads that TRL's trainers refuse
_TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")
# What is replaced or called, as TRL 1.16 has it: parameters and defaults.
_SIGNATURES = {
    "trl.trainer.utils.add_fused_lm_head": (
        "(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=('log_probs',))"
    ),
    **{
        f"trl.experimental.{name}.{name}_trainer.{name.upper()}Trainer.{method}": signature
        for name in ("cpo", "orpo")
        for method, signature in {
            "concatenated_inputs": "(batch, is_encoder_decoder=False, padding_value=0, device=None)",
            "concatenated_forward": "(self, model, batch)",
            "get_batch_logps": "(logits, labels, average_log_prob=False, is_encoder_decoder=False)",
            "get_batch_loss_metrics": "(self, model, batch, train_eval='train')",
        }.items()
    },
}
_OUTPUT_FIELDS = (
    "loss",
    "log_probs",
    "entropy",
    "log_sum_sq_probs",
    "mean_logits",
    "is_top1",
    "label_mask",
    "aux_loss",
)


@dataclasses.dataclass(frozen=True)
class _Patch:
    options: dict[str, Any]
    head: Callable  # in place of TRL's `own_head`
    own_head: Callable
    replaced: list[tuple[Any, str, Any]]  # what else: holder, name, what it was


_active: _Patch | None = None


def patch(*, backward: str = "certified", tau: str | float = "auto", backend: str = "auto") -> ExitStack:
    """Put TRL's SFT, DPO, KTO, GRPO, RLOO, CPO and ORPO trainers on the fused head of this library.

        focalkern.trl.patch()  # before the trainers are made

    The losses, the metrics and the weights stay what they are, up to rounding. An adapter on `lm_head` (plain
    LoRA) is trained, where TRL refuses it, except by GRPO's `cast_lm_head_to_fp32=True`. CPO and ORPO keep
    TRL's forward, with the logits, for an encoder-decoder model and in a subclass that overrides a part of
    it.

    A trainer that is made under the patch keeps its head for its lifetime, after `unpatch()` too; one that
    was made before is not affected. A second call with the same options changes nothing.

    Args:
        backward, tau, backend: as in `linear_logps`.

    Returns:
        A context manager, for `with focalkern.trl.patch():`, whose exit takes back what this call did.

    Raises:
        ValueError, TypeError: naming the option; ValueError where TRL is patched with other options.
        ImportError, RuntimeError: TRL is not one that this was written for. Nothing is replaced then.
    """
    global _active
    HeadOptions(backward=backward, tau=tau, backend=backend)
    options: dict[str, Any] = {"backward": backward, "tau": tau, "backend": backend}
    undo = ExitStack()
    if _active is not None:
        if _active.options != options:
            raise ValueError(
                f"TRL is patched with {_active.options} already; got {options}: call"
                " focalkern.trl.unpatch() before"
            )
        return undo

    modules = _checked_modules()
    head = functools.partial(_add_head, **options)
    current = _Patch(options, head, modules["utils"].add_fused_lm_head, [])
    grpo = modules["grpo"]
    _replace(current, grpo.GRPOTrainer, "__init__", _grpo_init(grpo))
    for name, forward in (("cpo", _cpo_forward), ("orpo", _orpo_forward)):
        trainer = getattr(modules[name], f"{name.upper()}Trainer")
        _replace(current, trainer, "__init__", _fused_init(trainer, forward, options))
    for name in _TRAINERS:
        if hasattr(modules[name], _REFUSAL):  # there is one if peft is
            _replace(current, modules[name], _REFUSAL, NoAdapter)
    for module in _modules_with(current.own_head):
        setattr(module, _HEAD, head)
    _active = current
    undo.callback(_undo, current)
    return undo


def unpatch() -> None:
    """Leave TRL as it was before `patch()`; without one, nothing happens."""
    if _active is not None:
        _undo(_active)


def _undo(current: _Patch) -> None:
    global _active
    if current is not _active:  # undone already
        return
    for holder, name, own in reversed(current.replaced):
        setattr(holder, name, own)
    for module in _modules_with(current.head):  # those that have been imported since, too
        setattr(module, _HEAD, current.own_head)
    _active = None


def _replace(current: _Patch, holder: Any, name: str, value: Any) -> None:
    current.replaced.append((holder, name, vars(holder)[name]))
    setattr(holder, name, value)


def _modules_with(head: Callable) -> list[types.ModuleType]:
    """TRL's modules that have this head under TRL's name; `vars` alone, so that no lazy one is loaded."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "trl"]
    return [x for x in modules if isinstance(x, types.ModuleType) and vars(x).get(_HEAD) is head]


# ------------------------------------------------------------------------------------------- what TRL must be


def _checked_modules() -> dict[str, types.ModuleType]:
    """TRL's modules by short name, loaded and found to be what `_SIGNATURES` says."""
    version = Version(trl.__version__)
    if not (1, 16) <= version.release < (2,):
        raise ImportError(
            f"focalkern.trl.patch() needs trl >= 1.16, < 2; got trl {version}: install another version of it,"
            " or leave TRL unpatched"
        )
    paths = {"utils": "trl.trainer.utils"}
    paths |= {name: f"trl.trainer.{name}_trainer" for name in _TRAINERS}
    paths |= {name: f"trl.experimental.{name}.{name}_trainer" for name in ("cpo", "orpo")}
    modules = {name: importlib.import_module(path) for name, path in paths.items()}

    for path, expected in _SIGNATURES.items():
        _check(path, expected, _signature(path))
    fields = tuple(field.name for field in dataclasses.fields(FusedCausalLMOutput))
    _check("the fields of FusedCausalLMOutput", str(_OUTPUT_FIELDS), str(fields))
    for name in ("grpo", "cpo", "orpo"):
        trainer = getattr(modules[name], f"{name.upper()}Trainer")
        own_init = vars(trainer).get("__init__")
        if own_init is None or "args" not in inspect.signature(own_init).parameters:
            _check(
                f"{paths[name]}.{trainer.__name__}.__init__", "its own, with an argument args", repr(own_init)
            )
    own_head = modules["utils"].add_fused_lm_head
    for name in _TRAINERS:
        found = getattr(modules[name], _HEAD, None)
        if found is not own_head:
            _check(f"{paths[name]}.{_HEAD}", "that of trl.trainer.utils", repr(found))
    return modules


def _signature(path: str) -> str:
    """Names and defaults of the parameters, without annotations."""
    module = path
    while module not in sys.modules:
        module = module.rpartition(".")[0]
    found: Any = sys.modules[module]
    for name in path.removeprefix(module).split(".")[1:]:
        found = getattr(found, name, None)
    if not callable(found):
        return "nothing of that name"
    signature = inspect.signature(found)
    bare = [x.replace(annotation=inspect.Parameter.empty) for x in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _check(what: str, expected: str, found: str) -> None:
    if found != expected:
        raise RuntimeError(
            f"{what} must be {expected}; got {found}: trl {trl.__version__} is not what this version of"
            " focalkern patches (or another library has patched it already). Install trl 1.16, or a newer"
            " focalkern, or leave TRL unpatched; nothing has been replaced"
        )


# ----------------------------------------------------------------------------------------------- constructors


def _add_head(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """As TRL's trainers call `add_fused_lm_head`: with their accelerator made, and no model sharded yet."""
    if AcceleratorState._shared_state:
        keep_output_dtype(AcceleratorState())
    add_fused_lm_head(model, *args, **kwargs)


def _grpo_init(module: types.ModuleType) -> Callable:
    """GRPO's own, with TRL's refusal where its fp32 cast would leave an adapter out of the generation."""
    own_init = module.GRPOTrainer.__init__
    signature = inspect.signature(own_init)
    own_refusal = getattr(module, _REFUSAL, None)

    @functools.wraps(own_init)
    def init(self, *args, **kwargs):
        config = signature.bind(self, *args, **kwargs).arguments.get("args")
        if own_refusal is None or not getattr(config, "cast_lm_head_to_fp32", False):
            return own_init(self, *args, **kwargs)
        with replaced(module, **{_REFUSAL: own_refusal}):
            return own_init(self, *args, **kwargs)

    return init


def _fused_init(trainer_class: type, forward: Callable, options: dict[str, Any]) -> Callable:
    """CPO's or ORPO's own, and a fused head for the model, before accelerate wraps its forward."""
    own_init = trainer_class.__init__  # type: ignore[misc]
    own_methods = ("concatenated_forward", "concatenated_inputs", "get_batch_logps", "get_batch_loss_metrics")
    own = {name: inspect.getattr_static(trainer_class, name) for name in own_methods}

    @functools.wraps(own_init)
    def init(self, *args, **kwargs):
        own_init(self, *args, **kwargs)
        model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        is_overridden = any(inspect.getattr_static(type(self), name) is not own[name] for name in own)
        if self.is_encoder_decoder or is_overridden or not isinstance(model, PreTrainedModel):
            return
        _add_head(model, outputs=("log_probs", "mean_logits_everywhere"), **options)
        self.concatenated_forward = types.MethodType(forward, self)

    return init


# ------------------------------------------------------------------------------------------- CPO's and ORPO's


def _cpo_forward(trainer: Any, model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, ...]:
    """CPOTrainer.concatenated_forward, with the mean of the logits over the vocabulary for the logits."""
    inputs = trainer.concatenated_inputs(
        batch, padding_value=trainer.pad_token_id, device=trainer.accelerator.device
    )
    outputs = _fused(trainer, model, inputs, inputs["concatenated_labels"])
    pairs = batch["chosen_labels"].shape[0]
    logps, lengths = outputs.log_probs.sum(-1), outputs.label_mask.sum(-1)
    nll = torch.zeros((), device=trainer.accelerator.device)
    if trainer.cpo_alpha != 0:
        nll = -logps[:pairs].sum() / lengths[:pairs].sum()
    if trainer.loss_type in ("ipo", "simpo"):
        logps = logps / lengths
    return _returned(trainer, outputs, logps, _mean_logits(outputs), nll, pairs)


def _orpo_forward(trainer: Any, model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, ...]:
    """ORPOTrainer.concatenated_forward: mean log-probs of completions, NLL of chosen with its prompt."""
    inputs = trainer.concatenated_inputs(
        batch, padding_value=trainer.padding_value, device=trainer.accelerator.device
    )
    ids, completion = inputs["concatenated_input_ids"], inputs["concatenated_labels"]
    pairs = batch["chosen_labels"].shape[0]
    nll_labels = ids.masked_fill(inputs["concatenated_attention_mask"] != 1, -100)
    nll_labels[pairs:] = -100
    # One head for both: TRL's collator makes the labels out of the ids.
    differ = (completion != -100) & (nll_labels != -100) & (completion != nll_labels)
    if differ.any():
        raise ValueError("chosen_labels must be the input ids, or -100, in ORPO's batches")
    outputs = _fused(trainer, model, inputs, torch.where(completion != -100, completion, nll_labels))

    token_logps = outputs.log_probs
    in_nll, in_completion = ((x[:, 1:] != -100).to(token_logps.device) for x in (nll_labels, completion))
    nll = -(token_logps * in_nll).sum() / in_nll.sum()
    logps = (token_logps * in_completion).sum(-1) / in_completion.sum(-1)
    return _returned(trainer, outputs, logps, _mean_logits(outputs)[:, :-1], nll, pairs)


def _fused(trainer: Any, model: torch.nn.Module, inputs: dict, labels: torch.Tensor) -> FusedHeadOutput:
    return model(
        inputs["concatenated_input_ids"],
        attention_mask=inputs["concatenated_attention_mask"],
        labels=labels,
        fused_lm_head=True,
        **({"output_router_logits": True} if trainer.aux_loss_enabled else {}),
    )


def _mean_logits(outputs: FusedHeadOutput) -> torch.Tensor:  # [2B, T]
    assert outputs.mean_logits_everywhere is not None
    return outputs.mean_logits_everywhere


def _returned(
    trainer: Any,
    outputs: FusedHeadOutput,
    logps: torch.Tensor,  # [2B]
    mean_logits: torch.Tensor,  # [2B, T], whose mean is that of the logits
    nll: torch.Tensor,
    pairs: int,
) -> tuple[torch.Tensor, ...]:
    result = (logps[:pairs], logps[pairs:], mean_logits[:pairs], mean_logits[pairs:], nll)
    return (*result, outputs.aux_loss) if trainer.aux_loss_enabled else result
