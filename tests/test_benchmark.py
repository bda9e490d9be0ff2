"""What the benchmark rests on: the float64 gate, the peers, the input, interleaved times and peak memory."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import subprocess

import pytest
import torch

from benchmarks import check, inputs, report
from benchmarks.check import Gate
from benchmarks.inputs import OBJECTIVES, PRESENT, Batch, Recipe, Sequences, Shape, calibrate
from benchmarks.measure import PeakMemory, Step, in_fresh_process, interleaved_times, peak_extra_bytes
from benchmarks.peers import PEERS, Unavailable, compiler_problem
from focalkern import FusedFocalPOLoss
from focalkern.records import LogitTransform
from focalkern.reference import linear_logps

CPU = torch.device("cpu")
PLAIN, CAPPED = LogitTransform(), LogitTransform(softcap=5.0)
SCALED = LogitTransform(softcap=5.0, logit_scale=0.5)
PACKAGES = {"trl": "trl", "liger": "liger_kernel", "cce-compile": "cut_cross_entropy"}


def tiny_batch(transform: LogitTransform = PLAIN, dtype=torch.float32, bias: bool = True) -> Batch:
    """Sequences of 1 to 30 tokens and a head with a bias, as a capture may have them."""
    shape = Shape("tiny", 24, 300, transform.softcap, transform.logit_scale)
    batch = Recipe(shape, 48, 2, dtype, "cpu", scale=4.0).batch()
    batch.sequences = Sequences(torch.tensor([0, 12, 13, 18, 48]))
    batch.bias = torch.linspace(-1, 1, 300).to(dtype) if bias else None
    return batch


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
    head = (batch.hidden, batch.weight, batch.labels, batch.bias)
    per_token = linear_logps(*head, **transform._asdict())["logps"]
    logps = torch.stack([sequence.sum() for sequence in per_token.split([12, 1, 5, 30])])
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
def test_in_bf16_a_peer_passes_and_the_same_off_by_a_few_percent_does_not(name, entries):
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
    batch.objective = FusedFocalPOLoss.dpo(beta=0.11)
    assert gate.verdict(gate.errors(*step(name, batch)))


def test_nan_outside_the_sample_is_seen(monkeypatch):
    monkeypatch.setattr(check, "VOCAB_ROWS", 16)
    batch = tiny_batch()
    gate = Gate(batch)
    loss, gradients = step("eager", batch)
    outside = next(row for row in range(300) if row not in gate.vocab.tolist())
    gradients["dweight"][outside, 3] = torch.nan
    assert gate.verdict(gate.errors(loss, gradients)) == "wrong: error of dweight beyond the bound"


def test_pairs_that_differ_by_rounding_alone_have_no_adaptive_margin():
    logps, lengths = torch.tensor([-10.0, -12.0, -20.0, -9.0]), torch.tensor([5, 4, 8, 3])
    ref_logps = logps * (1 + torch.tensor([1e-7, 0.0, 0.0, 1e-7]))
    losses = inputs.losses_by_formula(OBJECTIVES["alpha-dpo"], logps, ref_logps, lengths)
    without = FusedFocalPOLoss.alpha_dpo(alpha=0.0)
    torch.testing.assert_close(losses, inputs.losses_by_formula(without, logps, logps, lengths))


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
    for loss, batch in itertools.product(OBJECTIVES, batches):
        batch.objective = OBJECTIVES[loss]
        if name == "liger" and loss in ("focalpo", "alpha-dpo"):
            with pytest.raises(Unavailable, match="Liger has no FocalPO and no alpha-DPO"):
                step(name, batch)
            continue
        gate = Gate(batch)
        assert gate.verdict(gate.errors(*step(name, batch))) == "", loss


@pytest.mark.parametrize(
    ("name", "transform", "reason"),
    [
        ("liger", CAPPED, "no softcap"),
        ("torch-lce", CAPPED, "no softcap"),
        ("torch-lce-rows", LogitTransform(logit_scale=0.5), "no logit scale"),
        ("cce-compile", PLAIN, "no bias"),
    ],
)
def test_peer_that_lacks_what_the_head_needs_says_so(name, transform, reason):
    require(name)
    with pytest.raises(Unavailable, match=reason):
        step(name, tiny_batch(transform))


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


def test_saturated_pairs_have_next_to_no_gradient():
    shape, saturated, frozen_head = Shape("tiny", 24, 300), 3, True
    recipe = Recipe(shape, 48, 4, torch.float32, "cpu", saturated, frozen_head, scale=4.0)
    _, gradients = step("eager", recipe.batch())
    assert list(gradients) == ["dhidden"]
    per_pair = gradients["dhidden"].view(2, 4, -1).norm(dim=(0, 2))
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
