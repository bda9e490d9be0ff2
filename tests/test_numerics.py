"""What others got wrong: one test for each hazard that can be met without a GPU.

Elsewhere: labels out of range in `test_checks.py`, autocast in `test_linear_logps.py`, addresses beyond int32
in `test_gpu.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, INTERPRETED, LOW_PRECISION
from tolerance import assert_as_accurate, relative_error

from focalkern import FusedFocalPOLoss, linear_logps, reference
from focalkern.logps.function import form_of
from focalkern.pairs import functions as pair_functions
from focalkern.pairs.objective import MODULATIONS, modulated_nll, pair_loss
from focalkern.records import Head, LogitTransform, PairConstants, PairObjective

EPS = torch.finfo(torch.float32).eps
FLOAT_OUTPUTS = ("entropy", "mean_logits", "log_sum_sq_probs")


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def pair_batch(pairs: int = 2, length: int = 4, hidden_size: int = 16, vocab_size: int = 200):
    hidden = draw(2 * pairs, length, hidden_size).to(DEVICE)
    weight = draw(vocab_size, hidden_size, seed=1).to(DEVICE) / hidden_size**0.5
    # Labels in the first block only: the last, partial one is no row's label.
    labels = (torch.arange(2 * pairs * length) % 100).view(2 * pairs, length).to(DEVICE)
    refs = [torch.full((pairs,), -20.0, device=DEVICE), torch.full((pairs,), -21.0, device=DEVICE)]
    return hidden, weight, labels, refs


# Confident tokens


def confident_head(gap: float, dtype: torch.dtype):
    """Six tokens, each with a label of its own that stands about `gap` above the rest: 1 − p_y ≈ e^−gap."""
    tokens, vocab_size = 6, 500
    hidden = 0.05 * draw(tokens, tokens)
    hidden += torch.eye(tokens)
    weight = 0.1 * draw(vocab_size, tokens, seed=1)
    labels = torch.tensor([3, 127, 128, 200, 384, 499])  # first and last of a block, inside, the last entry
    weight[labels] += (gap + math.log(vocab_size)) * torch.eye(tokens)
    return [x.to(DEVICE, dtype) for x in (hidden, weight)], labels.to(DEVICE)


@pytest.mark.parametrize("one_minus_p", [1e-3, 1e-5, 1e-6, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_one_minus_p_of_a_confident_token_does_not_cancel(dtype, one_minus_p, backend):
    (hidden, weight), labels = confident_head(-math.log(one_minus_p), dtype)
    # As a loss scale does: without it 1e-6 is a subnormal number of fp16.
    scale = 2.0**10 if one_minus_p > 1e-7 else 2.0**16

    def gradients(run, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        logps = run(*leaves, labels)
        return torch.autograd.grad(logps.sum() * scale, leaves)

    # Exact: beside its label every token here is so small that the certified backward may leave it out.
    actual = gradients(lambda *inputs: linear_logps(*inputs, backward="exact", backend=backend).logps, dtype)
    exact = gradients(lambda *inputs: reference.linear_logps(*inputs)["logps"], torch.float64)
    # The row of the label gets (1 − p_y)·hidden. A logit of size 25 is known to 25·eps, and so is the ratio
    # 1 − p_y. In low precision dz and the result are each rounded once, by half an eps.
    allowed = max(1e-5, torch.finfo(dtype).eps)
    for a, e in zip(actual[1][labels], exact[1][labels], strict=True):
        assert relative_error(a, e) <= allowed
    for a, e in zip(actual[0], exact[0], strict=True):
        assert relative_error(a, e) <= allowed


@pytest.mark.parametrize("one_minus_p", [1e-3, 1e-5, 1e-6, 1e-8])
def test_the_forward_keeps_one_minus_p_to_rounding(one_minus_p, backend):
    (hidden, weight), labels = confident_head(-math.log(one_minus_p), torch.float32)
    z = hidden.double() @ weight.double().T
    rest = z.scatter(1, labels[:, None], -math.inf).logsumexp(-1)
    exact = torch.sigmoid(rest - z.gather(1, labels[:, None]).squeeze(1))

    form, head = form_of(backend), Head(hidden, weight)
    blocks = form.block_statistics(head, labels, LogitTransform(), ())
    values, saved = form.reduced(blocks, labels, head, ())
    # 25·eps of the logit, as above, and a few roundings of the sum.
    assert ((saved.one_minus_p.double() / exact - 1).abs() <= 40 * EPS).all()
    assert ((values.logps.double() / torch.log1p(-exact) - 1).abs() <= 40 * EPS).all()


# Offsets, long sums, saturation


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_logits_changes_nothing_but_their_rounding(offset, backend):
    hidden, weight, labels, _ = pair_batch()
    ulp = 2.0**-10  # of 1e4 in fp32
    outputs = ("entropy", "log_sum_sq_probs")

    def measure(bias):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        result = linear_logps(*leaves, labels, bias=bias, backend=backend, outputs=outputs)
        return result, torch.autograd.grad(result.logps.sum(), leaves)

    plain, plain_gradients = measure(torch.zeros(len(weight), device=DEVICE))
    moved, moved_gradients = measure(torch.full((len(weight),), offset, device=DEVICE))
    # Half an ulp for the logit, half for the lse; each p is off by that, relatively, and with it −Σ p log p.
    assert ((moved.logps - plain.logps).abs() <= ulp).all()
    assert ((moved.entropy - plain.entropy).abs() <= ulp * (1 + plain.entropy)).all()
    assert ((moved.log_sum_sq_probs - plain.log_sum_sq_probs).abs() <= 2 * ulp).all()
    for a, b in zip(moved_gradients, plain_gradients, strict=True):
        assert relative_error(a, b) <= ulp


def test_logits_far_apart_do_not_overflow(backend):
    hidden = torch.ones(3, 8, device=DEVICE)
    weight = torch.zeros(300, 8, device=DEVICE)
    weight[7], weight[200] = 1e3, -1e3  # logits of ±8000 among zeros
    labels = torch.tensor([7, 200, 0], device=DEVICE)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    result = linear_logps(*leaves, labels, backend=backend, outputs=FLOAT_OUTPUTS)
    assert result.logps.tolist() == [0.0, -16000.0, -8000.0]
    assert not result.entropy.any()
    assert not result.log_sum_sq_probs.any()
    for gradient in torch.autograd.grad(result.logps.sum() + result.entropy.sum(), leaves):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("length", [1000, 8191])
def test_the_sum_over_a_long_sequence_keeps_fp32_accuracy(length, backend):
    # Of one sign and of like size, as in a real sequence: added one by one in fp32 they are off by 1e-5.
    logps = -torch.rand(2 * length, generator=torch.Generator().manual_seed(0)).to(DEVICE) - 0.3
    offsets = torch.tensor([0, length, 2 * length], device=DEVICE)
    sums = pair_functions.form_of(backend).sequence_sums(logps, offsets)
    exact = logps.double().view(2, -1).sum(-1)
    # 8 additions in each of 1024 lanes and a tree of 10 levels: 18 roundings of half an eps at worst.
    assert ((sums.double() / exact - 1).abs() <= 1e-6).all()


@pytest.mark.skipif(
    INTERPRETED, reason="16,000 rows take minutes in the interpreter; the test above sums as many"
)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_a_loss_over_long_sequences_holds_the_sums_of_its_log_probs(dtype, backend):
    length = 8191
    hidden = draw(2, length, 8).to(DEVICE, dtype)
    weight = draw(20, 8, seed=1).to(DEVICE, dtype)
    labels = (torch.arange(2 * length, device=DEVICE) % 20).view(2, length)
    out = FusedFocalPOLoss(reference_free=True, backend=backend)(hidden, weight, labels)
    tokens = linear_logps(hidden, weight, labels, backend=backend).logps
    sums = torch.cat([out.chosen_logps, out.rejected_logps]).double()
    assert ((sums / tokens.double().sum(-1) - 1).abs() <= 1e-6).all()


@pytest.mark.parametrize("sharpness", [1.0, 5.0, 30.0])
@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_a_saturated_softcap_is_as_accurate_as_plain_pytorch(softcap, sharpness, backend):
    hidden, weight, labels, _ = pair_batch()
    weight = weight * sharpness
    options = {"softcap": softcap}

    def measure(run, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        logps = run(*leaves, labels)
        return [logps.detach(), *torch.autograd.grad(logps.sum(), leaves)]

    actual = measure(lambda *x: linear_logps(*x, backend=backend, **options).logps, torch.float32)
    naive = measure(lambda *x: reference.linear_logps(*x, **options)["logps"], torch.float32)
    exact = measure(lambda *x: reference.linear_logps(*x, **options)["logps"], torch.float64)
    # A capped logit, of size 2 or 30, is known to so many eps; relatively, so is p.
    for values in zip(actual, naive, exact, ["logps", "dhidden", "dweight"], strict=True):
        assert_as_accurate(*values, conditioning=softcap)


def test_a_logit_far_beyond_the_softcap_has_no_gradient(backend):
    hidden = torch.ones(1, 8, device=DEVICE)
    weight = torch.zeros(200, 8, device=DEVICE)
    weight[3], weight[150] = 1e3, -1e3
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logps = linear_logps(*leaves, torch.tensor([3], device=DEVICE), softcap=5.0, backend=backend).logps
    assert logps.item() == pytest.approx(-math.log1p(198 * math.exp(-5) + math.exp(-10)), rel=8 * EPS)
    _, dweight = torch.autograd.grad(logps.sum(), leaves)
    assert not dweight[[3, 150]].any()
    assert dweight[0].any()


# NaN and inf


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
class TestNonFiniteInputs:
    """Come out as NaN, never as a plausible number: a softmax would turn −inf into 0, a tanh inf into 1."""

    @staticmethod
    def measure(hidden, weight, labels, refs, softcap, backend):
        out = FusedFocalPOLoss(softcap=softcap, backend=backend)(hidden, weight, labels, None, *refs)
        tokens = linear_logps(
            hidden, weight, labels, softcap=softcap, backend=backend, outputs=(*FLOAT_OUTPUTS, "is_top1")
        )
        return out, tokens

    def test_in_hidden_spoil_their_token_and_pair(self, bad, softcap, backend):
        hidden, weight, labels, refs = pair_batch()
        clean = linear_logps(hidden, weight, labels, softcap=softcap, backend=backend).logps
        hidden[1, 2, 5] = bad
        out, tokens = self.measure(hidden, weight, labels, refs, softcap, backend)
        assert out.loss.isnan()
        assert out.losses.isnan().tolist() == [False, True]
        spoiled = torch.zeros_like(labels, dtype=torch.bool)
        spoiled[1, 2] = True
        assert torch.equal(tokens.logps.isnan(), spoiled)
        assert torch.equal(tokens.logps[~spoiled], clean[~spoiled])
        for name in FLOAT_OUTPUTS:
            assert torch.equal(getattr(tokens, name).isnan(), spoiled), name

    @pytest.mark.parametrize("row", [5, 150, 199], ids=["of a label", "of no label", "last, of no label"])
    def test_in_a_row_of_weight_spoil_everything(self, row, bad, softcap, backend):
        hidden, weight, labels, refs = pair_batch()
        assert (labels == row).any() == (row == 5)
        weight[row, 3] = bad
        out, tokens = self.measure(hidden, weight, labels, refs, softcap, backend)
        assert out.loss.isnan()
        assert out.losses.isnan().all()
        assert tokens.logps.isnan().all()
        for name in FLOAT_OUTPUTS:
            assert getattr(tokens, name).isnan().all(), name

    def test_in_hidden_give_a_nan_gradient(self, bad, softcap, backend):
        hidden, weight, labels, refs = pair_batch()
        hidden[1, 2, 5] = bad
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        loss = FusedFocalPOLoss(softcap=softcap, backend=backend)(*leaves, labels, None, *refs).loss
        dhidden, dweight = torch.autograd.grad(loss, leaves)
        assert dhidden[1, 2].isnan().any()
        assert dweight.isnan().any()


def test_nan_in_bias_gives_nan(backend):
    hidden, weight, labels, _ = pair_batch()
    bias = torch.zeros(len(weight), device=DEVICE)
    bias[150] = math.nan
    assert linear_logps(hidden, weight, labels, bias=bias, backend=backend).logps.isnan().all()


def test_nan_in_a_reference_spoils_its_pair_only(backend):
    hidden, weight, labels, refs = pair_batch()
    refs[0][1] = math.nan
    out = FusedFocalPOLoss(backend=backend)(hidden, weight, labels, None, *refs)
    assert out.losses.isnan().tolist() == [False, True]
    assert torch.isfinite(out.chosen_logps).all()


# Fully masked sequences


@pytest.mark.parametrize("masked", [[0], [3], [1, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_fully_masked_sequence_has_zero_log_prob_and_zero_gradient(modulation, masked, backend):
    hidden, weight, labels, refs = pair_batch()
    labels[masked] = -100
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    out = FusedFocalPOLoss(modulation=modulation, backend=backend)(*leaves, labels, None, *refs)
    logps = torch.cat([out.chosen_logps, out.rejected_logps])
    assert torch.equal(logps == 0, out.lengths == 0)
    assert (out.lengths == 0).nonzero().flatten().tolist() == masked
    assert torch.isfinite(out.losses).all()
    dhidden, dweight = torch.autograd.grad(out.loss, leaves)
    assert not dhidden[masked].any()
    assert torch.isfinite(dhidden).all()
    assert dweight.any() == (len(masked) < 4)


# Low precision


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_losses_and_log_probs_are_fp32_whatever_the_input(dtype, backend):
    hidden, weight, labels, refs = pair_batch()
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    out = FusedFocalPOLoss(backend=backend)(*leaves, labels, None, *(x.to(dtype) for x in refs))
    fields = (
        "loss",
        "losses",
        "chosen_logps",
        "rejected_logps",
        "chosen_rewards",
        "rejected_rewards",
        "prob",
    )
    for name in (*fields, "weight"):
        assert getattr(out, name).dtype == torch.float32, name
    tokens = linear_logps(*leaves, labels, backend=backend, outputs=FLOAT_OUTPUTS)
    for name in ("logps", *FLOAT_OUTPUTS):
        assert getattr(tokens, name).dtype == torch.float32, name
    assert [x.dtype for x in torch.autograd.grad(out.loss, leaves)] == [dtype, dtype]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_logits_are_not_rounded_before_the_softmax(dtype, backend):
    """Logits rounded to bf16 beside an exact label logit cost a gradient error of 4.7e-2."""
    hidden = draw(32, 48).to(DEVICE, dtype)
    weight = (draw(700, 48, seed=1) * 3).to(DEVICE, dtype)  # logits of size 20
    z = hidden.double() @ weight.double().T
    labels = z.argmax(-1)
    labels[::2] = z[::2].topk(3).indices[:, 2]
    grad = draw(32, seed=2).to(DEVICE)

    def measure(run, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        logps = run(*leaves, labels)
        return logps.detach(), *torch.autograd.grad((logps * grad).sum(), leaves)

    actual = measure(lambda *x: linear_logps(*x, backend=backend).logps, dtype)
    exact = measure(lambda *x: reference.linear_logps(*x)["logps"], torch.float64)
    # Logits and sums in fp32: 48 products of size 20 at worst.
    assert (actual[0] - exact[0]).abs().max() <= 48 * 20 * EPS
    # dz is rounded to the dtype at most once and the result once, by half an eps each.
    for value, expected in zip(actual[1:], exact[1:], strict=True):
        assert relative_error(value, expected) <= torch.finfo(dtype).eps


# The pairwise step of each backend


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_pair_loss_is_accurate_and_finite_for_any_logit(modulation, gamma, label_smoothing, backend):
    magnitudes = [
        0.0,
        1e-3,
        0.5,
        1.0,
        2.0,
        2.4,
        2.45,
        2.51,
        3.0,
        5.0,
        10.0,
        16.0,
        19.9,
        20.1,
        40.0,
        80.0,
        200.0,
    ]
    magnitudes += [1e3, 1e4]
    u = torch.tensor([sign * x for x in magnitudes for sign in (1, -1)], device=DEVICE)
    pairs = len(u)
    # β = 1: u is the log-prob of the chosen sequence.
    logps = torch.cat([u, torch.zeros_like(u)])
    lengths = torch.ones(2 * pairs, dtype=torch.int64, device=DEVICE)
    objective = PairObjective(1.0, gamma, modulation, 0.0, False, label_smoothing)
    result = pair_functions.form_of(backend).pair_forward(logps, PairConstants(lengths), objective)

    rounded_gamma = torch.tensor(gamma).item()
    losses, slope = pair_loss(u.double(), rounded_gamma, modulation, label_smoothing)

    def slope_size(u):
        # The two terms of "focalpo" cancel at its change of sign.
        if modulation != "focalpo":
            return modulated_nll(u, rounded_gamma, modulation)[1].abs()
        nll = -torch.nn.functional.logsigmoid(u)
        return torch.exp(-gamma * nll) * torch.sigmoid(-u) * (1 + gamma * nll)

    exact_u = u.double()
    size = (1 - label_smoothing) * slope_size(exact_u) + label_smoothing * slope_size(-exact_u)
    exact_p = torch.sigmoid(exact_u)
    # As in `test_objective.py`: an exponent of the size of |u|, and 1 − r, which starts at 0.04.
    allowed = (32 + 2 * exact_u.abs()) * EPS
    tiny = torch.finfo(torch.float32).tiny
    assert ((result.losses - losses).abs() <= allowed * losses + tiny).all()
    assert ((result.slope - slope).abs() <= allowed * size + tiny).all()
    assert ((result.prob - exact_p).abs() <= allowed * exact_p + tiny).all()
    assert torch.equal(result.grad_logps, torch.cat([result.slope, -result.slope]))
