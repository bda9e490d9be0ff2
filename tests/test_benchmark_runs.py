"""Runs of `benchmarks/throughput.py`: a wrong peer gets no time, and no peer stops the others."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import peers, throughput
from benchmarks.inputs import Batch
from benchmarks.peers import PEERS, LossFn, Peer, PeerLoss

SIZE = "--device cpu --shape 48x1000 --tokens 64 --pairs 2"
RUN = f"{SIZE} --dtype fp32 --repeats 2 --no-memory"


def run(options: str, path: Path, status: int = 0) -> dict:
    assert throughput.main([*options.split(), "--json", str(path)]) == status
    return json.loads(path.read_text())


def row_of(monkeypatch, path: Path, name: str, loss: LossFn, status: int = 0) -> dict:
    """The row of this peer in a run with eager PyTorch, which is measured whatever becomes of the other."""
    monkeypatch.setattr(throughput, "PEERS", {name: Peer(name, loss), "eager": PEERS["eager"]})
    first, second = run(RUN, path, status)["comparisons"][0]["rows"]
    assert second["status"] == "ok" and len(second["both_ms"]["samples"]) == 2
    return first


def test_script_measures_time_memory_and_error_of_each_peer_within_80_columns(tmp_path):
    path = tmp_path / "result.json"
    options = f"{SIZE} --dtype fp32 bf16 --repeats 2 --json {path.name} --only triton torch torch-exact"
    command = [sys.executable, throughput.__file__, *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads(path.read_text())
    assert result["versions"]["torch"] == torch.__version__ and result["finished"]
    assert [comparison["dtype"] for comparison in result["comparisons"]] == ["fp32", "bf16"]
    for comparison in result["comparisons"]:
        triton, ours, exact = comparison["rows"]
        assert (triton["id"], triton["status"], "both_ms" in triton) == ("triton", "skipped", False)
        assert comparison["bare_gemm_ms"]["median"] > 0
        for row in (ours, exact):
            for times in (row["forward_ms"], row["backward_ms"], row["both_ms"]):
                assert len(times["samples"]) == 2 and 0 < times["min"] <= times["median"] <= times["max"]
            assert all(0 <= error < 0.1 for error in row["errors"].values())
            assert 0 <= row["extra_bytes"] < 2**28
        assert 0 < ours["kept_share"] <= 1 and "kept_share" not in exact
    said = " ".join(done.stdout.split())
    assert "fwd both x focalkern kept extra error" in said and "needs a CUDA device" in said


def test_quick_runs_every_peer_that_needs_no_compiler(tmp_path, capsys):
    (comparison,) = run(f"{SIZE} --quick", tmp_path / "result.json")["comparisons"]
    assert [row["id"] for row in comparison["rows"]] == list(throughput.QUICK_PEERS)
    assert all(("both_ms" in row) == (row["id"] != "triton") for row in comparison["rows"])
    assert not any("extra_bytes" in row for row in comparison["rows"])
    assert "--quick leaves compiled peers and memory out" in capsys.readouterr().out


@pytest.mark.parametrize("has_products", [True, False])
def test_bf16_is_compared_by_default_where_the_cpu_multiplies_it(has_products, monkeypatch):
    monkeypatch.setattr(throughput, "HAS_BF16_PRODUCTS", has_products)
    cpu = ["--device", "cpu"]
    assert throughput.parse(cpu).dtype == (["fp32", "bf16"] if has_products else ["fp32"])
    assert throughput.parse([*cpu, "--quick"]).dtype == (["bf16"] if has_products else ["fp32"])
    assert throughput.parse([*cpu, "--dtype", "bf16"]).dtype == ["bf16"]


def noisy(x: torch.Tensor) -> torch.Tensor:
    """Its gradient is off by 1e-4, which bf16 would forgive and fp32 must not."""
    copy = x.clone()
    copy.register_hook(lambda gradient: gradient * (1 + 1e-4 * torch.randn_like(gradient)))
    return copy


def eager(batch: Batch, **changes: torch.Tensor) -> PeerLoss:
    return PEERS["eager"].loss(dataclasses.replace(batch, **changes))


RAISING = mock.Mock(side_effect=NotImplementedError("no such kernel\nat line 3"))
ALL = "error of loss and dhidden and dweight"
CALLS = itertools.chain([eager, eager], itertools.repeat(RAISING))


@pytest.mark.parametrize(
    ("name", "loss", "reason"),
    [
        ("trl", lambda batch: eager(batch, hidden=noisy(batch.hidden)), "error of dhidden beyond"),
        ("trl", lambda batch: eager(batch, weight=noisy(batch.weight)), "error of dweight beyond"),
        ("torch", lambda batch: eager(batch, labels=batch.labels.roll(1)), ALL),
        ("torch-exact", lambda batch: PeerLoss(eager(batch).loss * float("nan")), ALL),
        ("torch", RAISING, "NotImplementedError: no such kernel"),
        ("trl", lambda batch: next(CALLS)(batch), "NotImplementedError: no such kernel"),  # while it is timed
    ],
)
def test_wrong_peer_fails_without_a_time_and_others_go_on(name, loss, reason, tmp_path, monkeypatch, capsys):
    is_ours = name.startswith("torch")  # then the exit status tells of it
    wrong = row_of(monkeypatch, tmp_path / "result.json", name, loss, status=int(is_ours))
    assert wrong["status"] == "failed" and reason in wrong["note"]
    assert not {"forward_ms", "backward_ms", "both_ms"} & set(wrong)
    assert f"{name}: failed" in capsys.readouterr().out


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


@pytest.mark.skipif(sys.platform != "linux", reason="others do not kill a process for its memory")
def test_peer_that_runs_out_of_memory_is_skipped_with_a_note(tmp_path, monkeypatch):
    def loss(batch: Batch) -> PeerLoss:
        torch.empty(2**31, dtype=torch.uint8)  # which Linux would grant
        return eager(batch)

    monkeypatch.setattr(throughput.measure, "available_bytes", lambda: 2**30)
    row = row_of(monkeypatch, tmp_path / "result.json", "failing", loss)
    assert (row["status"], row["note"]) == ("skipped", "ran out of memory") and "both_ms" not in row
    torch.empty(2**31, dtype=torch.uint8)  # the limit ends with the run


def test_eager_peer_is_charged_for_its_logits(tmp_path):
    options = "--device cpu --shape 16x20000 --tokens 512 --dtype fp32 --repeats 1 --only eager"
    (comparison,) = run(options, tmp_path / "result.json")["comparisons"]
    assert comparison["fp32_logits_bytes"] == 4 * 512 * 20000
    # The logits, their gradient, and the softmax it is made of.
    assert 2.5 < comparison["rows"][0]["extra_bytes"] / comparison["fp32_logits_bytes"] < 3.5


def test_each_combination_is_a_comparison_and_they_are_drawn_over_tokens_and_sharpness(tmp_path):
    several = "--tokens 64 128 --pairs 4 --saturated 0 0.75 --sharpness 16 flat --head full frozen"
    options = f"{RUN} {several} --only torch cce --plot {tmp_path / 'plots'}"
    found = run(options, tmp_path / "result.json")["comparisons"]
    about = [(x["tokens"], x["input"]["kind"], x["saturated_pairs"], x["frozen_head"]) for x in found]
    made = itertools.product((64, 128), ("LM-like", "untrained"), (0, 3), (False, True))
    assert about == list(made)
    for comparison in found:
        row, _ = comparison["rows"]
        assert row["status"] == "ok" and ("dweight" in row["errors"]) != comparison["frozen_head"]
    assert found[0]["input"]["entropy"] < found[-1]["input"]["entropy"]
    drawn = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in drawn] == ["over-sharpness.png", "over-tokens.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)


def test_a_run_that_is_stopped_leaves_the_comparisons_it_has_made(tmp_path, monkeypatch):
    path, found = tmp_path / "deep" / "result.json", {"loss": "dpo", "rows": []}
    monkeypatch.setattr(throughput, "compare", mock.Mock(side_effect=[found, found, KeyboardInterrupt]))
    monkeypatch.setattr(throughput, "terminal", json.dumps)
    with pytest.raises(KeyboardInterrupt):
        run(f"{RUN} --loss dpo simpo focalpo", path)
    report = json.loads(path.read_text())
    assert report["comparisons"] == [found, found]
    assert report["finished"] is False and not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape gpt5", "invalid shape value: 'gpt5'"),
        ("--shape 64x0", "expected positive sizes, got 0"),
        ("--tokens 100 --pairs 3", "not a multiple of 2 x 3"),
        ("--sharpness 50 round", "invalid"),
        ("--saturated 1", "at least 0 and below 1"),
        ("--capture none.pt", "none.pt: No such file"),
        ("--capture none.pt --shape llama3-8b --pairs 2", "leave out --shape and --pairs"),
        ("--saturated 0.5 --loss dpo simpo", "the score of simpo does not have"),
        ("--saturated 0.5 --pairs 1", "of one pair, none can be saturated"),
        (f"--tokens 64 128 --plot {__file__}", "is a file, expected a folder"),
        (f"--json {Path(__file__).parent}", "is a folder, expected a file"),
        ("--plot plots", "several values of --tokens or --sharpness"),
        ("--device cuda", "--device cuda: torch sees no CUDA device\n"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        throughput.parse(arguments.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_bare_gemm_is_the_whole_product(monkeypatch):
    monkeypatch.setattr(throughput, "GEMM_TILE", 200)
    monkeypatch.setattr(throughput, "matmul", lambda a, b: tiles.append(a @ b.T))
    tiles: list[torch.Tensor] = []
    hidden, weight = torch.eye(48), torch.arange(300 * 48.0).view(300, 48)
    throughput.bare_gemm(hidden, weight)
    assert torch.equal(torch.cat(tiles, dim=1), weight.T)


@pytest.mark.gpu
def test_on_a_gpu_every_peer_is_measured_or_says_why_not(tmp_path):
    size = "--device cuda --shape 1024x32768 --tokens 1024 --repeats 2"
    report = run(f"{size} --loss dpo simpo --head full frozen", tmp_path / "result.json")
    assert len(report["comparisons"]) == 4
    for comparison in report["comparisons"]:
        rows = {row["id"]: row for row in comparison["rows"]}
        assert list(rows) == list(PEERS)
        for name in ("triton", "triton-exact", "eager"):
            assert rows[name]["status"] == "ok" and rows[name]["extra_bytes"] >= 0
        assert all(row["note"] for row in rows.values() if row["status"] != "ok")
