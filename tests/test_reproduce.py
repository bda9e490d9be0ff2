"""`examples/reproduce.py` end to end on a small problem, and what it reports against its definition."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from test_quickstart import RECORDS
from tiny import write_jsonl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import paper_figures
import reproduce

from focalkern import CosineGamma, ExponentialGamma, LinearGamma

FIGURES = [
    "focalpo-figure-2",
    "focalpo-figure-3",
    "focalpo-figure-4",
    "dynamicfocalpo-figure-1",
    "dynamicfocalpo-figure-2",
    "lemma-1",
    "gradient-contribution",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reproduce")
    data = write_jsonl(out / "pairs.jsonl", RECORDS)
    options = ["--seeds", "2", "--steps", "10", "--batch-size", "8"]
    reproduce.main(["--data", str(data), "--out", str(out), *options])
    return out


def test_it_writes_every_figure_and_a_record_of_all_runs(result):
    for name in FIGURES:
        assert (result / f"{name}.png").stat().st_size > 1000, name
    record = json.loads((result / "reproduction.json").read_text(encoding="utf-8"))
    assert {(run["method"], run["seed"]) for run in record["runs"]} == {
        (method, seed) for method in reproduce.methods(0.5, 0.05) for seed in (0, 1)
    }
    for run in record["runs"]:
        assert len(run["contribution"]) == 10
        assert all(0 <= share <= 1 for share in run["contribution"][1:])
        assert 0 <= run["own_accuracy"] <= 1
        assert run["chosen_kl"] > 0  # it was trained
        assert run["rejected_kl"] > 0
        assert run["R"]["late"] == pytest.approx(sum(run["contribution"][8:]) / 2, abs=1e-4)
        # The gradient of the hidden states stands for that of the parameters.
        assert abs(run["final_contribution"] - run["final_exact_contribution"]) <= 0.2
    # Policy and reference are equal before training: DPO's rewards are level.
    assert record["own_accuracy_before"]["DPO"] == 0.5


def test_methods_are_those_of_the_papers():
    losses = {name: make(100) for name, make in reproduce.methods(0.5, 0.05).items()}
    assert {name: loss.gamma for name, loss in losses.items()} == {
        "DPO": 0.0,
        "FocalPO": 0.05,
        "Dynamic, linear": LinearGamma(100),
        "Dynamic, exponential": ExponentialGamma(100),
        "Dynamic, cosine": CosineGamma(100),
        "SimPO": 0.0,
        "α-DPO": 0.0,
        "focal × SimPO": 0.05,
        "focal × α-DPO": 0.05,
    }
    for name, loss in losses.items():
        assert loss.reference_free == loss.length_normalize == ("SimPO" in name or "α-DPO" in name)
        assert (loss.alpha > 0) == ("α-DPO" in name)


def test_the_claims_are_those_of_the_functions(tmp_path):
    claims = paper_figures.draw_all(tmp_path)
    assert 0 <= claims["lemma_1_least_distance"] <= 1e-3
    # dw/du = 0 of w = p^γ (1−p) (1 + γ log p), by hand: γ(1−p)(2 + γ log p) = p (1 + γ log p).
    gamma, p = 0.05, claims["focalpo_figure_3_peak_at_p"]
    log_p = math.log(p)
    assert gamma * (1 - p) * (2 + gamma * log_p) == pytest.approx(p * (1 + gamma * log_p), rel=0.02)
    # ρ = p^γ (1 + γ log p) is what FocalPO leaves of DPO's weight (Lemma 2).
    for name, gamma, share in (("focalpo", 0.05, 0.624), ("dynamic", 0.1, 0.783)):
        p = claims[f"table_8_{name}_needs_p"]
        odds = (0.442 / 0.558) / (share / (1 - share))
        assert p**gamma * (1 + gamma * math.log(p)) == pytest.approx(odds, rel=0.01)


def test_figures_show_the_functions_they_name(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.update({path.stem: figure}))
    paper_figures.draw_all(tmp_path)
    lines = {line.get_label(): line.get_xydata() for line in drawn["focalpo-figure-4"].axes[0].get_lines()}
    u = torch.from_numpy(lines["DPO"][:, 0])
    p = torch.sigmoid(u)
    expected = {
        "DPO": 1 - p,
        "p^γ, γ = 0.05: correct": p**0.05 * (1 - p) * (1 + 0.05 * p.log()),
        "(1−p)^γ, γ = 1: incorrect": (1 - p) * ((1 - p) - p * p.log()),
    }
    for name, values in expected.items():
        torch.testing.assert_close(torch.from_numpy(lines[name][:, 1]), values, rtol=1e-9, atol=1e-12)
    schedules = drawn["dynamicfocalpo-figure-1"].axes[0].get_lines()
    assert [line.get_label() for line in schedules] == ["linear", "exponential", "cosine"]
    assert all(line.get_ydata()[0] == pytest.approx(0.1) for line in schedules)


def test_a_stage_is_a_share_of_the_steps_without_the_first():
    run = reproduce.Run("DPO", 0, contribution=[9.0, *range(1, 10)])
    assert run.stage("early") == 1.0
    assert run.stage("middle") == 4.5
    assert run.stage("late") == 8.5


def test_bad_data_ends_with_a_message(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.jsonl"):
        reproduce.main(["--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)])
