"""Plots of what `throughput.py` measured, from its report: the JSON, as a dict. Needs matplotlib.

`throughput.py --plot` draws a report that it just made; `publish.py` draws those of the result files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MIB = 2**20
TOKENS_FILE = "time-memory-against-tokens.png"
SHARPNESS_FILE = "speed-against-sharpness.png"
OURS = "focalkern"  # drawn thicker
MARKERS = "os^DvPX*<>hdp8"  # not every reader tells the colours apart

Comparison = dict[str, Any]
Setting = tuple[Any, ...]


def write(report: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Draw what the report has several values of, into `folder`; the paths of what was drawn."""
    drawn = (
        (plot_tokens, TOKENS_FILE, tokens_of),
        (plot_sharpness, SHARPNESS_FILE, entries_of),
    )
    for plot, name, axis in drawn:
        if any(len(points) > 1 for points in curves_over(axis, report).values()):
            folder.mkdir(parents=True, exist_ok=True)
            plot(report, folder / name)
            yield folder / name


def plot_tokens(report: dict[str, Any], path: Path) -> None:
    """Time of forward and backward over the number of tokens, and extra memory where it was measured.

    A row of panels for each setting: shape, dtype, loss, input, ...
    """
    settings = curves_over(tokens_of, report)
    rows = [row for comparison in report["comparisons"] for row in comparison["rows"]]
    quantities = [("forward and backward, ms", both_ms), ("extra memory, MiB", extra_mib)]
    quantities = [(label, value_of) for label, value_of in quantities if any(map(value_of, rows))]
    figure, panels = new_figure(report, len(settings), max(1, len(quantities)))
    for (setting, comparisons), row_of_panels in zip(settings.items(), panels, strict=True):
        for panel, (label, value_of) in zip(row_of_panels, quantities, strict=False):
            draw(panel, comparisons, tokens_of, value_of)
            panel.set(title=title_of(setting), xlabel="tokens", ylabel=label)
            panel.set_xscale("log", base=2)
            panel.set_xticks([tokens_of(comparison) for comparison in comparisons])
            panel.set_yscale("log")
            for scale in (panel.xaxis, panel.yaxis):
                plain_numbers(scale)
    save(figure, panels, path)


def plot_sharpness(report: dict[str, Any], path: Path) -> None:
    """Time of forward and backward over the sharpness of the softmax, and the share of the vocabulary blocks
    that the certified backward computed. A row of panels for each setting; random weights stand apart.
    """
    settings = curves_over(entries_of, report)
    figure, panels = new_figure(report, len(settings), 2)
    for (setting, comparisons), row_of_panels in zip(settings.items(), panels, strict=True):
        ordered = sorted(
            comparisons, key=lambda comparison: (is_untrained(comparison), entries_of(comparison))
        )
        places = {id(comparison): place for place, comparison in enumerate(ordered)}
        names = [
            "random\nweights" if is_untrained(comparison) else f"{entries_of(comparison):.0f}"
            for comparison in ordered
        ]
        quantities = ("forward and backward, ms", both_ms), ("kept share, %", kept_percent)
        for panel, (label, value_of) in zip(row_of_panels, quantities, strict=True):
            for group in ([x for x in ordered if is_untrained(x) == apart] for apart in (False, True)):
                draw(
                    panel, group, lambda comparison, places=places: places[id(comparison)], value_of, ordered
                )
            panel.set(title=title_of(setting), ylabel=label, xlabel="softmax entries above 2^-12 per token")
            panel.set_xticks(range(len(names)), names)
            panel.set_ylim(bottom=0)
    save(figure, panels, path)


def tokens_of(comparison: Comparison) -> float:
    return comparison["tokens"]


def entries_of(comparison: Comparison) -> float:
    return comparison["input"]["entries"]


def both_ms(row: dict[str, Any]) -> float | None:
    return row["both_ms"]["median"] if "both_ms" in row else None


