"""The benchmark: its float64 gate, its peers, its input, its measurements, and runs of `throughput.py`."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._inductor.config

from benchmarks import check, peers, report, throughput
from benchmarks.check import Gate
from benchmarks.inputs import OBJECTIVES, PRESENT, Batch, Capture, Recipe, Sequences, Shape, calibrate
from benchmarks.measure import PeakMemory, Step, in_fresh_process, interleaved_times, peak_extra_bytes
from benchmarks.peers import PEERS, Peer, PeerLoss, Unavailable, compiler_problem
from focalkern import FusedFocalPOLoss
from focalkern.records import LogitTransform
from focalkern.reference import linear_logps

PLAIN, CAPPED, HALVED = LogitTransform(), LogitTransform(softcap=5.0), LogitTransform(logit_scale=0.5)
SCALED = LogitTransform(softcap=5.0, logit_scale=0.5)
PACKAGES = {"trl": "trl", "liger": "liger_kernel", "cce-compile": "cut_cross_entropy"}
LACKING = {
    "liger": {CAPPED: "softcap"},
    "torch-lce": {CAPPED: "softcap", HALVED: "logit scale"},
    "cce-compile": {PLAIN: "bias"},
}
SIZE = "--device cpu --shape 48x1000 --tokens 64 --pairs 2"
# By g++ in 2 s instead of 5.
QUICK = {"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False, "aot_inductor.debug_compile": True}
RUN = f"{SIZE} --dtype fp32 --repeats 2 --no-memory"


def tiny_batch(transform: LogitTransform = PLAIN, dtype=torch.float32, bias: bool = True) -> Batch:
    """Sequences of 1 to 30 tokens and a head with a bias, as a capture may have them."""
    shape = Shape("tiny", 24, 300, transform.softcap, transform.logit_scale)
    batch = Recipe(shape, 48, 2, dtype, "cpu", scale=4.0).batch()
    batch.sequences = Sequences(torch.tensor([0, 12, 13, 18, 48]))
    batch.bias = torch.linspace(-1, 1, 300).to(dtype) if bias else None
    return batch


def logps_of(head: Batch | Capture, transform: LogitTransform) -> torch.Tensor:
    """Log-probs of the labels `[N]`, from the tensors alone."""
    given = (head.hidden, head.weight, head.labels, head.bias)
    return linear_logps(*given, **transform._asdict())["logps"]


def step(name: str, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a peer."""
    loss = PEERS[name].loss(batch).loss
    return loss.detach(), batch.gradients(loss)


def require(name: str) -> None:
    pytest.importorskip(PACKAGES.get(name, "torch"), reason="the extra `bench` has it")
    if PEERS[name].compiled and (problem := compiler_problem("cpu")):
        pytest.skip(f"torch.compile does not work here: {problem}")


@pytest.mark.parametrize("transform", [PLAIN, CAPPED, SCALED])
def test_reference_is_what_autograd_gives_on_the_whole(transform, monkeypatch):
    monkeypatch.setattr(check, "LOGITS_AT_ONCE", 20 * 300)  # 48 = 20 + 20 + 8
    batch = tiny_batch(transform, torch.float64)
    logps = torch.stack([part.sum() for part in logps_of(batch, transform).split([12, 1, 5, 30])])
    chosen, rejected = (logps - batch.ref_logps.double()).chunk(2)
    losses = -torch.nn.functional.logsigmoid(batch.objective.beta * (chosen - rejected))
    dhidden, dweight = torch.autograd.grad(losses.mean(), [batch.hidden, batch.weight])

    gate = Gate(batch)
    assert len(gate.rows) == 48 and len(gate.vocab) > 100
    torch.testing.assert_close(gate.truth.losses, losses)
    gradients = {"dhidden": dhidden[gate.rows], "dweight": dweight[gate.vocab]}
    torch.testing.assert_close(gate.truth.gradients, gradients)


