"""Every peer of the benchmark computes the losses it has; a peer that cannot run is skipped by name."""

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

from benchmarks import throughput
from benchmarks.check import Gate
from benchmarks.inputs import Batch, LogitTransform, Recipe, Sequences, Shape
from benchmarks.objectives import BETA, OBJECTIVES
from benchmarks.peers import Unavailable, all_peers, compiler_problem

RUN = ["--device", "cpu", "--hidden", "48", "--vocab", "1000", "--tokens", "64", "--pairs", "2"]
RUN += ["--threads", "1", "--dtype", "fp32", "--repeats", "1", "--no-memory"]
PACKAGES = {"trl": "trl", "liger": "liger_kernel", "cce-compile": "cut_cross_entropy"}
COMPILED = ("compile", "liger", "cce-compile")

pytestmark = pytest.mark.usefixtures("same_threads_afterwards")


def require(name: str) -> None:
    pytest.importorskip(PACKAGES.get(name, "torch"), reason="the extra `bench` has it")
    if name in COMPILED and (problem := compiler_problem("cpu")):
        pytest.skip(f"torch.compile does not work here: {problem}")


def tiny_batch(transform: LogitTransform, bias: bool) -> Batch:
    """Sequences of 3 to 30 tokens."""
    shape = Shape("tiny", 24, 300, transform.softcap, transform.logit_scale)
    batch, _ = Recipe(shape, 48, 2, torch.float32, "cpu", scale=4.0).batch()
    batch.sequences = Sequences(torch.tensor([0, 10, 13, 18, 48]))
    if bias:
        batch.bias = torch.randn(300, generator=torch.Generator().manual_seed(0))
    return batch.requires_grad_(frozen_head=False)


def run(arguments: list[str], path: Path) -> dict:
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
def test_objectives_are_those_of_the_papers(name):
    logps = torch.tensor(LOGPS, dtype=torch.float64)
    losses = OBJECTIVES[name].losses(logps, torch.tensor(REF_LOGPS), torch.tensor(LENGTHS))
    assert losses.dtype == torch.float64 and losses.tolist() == pytest.approx(naive_losses(name), rel=1e-6)


def test_pairs_that_differ_by_rounding_alone_have_no_adaptive_margin():
    logps, lengths = torch.tensor(LOGPS), torch.tensor(LENGTHS)
    same_reference = logps * (1 + torch.tensor([1e-7, 0.0, 0.0, 1e-7]))
    mean = logps / lengths
    expected = [-log_p(10.0 * (mean[i] - mean[i + 2]).item() - 4.0) for i in range(2)]
    losses = OBJECTIVES["alpha-dpo"].losses(logps, same_reference, lengths)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


CAPPED, SCALED = LogitTransform(softcap=5.0), LogitTransform(softcap=5.0, logit_scale=0.5)


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("torch", SCALED), ("torch-exact", SCALED), ("eager", SCALED), ("trl", SCALED), ("compile", CAPPED),
        ("cce-compile", CAPPED), ("liger", LogitTransform()), ("torch-lce", LogitTransform()),
    ],
)  # fmt: skip
def test_peers_compute_every_loss_they_have(name, transform):
    require(name)
    batch = tiny_batch(transform, bias=name != "cce-compile")
    loss_fn = all_peers()[name].load("cpu")
    for batch.objective in OBJECTIVES.values():
        if name == "liger" and batch.objective.name in ("focalpo", "alpha-dpo"):
            with pytest.raises(Unavailable, match=f"Liger has no {batch.objective.name}"):
                loss_fn(batch)
            continue
        gate = Gate(batch)
        for _ in range(2):  # alpha-DPO's statistics are those of the batch, not of the batches so far
            loss = loss_fn(batch).loss
            gradients = list(torch.autograd.grad(loss, batch.differentiated()))
            assert gate.verdict(gate.errors(loss.detach(), gradients)) == "", batch.objective.name


@pytest.mark.parametrize(
    ("name", "transform", "bias", "reason"),
    [
        ("liger", CAPPED, False, "no softcap"),
        ("torch-lce", CAPPED, False, "no softcap"),
        ("torch-lce-rows", LogitTransform(logit_scale=0.5), False, "no logit scale"),
        ("cce-compile", LogitTransform(logit_scale=0.5), False, "no logit scale"),
        ("cce-compile", LogitTransform(), True, "no bias"),
    ],
)
def test_peer_that_lacks_what_the_head_needs_says_so(name, transform, bias, reason):
    require(name)
    with pytest.raises(Unavailable, match=reason):
        all_peers()[name].load("cpu")(tiny_batch(transform, bias))


@pytest.mark.parametrize(
    ("name", "module", "reason"),
    [
        ("trl", "trl", "cannot be imported"),
        ("liger", "liger_kernel", "cannot be imported"),
        ("cce-compile", "cut_cross_entropy", "cannot be imported|torch.compile does not work"),
        ("cce", "", "need a CUDA device"),
        ("quack-fused", "", "for Hopper GPUs"),
    ],
)
def test_peers_that_cannot_run_are_skipped_by_name(name, module, reason, tmp_path, monkeypatch, capsys):
    for known in [known for known in sys.modules if known.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    (row,) = run([*RUN, "--only", name], tmp_path / "result.json")["comparisons"][0]["rows"]
    assert row["status"] == "skipped" and any(words in row["note"] for words in reason.split("|"))
    assert f"{row['peer']}: skipped" in capsys.readouterr().out


def test_without_a_compiler_compiled_peers_are_skipped_and_liger_runs_uncompiled(tmp_path):
    path = tmp_path / "result.json"
    arguments = [*RUN, "--only", "compile", "liger", "--json", str(path)]
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, throughput.__file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr.decode()
    compiled, liger = json.loads(path.read_text())["comparisons"][0]["rows"]
    assert compiled["status"] == "skipped" and "torch.compile does not work here" in compiled["note"]
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    assert liger["status"] == ("ok" if has_liger else "skipped")
    assert not has_liger or "without torch.compile" in liger["note"]
