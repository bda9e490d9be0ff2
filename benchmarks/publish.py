"""Writes what `benchmarks/results/` holds into README.md and the pages of docs, and draws their plots.

    python benchmarks/publish.py            # make report
    python benchmarks/publish.py --check    # exit status 1, and which part it is, where a page says otherwise

Only what stands between `<!-- measured: begin NAME (make report) -->` and `<!-- measured: end NAME -->` is
rewritten. A plot carries the hash of its data and is drawn again only when they changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plots
from benchmarks.targets import (
    DPO,
    GPU_SIZE,
    MIB,
    TARGETS,
    Target,
    is_usual,
    loss_of,
    peer_row,
    short_name,
    size_of,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
COMPILED = Path("benchmarks/compiled.json")
FIGURES = Path("docs/figures")
HASH = "focalkern data"  # key of the hash in a plot's metadata

# README: up to two results of GPUs, then these files and dtypes, in this order, as far as there is room.
README_ROWS = 4
README_GPU_ROWS = 2
README_CPU = (
    ("cpu-4096x512x128256-bf16.json", "bf16"),
    ("cpu-4096x512x128256-fp32.json", "fp32"),
    ("cpu-2048x512x32768.json", "bf16"),
    ("cpu-2048x512x32768.json", "fp32"),
)
STEP_FILE = "cpu-trl-step-128256.json"

OURS = ("triton", "torch")  # the certified backward, by short name; beside them "*-exact"
FIRST = ("triton", "triton-exact", "torch", "torch-exact", "trl", "eager")  # the others follow as in the file


class ResultError(Exception):
    """A result file, or a page, is not as it should be; the message names it."""


class Record(dict):
    """An object of a result file; a key that it lacks is an error that names the file."""

    def __init__(self, pairs: dict[str, Any], file: str) -> None:
        super().__init__(pairs)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise ResultError(f"{self.file}: no {key!r} beside {', '.join(map(repr, self))}")


@dataclass(frozen=True)
class Report:
    """What one run of throughput.py or trl_step.py wrote; a GPU's file holds several."""

    file: str  # name of the file
    name: str  # of the report within a GPU's file
    data: Record

    @property
    def on_gpu(self) -> bool:
        return self.data["device_type"] != "cpu"

    @property
    def has_shipped_table(self) -> bool:
        """With the launch table that users have, not one that a tuning run has just found."""
        return self.data.get("launch_table", "shipped") == "shipped"

    @property
    def comparisons(self) -> list[Record]:
        return self.data["comparisons"]

    @property
    def of_steps(self) -> bool:
        return any("setup" in comparison for comparison in self.comparisons)

    @property
    def title(self) -> str:
        return f"`{self.file}`" + (f", {self.name}" if self.name else "")


@dataclass(frozen=True)
class Results:
    reports: list[Report]  # those of GPUs first
    gpu_files: list[Record]
    compiled: Record  # what resources.py wrote

    def heads(self) -> list[Report]:
        return [report for report in self.reports if not report.of_steps]

    def steps(self) -> list[Report]:
        return [report for report in self.reports if report.of_steps]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if anything is stale")
    options = parser.parse_args(arguments)
    try:
        results = load_results(root)
        stale = [*update_plots(root, results, options.check), *update_pages(root, results, options.check)]
    except ResultError as error:
        print(error, file=sys.stderr)
        return 2
    for what in stale:
        print(f"{what} is stale: make report" if options.check else f"{what}: written")
    return 1 if options.check and stale else 0


def load_results(root: Path) -> Results:
    reports, gpu_files = [], []
    for path in sorted((root / RESULTS).glob("*.json")):
        data = load(path)
        if path.name.endswith(".partial.json"):
            continue  # of a run of `make gpu` that got nowhere
        if not data.get("finished", True):
            raise ResultError(f"{path.name}: its run has not ended: wait, or run it again")
        if "reports" in data or "steps" in data:  # of `make gpu`
            gpu_files.append(data)
            reports += reports_of_gpu(data)
        else:
            reports.append(Report(path.name, "", data))
    reports.sort(key=lambda report: not report.on_gpu)
    return Results(reports, gpu_files, load(root / COMPILED))


