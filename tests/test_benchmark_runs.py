"""What a run of the benchmark leaves behind: operations counted, JSON, plots, the longest batch."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import max_tokens, plots, throughput
from benchmarks.inputs import Batch, Recipe, Shape
from benchmarks.max_tokens import longest, with_pairs
from benchmarks.measure import Step, interleaved_times
from benchmarks.peers import Peer, PeerLoss, all_peers, load_eager

SIZE = ["--device", "cpu", "--hidden", "48", "--vocab", "1000", "--pairs", "2", "--threads", "1"]
RUN = [*SIZE, "--tokens", "64", "--dtype", "fp32", "--repeats", "2", "--no-memory"]
ON_CUDA = ["--device", "cuda", "--hidden", "1024", "--vocab", "32768", "--tokens", "1024", "--repeats", "2"]
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("same_threads_afterwards")


def run(arguments: list[str], path: Path) -> dict:
    assert throughput.main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_operations_are_the_useful_ones_and_those_executed_count_recomputed_logits(tmp_path):
    arguments = ["--head", "full", "frozen", "--only", "torch", "torch-exact", "eager"]
    full, frozen = run([*RUN, *arguments], tmp_path / "result.json")["comparisons"]
    one_product = 2 * 64 * 48 * 1000
    assert (full["frozen_head"], frozen["frozen_head"]) == (False, True)
    for comparison, products in ((full, 3), (frozen, 2)):
        for row in comparison["rows"]:
            for part, count in (("forward", 1), ("backward", products - 1), ("both", products)):
                seconds = row[f"{part}_ms"]["median"] / 1e3
                assert row["tflops"][part] == pytest.approx(count * one_product / seconds / 1e12, rel=1e-2)
            assert ("executed_tflops" in row) == (row["id"] == "torch-exact")
        exact = comparison["rows"][1]
        executed = exact["executed_tflops"]["both"] / exact["tflops"]["both"]
        assert executed == pytest.approx((products + 1) / products)
        assert exact["executed_tflops"]["forward"] == exact["tflops"]["forward"]


def test_peer_that_makes_its_gradients_in_the_forward_has_one_rate(tmp_path, monkeypatch, capsys):
    peers = {
        "early": Peer("early", load_eager, lambda tokens, vocab: 0, gradients_in_forward=True),
        "eager": all_peers()["eager"],
    }
    monkeypatch.setattr(throughput, "all_peers", lambda tau="auto": peers)
    early, eager = run(RUN, tmp_path / "result.json")["comparisons"][0]["rows"]
    assert early["tflops"]["forward"] is early["tflops"]["backward"] is None
    seconds = early["both_ms"]["median"] / 1e3
    assert early["tflops"]["both"] == pytest.approx(6 * 64 * 48 * 1000 / seconds / 1e12, rel=1e-2)
    assert early["note"] == "its gradients are made in the forward" and eager["note"] == ""
    assert "early: its gradients are made in the forward" in capsys.readouterr().out
    assert None not in eager["tflops"].values()


def test_peers_that_recompute_logits_or_make_gradients_early_are_marked():
    peers = all_peers()
    recomputing = {name for name, peer in peers.items() if peer.recomputes}
    assert recomputing == {"triton-exact", "torch-exact", "trl", "cce", "torch-lce", "torch-lce-rows"}
    early = {name for name, peer in peers.items() if peer.gradients_in_forward}
    assert early == {"liger", "quack", "quack-fused"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bare_gemms_are_the_whole_product(dtype, monkeypatch):
    monkeypatch.setattr(throughput, "GEMM_OUTPUT_BYTES", 20 * 300 * dtype.itemsize)  # 48 = 20 + 20 + 8
    batch, _ = Recipe(Shape("tiny", 24, 300), 48, 2, dtype, "cpu", scale=4.0).batch()
    written: list[torch.Tensor] = []
    monkeypatch.setattr(
        throughput, "exhaust", lambda products: written.extend(part.clone() for part in products)
    )
    runs = throughput.bare_gemms(batch)
    expected = batch.hidden.double() @ batch.weight.double().T
    assert "into_buffer" in runs
    for name, gemm in runs.items():
        written.clear()
        gemm()
        assert len(written) == (3 if name == "into_buffer" else 1)
        torch.testing.assert_close(torch.cat(written).to(dtype), expected.to(dtype), rtol=1e-2, atol=1e-3)
    if len(runs) > 1:
        tiles = list(throughput.onednn_products(batch.hidden, batch.weight, size=32))
        rows = [torch.cat(tiles[first : first + 10], dim=1) for first in (0, 10)]  # 300 = 9 x 32 + 12
        torch.testing.assert_close(torch.cat(rows), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"sizes": [(2048, 4)], "dtype": ["fp32", "bf16"], "repeats": 3}),
        (["--quick"], {"sizes": [(256, 4)], "dtype": ["bf16"], "repeats": 3, "threads": 1}),
        (["--quick", "--tokens", "64", "--dtype", "fp32"], {"sizes": [(64, 4)], "dtype": ["fp32"]}),
        (["--tokens", "64", "128", "--pairs", "2"], {"sizes": [(64, 2), (128, 2)]}),
        ([], {"head": ["full"], "loss": ["dpo"], "sharpness": [50]}),
    ],
)
def test_sizes_and_repeats_that_are_not_asked_for(arguments, expected):
    options = throughput.parse(["--device", "cpu", *arguments])
    assert {name: getattr(options, name) for name in expected} == expected


def test_quick_leaves_no_peer_out():
    options = throughput.parse(["--device", "cpu", "--quick"])
    assert list(options.only) == list(all_peers()) and not options.no_memory
    assert options.shape.vocab * options.shape.hidden < 2**22


def test_a_run_that_is_stopped_leaves_the_comparisons_it_has_made(tmp_path, monkeypatch):
    path, compare, seen = tmp_path / "deep" / "result.json", throughput.compare, []

    def stop_at_the_third(options, case, console):
        if path.exists():
            seen.append(len(json.loads(path.read_text())["comparisons"]))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return compare(options, case, console)

    monkeypatch.setattr(throughput, "compare", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run([*RUN, "--loss", "dpo", "simpo", "focalpo", "--only", "eager"], path)
    report = json.loads(path.read_text())
    assert seen == [1, 2] and [comparison["loss"] for comparison in report["comparisons"]] == ["dpo", "simpo"]
    assert report["finished"] is False
    assert report["launch_table"] == "shipped" and not list(path.parent.glob("*.part"))
    packages = {"torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "focalkern"}
    assert set(report["versions"]) == packages


@pytest.mark.parametrize("extra", [[], ["--max-tokens", "1"]])
def test_a_run_that_came_to_its_end_says_so(extra, tmp_path, monkeypatch):
    monkeypatch.setattr(max_tokens, "tries", lambda row, case, base, options: lambda pairs: pairs < 3)
    assert run([*RUN, "--only", "eager", *extra], tmp_path / "result.json")["finished"] is True


@pytest.mark.gpu
def test_launch_table_is_taken_and_named(tmp_path):
    from focalkern.triton_launch import arch_of

    table = tmp_path / "tuned.json"
    table.write_text(json.dumps({"arch": arch_of(torch.device("cuda")), "element_bits": 16, "entries": {}}))
    arguments = [*ON_CUDA, "--only", "triton", "--no-memory", "--launch-table", str(table)]
    result = run(arguments, tmp_path / "result.json")
    assert result["launch_table"] == str(table)
    assert result["comparisons"][0]["rows"][0]["status"] == "ok"


@pytest.mark.gpu
def test_launch_table_of_another_device_is_refused(tmp_path):
    table = tmp_path / "tuned.json"
    table.write_text(json.dumps({"arch": "sm_1", "element_bits": 16, "entries": {}}))
    with pytest.raises(SystemExit, match="sm_1"):
        run([*ON_CUDA, "--only", "triton", "--launch-table", str(table)], tmp_path / "result.json")


@pytest.mark.gpu
def test_on_a_gpu_every_peer_is_measured_or_says_why_not(tmp_path):
    report = run([*ON_CUDA, "--loss", "dpo", "simpo", "--head", "full", "frozen"], tmp_path / "result.json")
    assert len(report["comparisons"]) == 4
    for comparison in report["comparisons"]:
        rows = {row["id"]: row for row in comparison["rows"]}
        assert list(rows) == list(all_peers())
        for name in ("triton", "triton-exact", "eager"):
            assert rows[name]["status"] == "ok" and rows[name]["extra_bytes"] >= 0
        assert all(row["note"] for row in rows.values() if row["status"] != "ok")


@pytest.mark.gpu
def test_longest_batch_on_a_gpu_keeps_to_the_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(max_tokens.MOST_TOKENS, "cuda", 2**15)
    arguments = [*ON_CUDA, "--only", "triton", "eager", "--max-tokens", "1"]
    (found,) = run(arguments, tmp_path / "result.json")["max_tokens"]
    triton, eager = found["rows"]
    # Eager PyTorch: at least 8 bytes for each of 32768 logits of a token.
    assert 0 < eager["tokens"] < 2**30 / (8 * 32768) and not eager["at_least"]
    assert triton["tokens"] > eager["tokens"]
    torch.empty(2**31, dtype=torch.uint8, device="cuda")  # the limit is no more


class FailsAfterTheCheck:
    """Eager PyTorch that is right once, and then runs out of memory."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0
        self.eager = load_eager("cpu")

    def __call__(self, batch: Batch) -> PeerLoss:
        self.calls += 1
        if self.calls > 1:
            raise self.error
        return self.eager(batch)


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "skipped", "ran out of memory"),
        (ValueError("no such tile\nat line 3"), "failed", "ValueError: no such tile"),
    ],
)
def test_peer_that_fails_while_it_is_timed_does_not_stop_the_others(
    error, status, note, tmp_path, monkeypatch
):
    failing = Peer("failing", lambda device_type: FailsAfterTheCheck(error), lambda tokens, vocab: 0)
    peers = {"failing": failing, "eager": all_peers()["eager"]}
    monkeypatch.setattr(throughput, "all_peers", lambda tau="auto": peers)
    first, second = run(RUN, tmp_path / "result.json")["comparisons"][0]["rows"]
    assert (first["status"], first["note"]) == (status, note) and "both_ms" not in first
    assert second["status"] == "ok" and len(second["both_ms"]["samples"]) == 2


