"""The tables of docs/scaling.md, by the cost model on paper: nothing in them is measured.

    python benchmarks/scaling.py                                   # all of them, as Markdown
    python benchmarks/scaling.py --network 25 --compute-share 0.4  # with other assumptions

`publish.py` writes `PARTS` into the page. GB = 1e9 bytes, GiB = 2^30 bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost_model import (
    GB,
    GIB,
    KEPT_SHARE,
    MIB,
    Batch,
    Group,
    Head,
    Machine,
    Memory,
    Mode,
    Model,
    Plan,
    alpha_transfer,
    head_bytes,
    head_sent_by_engine,
    hiding_chunk,
    hiding_tokens,
    longest_length,
    memory,
    moving_tokens,
    operations,
    sequence_sums_sent,
    step,
)
from benchmarks.markdown import markdown_table, percent, significant

A100 = Machine()
SHORT = 20e-6  # seconds, about what a collective takes to start

# The two cases of the page

LLAMA_8B = Model("Llama-3-8B", 4096, 14336, 1024, 32, 128256)
LLAMA_70B = Model("Llama-3-70B", 8192, 28672, 1024, 80, 128256)

DDP = Mode("DDP", 0)
ZERO_1 = Mode("ZeRO-1", 1)
ZERO_2 = Mode("ZeRO-2", 2)
ZERO_3 = Mode("ZeRO-3; FSDP2, all resharded", 3)
FSDP2_HEAD = Mode("FSDP2, head by itself and kept", 3, kept="head")
FSDP2_FP32 = Mode("the same, gradients summed in fp32", 3, kept="head", reduce_bytes=4)
FSDP2_ROOT = Mode("FSDP2, embedding and head in the root", 3, kept="root")
FSDP2_ALL = Mode("FSDP2, all kept", 3, kept="all")
ENGINES = (DDP, ZERO_1, ZERO_2, ZERO_3, FSDP2_HEAD, FSDP2_FP32, FSDP2_ROOT, FSDP2_ALL)


def with_sequence(ranks: int) -> Mode:
    return replace(ZERO_3, name=f"ZeRO-3, sequence-parallel {ranks}", sequence=ranks)


def with_tensor(ranks: int, rest: int) -> Mode:
    name = f"ZeRO-3 over {rest} × tensor- and vocabulary-parallel {ranks}"
    return replace(ZERO_3, name=name, tensor=ranks)


@dataclass(frozen=True)
class Case:
    model: Model
    gpus: int
    batch: Batch
    modes: tuple[Mode, ...]
    machine: Machine = A100
    kept_share: float = KEPT_SHARE

    def plan(self, mode: Mode) -> Plan:
        return Plan(self.model, self.machine, self.gpus, self.batch, mode, self.kept_share)

    @property
    def title(self) -> str:
        return f"{self.model.name} on {self.gpus} × {self.machine.name}"


CASE_8B = Case(LLAMA_8B, 8, Batch(4), (*ENGINES, with_sequence(8), with_tensor(4, 2)))
CASE_70B = Case(LLAMA_70B, 64, Batch(2), (*ENGINES, with_sequence(8), with_tensor(8, 8)))
CASES = (CASE_8B, CASE_70B)
SLOW_NETWORK = 25e9  # of a node: 1 × 200 Gbit/s


# Tables


def assumptions_table(cases: Sequence[Case]) -> str:
    machine = cases[0].machine
    lines = [
        ["products in bf16", f"{machine.peak / 1e12:g}·10^12 operations/s", percent(machine.compute_share)],
        ["memory of a GPU", f"{machine.memory_peak / 1e12:g}·10^12 bytes/s", percent(machine.memory_share)],
        [
            "NVLink of a GPU, each way",
            f"{machine.nvlink_peak / GB:g} GB/s",
            percent(machine.link_share),
        ],
        [
            f"network of a node of {machine.gpus_per_node} GPUs, each way",
            f"{machine.network_peak / GB:g} GB/s",
            percent(machine.link_share),
        ],
    ]
    example = "certified-backward.md#counts-for-n--8192-h--4096-v--128256-in-bf16-52-blocks-per-row"
    given = (
        f"A GPU has {machine.memory / GIB:g} GiB, of which {machine.reserve / GIB:g} GiB are left to the "
        "CUDA context, the buffers of the collectives and fragmentation. The certified backward keeps "
        f"{percent(cases[0].kept_share)} of the blocks (s), as in [the example]({example})."
    )
    return "\n\n".join(
        [markdown_table(["what", "peak", "assumed share of it"], lines), *map(about, cases), given]
    )


def about(case: Case) -> str:
    model, batch = case.model, case.batch
    return (
        f"**{case.title}**: {model.parameters / GB:.2f}·10^9 parameters, of them {model.head / GB:.3f}·10^9 "
        f"in the head. Per GPU {batch.pairs:g} pairs of {batch.length} tokens a sequence, "
        f"{batch.completion_length} of them of the completion: t = {batch.tokens}, n = "
        f"{batch.completion_tokens}."
    )


def memory_table(case: Case) -> str:
    lines = []
    for mode in case.modes:
        held, with_logits = memory(case.plan(mode)), memory(case.plan(mode), fused=False)
        parts = (held.weights, held.gradients, held.optimizer, held.checkpoints, held.in_layer, held.at_head)
        lines.append(
            [
                mode.name,
                *(gib(part) for part in parts),
                f"**{gib(held.peak)}**",
                yes_or_no(fits(held, case.machine)),
                gib(with_logits.at_head),
                gib(with_logits.peak),
                yes_or_no(fits(with_logits, case.machine)),
            ]
        )
    columns = ["GiB per rank", "weights", "gradients", "Adam, fp32 weights", "checkpoints", "in a layer"]
    columns += ["at the head", "peak", "fits", "at the head with logits", "peak with logits", "fits"]
    return markdown_table(columns, lines)


def step_table(case: Case) -> str:
    lines = []
    for mode in case.modes:
        plan = case.plan(mode)
        found, exact = step(plan), step(plan, exact=True)
        heads = [significant(each.operations.head / 1e12, 3) for each in (exact, found)]
        is_possible = fits(memory(plan), case.machine)
        lines.append(
            [
                mode.name,
                significant(found.operations.total / 1e12, 3),
                ", ".join(heads),
                f"{moved(found.sent('engine'))} ({moved(head_sent_by_engine(plan))})",
                moved(found.sent("layers")),
                moved(found.sent("head")),
                seconds(found.compute_seconds) if is_possible else "",
                seconds(found.exposed_seconds) if is_possible else "",
                seconds(found.seconds) if is_possible else "does not fit",
            ]
        )
    columns = ["per rank and step", "operations, 10^12", "of the head: exact, certified"]
    columns += ["engine sends (for the head)", "layers send", "head sends"]
    return markdown_table([*columns, "computing", "not hidden", "step"], lines)


HEAD_TOKENS = 8192
RANKS = (2, 4, 8)


def head_rows(case: Case, tokens: int = HEAD_TOKENS) -> list[tuple[str, Head]]:
    """A group with these completion tokens: one rank, or more in both ways."""
    one = Head(case.model, case.machine, tokens, kept_share=case.kept_share)
    shards = [(f"{ranks}, by vocabulary", replace(one, ranks=ranks)) for ranks in RANKS]
    slices = [(f"{ranks}, by tokens", replace(one, tokens=tokens // ranks)) for ranks in RANKS]
    return [("1", one), *shards, *slices]


def head_table(case: Case) -> str:
    lines = []
    for name, head in head_rows(case):
        counts = (head.forward_operations, head.exact_operations, head.certified_operations)
        times = (head.forward_seconds, head.exact_seconds, head.certified_seconds)
        sent = dhidden = late = "–"
        if head.ranks > 1:
            sent = f"{moved(head.statistics_sent)}, {moved(head.dhidden_sent + head.dropped_mass_sent)}"
            time = dhidden_seconds(head)
            covers = (head.exact_cover, head.certified_cover)
            dhidden, late = seconds(time), ", ".join(seconds(max(0.0, time - cover)) for cover in covers)
        lines.append(
            [
                name,
                ", ".join(significant(count / 1e12, 3) for count in counts),
                ", ".join(seconds(time) for time in times),
                sent,
                dhidden,
                late,
                mib(2 * head.weight_bytes),
                mib(head.statistics_bytes + head.backward_bytes),
                mib(head.logits_bytes),
            ]
        )
    columns = ["ranks", "10^12 operations: forward, exact, certified backward", "their time"]
    columns += ["sent in forward, backward", "sum of dhidden", "of it not hidden: exact, certified"]
    columns += ["weight and dweight", "statistics and backward", "logits instead"]
    return markdown_table(columns, lines)


def dhidden_seconds(head: Head) -> float:
    return head.dhidden_sent / Group(head.ranks, head.ranks).rate(head.machine)


def lengths_table(cases: Sequence[Case]) -> str:
    lines = []
    for ranks in (1, *RANKS):
        cells = []
        for case in cases:
            plan = case.plan(with_sequence(ranks))
            cells += [f"{longest_length(plan, fused):,}" for fused in (True, False)]
        lines.append([f"{ranks}", *cells])
    columns = [f"{case.model.name}, {what}" for case in cases for what in ("fused head", "logits")]
    return markdown_table(["ranks that share a pair", *columns], lines)


def overlap_table(case: Case) -> str:
    sequence, tensor = case.modes[-2:]
    chosen = [(mode, found) for mode in (ZERO_2, ZERO_3) for found in step(case.plan(mode)).transfers]
    chosen.append((ZERO_3, alpha_transfer(case.plan(ZERO_3))))
    for mode, exact in ((sequence, False), (tensor, False), (tensor, True)):
        known = [found.what for each, found in chosen if each is mode]
        chosen += [
            (mode, found)
            for found in step(case.plan(mode), exact).transfers
            if found.of != "engine" and found.what not in known
        ]
    lines = [
        [
            mode.name.partition(";")[0],
            transfer.what,
            moved(transfer.sent),
            seconds(transfer.seconds),
            transfer.behind + (f" ({seconds(transfer.cover)})" if transfer.cover else ""),
            seconds(transfer.exposed),
        ]
        for mode, transfer in chosen
    ]
    columns = ["mode", "what is moved", "sent", "time", "behind", "not hidden"]
    return markdown_table(columns, lines, rule="---")


def head_curves(case: Case) -> dict[str, list[tuple[int, float]]]:
    """What the plot shows: milliseconds of the head's parts over the ranks that share the vocabulary."""
    heads = [head for name, head in head_rows(case) if "tokens" not in name]
    parts = {
        "forward": [head.forward_seconds for head in heads],
        "exact backward": [head.exact_seconds for head in heads],
        "certified backward": [head.certified_seconds for head in heads],
        "sum of dhidden": [dhidden_seconds(head) for head in heads],
    }
    return {
        name: [(head.ranks, 1e3 * time) for head, time in zip(heads, times, strict=True) if time]
        for name, times in parts.items()
    }


