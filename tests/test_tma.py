"""The kernels that take their tiles by TMA give what the others give, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED
from tolerance import relative_error

pytest.importorskip("triton", reason="no triton on this platform")

from csrc_triton import launch
from focalkern import LowRankUpdate, linear_kl, linear_logps
from focalkern.backends import triton_products, triton_tma

if not INTERPRETED:
    pytest.skip("TMA kernels run under the interpreter, or on Hopper", allow_module_level=True)

VOCAB, HIDDEN = 384, 192  # narrower products have tiles of their own


@pytest.fixture
def by_tma(monkeypatch):
    """Switches the launch table to TMA; gives the names of the kernels that are launched by it."""
    launched = []

    def record(name: str) -> None:
        real = getattr(triton_tma, name)
        monkeypatch.setattr(triton_tma, name, lambda *args: (launched.append(name), real(*args)))

    def switch_on(**entries: launch.Launch) -> list[str]:
        for name in ("forward", "dz", "dhidden", "dweight"):
            record(name)
        tiles = dict.fromkeys(launch.TMA_KERNELS, launch.Launch(32, 128, 32, 1, 1, tma=True))
        for kernel, entry in (tiles | entries).items():
            monkeypatch.setitem(launch._INTERPRET, kernel, entry)
        return launched

    return switch_on


def batch(dtype=torch.float32, length=45, vocab_size=VOCAB, row_of_weight=HIDDEN):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, length, HIDDEN, generator=generator)
    weight = torch.randn(vocab_size, row_of_weight, generator=generator) / 4
    labels = torch.randint(vocab_size, (2, length), generator=generator)
    labels[:, ::3] = -100
    weight = weight.to(dtype)[:, :HIDDEN].requires_grad_()
    return hidden.to(dtype).requires_grad_(), weight, labels


def logps_and_gradients(hidden, weight, labels, **options):
    logps = linear_logps(hidden, weight, labels, backend="triton", backward="exact", **options).logps
    return logps, *torch.autograd.grad(logps.sum(), (hidden, weight))


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0, "temperature": 0.7},
    "bias": {"bias": torch.linspace(-1, 1, VOCAB)},
    "shift": {"shift": True},
}


@pytest.mark.parametrize(
    ("options", "dtype", "length"),
    [
        *((name, torch.float32, 45) for name in OPTIONS),
        ("plain", torch.float16, 45),
        ("plain", torch.float32, 5),
        ("plain", torch.float32, 1),
        ("shift", torch.float32, 1),
    ],
    ids=str,
)
def test_logps_and_gradients_are_those_of_the_other_kernels(options, dtype, length, by_tma):
    inputs = batch(dtype, length)
    options = {name: x.to(dtype) if name == "bias" else x for name, x in OPTIONS[options].items()}
    plain = logps_and_gradients(*inputs, **options)
    launched = by_tma()
    for found, expected in zip(logps_and_gradients(*inputs, **options), plain, strict=True):
        assert relative_error(found, expected) <= 2 * torch.finfo(dtype).eps + 1e-6
    if "softcap" in options:
        # dz then has a smaller tile and pointers: 0 past the count in fewer rows than dweight reads by TMA.
        assert launched == ["forward", "dhidden"]
    elif (inputs[2][:, "shift" in options :] != -100).any():
        assert launched == ["forward", "dz", "dhidden", "dweight"]


def test_dz_by_pointers_goes_with_dweight_by_tma(by_tma):
    options = {"softcap": 5.0}
    plain = logps_and_gradients(*batch(), **options)
    launched = by_tma(bwd_dz_small=launch.Launch(32, 128, 32, 1, 1))
    for found, expected in zip(logps_and_gradients(*batch(), **options), plain, strict=True):
        assert relative_error(found, expected) < 1e-6
    assert launched == ["forward", "dhidden", "dweight"]


def test_the_products_of_the_kl_go_by_tma(by_tma):
    hidden, weight, labels = batch()
    ref_hidden, ref_weight = (torch.randn_like(x) for x in (hidden, weight))

    def gradients():
        kl = linear_kl(hidden, weight, ref_hidden, ref_weight / 4, labels, backend="triton")
        return torch.autograd.grad(kl.sum(), (hidden, weight))

    plain = gradients()
    launched = by_tma(kl_bwd_dz=launch.Launch(32, 128, 32, 1, 1))
    for found, expected in zip(gradients(), plain, strict=True):
        assert relative_error(found, expected) < 1e-6
    assert launched == ["dhidden", "dweight"]


@pytest.fixture
def many_chunks_and_splits(monkeypatch):
    """Chunks of one vocabulary block, and multiprocessors for several programs per sum of dhidden."""
    monkeypatch.setattr(triton_products, "_LEAST_CHUNK", 128)
    for module in (triton_products, triton_tma):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 40)
    seen = []
    real = triton_products.HeadGradients.result

    def result(gradients):
        seen.append((len(list(gradients.chunks())), gradients.products[0].partial.shape[0]))
        return real(gradients)

    monkeypatch.setattr(triton_products.HeadGradients, "result", result)
    return seen


@pytest.mark.parametrize("tiles_by", ["pointers", "TMA"])
def test_chunks_and_splits_make_the_same_sums(tiles_by, by_tma, many_chunks_and_splits):
    hidden, weight, labels = batch(length=12)
    plain = linear_logps(hidden, weight, labels, backend="torch", backward="exact").logps
    expected = plain, *torch.autograd.grad(plain.sum(), (hidden, weight))
    launched = by_tma() if tiles_by == "TMA" else []
    for found, exact in zip(logps_and_gradients(hidden, weight, labels), expected, strict=True):
        assert relative_error(found, exact) < 2e-6
    assert len(launched) == (10 if tiles_by == "TMA" else 0)
    ((chunks, splits),) = many_chunks_and_splits
    assert chunks == 3 and splits > 1


HEADS = {
    "a vocabulary of parts of a block": batch(vocab_size=VOCAB + 16),
    "rows of weight that are not aligned": batch(row_of_weight=HIDDEN + 1),
}


@pytest.mark.parametrize("head", HEADS)
def test_what_tma_cannot_read_goes_through_pointers(head, by_tma):
    plain = logps_and_gradients(*HEADS[head])
    launched = by_tma()
    for found, expected in zip(logps_and_gradients(*HEADS[head]), plain, strict=True):
        assert relative_error(found, expected) < 1e-6
    assert not launched


def test_a_low_rank_update_goes_through_pointers(by_tma):
    hidden, weight, labels = batch()
    a, b = torch.randn(4, HIDDEN), torch.randn(VOCAB, 4)

    def run():
        return logps_and_gradients(hidden, weight, labels, update=LowRankUpdate.lora(hidden, a, b))

    plain = run()
    launched = by_tma()
    found = run()
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, plain, strict=True))
    assert not launched


def test_nan_at_a_masked_position_takes_no_part(by_tma):
    hidden, weight, labels = batch()
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    launched = by_tma()
    logps, dhidden, dweight = logps_and_gradients(hidden, weight, labels)
    assert len(launched) == 4
    assert logps.isfinite().all() and dweight.isfinite().all()
    assert not dhidden[labels == -100].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_out_as_nan(value, by_tma):
    hidden, weight, labels = batch()
    with torch.no_grad():
        hidden[0, 1, 3] = value
        weight[:, 3] = -weight[:, 3].abs()  # every product with +inf is -inf: a softmax would not notice
    launched = by_tma()
    logps = linear_logps(hidden, weight, labels, backend="triton").logps
    assert launched == ["forward"]
    assert logps[0, 1].isnan()
    assert logps.isnan().sum() == 1


def test_a_frozen_head_takes_no_copy_of_the_rows_that_nobody_reads(by_tma, monkeypatch):
    gathered = []
    real = triton_tma.gather_rows
    monkeypatch.setattr(triton_tma, "gather_rows", lambda *args: (gathered.append(1), real(*args))[1])
    hidden, weight, labels = batch()
    by_tma()
    linear_logps(hidden, weight.detach(), labels, softcap=5.0, backend="triton").logps.sum().backward()
    assert len(gathered) == 1  # the forward's


@pytest.mark.parametrize(
    ("kernel", "entry", "message"),
    [
        ("forward", launch.Launch(64, 128, 64, 8, 3), "'forward'"),
        ("fwd_small", launch.Launch(64, 128, 64, 8, 3, tma=True), "fwd_small has no form with TMA"),
        ("bwd_dhidden", launch.Launch(64, 128, 256, 8, 3, tma=True), "block_k of bwd_dhidden"),
        ("bwd_dweight", launch.Launch(64, 128, 64, 4, 3, tma=True, warp_specialize=True), "bwd_dweight"),
        ("fwd", launch.Launch(64, 128, 64, 4, 3, warp_specialize=True), "fwd cannot specialise"),
    ],
)
def test_entries_that_no_kernel_is_made_for_are_refused(kernel, entry, message):
    before = launch.LAUNCH_TABLE["sm_90"][16]
    with pytest.raises(ValueError, match=message):
        launch.replace_entries("sm_90", 16, {kernel: entry})
    assert launch.LAUNCH_TABLE["sm_90"][16] is before
