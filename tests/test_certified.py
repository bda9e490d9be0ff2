"""The certified backward: what it drops is what it says, and the rest is as accurate as the exact one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils.checkpoint
from conftest import DEVICE, INTERPRETED, LOW_PRECISION
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import EPS, Problem, assert_equal, batch, each_dtype, outcome, sharp_problem, transformed
from tolerance import assert_as_accurate, relative_error

import focalkern.logps.function
from focalkern import FusedFocalPOLoss, linear_logps

TAU = 2.0**-9
# Several tiles of rows for one block, which are of 16 rows in the interpreter.
MANY = 60 if INTERPRETED else 150


def measure(problem: Problem, backend: str, tau=TAU, **options):
    """The library's result, and the gradients by name."""
    leaves = problem.leaves()
    result = problem.run(backend, leaves, tau=tau, **options)
    found = outcome(problem, result, leaves)
    del found["logps"]
    return result, found


def in_blocks(p: torch.Tensor) -> torch.Tensor:  # [n, V] -> [n, NB]
    return torch.nn.functional.pad(p, (0, -p.shape[1] % 128)).unflatten(1, (-1, 128)).sum(-1)


def plain(problem: Problem, dtype, keep=None):
    """(block masses [n, NB], gradients by name) written out in plain PyTorch, dz rounded to `dtype`; of the
    kept (token, block) pairs alone where `keep` is given."""
    x, live = {name: t.detach() for name, t in problem.leaves(dtype).items()}, problem.keep
    products = [("hidden", "weight"), ("update_hidden", "update_weight")][: 2 if "update_hidden" in x else 1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = sum((x[hidden][live] @ x[weight].T for hidden, weight in products), x.get("bias", 0))
    z, slope = transformed(logits.to(wide), problem.transform)
    p = z.softmax(-1)
    target = torch.nn.functional.one_hot(problem.labels[live], p.shape[1])
    dz = problem.grad[live, None] * (target - p) * slope
    if keep is not None:
        dz = dz * keep.repeat_interleave(128, 1)[:, : p.shape[1]]
    dz = dz.to(dtype)
    gradients = {"bias": dz.sum(0)}
    for hidden, weight in products:
        gradients[hidden] = torch.zeros_like(x[hidden]).masked_scatter(live[:, None], dz @ x[weight])
        gradients[weight] = dz.T @ x[hidden][live]
    return in_blocks(p), gradients


@pytest.fixture
def kept(monkeypatch):
    """The (completion token, block) pairs of the last certified backward."""
    found = []

    def spy(keep, counts):
        found.append(keep)
        return list_pairs(keep, counts)

    list_pairs = focalkern.logps.function.list_pairs
    monkeypatch.setattr(focalkern.logps.function, "list_pairs", spy)
    return lambda: found[-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 60.0, "has_bias": True, "sharpness": 14.0},
        {"temperature": 0.7, "logit_scale": 1.3},
        {
            "vocab_size": 1290,
            "hidden_size": 37,
            "has_bias": True,
        },  # a last block of ten entries, an odd hidden size
        {"tokens": MANY},
        {"rank": 1},
        {"rank": 16, "has_bias": True},
        {"rank": 40, "softcap": 150.0, "has_bias": True},
        {"rank": 136, "temperature": 0.7, "logit_scale": 1.3},
    ],
    ids=str,
)
@each_dtype
def test_gradients_are_those_of_the_kept_pairs(dtype, options, backend, kept):
    problem = sharp_problem(dtype=dtype, **options)
    result, actual = measure(problem, backend)
    assert 0.05 < result.kept_share < 0.4
    naive, exact = plain(problem, dtype, kept())[1], plain(problem, torch.float64, kept())[1]
    for name, value in actual.items():
        # The backward is given lse in fp32: half a unit in the last place of a number of the logits' size.
        assert_as_accurate(value, naive[name], exact[name], name, problem.largest_logit() / 4)


