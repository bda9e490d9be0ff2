"""What a training shows of itself: `progress.png`, and the model card's method."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

from matplotlib.image import imread
from trl_tiny import focal_trainer, llama, near, seeded

from focalkern.trl import FocalPOConfig, ProgressPlot, progress
from focalkern.trl.card import methods_of

ALPHA_DPO = {"reference_free": True, "length_normalize": True, "beta": 2.0, "alpha": 0.5, "gamma": 0.0}
EVERY = ["Loss", "Rewards", "Ranking"]


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ({"gamma_schedule": "cosine"}, [*EVERY, "γ(t)", "Focal weight"]),
        ({"gamma": 0.05}, [*EVERY, "Focal weight"]),  # γ does not move
        (ALPHA_DPO, [*EVERY, "Adaptive margin", "Focal weight"]),
        ({"loss_type": ["sigmoid"]}, EVERY),
    ],
    ids=["dynamic", "focalpo", "alpha-dpo", "TRL's DPO"],
)
def test_a_panel_for_all_that_is_logged_and_for_nothing_else(options, titles, tmp_path):
    model = seeded(llama)
    given = {"callbacks": [ProgressPlot()], "ref_model": near(model)}
    trainer = focal_trainer(tmp_path / "out", model, options=given, **options)
    trainer.train()
    panels = progress.panels(trainer.state.log_history)
    assert [title for title, _, _ in panels] == titles
    image = imread(tmp_path / "out" / progress.NAME)
    assert image.shape[0] > 350
    assert image.shape[1] == round(3 * 4.2 * 120)
    assert image[..., :3].std() > 0.05  # something is drawn
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == [progress.NAME]


def test_curves_are_the_logs_and_held_out_pairs_are_circles(tmp_path):
    from matplotlib.figure import Figure

    history = [{"step": s, "rewards/accuracies": s / 10, "rewards/margins": -s} for s in (1, 2, 3)]
    history.insert(2, {"step": 2, "eval_rewards/accuracies": 0.25})
    ((title, names, apart),) = progress.panels(history)
    figure = Figure()
    progress._panel(figure.subplots(), title, names, apart, history)
    left, right = figure.axes
    (line, circles), (margin, _) = left.lines, right.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 3], [0.1, 0.2, 0.3])
    assert (list(circles.get_xdata()), list(circles.get_ydata())) == ([2], [0.25])
    assert circles.get_marker() == "o"
    assert list(margin.get_ydata()) == [-1, -2, -3]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["accuracy", "margin"]


def test_kept_share_and_flipped_pairs_are_drawn_where_they_say_something():
    def titles(*values):
        history = [{"step": i, "focal/kept_share": x, "focal/flipped": x} for i, x in enumerate(values)]
        return {title: list(names) for title, names, _ in progress.panels(history)}

    assert titles(1.0, 1.0) == {}
    assert titles(1.0, 0.4) == {
        "Focal weight": ["focal/flipped"],
        "Kept share of the head's backward": ["focal/kept_share"],
    }


def test_it_draws_at_every_logging_step_and_at_the_end_on_the_main_process_alone(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(progress, "draw", lambda history, path: drawn.append((len(history), path)))
    given = {"callbacks": [ProgressPlot()]}
    trainer = focal_trainer(tmp_path, seeded(llama), options=given, reference_free=True)
    trainer.train()
    path = tmp_path / progress.NAME
    assert drawn == [(1, path), (2, path), (3, path), (4, path)]  # the last with the time it took
    trainer.state.is_world_process_zero = False
    trainer.log({"loss": 1.0})
    assert len(drawn) == 4


def test_nothing_is_drawn_of_nothing(tmp_path):
    progress.draw([{"step": 1, "train_runtime": 2.0}], tmp_path / progress.NAME)
    assert not [*tmp_path.iterdir()]


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install .matplotlib"):
        ProgressPlot()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["FocalPO"]),
        ({"gamma": 0.0}, ["DPO"]),
        ({"gamma_schedule": "linear"}, ["DynamicFocalPO"]),
        ({"gamma": 0.0, "reference_free": True, "length_normalize": True}, ["SimPO"]),
        (ALPHA_DPO, ["α-DPO"]),
        ({**ALPHA_DPO, "gamma": 0.1}, ["FocalPO", "α-DPO"]),
        ({"loss_type": ["ipo"]}, ["ipo"]),
        ({"loss_type": ["focalpo", "sft"], "gamma": 0.0}, ["DPO", "sft"]),
    ],
)
def test_the_card_names_the_methods_of_a_loss(options, names, tmp_path):
    assert methods_of(FocalPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)) == names
