"""What results look like: the terminal's tables, plots, and the generated parts of README.md and docs.

    python benchmarks/report.py            # make report: benchmarks/results/*.json into pages and figures
    python benchmarks/report.py --check    # exit status 1, and which page or figure is not up to date

`throughput.py` prints and plots by the same functions. A part of a page stands between
`<!-- measured: begin NAME (make report) -->` and `<!-- measured: end NAME -->`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import parser_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = Path("benchmarks/results"), Path("docs/figures")
MIB = 2**20
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "focalkern")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = ("triton", "torch")  # focalkern with the certified backward, by the names that `--only` takes

Json = dict[str, Any]


# Where and with what the numbers were measured


def environment(device_type: str) -> Json:
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device_type == "cuda" else cpu_name(),
        "device_type": device_type,
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit, marked "-dirty" when anything but results and the pages made of them differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        others = [":!benchmarks/results", ":!*.md", ":!*.png"]
        changed = git("status", "--porcelain", "--untracked-files=no", ".", *others)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(data: Json, path: Path) -> None:
    """Whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


# A comparison: as `throughput.py` writes it, and in a table


def frame(comparison: Json) -> pd.DataFrame:
    """A line for each peer that was timed, by its short name: milliseconds, MiB, relative errors."""
    lines = {
        row["id"]: {
            "peer": row["peer"],
            "forward": row["forward_ms"]["median"],
            "backward": row["backward_ms"]["median"],
            "both": row["both_ms"]["median"],
            "fastest": row["both_ms"]["min"],
            "slowest": row["both_ms"]["max"],
            "kept": row.get("kept_share"),
            "extra": row["extra_bytes"] / MIB if "extra_bytes" in row else None,
            "memory": memory_of(row),
            "dhidden": row["errors"]["dhidden"],
            "dweight": row["errors"].get("dweight"),
        }
        for row in comparison["rows"]
        if "both_ms" in row
    }
    found = pd.DataFrame.from_dict(lines, orient="index")
    ours = next((name for name in OURS if name in lines), None)
    return found.assign(ratio=found["both"] / lines[ours]["both"] if ours else None) if lines else found


def memory_of(row: Json) -> str | None:
    limit = "≤ " if row.get("extra_bytes_is_upper_limit") else ""
    return f"{limit}{row['extra_bytes'] / MIB:,.0f}" if "extra_bytes" in row else None


def kind_of(comparison: Json) -> str:
    about = comparison["input"]
    if about["kind"] == "captured":
        return f"captured from {about['model']} on {about['data']}, reference {about['reference']}"
    return "random weights" if about["kind"] == "untrained" else f"{about['kind']} input"


def size_of(comparison: Json) -> str:
    shape = comparison["shape"]
    return f"{comparison['tokens']} × {shape['hidden']} × {shape['vocab']}, {comparison['dtype']}"


def terminal(comparison: Json) -> str:
    """What was compared, the times and errors of all peers, and why a peer has none: within 80 columns."""
    about, rows = comparison["input"], comparison["rows"]
    gradients = "dhidden alone (frozen head)" if comparison["frozen_head"] else "dhidden and dweight"
    saturated, pairs = comparison["saturated_pairs"], comparison["pairs"]
    intro = [
        f"{comparison['loss']}, {size_of(comparison)}; {pairs} pairs"
        + (f", {saturated} of them saturated" if saturated else "")
        + f"; gradients: {gradients}",
        f"{kind_of(comparison)}: NLL {about['nll']:.2f}, entropy {about['entropy']:.2f}, "
        f"{about['entries']:.0f} softmax entries above 2^-12 per token",
        f"bare GEMM {number(comparison['bare_gemm_ms']['median'])} ms, fp32 logits "
        f"{comparison['fp32_logits_bytes'] / MIB:,.0f} MiB; plain PyTorch's error in {comparison['dtype']} "
        f"{scientific(comparison['plain_pytorch_errors']['dhidden'])}",
    ]
    found, table = frame(comparison), []
    if len(found):
        shown = cells(found).set_index("peer")[["forward", "both", "ratio", "kept", "memory", "dhidden"]]
        shown.columns = ["fwd", "both", "x focalkern", "kept", "extra", "error"]
        table = [shown.rename_axis(None).to_string()]
    reasons = defaultdict(list)
    for row in rows:
        if row["status"] != "ok" or row["note"]:
            reasons[": ".join(filter(None, (row["status"], row["note"])))].append(row["peer"])
    notes = [f"{', '.join(peers)}: {reason}" for reason, peers in reasons.items()]
    return "\n".join(["", *map(wrapped, intro), *table, *map(wrapped, notes)])


