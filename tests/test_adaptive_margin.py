"""α-DPO's adaptive margin: every implicit reference against Eq. 8 to 12, and the running statistics."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from problems import Batch, Leaves, batch, each_wide_dtype
from rank_threads import run_ranks_as_threads
from tolerance import assert_as_accurate, relative_error

from focalkern import FusedFocalPOLoss, FusedPairLoss
from focalkern.methods import tdpo1, tdpo2
from focalkern.pairs.adaptive_margin import IMPLICIT_REFERENCES, RunningMoments, implicit_margin

LENGTHS = (4, 2, 5, 6, 3, 1, 5, 3, 6, 2)


def naive_margin(implicit_reference, beta, logps, refs, kl):
    """α-DPO Eq. 10 and 18, and the ablations of Table 2: [B] from [2B]."""
    logps_w, logps_l = logps.chunk(2)
    ref_w, ref_l = refs.chunk(2)
    kl_w, kl_l = kl.chunk(2)
    return (
        beta
        * {
            "policy_over_reference": (logps_w - ref_w) - (logps_l - ref_l),
            "policy": logps_w - logps_l,
            "reference": ref_w - ref_l,
            "inverse_reference": ref_l - ref_w,
            "sequence_kl": kl_l - kl_w,
        }[implicit_reference]
    )


def naive_losses(
    pairs: Batch, leaves: Leaves, kl, *, implicit_reference, alpha, normalize, stop_gradient, length_normalize
):
    """α-DPO Eq. 12 on the first batch: μ and σ are those of the batch."""
    beta, margin = 2.5, 0.7
    logps = pairs.plain(leaves).logps.sum(-1)
    refs = torch.cat(list(pairs.refs.values())).to(logps.dtype)
    kl = kl.to(logps.dtype)
    if length_normalize:
        lengths = pairs.keep.sum(-1)
        logps, refs, kl = logps / lengths, refs / lengths, kl / lengths
    m = naive_margin(implicit_reference, beta, logps, refs, kl)
    if stop_gradient:
        m = m.detach()
    if normalize:
        m = (m - m.detach().mean()) / m.detach().std()
    logps_w, logps_l = logps.chunk(2)
    return -F.logsigmoid(beta * (logps_w - logps_l) - (margin + alpha * m))


VARIANTS = {
    "α-DPO": {},
    "no normalisation": {"normalize": False},
    "no stop-gradient": {"stop_gradient": False},
    "neither": {"normalize": False, "stop_gradient": False},
    "no length normalisation": {"length_normalize": False},
}


def fused_losses(pairs: Batch, leaves: Leaves, kl, backend, *, normalize, **options):
    loss_fn = FusedFocalPOLoss.simpo(
        2.5, 0.7, normalize_margin=normalize, reduction="none", backend=backend, **options
    )
    kls = {}
    if options["implicit_reference"] == "sequence_kl":
        kls = dict(zip(("chosen_kl", "rejected_kl"), kl.chunk(2), strict=True))
    return pairs.loss(loss_fn, leaves, **kls).losses


def losses_and_gradients(run, pairs: Batch, dtype) -> Leaves:
    leaves = pairs.leaves(dtype)
    losses = run(leaves)
    losses.sum().backward()
    return {"losses": losses.detach(), **{name: x.grad for name, x in leaves.items()}}


# Of the 25 combinations the plain variant of each reference, and two others; each variant two times.
COMBINATIONS = [
    (name, variant)
    for i, name in enumerate(IMPLICIT_REFERENCES)
    for j, variant in enumerate(VARIANTS)
    if j == 0 or (i + j) % len(VARIANTS) < 2
]


@pytest.mark.parametrize(("implicit_reference", "variant"), COMBINATIONS)
@each_wide_dtype
def test_every_variant_matches_its_equation(backend, dtype, implicit_reference, variant):
    options = {"alpha": 0.4, "normalize": True, "stop_gradient": True, "length_normalize": True}
    options |= {"implicit_reference": implicit_reference, **VARIANTS[variant]}
    pairs, kl = batch(LENGTHS, dtype=dtype), torch.rand(len(LENGTHS), dtype=dtype).to(DEVICE)
    actual = losses_and_gradients(lambda x: fused_losses(pairs, x, kl, backend, **options), pairs, dtype)
    plain, exact = (
        losses_and_gradients(lambda x: naive_losses(pairs, x, kl, **options), pairs, of)
        for of in (dtype, torch.float64)
    )
    for name, value in actual.items():
        if dtype == torch.float64:
            assert relative_error(value, exact[name]) <= 1e-12
        else:
            # u moves by β times the rounding of a log-prob per token, of size 4.
            assert_as_accurate(value, plain[name], exact[name], name, conditioning=2.5 * 4)


def test_margin_zero_is_the_remaining_ablation_of_table_2(backend):
    pairs = batch(LENGTHS)
    with_margin = FusedFocalPOLoss.alpha_dpo(2.5, 0.7, 0.4, backend=backend)
    without = FusedFocalPOLoss.alpha_dpo(2.5, 0.0, 0.4, backend=backend)
    outs = [pairs.loss(f) for f in (with_margin, without)]
    expected = torch.sigmoid(torch.logit(outs[1].prob.double()) - 0.7)
    torch.testing.assert_close(outs[0].prob.double(), expected, rtol=0, atol=1e-6)
    assert (outs[0].prob < outs[1].prob).all()
    assert torch.equal(outs[0].adaptive_margin, outs[1].adaptive_margin)


def test_alpha_zero_is_simpo_exactly(backend):
    pairs = batch(LENGTHS)
    results = []
    for loss_fn in (
        FusedFocalPOLoss.alpha_dpo(2.0, 1.0, alpha=0.0, backend=backend),
        FusedFocalPOLoss.simpo(2.0, 1.0, backend=backend),
    ):
        out, gradients = pairs.step(loss_fn)
        assert out.adaptive_margin is None
        results.append((out.losses, *gradients.values()))
    for values in zip(*results, strict=True):
        assert torch.equal(*values)


def test_a_small_alpha_tends_to_simpo_at_first_order():
    pairs = batch(LENGTHS, dtype=torch.float64)
    simpo = FusedFocalPOLoss.simpo(2.0, 1.0)(pairs.hidden, pairs.weight, pairs.labels).losses
    for alpha in (1e-2, 1e-4, 1e-6):
        loss_fn = FusedFocalPOLoss.alpha_dpo(2.0, 1.0, alpha)
        losses = pairs.loss(loss_fn).losses
        # |dL/du| < 1, and a z-score of n values is at most (n − 1)/√n.
        n = pairs.pairs
        assert 0 < (losses - simpo).abs().max() <= alpha * (n - 1) / math.sqrt(n)


def test_rewards_are_those_of_the_contract_and_the_margin_is_in_the_output(backend):
    pairs = batch(LENGTHS)
    loss_fn = FusedFocalPOLoss.alpha_dpo(2.5, 0.7, 0.4, backend=backend)
    out = pairs.loss(loss_fn)
    chosen_lengths, rejected_lengths = out.lengths.chunk(2)
    torch.testing.assert_close(out.chosen_rewards, 2.5 * out.chosen_logps / chosen_lengths)
    torch.testing.assert_close(out.rejected_rewards, 2.5 * out.rejected_logps / rejected_lengths)
    u = out.chosen_rewards - out.rejected_rewards - 0.7 - out.adaptive_margin
    torch.testing.assert_close(out.prob, torch.sigmoid(u), rtol=1e-4, atol=1e-5)
    assert not out.adaptive_margin.requires_grad


def test_focal_alpha_dpo_combines_both(backend):
    """What FocalPO's "Future Work" names: the focal factor on top of α-DPO's u."""
    pairs = batch(LENGTHS)
    options = {"backend": backend, "reduction": "none"}
    plain = FusedFocalPOLoss.alpha_dpo(2.5, 0.7, 0.4, **options)
    focal = FusedFocalPOLoss.alpha_dpo(2.5, 0.7, 0.4, gamma=0.5, **options)
    outs = [pairs.loss(f) for f in (plain, focal)]
    torch.testing.assert_close(outs[1].losses, outs[0].losses * outs[0].prob ** 0.5, rtol=1e-4, atol=1e-6)


# The statistics


NONE = torch.tensor(0.0)  # no rounding to speak of


def batches(count: int, pairs: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 + (i + 1) * torch.randn(pairs, generator=generator, dtype=torch.float64) for i in range(count)]


def test_statistics_are_exponential_averages_with_the_bias_corrected():
    moments = RunningMoments(0.9, bias_correction=True)
    data = batches(4)
    mean = std = 0.0
    for k, values in enumerate(data, start=1):
        moments.update(values, NONE)
        mean, std = 0.9 * mean + 0.1 * values.mean(), 0.9 * std + 0.1 * values.std()
        expected = (values - mean / (1 - 0.9**k)) / (std / (1 - 0.9**k))
        torch.testing.assert_close(moments.standardized(values, NONE), expected, rtol=1e-12, atol=1e-12)
    # After the first batch they are the batch's own, unlike the authors'.
    first = RunningMoments(0.9, bias_correction=True)
    first.update(data[0], NONE)
    z = first.standardized(data[0], NONE)
    assert abs(z.mean().item()) <= 1e-12
    assert z.std().item() == pytest.approx(1.0, rel=1e-12)


def test_without_bias_correction_they_are_the_authors_recursion():
    moments = RunningMoments(0.9, bias_correction=False)
    mean = std = torch.zeros(1, dtype=torch.float64)
    for values in batches(3):
        moments.update(values, NONE)
        mean = mean * 0.9 + values.mean() * (1 - 0.9)
        std = std * 0.9 + values.std() * (1 - 0.9)
        expected = (values - mean) / std
        actual = moments.standardized(values, NONE)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_batch_moves_the_statistics_before_it_uses_them_and_evaluation_does_not(backend):
    pairs = batch(LENGTHS)
    loss_fn = FusedFocalPOLoss.alpha_dpo(backend=backend)
    fresh = copy.deepcopy(loss_fn.state_dict())
    loss_fn.eval()
    out = pairs.loss(loss_fn)
    assert (out.adaptive_margin == 0).all()  # nothing is known yet
    for name, value in loss_fn.state_dict().items():
        assert torch.equal(value.cpu(), fresh[name]), name
    loss_fn.train()
    trained = pairs.loss(loss_fn)
    assert trained.adaptive_margin.mean().abs() <= 1e-6
    assert trained.adaptive_margin.std().item() == pytest.approx(0.5, rel=1e-5)
    loss_fn.eval()
    evaluated = pairs.loss(loss_fn)
    assert torch.equal(evaluated.adaptive_margin, trained.adaptive_margin)


def test_the_first_batch_of_one_pair_has_no_adaptive_margin_and_does_not_spoil_the_next(backend):
    one, many = batch((4, 2)), batch(LENGTHS)
    loss_fn = FusedFocalPOLoss.alpha_dpo(backend=backend)
    out = one.loss(loss_fn)
    simpo = FusedFocalPOLoss.simpo(10.0, 4.0, backend=backend)(one.hidden, one.weight, one.labels)
    assert torch.equal(out.losses, simpo.losses)
    later = many.loss(loss_fn)
    fresh = FusedFocalPOLoss.alpha_dpo(backend=backend)
    many.loss(fresh)
    state, expected = loss_fn.margin_statistics, fresh.margin_statistics
    assert torch.equal(state.std, expected.std)
    assert torch.equal(state.std_weight, expected.std_weight)
    assert torch.isfinite(later.losses).all()
    assert later.adaptive_margin.std().item() == pytest.approx(0.5, rel=1e-5)


def test_batches_of_one_pair_count_with_their_distance_from_the_mean_so_far():
    """On one device with one pair at a time σ would else never be known, and M* never be used."""
    generator = torch.Generator().manual_seed(0)
    values = 5 + 2 * torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    moments = RunningMoments(0.9, bias_correction=True)
    scores = []
    for value in values:
        moments.update(value, NONE)
        scores.append(moments.standardized(value, NONE))
    assert scores[0] == 0
    # E|x − μ| = 0.80 σ, as the expected standard deviation of two values is.
    assert (moments.std / moments.std_weight).item() == pytest.approx(0.8 * 2, rel=0.5)
    late = torch.cat(scores[100:])
    assert late.mean().abs() < 0.1
    assert 0.8 < late.std() < 1.8


def test_batches_before_the_first_update_say_nothing_of_sigma():
    """Of the policy while it is its reference, accumulated over, or warmed up from a learning rate of 0."""
    values = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = RunningMoments(0.9, bias_correction=True)
    for _ in range(8):
        moments.update(torch.zeros(6, dtype=torch.float64), torch.tensor(1e-6))
        assert (moments.standardized(torch.zeros(6), torch.tensor(1e-6)) == 0).all()
    moments.update(values, NONE)
    assert moments.standardized(values, NONE).std().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_policy_equal_to_reference_gives_the_margin_alone(bias_correction, backend):
    """Where the authors' code divides 0 by 0, in the exact case and where only rounding differs."""
    pairs = batch(LENGTHS)
    simpo = FusedFocalPOLoss.simpo(10.0, 4.0, backend=backend)
    expected = simpo(pairs.hidden, pairs.weight, pairs.labels).losses
    exact = simpo.reference_logps(pairs.hidden, pairs.weight, pairs.labels)
    ulp = torch.finfo(torch.float32).eps
    for refs in (exact, [x * (1 + ulp * torch.arange(-2, 3, device=DEVICE)) for x in exact]):
        loss_fn = FusedFocalPOLoss.alpha_dpo(ema_bias_correction=bias_correction, backend=backend)
        out = loss_fn(
            pairs.hidden, pairs.weight, pairs.labels, ref_chosen_logps=refs[0], ref_rejected_logps=refs[1]
        )
        assert (out.adaptive_margin == 0).all()
        assert torch.equal(out.losses, expected)


