"""Every peer of the benchmark computes the losses it says it does; what cannot run is skipped by name."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import check, throughput
from benchmarks.inputs import Batch, LogitTransform, Recipe, Sequences, Shape
from benchmarks.objectives import BETA, OBJECTIVES
from benchmarks.peers import Unavailable, all_peers, compiler_problem

SIZE = ["--device", "cpu", "--hidden", "48", "--vocab", "1000", "--tokens", "64", "--pairs", "2"]
RUN = [*SIZE, "--threads", "1", "--dtype", "fp32", "--repeats", "1", "--no-memory"]
PACKAGES = {"trl": "trl", "liger": "liger_kernel", "cce-compile": "cut_cross_entropy"}
COMPILED = ("compile", "liger", "cce-compile")


pytestmark = pytest.mark.usefixtures("same_threads_afterwards")


def tiny_batch(softcap: float | None, bias: bool) -> Batch:
    """Sequences of 3 to 30 tokens."""
    batch, _ = Recipe(Shape("tiny", 24, 300, softcap), 48, 2, torch.float32, "cpu", scale=4.0).batch()
    batch.sequences = Sequences(torch.tensor([0, 10, 13, 18, 48]))
    if bias:
        batch.bias = torch.randn(300, generator=torch.Generator().manual_seed(0))
    return batch.requires_grad_(frozen_head=False)


def run(arguments: list[str], tmp_path: Path) -> dict:
    path = tmp_path / "result.json"
    assert throughput.main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def log_p(u: float) -> float:
    return -math.log1p(math.exp(-u))


LOGPS, REF_LOGPS, LENGTHS = [-10.0, -12.0, -20.0, -9.0], [-11.0, -12.5, -18.0, -10.0], [5, 4, 8, 3]


def naive_losses(name: str) -> list[float]:
    """The papers' formulas on Python's floats, for two pairs."""
    pairs = [(0, 2), (1, 3)]
    if name in ("dpo", "focalpo"):
        us = [BETA * (LOGPS[w] - REF_LOGPS[w] - (LOGPS[j] - REF_LOGPS[j])) for w, j in pairs]
        gamma = 0.05 if name == "focalpo" else 0.0
        return [-math.exp(gamma * log_p(u)) * log_p(u) for u in us]
    mean = [value / length for value, length in zip(LOGPS, LENGTHS, strict=True)]
    ref = [value / length for value, length in zip(REF_LOGPS, LENGTHS, strict=True)]
    if name == "simpo":
        return [-log_p(2.0 * (mean[w] - mean[j]) - 1.0) for w, j in pairs]
    margins = [10.0 * (mean[w] - ref[w] - (mean[j] - ref[j])) for w, j in pairs]
    center, deviation = statistics.mean(margins), statistics.stdev(margins)
    return [
        -log_p(10.0 * (mean[w] - mean[j]) - 4.0 - 0.5 * (margin - center) / deviation)
        for (w, j), margin in zip(pairs, margins, strict=True)
    ]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_objectives_are_those_of_the_papers(name, dtype):
    losses = OBJECTIVES[name].losses(
        torch.tensor(LOGPS, dtype=dtype), torch.tensor(REF_LOGPS), torch.tensor(LENGTHS)
    )
    assert losses.dtype == dtype
    assert losses.tolist() == pytest.approx(naive_losses(name), rel=1e-6)


def test_pairs_that_differ_by_rounding_alone_have_no_adaptive_margin():
    logps, lengths = torch.tensor(LOGPS), torch.tensor(LENGTHS)
    alpha_dpo = OBJECTIVES["alpha-dpo"]
    same_reference = logps * (1 + torch.tensor([1e-7, 0.0, 0.0, 1e-7]))
    mean = logps / lengths
    expected = [-log_p(10.0 * (mean[i] - mean[i + 2]).item() - 4.0) for i in range(2)]
    assert alpha_dpo.losses(logps, same_reference, lengths).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["torch", "torch-exact", "eager", "compile", "trl", "liger", "cce-compile", "torch-lce"]
)
def test_peers_compute_every_loss_they_have(name):
    pytest.importorskip(
        PACKAGES.get(name, "torch"), reason="the comparison needs it; the extra `bench` has it"
    )
    if name in COMPILED and (problem := compiler_problem("cpu")):
        pytest.skip(f"torch.compile does not work here: {problem}")
    softcap = 5.0 if name in ("compile", "cce-compile") else None
    batch = tiny_batch(softcap, bias=name != "cce-compile")
    sample = check.choose_sample(batch, seed=0)
    loss_fn = all_peers()[name].load("cpu")
    without = ("focalpo", "alpha-dpo") if name == "liger" else ()
    for batch.objective in OBJECTIVES.values():
        if batch.objective.name in without:
            with pytest.raises(Unavailable, match=f"Liger has no {batch.objective.name}"):
                loss_fn(batch)
            continue
        truth, plain = (check.sampled_step(batch, sample, dtype) for dtype in (torch.float64, torch.float32))
        for _ in range(2):  # alpha-DPO's statistics are those of the batch, not of the batches so far
            loss = loss_fn(batch).loss
            gradients = list(torch.autograd.grad(loss, batch.differentiated()))
            found = check.errors_of(loss.detach(), gradients, sample, truth)
            bound = check.error_bound(check.plain_errors(truth, plain), torch.float32)
            assert found.exceeded(bound) == [], batch.objective.name


@pytest.mark.parametrize(
    ("name", "transform", "bias", "reason"),
    [
        ("liger", LogitTransform(softcap=5.0), False, "no softcap"),
        ("torch-lce", LogitTransform(softcap=5.0), False, "no softcap"),
        ("torch-lce-rows", LogitTransform(logit_scale=0.5), False, "no logit scale"),
        ("cce-compile", LogitTransform(logit_scale=0.5), False, "no logit scale"),
        ("cce-compile", LogitTransform(), True, "no bias"),
    ],
)
def test_peer_that_lacks_what_the_head_needs_says_so(name, transform, bias, reason):
    pytest.importorskip(
        PACKAGES.get(name, "torch"), reason="the comparison needs it; the extra `bench` has it"
    )
    if name in COMPILED and (problem := compiler_problem("cpu")):
        pytest.skip(f"torch.compile does not work here: {problem}")
    batch = tiny_batch(None, bias)
    batch.transform = transform
    with pytest.raises(Unavailable, match=reason):
        all_peers()[name].load("cpu")(batch)


def test_each_loss_is_a_comparison_and_what_a_peer_lacks_is_skipped_by_name(tmp_path, capsys):
    arguments = ["--loss", "focalpo", "alpha-dpo", "--only", "torch", "eager", "liger", "cce", "quack-fused"]
    result = run([*RUN, *arguments], tmp_path)
    assert [comparison["loss"] for comparison in result["comparisons"]] == ["focalpo", "alpha-dpo"]
    notes = {"cce": "need a CUDA device", "quack-fused": "for Hopper GPUs"}
    for comparison in result["comparisons"]:
        rows = {row["id"]: row for row in comparison["rows"]}
        assert [rows[name]["status"] for name in ("torch", "eager")] == ["ok", "ok"]
        has_liger = importlib.util.find_spec("liger_kernel") is not None
        notes["liger"] = f"Liger has no {comparison['loss']}" if has_liger else "cannot be imported"
        for name, note in notes.items():
            assert rows[name]["status"] == "skipped" and note in rows[name]["note"]
    assert "alpha-dpo, gradients of hidden and weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "module"), [("liger", "liger_kernel"), ("cce-compile", "cut_cross_entropy")]
)
def test_peers_that_are_not_installed_are_skipped(name, module, tmp_path, monkeypatch):
    for known in [known for known in sys.modules if known.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    (row,) = run([*RUN, "--only", name], tmp_path)["comparisons"][0]["rows"]
    assert row["status"] == "skipped"
    assert "cannot be imported" in row["note"] or "torch.compile does not work" in row["note"]


def test_without_a_compiler_compiled_peers_are_skipped_and_liger_runs_uncompiled(tmp_path):
    path = tmp_path / "result.json"
    arguments = [*RUN, "--only", "compile", "liger", "--json", str(path)]
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    script = Path(throughput.__file__)
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr.decode()
    compiled, liger = json.loads(path.read_text())["comparisons"][0]["rows"]
    assert compiled["status"] == "skipped" and "torch.compile does not work here" in compiled["note"]
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    assert liger["status"] == ("ok" if has_liger else "skipped")
    assert not has_liger or "without torch.compile" in liger["note"]