# Sentences


def short(cases: Sequence[Case]) -> str:
    small, large = cases
    sentences = (
        head_in_short(cases),
        small_in_short(small),
        large_in_short(large),
        shards_in_short(small),
        slices_in_short(small),
    )
    return "\n\n".join(f"- {sentence}" for sentence in sentences)


def head_in_short(cases: Sequence[Case]) -> str:
    shares = []
    for case in cases:
        done = [operations(case.plan(ZERO_3), exact) for exact in (True, False)]
        exact, certified = (percent(each.head / each.total) for each in done)
        shares.append(
            f"{case.model.name}, {exact} with the exact backward and {certified} with the certified"
        )
    plan = cases[0].plan(ZERO_3)
    head, parts = plan.head, head_bytes(plan)
    held = mib(sum(parts[part] for part in ("rows of completions", "statistics", "backward")))
    return (
        f"**The head is a small part of the operations**: of those of {'; of those of '.join(shares)}. What "
        f"a fused one saves is memory: at {head.tokens} completion tokens of {plan.batch.tokens} it takes "
        f"{held} in place of {mib(head.logits_bytes)} for logits and their gradient."
    )


def small_in_short(case: Case) -> str:
    peaks = {mode: gib(memory(case.plan(mode)).peak) for mode in (DDP, ZERO_1, ZERO_2, ZERO_3)}
    with_logits = gib(memory(case.plan(ZERO_2), fused=False).peak)
    return (
        f"**{case.title}: ZeRO-3 or FSDP2.** It takes {peaks[ZERO_3]} of {gib(case.machine.room)} GiB. DDP "
        f"({peaks[DDP]}) and ZeRO-1 ({peaks[ZERO_1]}) do not fit; ZeRO-2 does with the fused head "
        f"({peaks[ZERO_2]}), and not with logits ({with_logits})."
    )