def test_a_batch_with_nan_leaves_the_statistics_alone(backend):
    """As where a gradient scaler skips a step: one such batch must not be the end of the run."""
    pairs = batch(LENGTHS)
    loss_fn = FusedFocalPOLoss.alpha_dpo(backend=backend)
    pairs.loss(loss_fn)
    before = copy.deepcopy(loss_fn.state_dict())
    broken = pairs.hidden.clone()
    broken[0] = torch.nan
    assert torch.isnan(loss_fn(broken, pairs.weight, pairs.labels, **pairs.refs).loss)
    for name, value in loss_fn.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_statistics_are_saved_and_restored(backend):
    pairs, other = batch(LENGTHS), batch((3, 5, 6, 4, 2, 2), hidden_size=16)
    trained = FusedFocalPOLoss.alpha_dpo(backend=backend)
    pairs.loss(trained)
    resumed = FusedFocalPOLoss.alpha_dpo(backend=backend)
    resumed.load_state_dict(trained.state_dict())
    outs = [other.loss(f) for f in (trained, resumed)]
    assert torch.equal(outs[0].losses, outs[1].losses)
    fresh = FusedFocalPOLoss.alpha_dpo(backend=backend)(
        other.hidden, other.weight, other.labels, **other.refs
    )
    assert not torch.equal(fresh.losses, outs[0].losses)