def kept_percent(row: dict[str, Any]) -> float | None:
    return 100 * row["kept_share"] if "kept_share" in row else None


def is_untrained(comparison: Comparison) -> bool:
    return comparison["input"]["kind"] == "untrained"


def extra_mib(row: dict[str, Any]) -> float | None:
    # A peer may need nothing beyond its inputs and gradients, which a logarithmic axis cannot show.
    return max(row["extra_bytes"] / MIB, 0.1) if "extra_bytes" in row else None


def curves_over(
    axis: Callable[[Comparison], float], report: dict[str, Any]
) -> dict[Setting, list[Comparison]]:
    """The comparisons of a report by all that they are of but the axis, in the axis' order."""
    settings: dict[Setting, list[Comparison]] = {}
    for comparison in report["comparisons"]:
        shape = comparison["shape"]
        setting = (
            shape["hidden"],
            shape["vocab"],
            comparison["dtype"],
            comparison.get("loss", "dpo"),
            comparison["frozen_head"],
            comparison["saturated_pairs"],
            None if axis is tokens_of else comparison["tokens"],
            None if axis is entries_of else round_entries(comparison),
        )
        settings.setdefault(setting, []).append(comparison)
    return {setting: sorted(comparisons, key=axis) for setting, comparisons in settings.items()}


def round_entries(comparison: Comparison) -> Any:
    """What was asked for as `--sharpness`, as far as the report tells: the scale of the generated input."""
    about = comparison["input"]
    return about["kind"], about.get("scale")


def title_of(setting: Setting) -> str:
    hidden, vocab, dtype, loss, frozen_head, saturated, tokens, about = setting
    words = [f"{hidden} x {vocab}", dtype, loss]
    if tokens is not None:
        words.insert(0, f"{tokens} tokens")
    if about is not None:
        words.append("random weights" if about[1] is None else f"{about[0]} input")
    if frozen_head:
        words.append("frozen head")
    if saturated:
        words.append(f"{saturated} pairs saturated")
    return ", ".join(words)


def plain_numbers(scale: Any) -> None:
    """100 and 200 at the ticks of a logarithmic axis, not powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if scale.axis_name == "y":
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    scale.set_minor_formatter(NullFormatter())


def new_figure(report: dict[str, Any], rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    figure = Figure(figsize=(6.4 * columns, 4.2 * rows + 0.9), layout="constrained")
    commit = (report.get("commit") or "unknown")[:12]
    figure.suptitle(f"{report['device']}, {report['date'][:10]}, commit {commit}", fontsize="medium")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw(
    panel: Any,
    comparisons: list[Comparison],
    axis: Callable[[Comparison], float],
    value_of: Callable[[dict[str, Any]], float | None],
    peers_of: list[Comparison] | None = None,
) -> None:
    """One line for each peer that has values, in the colours that it has among those of `peers_of`."""
    named = peers_of or comparisons
    peers = dict.fromkeys(row["peer"] for comparison in named for row in comparison["rows"])
    for number, peer in enumerate(peers):  # numbers, colours and markers are the same in every panel
        points = [
            (axis(comparison), value)
            for comparison in comparisons
            for row in comparison["rows"]
            if row["peer"] == peer and (value := value_of(row)) is not None
        ]
        if points:
            width = 2.4 if peer.startswith(OURS) else 1.2
            style = {"color": colour(number), "marker": MARKERS[number % len(MARKERS)], "linewidth": width}
            panel.plot(*zip(*points, strict=True), label=peer, **style)
    panel.grid(alpha=0.3)


def colour(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"].colors[(2 * number) % 20 + number // 10]


def save(figure: Any, panels: Any, path: Path) -> None:
    # A peer may be missing in some panels: skipped, or out of memory.
    known = {}
    for panel in panels.flat:
        known |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=4, fontsize="small", frameon=False
    )
    figure.savefig(path, dpi=120)
