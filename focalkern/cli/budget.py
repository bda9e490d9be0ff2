"""Bytes and operations of a recipe on a machine: the cost model behind `focalkern plan`.

Parameters are counted on the meta device, activations by running layers on fake tensors (`memory`). The rest
is arithmetic on what DeepSpeed, FSDP2 and accelerate keep, as in docs/scaling.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from trl import ModelConfig, get_peft_config

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.cli.job import Job
from focalkern.cli.memory import Activations, LiveBytes, activations, fake_tensors, keeps_no_scores, on_meta
from focalkern.logps.function import WORKSPACE_BYTES

GIB = 2**30
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
RESERVED = 2 * GIB  # CUDA's context, NCCL, fragmentation
PROCESS = 4 * GIB  # of host memory: libraries, pinned buffers, batches
NODE = 8  # GPUs
# Elements, by DeepSpeed's defaults, which accelerate leaves: reduce_bucket_size, and
# stage3_max_live_parameters with stage3_prefetch_bucket_size.
BUCKET, LIVE_PARAMETERS = 5e8, 1.05e9
LOGGED = 3  # outputs of the head that the trainer logs, with block statistics of their own
KEPT_SHARE = 0.0519  # of the certified backward: docs/scaling.md
# States in bytes per byte of an fp32 parameter.
OPTIMIZERS = {"adamw_torch": 2.0, "adamw_torch_fused": 2.0, "sgd": 0.0}
OPTIMIZERS |= dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 0.5)


@dataclass(frozen=True)
class Engine:
    """What shards the training, as accelerate configures it."""

    name: str  # of ENGINES
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    reshards: bool = True  # FSDP2: the layers, after their forward
    loads_once: bool = False  # rank 0 alone reads the weights
    saves_whole: bool = True  # FSDP2: rank 0 gathers checkpoints

    @classmethod
    def of(cls, given: str) -> Engine:
        """By its name, or by an accelerate configuration file."""
        if given in ENGINES:
            return cls(given, loads_once=given == "zero3")
        if not Path(given).is_file():
            raise ValueError(f"--engine must be one of {ENGINES}, or an accelerate file; got {given!r}")
        content = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        kind = content.get("distributed_type", "NO")
        if kind == "DEEPSPEED" and content["deepspeed_config"].get("zero_stage") in (2, 3):
            options = content["deepspeed_config"]
            stage = options["zero_stage"]
            return cls(
                f"zero{stage}",
                offloads_optimizer=options.get("offload_optimizer_device") not in (None, "none"),
                offloads_parameters=options.get("offload_param_device") not in (None, "none"),
                loads_once=stage == 3,
            )
        if kind == "FSDP" and content["fsdp_config"].get("fsdp_version") == 2:
            options = content["fsdp_config"]
            return cls(
                "fsdp2",
                offloads_optimizer=options.get("fsdp_offload_params", False),
                offloads_parameters=options.get("fsdp_offload_params", False),
                reshards=options.get("fsdp_reshard_after_forward", True),
                loads_once=options.get("fsdp_cpu_ram_efficient_loading", True),
                saves_whole=options.get("fsdp_state_dict_type") == "FULL_STATE_DICT",
            )
        if kind in ("NO", "MULTI_GPU"):
            return cls("ddp")
        raise ValueError(f"{given} must configure ZeRO-2, ZeRO-3, FSDP with fsdp_version 2, or none of them")


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, and what a head is made of."""

    vocab: int
    hidden: int
    head_is_trained: bool = True
    total: int = 0
    trained: int = 0
    layers: int = 0
    layer: int = 0  # parameters of one
    attention: int = 0  # heads times their width

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, norm, head."""
        return self.total - self.layers * self.layer

    @classmethod
    def of(cls, model: Any) -> Sizes:
        head, config = model.get_output_embeddings().weight, model.config
        layers = max((x for x in model.modules() if isinstance(x, nn.ModuleList)), key=_count)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            vocab=head.shape[0],
            hidden=head.shape[1],
            head_is_trained=head.requires_grad,
            total=_count(model),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            layers=len(layers),
            layer=_count(layers) // len(layers),
            attention=config.num_attention_heads * width,
        )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def fused_head(sizes: Sizes, rows: int, dtype: torch.dtype) -> float:
    """Bytes that the fused head holds at its peak, forward and backward."""
    size, blocks = dtype.itemsize, rows * math.ceil(sizes.vocab / VOCAB_BLOCK)
    per_block = blocks * (4 * (1 + LOGGED) + 50 * KEPT_SHARE)  # statistics, and lists of those that are kept
    hidden = sizes.hidden * rows * (2 * size + 4)  # gathered, its gradient, and that in fp32
    dweight = size * sizes.vocab * sizes.hidden * sizes.head_is_trained
    return per_block + hidden + dweight + min(WORKSPACE_BYTES, rows * sizes.vocab * (4 + size))


@functools.cache
def plain_head(sizes: Sizes, rows: int, dtype: torch.dtype) -> float:
    """The same of all logits, their log-softmax in fp32, and autograd."""
    with fake_tensors():
        hidden = torch.empty(rows, sizes.hidden, dtype=dtype).requires_grad_()
        weight = torch.empty(sizes.vocab, sizes.hidden, dtype=dtype).requires_grad_(sizes.head_is_trained)
        with LiveBytes([hidden, weight]) as live:
            logps = torch.log_softmax(nn.functional.linear(hidden, weight).float(), -1)
            logps.gather(-1, torch.zeros(rows, 1, dtype=torch.int64)).sum().backward()
        return live.peak


_RUNS: dict[str, Activations] = {}  # of all budgets: recipes share models


@dataclass
class Budget:
    """Bytes of a recipe on a machine, under any engine and with any micro-batch."""

    name: str
    config: Any  # of transformers
    args: Any  # FocalPOConfig
    dtype: torch.dtype  # that the weights are loaded in
    gpus: int
    gpu_memory: float  # bytes
    peft_config: Any = None
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        model = on_meta(self.config, self.dtype, self.peft_config)
        self.sizes = Sizes.of(model if self.peft_config is None else model.get_base_model())

    @classmethod
    def of(cls, job: Job, gpus: int, gpu_memory: float) -> Budget:
        """Raises ValueError for fields that a plan does not know, by name."""
        args, model = job.config, job.model
        optimizer = getattr(args.optim, "value", args.optim)
        attention, by_tokens = model.attn_implementation, args.max_tokens_per_batch
        unquantised = "weights that are not quantised"
        shares_as_known = attention == "flex_attention" or not args.share_prompt
        for name, value, is_known, needs in (
            ("load_in_4bit", model.load_in_4bit, not model.load_in_4bit, unquantised),
            ("load_in_8bit", model.load_in_8bit, not model.load_in_8bit, unquantised),
            ("max_length", args.max_length, args.max_length is not None, "a number"),
            ("optim", optimizer, optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("attn_implementation", attention, shares_as_known, "flex_attention with share_prompt"),
            ("max_tokens_per_batch", by_tokens, by_tokens is None, "batches of as many pairs"),
        ):
            if not is_known:
                raise ValueError(f"a plan knows no {name}={value!r}: it needs {needs}")
        config = job.model_config().get_text_config()
        config._attn_implementation = model.attn_implementation or "sdpa"
        dtype = config.dtype or "float32" if model.dtype == "auto" else model.dtype or "float32"
        dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        name = Path(job.recipe or job.model_name).stem
        return cls(name, config, args, dtype, gpus, gpu_memory, get_peft_config(model))

    @property
    def pairs(self) -> int:
        return self.args.per_device_train_batch_size

    @property
    def is_mixed(self) -> bool:
        return self.args.bf16 or self.args.fp16

    # -------------------------------------------------------------------------------------------- one GPU

    def per_gpu(
        self,
        engine: Engine,
        pairs: int | None = None,
        length: int | None = None,
        checkpointing: bool | None = None,
        fused: bool = True,
    ) -> dict[str, float]:
        """Bytes by what they are for. Their sum is the peak."""
        pairs, length = pairs or self.pairs, length or self.args.max_length
        if checkpointing is None:
            checkpointing = self.args.gradient_checkpointing
        dtype, autocast = self._dtype(engine), engine.name == "ddp" and self.is_mixed
        found = self._activations(dtype, autocast, checkpointing, pairs, length)
        head = (fused_head if fused else plain_head)(
            self.sizes, 2 * pairs * length, torch.bfloat16 if autocast else dtype
        )
        in_turn = max(found.forward_peak, found.kept + head, found.backward_peak) - found.kept
        states = self._states(engine)
        for name in ("gradients", "optimizer state"):
            states[name] *= not engine.offloads_optimizer
        states["parameters"] *= not engine.offloads_parameters
        return {
            **states,
            "activations kept": found.kept,
            "a layer, or the head": in_turn,
            "reserved": RESERVED,
        }

    def total(self, engine: Engine, **changes: Any) -> float:
        return sum(self.per_gpu(engine, **changes).values())

    def fits(self, engine: Engine, **changes: Any) -> bool:
        return self.total(engine, **changes) <= self.gpu_memory

    def _dtype(self, engine: Engine) -> torch.dtype:
        """That the layers run in. Without an engine autocast leaves the weights as they are."""
        return torch.bfloat16 if engine.name != "ddp" and self.is_mixed else self.dtype

    def _activations(
        self, dtype: torch.dtype, autocast: bool, checkpointing: bool, pairs: int, length: int
    ) -> Activations:
        """Run for one pair and two: memory is linear in pairs, and with these two attentions in tokens.

        With shared prompts the largest pair has a short prompt, and as many tokens as a packed one.
        """

        is_padded = not (self.args.padding_free or self.args.share_prompt)

        def run(pairs: int, length: int) -> Activations:
            options = (self.peft_config, dtype, autocast, checkpointing, is_padded, 2 * pairs, length)
            # The repr of a config lacks how its attention and experts are computed.
            ways = [getattr(self.config, f"_{name}_implementation", None) for name in ("attn", "experts")]
            key = repr((self.config, ways, options))
            if key not in _RUNS:
                _RUNS[key] = activations(self.config, *options)
            return _RUNS[key]

        longest = self.args.max_length
        if length != longest and keeps_no_scores(self.config):
            start = self._activations(dtype, autocast, checkpointing, pairs, longest)
            return start.extrapolated(run(pairs, 2 * longest), length / longest - 1)
        return run(1, length) if pairs == 1 else run(1, length).extrapolated(run(2, length), pairs - 1)

    def _states(self, engine: Engine) -> dict[str, float]:
        """What does not depend on the batch, before anything is offloaded."""
        sizes, ranks, size = self.sizes, self.gpus, self._dtype(engine).itemsize
        states, loaded = OPTIMIZERS[self.args.optim], self.dtype.itemsize
        gathered = buffers = 0.0
        # PEFT's adapters are in fp32, and accelerate makes trained weights fp32 for FSDP2 in mixed precision.
        own = 4 if self.peft_config is not None or (engine.name == "fsdp2" and self.is_mixed) else loaded
        shards = 1 if engine.name in ("ddp", "zero2") else ranks
        stored = (own * sizes.trained + loaded * (sizes.total - sizes.trained)) / shards
        reference = loaded * sizes.total / shards
        gradients, optimizer = own * sizes.trained / shards, states * own * sizes.trained / shards
        if engine.name == "ddp":
            buffers = gradients * (ranks > 1)  # DDP's buckets
        elif engine.name == "fsdp2":
            group = sizes.root + 2 * sizes.layer  # one layer is fetched while another one works
            gathered = float(size * (group if engine.reshards else sizes.total))
            gathered += size * sizes.total * self.has_reference_model  # whole for its forward
            buffers = size * group * sizes.trained / sizes.total
        else:  # DeepSpeed casts the model, and keeps an fp32 copy of trained weights for the optimizer
            stored = reference = size * sizes.total / shards
            gradients, optimizer = size * sizes.trained / ranks, 4 * (1 + states) * sizes.trained / ranks
            gathered, buffers = size * min(LIVE_PARAMETERS, sizes.total) * (shards > 1), size * BUCKET
        return {
            "parameters": stored,
            "parameters gathered": gathered,
            "gradients": gradients,
            "optimizer state": optimizer,
            "reference model": reference * self.has_reference_model,
            "buffers": buffers,
        }

    @property
    def has_reference_model(self) -> bool:
        is_apart = not self.args.precompute_ref_log_probs and self.peft_config is None
        return self.args.needs_reference and is_apart

    # ------------------------------------------------------------------------------- host, disk and time

    def host(self, engine: Engine) -> dict[str, float]:
        """Bytes on the first node, of which loading and saving come in turn."""
        sizes, processes, states = self.sizes, min(self.gpus, NODE), self._states(engine)
        copies = 1 if engine.loads_once else processes * (self.gpus > 1)  # one process loads to its GPU
        offloaded = (states["gradients"] + states["optimizer state"]) * engine.offloads_optimizer
        offloaded += states["parameters"] * engine.offloads_parameters
        saving = 0.0
        if engine.name == "fsdp2" and engine.saves_whole:
            saving = 4 * (1 + OPTIMIZERS[self.args.optim]) * sizes.trained
        elif engine.name == "zero3":
            saving = self._dtype(engine).itemsize * sizes.total
        loading = float(self.dtype.itemsize * sizes.total * copies * (1 + self.has_reference_model))
        by_time = {"while loading": loading, "while saving": saving}
        return {"for processes": PROCESS * processes, "offloaded": offloaded * processes, **by_time}

    def host_peak(self, engine: Engine) -> float:
        processes, offloaded, loading, saving = self.host(engine).values()
        return processes + max(loading, offloaded + saving)

    def checkpoint(self, engine: Engine) -> float:
        """Bytes on disk of one that can be resumed."""
        sizes, states = self.sizes, OPTIMIZERS[self.args.optim]
        saved = sizes.total if self.peft_config is None else sizes.trained
        # ZeRO-2 and FSDP2 write the weights twice: as `from_pretrained` reads them, and to resume from.
        if engine.name.startswith("zero"):
            copies = 1 + (engine.name == "zero2")
            return copies * self._dtype(engine).itemsize * saved + 4 * (1 + states) * sizes.trained
        is_fsdp = engine.name == "fsdp2"
        size = 4 if is_fsdp and self.is_mixed else self.dtype.itemsize
        return size * ((1 + is_fsdp) * saved + states * sizes.trained)

    def flops(self, pairs: float, tokens_per_pair: float) -> float:
        """Of the training and of the reference's log-probs: docs/scaling.md."""
        args, sizes = self.args, self.sizes
        body, head = sizes.layers * sizes.layer, sizes.vocab * sizes.hidden
        attention = sizes.layers * sizes.attention * tokens_per_pair / 2
        again, dweight = args.gradient_checkpointing, self.peft_config is None
        training = (4 + 2 * again + 2 * dweight) * body + (6 + 2 * again) * attention + 2 * head
        training += (8 * KEPT_SHARE if args.backward == "certified" else 4 + 2 * dweight) * head
        reference = 2 * (body + attention + head) * args.needs_reference
        return pairs * tokens_per_pair * (training * args.num_train_epochs + reference)

    # ----------------------------------------------------------------------------------------- what fits

    def most_pairs(self, engine: Engine) -> int:
        """The largest power of two per GPU up to 64; 0 if one pair does not fit."""
        return max((n for n in (1, 2, 4, 8, 16, 32, 64) if self.fits(engine, pairs=n)), default=0)

    def longest(self, engine: Engine, step: int = 1024, at_most: int = 131_072) -> int:
        """Tokens of the longest sequences, one pair of them per GPU; a multiple of the step."""
        low, high = 0, at_most // step + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(engine, pairs=1, length=middle * step) else (low, middle)
        return low * step

    def alternatives(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Options with which it fits, and the peak with them."""
        args = self.args
        others = (Engine.of(name) for name in ENGINES if name != engine.name)
        engines = [engine, *others] if self.gpus > 1 else [engine]
        for each in engines:
            pairs = min(self.most_pairs(each), self.pairs)
            if pairs == self.pairs:
                yield f"--engine {each.name}", self.total(each)
            elif pairs:
                steps = args.gradient_accumulation_steps * self.pairs // pairs
                batch = f"--per_device_train_batch_size {pairs} --gradient_accumulation_steps {steps}"
                yield f"--engine {each.name} {batch}", self.total(each, pairs=pairs)
        if not args.gradient_checkpointing and self.fits(engine, checkpointing=True):
            yield "--gradient_checkpointing true", self.total(engine, checkpointing=True)
        if self.peft_config is None:
            model = ModelConfig(use_peft=True, lora_target_modules=["all-linear"])
            with_lora = replace(self, peft_config=get_peft_config(model), dtype=torch.bfloat16)
            for each in filter(with_lora.fits, engines):
                options = "--use_peft true --lora_target_modules all-linear --dtype bfloat16"
                yield f"--engine {each.name} {options}", with_lora.total(each)
                break
