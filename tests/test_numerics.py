"""What others got wrong: one test for each hazard that can be met without a GPU.

Elsewhere: labels out of range in `test_checks.py`, autocast in `test_linear_logps.py`, addresses beyond int32
in `test_gpu.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, INTERPRETED, LOW_PRECISION
from problems import EPS, OUTPUTS, Batch, Problem, assert_accurate, batch, each_dtype, outcome, problem
from tolerance import relative_error

from focalkern import FusedFocalPOLoss, linear_logps
from focalkern.logps.function import form_of
from focalkern.pairs import functions as pair_functions
from focalkern.pairs.objective import MODULATIONS, modulated_nll, pair_loss
from focalkern.records import Head, LogitTransform, PairConstants, PairObjective

FLOAT_OUTPUTS = ("entropy", "mean_logits", "log_sum_sq_probs")


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def first_block_batch() -> Batch:
    """Two pairs whose labels are in the first block: the last, partial one is no row's label."""
    pairs = batch((4, 4, 4, 4), vocab_size=200, sharpness=1.0)
    pairs.labels = (torch.arange(16) % 100).view(4, 4).to(DEVICE)
    return pairs


# Confident tokens


def confident_head(gap: float, dtype: torch.dtype) -> Problem:
    """Six tokens, each with a label of its own that stands about `gap` above the rest: 1 − p_y ≈ e^−gap."""
    tokens, vocab_size = 6, 500
    hidden = 0.05 * draw(tokens, tokens) + torch.eye(tokens)
    weight = 0.1 * draw(vocab_size, tokens, seed=1)
    labels = torch.tensor([3, 127, 128, 200, 384, 499])  # first and last of a block, inside, the last entry
    weight[labels] += (gap + math.log(vocab_size)) * torch.eye(tokens)
    hidden, weight = (x.to(DEVICE, dtype) for x in (hidden, weight))
    return Problem(hidden, weight, labels.to(DEVICE), grad=torch.ones(tokens, device=DEVICE))


@pytest.mark.parametrize("one_minus_p", [1e-3, 1e-5, 1e-6, 1e-8])
@each_dtype
def test_one_minus_p_of_a_confident_token_does_not_cancel(dtype, one_minus_p, backend):
    head = confident_head(-math.log(one_minus_p), dtype)
    # As a loss scale does: without it 1e-6 is a subnormal number of fp16.
    head.grad *= 2.0**10 if one_minus_p > 1e-7 else 2.0**16
    # Exact: beside its label every token here is so small that the certified backward may leave it out.
    leaves, wide = head.leaves(), head.leaves(torch.float64)
    actual = outcome(head, head.run(backend, leaves, backward="exact"), leaves)
    exact = outcome(head, head.plain(wide), wide)
    # The row of the label gets (1 − p_y)·hidden. A logit of size 25 is known to 25·eps, and so is the ratio
    # 1 − p_y. In low precision dz and the result are each rounded once, by half an eps.
    allowed = max(1e-5, torch.finfo(dtype).eps)
    for name, of_label in (("weight", head.labels), ("hidden", slice(None))):
        for a, e in zip(actual[name][of_label], exact[name][of_label], strict=True):
            assert relative_error(a, e) <= allowed


@pytest.mark.parametrize("one_minus_p", [1e-3, 1e-5, 1e-6, 1e-8])
def test_the_forward_keeps_one_minus_p_to_rounding(one_minus_p, backend):
    made = confident_head(-math.log(one_minus_p), torch.float32)
    z, labels = made.logits(), made.labels
    rest = z.scatter(1, labels[:, None], -math.inf).logsumexp(-1)
    exact = torch.sigmoid(rest - z.gather(1, labels[:, None]).squeeze(1))

    form, head = form_of(backend), Head(made.hidden, made.weight)
    blocks = form.block_statistics(head, labels, LogitTransform(), ())
    values, saved = form.reduced(blocks, labels, head, ())
    # 25·eps of the logit, as above, and a few roundings of the sum.
    assert ((saved.one_minus_p.double() / exact - 1).abs() <= 40 * EPS).all()
    assert ((values.logps.double() / torch.log1p(-exact) - 1).abs() <= 40 * EPS).all()


# Offsets, long sums, saturation


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_logits_changes_nothing_but_their_rounding(offset, backend):
    head, ulp = problem(2, 9, vocab_size=200, sharpness=1.0, has_bias=True), 2.0**-10  # of 1e4 in fp32
    head.grad.fill_(1.0)

    def measure(bias: float) -> dict[str, torch.Tensor]:
        head.bias.fill_(bias)
        leaves = head.leaves(trained=("hidden", "weight"))
        return outcome(head, head.run(backend, leaves, outputs=("entropy", "log_sum_sq_probs")), leaves)

    plain, moved = measure(0.0), measure(offset)
    # Half an ulp for the logit, half for the lse; each p is off by that, relatively, and with it −Σ p log p.
    assert ((moved["logps"] - plain["logps"]).abs() <= ulp).all()
    assert ((moved["entropy"] - plain["entropy"]).abs() <= ulp * (1 + plain["entropy"])).all()
    assert ((moved["log_sum_sq_probs"] - plain["log_sum_sq_probs"]).abs() <= 2 * ulp).all()
    for name in ("hidden", "weight"):
        assert relative_error(moved[name], plain[name]) <= ulp


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


@pytest.mark.parametrize(("softcap", "sharpness"), [(2.0, 1.0), (2.0, 30.0), (30.0, 5.0), (30.0, 30.0)])
def test_a_saturated_softcap_is_as_accurate_as_plain_pytorch(softcap, sharpness, backend):
    assert_accurate(problem(2, 9, vocab_size=200, sharpness=sharpness, softcap=softcap), backend)


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