def large_in_short(case: Case) -> str:
    plan = case.plan(ZERO_3)
    peak, in_root = (gib(memory(case.plan(mode)).peak) for mode in (ZERO_3, FSDP2_ROOT))
    waited = moved(step(case.plan(case.modes[-1])).sent("layers"))
    return (
        f"**{case.title}: ZeRO-3 or FSDP2 over all of them**, with embedding and head wrapped by themselves: "
        f"{peak} GiB, and {in_root} with the two in FSDP2's root. The layers hide what it moves from "
        f"{hiding_tokens(plan)} tokens per rank on. Tensor-parallel layers wait for {waited} in every step: "
        "they are for what does not fit otherwise, or for fewer pairs than GPUs."
    )


def shards_in_short(case: Case) -> str:
    rows = dict(head_rows(case))
    one, head = rows["1"], rows["8, by vocabulary"]
    time, covers = dhidden_seconds(head), (head.exact_cover, head.certified_cover)
    exact, certified = (percent(min(1.0, cover / time)) for cover in covers)
    return (
        "**A vocabulary-parallel head** goes with tensor-parallel layers. On 8 ranks weight and dweight take "
        f"{mib(2 * head.weight_bytes)} instead of {mib(2 * one.weight_bytes)}. At {head.tokens} tokens each "
        f"rank sends {moved(head.statistics_sent)} in the forward and {moved(head.dhidden_sent)} in the "
        f"backward. The latter take {seconds(time)}, of which the exact backward hides {exact} and the "
        f"certified one, whose products are short, {certified}."
    )


