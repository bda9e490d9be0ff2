"""What results look like: the terminal's tables, plots, and the generated parts of README.md and docs.

    python benchmarks/report.py            # make report: benchmarks/results/*.json into pages and figures
    python benchmarks/report.py --check    # exit status 1, and which page or figure is not up to date

`throughput.py` prints and plots by the same functions. A part of a page stands between its `markers`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import parser_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURE = Path("benchmarks/results"), Path("docs/figures/measured-sharpness.png")
MIB = 2**20
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "focalkern")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = ("triton", "torch")  # focalkern with the certified backward, by the names that `--only` takes

Json = dict[str, Any]


# Where and with what the numbers were measured


def environment(device_type: str) -> Json:
    # Of a package that is there twice, the first is imported.
    found = {name: next(iter(importlib.metadata.distributions(name=name)), None) for name in PACKAGES}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device_type == "cuda" else cpu_name(),
        "device_type": device_type,
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {name: package.version for name, package in found.items() if package},
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = named[1] if named else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)| Processor", "", name)


def commit() -> str | None:
    """The commit, "-dirty" where more than results and their pages differ; None outside of a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        results = [":!benchmarks/results", ":!*.md", ":!*.png"]
        changed = git("status", "--porcelain", "--untracked-files=no", ".", *results)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    return None