def wrapped(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ")


def number(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 123, 1,230."""
    rounded = float(f"{value:.2e}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:#.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def scientific(value: float | str) -> str:
    """Two digits; NaN and infinity are words in the files."""
    return value if isinstance(value, str) else f"{value:.1e}".replace("e-0", "e-") if value else "0"


# Plots

SWEEPS = {  # over what: the axis, and the quantities of the two panels
    "tokens": ("tokens", {"both": "forward and backward, ms", "extra": "extra memory, MiB"}),
    "sharpness": (
        "softmax entries above 2^-12 per token",
        {"both": "forward and backward, ms", "kept": "kept share"},
    ),
}
MARKERS = "os^DvPX*<>hdp8"  # not every reader tells the colours apart


def sweep(report: Json, over: str) -> list[list[Json]]:
    """Groups of comparisons that differ in nothing but the tokens or the sharpness, in that order."""
    groups = defaultdict(list)
    for comparison in sorted(report["comparisons"], key=lambda each: (is_flat(each), place(each, over))):
        about = comparison["input"]
        other = (about["kind"], about.get("scale")) if over == "tokens" else comparison["tokens"]
        names = ("dtype", "loss", "frozen_head", "saturated_pairs")
        groups[(*(comparison[name] for name in names), other)].append(comparison)
    return [group for group in groups.values() if len(group) > 1]


def is_flat(comparison: Json) -> bool:
    return comparison["input"]["kind"] == "untrained"


def place(comparison: Json, over: str) -> float:
    return comparison["tokens"] if over == "tokens" else comparison["input"]["entries"]


def title_of(comparison: Json, over: str) -> str:
    shape, saturated = comparison["shape"], comparison["saturated_pairs"]
    words = [f"{shape['hidden']} × {shape['vocab']}", comparison["dtype"], comparison["loss"]]
    words.append(kind_of(comparison) if over == "tokens" else f"{comparison['tokens']} tokens")
    words += ["frozen head"] if comparison["frozen_head"] else []
    return ", ".join([*words, f"{saturated} pairs saturated"] if saturated else words)


def draw(report: Json, over: str, path: Path) -> None:
    """A row of two panels for each setting, a line for each peer; focalkern's are thicker."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    (axis, quantities), groups, handles = SWEEPS[over], sweep(report, over), {}
    figure = Figure(figsize=(12.8, 4.2 * len(groups) + 0.9), layout="constrained")
    figure.suptitle(f"{report['device']}, {report['date'][:10]}", fontsize="medium")
    peers = dict.fromkeys(row["peer"] for comparison in report["comparisons"] for row in comparison["rows"])
    for group, row in zip(groups, figure.subplots(len(groups), 2, squeeze=False), strict=True):
        lines = pd.concat([frame(comparison).assign(x=x) for x, comparison in enumerate(group)])
        ticks = [f"{place(each, over):.0f}" for each in group]
        if over == "sharpness" and is_flat(group[-1]):
            ticks[-1] = "random\nweights"
        for panel, (column, label) in zip(row, quantities.items(), strict=True):
            for i, peer in enumerate(peers):  # the same colour and marker in every panel
                points = lines[lines["peer"] == peer].dropna(subset=column)
                style = {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)]}
                style["linewidth"] = 2.4 if peer.startswith("focalkern") else 1.2
                if len(points):
                    (handles[peer],) = panel.plot(points["x"], points[column].astype(float), **style)
            panel.set(title=title_of(group[0], over), xlabel=axis, ylabel=label)
            panel.set_xticks(range(len(ticks)), ticks)
            panel.grid(alpha=0.3)
            if over == "tokens":
                panel.set_yscale("log")
                panel.yaxis.set_major_formatter("{x:,g}")
            else:
                panel.set_ylim(bottom=0)
    options = {"loc": "outside lower center", "ncols": 4, "fontsize": "small", "frameon": False}
    figure.legend(handles.values(), handles, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"data": data_hash(report)})