def slices_in_short(case: Case) -> str:
    one, eight = (case.plan(with_sequence(ranks)) for ranks in (1, 8))
    pair = moved(sequence_sums_sent(replace(eight, batch=Batch(1 / 8))))
    return (
        f"**Sequence-parallel ranks are for long pairs**: 8 of them take {longest_length(eight):,} tokens a "
        f"sequence of {case.model.name}, one takes {longest_length(one):,}. For this the loss sends {pair} a "
        "pair; what costs is the attention of the layers."
    )


def overlap_note(cases: Sequence[Case]) -> str:
    tensor = cases[1].modes[-1]
    head, alone = cases[1].plan(tensor).head, hiding_chunk(cases[1].machine, tensor.tensor)
    few = dict(head_rows(cases[1]))["8, by vocabulary"]
    return (
        "The exact backward forms dhidden over chunks of the vocabulary, so that only dweight of the last "
        f"chunk is left to hide its sum. On {tensor.tensor} ranks that takes a last chunk of {alone:,} "
        f"entries, whatever the sizes are. The library's last chunk has {few.last_chunk:,} entries at "
        f"{few.tokens:,} completion tokens and {head.last_chunk:,} at {head.tokens:,}."
    )


def choice_table(cases: Sequence[Case]) -> str:
    lines = [*engine_choices(*cases), *group_choices(*cases)]
    return markdown_table(["what there is", "take", "why"], lines, rule="---")