@pytest.mark.parametrize(
    ("bad", "softcap"),
    [(math.nan, None), (math.inf, None), (-math.inf, 5.0), (math.inf, 5.0), (-math.inf, None)],
)
class TestNonFiniteInputs:
    """Come out as NaN, never as a plausible number: a softmax would turn −inf into 0, a tanh inf into 1."""

    def test_in_hidden_spoil_their_token_and_pair(self, bad, softcap, backend):
        pairs, loss_fn = first_block_batch(), FusedFocalPOLoss(softcap=softcap, backend=backend)
        clean = pairs.run(backend, softcap=softcap).logps
        pairs.hidden[1, 2, 5] = bad
        out, gradients = pairs.step(loss_fn)
        assert out.loss.isnan()
        assert out.losses.isnan().tolist() == [False, True]
        assert gradients["hidden"][1, 2].isnan().any()
        assert gradients["weight"].isnan().any()
        tokens = pairs.run(backend, softcap=softcap, outputs=OUTPUTS)
        spoiled = torch.zeros_like(pairs.keep)
        spoiled[1, 2] = True
        assert torch.equal(tokens.logps[~spoiled], clean[~spoiled])
        for name in ("logps", *FLOAT_OUTPUTS):
            assert torch.equal(getattr(tokens, name).isnan(), spoiled), name

    @pytest.mark.parametrize("row", [5, 150, 199], ids=["of a label", "of no label", "last, of no label"])
    def test_in_a_row_of_weight_spoil_everything(self, row, bad, softcap, backend):
        pairs = first_block_batch()
        assert (pairs.labels == row).any() == (row == 5)
        pairs.weight[row, 3] = bad
        out = pairs.loss(FusedFocalPOLoss(softcap=softcap, backend=backend))
        assert out.loss.isnan()
        assert out.losses.isnan().all()
        tokens = pairs.run(backend, softcap=softcap, outputs=OUTPUTS)
        for name in ("logps", *FLOAT_OUTPUTS):
            assert getattr(tokens, name).isnan().all(), name

    @pytest.mark.parametrize("name", ["update_hidden", "update_weight"])
    def test_in_an_update_spoil_as_much(self, name, bad, softcap, backend):
        head = problem(40, rank=8, softcap=softcap)
        head.labels[0] = 7
        getattr(head, name)[0, 0] = bad
        logps = head.run(backend).logps
        assert logps[0].isnan()
        assert logps[head.keep].isnan().all() == (name == "update_weight")


def test_nan_in_bias_gives_nan(backend):
    head = problem(2, 9, has_bias=True)
    head.bias[150] = math.nan
    assert head.run(backend).logps[head.keep].isnan().all()


def test_nan_in_a_reference_spoils_its_pair_only(backend):
    pairs = batch()
    pairs.refs["ref_chosen_logps"][1] = math.nan
    out = pairs.loss(FusedFocalPOLoss(backend=backend))
    assert out.losses.isnan().tolist() == [False, True, False]
    assert torch.isfinite(out.chosen_logps).all()


# Fully masked sequences


@pytest.mark.parametrize(
    ("modulation", "masked"),
    [("focalpo", [0]), ("inverse", [3]), ("focal", [1, 3]), *((name, [0, 1, 2, 3]) for name in MODULATIONS)],
    ids=str,
)
def test_a_fully_masked_sequence_has_zero_log_prob_and_zero_gradient(modulation, masked, backend):
    pairs = batch((4, 3, 4, 2))
    pairs.labels[masked] = -100
    out, gradients = pairs.step(FusedFocalPOLoss(modulation=modulation, backend=backend))
    logps = torch.cat([out.chosen_logps, out.rejected_logps])
    assert torch.equal(logps == 0, out.lengths == 0)
    assert (out.lengths == 0).nonzero().flatten().tolist() == masked
    assert torch.isfinite(out.losses).all()
    assert not gradients["hidden"][masked].any()
    assert torch.isfinite(gradients["hidden"]).all()
    assert gradients["weight"].any() == (len(masked) < 4)


# Low precision


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_losses_and_log_probs_are_fp32_whatever_the_input(dtype, backend):
    pairs = batch(dtype=dtype)
    pairs.refs = {name: x.to(dtype) for name, x in pairs.refs.items()}
    out, gradients = pairs.step(FusedFocalPOLoss(backend=backend))
    found = [x for x in (*vars(out).values(), *vars(pairs.run(backend, outputs=OUTPUTS)).values())]
    floats = [x for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert len(floats) == 16
    assert {x.dtype for x in floats} == {torch.float32}
    assert {x.dtype for x in gradients.values()} == {dtype}


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_logits_are_not_rounded_before_the_softmax(dtype, backend):
    """Logits rounded to bf16 beside an exact label logit cost a gradient error of 4.7e-2."""
    head = problem(
        32, hidden_size=48, vocab_size=700, sharpness=3 * 48**0.5, dtype=dtype
    )  # logits of size 20
    z = head.hidden.double() @ head.weight.double().T
    head.labels = z.argmax(-1)
    head.labels[::2] = z[::2].topk(3).indices[:, 2]
    leaves, wide = head.leaves(), head.leaves(torch.float64)
    actual, exact = outcome(head, head.run(backend, leaves), leaves), outcome(head, head.plain(wide), wide)
    # Logits and sums in fp32: 48 products of size 20 at worst.
    assert (actual["logps"] - exact["logps"]).abs().max() <= 48 * 20 * EPS
    # dz is rounded to the dtype at most once and the result once, by half an eps each.
    for name in leaves:
        assert relative_error(actual[name], exact[name]) <= torch.finfo(dtype).eps


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