def data_hash(report: Json) -> str:
    return hashlib.sha256(json.dumps(report["comparisons"], sort_keys=True).encode()).hexdigest()


def plots(report: Json, folder: Path) -> Iterator[Path]:
    """Draw what the report has several values of; the paths of the plots."""
    for over in SWEEPS:
        if sweep(report, over):
            draw(report, over, folder / f"over-{over}.png")
            yield folder / f"over-{over}.png"


# Pages

STEP, SHARPNESS = "cpu-trl-step-128256", "cpu-sharpness-bf16"
LENGTHS = "cpu-trl-lengths"  # with the name of the lengths behind it
SATURATED = "cpu-saturated-bf16"
LLAMA, LARGE = "cpu-1024x4096x128256-bf16", "cpu-4096x512x128256-bf16"
SMALL = "cpu-2048x512x32768"
PLOTS = {"measured-sharpness.png": (SHARPNESS, "sharpness")}
# Tables with a row for each comparison: title and template of each column. `{trl ratio}` is a column of
# `frame` for that peer, `{ours ...}` one for focalkern.
BY_INPUT = {
    "results": {
        "device, tokens × H × V, dtype": "{device}, {size}",
        "focalkern": "{ours both}",
        "TRL's head": "{trl ratio}",
        "fastest other method": "{fastest}",
        "extra memory": "{memories}",
    },
    "errors": {
        "entries, dtype": "{entries}",
        "kept share": "{ours kept}",
        "dhidden: certified, exact, TRL": "{torch dhidden}, {torch-exact dhidden}, {trl dhidden}",
        "dweight: certified, exact, TRL": "{torch dweight}, {torch-exact dweight}, {trl dweight}",
    },
    "times": {
        "entries, dtype": "{entries}",
        "kept share": "{ours kept}",
        "focalkern (forward)": "{ours both} ({ours forward})",
        "exact": "{torch-exact both}, {torch-exact ratio}",
        "TRL": "{trl both}, {trl ratio}",
        "eager": "{eager both}, {eager ratio}",
    },
    "saturated": {
        "saturated": "{saturated}",
        "kept share": "{ours kept}",
        "backward": "{ours backward}",
        "exact backward": "{torch-exact backward}",
        "both": "{ours both}",
        "over exact, TRL": "{torch-exact ratio}, {trl ratio}",
    },
}


class Results:
    """The result files by name, without `.json`."""

    def __init__(self, root: Path) -> None:
        paths = sorted((root / RESULTS).glob("*.json"))
        self.files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        for name, file in self.files.items():
            if not file.get("finished", True):
                raise SystemExit(f"{RESULTS / name}.json: its run has not ended")
            for report in (file, *file.get("reports", {}).values()):
                for comparison in report.get("comparisons", []):
                    comparison["device"] = report["device"]

    def comparisons(self, *names: str) -> list[Json]:
        return [comparison for name in names for comparison in self.files[name]["comparisons"]]

    @property
    def gpus(self) -> list[Json]:
        """What `make gpu` wrote on each device."""
        return [file for file in self.files.values() if "reports" in file]

    def on_gpus(self) -> list[Json]:
        """The first comparison of each GPU, if focalkern was timed in it."""
        reports = [next(iter(gpu["reports"].values()), {}) for gpu in self.gpus]
        firsts = [comparison for found in reports for comparison in found.get("comparisons", [])[:1]]
        return [each for each in firsts if not frame(each).index.intersection(OURS).empty]

    def sources(self, *names: str) -> str:
        """Device, versions and date of files, and links to them."""
        said = []
        for name in names:
            file = self.files[name]
            run = f"{file['device']}, {file['threads']} threads, torch {file['versions']['torch']}"
            run += f", {file['date'][:10]}, medians of {file['repeats']} runs"
            said.append(f"{run}: [{name}.json](../{RESULTS}/{name}.json).")
        return "\n\n".join(said)


