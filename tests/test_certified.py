"""The certified backward: what it drops is what it says, and the rest is as accurate as the exact one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils.checkpoint
from conftest import DEVICE, INTERPRETED, LOW_PRECISION
from hypothesis import assume, given
from hypothesis import strategies as st
from tolerance import assert_as_accurate, relative_error

import focalkern.logps.function
from focalkern import FusedFocalPOLoss, linear_logps

DTYPES = [torch.float32, *LOW_PRECISION]
TAU = 2.0**-9


class Problem:
    """A head with a sharp softmax, tokens of large, small and no gradient, some of them masked."""

    def __init__(
        self,
        tokens=40,
        hidden_size=48,
        vocab_size=1400,
        dtype=torch.float32,
        sharpness=10.0,
        seed=0,
        **options,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        scale = sharpness / hidden_size**0.5
        self.hidden = draw(tokens, hidden_size).to(DEVICE, dtype)
        self.weight = (scale * draw(vocab_size, hidden_size)).to(DEVICE, dtype)
        self.bias = draw(vocab_size).to(DEVICE, dtype) if options.pop("has_bias", False) else None
        labels = torch.randint(vocab_size, (tokens,), generator=generator)
        labels[3::7] = -100
        g = draw(tokens).float()
        g[1::4] *= 1e-4
        g[2::5] = 0.0
        self.labels, self.g = labels.to(DEVICE), g.to(DEVICE)
        self.options = options  # of the logit transform

    def leaves(self, dtype=None):
        given = [x for x in (self.hidden, self.weight, self.bias) if x is not None]
        return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in given]

    def largest_logit(self):
        """Before the logit transform, which here makes none larger."""
        return (self.hidden.double() @ self.weight.double().t()).abs().max().item()

    def run(self, backend, tau=TAU, backward="certified"):
        """(result, gradients) of the library."""
        leaves = self.leaves()
        hidden, weight, bias = [*leaves, None][:3]
        result = linear_logps(
            hidden,
            weight,
            self.labels,
            bias=bias,
            tau=tau,
            backward=backward,
            backend=backend,
            **self.options,
        )
        return result, torch.autograd.grad(result.logps, leaves, self.g)

    def plain(self, dtype, keep=None):
        """(block masses, gradients) written out in plain PyTorch, dz rounded to `dtype`; those of the kept
        (token, block) pairs alone when `keep` is given."""
        hidden, weight, bias = [*(x.detach() for x in self.leaves(dtype)), None][:3]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        live = self.labels != -100
        x = torch.nn.functional.linear(hidden, weight, bias).to(wide).requires_grad_()
        z = x * self.options.get("logit_scale", 1.0)
        softcap = self.options.get("softcap")
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        z = z / self.options.get("temperature", 1.0)
        p = z.detach().softmax(-1)
        onehot = torch.nn.functional.one_hot(self.labels.clamp(min=0), p.shape[1])
        dlogits = self.g[:, None].to(wide) * live[:, None] * (onehot - p)
        (dx,) = torch.autograd.grad(z, x, dlogits)
        padding = -p.shape[1] % 128
        if keep is not None:
            dx = dx * keep.repeat_interleave(128, 1)[:, : p.shape[1]]
        dx = dx.to(dtype)
        gradients = [dx @ weight, dx.t() @ hidden] + ([dx.sum(0)] if bias is not None else [])
        masses = torch.nn.functional.pad(p, (0, padding)).unflatten(1, (-1, 128)).sum(-1)
        return masses, gradients


@pytest.fixture
def kept(monkeypatch):
    """The (completion token, block) pairs of the last certified backward."""
    found = {}

    def spy(selection, counts):
        found["keep"] = selection.keep
        return list_pairs(selection, counts)

    list_pairs = focalkern.logps.function.list_pairs
    monkeypatch.setattr(focalkern.logps.function, "list_pairs", spy)

    def in_labels(problem):
        keep = torch.zeros(len(problem.labels), found["keep"].shape[1], dtype=torch.bool, device=DEVICE)
        live = (problem.labels != -100).nonzero()[:, 0]
        keep[live] = found["keep"][: len(live)]
        return keep

    return in_labels


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"has_bias": True},
        {"softcap": 60.0, "has_bias": True, "sharpness": 14.0},
        {"temperature": 0.7, "logit_scale": 1.3},
        {"vocab_size": 1290, "hidden_size": 37},  # a last block of ten entries, an odd hidden size
        {"tokens": 150},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_kept_pairs(dtype, options, backend, kept):
    problem = Problem(dtype=dtype, **options)
    result, actual = problem.run(backend)
    keep = kept(problem)
    assert 0.05 < result.kept_share < 0.4
    exact = problem.plain(torch.float64, keep)[1]
    naive = problem.plain(dtype, keep)[1]
    # The backward is given lse in fp32: half a unit in the last place of a number of the logits' size.
    conditioning = problem.largest_logit() / 2
    for name, *triple in zip(("dhidden", "dweight", "dbias"), actual, naive, exact, strict=False):
        assert_as_accurate(*triple, name, conditioning)


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
    problem = Problem(tokens, 32, vocab_size, sharpness=sharpness, seed=seed)
    result, (dhidden, _) = problem.run(backend, tau)
    masses, (exact, _) = problem.plain(torch.float64)
    live = problem.labels != -100
    assume(result.kept_share < 1)
    keep = kept(problem)
    dropped = torch.where(keep, 0.0, masses).sum(1) * live
    # What a token of small gradient drops may be much, and then moves with its fp32 logits: d mass / dz is at
    # most mass·(1 − mass), and the largest logits are known to about a unit in their last place.
    rounding = 2 * dropped * (1 - dropped) * problem.largest_logit() * torch.finfo(torch.float32).eps
    assert ((result.dropped_mass - dropped).abs() <= 1e-6 + rounding).all()
    possible = live.sum() * masses.shape[1]
    assert result.kept_share.item() == pytest.approx((keep.sum() / possible).item())

    g = problem.g.double()
    norm = problem.weight.double().norm(dim=1).max()
    error = (dhidden.double() - exact).norm(dim=1)
    # Rounding comes on top: logits of this size are known to 1e-5, and so is dz.
    rounding = 1e-5 * g.abs() * norm
    assert (error <= g.abs() * result.dropped_mass.double() * norm + rounding).all()
    assert (g.abs() * dropped <= 2.0**-7 * g.abs().max() * (1 + 1e-5))[live].all()

    certificate = result.certificate()
    assert (error <= certificate.dhidden_bound + rounding).all()
    assert certificate.mean_dropped_mass == pytest.approx((dropped.sum() / live.sum()).item(), abs=1e-6)
    assert certificate.max_dropped_mass == pytest.approx(dropped.max().item(), abs=1e-6)
    assert certificate.kept_share == result.kept_share.item()


@pytest.mark.parametrize(
    "transform", [{"temperature": 0.5}, {"logit_scale": 3.0}, {"softcap": 100.0}], ids=str
)
def test_the_bound_knows_the_slope_of_the_logit_transform(transform, backend):
    problem = Problem(sharpness=16.0 / transform.get("logit_scale", 1.0) * transform.get("temperature", 1.0))
    problem.options = transform
    result, _ = problem.run(backend)
    slope = transform.get("logit_scale", 1.0) / transform.get("temperature", 1.0)
    norm = problem.weight.double().norm(dim=1).max()
    worst = torch.where(problem.labels == -100, 0.0, problem.g.abs() * result.dropped_mass).max()
    assert worst > 0
    assert result.certificate().dhidden_bound == pytest.approx((worst * norm * slope).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tau_zero_is_the_exact_backward(dtype, backend):
    problem = Problem(dtype=dtype, has_bias=True)
    result, actual = problem.run(backend, tau=0.0)
    exact = problem.run(backend, backward="exact")[1]
    assert all(torch.equal(a, e) for a, e in zip(actual, exact, strict=True))
    assert result.kept_share == 1
    assert not result.dropped_mass.any()


def test_where_little_can_be_dropped_the_exact_backward_is_taken(backend):
    problem = Problem(sharpness=0.5)
    problem.g.fill_(1.0)
    result, actual = problem.run(backend, tau="auto")
    exact = problem.run(backend, backward="exact")[1]
    assert all(torch.equal(a, e) for a, e in zip(actual, exact, strict=True))
    assert result.kept_share == 1
    assert not result.dropped_mass.any()


def test_float64_is_exact():
    if INTERPRETED:
        pytest.skip("float64 is the torch backend's alone")
    problem = Problem(dtype=torch.float64)
    assert problem.run("torch", tau=TAU)[0].kept_share == 1


def test_a_gradient_through_the_entropy_is_exact(backend):
    problem = Problem()
    gradients = []
    for backward in ("certified", "exact"):
        hidden, weight = problem.leaves()
        result = linear_logps(
            hidden, weight, problem.labels, tau=TAU, backward=backward, backend=backend, outputs=["entropy"]
        )
        (result.logps + result.entropy).backward(problem.g)
        gradients.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, e) for a, e in zip(*gradients, strict=True))


@pytest.mark.parametrize("offset", [100.0, -1e4])
def test_a_common_offset_of_the_logits_changes_nothing(offset, backend):
    problem = Problem(has_bias=True, tokens=37)
    plain, expected = problem.run(backend)
    problem.bias += offset
    result, actual = problem.run(backend)
    assert plain.kept_share < 0.4
    assert result.kept_share == pytest.approx(plain.kept_share.item(), abs=0.01)
    # The offset rounds each logit to its own unit in the last place.
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= 4 * abs(offset) * torch.finfo(torch.float32).eps


def test_one_short_completion_does_not_cost_the_long_ones_their_accuracy(backend):
    """|g_t| is proportional to 1/length where rewards are divided by the length."""
    problem = Problem(tokens=120, dtype=LOW_PRECISION[-1], sharpness=14.0)
    problem.g[:] = 1 / 1000
    problem.g[:4] = 1 / 4
    result, (dhidden, _) = problem.run(backend, tau=2.0**-13)
    assert result.kept_share < 0.4
    exact = problem.plain(torch.float64)[1][0]
    naive = problem.plain(LOW_PRECISION[-1])[1][0]
    assert relative_error(dhidden[4:], exact[4:]) < relative_error(naive[4:], exact[4:])


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
    problem = Problem()
    problem.hidden[0] = math.nan
    problem.g[0] = 0.0
    result, (dhidden, dweight) = problem.run(backend)
    assert result.kept_share < 0.4
    assert dhidden.isfinite().all()
    assert dweight.isfinite().all()


def test_the_triton_workspace_is_honoured(backend, monkeypatch):
    if backend != "triton":
        pytest.skip("the torch backend works on groups of a fixed size")
    from focalkern.logps import triton_certified

    sizes, empty = [], torch.empty

    def recorded(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        sizes.append(tensor.nbytes)
        return tensor

    problem = Problem(tokens=150)
    largest_block_bytes = 150 * (128 + 128) * 4
    monkeypatch.setattr(focalkern.logps.function, "WORKSPACE_BYTES", largest_block_bytes)
    monkeypatch.setattr(triton_certified.torch, "empty", recorded)
    problem.run(backend)
    # dz and its product, of which two never live at once.
    assert max(sizes) <= largest_block_bytes


@pytest.mark.parametrize("workspace_bytes", [1, 20_000, 60_000])
def test_the_workspace_does_not_change_the_result(workspace_bytes, backend, monkeypatch):
    problem = Problem(tokens=150, has_bias=True, softcap=50.0)
    whole = problem.run(backend)[1]
    monkeypatch.setattr(focalkern.logps.function, "WORKSPACE_BYTES", workspace_bytes)
    for sliced, gradient in zip(problem.run(backend)[1], whole, strict=True):
        # A row stands elsewhere in its tile, so that the last digit of its logits may differ; in the exponent
        # of p, which the kernels form as the hardware does, by a product with log2 e, that is another digit.
        digits = 8 if backend == "triton" else 4
        assert (sliced - gradient).norm() <= digits * torch.finfo(torch.float32).eps * gradient.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bitwise_equal(dtype, backend):
    problem = Problem(tokens=150, dtype=dtype, has_bias=True)
    first, second = problem.run(backend), problem.run(backend)
    assert first[0].kept_share < 0.4
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert torch.equal(first[0].dropped_mass, second[0].dropped_mass)


def test_activation_checkpointing_changes_nothing(backend):
    problem = Problem()
    hidden, weight = problem.leaves()

    def logps(hidden, weight):
        return linear_logps(hidden, weight, problem.labels, tau=TAU, backend=backend).logps

    torch.utils.checkpoint.checkpoint(logps, hidden, weight, use_reentrant=False).backward(problem.g)
    assert all(torch.equal(x.grad, e) for x, e in zip((hidden, weight), problem.run(backend)[1], strict=True))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_a_gradient_that_is_not_needed_is_not_computed(needs, backend):
    problem = Problem(has_bias=True)
    leaves = [x.requires_grad_(need) for x, need in zip(problem.leaves(), needs, strict=True)]
    hidden, weight, bias = leaves
    result = linear_logps(hidden, weight, problem.labels, bias=bias, tau=TAU, backend=backend)
    result.logps.backward(problem.g)
    expected = problem.run(backend)[1]
    for leaf, need, gradient in zip(leaves, needs, expected, strict=True):
        assert torch.equal(leaf.grad, gradient) if need else leaf.grad is None


def test_rows_of_dweight_that_nothing_needs_are_exactly_zero(backend, kept):
    problem = Problem(tokens=6)
    dweight = problem.run(backend)[1][1]
    needed = kept(problem).any(0).repeat_interleave(128)[: len(dweight)]
    assert not needed.all()
    assert not dweight[~needed].any()


def test_tokens_without_gradient_keep_nothing(backend):
    problem = Problem()
    problem.g.zero_()
    problem.g[0] = 1.0
    result, (dhidden, _) = problem.run(backend)
    live = problem.labels != -100
    assert not dhidden[1:].any()
    assert dhidden[0].any()
    assert (result.dropped_mass[1:] == live[1:].float()).all()
    assert result.dropped_mass[0] < 2.0**-7


def test_no_gradient_at_all_gives_zeros(backend):
    problem = Problem()
    problem.g.zero_()
    result, gradients = problem.run(backend)
    assert result.kept_share == 0
    assert not any(gradient.any() for gradient in gradients)
    assert result.certificate().dhidden_bound == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["hidden", "weight", "gradient"])
def test_what_is_not_finite_is_not_dropped(where, value, backend):
    problem = Problem()
    if where == "gradient":
        problem.g[0] = value
    else:
        getattr(problem, where)[0, 0] = value
    dhidden, dweight = problem.run(backend)[1]
    assert not dhidden[0].isfinite().all()
    assert not dweight.isfinite().all()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("shift", [False, True])
def test_the_loss_reports_what_its_backward_dropped(layout, shift, backend):
    problem = Problem(tokens=24, sharpness=16.0)
    hidden, weight = problem.leaves()
    labels, inputs = problem.labels, {"hidden": hidden}
    if layout == "padded":
        inputs, labels = {"hidden": hidden.view(4, 6, -1)}, labels.view(4, 6)
    else:
        inputs["cu_seqlens"] = torch.tensor([0, 5, 12, 20, 24], device=DEVICE)
    zeros = torch.zeros(2, device=DEVICE)
    loss_fn = FusedFocalPOLoss(gamma=0.0, tau=TAU, backend=backend)
    out = loss_fn(
        weight=weight, labels=labels, ref_chosen_logps=zeros, ref_rejected_logps=zeros, shift=shift, **inputs
    )
    with pytest.raises(RuntimeError, match="backward"):
        out.certificate()
    assert out.dropped_mass.isnan().all()
    out.loss.backward()
    assert out.kept_share < 0.4
    if layout == "padded":
        used = labels[:, 1:] if shift else labels
    else:
        used = labels
        if shift:
            used = torch.roll(labels, -1).index_fill(0, inputs["cu_seqlens"][1:] - 1, -100)
    assert out.dropped_mass.shape == used.shape
    assert not out.dropped_mass[used == -100].any()
    assert (out.dropped_mass[used != -100] > 0).any()
    assert f"{out.kept_share.item():.1%}" in str(out.certificate())


def test_certificate_refuses_a_weight_that_has_changed(backend):
    problem = Problem()
    hidden, weight = problem.leaves()
    result = linear_logps(hidden, weight, problem.labels, tau=TAU, backend=backend)
    result.logps.backward(problem.g)
    before = result.certificate()
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="optimizer"):
        result.certificate()
    assert before.dhidden_bound > 0


def test_inference_mode_needs_no_record(backend):
    problem = Problem()
    with torch.inference_mode():
        hidden, weight = (x.detach().clone() for x in problem.leaves())
        result = linear_logps(hidden, weight, problem.labels, backend=backend)
    assert result.dropped_mass.isnan().all()
    with pytest.raises(RuntimeError, match="backward"):
        result.certificate()


def test_certificate_under_autocast_is_of_the_head_that_was_multiplied(backend):
    problem = Problem()
    hidden, weight = problem.leaves()
    with torch.autocast(DEVICE.type, dtype=LOW_PRECISION[-1]):
        result = linear_logps(hidden, weight, problem.labels, tau=TAU, backend=backend)
    result.logps.backward(problem.g)
    worst = torch.where(problem.labels == -100, 0.0, problem.g.abs() * result.dropped_mass).max()
    norm = weight.detach().to(LOW_PRECISION[-1]).double().norm(dim=1).max()
    assert result.certificate().dhidden_bound == pytest.approx((worst * norm).item(), rel=1e-5)


def test_the_exact_backward_keeps_no_block_statistics(backend):
    def saved_bytes(backward, **options):
        problem, sizes = Problem(vocab_size=128 * 64), []
        hidden, weight = problem.leaves()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes), lambda x: x):
            linear_logps(hidden, weight, problem.labels, backward=backward, backend=backend, **options)
        return sum(sizes)

    assert saved_bytes("exact") == saved_bytes("certified", tau=0.0) < saved_bytes("certified")