@given(
    tokens=st.integers(1, 60),
    vocab_size=st.integers(300, 2000),
    sharpness=st.floats(8.0, 20.0),
    tau=st.sampled_from([2.0**-13, 2.0**-9, 2.0**-5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_the_dropped_mass_is_the_true_one_and_the_bound_holds(
    tokens, vocab_size, sharpness, tau, seed, backend, kept
):
    problem = sharp_problem(tokens, hidden_size=32, vocab_size=vocab_size, sharpness=sharpness, seed=seed)
    assume(problem.keep.any())
    result, found = measure(problem, backend, tau)
    assume(result.kept_share < 1)
    masses, exact = plain(problem, torch.float64)
    dropped = torch.where(kept(), 0.0, masses).sum(1)
    told, g = result.dropped_mass[problem.keep], problem.grad[problem.keep].double()
    # What a token of small gradient drops may be much, and then moves with its fp32 logits: d mass / dz is at
    # most mass·(1 − mass), and the largest logits are known to about a unit in their last place.
    rounding = 2 * dropped * (1 - dropped) * problem.largest_logit() * EPS
    assert ((told - dropped).abs() <= 1e-6 + rounding).all()
    assert not result.dropped_mass[~problem.keep].any()
    assert result.kept_share.item() == pytest.approx(kept().float().mean().item())

    norm = problem.weight.double().norm(dim=1).max()
    error = (found["hidden"].double() - exact["hidden"]).norm(dim=1)[problem.keep]
    # Rounding comes on top: logits of this size are known to 1e-5, and so is dz.
    rounding = 1e-5 * g.abs() * norm
    assert (error <= g.abs() * told.double() * norm + rounding).all()
    assert (g.abs() * dropped <= 2.0**-7 * g.abs().max() * (1 + 1e-5)).all()

    certificate = result.certificate()
    assert (error <= certificate.dhidden_bound + rounding).all()
    assert certificate.mean_dropped_mass == pytest.approx(told.mean().item(), rel=1e-6)
    assert certificate.max_dropped_mass == told.max().item()
    assert certificate.kept_share == result.kept_share.item()


def test_the_bound_holds_in_its_form_for_an_update(backend):
    problem = sharp_problem(60, rank=16)
    result, found = measure(problem, backend, tau=2.0**-5)
    exact = plain(problem, torch.float64)[1]
    dropped = problem.grad.abs() * result.dropped_mass.double()
    assert dropped.max() > 1e-3
    norms = {name: getattr(problem, name).double().norm(dim=1).max() for name in ("weight", "update_weight")}
    for name, norm in zip(("hidden", "update_hidden"), norms.values(), strict=True):
        error = (found[name].double() - exact[name]).norm(dim=1)
        assert error.max() > 1e-4
        assert (error <= dropped * norm + 1e-5 * problem.grad.abs() * norm).all()
    bound = result.certificate().dhidden_bound
    assert bound == pytest.approx((dropped.max() * norms["weight"]).item(), rel=1e-5)


@pytest.mark.parametrize(
    "transform", [{"temperature": 0.5}, {"logit_scale": 3.0}, {"softcap": 100.0}], ids=str
)
def test_the_bound_knows_the_slope_of_the_logit_transform(transform, backend):
    slope = transform.get("logit_scale", 1.0) / transform.get("temperature", 1.0)
    problem = sharp_problem(sharpness=16.0 / slope, **transform)
    result, _ = measure(problem, backend)
    norm = problem.weight.double().norm(dim=1).max()
    worst = torch.where(problem.keep, problem.grad.abs() * result.dropped_mass, 0.0).max()
    assert worst > 0
    assert result.certificate().dhidden_bound == pytest.approx((worst * norm * slope).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, LOW_PRECISION[-1]], ids=str)
def test_tau_zero_is_the_exact_backward(dtype, backend):
    problem = sharp_problem(dtype=dtype, has_bias=True)
    result, found = measure(problem, backend, tau=0.0)
    assert_equal(found, measure(problem, backend, backward="exact")[1])
    assert result.kept_share == 1
    assert not result.dropped_mass.any()


def test_where_little_can_be_dropped_the_exact_backward_is_taken(backend):
    problem = sharp_problem(sharpness=0.5)
    problem.grad.fill_(1.0)
    result, found = measure(problem, backend, tau="auto")
    assert_equal(found, measure(problem, backend, backward="exact")[1])
    assert result.kept_share == 1
    assert not result.dropped_mass.any()


def test_float64_is_exact():
    assert measure(sharp_problem(dtype=torch.float64), "torch")[0].kept_share == 1


def test_a_gradient_through_the_entropy_is_exact(backend):
    problem, found = sharp_problem(), []
    for backward in ("certified", "exact"):
        leaves = problem.leaves()
        result = problem.run(backend, leaves, tau=TAU, backward=backward, outputs=["entropy"])
        found.append(outcome(problem, result, leaves, {"logps": problem.grad, "entropy": problem.grad}))
    assert_equal(*found)


@pytest.mark.parametrize("offset", [100.0, -1e4])
def test_a_common_offset_of_the_logits_changes_nothing(offset, backend):
    problem = sharp_problem(37, has_bias=True)
    before, expected = measure(problem, backend)
    problem.bias += offset
    result, actual = measure(problem, backend)
    assert before.kept_share < 0.4
    assert result.kept_share == pytest.approx(before.kept_share.item(), abs=0.01)
    # The offset rounds each logit to its own unit in the last place.
    for name, value in actual.items():
        assert relative_error(value, expected[name]) <= 4 * abs(offset) * EPS


def test_one_short_completion_does_not_cost_the_long_ones_their_accuracy(backend):
    """|g_t| is proportional to 1/length where rewards are divided by the length."""
    problem = sharp_problem(120, dtype=LOW_PRECISION[-1], sharpness=14.0)
    problem.grad[:] = 1 / 1000
    problem.grad[:4] = 1 / 4
    result, found = measure(problem, backend, tau=2.0**-13)
    assert result.kept_share < 0.4
    naive, exact = (plain(problem, dtype)[1]["hidden"][4:] for dtype in (LOW_PRECISION[-1], torch.float64))
    assert relative_error(found["hidden"][4:], exact) < relative_error(naive, exact)


def test_blocks_that_cancel_may_each_exceed_fp16(backend):
    """What single blocks add to a row of dhidden is not rounded to fp16, whose largest number is 65504."""
    hidden = torch.zeros(1, 16, dtype=torch.float16, device=DEVICE)
    hidden[0, 1] = 1.0
    weight = torch.zeros(128 * 10, 16, dtype=torch.float16, device=DEVICE)
    weight[:, 1] = -20.0
    weight[[5, 133], 1] = 20.0  # half of the probability each, in two blocks
    weight[5, 0], weight[133, 0] = 200.0, -200.0
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    result = linear_logps(*leaves, torch.tensor([700], device=DEVICE), tau=2.0**-13, backend=backend)
    dhidden, _ = torch.autograd.grad(result.logps, leaves, torch.tensor([800.0], device=DEVICE))
    assert result.kept_share < 0.4
    assert dhidden.isfinite().all()
    assert dhidden[0, 0] == 0


def test_a_token_without_gradient_spreads_no_nan(backend):
    problem = sharp_problem()
    problem.hidden[0] = math.nan
    problem.labels[0], problem.grad[0] = 7, 0.0
    result, found = measure(problem, backend)
    assert result.kept_share < 0.4
    assert all(x.isfinite().all() for x in found.values())


def test_the_triton_workspace_is_honoured(backend, monkeypatch):
    if backend != "triton":
        pytest.skip("the torch backend works on groups of a fixed size")
    from focalkern.logps import triton_certified

    sizes, empty = [], torch.empty

    def recorded(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        sizes.append(tensor.nbytes)
        return tensor

    problem = sharp_problem(MANY)
    largest_block_bytes = MANY * (128 + 128) * 4
    monkeypatch.setattr(focalkern.logps.function, "WORKSPACE_BYTES", largest_block_bytes)
    monkeypatch.setattr(triton_certified.torch, "empty", recorded)
    measure(problem, backend)
    # Half each for dz and for its products with weight.
    assert max(sizes) <= largest_block_bytes // 2


@pytest.mark.parametrize(
    ("workspace_bytes", "options"),
    [
        (1, {"softcap": 50.0, "tokens": 20}),
        (20_000, {"softcap": 50.0, "tokens": MANY}),
        (20_000, {"rank": 40}),
        (60_000, {"rank": 40}),
    ],
    ids=str,
)
def test_the_workspace_does_not_change_the_result(workspace_bytes, options, backend, monkeypatch):
    problem = sharp_problem(has_bias=True, **options)
    whole = measure(problem, backend)[1]
    monkeypatch.setattr(focalkern.logps.function, "WORKSPACE_BYTES", workspace_bytes)
    for name, gradient in measure(problem, backend)[1].items():
        # A row stands elsewhere in its tile, so that the last digit of its logits may differ; in the exponent
        # of p, which the kernels form as the hardware does, by a product with log2 e, that is another digit.
        digits = 8 if backend == "triton" else 4
        assert relative_error(gradient, whole[name]) <= digits * EPS, name


@pytest.mark.parametrize("options", [{"rank": 40}, {"hidden_size": 37}], ids=str)
def test_products_of_some_pairs_and_columns_at_a_time_add_up_to_those_of_all(options, backend, monkeypatch):
    if backend != "triton":
        pytest.skip("the torch backend has no such products")
    from focalkern.logps import triton_certified

    problem, made, cut = sharp_problem(MANY, **options), [], triton_certified._Step._parts

    def recorded(*args):
        made.append(cut(*args))
        return made[-1]

    monkeypatch.setattr(triton_certified._Step, "_parts", recorded)
    whole = measure(problem, backend)[1]
    assert all(len(parts) == 1 for parts in made)
    made.clear()
    monkeypatch.setattr(triton_certified, "PRODUCT_COLUMNS", 16)
    at_once = triton_certified._ProductsAtOnce(MANY * 32, in_l2=True)
    monkeypatch.setattr(triton_certified, "_products_at_once", lambda *_: at_once)
    in_parts = measure(problem, backend)[1]
    assert all(len(parts) > 2 for parts in made)
    for name, gradient in in_parts.items():
        assert relative_error(gradient, whole[name]) <= 4 * EPS, name
    assert_equal(in_parts, measure(problem, backend)[1])


@pytest.mark.parametrize(
    ("rows", "l2_mib", "expected"),
    [(8192, 32, (24, True)), (16384, 32, (16, True)), (32768, 32, (112, False)), (8192, None, (112, False))],
)
def test_products_and_sums_share_the_l2_cache_where_it_is_large_enough(rows, l2_mib, expected, monkeypatch):
    triton_certified = pytest.importorskip("focalkern.logps.triton_certified")
    in_l2 = l2_mib and l2_mib * 2**20
    monkeypatch.setattr(triton_certified, "products_in_l2", lambda device: in_l2)
    mib, stays = expected
    found = triton_certified._products_at_once(torch.device("cuda"), rows, 224 * 2**20)
    assert found == (mib * 2**20, stays)


@each_dtype
def test_two_runs_are_bitwise_equal(dtype, backend):
    problem = sharp_problem(MANY, dtype=dtype, has_bias=True)
    (first, found), (second, again) = (measure(problem, backend) for _ in range(2))
    assert first.kept_share < 0.4
    assert_equal(found, again)
    assert torch.equal(first.dropped_mass, second.dropped_mass)


def test_halves_of_the_blocks_side_by_side_give_the_same(same_threads_afterwards):
    """The torch backend has a thread for each half where torch has two or more."""
    problem, found = sharp_problem(150, has_bias=True, rank=16), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(measure(problem, "torch")[1])
    assert_equal(*found)


def test_activation_checkpointing_changes_nothing(backend):
    problem = sharp_problem()
    leaves = problem.leaves()

    def logps(hidden, weight):
        return problem.run(backend, {"hidden": hidden, "weight": weight}, tau=TAU).logps

    torch.utils.checkpoint.checkpoint(logps, *leaves.values(), use_reentrant=False).backward(problem.grad)
    assert_equal({name: x.grad for name, x in leaves.items()}, measure(problem, backend)[1])


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_a_gradient_that_is_not_needed_is_not_computed(trained, backend):
    problem = sharp_problem(has_bias=True)
    leaves = problem.leaves(trained=(trained,))
    problem.run(backend, leaves, tau=TAU).logps.backward(problem.grad)
    expected = measure(problem, backend)[1]
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]) if name == trained else leaf.grad is None


def test_rows_of_dweight_that_nothing_needs_are_exactly_zero(backend, kept):
    problem = sharp_problem(6, rank=16, has_bias=True)
    found = measure(problem, backend)[1]
    needed = kept().any(0).repeat_interleave(128)[:1400]
    assert not needed.all()
    for name in ("weight", "bias", "update_weight"):
        assert not found[name][~needed].any()
        assert found[name][needed].any()


def test_tokens_without_gradient_keep_nothing(backend):
    problem = sharp_problem()
    problem.grad.zero_()
    problem.labels[0], problem.grad[0] = 7, 1.0
    result, found = measure(problem, backend)
    assert not found["hidden"][1:].any()
    assert found["hidden"][0].any()
    assert torch.equal(result.dropped_mass[1:], problem.keep[1:].float())
    assert result.dropped_mass[0] < 2.0**-7


def test_no_gradient_at_all_gives_zeros(backend):
    problem = sharp_problem()
    problem.grad.zero_()
    result, found = measure(problem, backend)
    assert result.kept_share == 0
    assert not any(gradient.any() for gradient in found.values())
    assert result.certificate().dhidden_bound == 0


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("hidden", math.nan),
        ("hidden", math.inf),
        ("weight", math.nan),
        ("grad", math.inf),
        ("grad", math.nan),
    ],
)
def test_what_is_not_finite_is_not_dropped(where, value, backend):
    problem = sharp_problem()
    problem.labels[0], problem.grad[0] = 7, 1.0
    getattr(problem, where).view(len(getattr(problem, where)), -1)[0, 0] = value
    found = measure(problem, backend)[1]
    assert not found["hidden"][0].isfinite().all()
    assert not found["weight"].isfinite().all()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