def test_peer_that_cannot_be_loaded_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken(device_type: str):
        raise OSError("libcute.so: undefined symbol")

    peers = {"broken": Peer("broken", broken, lambda tokens, vocab: 0), "eager": all_peers()["eager"]}
    monkeypatch.setattr(throughput, "all_peers", lambda tau="auto": peers)
    first, second = run(RUN, tmp_path / "result.json")["comparisons"][0]["rows"]
    assert (first["status"], first["note"]) == ("failed", "OSError: libcute.so: undefined symbol")
    assert second["status"] == "ok"


def test_step_that_fails_takes_no_further_part():
    order, failures = [], []

    def fail() -> None:
        order.append("b")
        raise RuntimeError("boom")

    steps = {"a": Step(lambda: order.append("a"), None), "b": Step(fail, None)}
    times = interleaved_times(
        steps, CPU, 1, 2, on_failure=lambda name, error: failures.append((name, str(error)))
    )
    assert order == ["a", "b", "a", "a"] and failures == [("b", "boom")] and list(times) == ["a"]


def test_plots_are_drawn_from_the_report(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need it; the extra `bench` has it")
    size = [*SIZE, "--tokens", "64", "128", "--dtype", "fp32", "--repeats", "1", "--no-memory"]
    several = ["--sharpness", "50", "flat", "--only", "torch", "eager", "cce"]
    report = run([*size, *several, "--plot", str(tmp_path / "plots")], tmp_path / "result.json")
    drawn = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert drawn == sorted([plots.TOKENS_FILE, plots.SHARPNESS_FILE])
    # From the file alone, also one that was written before comparisons named their loss.
    for comparison in report["comparisons"]:
        del comparison["loss"]
        comparison["rows"][0]["extra_bytes"] = 0
    for plot in (plots.plot_tokens, plots.plot_sharpness):
        path = tmp_path / f"{plot.__name__}.png"
        plot(report, path)
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_plots_without_matplotlib_are_refused_by_name(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    with pytest.raises(SystemExit):
        throughput.parse(["--device", "cpu", "--plot", "plots"])
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 16, 100, 1000])
def test_longest_is_found_to_within_a_sixteenth(limit):
    tried = []

    def fits(pairs: int) -> bool:
        tried.append(pairs)
        return pairs <= limit

    found = longest(fits, most=500)
    assert found <= min(limit, 500) <= found + found // max_tokens.GRANULARITY
    assert max(tried) <= max(1, 2 * limit) and len(tried) < 20