def engine_choices(small: Case, large: Case) -> list[list[str]]:
    states = [gib(2 * case.model.parameters) for case in (small, large)]
    peaks = {mode: gib(memory(small.plan(mode)).peak) for mode in (ZERO_2, ZERO_3)}
    steps = {mode: step(small.plan(mode)) for mode in (ZERO_2, ZERO_3, FSDP2_HEAD)}
    sent = {mode: moved(each.sent("engine")) for mode, each in steps.items()}
    late = {mode: seconds(each.exposed_seconds) for mode, each in steps.items()}
    again = seconds(steps[ZERO_3].transfers[-1].seconds)
    tensor = large.modes[-1]
    times = [seconds(step(large.plan(mode)).seconds) for mode in (ZERO_3, tensor)]
    slow = replace(large, machine=replace(large.machine, network_peak=SLOW_NETWORK))
    over_slow = [seconds(engine_seconds(slow.plan(mode))) for mode in (ZERO_3, tensor)]
    few = [hiding_tokens(case.plan(ZERO_3)) for case in (small, large)]
    return [
        [
            "LoRA, or a frozen body",
            "DDP, as long as the weights fit",
            f"{states[0]} GiB of an 8B model, {states[1]} of a 70B; only gradients of adapters move",
        ],
        [
            f"all weights of an 8B model on {small.gpus} GPUs",
            "ZeRO-3 or FSDP2, the head by itself and kept for its backward",
            f"{peaks[ZERO_3]} GiB; to gather the head a second time would be waited for, {again}",
        ],
        [
            "the same, with many micro-batches a step",
            "ZeRO-2, if the memory suffices",
            f"{peaks[ZERO_2]} GiB. It moves {sent[ZERO_2]} instead of {sent[ZERO_3]} and gathers weights "
            f"once a step, but waits for that: {late[ZERO_2]} instead of {late[FSDP2_HEAD]}",
        ],
        [
            f"all weights of a 70B model on {large.gpus} GPUs",
            "ZeRO-3 or FSDP2 over all, embedding and head by themselves",
            f"a step of {times[0]}, of {times[1]} with tensor-parallel layers",
        ],
        [
            f"fewer than {few[0]} (8B) or {few[1]} (70B) tokens per rank and pass",
            "more of them; else weights that are kept (FSDP2), or tensor-parallel layers",
            "the weights come in more slowly than the layers use them",
        ],
        [
            f"one link of {SLOW_NETWORK / GB:g} GB/s per node",
            "the same, with larger micro-batches",
            f"70B: from {hiding_tokens(slow.plan(ZERO_3))} tokens on. Tensor-parallel layers in a node spare "
            f"the network little: {over_slow[1]} instead of {over_slow[0]}",
        ],
    ]


def group_choices(small: Case, large: Case) -> list[list[str]]:
    sequence, tensor = large.modes[-2:]
    one = [longest_length(case.plan(ZERO_3)) for case in (small, large)]
    eight = [longest_length(case.plan(with_sequence(8))) for case in (small, large)]
    shares = [percent(layers_share(large.plan(mode))) for mode in (sequence, tensor)]
    whole, shard = (mib(4 * large.model.head / ranks) for ranks in (1, 8))
    tokens = [moving_tokens(small.model, 8, reduce_bytes) for reduce_bytes in (2, 4)]
    return [
        [
            f"sequences above {one[0]:,} (8B) or {one[1]:,} (70B) tokens",
            "sequence-parallel ranks within a node",
            f"8 take {eight[0]:,} and {eight[1]:,}; their attention waits {shares[0]} of a step of 70B, "
            f"tensor-parallel layers {shares[1]}",
        ],
        [
            "fewer pairs than GPUs",
            "sequence-parallel ranks, or tensor-parallel layers",
            "the ranks of a group work on the same pairs",
        ],
        [
            "tensor-parallel layers",
            "vocabulary-parallel head on the same ranks",
            f"a whole head on each of 8 ranks is 8 times the operations, and {whole} of weight and dweight "
            f"instead of {shard} (70B)",
        ],
        [
            "data-parallel layers, and a head that is too large to gather",
            "vocabulary-parallel head on the gathered completion tokens of the group",
            f"on 8 ranks moves less than gathering the head does up to {tokens[0]:,} completion tokens per "
            f"rank, {tokens[1]:,} where gradients are summed in fp32",
        ],
    ]


def engine_seconds(plan: Plan) -> float:
    return sum(transfer.seconds for transfer in step(plan).transfers if transfer.of == "engine")


def layers_share(plan: Plan) -> float:
    found = step(plan)
    return sum(transfer.exposed for transfer in found.transfers if transfer.of == "layers") / found.seconds


