"""Memory per GPU and on the host, and hours, of a recipe before it starts. Needs no weights, data or GPU.

    focalkern plan RECIPE --gpus 8 --gpu-memory 40GB [--engine zero3] [--plot FILE] [--field value ...]

Exit status 1 if the recipe does not fit; then it says what would. Parameters are counted on the meta device,
activations by running one or two layers of the model on fake tensors; the rest is arithmetic.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from focalkern.cli.budget import ENGINES, GIB, PROCESS, RESERVED, Budget, Engine
from focalkern.cli.job import fail, on_this_machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    engines = f"{', '.join(ENGINES)}, or an accelerate file; default zero3, ddp on one GPU"
    add = parser.add_argument
    add("--gpus", type=int, default=8, help="default 8")
    add("--gpu-memory", type=_size, default=40 * GIB, metavar="SIZE", help="of one GPU, default 40GB")
    add("--engine", help=engines)
    add("--pairs", type=_positive, default=60_000, help="of the training data, default 60000")
    add("--tokens-per-pair", type=_positive, default=1200, help="default 1200; `focalkern check` counts them")
    add("--tflops", type=_positive, default=312, help="peak of a GPU in bf16, default 312 (A100)")
    add("--mfu", type=_positive, default=0.4, help="share of the peak that is reached, default 0.4")
    add("--plot", type=Path, metavar="FILE", help="draw the memory as bars")
    add("--row", action="store_true", help="print one row of a table of recipes")


def _size(text: str) -> float:
    try:
        size = float(text.lower().removesuffix("b").removesuffix("i").removesuffix("g")) * GIB
    except ValueError:
        size = 0.0
    if size <= RESERVED:
        raise argparse.ArgumentTypeError(f"must be more than 2GB, such as 40GB; got {text!r}")
    return size


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return value


def overrides(arguments: argparse.Namespace) -> list[str]:
    if arguments.gpus < 1:
        raise ValueError(f"--gpus must be at least 1; got {arguments.gpus}")
    return on_this_machine(arguments)


def run(arguments: argparse.Namespace) -> int:
    try:
        engine = Engine.of(arguments.engine or ("zero3" if arguments.gpus > 1 else "ddp"))
        plan = Budget.of(arguments.job, arguments.gpus, arguments.gpu_memory)
    except (ValueError, KeyError, OSError) as error:
        fail(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames gradient checkpointing
        _print(plan, engine, arguments)
        if arguments.plot:
            try:
                draw(plan, engine, arguments.plot)
            except (ImportError, OSError, ValueError) as error:
                fail(f"--plot {arguments.plot} cannot be drawn: {error}")
        return 0 if plan.fits(engine) else 1


def _print(plan: Budget, engine: Engine, arguments: argparse.Namespace) -> None:
    flops = plan.flops(arguments.pairs, arguments.tokens_per_pair)
    hours = flops / (arguments.gpus * arguments.tflops * 1e12 * arguments.mfu * 3600)
    if arguments.row:
        print(row(plan, engine, hours))
        return
    print(
        report(plan, engine),
        f"Time: {hours:.1f} hours. Assumed:",
        f"- {arguments.pairs:,.0f} pairs of {arguments.tokens_per_pair:,.0f} tokens on average"
        " (--pairs, --tokens-per-pair)",
        f"- {arguments.tflops:g} TFLOP/s, of which {arguments.mfu:.0%} are reached (--tflops, --mfu)",
        "- in the largest batch all sequences have max_length tokens, all of them in completions",
        f"- CUDA and fragmentation take {RESERVED // GIB} GiB of a GPU, a process {PROCESS // GIB} GiB of"
        " the host",
        *([] if plan.fits(engine) else advice(plan, engine)),
        sep="\n",
    )


def columns(plan: Budget, engine: Engine) -> list[Engine]:
    """The engines to compare, the chosen one as it is configured."""
    if plan.gpus == 1:
        return [engine]
    return [engine if name == engine.name else Engine.of(name) for name in ENGINES]


def report(plan: Budget, engine: Engine) -> str:
    args, sizes, engines = plan.args, plan.sizes, columns(plan, engine)
    parts = [plan.per_gpu(each) for each in engines]
    table = {name: [each[name] for each in parts] for name in parts[0]}
    for checkpointing in (True, False):
        for fused in (True, False):
            kind = f"{'' if checkpointing else 'no '}checkpoints, {'fused' if fused else 'plain'} head"
            chosen = " *" * (checkpointing == args.gradient_checkpointing and fused)
            totals = [plan.total(each, checkpointing=checkpointing, fused=fused) for each in engines]
            table[f"total, {kind}{chosen}"] = totals
    width = max(map(len, table))
    lines = [[each.name + " *" * (each == engine) for each in engines], ["------:"] * len(engines)]
    lines += [[_gib(value) for value in values] for values in table.values()]
    names = ["GiB per GPU", "-" * width, *table]
    steps, of_one = args.gradient_accumulation_steps, plan.pairs
    host = ", ".join(f"{_gib(value)} {name}" for name, value in plan.host(engine).items())
    kept = f"; {args.save_total_limit} kept, and one being written" if args.save_total_limit else ""
    trained = "all" if plan.peft_config is None else f"{sizes.trained / 1e6:,.1f} million"
    noun = "pair" if of_one == 1 else "pairs"
    return "\n".join(
        [
            f"{plan.name}: {sizes.total / 1e9:.2f} billion parameters, {trained} trained",
            f"{plan.gpus} × {plan.gpu_memory / GIB:g} GiB, {of_one} {noun} of {args.max_length} tokens each,"
            f" {steps} micro-steps: {plan.gpus * of_one * steps} pairs a step",
            "",
            *(
                f"| {name:<{width}} | {' | '.join(f'{cell:>7}' for cell in cells)} |"
                for name, cells in zip(names, lines, strict=True)
            ),
            "",
            f"* {engine.name} and the recipe: {'fits' if plan.fits(engine) else 'does NOT fit'}. At most"
            f" {plan.most_pairs(engine)} pairs of {args.max_length} tokens per GPU,",
            f"  or one pair of {plan.longest(engine):,} tokens.",
            f"Host: {_gib(plan.host_peak(engine))} GiB of a node: {host}.",
            f"Disk: {_gib(plan.checkpoint(engine))} GiB a checkpoint{kept}.",
        ]
    )


def advice(plan: Budget, engine: Engine) -> list[str]:
    found = [f"  {change}: {_gib(total)} GiB" for change, total in plan.alternatives(engine)]
    if found:
        return ["What fits:", *found]
    return ["No engine, micro-batch or LoRA makes it fit: take more GPUs, or larger ones."]


def row(plan: Budget, engine: Engine, hours: float) -> str:
    """recipe | machine | GiB per GPU | most pairs per GPU | GiB of the host | hours"""
    cells = [
        f"`{plan.name}`",
        f"{plan.gpus} × {plan.gpu_memory / GIB:g} GB, {engine.name}",
        _gib(plan.total(engine)),
        str(plan.most_pairs(engine)),
        _gib(plan.host_peak(engine)),
        f"{hours:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def draw(plan: Budget, engine: Engine, path: Path) -> None:
    """A bar of the parts of a GPU's memory for each engine, with and without checkpoints."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    bars = {
        f"{each.name}\n{'checkpoints' if checkpointing else 'all activations'}": plan.per_gpu(
            each, checkpointing=checkpointing
        )
        for each in columns(plan, engine)
        for checkpointing in (True, False)
    }
    figure = Figure(figsize=(9.6, 1.6 + 0.55 * len(bars)), layout="constrained")
    axes, left = figure.subplots(), [0.0] * len(bars)
    for i, part in enumerate(next(iter(bars.values()))):
        widths = [parts[part] / GIB for parts in bars.values()]
        axes.barh(list(bars), widths, left=left, label=part, color=f"C{i}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    limit = plan.gpu_memory / GIB
    axes.axvline(limit, color="black", linestyle="--", label=f"{limit:g} GiB")
    axes.set_xlim(0, min(axes.get_xlim()[1], 3 * limit))
    axes.invert_yaxis()
    axes.set(xlabel="GiB per GPU", title=f"{plan.name}: {plan.pairs} pairs of {plan.args.max_length} tokens")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=100)