def test_longer_batches_are_the_same_pairs_over_and_over():
    batch, _ = Recipe(Shape("tiny", 24, 300), 48, 2, torch.float32, "cpu", scale=4.0).batch()
    longer = with_pairs(batch, 5)
    assert longer.sequences.lengths == [12] * 10 and len(longer.labels) == 120
    losses = load_eager("cpu")(longer).loss
    one, two = (load_eager("cpu")(with_pairs(batch, pairs)).loss for pairs in (1, 2))
    assert losses == pytest.approx(((3 * one + 2 * (2 * two - one)) / 5).item(), rel=1e-5)


def test_longest_batch_on_a_cpu_keeps_to_the_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(max_tokens.MOST_TOKENS, "cpu", 128)
    size = ["--device", "cpu", "--hidden", "16", "--vocab", "20000", "--tokens", "128", "--pairs", "2"]
    arguments = [*size, "--threads", "1", "--dtype", "fp32", "--only", "torch", "eager", "cce"]
    # Eager PyTorch holds about 3 fp32 logits: 15 MB for one pair of 64 tokens, 31 MB for two.
    report = run([*arguments, "--max-tokens", str(24e6 / 2**30)], tmp_path / "result.json")
    (found,) = report["max_tokens"]
    assert (found["tokens_per_pair"], found["loss"], found["frozen_head"]) == (64, "dpo", False)
    ours, eager, cce = found["rows"]
    assert (ours["id"], ours["tokens"], ours["at_least"]) == ("torch", 128, True)
    assert (eager["id"], eager["tokens"], eager["at_least"]) == ("eager", 64, False)
    assert cce["status"] == "skipped" and cce["tokens"] is None and "CUDA device" in cce["note"]
    out = capsys.readouterr().out
    assert ">= 128" in out and "CPU" in out


