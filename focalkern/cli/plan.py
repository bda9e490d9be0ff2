"""`focalkern plan`: memory per GPU and on the host, and hours, of a recipe before it is run.

Layers are run on fake tensors (`memory`), parameters counted on the meta device; the rest is arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from trl import get_peft_config

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.cli.memory import Activations, LiveBytes, Run, activations, fake_tensors, on_meta
from focalkern.logps.function import WORKSPACE_BYTES

GIB = 2**30
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
RESERVED = 2 * GIB  # CUDA's context, NCCL, fragmentation
PROCESS = 4 * GIB  # of host memory: the libraries, pinned buffers, batches
# DeepSpeed's defaults, which accelerate leaves: elements of reduce_bucket_size, stage3_max_live_parameters
# and stage3_prefetch_bucket_size.
BUCKET, LIVE_PARAMETERS = 5e8, 1e9 + 5e7
LOGGED = 3  # outputs of the head that the trainer logs, with block statistics of their own
KEPT_SHARE = 0.0519  # of the certified backward, docs/scaling.md
OPTIMIZERS = {
    "adamw_torch": 2.0,  # states, in bytes per byte of the parameter
    "adamw_torch_fused": 2.0,
    "adamw_8bit": 0.5,
    "adamw_bnb_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
    "sgd": 0.0,
}


@dataclass(frozen=True)
class Engine:
    """What shards the training, as accelerate configures it."""

    name: str  # of ENGINES
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    reshards: bool = True  # FSDP2: the layers after their forward
    loads_once: bool = False  # FSDP2: rank 0 alone reads the weights
    saves_whole: bool = True  # FSDP2: FULL_STATE_DICT

    @classmethod
    def of(cls, given: str) -> Engine:
        """By name, or as an accelerate configuration file says."""
        if given in ENGINES:
            return cls(given)
        if not Path(given).is_file():
            raise ValueError(f"--engine must be one of {ENGINES}, or an accelerate file; got {given!r}")
        content = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        kind = str(content.get("distributed_type", "NO"))
        if kind in ("NO", "MULTI_GPU"):
            return cls("ddp")
        if kind == "DEEPSPEED":
            options = content.get("deepspeed_config", {})
            stage = options.get("zero_stage")
            if stage not in (2, 3):
                raise ValueError(f"zero_stage must be 2 or 3 for a plan; {given} has {stage!r}")
            offloads = (
                options.get(f"offload_{what}_device", "none") != "none" for what in ("optimizer", "param")
            )
            return cls(f"zero{stage}", *offloads)
        options = content.get("fsdp_config", {})
        if kind != "FSDP" or int(options.get("fsdp_version", 1)) != 2:
            raise ValueError(f"{given} must configure DeepSpeed, FSDP with fsdp_version 2, or none of them")
        offloads = bool(options.get("fsdp_offload_params", False))
        return cls(
            "fsdp2",
            offloads,
            offloads,
            bool(options.get("fsdp_reshard_after_forward", True)),
            bool(options.get("fsdp_cpu_ram_efficient_loading", True)),
            options.get("fsdp_state_dict_type", "SHARDED_STATE_DICT") == "FULL_STATE_DICT",
        )


@dataclass(frozen=True)
class Setup:
    """A recipe on a machine."""

    name: str
    config: Any  # of transformers
    args: Any  # FocalPOConfig
    dtype: torch.dtype  # that the weights are loaded in
    gpus: int
    gpu_memory: float  # bytes
    peft_config: Any = None

    def wrap(self, model: Any) -> Any:
        if self.peft_config is None:
            return model
        from peft import get_peft_model

        return get_peft_model(model, self.peft_config)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    total: int
    trained: int
    root: int  # outside the layers: embedding, norm, head
    layer: int
    head_is_trained: bool
    vocab: int
    hidden: int
    attention: int  # heads × their width
    layers: int

    @classmethod
    def of(cls, setup: Setup) -> Sizes:
        model = on_meta(setup.config, setup.dtype, wrap=setup.wrap)
        base = model.get_base_model() if setup.peft_config is not None else model
        layers = max((x for x in base.modules() if isinstance(x, nn.ModuleList)), key=numel)
        head, config = base.get_output_embeddings().weight, base.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            total=numel(model),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            root=numel(model) - numel(layers),
            layer=numel(layers) // len(layers),
            head_is_trained=head.requires_grad,
            vocab=head.shape[0],
            hidden=head.shape[1],
            attention=config.num_attention_heads * width,
            layers=len(layers),
        )


def numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def fused_head(sizes: Sizes, rows: int, tokens: int, itemsize: int) -> float:
    """Bytes of the fused head's forward and backward, at their peak."""
    statistics = 4 * rows * math.ceil(sizes.vocab / VOCAB_BLOCK) * (1 + LOGGED)
    hidden = sizes.hidden * (itemsize * rows + 4 * rows + itemsize * tokens)  # gathered; two gradients
    dweight = itemsize * sizes.vocab * sizes.hidden * sizes.head_is_trained
    return statistics + hidden + dweight + min(WORKSPACE_BYTES, rows * sizes.vocab * (4 + itemsize))


