"""The benchmark tells the truth: a wrong peer gets no time, memory and sharpness are as stated."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import focalkern
from benchmarks import check, report, throughput
from benchmarks.inputs import (
    BETA,
    PRESENT,
    UNTRAINED_STD,
    Batch,
    LogitTransform,
    Recipe,
    Sequences,
    Shape,
    calibrate,
)
from benchmarks.measure import PeakMemory, Step, in_fresh_process, interleaved_times, peak_extra_bytes
from benchmarks.peers import Peer, PeerLoss, all_peers, load_eager

SCRIPT = Path(throughput.__file__)
TINY = ["--device", "cpu", "--hidden", "48", "--vocab", "1000", "--tokens", "64", "--pairs", "2"]
TINY += ["--threads", "1"]
QUICK = [*TINY, "--dtype", "fp32", "--repeats", "2", "--no-memory"]
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("same_threads_afterwards")


def run(arguments: list[str], tmp_path: Path) -> tuple[int, dict]:
    path = tmp_path / "result.json"
    status = throughput.main([*arguments, "--json", str(path)])
    return status, json.loads(path.read_text())


def tiny_batch(transform: LogitTransform, dtype: torch.dtype = torch.float32) -> Batch:
    """Sequences of 1 to 30 tokens and a head with a bias, as a capture may have them."""
    shape = Shape("tiny", 24, 300, transform.softcap, transform.logit_scale)
    batch, _ = Recipe(shape, 48, 2, dtype, "cpu", scale=4.0).batch()
    batch.sequences = Sequences(torch.tensor([0, 12, 13, 18, 48]))
    batch.bias = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype)
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
        seconds = torch_row["both_ms"]["median"] / 1e3
        floor = comparison["bare_gemm_ms"]["median"] / 1e3
        assert torch_row["x_floor"] == pytest.approx(seconds / floor, rel=1e-2)
        assert torch_row["tokens_per_second"] == pytest.approx(64 / seconds, rel=1e-2)
        assert torch_row["tflops"]["both"] == pytest.approx(6 * 64 * 48 * 1000 / seconds / 1e12, rel=1e-2)
        assert all(0 <= error < 0.1 for error in torch_row["errors"].values())
        assert 0 <= torch_row["extra_bytes"] < 2**28
        assert torch_row["share_of_fp32_logits"] == torch_row["extra_bytes"] / (4 * 64 * 1000)
        assert 0 < torch_row["kept_share"] <= 1
    assert "the triton backend needs a CUDA device" in done.stdout
    assert "entries above 2^-12 per row" in done.stdout


@pytest.mark.parametrize(
    ("name", "over", "owner"),
    [
        ("trl", "TRL head", "TRL's"),
        ("eager", "eager PyTorch", "eager PyTorch's"),
        ("torch-exact", "focalkern (torch, exact)", "focalkern (torch, exact)'s"),
    ],
)
def test_ratio_to_a_peer_is_printed_and_follows_from_the_medians(name, over, owner, tmp_path, capsys):
    if name == "trl":
        pytest.importorskip("trl", reason="the comparison needs TRL, which the extra `trl` installs")
    status, result = run([*QUICK, "--only", "torch", name], tmp_path)
    comparison = result["comparisons"][0]
    ours, other = comparison["rows"]
    assert (status, ours["status"], other["status"]) == (0, "ok", "ok")
    assert 0 < ours["kept_share"] <= 1 and "kept_share" not in other
    (speed,) = comparison["speed_ratios"]
    assert (speed["peer"], speed["over"]) == ("focalkern (torch)", over)
    assert speed["ratio"] == pytest.approx(other["both_ms"]["median"] / ours["both_ms"]["median"], rel=1e-2)
    line = f"focalkern (torch) is {speed['ratio']:.2f}x {owner} speed, forward+backward, fp32"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_frozen_head_has_no_weight_gradient(dtype, tmp_path):
    run_options = ["--dtype", dtype, "--repeats", "1", "--no-memory", "--only", "torch", "eager"]
    status, result = run([*TINY, *run_options, "--head", "frozen"], tmp_path)
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


def eager(batch: Batch, **changes: torch.Tensor) -> PeerLoss:
    return load_eager("cpu")(dataclasses.replace(batch, **changes))


def noisy_hidden(batch: Batch) -> PeerLoss:
    return eager(batch, hidden=NoisyGradient.apply(batch.hidden))


def noisy_weight(batch: Batch) -> PeerLoss:
    return eager(batch, weight=NoisyGradient.apply(batch.weight))


def chosen_and_rejected_swapped(batch: Batch) -> PeerLoss:
    tokens, pairs = len(batch.labels), len(batch.ref_logps) // 2
    return eager(
        batch,
        hidden=batch.hidden.roll(tokens // 2, 0),
        labels=batch.labels.roll(tokens // 2, 0),
        ref_logps=batch.ref_logps.roll(pairs, 0),
    )


def labels_off_by_one(batch: Batch) -> PeerLoss:
    return eager(batch, labels=batch.labels.roll(1))


def sequences_off_by_one(batch: Batch) -> PeerLoss:
    shifted = torch.cat([batch.sequences.cu_seqlens[:1], batch.sequences.cu_seqlens[1:-1] + 1])
    return eager(batch, sequences=Sequences(torch.cat([shifted, batch.sequences.cu_seqlens[-1:]])))


def not_a_number(batch: Batch) -> PeerLoss:
    return PeerLoss(eager(batch).loss * float("nan"))


def no_weight_gradient(batch: Batch) -> PeerLoss:
    return eager(batch, weight=batch.weight.detach())


def raising(batch: Batch) -> PeerLoss:
    raise NotImplementedError("no such kernel")


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (noisy_hidden, "error of dhidden beyond"),
        (noisy_weight, "error of dweight beyond"),
        (chosen_and_rejected_swapped, "error of loss and dhidden and dweight"),
        (labels_off_by_one, "error of loss and dhidden and dweight"),
        (sequences_off_by_one, "error of loss and dhidden and dweight"),
        (not_a_number, "error of loss and dhidden and dweight"),
        (no_weight_gradient, "RuntimeError"),
        (raising, "NotImplementedError: no such kernel"),
    ],
)
def test_wrong_peer_fails_without_a_time_and_others_go_on(loss, reason, tmp_path, monkeypatch, capsys):
    peers = {
        "wrong": Peer("wrong peer", lambda device_type: loss, lambda tokens, vocab: 0),
        "eager": all_peers()["eager"],
    }
    monkeypatch.setattr(throughput, "all_peers", lambda tau="auto": peers)
    _, result = run(QUICK, tmp_path)
    wrong, right = result["comparisons"][0]["rows"]
    assert wrong["status"] == "failed" and reason in wrong["note"]
    assert not {"forward_ms", "backward_ms", "both_ms", "tokens_per_second", "x_floor"} & set(wrong)
    assert right["status"] == "ok" and right["both_ms"]["median"] > 0
    assert "failed" in capsys.readouterr().out


WRONG = {
    "gradients too long": lambda loss, gradients: (loss, [1.03 * gradient for gradient in gradients]),
    "gradients too short": lambda loss, gradients: (loss, [gradient / 1.03 for gradient in gradients]),
    "dweight too long": lambda loss, gradients: (loss, [gradients[0], 1.03 * gradients[1]]),
    "loss too large": lambda loss, gradients: (1.05 * loss, gradients),
    "loss too small": lambda loss, gradients: (loss / 1.05, gradients),
}


@pytest.mark.parametrize("entries", [16, 50, None])
@pytest.mark.parametrize("name", ["torch", "torch-exact", "eager", "trl", "liger"])
def test_in_bf16_a_peer_passes_and_the_same_off_by_a_few_percent_does_not(name, entries):
    pytest.importorskip(
        {"trl": "trl", "liger": "liger_kernel"}.get(name, "torch"), reason="the extra `bench` has it"
    )
    recipe = Recipe(Shape("small", 64, 4096), 256, 4, torch.bfloat16, "cpu", scale=None)
    batch, _ = (calibrate(recipe, entries) if entries else recipe).batch()
    batch.requires_grad_(frozen_head=False)
    sample = check.choose_sample(batch, seed=0)
    truth, plain = (check.sampled_step(batch, sample, dtype) for dtype in (torch.float64, torch.bfloat16))
    bound = check.error_bound(check.plain_errors(truth, plain), torch.bfloat16)

    def step(batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = all_peers()[name].load("cpu")(batch).loss
        return loss.detach(), list(torch.autograd.grad(loss, batch.differentiated()))

    right = step(batch)
    steps = {what: change(*right) for what, change in WRONG.items()}
    beta = dataclasses.replace(batch.objective, beta=0.11)
    steps["beta too large"] = step(dataclasses.replace(batch, objective=beta))
    assert check.errors_of(*right, sample, truth).verdict(bound) == ""
    passed = [
        what for what, found in steps.items() if not check.errors_of(*found, sample, truth).verdict(bound)
    ]
    assert passed == []


def with_gradient(x: torch.Tensor, change) -> torch.Tensor:
    """A copy of x whose gradient is changed in place."""
    copy = x * 1
    copy.register_hook(lambda gradient: change(gradient.clone()))
    return copy


def test_scale_is_in_the_report_and_in_the_verdict(tmp_path, monkeypatch, capsys):
    def too_long(batch: Batch) -> PeerLoss:
        return eager(batch, weight=with_gradient(batch.weight, lambda gradient: gradient.mul_(1.02)))

    peers = {"long": Peer("long", lambda device_type: too_long, lambda tokens, vocab: 0)}
    monkeypatch.setattr(throughput, "all_peers", lambda tau="auto": peers | {"eager": all_peers()["eager"]})
    _, result = run([*TINY, "--dtype", "bf16", "--repeats", "1", "--no-memory"], tmp_path)
    (comparison,) = result["comparisons"]
    long, right = comparison["rows"]
    assert (right["status"], long["status"]) == ("ok", "failed")
    assert long["note"] == "wrong: error of scale of dweight beyond the bound"
    assert long["scale_errors"]["dweight"] - right["scale_errors"]["dweight"] == pytest.approx(0.02, rel=0.1)
    assert comparison["scale_error_bound"] == {"loss": 0.02, "dhidden": 0.01, "dweight": 0.01}
    assert comparison["plain_pytorch_scale_errors"] == pytest.approx(right["scale_errors"], abs=1e-3)
    assert "scale within 0.01 (loss 0.02)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["hidden", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_wrong_last_row_of_a_gradient_fails(name, value, tmp_path, monkeypatch):
    def last_row_wrong(batch: Batch) -> PeerLoss:
        def change(gradient: torch.Tensor) -> torch.Tensor:
            gradient[-1] = value
            return gradient

        return eager(batch, **{name: with_gradient(getattr(batch, name), change)})

    peers = {"wrong": Peer("wrong", lambda device_type: last_row_wrong, lambda tokens, vocab: 0)}
    monkeypatch.setattr(throughput, "all_peers", lambda tau="auto": peers)
    monkeypatch.setattr(check, "HIDDEN_ROWS", 4)
    monkeypatch.setattr(check, "VOCAB_ROWS", 16)
    (row,) = run(QUICK, tmp_path)[1]["comparisons"][0]["rows"]
    assert row["status"] == "failed" and f"error of d{name}" in row["note"]
    assert (f"NaN or infinity in d{name}" in row["note"]) == (value != 0)


def test_nan_outside_the_sample_is_seen():
    batch = tiny_batch(LogitTransform())
    sample = check.Sample(rows=torch.arange(4), vocab=torch.arange(8))
    truth, plain = (check.sampled_step(batch, sample, dtype) for dtype in (torch.float64, torch.float32))
    bound = check.error_bound(check.plain_errors(truth, plain), torch.float32)
    loss = eager(batch).loss
    gradients = list(torch.autograd.grad(loss, batch.differentiated()))
    assert check.errors_of(loss.detach(), gradients, sample, truth).verdict(bound) == ""
    gradients[1][200, 3] = float("nan")
    found = check.errors_of(loss.detach(), gradients, sample, truth)
    assert found.exceeded(bound) == [] and found.verdict(bound) == "wrong: NaN or infinity in dweight"


def test_sample_has_the_ends_and_the_rows_at_the_edges_of_tiles():
    batch, _ = Recipe(Shape("tiny", 8, 2100), 2052, 2, torch.float32, "cpu", scale=4.0).batch()
    sample = check.choose_sample(batch, seed=0)
    assert {0, 127, 128, 2047, 2048, 2051} <= set(sample.rows.tolist())
    assert {0, 127, 128, 2047, 2048, 2099} <= set(sample.vocab.tolist())
    assert len(sample.rows) <= check.HIDDEN_ROWS + 6 and len(sample.vocab) <= check.VOCAB_ROWS + 6


@pytest.mark.parametrize(("name", "status"), [("torch", 1), ("torch-exact", 1), ("other", 0)])
def test_exit_status_tells_of_our_own_failure(name, status, tmp_path, monkeypatch):
    peer = Peer("peer", lambda device_type: not_a_number, lambda tokens, vocab: 0)
    monkeypatch.setattr(throughput, "all_peers", lambda tau="auto": {name: peer})
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
        (["--sharpness", "50", "round"], "invalid"),
        (["--saturated", "1"], "at least 0 and below 1"),
        (["--saturated", "0.5", "--pairs", "1"], "none can be saturated"),
        (["--tau", "-0.1"], "auto or a number of at least 0"),
        (["--saturated", "0.5", "--loss", "dpo", "simpo"], "the score of simpo does not have"),
        (["--loss", "ipo"], "invalid choice"),
        (["--head", "warm"], "invalid choice"),
        (["--max-tokens", "0"], "a number of GiB above 0"),
        (["--launch-table", "missing.json"], "there is no file missing.json"),
        (["--launch-table", __file__], "the triton peers, which need a CUDA device"),
        (["--json", str(Path(__file__).parent)], "is a folder, expected a file"),
        (["--tokens", "64", "128", "--plot", __file__], "is a file, expected a folder"),
        (["--plot", "plots"], "several values of --tokens or --sharpness"),
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
    batch, sharpness = recipe.batch()
    # The number varies from row to row by about its own size; calibration and sample take a hundred or more.
    assert sharpness.entries == pytest.approx(entries, rel=0.25)
    logps = (batch.hidden @ batch.weight.T).log_softmax(-1)
    assert sharpness.rows == len(logps) == 512
    assert sharpness.entries == pytest.approx(
        (logps.exp() > PRESENT).sum(-1).double().mean().item(), rel=1e-3
    )
    assert sharpness.entropy == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-3)
    # Labels drawn from the softmax have its entropy as their expected NLL.
    assert sharpness.nll == pytest.approx(sharpness.entropy, rel=0.25)
    assert f"{sharpness.entries:.0f} entries above 2^-12 per row" in str(sharpness)


def test_input_is_the_same_for_the_same_seed_only():
    recipe = Recipe(Shape("tiny", 24, 300), 48, 2, torch.bfloat16, "cpu", scale=4.0)
    first, _ = recipe.batch()
    again, _ = recipe.batch()
    other, _ = dataclasses.replace(recipe, seed=1).batch()
    for name in ("hidden", "weight", "labels", "ref_logps"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


TRANSFORMS = [LogitTransform(), LogitTransform(softcap=5.0), LogitTransform(softcap=5.0, logit_scale=0.5)]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_sampled_reference_is_what_autograd_gives_on_the_whole(transform, monkeypatch):
    monkeypatch.setattr(check, "VOCAB_PER_TILE", 128)  # 300 = 128 + 128 + 44
    monkeypatch.setattr(check, "TOKENS_PER_TILE", 20)  # 48 = 20 + 20 + 8
    batch = tiny_batch(transform, torch.float64)
    logits = (batch.hidden @ batch.weight.T + batch.bias) * transform.logit_scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    per_token = logits.log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
    logps = torch.stack([sequence.sum() for sequence in per_token.split([12, 1, 5, 30])])
    chosen, rejected = (logps - batch.ref_logps.double()).chunk(2)
    losses = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected))
    dhidden, dweight = torch.autograd.grad(losses.mean(), [batch.hidden, batch.weight])

    ticks = []
    sample = check.choose_sample(batch, seed=0)
    step = check.sampled_step(batch, sample, torch.float64, ticks.append)
    assert sum(ticks) == check.ticks(batch)
    assert len(sample.rows) == 48 and len(sample.vocab) > 100
    torch.testing.assert_close(step.losses, losses)
    torch.testing.assert_close(step.dhidden, dhidden[sample.rows])
    torch.testing.assert_close(step.dweight, dweight[sample.vocab])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["torch", "torch-exact", "eager", "trl"])
def test_peers_compute_the_same_loss_and_gradients(name, transform):
    if name == "trl":
        pytest.importorskip("trl", reason="the comparison needs TRL, which the extra `trl` installs")
    batch = tiny_batch(transform)
    sample = check.choose_sample(batch, seed=0)
    truth, plain = (check.sampled_step(batch, sample, dtype) for dtype in (torch.float64, torch.float32))
    loss = all_peers()[name].load("cpu")(batch).loss
    gradients = list(torch.autograd.grad(loss, batch.differentiated()))
    found = check.errors_of(loss.detach(), gradients, sample, truth)
    bound = check.error_bound(check.plain_errors(truth, plain), torch.float32)
    assert found.exceeded(bound) == []
    # Without the transform the same logits are another distribution: the check must notice.
    if transform != LogitTransform():
        batch.transform = LogitTransform()
        untransformed = check.sampled_step(batch, sample, torch.float64)
        assert "dhidden" in check.errors_of(loss.detach(), gradients, sample, untransformed).exceeded(bound)


def test_sequences_are_summed_each_by_itself_and_padding_takes_no_part():
    sequences = Sequences(torch.tensor([0, 2, 2, 3, 7]))
    per_token = torch.arange(1.0, 8.0, requires_grad=True)
    assert sequences.sums(per_token).tolist() == [3, 0, 3, 22]
    (slope,) = torch.autograd.grad(sequences.sums(per_token) @ torch.tensor([1.0, 2.0, 3.0, 4.0]), per_token)
    assert slope.tolist() == sequences.per_token(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    assert slope.tolist() == [1, 1, 3, 4, 4, 4, 4]


def test_untrained_input_has_small_logits_and_an_almost_flat_softmax():
    recipe = Recipe(Shape("small", 256, 8192), 128, 2, torch.float32, "cpu", scale=None)
    batch, sharpness = recipe.batch()
    logits = batch.hidden @ batch.weight.T
    assert logits.std().item() == pytest.approx(UNTRAINED_STD * 256**0.5, rel=0.05)
    assert sharpness.entropy > math.log(8192) - 0.1
    assert recipe.about()["kind"] == "untrained"


def test_each_sharpness_is_a_comparison_and_the_summary_has_them_all(tmp_path, capsys):
    status, result = run([*QUICK, "--sharpness", "16", "flat", "--only", "torch", "eager"], tmp_path)
    sharp, flat = result["comparisons"]
    assert status == 0
    assert (sharp["input"]["kind"], flat["input"]["kind"]) == ("LM-like", "untrained")
    assert sharp["input"]["entropy"] < flat["input"]["entropy"]
    summary = capsys.readouterr().out.split("on all inputs")[1]
    assert "fp32, LM-like" in summary and "fp32, untrained" in summary and "x eager" in summary


def test_errors_stand_beside_those_of_plain_pytorch_in_the_same_dtype(tmp_path, capsys):
    options = ["--dtype", "bf16", "--repeats", "1", "--no-memory", "--only", "torch-exact"]
    _, result = run([*TINY, *options], tmp_path)
    comparison = result["comparisons"][0]
    (ours,) = comparison["rows"]
    for name in ("dhidden", "dweight"):
        plain = comparison["plain_pytorch_errors"][name]
        # Logits rounded to bf16 cost more than a dz rounded to bf16.
        assert 0 < ours["errors"][name] < plain
        assert comparison["error_bound"][name] == pytest.approx(
            check.ERROR_FACTOR * max(plain, torch.finfo(torch.bfloat16).eps)
        )
    assert "bf16 logits and bf16 dz, as TRL computes" in capsys.readouterr().out


def test_saturated_pairs_have_next_to_no_gradient():
    recipe = Recipe(Shape("tiny", 24, 300), 48, 4, torch.float32, "cpu", scale=4.0)
    batch, _ = recipe.batch(saturated_pairs=3)
    loss = load_eager("cpu")(batch.requires_grad_(frozen_head=True)).loss
    (dhidden,) = torch.autograd.grad(loss, batch.differentiated())
    per_pair = dhidden.view(2, 4, -1).norm(dim=(0, 2))
    assert (per_pair[:3] < 1e-6 * per_pair[3]).all()


@pytest.mark.parametrize(("share", "pairs", "count"), [(0, 4, 0), (0.01, 4, 1), (0.75, 4, 3), (0.99, 4, 3)])
def test_saturated_share_is_rounded_to_whole_pairs_and_never_to_all(share, pairs, count):
    assert throughput.saturated_pairs(share, pairs) == count


def test_saturation_is_stated_and_lowers_the_kept_share(tmp_path, capsys):
    options = ["--pairs", "4", "--saturated", "0", "0.75", "--only", "torch"]
    status, result = run([*QUICK, *options], tmp_path)
    without, with_saturated = result["comparisons"]
    assert status == 0
    assert (without["saturated_pairs"], with_saturated["saturated_pairs"]) == (0, 3)
    assert with_saturated["rows"][0]["kept_share"] <= without["rows"][0]["kept_share"]
    out = capsys.readouterr().out
    assert out.count("pairs saturated") == out.count("3 of 4 pairs saturated, at u = 20") == 1


def test_tau_is_handed_to_the_loss_in_every_mode(tmp_path, monkeypatch):
    asked = []

    class Spy(focalkern.FusedFocalPOLoss):
        def __init__(self, **options):
            asked.append((options["backward"], options["tau"]))
            super().__init__(**options)

    monkeypatch.setattr(focalkern, "FusedFocalPOLoss", Spy)
    _, result = run([*QUICK, "--tau", "0.001", "--only", "torch", "torch-exact"], tmp_path)
    assert asked == [("certified", 0.001), ("exact", 0.001)] and result["tau"] == 0.001


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


def test_a_coarser_threshold_is_held_to_the_error_of_the_dtype_it_belongs_to():
    scale = check.Scale(2e-2, 1e-4, 5e-2)
    bound = check.Bound(check.Errors(loss=1e-6, dhidden=6e-6, dweight=5e-2), scale, check.Scale())
    loosened = bound.at_tau(2.0**-13)
    assert loosened.errors == check.Errors(1e-6, check.ERROR_FACTOR * torch.finfo(torch.bfloat16).eps, 5e-2)
    assert loosened.scale == check.Scale(2e-2, check.SCALE_LIMIT[torch.bfloat16], 5e-2)
    assert bound.at_tau(0.0) == bound
    frozen = check.Bound(check.Errors(1e-6, 6e-6, None), check.Scale(2e-2, 1e-4, None), check.Scale())
    assert frozen.at_tau(2.0**-13).errors.dweight is frozen.at_tau(2.0**-13).scale.dweight is None


def test_commit_is_marked_when_what_runs_has_changed_and_only_then(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.commit() is None  # not a repository
    result, code = tmp_path / "benchmarks/results/cpu.json", tmp_path / "code.py"
    result.parent.mkdir(parents=True)
    for file in (result, code):
        file.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    clean = report.commit()
    assert len(clean) == 40
    result.write_text("2")
    assert report.commit() == clean
    code.write_text("2")
    assert report.commit() == f"{clean}-dirty"