def test_statistics_keep_their_precision_in_a_model_cast_to_bf16():
    loss_fn = FusedFocalPOLoss.alpha_dpo()
    loss_fn.margin_statistics.update(torch.tensor([1.0001, 1.0002, 1.0004], dtype=torch.float64), NONE)
    mean = loss_fn.margin_statistics.mean.clone()
    assert loss_fn.to(torch.bfloat16).margin_statistics.mean.dtype == torch.float64
    assert torch.equal(loss_fn.half().margin_statistics.mean, mean)


def test_statistics_first_used_in_inference_mode_can_be_updated_afterwards():
    moments = RunningMoments(0.9, bias_correction=True)
    with torch.inference_mode():
        moments._follow(torch.device("meta"))
    assert not moments.mean.is_inference()


def test_process_group_must_be_one():
    with pytest.raises(
        TypeError, match=r"^process_group must be a torch\.distributed process group; got str"
    ):
        FusedFocalPOLoss(process_group="world")


def test_a_loss_made_on_the_meta_device_starts_afresh():
    with torch.device("meta"):
        loss_fn = FusedFocalPOLoss.alpha_dpo()
    state = loss_fn.to_empty(device="cpu").margin_statistics.state_dict()
    assert all(value == 0 and value.dtype == torch.float64 for value in state.values())


