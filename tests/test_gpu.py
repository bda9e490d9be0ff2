"""What only a CUDA device can show: bf16 on tensor cores, shapes past 2^31 logits, no host synchronisation,
and the two backends side by side.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tolerance import assert_as_accurate, relative_error

from csrc_triton import launch
from focalkern import (
    CosineGamma,
    FusedFocalPOLoss,
    FusedPairLoss,
    LowRankUpdate,
    linear_kl,
    linear_logps,
    reference,
)
from focalkern.backends import triton_tma
from focalkern.methods import ipo

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_batch(dtype, pairs=4, length=300, hidden_size=1024, vocab_size=32000, sharpness=4.0, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(2 * pairs, length, hidden_size, device="cuda", generator=generator)
    weight = torch.randn(vocab_size, hidden_size, device="cuda", generator=generator)
    weight *= sharpness / hidden_size**0.5
    labels = torch.randint(vocab_size, (2 * pairs, length), device="cuda", generator=generator)
    labels[:, : length // 3] = -100
    ref_logps = -3.0 * length + torch.randn(2, pairs, device="cuda", generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, ref_logps


def loss_and_gradients(loss_fn, hidden, weight, labels, ref_logps):
    hidden.grad = weight.grad = None
    out = loss_fn(hidden, weight, labels, None, *ref_logps)
    out.loss.backward()
    return out.losses.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_are_as_accurate_as_plain_pytorch(dtype):
    hidden, weight, labels, ref_logps = make_batch(dtype)
    actual = loss_and_gradients(FusedFocalPOLoss(backend="triton"), hidden, weight, labels, ref_logps)

    def plain(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        losses = reference.focalpo_loss(
            *inputs, labels, None, *ref_logps.to(losses_dtype(dtype)), beta=0.1, gamma=0.05
        )
        losses.mean().backward()
        return losses.detach(), *(x.grad for x in inputs)

    def losses_dtype(dtype):
        return torch.float64 if dtype == torch.float64 else torch.float32

    naive, exact = plain(dtype), plain(torch.float64)
    for name, a, b, c in zip(("losses", "dhidden", "dweight"), actual, naive, exact, strict=True):
        assert_as_accurate(a, b, c, name, conditioning=100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "temperature": 0.7, "logit_scale": 1.5}], ids=str)
def test_both_backends_agree(dtype, options):
    batch = make_batch(dtype, pairs=2, length=150)
    results = [
        loss_and_gradients(FusedFocalPOLoss(backend=name, **options), *batch) for name in ("triton", "torch")
    ]
    for triton_value, torch_value in zip(*results, strict=True):
        # Both form fp32 logits; they differ by the rounding of dz and of the result to the dtype.
        assert relative_error(triton_value, torch_value) <= 4 * torch.finfo(dtype).eps + 1e-5


def last_rows_against_float64(hidden, weight, labels, last=8):
    """Log-probs and dhidden of the last rows, when each log-prob has gradient 1."""
    rows = hidden[-last:].detach().double().requires_grad_()
    z = torch.cat([rows @ block.double().T for block in weight.detach().split(2**14)], dim=-1)
    logps = z.log_softmax(-1).gather(-1, labels[-last:, None]).squeeze(-1)
    (dhidden,) = torch.autograd.grad(logps.sum(), rows)
    return logps.detach(), dhidden


@pytest.mark.parametrize(
    ("n", "vocab_size", "hidden_size"),
    [(2**20 + 8, 2**18 + 256, 64), (64, 2**18 + 256, 2**13)],
    ids=["block statistics [n, V/128]", "weight and dweight [V, H]"],
)
def test_tensors_of_more_than_2_to_the_31_elements(n, vocab_size, hidden_size):
    """Row × stride must not be formed in 32 bits: the last rows and columns would land elsewhere."""
    assert max(n * (vocab_size // 128), vocab_size * hidden_size) > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": generator, "dtype": torch.bfloat16}
    hidden = torch.randn(n, hidden_size, **options).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, **options) / hidden_size**0.5).requires_grad_()
    labels = torch.randint(vocab_size - 100, vocab_size, (n,), device="cuda", generator=generator)
    result = linear_logps(hidden, weight, labels, backend="triton")
    result.logps.sum().backward()

    logps, dhidden = last_rows_against_float64(hidden, weight, labels)
    # fp32 sums of 2^13 products; dz and dhidden rounded to bf16 once each.
    assert relative_error(result.logps[-8:], logps) < 1e-5
    assert relative_error(hidden.grad[-8:], dhidden) < 2 * torch.finfo(torch.bfloat16).eps
    # Only the last 100 entries are labels, and each label's row of dweight is large.
    assert weight.grad[-100:].float().norm() > weight.grad[:100].float().norm()


def test_hidden_of_more_than_2_to_the_31_elements():
    n, hidden_size, vocab_size = 2**15 + 8, 2**16, 256
    assert n * hidden_size > 2**31
    hidden = torch.randn(n, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, device="cuda") / 256).bfloat16()
    labels = torch.full((n,), -100, device="cuda")
    labels[-8:] = 3
    result = linear_logps(hidden, weight, labels, backend="triton")
    result.logps.sum().backward()
    row = hidden[-8:].detach().double().requires_grad_()
    exact = reference.linear_logps(row, weight.double(), labels[-8:])
    exact["logps"].sum().backward()
    assert relative_error(result.logps[-8:], exact["logps"]) < 1e-4
    assert relative_error(hidden.grad[-8:], row.grad) < 2 * torch.finfo(torch.bfloat16).eps
    assert not hidden.grad[:-8].any()


LOSSES = {
    "FocalPO": partial(FusedFocalPOLoss, length_normalize=True),
    "α-DPO with γ(t)": partial(FusedFocalPOLoss.alpha_dpo, gamma=CosineGamma(10)),
    "IPO": partial(FusedPairLoss, ipo),
}


def waits_for_the_device(step) -> list[str]:
    """Messages of the synchronisations in a second call of `step`."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", ["padded", "shift", "packed"])