@pytest.mark.parametrize(
    ("name", "entries"), [("torch", 16), ("torch", None), ("torch-exact", 50), ("eager", 16), ("trl", 50)]
)
def test_in_bf16_a_peer_passes_and_the_same_with_a_nan_or_off_by_a_few_percent_does_not(name, entries):
    require(name)
    recipe = Recipe(Shape("small", 64, 4096), 256, 4, torch.bfloat16, "cpu", scale=None)
    batch = (calibrate(recipe, entries) if entries else recipe).batch()
    gate = Gate(batch)
    loss, found = step(name, batch)

    def verdict(of_loss: float, of_dhidden: float, of_dweight: float) -> str:  # with these factors
        gradients = {"dhidden": of_dhidden * found["dhidden"], "dweight": of_dweight * found["dweight"]}
        return gate.verdict(gate.errors(of_loss * loss, gradients))

    assert verdict(1, 1, 1) == ""
    wrong = [(1, 1.03, 1), (1, 1, 1 / 1.03), (1.05, 1, 1), (1 / 1.05, 1, 1)]
    assert [factors for factors in wrong if not verdict(*factors)] == []
    outside = next(row for row in range(4096) if row not in gate.vocab)
    found["dweight"][outside, 3] = torch.nan
    assert verdict(1, 1, 1) == "wrong: error of dweight beyond the bound"
    batch.objective = FusedFocalPOLoss.dpo(beta=0.11)
    assert gate.verdict(gate.errors(*step(name, batch)))


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("torch", SCALED), ("torch-exact", SCALED), ("eager", SCALED), ("trl", SCALED), ("compile", CAPPED),
        ("cce-compile", CAPPED), ("liger", PLAIN), ("torch-lce", PLAIN),
    ],
)  # fmt: skip
@torch._inductor.config.patch(QUICK)
def test_peers_compute_every_loss_they_have_and_name_what_else_they_lack(name, transform, monkeypatch):
    require(name)
    if name == "liger":  # its code is traced and not made by g++, which "compile" shows
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    batches = [tiny_batch(transform, bias=name != "cce-compile") for _ in range(3)]
    batches[1].ref_logps *= 1.1  # alpha-DPO's statistics are those of the batch, not of the batches so far
    with torch.no_grad():  # as at the first step of a training: its margins differ by rounding alone
        batches[2].ref_logps = batches[2].sequences.sums(logps_of(batches[2], transform))
    for loss, batch in itertools.product(OBJECTIVES, batches):
        batch.objective = OBJECTIVES[loss]
        if name == "liger" and loss in ("focalpo", "alpha-dpo"):
            with pytest.raises(Unavailable, match="Liger has no FocalPO and no alpha-DPO"):
                step(name, batch)
            continue
        gate = Gate(batch)
        assert gate.verdict(gate.errors(*step(name, batch))) == "", loss
    for lacking, what in LACKING.get(name, {}).items():
        with pytest.raises(Unavailable, match=f"has no {what}"):
            step(name, tiny_batch(lacking))


@pytest.mark.parametrize("entries", [16, 200])
def test_input_is_as_sharp_as_asked_and_its_labels_follow_the_softmax(entries):
    recipe = calibrate(Recipe(Shape("small", 64, 8192), 512, 2, torch.float32, "cpu"), entries)
    batch = recipe.batch()
    nll, entropy, found = batch.sharpness.values()
    # The number varies from row to row by about its own size; calibration and sample take a hundred or more.
    assert found == pytest.approx(entries, rel=0.25)
    logps = (batch.hidden @ batch.weight.T).log_softmax(-1)
    present = (logps.exp() > PRESENT).sum(-1).double().mean().item()
    assert found == pytest.approx(present, rel=1e-3)
    assert entropy == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-3)
    # Labels drawn from the softmax have its entropy as their expected NLL.
    assert nll == pytest.approx(entropy, rel=0.25)


