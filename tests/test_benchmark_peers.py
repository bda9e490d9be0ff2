"""Every peer of the benchmark computes the losses it has; a peer that cannot run is skipped by name."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
import torch
from test_benchmark import CAPPED, PLAIN, SCALED, step, tiny_batch
from test_benchmark_runs import RUN, run

from benchmarks import peers
from benchmarks.check import Gate
from benchmarks.inputs import OBJECTIVES, LogitTransform
from benchmarks.peers import PEERS, Unavailable, compiler_problem

PACKAGES = {"trl": "trl", "liger": "liger_kernel", "cce-compile": "cut_cross_entropy"}
SCALE = LogitTransform(logit_scale=0.5)


def require(name: str) -> None:
    pytest.importorskip(PACKAGES.get(name, "torch"), reason="the extra `bench` has it")
    if PEERS[name].compiled and (problem := compiler_problem("cpu")):
        pytest.skip(f"torch.compile does not work here: {problem}")


def test_pairs_that_differ_by_rounding_alone_have_no_adaptive_margin():
    logps, lengths = torch.tensor([-10.0, -12.0, -20.0, -9.0]), torch.tensor([5, 4, 8, 3])
    objective = OBJECTIVES["alpha-dpo"]
    losses = objective.losses(logps, logps * (1 + torch.tensor([1e-7, 0.0, 0.0, 1e-7])), lengths)
    without = dataclasses.replace(objective, alpha=0.0)
    torch.testing.assert_close(losses, without.losses(logps, logps, lengths))


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("torch", SCALED), ("torch-exact", SCALED), ("eager", SCALED), ("trl", SCALED), ("compile", CAPPED),
        ("cce-compile", CAPPED), ("liger", PLAIN), ("torch-lce", PLAIN),
    ],
)  # fmt: skip
def test_peers_compute_every_loss_they_have(name, transform):
    require(name)
    batches = [tiny_batch(transform, bias=name != "cce-compile") for _ in range(2)]
    batches[1].ref_logps *= 1.1  # alpha-DPO's statistics are those of the batch, not of the batches so far
    for objective, batch in itertools.product(OBJECTIVES.values(), batches):
        batch.objective = objective
        if name == "liger" and objective.name in ("focalpo", "alpha-dpo"):
            with pytest.raises(Unavailable, match=f"Liger has no {objective.name}"):
                step(name, batch)
            continue
        gate = Gate(batch)
        assert gate.verdict(gate.errors(*step(name, batch))) == "", objective.name


@pytest.mark.parametrize(
    ("name", "transform", "reason"),
    [
        ("liger", CAPPED, "no softcap"),
        ("torch-lce", CAPPED, "no softcap"),
        ("torch-lce-rows", SCALE, "no logit scale"),
        ("cce-compile", PLAIN, "no bias"),
    ],
)
def test_peer_that_lacks_what_the_head_needs_says_so(name, transform, reason):
    require(name)
    with pytest.raises(Unavailable, match=reason):
        step(name, tiny_batch(transform))


def test_peers_that_cannot_run_are_skipped_by_name(tmp_path, monkeypatch, capsys):
    reasons = {
        "trl": "cannot be imported",
        "compile": "torch.compile does not work here: no compiler",
        "cce": "CCE's kernels need a CUDA device",
        "quack-fused": "QuACK's linear cross-entropy is for Hopper GPUs",
    }
    monkeypatch.setitem(sys.modules, "trl.kernels", None)
    monkeypatch.setattr(peers, "compiler_problem", lambda device_type: "no compiler")
    (comparison,) = run(f"{RUN} --only {' '.join(reasons)}", tmp_path / "result.json")["comparisons"]
    said = " ".join(capsys.readouterr().out.split())
    for row in comparison["rows"]:
        assert row["status"] == "skipped" and reasons[row["id"]] in row["note"]
        assert row["peer"] in said and reasons[row["id"]] in said
