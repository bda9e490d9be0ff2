"""What the benchmark rests on: the float64 gate, the input, interleaved times, and peak memory."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import subprocess

import pytest
import torch

from benchmarks import check, report
from benchmarks.check import Gate
from benchmarks.inputs import BETA, PRESENT, Batch, LogitTransform, Recipe, Sequences, Shape, calibrate
from benchmarks.measure import PeakMemory, Step, in_fresh_process, interleaved_times, peak_extra_bytes
from benchmarks.peers import PEERS
from focalkern.reference import linear_logps

CPU = torch.device("cpu")
PLAIN, CAPPED = LogitTransform(), LogitTransform(softcap=5.0)
SCALED = LogitTransform(softcap=5.0, logit_scale=0.5)


def tiny_batch(transform: LogitTransform = PLAIN, dtype=torch.float32, bias: bool = True) -> Batch:
    """Sequences of 1 to 30 tokens and a head with a bias, as a capture may have them."""
    shape = Shape("tiny", 24, 300, transform.softcap, transform.logit_scale)
    batch, _ = Recipe(shape, 48, 2, dtype, "cpu", scale=4.0).batch()
    batch.sequences = Sequences(torch.tensor([0, 12, 13, 18, 48]))
    batch.bias = torch.linspace(-1, 1, 300).to(dtype) if bias else None
    return batch.requires_grad_(frozen_head=False)


def step(name: str, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of a peer."""
    loss = PEERS[name].loss(batch).loss
    return loss.detach(), list(torch.autograd.grad(loss, batch.differentiated()))


@pytest.mark.parametrize("transform", [PLAIN, CAPPED, SCALED])
def test_reference_is_what_autograd_gives_on_the_whole(transform, monkeypatch):
    monkeypatch.setattr(check, "LOGITS_AT_ONCE", 20 * 300)  # 48 = 20 + 20 + 8
    batch = tiny_batch(transform, torch.float64)
    head = (batch.hidden, batch.weight, batch.labels, batch.bias)
    per_token = linear_logps(*head, **transform._asdict())["logps"]
    logps = torch.stack([sequence.sum() for sequence in per_token.split([12, 1, 5, 30])])
    chosen, rejected = (logps - batch.ref_logps.double()).chunk(2)
    losses = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected))
    dhidden, dweight = torch.autograd.grad(losses.mean(), [batch.hidden, batch.weight])

    gate = Gate(batch)
    assert len(gate.rows) == 48 and len(gate.vocab) > 100
    torch.testing.assert_close(gate.truth.losses, losses)
    torch.testing.assert_close(gate.truth.dhidden, dhidden[gate.rows])
    torch.testing.assert_close(gate.truth.dweight, dweight[gate.vocab])


WRONG = {
    "too long": lambda loss, gradients: (loss, [1.03 * gradient for gradient in gradients]),
    "dweight too short": lambda loss, gradients: (loss, [gradients[0], gradients[1] / 1.03]),
    "loss too large": lambda loss, gradients: (1.05 * loss, gradients),
    "loss too small": lambda loss, gradients: (loss / 1.05, gradients),
}


@pytest.mark.parametrize(
    ("name", "entries"), [("torch", 16), ("torch", None), ("torch-exact", 50), ("eager", 16), ("trl", 50)]
)
def test_in_bf16_a_peer_passes_and_the_same_off_by_a_few_percent_does_not(name, entries):
    pytest.importorskip("trl" if name == "trl" else "torch", reason="extra `bench`")
    recipe = Recipe(Shape("small", 64, 4096), 256, 4, torch.bfloat16, "cpu", scale=None)
    batch, _ = (calibrate(recipe, entries) if entries else recipe).batch()
    gate = Gate(batch.requires_grad_(frozen_head=False))
    right = step(name, batch)
    assert gate.verdict(gate.errors(*right)) == ""
    steps = {what: change(*right) for what, change in WRONG.items()}
    beta = dataclasses.replace(batch.objective, beta=0.11)
    steps["beta too large"] = step(name, dataclasses.replace(batch, objective=beta))
    assert [what for what, found in steps.items() if not gate.verdict(gate.errors(*found))] == []


def test_nan_outside_the_sample_is_seen(monkeypatch):
    monkeypatch.setattr(check, "VOCAB_ROWS", 16)
    batch = tiny_batch()
    gate = Gate(batch)
    loss, gradients = step("eager", batch)
    outside = next(row for row in range(300) if row not in gate.vocab.tolist())
    gradients[1][outside, 3] = torch.nan
    assert gate.verdict(gate.errors(loss, gradients)) == "wrong: error of dweight beyond the bound"


@pytest.mark.parametrize("entries", [16, 200])
def test_input_is_as_sharp_as_asked_and_its_labels_follow_the_softmax(entries):
    recipe = calibrate(Recipe(Shape("small", 64, 8192), 512, 2, torch.float32, "cpu"), entries)
    batch, sharpness = recipe.batch()
    # The number varies from row to row by about its own size; calibration and sample take a hundred or more.
    assert sharpness.entries == pytest.approx(entries, rel=0.25)
    logps = (batch.hidden @ batch.weight.T).log_softmax(-1)
    present = (logps.exp() > PRESENT).sum(-1).double().mean().item()
    assert sharpness.entries == pytest.approx(present, rel=1e-3)
    assert sharpness.entropy == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-3)
    # Labels drawn from the softmax have its entropy as their expected NLL.
    assert sharpness.nll == pytest.approx(sharpness.entropy, rel=0.25)


def test_saturated_pairs_have_next_to_no_gradient():
    batch, _ = Recipe(Shape("tiny", 24, 300), 48, 4, torch.float32, "cpu", scale=4.0).batch(saturated_pairs=3)
    _, (dhidden,) = step("eager", batch.requires_grad_(frozen_head=True))
    per_pair = dhidden.view(2, 4, -1).norm(dim=(0, 2))
    assert (per_pair[:3] < 1e-6 * per_pair[3]).all()


def test_runs_alternate_and_one_that_fails_takes_no_further_part():
    order = []

    def run(name: str) -> str:
        order.append(name)
        if name == "c" and order.count("c") == 2:
            raise RuntimeError("boom")
        return name

    steps = {name: Step(lambda name=name: run(name), lambda name: order.append(f"d{name}")) for name in "ab"}
    steps["c"] = Step(lambda: run("c"), guard=lambda: contextlib.suppress(RuntimeError))
    times = interleaved_times(steps, CPU, 1, 3)
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
    return peak_extra_bytes(call, CPU)


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