@pytest.mark.parametrize(("backward", "allowed"), [("exact", 0), ("certified", 1)])
def test_only_a_certified_backward_waits_for_the_device_and_once(loss, layout, backward, allowed):
    hidden, weight, labels, ref_logps = make_batch(torch.bfloat16, pairs=2, length=64, sharpness=12.0)
    options = {"shift": True} if layout == "shift" else {}
    if layout == "packed":
        hidden, labels = hidden.detach().flatten(0, 1).requires_grad_(), labels.flatten()
        options = {"cu_seqlens": torch.arange(0, 257, 64, device="cuda", dtype=torch.int32), "shift": True}
    loss_fn = LOSSES[loss](backward=backward)
    outs = []

    def step():
        if isinstance(loss_fn, FusedFocalPOLoss):
            loss_fn.set_step(len(outs))
        outs.append(loss_fn(hidden, weight, labels, None, *ref_logps, **options))
        outs[-1].loss.backward()

    waits = waits_for_the_device(step)
    assert len(waits) == allowed, waits
    assert backward == "exact" or outs[-1].kept_share < 0.4


@pytest.fixture
def by_tma(monkeypatch):
    """The launch table with TMA, as a tuning run may leave it; gives the names of what is launched by it."""
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        pytest.skip(f"no kernels with TMA for compute capability {major}.{minor}")
    entries = launch.LAUNCH_TABLE["sm_90"]
    before = entries[16]

    def switch_on():
        tile = launch.Launch(128, 256, 64, 8, 3, tma=True)
        tiles = dict.fromkeys(launch.TMA_KERNELS, tile)
        launch.replace_entries("sm_90", 16, tiles | {"bwd_dhidden": replace(tile, block_n=128)})
        return launched

    launched = []
    for name in ("forward", "dz", "dweight", "dhidden"):
        real = getattr(triton_tma, name)

        def record(*args, name=name, real=real):
            launched.append(name)
            real(*args)

        monkeypatch.setattr(triton_tma, name, record)
    yield switch_on
    entries[16] = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", [1, 4], ids=["few rows", "many rows"])
