"""The benchmark tells the truth: a wrong peer gets no time, memory and sharpness are as stated."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import check, throughput
from benchmarks.inputs import PRESENT, Batch, Recipe, Shape, calibrate, preference_batch
from benchmarks.measure import PeakMemory, Step, in_fresh_process, interleaved_times, peak_extra_bytes
from benchmarks.peers import BETA, Peer, all_peers, dpo_loss, load_eager

SCRIPT = Path(throughput.__file__)
TINY = ["--device", "cpu", "--hidden", "48", "--vocab", "1000", "--tokens", "64", "--pairs", "2"]
TINY += ["--threads", "1"]
QUICK = [*TINY, "--dtype", "fp32", "--repeats", "2", "--no-memory"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(arguments: list[str], tmp_path: Path) -> tuple[int, dict]:
    path = tmp_path / "result.json"
    status = throughput.main([*arguments, "--json", str(path)])
    return status, json.loads(path.read_text())


def tiny_batch(softcap: float | None = None, dtype: torch.dtype = torch.float32) -> Batch:
    batch, _ = preference_batch(Recipe(Shape("tiny", 24, 300, softcap), 48, 2, dtype, "cpu", scale=4.0))
    return batch.requires_grad_(frozen_head=False)


def test_script_measures_time_memory_and_error_of_each_peer(tmp_path):
    path = tmp_path / "result.json"
    both_dtypes = ["--dtype", "fp32", "bf16", "--repeats", "2"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *TINY, *both_dtypes, "--only", "triton", "torch", "--json", path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["device"] and result["threads"] >= 1 and result["versions"]["torch"] == torch.__version__
    assert [comparison["dtype"] for comparison in result["comparisons"]] == ["fp32", "bf16"]
    for comparison in result["comparisons"]:
        triton, torch_row = comparison["rows"]
        assert (triton["peer"], triton["status"]) == ("focalkern (triton)", "skipped")
        assert "CUDA" in triton["note"] and "both_ms" not in triton
        assert (torch_row["peer"], torch_row["status"]) == ("focalkern (torch)", "ok")
        for part in ("forward_ms", "backward_ms", "both_ms"):
            times = torch_row[part]
            assert len(times["samples"]) == 2 and 0 < times["min"] <= times["median"] <= times["max"]
        assert torch_row["x_floor"] > 0 and torch_row["tokens_per_second"] > 0
        assert all(0 <= error < 0.1 for error in torch_row["errors"].values())
        assert 0 <= torch_row["extra_bytes"] < 2**28
        assert torch_row["share_of_fp32_logits"] == torch_row["extra_bytes"] / (4 * 64 * 1000)
    assert "the triton backend needs a CUDA device" in done.stdout
    assert "entries above 2^-12 per row" in done.stdout


def test_ratio_to_trl_is_printed_and_follows_from_the_medians(tmp_path, capsys):
    pytest.importorskip("trl", reason="the comparison needs TRL, which the extra `trl` installs")
    status, result = run([*QUICK, "--only", "torch", "trl"], tmp_path)
    comparison = result["comparisons"][0]
    ours, trl = comparison["rows"]
    assert (status, ours["status"], trl["status"]) == (0, "ok", "ok")
    (speed,) = comparison["speed_ratios"]
    assert (speed["peer"], speed["over"]) == ("focalkern (torch)", "TRL head")
    assert speed["ratio"] == pytest.approx(trl["both_ms"]["median"] / ours["both_ms"]["median"], rel=1e-2)
    line = f"focalkern (torch) is {speed['ratio']:.2f}x TRL's speed, forward+backward, fp32"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_frozen_head_has_no_weight_gradient(dtype, tmp_path):
    run_options = ["--dtype", dtype, "--repeats", "1", "--no-memory", "--only", "torch", "eager"]
    status, result = run([*TINY, *run_options, "--frozen-head"], tmp_path)
    assert status == 0
    for row in result["comparisons"][0]["rows"]:
        assert row["status"] == "ok" and row["errors"]["dweight"] is None and row["errors"]["dhidden"] > 0


class NoisyGradient(torch.autograd.Function):
    """Identity whose gradient is off by 1e-4, which bf16 would forgive and fp32 must not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-4 * torch.randn_like(grad))


def eager(batch: Batch, **changes: torch.Tensor) -> torch.Tensor:
    return load_eager("cpu")(dataclasses.replace(batch, **changes))


def noisy_hidden(batch: Batch) -> torch.Tensor:
    return eager(batch, hidden=NoisyGradient.apply(batch.hidden))


def noisy_weight(batch: Batch) -> torch.Tensor:
    return eager(batch, weight=NoisyGradient.apply(batch.weight))


def chosen_and_rejected_swapped(batch: Batch) -> torch.Tensor:
    half = len(batch.labels) // 2
    return eager(
        batch,
        hidden=batch.hidden.roll(half, 0),
        labels=batch.labels.roll(half, 0),
        ref_logps=batch.ref_logps.roll(half, 0),
    )