@pytest.mark.parametrize(
    ("free", "killed_at", "tokens", "limited"),
    [(64, None, 5 * 32, False), (5, None, 4 * 32, True), (64, 4, 3 * 32, True), (0, None, 0, True)],
)
def test_longest_batch_that_the_free_memory_ends_is_a_lower_limit(
    free, killed_at, tokens, limited, tmp_path, monkeypatch
):
    """Each pair needs a unit of memory; the budget has 5. A try takes as much as was estimated."""
    peer = Peer("peer", load_eager, lambda tokens, vocab: 0)
    unit = 2**20
    monkeypatch.setattr(Peer, "estimated_bytes", lambda self, shape, tokens, pairs, *rest: pairs * unit)
    monkeypatch.setattr(max_tokens, "all_peers", lambda tau="auto": {"peer": peer})
    monkeypatch.setattr(max_tokens, "available_bytes", lambda device: int(free * unit))

    def needs(function, name, tau, case, pairs, *rest) -> int:
        if killed_at and pairs >= killed_at:
            raise BrokenProcessPool("terminated abruptly")
        return pairs * unit

    monkeypatch.setattr(max_tokens, "in_fresh_process", needs)
    arguments = [*RUN, "--only", "eager", "--max-tokens", str(5 * unit / 2**30)]
    options = throughput.parse(arguments)
    options.only = ["peer"]
    (case,) = throughput.cases(options)
    (row,) = max_tokens.find(case, options, Console(quiet=True))["rows"]
    assert (row["tokens"], row["at_least"]) == (tokens, limited)
    assert row["note"] == ("limited by the memory that is free here" if limited else "")


def test_peer_whose_process_dies_on_a_single_pair_has_failed(monkeypatch):
    def dies(*arguments) -> int:
        raise BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(max_tokens, "in_fresh_process", dies)
    options = throughput.parse([*RUN, "--only", "eager", "--max-tokens", "1"])
    (case,) = throughput.cases(options)
    (row,) = max_tokens.find(case, options, Console(quiet=True))["rows"]
    assert row["status"] == "failed" and "terminated abruptly" in row["note"] and not row["at_least"]


def test_budget_beyond_the_memory_of_the_card_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    with pytest.raises(SystemExit):
        throughput.parse([*ON_CUDA, "--max-tokens", "17"])
    assert "--max-tokens 17: the device has 16.0 GiB" in capsys.readouterr().err
    assert throughput.parse([*ON_CUDA, "--max-tokens", "16"]).max_tokens == 16