def write_json(data: Json, path: Path) -> None:
    """Whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


# A comparison: as `throughput.py` writes it, and in a table

COLUMNS = {
    "peer": "peer",
    "forward_ms.median": "forward",
    "backward_ms.median": "backward",
    "both_ms.median": "both",
    "kept_share": "kept",
    "extra_bytes": "extra",
    "extra_bytes_is_upper_limit": "is_limit",
    "errors.dhidden": "dhidden",
    "errors.dweight": "dweight",
}


def frame(comparison: Json) -> pd.DataFrame:
    """A line for each peer that was timed, by its short name: milliseconds, MiB, relative errors."""
    timed = pd.json_normalize([row for row in comparison["rows"] if "both_ms" in row])
    found = timed.reindex(columns=["id", *COLUMNS]).set_index("id").rename(columns=COLUMNS)
    ours = found["both"].get(ours_in(found))
    return found.assign(extra=found["extra"] / MIB, ratio=ours and found["both"] / ours)


def ours_in(found: pd.DataFrame) -> str | None:
    return next((name for name in OURS if name in found.index), None)


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
    about = comparison["input"]
    gradients = "dhidden alone (frozen head)" if comparison["frozen_head"] else "dhidden and dweight"
    saturated, pairs = comparison["saturated_pairs"], comparison["pairs"]
    pairs = f"{pairs} pairs, {saturated} of them saturated" if saturated else f"{pairs} pairs"
    intro = [
        f"{comparison['loss']}, {size_of(comparison)}; {pairs}; gradients: {gradients}",
        f"{kind_of(comparison)}: NLL {about['nll']:.2f}, entropy {about['entropy']:.2f}, "
        f"{about['entries']:.0f} softmax entries above 2^-12 per token",
        f"bare GEMM {number(comparison['bare_gemm_ms']['median'])} ms, fp32 logits "
        f"{comparison['fp32_logits_bytes'] / MIB:,.0f} MiB; plain PyTorch's error in {comparison['dtype']} "
        f"{scientific(comparison['plain_pytorch_errors']['dhidden'])}",
    ]
    shown = cells(frame(comparison)).set_index("peer").rename_axis(None)
    columns = ["forward", "both", "ratio", "kept", "extra", "dhidden"]
    header = ["fwd", "both", "x focalkern", "kept", "extra", "error"]
    table = [shown.to_string(columns=columns, header=header)] if len(shown) else []
    noted = pd.DataFrame(comparison["rows"]).query("note != ''")
    reasons = noted.groupby(["status", "note"], sort=False)["peer"].agg(", ".join)
    notes = [f"{peers}: {status}: {note}" for (status, note), peers in reasons.items()]
    return "\n".join(["", *map(wrapped, intro), *table, *map(wrapped, notes)])


def wrapped(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ")


def number(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 123, 1,230."""
    rounded = float(f"{value:.2e}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:#.3g}"


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


def sweep(report: Json, over: str) -> list[tuple[str, pd.DataFrame]]:
    """Titles and peers of comparisons that differ in the tokens or the sharpness alone, in that order."""
    found = []
    for comparison in report["comparisons"]:
        about, place = comparison["input"], comparison["tokens"]
        if over == "sharpness":
            place = math.inf if about["kind"] == "untrained" else about["entries"]
        found.append(frame(comparison).assign(place=place, title=title_of(comparison, over)))
    groups = pd.concat(found).sort_values("place", kind="stable").groupby("title", sort=False)
    return [(title, group) for title, group in groups if group["place"].nunique() > 1]


def title_of(comparison: Json, over: str) -> str:
    shape, about, saturated = comparison["shape"], comparison["input"], comparison["saturated_pairs"]
    words = [f"{shape['hidden']} × {shape['vocab']}", comparison["dtype"], comparison["loss"]]
    words.append(f"{comparison['tokens']} tokens" if over == "sharpness" else kind_of(comparison))
    words += [f"scale {about['scale']:g}"] if over == "tokens" and about.get("scale") else []
    words += ["frozen head"] if comparison["frozen_head"] else []
    return ", ".join([*words, f"{saturated} pairs saturated"] if saturated else words)


def draw(report: Json, over: str, path: Path) -> Path:
    """A row of two panels for each setting, a line for each peer; focalkern's are thicker."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    (axis, quantities), groups, handles = SWEEPS[over], sweep(report, over), {}
    figure = Figure(figsize=(12.8, 4.2 * len(groups) + 0.9), layout="constrained")
    figure.suptitle(f"{report['device']}, {report['date'][:10]}", fontsize="medium")
    peers = list(pd.json_normalize(report["comparisons"], "rows")["peer"].unique())
    for (title, group), row in zip(groups, figure.subplots(len(groups), 2, squeeze=False), strict=True):
        places = list(group["place"].unique())
        ticks = ["random\nweights" if place == math.inf else f"{place:.0f}" for place in places]
        for panel, (column, label) in zip(row, quantities.items(), strict=True):
            for peer, points in group.dropna(subset=column).groupby("peer", sort=False):
                i = peers.index(peer)  # the same colour and marker in every panel
                style = {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)]}
                style["linewidth"] = 2.4 if peer.startswith("focalkern") else 1.2
                x = points["place"].map(places.index)
                (handles[peer],) = panel.plot(x, points[column].astype(float), **style)
            panel.set(title=title, xlabel=axis, ylabel=label)
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
    return path


def data_hash(report: Json) -> str:
    return hashlib.sha256(json.dumps(report["comparisons"], sort_keys=True).encode()).hexdigest()


def plots(report: Json, folder: Path) -> list[Path]:
    """Draw what the report has several values of; the paths of the plots."""
    found = [over for over in SWEEPS if sweep(report, over)]
    return [draw(report, over, folder / f"over-{over}.png") for over in found]


# Pages

STEP, SHARPNESS = "cpu-trl-step-128256", "cpu-sharpness-bf16"
LENGTHS = "cpu-trl-lengths"  # with the name of the lengths behind it
SATURATED = "cpu-saturated-bf16"
LLAMA, SMALL = "cpu-1024x4096x128256-bf16", "cpu-2048x512x32768"
EPYC = [f"cpu-epyc-{size}-bf16" for size in ("1024x4096x128256", "2048x512x32768", "4096x512x128256")]
# Tables with a row for each comparison: title and template of each column. `{trl ratio}` is a column of
# `frame` for that peer, `{ours ...}` one for focalkern.
BY_INPUT = {
    "results": {
        "device, tokens × H × V, dtype": "{device}, {size}",
        "focalkern, kept share": "{ours both}, {ours kept}",
        "TRL's head": "{trl ratio}",
        "fastest other method": "{fastest}",
        "extra memory": "{memories}",
    },
    "sharpness": {
        "entries, dtype": "{entries}",
        "kept share": "{ours kept}",
        "time: certified, exact, TRL, eager": "{ours both}, {torch-exact ratio}, {trl ratio}, {eager ratio}",
        "dhidden: certified, exact, TRL": "{torch dhidden}, {torch-exact dhidden}, {trl dhidden}",
        "dweight: certified, exact, TRL": "{torch dweight}, {torch-exact dweight}, {trl dweight}",
    },
    "saturated": {
        "saturated": "{saturated}",
        "kept share": "{ours kept}",
        "backward": "{ours backward}",
        "exact backward": "{torch-exact backward}",
        "in all": "{ours both}",
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
        self.gpus = [file for file in self.files.values() if "reports" in file]  # of `make gpu`

    def comparisons(self, *names: str) -> list[Json]:
        return [comparison for name in names for comparison in self.files[name]["comparisons"]]

    def of_sizes(self) -> list[Json]:
        """The first comparison of each GPU, if focalkern was timed in it; then those of CPUs."""
        reports = [next(iter(gpu["reports"].values()), {}) for gpu in self.gpus]
        firsts = [comparison for found in reports for comparison in found.get("comparisons", [])[:1]]
        on_gpus = [comparison for comparison in firsts if ours_in(frame(comparison))]
        return [*on_gpus, *self.comparisons(EPYC[0], LLAMA, EPYC[1], SMALL, *EPYC[2:])]

    def sources(self, *names: str) -> str:
        """Device, versions and date of files, and links to them."""
        links = defaultdict(list)
        for name in names:
            file = self.files[name]
            run = f"{file['device']}, {file['threads']} threads, torch {file['versions']['torch']}"
            run += f", {file['date'][:10]}, medians of {file['repeats']} runs"
            links[run].append(f"[{name}](../{RESULTS}/{name}.json)")
        return "\n\n".join(f"{run}: {', '.join(files)}." for run, files in links.items())


def markdown(columns: dict[str, Any] | pd.DataFrame) -> str:
    """The first column to the left, the others to the right."""
    table = pd.DataFrame(columns)
    lines = [list(table), ["---", *["---:"] * (len(table.columns) - 1)], *table.values.tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def by_input(name: str, comparisons: list[Json]) -> str:
    words, columns = [words_of(comparison) for comparison in comparisons], BY_INPUT[name].items()
    return markdown({title: [template.format_map(each) for each in words] for title, template in columns})


def certified(name: str, file: str, results: Results) -> str:
    return f"{by_input(name, results.comparisons(file))}\n\n{results.sources(file)}"


def words_of(comparison: Json) -> dict[str, str]:
    """What stands for the names in braces of `BY_INPUT`."""
    found = frame(comparison)
    shown, ours = cells(found), ours_in(found)
    fastest = found["both"].drop(index=[ours, f"{ours}-exact"], errors="ignore").idxmin()
    entries = f"{comparison['input']['entries']:.0f}, {comparison['dtype']}"
    words = {
        "device": comparison["device"],
        "fastest": f"{shown.at[fastest, 'ratio']}, {found.at[fastest, 'peer']}",
        "memories": f"{shown.at[ours, 'extra'].removesuffix(' MiB')} : {shown.at[fastest, 'extra']}",
        "size": size_of(comparison),
        "saturated": f"{comparison['saturated_pairs']} of {comparison['pairs']} pairs",
        "entries": "random weights" if comparison["input"]["kind"] == "untrained" else entries,
    }
    peers = {**shown.T.to_dict(), "ours": shown.loc[ours]}
    words |= {f"{name} {column}": cell for name, row in peers.items() for column, cell in row.items()}
    return defaultdict(lambda: "–", words)


def cells(found: pd.DataFrame) -> pd.DataFrame:
    """A `frame`, as terminal and pages show it."""
    formats: dict[str, Callable[[Any], str]] = {
        "forward": duration,
        "backward": duration,
        "both": duration,
        "ratio": lambda value: f"{number(value)}×",
        "kept": lambda share: f"{100 * share:.3g} %",
        "extra": "{:,.0f} MiB".format,
        "dhidden": scientific,
        "dweight": scientific,
    }
    shown = {name: found[name].map(shape, na_action="ignore") for name, shape in formats.items()}
    text = found.assign(**shown).astype(object).fillna("–")
    return text.assign(extra=text["extra"].mask(found["is_limit"].eq(True), "≤ " + text["extra"]))


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
        "only. The model is tiny, random and sharpened: a 7B model gains less."
    )
    no_gpu = (
        "**It has not been timed on a GPU yet**: [docs/performance.md](docs/performance.md#on-a-gpu) has "
        "estimates from the compiled code."
    )
    tests = [(gpu["device"], gpu.get("gpu_tests", {"passed": 0, "failed": {}})) for gpu in results.gpus]
    said = [f"{name}: {of['passed']} GPU tests passed, {len(of['failed'])} failed." for name, of in tests]
    return "\n\n".join([step, *(said or [no_gpu])])


def peers_table(results: Results) -> str:
    """All peers, a column for each comparison in bf16."""
    columns = {}
    for comparison in [each for each in results.of_sizes() if each["dtype"] == "bf16"][:5]:
        found = frame(comparison)
        shown = cells(found)
        said = shown["ratio"].where(found["ratio"] != 1, shown["both"])
        title = f"{comparison['device']}, {size_of(comparison)}, kept {shown.at[ours_in(found), 'kept']}"
        columns[title] = (said + ", " + shown["extra"] + ", " + shown["dhidden"]).set_axis(shown["peer"])
    table = pd.concat(columns, axis=1).fillna("–").rename_axis("method").reset_index()
    return f"{markdown(table)}\n\n{results.sources(*EPYC, LLAMA, SMALL)}"


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
    """Steps at synthetic lengths, with a model whose layers dominate."""
    names = [name for name in results.files if name.startswith(LENGTHS)]
    blocks = [block for found in results.comparisons(*names) for block in lengths_table(found)]
    return "\n\n".join([*blocks, results.sources(*names)])


def lengths_table(found: Json) -> list[str]:
    rows, setup, completions = found["rows"], found["setup"], found["completion_tokens"]
    prompt, completion = (n / 2 / setup["pairs"] for n in (found["tokens"] - completions, completions))
    packed, shared = map(number, found["llama_8b_over_padded"].values())
    ms = {name: row["ms"]["median"] for name, row in rows.items()}
    gain = number(ms["FocalPOTrainer"] / ms["FocalPOTrainer, shared"])
    counted = {name: rows["TRL"]["operations"] / row["operations"] for name, row in rows.items()}
    table = {
        "trainer": [name.replace("patch()", "`patch()`") for name in rows],
        "positions": [f"{row['positions']:,}" for row in rows.values()],
        "step": list(map(duration, ms.values())),
        "tokens/s": [number(row["tokens_per_s"]) for row in rows.values()],
        "over TRL (counted)": [f"{number(ms['TRL'] / ms[name])}× ({number(counted[name])}×)" for name in ms],
        "memory": [f"{row['extra_mib']:,.0f} MiB" for row in rows.values()],
    }
    return [
        f"**{setup['pairs']} pairs, prompts of {prompt:.0f} and completions of {completion:.0f} tokens on "
        f"average, longest sequence {found['longest']}; {setup['layers']} layers of {setup['hidden']}, "
        f"V = {setup['vocab']}, {setup['dtype']}:**",
        markdown(table),
        f"Shared prompts over the padded `FocalPOTrainer`: {gain}×. Operations of Llama-3-8B at these "
        f"lengths, where attention skips masked scores: padded has {packed}× as many as packed, {shared}× as "
        "many as shared.",
    ]


NODE = "--gpus 8 --gpu-memory 40GB --engine zero3"
MACHINES = {  # by the end of the recipe's name
    "24gb": "--gpus 1 --gpu-memory 24GB --tflops 165",  # RTX 4090
    "80gb": "--gpus 1 --gpu-memory 80GB",
}


def plans() -> str:
    """The row of every recipe by `focalkern plan`: ten seconds."""
    from focalkern.cli.main import main as focalkern

    header = "| recipe | machine | GiB per GPU | pairs that fit | host, GiB | hours |"
    with contextlib.redirect_stdout(io.StringIO()) as rows:
        for recipe in sorted((ROOT / "examples/recipes").glob("*.yaml")):
            machine = MACHINES.get(recipe.stem.rpartition("-")[2], NODE)
            focalkern(["plan", str(recipe), "--row", *machine.split()])
    return f"{header}\n|---|---|---:|---:|---:|---:|\n{rows.getvalue().strip()}"


PAGES: dict[str, dict[str, Callable[[Results], str]]] = {
    "README.md": {"summary": summary, "results": lambda results: by_input("results", results.of_sizes()[:4])},
    "docs/performance.md": {"table": peers_table},
    "docs/training.md": {"plan": lambda results: plans()},
    "docs/trl.md": {"step": step_table, "lengths": lengths_tables},
    "docs/certified-backward.md": {
        "sharpness": partial(certified, "sharpness", SHARPNESS),
        "saturated": partial(certified, "saturated", SATURATED),
    },
}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    from PIL import Image

    parser = parser_of(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if out of date")
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
    drawn = Image.open(root / FIGURE).info.get("data") if (root / FIGURE).exists() else None
    if drawn != data_hash(results.files[SHARPNESS]):
        stale.append(str(FIGURE))
        if not check:
            draw(results.files[SHARPNESS], "sharpness", root / FIGURE)
    for what in stale:
        print(f"{what} is out of date: make report" if check else f"{what}: written")
    return 1 if check and stale else 0


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a part."""
    return f"<!-- measured: begin {name} (make report) -->", f"<!-- measured: end {name} -->"


def with_part(text: str, name: str, content: str, page: str) -> str:
    """The page with this content between the markers of the part; paragraphs are wrapped."""
    begin, end = markers(name)
    fill = textwrap.TextWrapper(115, break_on_hyphens=False, break_long_words=False).fill
    blocks = [block if block.startswith("|") else fill(block) for block in content.split("\n\n")]
    part = "\n\n".join([begin, *blocks, end])
    updated, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: part, text, flags=re.S)
    if count != 1:
        raise SystemExit(f"{page}: needs one {begin} and after it one {end}")
    return updated


if __name__ == "__main__":
    sys.exit(main())