def load(path: Path) -> Record:
    try:
        return json.loads(
            path.read_text(encoding="utf-8"), object_hook=lambda pairs: Record(pairs, path.name)
        )
    except json.JSONDecodeError as error:
        raise ResultError(f"{path.name}: not JSON: {error}") from error


def reports_of_gpu(data: Record) -> Iterator[Report]:
    """The reports of a file of `make gpu`: without those of steps that failed."""
    for name, report in data.get("reports", {}).items():
        if isinstance(report, Record) and "comparisons" in report:
            yield Report(data.file, name, report)


# Pages


def pages() -> dict[str, dict[str, Callable[[Results], str]]]:
    """Who writes the generated parts of each page, by the name in their markers."""
    return {
        "README.md": {"results": readme_results, "summary": readme_summary},
        "docs/certified-backward.md": {
            "errors": certified_errors,
            "times": certified_times,
            "saturated": certified_saturated,
        },
        "docs/performance.md": {
            "tables": all_tables,
            "plots": plots_section,
            "targets": targets_table,
            "compiled": compiled_tables,
        },
    }


def update_pages(root: Path, results: Results, check: bool) -> list[str]:
    """Writes the parts that differ, unless only a check is asked for, and tells which they are."""
    stale, texts = [], {}
    for page, generated in pages().items():
        text = (root / page).read_text(encoding="utf-8")
        for name, generate in generated.items():
            updated = replace_part(text, name, generate(results), page)
            stale += [f'{page}, part "{name}"'] if updated != text else []
            text = updated
        texts[page] = text
    for page, text in texts.items():
        if not check:
            (root / page).write_text(text, encoding="utf-8")
    return stale


def replace_part(text: str, name: str, content: str, page: str) -> str:
    begin, end = f"<!-- measured: begin {name} (make report) -->", f"<!-- measured: end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ResultError(f"{page}: needs one {begin} and after it one {end}")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n\n{wrapped(content)}\n\n{end}{after}"