def test_runs_alternate_and_one_that_fails_takes_no_further_part():
    order = []

    def take(name: str) -> str:
        order.append(name)
        if name == "c" and order.count("c") == 2:
            raise RuntimeError("boom")
        return name

    steps = {name: Step(lambda name=name: take(name), lambda name: order.append(f"d{name}")) for name in "ab"}
    steps["c"] = Step(lambda: take("c"), guard=lambda: contextlib.suppress(RuntimeError))
    times = interleaved_times(steps, torch.device("cpu"), 1, 3)
    assert order == [*["a", "da", "b", "db", "c"] * 2, *["a", "da", "b", "db"] * 2]
    assert list(times) == ["a", "b"]
    for found in times.values():
        forward, backward, both = (found[f"{part}_ms"]["samples"] for part in ("forward", "backward", "both"))
        assert len(both) == 3  # without the warm-up
        assert found["both_ms"]["median"] == statistics.median(both)
        for f, b, whole in zip(forward, backward, both, strict=True):
            assert 0 <= f <= whole and f + b == pytest.approx(whole, abs=1e-3)


def allocate(before: int, temporary: int, returned: int) -> PeakMemory:
    """Peak of a call that needs `temporary` MiB and returns `returned`, after one that needed `before`."""

    def call() -> list[torch.Tensor]:
        kept = torch.ones(returned * 2**20, dtype=torch.uint8)
        torch.ones(temporary * 2**20, dtype=torch.uint8)
        return [kept]

    torch.ones(before * 2**20, dtype=torch.uint8)
    return peak_extra_bytes(call, torch.device("cpu"))


@pytest.mark.parametrize(("before", "temporary", "returned"), [(1, 200, 100), (300, 50, 1)])
def test_peak_memory_is_that_of_the_call_beyond_what_it_returns(before, temporary, returned):
    found = in_fresh_process(allocate, before, temporary, returned)
    if found.upper_limit:  # the system does not let a process reset its peak
        assert before > temporary and found.extra / 2**20 <= before + 5
    else:
        assert found.extra / 2**20 == pytest.approx(temporary, abs=5)


def test_commit_is_marked_when_anything_but_results_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.commit() is None  # not a repository
    result, code = tmp_path / "benchmarks/results/cpu.json", tmp_path / "code.py"
    result.parent.mkdir(parents=True)
    result.write_text("1")
    code.write_text("1")
    identity = "-c user.name=tests -c user.email=tests@example.com"
    commands = f"git init && git add . && git {identity} commit --message one"
    subprocess.run(commands, shell=True, cwd=tmp_path, check=True, capture_output=True)
    result.write_text("2")
    clean = report.commit()
    assert len(clean) == 40
    code.write_text("2")
    assert report.commit() == f"{clean}-dirty"


def run(options: str, path: Path, status: int = 0) -> dict:
    assert throughput.main([*options.split(), "--json", str(path)]) == status
    return json.loads(path.read_text())