def test_the_loss_reports_what_its_backward_dropped(layout, shift, backend):
    pairs = batch(lengths=(5, 6, 6, 3), vocab_size=1400, hidden_size=48, sharpness=16.0)
    inputs = pairs.in_layout(layout, pairs.leaves())
    out = pairs.loss(FusedFocalPOLoss(gamma=0.0, tau=TAU, backend=backend), inputs, shift=shift)
    with pytest.raises(RuntimeError, match="backward"):
        out.certificate()
    assert out.dropped_mass.isnan().all()
    out.loss.backward()
    assert out.kept_share < 0.4
    used = inputs["labels"]
    if shift and layout == "padded":
        used = used[:, 1:]
    elif shift:
        used = torch.roll(used, -1).index_fill(0, inputs["cu_seqlens"][1:] - 1, -100)
    assert out.dropped_mass.shape == used.shape
    assert not out.dropped_mass[used == -100].any()
    assert (out.dropped_mass[used != -100] > 0).any()
    assert f"{out.kept_share.item():.1%}" in str(out.certificate())


def test_certificate_refuses_a_weight_that_has_changed(backend):
    problem = sharp_problem()
    leaves = problem.leaves()
    result = problem.run(backend, leaves, tau=TAU)
    result.logps.backward(problem.grad)
    before = result.certificate()
    with torch.no_grad():
        leaves["weight"].mul_(2.0)
    with pytest.raises(RuntimeError, match="optimizer"):
        result.certificate()
    assert before.dhidden_bound > 0