def test_a_batch_is_that_of_all_ranks_of_the_process_group():
    data = torch.arange(7, dtype=torch.float64) ** 2
    none = torch.tensor(0.0)

    def run(group):
        moments = RunningMoments(0.9, bias_correction=True, process_group=group)
        copied = copy.deepcopy(moments)  # the group is shared
        own = data[:5] if group.rank() == 0 else data[5:]  # ranks need not have equally many pairs
        # Every rank goes by the largest.
        assert copied.update(own, torch.tensor(2.0**-30 * group.rank())) == 2.0**-30
        return own, copied.standardized(own, none)

    for own, standardized in run_ranks_as_threads(2, run):
        expected = (own - data.mean()) / data.std()
        torch.testing.assert_close(standardized, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pairs", [[5, 2, 1], [7, 1, 0], [0, 8, 0], [1, 0, 0], [0, 0, 0]])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_pairs_that_ranks_share_count_once(pairs, copies):
    """`copies` ranks have each share of the pairs; a share may be empty."""
    batches = [
        torch.randn(sum(pairs), generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        for k in range(3)
    ]
    alone = RunningMoments(0.9, bias_correction=True)
    for values in batches:
        alone.update(values, NONE)

    def run(group):
        moments = RunningMoments(0.9, bias_correction=True, process_group=group)
        for values in batches:
            moments.update(values.split(pairs)[group.rank() // copies], NONE, copies)
        return moments.state_dict()

    for state in run_ranks_as_threads(3 * copies, run):
        torch.testing.assert_close(state, alone.state_dict(), rtol=1e-12, atol=1e-12)


def test_a_rank_without_pairs_has_a_margin_of_none_of_them():
    margin, rounding = implicit_margin("policy_over_reference", 2.0, torch.zeros(0), torch.zeros(0), None)
    assert margin.shape == (0,)
    assert rounding == 0


# What it needs


def test_references_are_needed_also_when_the_score_is_reference_free():
    pairs = batch(LENGTHS)
    for implicit_reference in ("policy_over_reference", "reference", "inverse_reference"):
        loss_fn = FusedFocalPOLoss.alpha_dpo(implicit_reference=implicit_reference)
        with pytest.raises(ValueError, match=r"^ref_chosen_logps must be given.*alpha=0 and reference_free"):
            loss_fn(pairs.hidden, pairs.weight, pairs.labels)
    FusedFocalPOLoss.alpha_dpo(implicit_reference="policy")(pairs.hidden, pairs.weight, pairs.labels)


def test_sequence_kl_is_needed_and_taken_by_its_own_variant_alone():
    pairs = batch(LENGTHS)
    kl = torch.rand(pairs.pairs).to(DEVICE)
    inputs = (pairs.hidden, pairs.weight, pairs.labels)
    tdpo = FusedFocalPOLoss.alpha_dpo(implicit_reference="sequence_kl")
    with pytest.raises(ValueError, match=r"^chosen_kl must be given"):
        tdpo(*inputs)
    with pytest.raises(ValueError, match=r"^rejected_kl must be given"):
        tdpo(*inputs, chosen_kl=kl)
    with pytest.raises(ValueError, match=r"^rejected_kl must be \[B\] = \[5\]; got \[4\]"):
        tdpo(*inputs, chosen_kl=kl, rejected_kl=kl[:-1])
    for loss_fn in (FusedFocalPOLoss.alpha_dpo(), FusedFocalPOLoss()):
        with pytest.raises(ValueError, match=r"^chosen_kl must be given.*and else not; got a tensor"):
            loss_fn(*inputs, **pairs.refs, chosen_kl=kl, rejected_kl=kl)


# With the library's own KL


@pytest.mark.parametrize("method", ["TDPO₁", "TDPO₂", "α-DPO with δ for M"])
def test_tdpo_from_hidden_states_to_gradients(method, backend):
    """Policy and reference from their hidden states, the KL with its gradient, all on the fused heads."""
    pairs = batch(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    ref = {
        name: x + 0.3 * torch.randn(x.shape, generator=generator).to(DEVICE)
        for name, x in pairs.tensors.items()
    }
    pairs.ref = replace(pairs, **ref)

    def fused(leaves):
        kls = dict(
            zip(("chosen_kl", "rejected_kl"), pairs.run_kl(backend, leaves).sum(-1).chunk(2), strict=True)
        )
        options = {"reduction": "none", "backend": backend}
        if method.startswith("TDPO"):
            loss_fn = FusedPairLoss(tdpo1 if method == "TDPO₁" else tdpo2, beta=0.5, **options)
        else:
            loss_fn = FusedFocalPOLoss.alpha_dpo(2.0, 0.5, 0.3, implicit_reference="sequence_kl", **options)
        pairs.refs = dict(zip(pairs.refs, loss_fn.reference_logps(**ref, labels=pairs.labels), strict=True))
        return pairs.loss(loss_fn, leaves, **kls).loss

    def naive(leaves):
        logps, lengths, dtype = pairs.plain(leaves).logps.sum(-1), pairs.keep.sum(-1), leaves["hidden"].dtype
        refs = pairs.plain({name: x.to(dtype) for name, x in ref.items()}).logps.sum(-1)
        kl = pairs.plain_kl(leaves).sum(-1)
        score_w, score_l = (logps - refs).chunk(2)
        kl_w, kl_l = kl.chunk(2)
        if method == "TDPO₁":
            return -F.logsigmoid(0.5 * (score_w - score_l) - 0.5 * (kl_l - kl_w))
        if method == "TDPO₂":
            return -F.logsigmoid(0.5 * (score_w - score_l) - 0.5 * 0.5 * (kl_l - kl_w.detach()))
        mean_w, mean_l = (logps / lengths).chunk(2)
        mean_kl_w, mean_kl_l = (kl / lengths).chunk(2)
        delta = (2.0 * (mean_kl_l - mean_kl_w)).detach()
        z = (delta - delta.mean()) / delta.std()
        return -F.logsigmoid(2.0 * (mean_w - mean_l) - 0.5 - 0.3 * z)

    actual = losses_and_gradients(fused, pairs, torch.float32)
    plain, exact = (losses_and_gradients(naive, pairs, dtype) for dtype in (torch.float32, torch.float64))
    # A loss is of differences of sums of log-probs: it moves by beta ulps of these.
    sums = pairs.plain(pairs.leaves(torch.float64)).logps.sum(-1)
    moves = {"losses": 0.5 * (sums.norm() / exact["losses"].norm()).item()}
    for name, value in actual.items():
        assert_as_accurate(value, plain[name], exact[name], name, moves.get(name, 0.0))