def test_tiles_by_tma_give_what_tiles_by_pointers_give(pairs, dtype, by_tma):
    batch = make_batch(dtype, pairs=pairs)
    loss_fn = FusedFocalPOLoss(backward="exact", backend="triton")
    plain = [x.clone() for x in loss_and_gradients(loss_fn, *batch)]
    launched = by_tma()
    for found, expected in zip(loss_and_gradients(loss_fn, *batch), plain, strict=True):
        # The same fp32 logits in another order of summation; then dz and the result rounded to the dtype.
        assert relative_error(found, expected) <= 4 * torch.finfo(dtype).eps + 1e-5
    assert set(launched) == {"forward", "dz", "dweight", "dhidden"}
    again = loss_and_gradients(loss_fn, *batch)
    assert all(map(torch.equal, again, loss_and_gradients(loss_fn, *batch)))


def test_tiles_by_tma_do_not_wait_for_the_device(by_tma):
    by_tma()
    hidden, weight, labels, ref_logps = make_batch(torch.bfloat16, pairs=2, length=64)
    loss_fn = FusedFocalPOLoss(backward="exact")

    def step():
        loss_fn(hidden, weight, labels, None, *ref_logps, shift=True).loss.backward()

    assert waits_for_the_device(step) == []


@pytest.mark.parametrize("length", [12, 40, 150])
def test_few_rows_are_as_accurate_as_many(length):
    hidden, weight, labels, ref_logps = make_batch(torch.bfloat16, pairs=2, length=length, sharpness=12.0)
    for backward in ("exact", "certified"):
        loss_fn = FusedFocalPOLoss(backward=backward, backend="triton")
        out = loss_fn(hidden, weight, labels, None, *ref_logps)
        found = torch.autograd.grad(out.loss, (hidden, weight))
        assert backward == "exact" or out.kept_share < 0.4
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        losses = reference.focalpo_loss(*exact, labels, None, *ref_logps.double(), beta=0.1, gamma=0.05)
        losses.mean().backward()
        for name, a, b in zip(("dhidden", "dweight"), found, (x.grad for x in exact), strict=True):
            assert relative_error(a, b) < 2 * torch.finfo(torch.bfloat16).eps, (backward, name)


def test_the_kl_of_two_heads_does_not_wait_for_the_device():
    hidden, weight, labels, _ = make_batch(torch.bfloat16, pairs=2, length=64)
    ref_hidden, ref_weight = (torch.randn_like(x) for x in (hidden.detach(), weight.detach()))

    def step():
        linear_kl(hidden, weight, ref_hidden, ref_weight, labels, shift=True).sum().backward()

    assert waits_for_the_device(step) == []