def plain_head(sizes: Sizes, tokens: int, dtype: torch.dtype) -> float:
    """The same of logits at every position, their log-softmax in fp32, and autograd."""
    with fake_tensors():
        hidden = torch.empty(tokens, sizes.hidden, dtype=dtype).requires_grad_()
        weight = torch.empty(sizes.vocab, sizes.hidden, dtype=dtype).requires_grad_(sizes.head_is_trained)
        with LiveBytes([hidden, weight]) as live:
            logps = torch.log_softmax(nn.functional.linear(hidden, weight).float(), -1)
            labels = torch.zeros(tokens, 1, dtype=torch.int64)
            logps.gather(-1, labels).sum().backward()
        return live.peak


@dataclass
class Plan:
    """Bytes of a setup under any engine, micro-batch and length."""

    setup: Setup
    sizes: Sizes = field(init=False)
    _runs: dict[tuple, Activations] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.sizes = Sizes.of(self.setup)

    @property
    def pairs(self) -> int:
        return self.setup.args.per_device_train_batch_size

    @property
    def length(self) -> int:
        return self.setup.args.max_length

    def per_gpu(
        self,
        engine: Engine,
        pairs: int | None = None,
        length: int | None = None,
        checkpointing: bool | None = None,
        fused: bool = True,
    ) -> dict[str, float]:
        """By what it is for; the sum is the peak."""
        args, sizes = self.setup.args, self.sizes
        pairs, length = pairs or self.pairs, length or self.length
        checkpointing = args.gradient_checkpointing if checkpointing is None else checkpointing
        dtype, is_ddp = self._dtype(engine), engine.name == "ddp"
        run = Run(
            dtype,
            autocast=is_ddp and args.bf16,
            checkpointing=checkpointing,
            is_padded=not args.padding_free,
            wrap=self.setup.wrap,
        )
        found = self._activations(run, 2 * pairs, length)
        # Under autocast the head's product is in bf16, and its weight's gradient in that of the weight.
        product = torch.bfloat16 if run.autocast else dtype
        tokens = 2 * pairs * length
        head = (
            fused_head(sizes, tokens, tokens, product.itemsize)
            if fused
            else plain_head(sizes, tokens, product)
        )
        in_turn = max(found.forward_peak, found.kept + head, found.backward_peak) - found.kept
        return self._states(engine) | {
            "activations kept": found.kept,
            "a layer, or the head": in_turn,
            "reserved": RESERVED,
        }

    def total(self, engine: Engine, **changes: Any) -> float:
        return sum(self.per_gpu(engine, **changes).values())

    def fits(self, engine: Engine, **changes: Any) -> bool:
        return self.total(engine, **changes) <= self.setup.gpu_memory

    def _dtype(self, engine: Engine) -> torch.dtype:
        """That the layers run in."""
        return torch.bfloat16 if engine.name != "ddp" and self.setup.args.bf16 else self.setup.dtype

    def _activations(self, run: Run, sequences: int, length: int) -> Activations:
        """Run for one pair and two; every other pair adds as much as the second."""

        def found(sequences: int) -> Activations:
            key = (run.dtype, run.autocast, run.checkpointing, sequences, length)
            if key not in self._runs:
                self._runs[key] = activations(self.setup.config, run, sequences, length)
            return self._runs[key]

        return found(2) if sequences == 2 else found(2).extrapolated(found(4), sequences / 2 - 1)

    def _states(self, engine: Engine) -> dict[str, float]:
        """Everything that does not depend on the batch."""
        setup, sizes, ranks = self.setup, self.sizes, self.setup.gpus
        size, loaded = self._dtype(engine).itemsize, setup.dtype.itemsize
        # Adapters are fp32; without them everything is trained.
        trained_size = 4 if setup.peft_config is not None else loaded
        frozen = sizes.total - sizes.trained
        states = OPTIMIZERS[setup.args.optim]
        gathered = buffers = 0.0
        if engine.name == "ddp":
            parameters = float(loaded * frozen + trained_size * sizes.trained)
            gradients = float(trained_size * sizes.trained)
            optimizer = states * trained_size * sizes.trained
            buffers = gradients * (ranks > 1)  # DDP's buckets
            reference = float(loaded * sizes.total)
        elif engine.name == "fsdp2":
            trained_size = 4 if setup.args.bf16 else loaded  # accelerate's upcast
            parameters = (loaded * frozen + trained_size * sizes.trained) / ranks
            gradients = trained_size * sizes.trained / ranks
            optimizer = states * trained_size * sizes.trained / ranks
            group = sizes.root + 2 * sizes.layer  # one group is fetched while another one works
            gathered = float(size * (group if engine.reshards else sizes.total))
            buffers = size * group * sizes.trained / sizes.total
            reference = loaded * sizes.total / ranks
        else:  # ZeRO keeps a copy in fp32 for the optimizer
            sharded = ranks if engine.name == "zero3" else 1
            parameters = size * sizes.total / sharded
            gradients = size * sizes.trained / ranks
            optimizer = (4 + 4 * states) * sizes.trained / ranks
            buffers = size * BUCKET * (ranks > 1)
            gathered = size * min(LIVE_PARAMETERS, sizes.total) * (sharded > 1)
            reference = size * sizes.total / sharded
        if not self.has_reference_model:
            reference = 0.0
        elif engine.name == "fsdp2":
            gathered += size * sizes.total  # whole for its forward
        return {
            "parameters": parameters * (not engine.offloads_parameters),
            "parameters gathered": gathered,
            "gradients": gradients * (not engine.offloads_optimizer),
            "optimizer state": optimizer * (not engine.offloads_optimizer),
            "reference model": reference,
            "buffers": buffers,
        }

    @property
    def has_reference_model(self) -> bool:
        args = self.setup.args
        return args.needs_reference and not args.precompute_ref_log_probs and self.setup.peft_config is None

    # ------------------------------------------------------------------------------- host, disk and time

    def host(self, engine: Engine) -> dict[str, float]:
        """Bytes on the node: always, and while loading or saving."""
        setup, sizes, ranks = self.setup, self.sizes, self.setup.gpus
        loaded, models = setup.dtype.itemsize * sizes.total, 1 + self.has_reference_model
        copies = ranks * (ranks > 1)  # one process loads to its GPU
        if engine.name == "zero3" or engine.loads_once:
            copies = 1
        offloaded = 0.0
        on_device = dataclasses.replace(engine, offloads_optimizer=False, offloads_parameters=False)
        for row, amount in self._states(on_device).items():
            offloaded += (amount - self._states(engine)[row]) * ranks
        saving = 0.0
        if engine.name == "fsdp2" and engine.saves_whole:
            saving = (4 + 4 * OPTIMIZERS[setup.args.optim]) * sizes.trained
        elif engine.name == "zero3":
            saving = self._dtype(engine).itemsize * sizes.total
        return {
            "processes": PROCESS * ranks,
            "offloaded": offloaded,
            "loading": float(loaded * copies * models),
            "saving": saving,
        }

    def checkpoint(self, engine: Engine) -> float:
        """Bytes on disk of one that can be resumed."""
        states, sizes = OPTIMIZERS[self.setup.args.optim], self.sizes
        size = 4 if engine.name == "fsdp2" and self.setup.args.bf16 else self._dtype(engine).itemsize
        saved = sizes.total if self.setup.peft_config is None else sizes.trained
        if engine.name.startswith("zero"):  # the model twice: for DeepSpeed, and for from_pretrained
            return 2 * size * saved + (4 + 4 * states) * sizes.trained
        return size * saved + states * size * sizes.trained

    def flops(self, pairs: float, tokens_per_pair: float) -> float:
        """Of a training over so many pairs, the reference's log-probs included."""
        args, sizes = self.setup.args, self.sizes
        tokens = pairs * tokens_per_pair
        body, head = sizes.layers * sizes.layer, sizes.vocab * sizes.hidden
        attention = sizes.layers * sizes.attention * tokens_per_pair / 2
        all_trained = self.setup.peft_config is None
        passes = 2 + 2 * args.gradient_checkpointing + 2 + 2 * all_trained
        training = passes * body + (6 + 2 * args.gradient_checkpointing) * attention
        backward = (8 * KEPT_SHARE if args.backward == "certified" else 4 + 2 * all_trained) * head
        training += 2 * head + backward
        reference = (2 * body + 2 * attention + 2 * head) * args.needs_reference
        return tokens * (training * args.num_train_epochs + reference)

    # ----------------------------------------------------------------------------------------- what fits

    def most_pairs(self, engine: Engine, at_most: int = 64) -> int:
        """The largest power of two per GPU, 0 if one pair does not fit."""
        pairs = 1
        if not self.fits(engine, pairs=1):
            return 0
        while pairs < at_most and self.fits(engine, pairs=2 * pairs):
            pairs *= 2
        return pairs

    def longest(self, engine: Engine, step: int = 1024, at_most: int = 131_072) -> int:
        """Tokens of the longest sequences, one pair of them per GPU; a multiple of the step."""
        low, high = 0, at_most // step + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(engine, pairs=1, length=middle * step) else (low, middle)
        return low * step

    def alternatives(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Changes that fit where the plan does not, and the peak with them."""
        engines = [Engine(name) for name in ENGINES if name != engine.name]
        for other in engines:
            if self.fits(other):
                yield f"--engine {other.name}", self.total(other)
        if not self.setup.args.gradient_checkpointing and self.fits(engine, checkpointing=True):
            yield "--gradient_checkpointing true", self.total(engine, checkpointing=True)
        for other in (engine, *engines):
            pairs = min(self.most_pairs(other, self.pairs), self.pairs)
            if 0 < pairs < self.pairs:
                steps = self.setup.args.gradient_accumulation_steps * self.pairs // pairs
                yield (
                    f"--engine {other.name} --per_device_train_batch_size {pairs}"
                    f" --gradient_accumulation_steps {steps}",
                    self.total(other, pairs=pairs),
                )
        if self.setup.peft_config is None:
            from peft import LoraConfig

            lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
            setup = dataclasses.replace(self.setup, peft_config=lora, dtype=torch.bfloat16)
            for other in (engine, *engines):
                total = Plan(setup).total(other)
                if total <= setup.gpu_memory:
                    options = "--use_peft --lora_target_modules all-linear --dtype bfloat16"
                    yield f"--engine {other.name} {options}", total
                    break


# ------------------------------------------------------------------------------------------------ the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, default=8, help="default: 8, one node")
    parser.add_argument(
        "--gpu-memory", type=_gib, default=40 * GIB, metavar="SIZE", help="of a GPU, default 40GB"
    )
    parser.add_argument(
        "--engine",
        help=f"one of {', '.join(ENGINES)}, or an accelerate configuration file; default zero3, ddp on one GPU",
    )
    parser.add_argument("--pairs", type=float, default=60_000, help="in the data set, default 60000")
    parser.add_argument(
        "--tokens-per-pair", type=float, default=1200, help="on average, default 1200; `check` counts them"
    )
    parser.add_argument("--tflops", type=float, default=312, help="peak of a GPU in bf16, default 312 (A100)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that is reached, default 0.4"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the memory as bars")
    parser.add_argument("--row", action="store_true", help="print one line of a table, to compare recipes")


def _gib(text: str) -> float:
    number = text.lower().removesuffix("b").removesuffix("i").removesuffix("g")
    try:
        size = float(number) * GIB
    except ValueError:
        size = 0.0
    if size <= RESERVED:
        raise argparse.ArgumentTypeError(f"must be a size above 2GB, such as 40GB; got {text!r}")
    return size


def run(arguments: argparse.Namespace) -> int:
    setup = setup_of(arguments.job, arguments.gpus, arguments.gpu_memory)
    engine = Engine.of(arguments.engine or ("zero3" if arguments.gpus > 1 else "ddp"))
    plan = Plan(setup)
    hours = plan.flops(arguments.pairs, arguments.tokens_per_pair) / (
        arguments.gpus * arguments.tflops * 1e12 * arguments.mfu * 3600
    )
    fits = plan.fits(engine)
    if arguments.row:
        print(row(plan, engine, hours))
    else:
        print(report(plan, engine))
        print(f"Time: {hours:.1f} hours. Assumed:", *assumptions(arguments), sep="\n  ")
        if not fits:
            print(advice(plan, engine))
    if arguments.plot:
        draw(plan, arguments.plot)
    return 0 if fits else 1


def setup_of(job: Any, gpus: int, gpu_memory: float) -> Setup:
    """Of a job; raises ValueError for what a plan does not know, by name."""
    args, model = job.config, job.model
    for name, value in (("load_in_4bit", model.load_in_4bit), ("load_in_8bit", model.load_in_8bit)):
        if value:
            raise ValueError(f"{name} must be false for a plan: it does not know quantised weights")
    if args.max_length is None:
        raise ValueError("max_length must be given for a plan: the longest sequence decides; got None")
    optimizer = getattr(args.optim, "value", args.optim)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optim must be one of {tuple(OPTIMIZERS)} for a plan; got {optimizer!r}")
    config = job.model_config().get_text_config()
    config._attn_implementation = model.attn_implementation or "sdpa"
    dtype = model.dtype or "float32"
    dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    peft = get_peft_config(model)
    return Setup(Path(job.recipe or job.model_name).stem, config, args, dtype, gpus, gpu_memory, peft)


def report(plan: Plan, engine: Engine) -> str:
    setup, sizes, args = plan.setup, plan.sizes, plan.setup.args
    steps = args.gradient_accumulation_steps
    of = [Engine(name) if name != engine.name else engine for name in ENGINES] if setup.gpus > 1 else [engine]
    rows = [plan.per_gpu(each) for each in of]
    table = [["GiB per GPU", *(f"{x.name} *" if x == engine else x.name for x in of)]]
    table += [[name, *(_number(parts[name]) for parts in rows)] for name in rows[0]]
    for checkpointing in (True, False):
        for fused in (True, False):
            totals = [plan.total(each, checkpointing=checkpointing, fused=fused) for each in of]
            name = f"total, {'' if checkpointing else 'no '}checkpoints, {'fused' if fused else 'plain'} head"
            mark = " *" if checkpointing == args.gradient_checkpointing and fused else ""
            table.append([name + mark, *map(_number, totals)])
    host, disk = plan.host(engine), plan.checkpoint(engine)
    peak = host["processes"] + host["offloaded"] + max(host["loading"], host["saving"])
    kept = f", {args.save_total_limit} kept" if args.save_total_limit else ""
    trained = "all" if setup.peft_config is None else f"{sizes.trained / 1e6:.1f} million"
    return "\n".join(
        [
            f"{setup.name}: {sizes.total / 1e9:.2f} billion parameters, {trained} trained, loaded in"
            f" {str(setup.dtype).removeprefix('torch.')}",
            f"{setup.gpus} GPUs of {setup.gpu_memory / GIB:g} GiB, {plan.pairs} pairs of {plan.length} tokens"
            f" on each, {steps} micro-steps: {setup.gpus * plan.pairs * steps} pairs a step",
            "",
            _markdown(table),
            "",
            f"* {engine.name} and the recipe, which {'fit' if plan.fits(engine) else 'do NOT fit'}."
            f" At most {plan.most_pairs(engine)} pairs of {plan.length} tokens per GPU,"
            f" or one pair of {plan.longest(engine):,} tokens.",
            f"Host: {_number(peak)} GiB per node: {_number(host['processes'])} for processes,"
            f" {_number(host['loading'])} while loading, {_number(host['saving'])} while saving,"
            f" {_number(host['offloaded'])} offloaded.",
            f"Disk: {_number(disk)} GiB per checkpoint{kept}.",
        ]
    )


def assumptions(arguments: argparse.Namespace) -> list[str]:
    return [
        "every sequence of the largest batch has max_length tokens, all of them in completions",
        f"{RESERVED / GIB:g} GiB of a GPU for CUDA and fragmentation, {PROCESS / GIB:g} GiB of host per process",
        f"{arguments.pairs:,.0f} pairs of {arguments.tokens_per_pair:,.0f} tokens (--pairs, --tokens-per-pair)",
        f"{arguments.tflops:g} TFLOP/s at {100 * arguments.mfu:g} % (--tflops, --mfu), no wait for transfers",
    ]


def advice(plan: Plan, engine: Engine) -> str:
    found = [f"  {change}: {_number(total)} GiB" for change, total in plan.alternatives(engine)]
    limit = plan.setup.gpu_memory / GIB
    if not found:
        return (
            f"It does not fit, nor does any change of it: take more GPUs, or GPUs of more than {limit:g} GiB."
        )
    return "\n".join([f"It does not fit into {limit:g} GiB. This does:", *found])


def row(plan: Plan, engine: Engine, hours: float) -> str:
    """recipe, machine, GiB per GPU, most pairs per GPU, GiB of the host, hours"""
    host = plan.host(engine)
    peak = host["processes"] + host["offloaded"] + max(host["loading"], host["saving"])
    setup = plan.setup
    cells = [
        f"`{setup.name}`",
        f"{setup.gpus} × {setup.gpu_memory / GIB:g} GB, {engine.name}",
        _number(plan.total(engine)),
        str(plan.most_pairs(engine)),
        _number(peak),
        f"{hours:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _number(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _markdown(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        f"| {' | '.join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])} |"
        for cells in table
    ]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def draw(plan: Plan, path: Path) -> None:
    """A bar for each engine, with and without checkpoints, of the parts of a GPU's memory."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    engines = [Engine(name) for name in ENGINES] if plan.setup.gpus > 1 else [Engine("ddp")]
    bars = {
        f"{engine.name}\n{'checkpoints' if checkpointing else 'all activations'}": plan.per_gpu(
            engine, checkpointing=checkpointing
        )
        for engine in engines
        for checkpointing in (True, False)
    }
    figure = Figure(figsize=(9.6, 1.2 + 0.55 * len(bars)), layout="constrained")
    axes, left = figure.subplots(), [0.0] * len(bars)
    for i, part in enumerate(next(iter(bars.values()))):
        widths = [parts[part] / GIB for parts in bars.values()]
        axes.barh(list(bars), widths, left=left, label=part, color=f"C{i}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    limit = plan.setup.gpu_memory / GIB
    axes.axvline(limit, color="black", linestyle="--", label=f"{limit:g} GiB")
    axes.set_xlim(0, min(axes.get_xlim()[1], 3 * limit))
    axes.invert_yaxis()
    axes.set(xlabel="GiB per GPU", title=f"{plan.setup.name}: {plan.pairs} pairs of {plan.length} tokens")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=100)
