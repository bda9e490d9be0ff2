"""`ProgressPlot`: draws what a training has logged so far into `progress.png`, at every logging step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

History = list[dict[str, Any]]

NAME = "progress.png"
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#6e6e6e"
# A panel: its title, what is logged with its name, whether the second has an axis of its own at the right.
_PANELS: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Loss", {"loss": ""}, False),
    ("Rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, False),
    ("Ranking", {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}, True),
    ("γ(t)", {"focal/gamma": ""}, False),
    ("Adaptive margin", {"alpha/mean": "μ", "alpha/std": "σ"}, True),
    ("Focal weight", {"focal/weight": "mean", "focal/flipped": "flipped pairs"}, False),
    ("Kept share of the head's backward", {"focal/kept_share": ""}, False),
)
_SAY_NOTHING_WHEN_CONSTANT = ("focal/gamma", "focal/kept_share", "focal/flipped")


class ProgressPlot(TrainerCallback):
    """Draws `progress.png` into the output folder at every logging step, on the main process.

        FocalPOTrainer(..., callbacks=[ProgressPlot()])

    It has a panel for each kind of number that is logged. Lines are of training, circles of held-out pairs.

    Raises:
        ImportError: without matplotlib.
    """

    def __init__(self) -> None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ImportError('ProgressPlot needs matplotlib: pip install "matplotlib>=3.9"') from error

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if "loss" in (logs or {}):  # what an evaluation logs is drawn with the next step
            self.on_train_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and args.output_dir:
            draw(state.log_history, Path(args.output_dir) / NAME)


def panels(history: History) -> list[tuple[str, dict[str, str], bool]]:
    """Those of `_PANELS` for which something is logged, each with what is."""
    found = []
    for title, names, apart in _PANELS:
        values = {
            name: {y for key in (name, f"eval_{name}") for _, y in _points(history, key)} for name in names
        }
        logged = {
            name: label
            for name, label in names.items()
            if len(values[name]) > (1 if name in _SAY_NOTHING_WHEN_CONSTANT else 0)
        }
        if logged:
            found.append((title, logged, apart))
    return found


def draw(history: History, path: Path) -> None:
    """Draw what a trainer's `log_history` holds; nothing where it holds none of it."""
    from matplotlib.figure import Figure

    drawn = panels(history)
    if not drawn:
        return
    columns = min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    width, height = 4.2 * columns, 2.9 * rows + 0.3
    figure = Figure(figsize=(width, height), dpi=120)
    # In inches: the layout engine would take longer than all the rest.
    figure.subplots_adjust(
        left=0.55 / width,
        right=1 - 0.55 / width,
        bottom=0.4 / height,
        top=1 - 0.7 / height,
        wspace=0.38,
        hspace=0.36,
    )
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes[len(drawn) :]:
        axes.remove()
    for axes, (title, names, apart) in zip(all_axes, drawn, strict=False):
        _panel(axes, title, names, apart, history)
    step = max(entry.get("step", 0) for entry in history)
    heading: dict[str, Any] = {"y": 1 - 0.12 / height, "va": "top", "color": _GREY, "fontsize": 9}
    figure.text(0.55 / width, s=f"{path.parent.name}, step {step}", **heading)
    if any(name.startswith("eval_") for entry in history for name in entry):
        figure.text(1 - 0.55 / width, s="line: training   ○ held-out pairs", ha="right", **heading)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp.png")
    figure.savefig(unfinished)
    os.replace(unfinished, path)  # a viewer never meets half a picture


def _panel(axes: Any, title: str, names: dict[str, str], apart: bool, history: History) -> None:
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
    axes.grid(color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    lines = []
    for i, ((name, label), colour) in enumerate(zip(names.items(), (_BLUE, _ORANGE), strict=False)):
        at_right = apart and i == 1
        side = axes.twinx() if at_right else axes
        lines += side.plot(*_columns(history, name), color=colour, linewidth=1.6, label=label)
        side.plot(
            *_columns(history, f"eval_{name}"), "o", color=colour, markersize=4.5, markerfacecolor="white"
        )
        side.locator_params(nbins=6)
        side.tick_params(labelsize=8, length=0, colors=_GREY)
        side.tick_params(axis="y", colors=colour if apart else _GREY)
        for edge in side.spines.values():
            edge.set_visible(False)
    if any(names.values()):
        axes.legend(
            handles=lines,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=2,
            fontsize=8,
            frameon=False,
            borderaxespad=0.2,
            handlelength=1.2,
            columnspacing=1.0,
        )


def _points(history: History, name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in history if name in entry]


def _columns(history: History, name: str) -> tuple[list[int], list[float]]:
    points = _points(history, name)
    return [step for step, _ in points], [value for _, value in points]