def test_script_measures_time_error_and_memory_of_each_peer_with_its_logits_within_80_columns(tmp_path):
    path = tmp_path / "result.json"
    options = "--device cpu --shape 16x20000 --tokens 512 --dtype fp32 bf16 --repeats 2"
    options += f" --json {path.name} --only triton torch torch-exact eager"
    command = [sys.executable, throughput.__file__, *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads(path.read_text())
    assert result["versions"]["torch"] == metadata.version("torch") and result["finished"]
    assert [comparison["dtype"] for comparison in result["comparisons"]] == ["fp32", "bf16"]
    for comparison in result["comparisons"]:
        triton, ours, exact, eager = comparison["rows"]
        assert (triton["id"], triton["status"], "both_ms" in triton) == ("triton", "skipped", False)
        assert comparison["bare_gemm_ms"]["median"] > 0
        for row in (ours, exact, eager):
            for times in (row["forward_ms"], row["backward_ms"], row["both_ms"]):
                assert len(times["samples"]) == 2 and 0 < times["min"] <= times["median"] <= times["max"]
            assert all(0 <= error < 0.1 for error in row["errors"].values())
            assert 0 <= row["extra_bytes"] < 2**28
        assert 0 < ours["kept_share"] <= 1 and "kept_share" not in exact
        assert comparison["fp32_logits_bytes"] == 4 * 512 * 20000
        # The logits, their gradient, and the softmax it is made of.
        assert 2.5 < eager["extra_bytes"] / comparison["fp32_logits_bytes"] < 3.5
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


def noisy(name: str, batch: Batch) -> PeerLoss:
    """Eager PyTorch with one gradient off by 1e-4, which bf16 would forgive and fp32 must not."""
    copy = getattr(batch, name).clone()
    copy.register_hook(lambda gradient: gradient * (1 + 1e-4 * torch.randn_like(gradient)))
    return peers.eager(replace(batch, **{name: copy}))


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="others do not kill a process for its memory")
ALL = "failed: wrong: error of loss and dhidden and dweight"
RAISING = mock.Mock(side_effect=NotImplementedError("no such kernel\nat line 3"))
CALLS = itertools.chain([peers.eager, peers.eager], itertools.repeat(RAISING))
two_gib = partial(torch.empty, 2**31, dtype=torch.uint8)  # which Linux would grant


@pytest.mark.parametrize(
    ("name", "loss", "outcome"),
    [
        ("trl", partial(noisy, "hidden"), "failed: wrong: error of dhidden beyond"),
        ("trl", partial(noisy, "weight"), "failed: wrong: error of dweight beyond"),
        ("torch", lambda batch: peers.eager(replace(batch, labels=batch.labels.roll(1))), ALL),
        ("torch-exact", lambda batch: PeerLoss(peers.eager(batch).loss * float("nan")), ALL),
        ("torch", RAISING, "failed: NotImplementedError: no such kernel"),
        ("trl", lambda batch: next(CALLS)(batch), "failed: NotImplementedError"),  # while it is timed
        pytest.param("trl", lambda batch: two_gib(), "skipped: ran out of memory", marks=ON_LINUX),
    ],
)
def test_failing_peer_gets_no_time_and_others_go_on(name, loss, outcome, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "PEERS", {name: Peer(name, loss), "eager": PEERS["eager"]})
    monkeypatch.setattr(throughput.measure, "available_bytes", lambda: 2**30)
    # The exit status tells of focalkern's own.
    report = run(RUN, tmp_path / "result.json", status=int(name.startswith("torch")))
    failing, other = report["comparisons"][0]["rows"]
    assert outcome in f"{failing['status']}: {failing['note']}"
    assert not {"forward_ms", "backward_ms", "both_ms"} & set(failing)
    assert f"{name}: {outcome}" in " ".join(capsys.readouterr().out.split())
    assert other["status"] == "ok" and len(other["both_ms"]["samples"]) == 2
    two_gib()  # the limit ends with the run


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


def test_each_combination_is_a_comparison_and_they_are_drawn_over_tokens_and_sharpness(tmp_path):
    several = "--tokens 64 128 --pairs 4 --saturated 0 0.75 --sharpness 16 flat --head full frozen"
    options = f"{RUN} {several} --only torch cce --plot {tmp_path / 'plots'}"
    found = run(options, tmp_path / "result.json")["comparisons"]
    about = [(x["tokens"], x["input"]["kind"], x["saturated_pairs"], x["frozen_head"]) for x in found]
    assert about == [*itertools.product((64, 128), ("LM-like", "untrained"), (0, 3), (False, True))]
    for comparison in found:
        row, _ = comparison["rows"]
        assert row["status"] == "ok" and ("dweight" in row["errors"]) != comparison["frozen_head"]
        # Saturated pairs have next to no gradient: of 3 in 4, the backward keeps the label's blocks alone.
        assert (row["kept_share"] < 0.4) == (comparison["saturated_pairs"] == 3)
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