def wrapped(content: str) -> str:
    """Paragraphs in lines of a readable length; tables, headings and pictures as they are."""
    return "\n\n".join(
        block
        if block.startswith(("|", "#", "!"))
        else textwrap.fill(
            block,
            115,
            subsequent_indent="  " if block.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for block in content.strip().split("\n\n")
    )


def readme_results(results: Results) -> str:
    columns = ["device, tokens × H × V, dtype", "focalkern", "TRL's head", "compiled PyTorch", "extra memory"]
    chosen = readme_choice(results)
    table = markdown_table(columns, [readme_row(*pair) for pair in chosen])
    said = (
        "Below 1× the other is faster. Extra memory: focalkern's, then TRL's. LM-like input, about 50 softmax"
        " entries above 2^-12 per token; all else in [docs/performance.md](docs/performance.md#results)."
    )
    plots = [plot.as_markdown("docs/figures") for plot in all_plots(results)[:1]]
    return "\n\n".join([*map(gpu_steps, results.gpu_files), table, said, *plots])


def readme_row(report: Report, comparison: Record) -> list[str]:
    """The time of forward and backward, others' over it, and the memory of both."""
    ours = focalkern_row(comparison)
    trl, compiled = (peer_row(comparison, name) for name in ("trl", "compile"))
    assert ours is not None
    time = ours["both_ms"]["median"]

    def ratio(row: Record | None) -> str:
        return f"{significant(row['both_ms']['median'] / time, 3)}×" if row else "–"

    memory = [memory_of(row) if row and "extra_bytes" in row else "–" for row in (ours, trl)]
    tokens, hidden, vocab = size_of(comparison)
    size = f"{report.data['device']}, {tokens} × {hidden} × {vocab}, {comparison['dtype']}"
    return [size, duration(time), ratio(trl), ratio(compiled), " : ".join(memory)]


NO_GPU = (
    "**No GPU has timed it yet.** The `gpu` tests and the GPU benchmark are written and have not run; "
    "[docs/performance.md](docs/performance.md#on-a-gpu) has estimates from the compiled code."
)


def gpu_steps(file: Record) -> str:
    """What the tests that need a GPU came to, and the steps of `make gpu` that failed."""
    tests = file.get("gpu_tests") or {}
    counts = [f"{tests['passed']} passed"] if tests else ["no result"]
    counts += [
        f"{len(tests[kind])} {kind}"
        for kind in ("failed", "unfinished", "not begun", "skipped")
        if tests.get(kind)
    ]
    sentence = f"{file['device']}, tests that need a GPU: {', '.join(counts)}."
    steps = file.get("steps") or []
    wrong = [
        f"{step['name']}: {step['status']}"
        for step in steps
        if step["status"] != "ok" and not step["status"].startswith("skipped")
    ]
    return f"{sentence} Steps of `make gpu`: {'; '.join(wrong)}." if wrong else sentence


def readme_choice(results: Results) -> list[tuple[Report, Record]]:
    """At most README_ROWS of the results, each of another device, size or dtype."""
    usual = [
        (report, comparison)
        for report in results.heads()
        for comparison in report.comparisons
        if is_usual(report.data, comparison)
    ]
    # The size of the targets first, and DPO's loss, which all peers have.
    on_gpu = sorted(
        (pair for pair in usual if pair[0].on_gpu),
        key=lambda pair: (size_of(pair[1]) != GPU_SIZE, loss_of(pair[1]) != DPO),
    )
    distinct: dict[tuple, tuple[Report, Record]] = {}
    for report, comparison in on_gpu:
        key = report.data["device"], size_of(comparison), comparison["dtype"]
        distinct.setdefault(key, (report, comparison))
    chosen = list(distinct.values())[:README_GPU_ROWS]
    for file, dtype in README_CPU:
        found = [pair for pair in usual if pair[0].file == file and pair[1]["dtype"] == dtype]
        if not found:
            raise ResultError(f"{file}: README.md is to show it in {dtype}, and {RESULTS} has no such result")
        chosen.append(min(found, key=lambda pair: loss_of(pair[1]) != DPO))
    return chosen[:README_ROWS]


def readme_summary(results: Results) -> str:
    """A step of TRL's trainer, and whether a GPU has run anything."""
    report = next((report for report in results.steps() if report.file == STEP_FILE), None)
    if report is None:
        raise ResultError(f"{STEP_FILE}: README.md is to tell of it, and it is not in {RESULTS}")
    comparison = report.comparisons[0]
    trl, patched = comparison["rows"]["TRL"], comparison["rows"]["TRL under patch()"]
    speed = trl["ms"]["median"] / patched["ms"]["median"]
    setup, device = comparison["setup"], f"{report.data['device']}, {report.data['threads']} threads"
    rows = significant(comparison["padded_positions"] / comparison["completion_tokens"], 2)
    step = (
        f"A DPO step of TRL's trainer is {significant(speed, 3)} times as fast under `patch()`, and takes "
        f"{step_memory(patched)} instead of {step_memory(trl)} beside model and gradients ({setup['dtype']}, "
        f"V = {setup['vocab']}, {device}). With its {setup['layers']} layers of {setup['hidden']} the head is"
        f" nearly the whole step. A factor of {rows} comes from rows: on CPUs TRL's head computes prompts and"
        " padding, too. Expect less of a 7B model."
    )
    return step if results.gpu_files else f"{step}\n\n{NO_GPU}"


def all_tables(results: Results) -> str:
    blocks = []
    for report in [*results.heads(), *results.steps()]:
        blocks.append(f"### {report.title}")
        blocks.append(provenance(report))
        for comparison in report.comparisons:
            if report.of_steps:
                blocks += [step_heading(comparison), step_table(comparison)]
            else:
                blocks += [heading(report, comparison), head_table(comparison), notes(comparison)]
    return "\n\n".join(block for block in blocks if block)


def plots_section(results: Results) -> str:
    drawn = [plot.as_markdown("figures") for plot in all_plots(results)]
    return "\n\n".join(drawn) or "No sweep over tokens or sharpness is among the results."


# Tables


def markdown_table(columns: list[str], lines: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    rules = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, rules, *lines])