# Numbers


def gib(size: float) -> str:
    return significant(size / GIB, 3)


def mib(size: float) -> str:
    return f"{size / MIB:,.0f} MiB"


def moved(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{significant(size / scale, 3)} {unit}"
    return f"{size:.0f} bytes" if size else "0"


def seconds(time: float) -> str:
    """Below the start of a collective, which is not counted, no more than that is said."""
    if 0 < time < SHORT:
        return f"< {SHORT * 1e6:.0f} µs"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if time >= scale:
            return f"{significant(time / scale, 3)} {unit}"
    return f"{significant(time * 1e6, 3)} µs" if time else "0"


def fits(held: Memory, machine: Machine) -> bool:
    return held.peak <= machine.room


def yes_or_no(value: bool) -> str:
    return "yes" if value else "**no**"


# What `publish.py` writes into docs/scaling.md, by the names of the parts
PARTS: dict[str, Callable[[Sequence[Case]], str]] = {
    "short": short,
    "assumptions": assumptions_table,
    "memory-8b": lambda cases: memory_table(cases[0]),
    "step-8b": lambda cases: step_table(cases[0]),
    "memory-70b": lambda cases: memory_table(cases[1]),
    "step-70b": lambda cases: step_table(cases[1]),
    "head-8b": lambda cases: head_table(cases[0]),
    "head-70b": lambda cases: head_table(cases[1]),
    "lengths": lengths_table,
    "choice": choice_table,
    "overlap": overlap_note,
    "overlap-8b": lambda cases: overlap_table(cases[0]),
    "overlap-70b": lambda cases: overlap_table(cases[1]),
}


# They conclude from the cases of the page, in words.
PROSE = ("short", "choice", "overlap")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--memory", type=float, default=A100.memory / GIB, help="of a GPU, GiB (%(default)s)")
    parser.add_argument(
        "--network",
        type=float,
        default=A100.network_peak / GB,
        help="of a node, each way, GB/s (%(default)s)",
    )
    for share in ("compute", "memory", "link"):
        parser.add_argument(
            f"--{share}-share",
            type=float,
            default=getattr(A100, f"{share}_share"),
            help="of the peak rate that is reached (%(default)s)",
        )
    parser.add_argument("--kept-share", type=float, default=KEPT_SHARE, help="certified (%(default).4f)")
    parser.add_argument("--pairs", type=float, nargs=2, metavar=("8B", "70B"), help="per GPU (4 and 2)")
    parser.add_argument("--length", type=int, default=2048, help="of a sequence, tokens (%(default)s)")
    parser.add_argument("--completion", type=int, default=1024, help="of it, completion (%(default)s)")
    parser.add_argument("--only", choices=PARTS, metavar="PART", help=f"one of {', '.join(PARTS)}")
    options = parser.parse_args(arguments)
    for name in ("memory", "network"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be > 0; got {getattr(options, name)}")
    for name in ("compute_share", "memory_share", "link_share", "kept_share"):
        if not 0 < getattr(options, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be in (0, 1]; got {getattr(options, name)}")
    if options.pairs and min(options.pairs) <= 0:
        parser.error(f"--pairs must be > 0; got {options.pairs}")
    if not 0 < options.completion <= options.length:
        parser.error(f"--completion must be in [1, --length = {options.length}]; got {options.completion}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    machine = replace(
        A100,
        memory=options.memory * GIB,
        network_peak=options.network * GB,
        compute_share=options.compute_share,
        memory_share=options.memory_share,
        link_share=options.link_share,
    )
    cases = [
        replace(
            case,
            machine=machine,
            kept_share=options.kept_share,
            batch=Batch(pairs, options.length, options.completion),
        )
        for case, pairs in zip(CASES, options.pairs or [case.batch.pairs for case in CASES], strict=True)
    ]
    names = [name for name in PARTS if options.only in (None, name)]
    if cases != list(CASES):
        names = [name for name in names if name not in PROSE]
        print(f"(Without {', '.join(PROSE)}: what docs/scaling.md concludes holds for its own cases.)\n")
    print("\n\n".join(PARTS[name](cases) for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