def markdown(columns: dict[str, Any]) -> str:
    """The first column to the left, the others to the right."""
    table = pd.DataFrame(columns)
    lines = [list(table), ["---", *["---:"] * (len(table.columns) - 1)], *table.values.tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def by_input(name: str, comparisons: list[Json]) -> str:
    """A table of `BY_INPUT`."""
    words = [words_of(comparison) for comparison in comparisons]
    columns = BY_INPUT[name].items()
    return markdown({title: [template.format_map(each) for each in words] for title, template in columns})


def words_of(comparison: Json) -> dict[str, str]:
    """What stands for the names in braces of `BY_INPUT`."""
    found = frame(comparison)
    shown, ours = cells(found), ours_in(found)
    fastest = found["both"].drop(index=[ours, f"{ours}-exact"], errors="ignore").idxmin()
    entries = f"{comparison['input']['entries']:.0f}, {comparison['dtype']}"
    words = {
        "device": comparison["device"],
        "fastest": f"{shown.at[fastest, 'ratio']}, {found.at[fastest, 'peer']}",
        "memories": f"{found.at[ours, 'memory']} : {found.at[fastest, 'memory']} MiB",
        "size": size_of(comparison),
        "saturated": f"{comparison['saturated_pairs']} of {comparison['pairs']} pairs",
        "entries": "random weights" if is_flat(comparison) else entries,
    }
    peers = {**shown.T.to_dict(), "ours": shown.loc[ours]}
    words |= {f"{name} {column}": cell for name, row in peers.items() for column, cell in row.items()}
    return defaultdict(lambda: "–", words)


def ours_in(found: pd.DataFrame) -> str:
    return next(name for name in OURS if name in found.index)


def cells(found: pd.DataFrame) -> pd.DataFrame:
    """A `frame`, as pages show it."""
    formats: dict[str, Callable[[Any], str]] = {
        "forward": duration,
        "backward": duration,
        "both": duration,
        "ratio": lambda value: f"{number(value)}×",
        "kept": percent,
        "memory": "{} MiB".format,
        "dhidden": scientific,
        "dweight": scientific,
    }
    shown = {name: found[name].map(shape, na_action="ignore") for name, shape in formats.items()}
    return found.assign(**shown, range=found.apply(range_of, axis=1)).astype(object).fillna("–")


def range_of(peer: pd.Series) -> str:
    scale = 1000 if peer["both"] >= 1000 else 1
    return f"({number(peer['fastest'] / scale)}–{number(peer['slowest'] / scale)})"


def duration(ms: float) -> str:
    return f"{number(ms / 1000)} s" if ms >= 1000 else f"{number(ms)} ms"


def summary(results: Results) -> str:
    """A step of TRL's trainer, and whether a GPU has run anything."""
    file, comparison = results.files[STEP], results.files[STEP]["comparisons"][0]
    trl, patched = (comparison["rows"][name] for name in ("TRL", "TRL under patch()"))
    speed, setup = trl["ms"]["median"] / patched["ms"]["median"], comparison["setup"]
    rows = comparison["padded_positions"] / comparison["completion_tokens"]
    step = (
        f"Measured on {file['device']}, {file['threads']} threads, V = {setup['vocab']}, {setup['dtype']}: "
        f"under `patch()` a DPO step of TRL's trainer needs {patched['extra_mib']:,.0f} MiB instead of "
        f"{trl['extra_mib']:,.0f} MiB on top of model and gradients, and is {number(speed)} times as fast. "
        f"Expect less on a GPU: a factor of {rows:.2g} comes from rows that TRL's head computes on CPUs "
        f"only. The model is tiny ({setup['layers']} layers of {setup['hidden']}): a 7B model gains less."
    )
    no_gpu = (
        "**It has not been timed on a GPU yet**: [docs/performance.md](docs/performance.md#on-a-gpu) has "
        "estimates from the compiled code."
    )
    return "\n\n".join([step, *(map(tests_of, results.gpus) if results.gpus else [no_gpu])])


def tests_of(gpu: Json) -> str:
    tests = gpu.get("gpu_tests") or {"passed": 0, "failed": {}}
    failed = f", {len(tests['failed'])} failed" if tests["failed"] else ""
    return f"{gpu['device']}: {tests['passed']} GPU tests passed{failed}."


def results_table(results: Results) -> str:
    """Four rows: GPUs first."""
    cpu = results.comparisons(LLAMA, LARGE, SMALL)
    kept = [row.get("kept_share") for each in cpu for row in each["rows"] if row["id"] in OURS]
    shares = ", ".join(percent(share) for share in kept if share and share < 1)
    said = (
        "Extra memory: focalkern's, then the fastest other method's. The input is synthetic: in bf16 the "
        f"backward keeps {shares} of the vocabulary blocks; in fp32 the exact one runs. All methods: "
        "[docs/performance.md](docs/performance.md#results)."
    )
    return f"{by_input('results', [*results.on_gpus(), *cpu][:4])}\n\n{said}"


def peers_tables(results: Results) -> str:
    """All peers, on each GPU and on the CPU with a large and a smaller vocabulary."""
    blocks = []
    for comparison in [*results.on_gpus(), *results.comparisons(LLAMA, LARGE, SMALL)]:
        found = cells(frame(comparison))
        table = {
            "method": found["peer"],
            "forward": found["forward"],
            "both (range)": found["both"] + " " + found["range"],
            "extra memory": found["memory"],
            "error of dhidden": found["dhidden"],
            "over focalkern": found["ratio"],
        }
        kept = found.at[ours_in(found), "kept"]
        blocks += [f"**{comparison['device']}, {size_of(comparison)}**, kept share {kept}:", markdown(table)]
    return "\n\n".join([*blocks, results.sources(LLAMA, LARGE, SMALL)])


def step_table(results: Results) -> str:
    """Steps of TRL's trainer, with and without focalkern."""
    of = {each["setup"]["dtype"]: each["rows"] for each in results.comparisons(STEP)}
    table: dict[str, list[str]] = {"trainer": [name.replace("patch()", "`patch()`") for name in of["bf16"]]}
    for dtype, rows in of.items():
        trl = rows["TRL"]["ms"]["median"]
        times = [row["ms"]["median"] for row in rows.values()]
        table[dtype] = [duration(ms) + ("" if ms == trl else f", {number(trl / ms)}×") for ms in times]
        table[f"memory, {dtype}"] = [f"{row['extra_mib']:,.0f} MiB" for row in rows.values()]
    table["error, bf16"] = [scientific(row["gradient_error"]) for row in of["bf16"].values()]
    return f"{markdown(table)}\n\n{results.sources(STEP)}"


def lengths_tables(results: Results) -> str:
    """Steps at lengths of preference data, with a model whose layers dominate."""
    names = [name for name in results.files if name.startswith(LENGTHS)]
    blocks = [block for found in results.comparisons(*names) for block in lengths_table(found)]
    return "\n\n".join([*blocks, results.sources(*names)]) if names else "Not measured yet."


def lengths_table(found: Json) -> list[str]:
    rows, setup, completions = found["rows"], found["setup"], found["completion_tokens"]
    trl = rows["TRL"]
    prompt, completion = (n / 2 / setup["pairs"] for n in (found["tokens"] - completions, completions))
    packed, shared = map(number, found["llama_8b_over_padded"].values())
    ratios = [
        (trl["ms"]["median"] / row["ms"]["median"], trl["operations"] / row["operations"])
        for row in rows.values()
    ]
    table = {
        "trainer": [name.replace("patch()", "`patch()`") for name in rows],
        "positions": [f"{row['positions']:,}" for row in rows.values()],
        "step": [duration(row["ms"]["median"]) for row in rows.values()],
        "tokens/s": [number(row["tokens_per_s"]) for row in rows.values()],
        "over TRL (counted)": [f"{number(time)}× ({number(count)}×)" for time, count in ratios],
        "memory": [f"{row['extra_mib']:,.0f} MiB" for row in rows.values()],
    }
    return [
        f"**{setup['pairs']} pairs, prompts of {prompt:.0f} and completions of {completion:.0f} tokens on "
        f"average, longest sequence {found['longest']}; {setup['layers']} layers of {setup['hidden']}, "
        f"V = {setup['vocab']}, {setup['dtype']}:**",
        markdown(table),
        f"Llama-3-8B at these lengths, with attention that skips hidden scores: by count {packed}× as fast "
        f"packed as padded, {shared}× with shared prompts.",
    ]


def figures(results: Results) -> str:
    said = "![Forward and backward on {device} over {over}](figures/{file})"
    return "\n\n".join(
        said.format(device=results.files[name]["device"], over=over, file=file)
        for file, (name, over) in PLOTS.items()
    )


def certified(table: str, *names: str) -> Callable[[Results], str]:
    return lambda results: f"{by_input(table, results.comparisons(*names))}\n\n{results.sources(*names)}"


PAGES: dict[str, dict[str, Callable[[Results], str]]] = {
    "README.md": {"summary": summary, "results": results_table},
    "docs/performance.md": {"tables": peers_tables, "plots": figures},
    "docs/trl.md": {"step": step_table, "lengths": lengths_tables},
    "docs/certified-backward.md": {
        "errors": certified("errors", SHARPNESS),
        "times": certified("times", SHARPNESS),
        "saturated": certified("saturated", SATURATED),
    },
}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; status 1 if anything is out of date"
    )
    check = parser.parse_args(arguments).check
    results, stale = Results(root), []
    for page, parts in PAGES.items():
        text = (root / page).read_text(encoding="utf-8")
        for name, content in parts.items():
            updated = with_part(text, name, content(results), page)
            stale += [f'{page}, part "{name}"'] if updated != text else []
            text = updated
        if not check:
            (root / page).write_text(text, encoding="utf-8")
    for file, (name, over) in PLOTS.items():
        path = root / FIGURES / file
        if drawn_from(path) != data_hash(results.files[name]):
            stale.append(str(FIGURES / file))
            if not check:
                draw(results.files[name], over, path)
    for what in stale:
        print(f"{what} is out of date: make report" if check else f"{what}: written")
    return 1 if check and stale else 0


def with_part(text: str, name: str, content: str, page: str) -> str:
    """The page with this content between the markers of the part; paragraphs are wrapped."""
    begin, end = f"<!-- measured: begin {name} (make report) -->", f"<!-- measured: end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{page}: needs one {begin} and after it one {end}")
    fill = textwrap.TextWrapper(115, break_on_hyphens=False, break_long_words=False).fill
    blocks = [block if block.startswith(("|", "!")) else fill(block) for block in content.split("\n\n")]
    before, rest = text.split(begin)
    return "\n\n".join([before + begin, *blocks, end + rest.split(end)[1]])


def drawn_from(path: Path) -> str | None:
    """The hash that a figure carries."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get("data")


if __name__ == "__main__":
    sys.exit(main())