def labels_off_by_one(batch: Batch) -> torch.Tensor:
    return eager(batch, labels=batch.labels.roll(1, -1))


def not_a_number(batch: Batch) -> torch.Tensor:
    return eager(batch) * float("nan")


def no_weight_gradient(batch: Batch) -> torch.Tensor:
    return eager(batch, weight=batch.weight.detach())


def raising(batch: Batch) -> torch.Tensor:
    raise NotImplementedError("no such kernel")


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (noisy_hidden, "error of dhidden beyond"),
        (noisy_weight, "error of dweight beyond"),
        (chosen_and_rejected_swapped, "error of loss and dhidden and dweight"),
        (labels_off_by_one, "error of loss and dhidden and dweight"),
        (not_a_number, "error of loss and dhidden and dweight"),
        (no_weight_gradient, "RuntimeError"),
        (raising, "NotImplementedError: no such kernel"),
    ],
)
def test_wrong_peer_fails_without_a_time_and_others_go_on(loss, reason, tmp_path, monkeypatch, capsys):
    peers = {
        "wrong": Peer("wrong peer", lambda device_type: loss, lambda tokens, vocab: 0),
        "eager": all_peers("exact")["eager"],
    }
    monkeypatch.setattr(throughput, "all_peers", lambda backward: peers)
    _, result = run(QUICK, tmp_path)
    wrong, right = result["comparisons"][0]["rows"]
    assert wrong["status"] == "failed" and reason in wrong["note"]
    assert not {"forward_ms", "backward_ms", "both_ms", "tokens_per_second", "x_floor"} & set(wrong)
    assert right["status"] == "ok" and right["both_ms"]["median"] > 0
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "status"), [("torch", 1), ("other", 0)])
def test_exit_status_tells_of_our_own_failure(name, status, tmp_path, monkeypatch):
    peer = Peer("peer", lambda device_type: not_a_number, lambda tokens, vocab: 0)
    monkeypatch.setattr(throughput, "all_peers", lambda backward: {name: peer})
    assert run(QUICK, tmp_path)[0] == status


def test_peer_that_is_not_installed_is_skipped_with_a_note(tmp_path, monkeypatch, capsys):
    for module in ("trl", "trl.kernels", "trl.trainer.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    status, result = run([*QUICK, "--only", "trl", "eager"], tmp_path)
    rows = {row["peer"]: row for row in result["comparisons"][0]["rows"]}
    assert status == 0 and rows["eager PyTorch"]["status"] == "ok"
    assert rows["TRL head"]["status"] == "skipped" and "both_ms" not in rows["TRL head"]
    assert "cannot be imported" in rows["TRL head"]["note"]
    assert "cannot be imported" in capsys.readouterr().out


def test_peer_that_does_not_fit_into_memory_is_skipped_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "available_bytes", lambda device: 16 * 2**20)
    size = ["--hidden", "16", "--vocab", "20000", "--tokens", "64", "--pairs", "2", "--device", "cpu"]
    _, result = run(
        [*size, "--dtype", "fp32", "--repeats", "1", "--no-memory", "--only", "torch", "eager"], tmp_path
    )
    ours, eager_row = result["comparisons"][0]["rows"]
    assert ours["status"] == "ok"
    assert eager_row["status"] == "skipped" and "GiB are available" in eager_row["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "64"], "--hidden and --vocab go together"),
        (["--hidden", "64", "--vocab", "100", "--shape", "llama3-8b"], "not both"),
        (["--tokens", "100", "--pairs", "3"], "not a multiple of 2 x 3"),
        (["--tokens", "0"], "positive integer"),
        (["--shape", "gpt5"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("entries", [16, 50, 200])
def test_input_is_as_sharp_as_asked_and_its_labels_follow_the_softmax(entries):
    recipe = calibrate(Recipe(Shape("small", 64, 8192), 512, 2, torch.float32, "cpu"), entries)
    batch, sharpness = preference_batch(recipe)
    # The number varies from row to row by about its own size; calibration and sample take a hundred or more.
    assert sharpness.entries == pytest.approx(entries, rel=0.25)
    logps = (batch.hidden.flatten(0, 1) @ batch.weight.T).log_softmax(-1)[: sharpness.rows]
    assert sharpness.entries == pytest.approx(
        (logps.exp() > PRESENT).sum(-1).double().mean().item(), rel=1e-3
    )
    assert sharpness.entropy == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-3)
    # Labels drawn from the softmax have its entropy as their expected NLL.
    assert sharpness.nll == pytest.approx(sharpness.entropy, rel=0.25)
    assert f"{sharpness.entries:.0f} entries above 2^-12 per row" in str(sharpness)


def test_input_is_the_same_for_the_same_seed_only():
    recipe = Recipe(Shape("tiny", 24, 300), 48, 2, torch.bfloat16, "cpu", scale=4.0)
    first, _ = preference_batch(recipe)
    again, _ = preference_batch(recipe)
    other, _ = preference_batch(dataclasses.replace(recipe, seed=1))
    for name in ("hidden", "weight", "labels", "ref_logps"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sampled_reference_is_what_autograd_gives_on_the_whole(softcap, monkeypatch):
    monkeypatch.setattr(check, "VOCAB_PER_TILE", 128)  # 300 = 128 + 128 + 44
    monkeypatch.setattr(check, "TOKENS_PER_TILE", 20)  # 48 = 20 + 20 + 8
    batch = tiny_batch(softcap, torch.float64)
    logits = batch.hidden @ batch.weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0].sum(-1)
    chosen, rejected = (logps - batch.ref_logps.double()).chunk(2)
    losses = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected))
    dhidden, dweight = torch.autograd.grad(losses.mean(), [batch.hidden, batch.weight])

    ticks = []
    sample = check.choose_sample(batch, seed=0)
    step = check.sampled_step(batch, sample, torch.float64, ticks.append)
    assert sum(ticks) == check.ticks(batch)
    assert len(sample.rows) == 48 and len(sample.vocab) > 100
    torch.testing.assert_close(step.losses, losses)
    torch.testing.assert_close(step.dhidden, dhidden.flatten(0, 1)[sample.rows])
    torch.testing.assert_close(step.dweight, dweight[sample.vocab])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", ["torch", "eager", "trl"])