def test_inference_mode_needs_no_record(backend):
    problem = sharp_problem()
    with torch.inference_mode():
        result = problem.run(backend, {name: x.clone() for name, x in problem.tensors.items()})
    assert result.dropped_mass.isnan().all()
    with pytest.raises(RuntimeError, match="backward"):
        result.certificate()


def test_certificate_under_autocast_is_of_the_head_that_was_multiplied(backend):
    problem = sharp_problem()
    with torch.autocast(DEVICE.type, dtype=LOW_PRECISION[-1]):
        result = problem.run(backend, problem.leaves(), tau=TAU)
    result.logps.backward(problem.grad)
    worst = torch.where(problem.keep, problem.grad.abs() * result.dropped_mass, 0.0).max()
    norm = problem.weight.to(LOW_PRECISION[-1]).double().norm(dim=1).max()
    assert result.certificate().dhidden_bound == pytest.approx((worst * norm).item(), rel=1e-5)


def test_the_exact_backward_keeps_no_block_statistics(backend):
    def saved_bytes(backward, **options):
        problem, sizes = sharp_problem(vocab_size=128 * 16), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes), lambda x: x):
            problem.run(backend, problem.leaves(), backward=backward, **options)
        return sum(sizes)

    assert saved_bytes("exact") == saved_bytes("certified", tau=0.0) < saved_bytes("certified")