def significant(value: float, digits: int) -> str:
    """With 3 digits: 0.0123, 1.23, 12.3, 123, 1,230."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def percent(share: float) -> str:
    return f"{significant(100 * share, 3)} %"


def heading(report: Report, comparison: Record) -> str:
    """What was computed, on what input."""
    given, logits = comparison["input"], comparison["fp32_logits_bytes"] / MIB
    model = f" from {Path(given['model']).name}" if given["kind"] == "captured" else ""
    kind = "random weights" if given["kind"] == "untrained" else f"{given['kind']} input{model}"
    entries = f"{given['entries']:.0f} softmax entries above 2^-12 per token"
    about = [f"{loss_of(comparison)} loss", f"{kind}, {entries}"]
    if comparison["saturated_pairs"]:
        about.append(f"{comparison['saturated_pairs']} of {comparison['pairs']} pairs saturated")
    if report.data["tau"] != "auto":
        about.append(f"`tau={significant(report.data['tau'], 3)}`")
    about.append(
        "gradient of hidden alone" if comparison["frozen_head"] else "gradients of hidden and weight"
    )
    about.append(f"bare GEMM {duration(comparison['bare_gemm_ms']['median'])}")
    about.append(f"fp32 logits {logits:,.0f} MiB")
    tokens, hidden, vocab = size_of(comparison)
    size = f"{tokens} tokens × {hidden} × {vocab}, {comparison['dtype']}"
    return f"**{report.data['device']}, {size}** ({'; '.join(about)})"


def provenance(report: Report) -> str:
    """With what, when and from which tree the numbers were measured."""
    data = report.data
    versions = ", ".join(
        f"{'TRL' if name == 'trl' else name} {number}" for name, number in data["versions"].items() if number
    )
    cores = f"{data['cpus']} cores, {data['threads']} threads"
    machine = data["device"] if report.on_gpu else f"{data['device']}, {cores}"
    return (
        f"{machine}; {versions}, Python {data['python']}; {data['date'][:10]}, commit {commit_of(report)}; "
        f"medians of {data['repeats']} interleaved runs{launch_table_of(report)}; {report.title}"
        + (f", by `{data['command']}`." if "command" in data else ".")
    )


def launch_table_of(report: Report) -> str:
    if not report.on_gpu:
        return ""
    return ", shipped launch table" if report.has_shipped_table else ", launch table of the tuning run"


def commit_of(report: Report) -> str:
    commit = report.data["commit"]
    if not commit:
        return "unknown"
    dirty = commit.endswith("-dirty")
    return f"{commit.removesuffix('-dirty')[:10]} {'with changes (dirty tree)' if dirty else '(clean tree)'}"


def head_table(comparison: Record) -> str:
    """One line for each peer that ran."""
    rows = [row for row in ordered(comparison) if row["status"] == "ok"]
    if not rows:
        return "No method ran."
    ours = focalkern_row(comparison)
    unit = "s" if max(row["both_ms"]["median"] for row in rows) >= 1000 else "ms"
    memory = any("extra_bytes" in row for row in rows)
    columns = ["method", f"forward, {unit}", f"both, {unit} (range)"] + (["extra memory"] if memory else [])
    columns += ["error of dhidden, dweight", "focalkern is … as fast"]
    lines = []
    for row in rows:
        both, errors = row["both_ms"], row["errors"]
        span = "–".join(in_unit(limit(both["samples"]), unit) for limit in (min, max))
        faster = ours and ours is not row and both["median"] / ours["both_ms"]["median"]
        lines.append(
            [
                f"**{row['peer']}**" if row is ours else row["peer"],
                in_unit(row["forward_ms"]["median"], unit),
                f"{in_unit(both['median'], unit)} ({span})",
                *([memory_of(row)] if memory else []),
                f"{scientific(errors['dhidden'])}, {scientific(errors['dweight'])}",
                f"{significant(faster, 3)}×" if faster else "",
            ]
        )
    return markdown_table(columns, lines)


def notes(comparison: Record) -> str:
    """What the certified backward computed, and the peers without a time, with the reason."""
    said = []
    for row in ordered(comparison):
        if short_name(row) in OURS and row.get("kept_share") is not None:
            exact = row["kept_share"] == 1
            share = f"computed {kept_of(row)} of the vocabulary blocks"
            said.append(f"{row['peer']} {'took the exact path' if exact else share}.")
    reasons: dict[str, list[str]] = {}
    for row in ordered(comparison):
        if row["status"] != "ok":
            reason = f"{row['status']}: {row['note']}" if row["note"] else row["status"]
            reasons.setdefault(reason, []).append(row["peer"])
        elif row["note"]:
            said.append(f"{row['peer']}: {row['note']}.")
    return " ".join([*said, *(f"{', '.join(peers)}: {reason}." for reason, peers in reasons.items())])


def compiled_tables(results: Results) -> str:
    blocks = [f"By triton {results.compiled['triton']}:"]
    for arch, kernels in results.compiled["kernels"].items():
        lines = [
            [
                f"`{kernel['kernel']}`" + (f", {kernel['variant']}" if kernel["variant"] != "plain" else ""),
                f"{kernel['tile']}, {kernel['warps']}, {kernel['stages']}",
                f"{kernel['registers']}, {kernel['spilled_bytes']}",
                f"{kernel['shared_bytes'] / 1024:.0f}, {kernel['programs']}",
                f"{kernel['main_loop']}, {kernel['tensor_core']}",
                f"{kernel['others']}",
            ]
            for kernel in kernels
        ]
        blocks += [f"**{arch}**", markdown_table(COMPILED_COLUMNS, lines)]
    return "\n\n".join(blocks)


# docs/certified-backward.md

SHARPNESS_FILE = "cpu-sharpness-bf16.json"
TAU_FILE = "cpu-fp32-tau-0.000122.json"
SATURATED_FILE = "cpu-saturated-bf16.json"


def named(results: Results, file: str) -> Report:
    for report in results.reports:
        if report.file == file:
            return report
    raise ResultError(f"{RESULTS / file} is missing")


def certified_errors(results: Results) -> str:
    report, lines = named(results, SHARPNESS_FILE), []
    for comparison in report.comparisons:
        rows = [peer_row(comparison, name) for name in ("torch", "torch-exact", "trl")]
        errors = [
            ", ".join(scientific(row["errors"][gradient]) if row else "–" for row in rows)
            for gradient in ("dhidden", "dweight")
        ]
        lines.append([input_of(comparison, nll=True), kept_of(focalkern_row(comparison)), *errors])
    columns = [
        "entries (NLL)",
        "kept share",
        *(f"{x}: certified, exact, TRL" for x in ("dhidden", "dweight")),
    ]
    return markdown_table(columns, lines) + f"\n\n{provenance(report)}"


def certified_times(results: Results) -> str:
    reports, lines = [named(results, file) for file in (SHARPNESS_FILE, TAU_FILE)], []
    for comparison in (found for report in reports for found in report.comparisons):
        ours = focalkern_row(comparison)
        rivals = [peer_row(comparison, name) for name in ("torch-exact", "trl", "eager")]
        time, forward = (ours[f"{part}_ms"]["median"] for part in ("both", "forward"))
        others = [row["both_ms"]["median"] if row else None for row in rivals]
        lines.append(
            [
                f"{input_of(comparison)}, {comparison['dtype']}",
                kept_of(ours),
                f"{time:.0f} ms ({forward:.0f} ms)",
                *(f"{ms:.0f} ms, {significant(ms / time, 3)}×" if ms else "–" for ms in others),
            ]
        )
    columns = ["entries, dtype", "kept share", "focalkern (forward)", "exact", "TRL", "eager"]
    table = markdown_table(columns, lines)
    return "\n\n".join([table, *(provenance(report) for report in reports)])


def certified_saturated(results: Results) -> str:
    report, lines = named(results, SATURATED_FILE), []
    for comparison in report.comparisons:
        ours, exact, trl = (peer_row(comparison, name) for name in ("torch", "torch-exact", "trl"))
        both = [row["both_ms"]["median"] for row in (ours, exact, trl)]
        lines.append(
            [
                f"{comparison['saturated_pairs']} of {comparison['pairs']} pairs",
                kept_of(ours),
                *(f"{row['backward_ms']['median']:.0f} ms" for row in (ours, exact)),
                f"{both[0]:.0f} ms",
                ", ".join(f"{significant(other / both[0], 3)}×" for other in both[1:]),
            ]
        )
    columns = ["saturated", "kept share", "backward", "exact backward", "both", "speed against exact, TRL"]
    return markdown_table(columns, lines) + f"\n\n{provenance(report)}"


def input_of(comparison: Record, nll: bool = False) -> str:
    about = comparison["input"]
    name = "random weights" if about["kind"] == "untrained" else f"{about['entries']:.0f}"
    return f"{name} ({about['nll']:.2f})" if nll else name


def step_heading(comparison: Record) -> str:
    setup = comparison["setup"]
    return (
        f"**A step of TRL's trainer, {setup['dtype']}** ({setup['layers']} layers of {setup['hidden']}, V = "
        f"{setup['vocab']}; {setup['pairs']} pairs, {comparison['tokens']} tokens of which "
        f"{comparison['completion_tokens']} of completions, {comparison['padded_positions']} positions when "
        f"padded; errors against TRL's step in fp32)"
    )


def step_table(comparison: Record) -> str:
    rows = comparison["rows"]
    trl = rows["TRL"]["ms"]["median"]
    lines = []
    for name, row in rows.items():
        times = row["ms"]
        span = "–".join(in_unit(times[limit], "s") for limit in ("min", "max"))
        kept = row["kept_share"]
        lines.append(
            [
                name.replace("patch()", "`patch()`"),
                f"{in_unit(times['median'], 's')} ({span})",
                step_memory(row),
                "" if kept is None else percent(kept),
                scientific(row["gradient_error"]),
                "" if name == "TRL" else f"{significant(trl / times['median'], 3)}×",
            ]
        )
    columns = [
        "trainer",
        "step, s (range)",
        "extra memory",
        "kept share",
        "error of the gradient",
    ]
    return markdown_table([*columns, "speed against TRL"], lines)


COMPILED_COLUMNS = [
    "kernel",
    "tile, warps, stages",
    "registers, spilled bytes",
    "shared KiB, programs per multiprocessor",
    "instructions in the main loop, of them tensor-core",
    "outside it",
]


def ordered(comparison: Record) -> list[Record]:
    def rank(row: Record) -> int:
        name = short_name(row)
        return FIRST.index(name) if name in FIRST else len(FIRST)

    return sorted(comparison["rows"], key=rank)


def focalkern_row(comparison: Record) -> Record | None:
    """The one that the others are compared with: certified, on Triton where that was timed."""
    return peer_row(comparison, *OURS)


# Numbers


def in_unit(ms: float, unit: str) -> str:
    return significant(ms / 1000 if unit == "s" else ms, 3)


def duration(ms: float) -> str:
    unit = "s" if ms >= 1000 else "ms"
    return f"{in_unit(ms, unit)} {unit}"


def scientific(value: float | str | None) -> str:
    """2 digits; NaN and infinity are words in the files."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def kept_of(row: Record) -> str:
    return "" if row.get("kept_share") is None else percent(row["kept_share"])