def test_peers_compute_the_same_loss_and_gradients(name, softcap):
    if name == "trl":
        pytest.importorskip("trl", reason="the comparison needs TRL, which the extra `trl` installs")
    batch = tiny_batch(softcap)
    sample = check.choose_sample(batch, seed=0)
    truth, plain = (check.sampled_step(batch, sample, dtype) for dtype in (torch.float64, torch.float32))
    loss = all_peers("exact")[name].load("cpu")(batch)
    gradients = list(torch.autograd.grad(loss, batch.differentiated()))
    found = check.errors_of(loss.detach(), gradients, sample, truth)
    assert found.exceeded(check.error_bound(truth, plain, torch.float32)) == []
    # Without the softcap the same logits are another distribution: the check must notice.
    if softcap is not None:
        batch.softcap = None
        uncapped = check.sampled_step(batch, sample, torch.float64)
        assert "dhidden" in check.errors_of(loss.detach(), gradients, sample, uncapped).exceeded(
            check.error_bound(truth, plain, torch.float32)
        )


def test_runs_alternate_between_the_steps_and_warm_up_is_left_out():
    order = []
    steps = {
        name: Step(lambda name=name: order.append(name) or name, lambda name: order.append(f"d{name}"))
        for name in ("a", "b")
    }
    steps["floor"] = Step(lambda: order.append("floor"), None)
    times = interleaved_times(steps, CPU, warmup=1, repeats=3)
    assert order == ["a", "da", "b", "db", "floor"] * 4
    for step in times.values():
        assert len(step.forward.samples) == len(step.both.samples) == 3
        assert all(0 <= f <= both for f, both in zip(step.forward.samples, step.both.samples, strict=True))
        for f, b, both in zip(step.forward.samples, step.backward.samples, step.both.samples, strict=True):
            assert f + b == pytest.approx(both)


def allocate(before: int, temporary: int, returned: int) -> PeakMemory:
    """Peak of a call that needs `temporary` MiB and returns `returned`, after one that needed `before`."""

    def call() -> list[torch.Tensor]:
        kept = torch.ones(returned * 2**20, dtype=torch.uint8)
        torch.ones(temporary * 2**20, dtype=torch.uint8)
        return [kept]

    torch.ones(before * 2**20, dtype=torch.uint8)
    return peak_extra_bytes(call, CPU)


@pytest.mark.parametrize(("before", "temporary", "returned"), [(1, 200, 1), (1, 200, 100), (300, 50, 1)])
def test_peak_memory_is_that_of_the_call_beyond_what_it_returns(before, temporary, returned):
    found = in_fresh_process(allocate, before, temporary, returned)
    if found.upper_limit:  # the system does not let a process reset its peak
        assert before > temporary and found.extra / 2**20 <= before + 5
    else:
        assert found.extra / 2**20 == pytest.approx(temporary, abs=5)


def test_eager_peer_is_charged_for_its_logits(tmp_path):
    size = ["--device", "cpu", "--hidden", "16", "--vocab", "20000", "--tokens", "512", "--pairs", "2"]
    _, result = run([*size, "--dtype", "fp32", "--repeats", "1", "--only", "eager"], tmp_path)
    (row,) = result["comparisons"][0]["rows"]
    # The logits, their gradient, and the softmax it is made of.
    assert 2.5 < row["share_of_fp32_logits"] < 3.5
    assert row["share_of_fp32_logits"] == row["extra_bytes"] / (4 * 512 * 20000)


def test_dpo_loss_is_the_one_of_the_paper():
    logps, ref_logps = torch.tensor([-1.0, -2.0, -4.0, -3.0]), torch.tensor([-1.5, -2.0, -3.0, -3.5])
    u = BETA * torch.tensor([0.5 + 1.0, 0.0 - 0.5])
    torch.testing.assert_close(dpo_loss(logps, ref_logps), torch.log1p(torch.exp(-u)).mean())