@pytest.mark.parametrize("sharpness", [4.0, 12.0], ids=["exact", "certified"])
@pytest.mark.parametrize("rank", [12, 16, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_low_rank_update_is_what_it_is_in_the_torch_backend(dtype, rank, sharpness):
    hidden, weight, labels, ref_logps = make_batch(dtype, pairs=2, length=150, sharpness=sharpness)
    generator = torch.Generator("cuda").manual_seed(1)
    a, b = (torch.randn(*size, device="cuda", generator=generator) for size in ((rank, 1024), (32000, rank)))
    a, b = ((x / 1024**0.5).to(dtype).requires_grad_() for x in (a, b))
    found = []
    for backend in ("triton", "torch"):
        loss_fn = FusedFocalPOLoss(backend=backend, tau=2.0**-13)
        update = LowRankUpdate.lora(hidden, a, b, scaling=2.0)
        out = loss_fn(hidden, weight, labels, None, *ref_logps, update=update)
        found.append([out.losses, *torch.autograd.grad(out.loss, (hidden, weight, a, b))])
    for triton_value, torch_value in zip(*found, strict=True):
        assert relative_error(triton_value, torch_value) <= 8 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.parametrize(("backward", "allowed"), [("exact", 0), ("certified", 1)])
def test_a_low_rank_update_waits_no_more_for_the_device(backward, allowed):
    hidden, weight, labels, ref_logps = make_batch(torch.bfloat16, pairs=2, length=64, sharpness=12.0)
    a, b = torch.randn(12, 1024, device="cuda"), torch.zeros(32000, 12, device="cuda")
    a, b = (x.bfloat16().requires_grad_() for x in (a, b))
    loss_fn = FusedFocalPOLoss(backward=backward)

    def step():
        update = LowRankUpdate.lora(hidden, a, b)
        loss_fn(hidden, weight, labels, None, *ref_logps, shift=True, update=update).loss.backward()

    waits = waits_for_the_device(step)
    assert len(waits) == allowed, waits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_certified_gradients_are_closer_to_float64_than_those_of_plain_pytorch(dtype):
    hidden, weight, labels, ref_logps = make_batch(dtype, pairs=8, length=512, sharpness=12.0)
    out = FusedFocalPOLoss(tau=2.0**-13, backend="triton")(hidden, weight, labels, None, *ref_logps)
    actual = torch.autograd.grad(out.loss, (hidden, weight))
    assert out.kept_share < 0.4

    def plain(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        references = ref_logps.to(torch.float64 if dtype == torch.float64 else torch.float32)
        losses = reference.focalpo_loss(*inputs, labels, None, *references, beta=0.1, gamma=0.05)
        return torch.autograd.grad(losses.mean(), inputs)

    for a, naive, exact in zip(actual, plain(dtype), plain(torch.float64), strict=True):
        assert relative_error(a, exact) < relative_error(naive, exact)


@pytest.mark.parametrize("sharpness", [4.0, 12.0], ids=["exact", "certified"])
def test_two_runs_are_bitwise_equal(sharpness):
    batch = make_batch(torch.bfloat16, sharpness=sharpness)
    first = [x.clone() for x in loss_and_gradients(FusedFocalPOLoss(), *batch)]
    second = loss_and_gradients(FusedFocalPOLoss(), *batch)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sharpness", [4.0, 12.0], ids=["exact", "certified"])
def test_peak_memory_stays_far_below_the_logits(sharpness):
    hidden, weight, labels, ref_logps = make_batch(
        torch.bfloat16, pairs=8, length=512, vocab_size=128256, sharpness=sharpness
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_and_gradients(FusedFocalPOLoss(), hidden, weight, labels, ref_logps)
    returned = sum(x.numel() * x.element_size() for x in (hidden, weight))
    extra = torch.cuda.max_memory_allocated() - before - returned
    assert extra < 300 * 2**20


@pytest.mark.parametrize(
    "fault",
    [
        "labels[0, 0] = 40",
        "hidden, labels = hidden[0], labels[0]; options = {'cu_seqlens': torch.tensor([0, 6, 4]).cuda()}",
        "labels[1] = -100; loss_fn.length_normalize = True",
    ],
)
def test_bad_values_on_the_device_fail_the_step(fault):
    """A device-side assertion ends the process's CUDA context, so each fault has a process of its own."""
    code = f"""
import torch
from focalkern import FusedFocalPOLoss
hidden = torch.randn(2, 4, 64, device="cuda", dtype=torch.bfloat16)
weight = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
labels = torch.zeros(2, 4, dtype=torch.int64, device="cuda")
loss_fn, options = FusedFocalPOLoss(reference_free=True), {{}}
{fault}
loss_fn(hidden, weight, labels, **options)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_head_split_by_vocabulary_over_two_processes(backend):
    run_ranks(Path(__file__).with_name("gpu_shards_worker.py"), "cuda", backend)