def memory_of(row: Record) -> str:
    if "extra_bytes" not in row:
        return ""
    limit = "≤ " if row["extra_bytes_is_upper_limit"] else ""
    return f"{limit}{row['extra_bytes'] / MIB:,.0f} MiB"


def step_memory(row: Record) -> str:
    limit = "≤ " if row["extra_is_upper_limit"] else ""
    return f"{limit}{row['extra_mib']:,.0f} MiB"


# Targets


def found(target: Target, results: Results) -> dict[str, tuple[Report, float]]:
    """The newest measurement on each device with the shipped launch table, by the device's name."""
    newest = {}
    shipped = (report for report in results.heads() if report.has_shipped_table)
    for report in sorted(shipped, key=lambda report: report.data["date"]):
        for comparison in report.comparisons:
            value = target.value(report.data, comparison)
            if value is not None:
                newest[report.data["device"]] = report, value
    return newest


def missing(target: Target, results: Results) -> str:
    """Why nothing was found."""
    if target.gpus and not results.gpu_files:
        return "not measured: no GPU"
    names = " or ".join(name for name in target.gpus if name)
    tried = [file["device"] for file in results.gpu_files]
    if names and not any(target.is_for(device, "cuda") for device in tried):
        return f"not measured: no {names}"
    return "not measured"


