"""What only a CUDA device can show: bf16 on tensor cores, shapes past 2^31 logits, how often the host waits,
and the two backends side by side.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tolerance import assert_as_accurate, relative_error

from focalkern import (
    CosineGamma,
    FusedFocalPOLoss,
    FusedPairLoss,
    LowRankUpdate,
    linear_kl,
    linear_logps,
    products,
    reference,
)
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


LAYOUTS = ["padded", "shift", "packed"]


def in_layout(layout, hidden, labels):
    """The batch in this layout, and the options that say so."""
    if layout != "packed":
        return hidden, labels, {"shift": True} if layout == "shift" else {}
    sequences, length = labels.shape
    cu_seqlens = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)
    hidden = hidden.detach().flatten(0, 1).requires_grad_()
    return hidden, labels.flatten(), {"cu_seqlens": cu_seqlens.to(labels.device), "shift": True}


def assert_waits(forward, in_forward: int, in_backward: int) -> None:
    """How often a second call of `forward`, which returns a loss, and its backward wait for the device."""
    forward().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        loss, of_forward = with_waits(forward)
        _, of_backward = with_waits(loss.backward)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(of_forward) == in_forward, of_forward
    assert len(of_backward) == in_backward, of_backward


def with_waits(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("labels_on", ["cuda", "cpu"])
@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_the_forward_waits_once_for_labels_of_the_device_and_a_certified_backward_once(
    loss, layout, labels_on, backward
):
    hidden, weight, labels, ref_logps = make_batch(torch.bfloat16, pairs=2, length=64, sharpness=12.0)
    hidden, labels, options = in_layout(layout, hidden, labels.to(labels_on))
    loss_fn = LOSSES[loss](backward=backward)
    outs = []

    def forward():
        if isinstance(loss_fn, FusedFocalPOLoss):
            loss_fn.set_step(len(outs))
        outs.append(loss_fn(hidden, weight, labels, None, *ref_logps, **options))
        return outs[-1].loss

    assert_waits(forward, int(labels_on == "cuda"), int(backward == "certified"))
    assert backward == "exact" or outs[-1].kept_share < 0.4


@pytest.mark.parametrize("labels_on", ["cuda", "cpu"])
def test_the_kl_of_two_heads_waits_in_its_forward_alone(labels_on):
    hidden, weight, labels, _ = make_batch(torch.bfloat16, pairs=2, length=64)
    ref_hidden, ref_weight = (torch.randn_like(x) for x in (hidden.detach(), weight.detach()))
    labels = labels.to(labels_on)

    def forward():
        return linear_kl(hidden, weight, ref_hidden, ref_weight, labels, shift=True).sum()

    assert_waits(forward, int(labels_on == "cuda"), 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sharpness", [4.0, 12.0], ids=["exact", "certified"])
def test_labels_of_the_host_give_the_bits_of_labels_of_the_device(layout, sharpness):
    hidden, weight, labels, ref_logps = make_batch(torch.bfloat16, pairs=2, length=150, sharpness=sharpness)
    ref_hidden, ref_weight = (torch.randn_like(x) for x in (hidden.detach(), weight.detach()))
    found = []
    for labels_on in ("cuda", "cpu"):
        rows, own_labels, options = in_layout(layout, hidden, labels.to(labels_on))
        logps = linear_logps(rows, weight, own_labels, outputs=("entropy",), **options)
        kl = linear_kl(rows, weight, ref_hidden.view_as(rows), ref_weight, own_labels, **options)
        out = FusedFocalPOLoss()(rows, weight, own_labels, None, *ref_logps, **options)
        gradients = torch.autograd.grad(out.loss, (rows, weight))
        assert (out.kept_share < 0.4) == (sharpness == 12.0)
        found.append([logps.logps, logps.entropy, kl, out.losses, *gradients])
    assert all(map(torch.equal, *found))


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


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_a_low_rank_update_waits_no_more_for_the_device(backward):
    hidden, weight, labels, ref_logps = make_batch(torch.bfloat16, pairs=2, length=64, sharpness=12.0)
    a, b = torch.randn(12, 1024, device="cuda"), torch.zeros(32000, 12, device="cuda")
    a, b = (x.bfloat16().requires_grad_() for x in (a, b))
    loss_fn = FusedFocalPOLoss(backward=backward)

    def forward():
        update = LowRankUpdate.lora(hidden, a, b)
        return loss_fn(hidden, weight, labels, None, *ref_logps, shift=True, update=update).loss

    assert_waits(forward, 1, int(backward == "certified"))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [None, 16], ids=["whole", "low-rank update"])
@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_two_runs_are_bitwise_equal(backward, rank, dtype):
    """On one stream: where several streams call cuBLAS, CUBLAS_WORKSPACE_CONFIG=:4096:8 is needed, as for
    torch.use_deterministic_algorithms."""
    hidden, weight, labels, ref_logps = make_batch(dtype, sharpness=12.0)
    inputs, update = [hidden, weight], None
    if rank is not None:
        inputs += [torch.randn(n, rank, device="cuda").to(dtype) / 32 for n in (1024, 32000)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    loss_fn, found = FusedFocalPOLoss(backward=backward, tau=2.0**-13), []
    for _ in range(2):
        if rank is not None:
            update = LowRankUpdate(inputs[0] @ inputs[2], inputs[3])
        out = loss_fn(*inputs[:2], labels, None, *ref_logps, update=update)
        found.append([out.losses, *torch.autograd.grad(out.loss, inputs)])
        assert backward == "exact" or out.kept_share < 0.4
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_of_a_token_have_the_same_bits_whatever_other_rows_there_are(dtype, outputs):
    hidden, weight, labels, _ = make_batch(dtype, pairs=2, length=150)
    hidden = hidden.detach()

    def values(hidden, labels, **options):
        out = linear_logps(hidden, weight, labels, outputs=outputs, **options)
        return torch.stack([getattr(out, name).float() for name in ("logps", *outputs)])

    whole = values(hidden, labels)
    single = [values(*one) for one in zip(hidden, labels, strict=True)]
    assert torch.equal(whole, torch.stack(single, dim=1))
    assert torch.equal(whole, values(hidden.flip(0, 1), labels.flip(0, 1)).flip(1, 2))
    assert torch.equal(whole[:, 1, -1:], values(hidden[1, -1:], labels[1, -1:]))
    shifted = values(hidden, labels, shift=True)
    rows, row_labels, options = in_layout("packed", hidden, labels)
    assert torch.equal(shifted, values(rows.detach(), row_labels, **options).view_as(whole)[..., :-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_product_that_cublas_adds_is_that_of_mm_and_add(dtype, monkeypatch):
    if not products._adds_to_fp32(torch.device("cuda"), dtype):
        pytest.skip("torch.addmm of this release does not add a 16-bit product to an fp32 matrix")
    total = torch.randn(300, 1024, device="cuda")
    # As in the backward: dz of the last chunk is a part of a wider buffer.
    dz, weight = torch.randn(300, 4096, device="cuda").to(dtype), torch.randn(700, 1024, device="cuda")
    dz, weight = dz[:, :700], weight.to(dtype)
    exact = total.double() + dz.double() @ weight.double()
    for adds in (True, False):
        monkeypatch.setattr(products, "_adds_to_fp32", lambda *_, adds=adds: adds)
        found = total.clone()
        products.add_product(found, dz, weight)
        # fp32 sums of 700 products, and none of them rounded to 16 bits.
        assert relative_error(found, exact) < 1e-5, f"adds: {adds}"


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


def focalpo(hidden, weight, labels, length_normalize=False, **options):
    loss_fn = FusedFocalPOLoss(reference_free=True, length_normalize=length_normalize)
    return loss_fn(hidden, weight, labels, **options).loss


def kl_with_itself(hidden, weight, labels, **options):
    return linear_kl(hidden, weight, hidden.detach(), weight.detach(), labels, **options).sum()


def sum_of_logps(hidden, weight, labels, **options):
    return linear_logps(hidden, weight, labels, **options).logps.sum()


EACH = (focalpo, kl_with_itself, sum_of_logps)
FAULTS = {
    "a label past the vocabulary": (EACH, {1: 40}, {}),
    "a negative label": (EACH, {6: -1}, {}),
    "cu_seqlens that decrease": (EACH, {}, {"cu_seqlens": [0, 6, 4]}),
    "cu_seqlens that end early": (EACH, {}, {"cu_seqlens": [0, 4, 7]}),
    "an empty completion": ((focalpo,), dict.fromkeys(range(4, 8), -100), {"length_normalize": True}),
}


@pytest.mark.parametrize(
    ("fault", "function"), [(name, function) for name, fault in FAULTS.items() for function in fault[0]]
)
def test_bad_values_raise_what_they_raise_on_the_cpu_and_the_process_goes_on(fault, function):
    _, bad_labels, options = FAULTS[fault]
    hidden, weight = torch.randn(2, 4, 64), torch.randn(40, 64)
    labels = torch.zeros(8, dtype=torch.int64)
    for position, label in bad_labels.items():
        labels[position] = label
    hidden, labels = (
        (hidden.flatten(0, 1), labels) if "cu_seqlens" in options else (hidden, labels.view(2, 4))
    )

    def message(device, labels_on):
        there = {
            name: torch.tensor(value, device=labels_on) if name == "cu_seqlens" else value
            for name, value in options.items()
        }
        with pytest.raises(ValueError) as raised:
            function(hidden.to(device), weight.to(device), labels.to(labels_on), **there)
        return str(raised.value)

    expected = message("cpu", "cpu")
    assert message("cuda", "cuda") == message("cuda", "cpu") == expected
    torch.cuda.synchronize()
    good = torch.zeros(2, 4, dtype=torch.int64, device="cuda")
    assert focalpo(torch.randn(2, 4, 64, device="cuda"), weight.cuda(), good).isfinite()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_head_split_by_vocabulary_over_two_processes(backend):
    run_ranks(Path(__file__).with_name("gpu_shards_worker.py"), "cuda", backend)