def targets_table(results: Results) -> str:
    lines = []
    for target in TARGETS:
        where = (" or ".join(target.gpus) or "GPU") if target.gpus else "CPU"
        asked = f"{where}, {' × '.join(map(str, target.size))}: {target.what}: {target.bound}"
        for report, value in found(target, results).values():
            measured = f"{significant(value, 3)}{target.unit} ({report.title})"
            lines.append([asked, measured, "yes" if target.is_met(value) else "**no**"])
        if not found(target, results):
            lines.append([asked, missing(target, results), ""])
    return markdown_table(["target, bf16, about 50 entries", "measured", "met"], lines)


# Plots

SWEEPS = {  # over what: how it is drawn, and its axis
    "tokens": (plots.plot_tokens, plots.tokens_of),
    "sharpness": (plots.plot_sharpness, plots.entries_of),
}


@dataclass(frozen=True)
class Plot:
    """What a report with several inputs is drawn as."""

    report: Report
    over: str  # "tokens" or "sharpness"

    @property
    def file(self) -> str:
        names = ["measured", Path(self.report.file).stem, self.report.name.replace(" ", "-")]
        if not any(self.over in name for name in names):
            names.append(self.over)
        return "-".join(filter(None, names)) + ".png"

    @property
    def data_hash(self) -> str:
        data = {key: self.report.data[key] for key in ("device", "date", "commit", "comparisons")}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def as_markdown(self, folder: str) -> str:
        over = {"tokens": "the number of tokens", "sharpness": "the sharpness of the softmax"}[self.over]
        title = f"Forward and backward on {self.report.data['device']} over {over}, from {self.report.title}"
        return f"![{title.replace('`', '')}]({folder}/{self.file})"

    def draw(self, path: Path) -> None:
        plot, _ = SWEEPS[self.over]
        plot(self.report.data, path)


def all_plots(results: Results) -> list[Plot]:
    """One for each sweep over tokens or sharpness."""
    return [
        Plot(report, over)
        for report in results.heads()
        for over, (_, axis) in SWEEPS.items()
        if any(len(points) > 1 for points in plots.curves_over(axis, report.data).values())
    ]


def update_plots(root: Path, results: Results, check: bool) -> list[str]:
    stale = []
    for plot in all_plots(results):
        path = root / FIGURES / plot.file
        if drawn_from(path) != plot.data_hash:
            stale.append(str(FIGURES / plot.file))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                plot.draw(path)
                mark(path, plot.data_hash)
    return stale


def mark(path: Path, data_hash: str) -> None:
    """Note in a plot what it shows."""
    with Image.open(path) as picture:
        picture.load()
    about = PngInfo()
    about.add_text(HASH, data_hash)
    picture.save(path, pnginfo=about, optimize=True)


def drawn_from(path: Path) -> str | None:
    """Hash of the data that a plot shows."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(HASH)


if __name__ == "__main__":
    sys.exit(main())
