"""`focalkern.methods`: every loss, by itself and on the fused head, against the naive one of its paper; its
limits; what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import naive_methods as naive
import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Batch, Leaves, batch, problem
from ranks import run_ranks
from tolerance import assert_as_accurate, relative_error

from focalkern import FusedPairLoss, check_pair_loss, methods
from focalkern.pairs.pair_loss import Pairs

PAIRS = 5
LOG_SUM_SQ = ("log_sum_sq_probs",)


@dataclass(frozen=True)
class Case:
    function: Callable
    naive: Callable
    tensors: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    without_stop_gradient: Callable | None = None  # what finite differences can check
    needs_reference: bool = True
    of_log_ratios: bool = False  # refuses f-divergences


def f_case(function, naive_method, f_divergence: str, alpha: float = 0.5) -> Case:
    return Case(
        methods.with_f_divergence(
            function, f_divergence, alpha if f_divergence == "alpha_divergence" else None
        ),
        naive.f_dpo(naive_method, f_divergence, alpha),
    )


def mixed(x: naive.Numbers) -> torch.Tensor:
    return 0.8 * naive.dpo(x) + 0.2 * naive.bco_pair(x) + 1.5 * naive.sft(x)


def mixed_with_tensors(x, offset, kl) -> torch.Tensor:
    chosen, rejected = naive.kto(x, kl).chunk(2)
    return 2 * naive.odpo(x, offset) - 0.5 * (chosen + rejected)


def kto_of_pair(pairs: Pairs, *, kl: torch.Tensor) -> torch.Tensor:  # [B]
    return sum(methods.kto(pairs, kl=kl).chunk(2))


KL = ("chosen_kl", "rejected_kl")
CASES = {
    "dpo": Case(methods.dpo, naive.dpo),
    "cdpo": Case(partial(methods.dpo, label_smoothing=0.2), partial(naive.dpo, smoothing=0.2)),
    "hinge": Case(methods.hinge, naive.hinge),
    "ipo": Case(methods.ipo, naive.ipo),
    "sigmoid_norm": Case(methods.sigmoid_norm, naive.sigmoid_norm),
    "exo_pair": Case(methods.exo_pair, partial(naive.exo_pair, smoothing=1e-3)),
    "exo_pair 0.3": Case(
        partial(methods.exo_pair, label_smoothing=0.3), partial(naive.exo_pair, smoothing=0.3)
    ),
    "robust": Case(partial(methods.robust, label_smoothing=0.1), partial(naive.robust, smoothing=0.1)),
    "discopop": Case(methods.discopop, partial(naive.discopop, tau=0.05)),
    "discopop 0.7": Case(partial(methods.discopop, discopop_tau=0.7), partial(naive.discopop, tau=0.7)),
    "odpo": Case(methods.odpo, naive.odpo, ("offset",)),
    "r_dpo": Case(partial(methods.r_dpo, length_penalty=0.05), partial(naive.r_dpo, alpha=0.05)),
    "nca_pair": Case(methods.nca_pair, naive.nca_pair, of_log_ratios=True),
    "bco_pair": Case(methods.bco_pair, naive.bco_pair, of_log_ratios=True),
    "sppo_hard": Case(methods.sppo_hard, naive.sppo_hard, of_log_ratios=True),
    "apo_zero": Case(methods.apo_zero, naive.apo_zero, of_log_ratios=True),
    "apo_down": Case(methods.apo_down, naive.apo_down, of_log_ratios=True),
    "aot": Case(methods.aot, naive.aot, of_log_ratios=True),
    "aot smoothed": Case(
        partial(methods.aot, label_smoothing=0.1), partial(naive.aot, smoothing=0.1), of_log_ratios=True
    ),
    "aot_unpaired": Case(methods.aot_unpaired, naive.aot_unpaired, of_log_ratios=True),
    "aot_unpaired smoothed": Case(
        partial(methods.aot_unpaired, label_smoothing=0.1),
        partial(naive.aot_unpaired, smoothing=0.1),
        of_log_ratios=True,
    ),
    "kto": Case(methods.kto, naive.kto, ("kl",), of_log_ratios=True),
    "kto weighted": Case(
        partial(methods.kto, desirable_weight=1.33, undesirable_weight=0.5),
        partial(naive.kto, desirable=1.33, undesirable=0.5),
        ("kl",),
        of_log_ratios=True,
    ),
    "tdpo1": Case(methods.tdpo1, naive.tdpo1, KL, of_log_ratios=True),
    "tdpo2": Case(
        methods.tdpo2,
        naive.tdpo2,
        KL,
        without_stop_gradient=partial(methods.tdpo2, stop_gradient=False),
        of_log_ratios=True,
    ),
    "tdpo2 all gradients": Case(
        partial(methods.tdpo2, kl_weight=0.8, stop_gradient=False),
        partial(naive.tdpo2, alpha=0.8, constant=False),
        KL,
        of_log_ratios=True,
    ),
    "sft": Case(methods.sft, naive.sft, needs_reference=False),
    "cpo": Case(methods.cpo, naive.cpo, needs_reference=False),
    "cpo smoothed": Case(
        partial(methods.cpo, nll_weight=0.3, label_smoothing=0.1),
        partial(naive.cpo, nll_weight=0.3, smoothing=0.1),
        needs_reference=False,
    ),
    "orpo": Case(methods.orpo, naive.orpo, needs_reference=False),
    "slic_hf": Case(methods.slic_hf, naive.slic_hf, needs_reference=False),
    "slic_hf options": Case(
        partial(methods.slic_hf, margin=9.0, regularization=0.7),
        partial(naive.slic_hf, margin=9.0, regularization=0.7),
        needs_reference=False,
    ),
    "rrhf": Case(methods.rrhf, naive.rrhf, needs_reference=False),
    "rrhf options": Case(
        partial(methods.rrhf, regularization=0.2),
        partial(naive.rrhf, regularization=0.2),
        (),
        (),
        None,
        False,
    ),
    "f-dpo reverse_kl": f_case(methods.dpo, naive.dpo, "reverse_kl"),
    "f-dpo forward_kl": f_case(methods.dpo, naive.dpo, "forward_kl"),
    "f-dpo js": f_case(methods.dpo, naive.dpo, "js_divergence"),
    "f-dpo alpha": f_case(methods.dpo, naive.dpo, "alpha_divergence", 0.5),
    "f-dpo alpha 2": f_case(methods.dpo, naive.dpo, "alpha_divergence", 2.0),
    "f-dpo alpha -0.4": f_case(methods.dpo, naive.dpo, "alpha_divergence", -0.4),
    "ipo forward_kl": f_case(methods.ipo, naive.ipo, "forward_kl"),
    "ipo js": f_case(methods.ipo, naive.ipo, "js_divergence"),
    "hinge forward_kl": f_case(methods.hinge, naive.hinge, "forward_kl"),
    "sigmoid_norm alpha": f_case(methods.sigmoid_norm, naive.sigmoid_norm, "alpha_divergence", 0.3),
    "r_dpo js": f_case(
        partial(methods.r_dpo, length_penalty=0.05), partial(naive.r_dpo, alpha=0.05), "js_divergence"
    ),
    "wpo dpo": Case(methods.with_wpo_weights(methods.dpo), naive.wpo(naive.dpo), (), LOG_SUM_SQ),
    "wpo odpo": Case(methods.with_wpo_weights(methods.odpo), naive.wpo(naive.odpo), ("offset",), LOG_SUM_SQ),
    "wpo f-dpo": Case(
        methods.with_wpo_weights(methods.with_f_divergence(methods.dpo, "js_divergence")),
        naive.wpo(naive.f_dpo(naive.dpo, "js_divergence")),
        (),
        LOG_SUM_SQ,
    ),
    "mpo": Case(
        methods.weighted_sum((methods.dpo, 0.8), (methods.bco_pair, 0.2), (methods.sft, 1.5)),
        mixed,
        of_log_ratios=True,
    ),
    "sum with tensors": Case(
        methods.weighted_sum((methods.odpo, 2), (kto_of_pair, -0.5)),
        mixed_with_tensors,
        ("offset", "kl"),
        of_log_ratios=True,
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def draw_pairs(seed: int, beta: float = 0.1, equal_lengths: bool = False, **changes) -> Pairs:
    """Random pairs in float64 whose log-probs carry gradient and whose log-ratios are within ±3."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(PAIRS, generator=generator, dtype=torch.float64)

    chosen_lengths, rejected_lengths = draw(2, 12).long(), draw(2, 12).long()
    chosen_logps, rejected_logps = draw(-40, -4).requires_grad_(), draw(-40, -4).requires_grad_()
    return replace(
        Pairs(
            chosen_logps,
            rejected_logps,
            chosen_lengths,
            chosen_lengths if equal_lengths else rejected_lengths,
            beta,
            chosen_logps.detach() + draw(-3, 3),
            rejected_logps.detach() + draw(-3, 3),
            {
                "logps": torch.cat([1.5 * chosen_logps, 1.2 * rejected_logps]),  # as under LD-DPO
                "log_sum_sq_probs": torch.cat([draw(-40, -4), draw(-40, -4)]),
            },
        ),
        **changes,
    )


def draw_tensors(names: tuple[str, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand((() if name == "kl" else (PAIRS,)), generator=generator, dtype=torch.float64)
        .mul(2)
        .requires_grad_()
        for name in names
    }


def as_numbers(pairs: Pairs) -> naive.Numbers:
    plain_w, plain_l = pairs.token_sums["logps"].chunk(2)
    norm_w, norm_l = pairs.token_sums.get("log_sum_sq_probs", pairs.token_sums["logps"]).chunk(2)
    zeros = torch.zeros_like(pairs.chosen_logps)
    return naive.Numbers(
        logp_w=pairs.chosen_logps,
        logp_l=pairs.rejected_logps,
        ref_w=zeros if pairs.ref_chosen_logps is None else pairs.ref_chosen_logps,
        ref_l=zeros if pairs.ref_rejected_logps is None else pairs.ref_rejected_logps,
        len_w=pairs.chosen_lengths,
        len_l=pairs.rejected_lengths,
        beta=pairs.beta,
        plain_logp_w=plain_w,
        plain_logp_l=plain_l,
        norm_w=norm_w,
        norm_l=norm_l,
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str = "value", rtol=1e-6) -> None:
    assert actual.shape == expected.shape, name
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-11, msg=lambda m: f"{name}: {m}")


def test_every_loss_of_the_module_is_compared():
    not_losses = {"kto_kl", "with_f_divergence", "with_wpo_weights", "weighted_sum", "logsigmoid", "replace"}
    public = {
        name
        for name, value in vars(methods).items()
        if callable(value)
        and not isinstance(value, type)
        and not name.startswith("_")
        and getattr(value, "__module__", "") == "focalkern.methods"
    }
    assert public - not_losses <= {name.split()[0] for name in CASES}


# By themselves


@pytest.mark.parametrize(("seed", "beta"), [(0, 0.1), (1, 2.0), (2, 0.1)])
@cases
def test_loss_and_gradient_are_those_of_the_paper(case, seed, beta):
    pairs, tensors = draw_pairs(seed, beta), draw_tensors(case.tensors, seed)
    actual, expected = case.function(pairs, **tensors), case.naive(as_numbers(pairs), **tensors)
    assert_close(actual, expected, "losses")
    upstream = (
        torch.rand_like(actual) - 0.3
    )  # each loss its own factor, so that none can be taken for another
    leaves = {"chosen_logps": pairs.chosen_logps, "rejected_logps": pairs.rejected_logps, **tensors}
    gradients = (
        torch.autograd.grad(
            (x * upstream).sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
        )
        for x in (actual, expected)
    )
    for name, slope, expected_slope in zip(leaves, *gradients, strict=True):
        assert_close(slope, expected_slope, f"gradient in {name}")


@cases
def test_its_gradient_is_that_of_finite_differences(case):
    check_pair_loss(
        case.without_stop_gradient or case.function,
        outputs=case.outputs,
        tensors={name: x[:4] if x.dim() else x for name, x in draw_tensors(case.tensors).items()},
        reference=case.needs_reference,
        skip=("logps",) if case.outputs == LOG_SUM_SQ else (),  # of WPO's weights, which are constants
    )


# On the fused head


def head_batch(dtype: torch.dtype) -> Batch:
    """With a reference model for the KL."""
    sizes = {"hidden_size": 12, "vocab_size": 40}
    pairs = batch(dtype=dtype, is_near=True, **sizes)
    pairs.ref = problem(*pairs.labels.shape, **sizes, sharpness=1.0, seed=1)
    return pairs


def named_tensors(pairs: Batch, names: tuple[str, ...], leaves: Leaves) -> dict[str, torch.Tensor]:
    """The KL is of the policy, and carries its gradient."""
    chosen_kl, rejected_kl = pairs.plain_kl(leaves).sum(-1).chunk(2)
    dtype = leaves["hidden"].dtype
    values = {
        "chosen_kl": chosen_kl,
        "rejected_kl": rejected_kl,
        "offset": torch.arange(pairs.pairs, device=DEVICE).to(dtype) / 2,
        "kl": torch.tensor(0.3, dtype=dtype, device=DEVICE),
    }
    return {name: values[name] for name in names}


def with_gradients(loss: torch.Tensor, leaves: Leaves) -> Leaves:
    loss.backward()
    return {"loss": loss.detach(), **{name: x.grad for name, x in leaves.items()}}


def fused(pairs: Batch, case: Case, backend: str) -> Leaves:
    leaves = pairs.leaves()
    loss_fn = FusedPairLoss(case.function, outputs=case.outputs, backend=backend)
    return with_gradients(
        pairs.loss(loss_fn, leaves, **named_tensors(pairs, case.tensors, leaves)).loss, leaves
    )


def plain(pairs: Batch, case: Case, dtype: torch.dtype, is_naive: bool) -> Leaves:
    """The same from the logits: with the naive loss, or with the library's on PyTorch's log-probs."""
    leaves = pairs.leaves(dtype)
    tokens = pairs.plain(leaves)
    sums = {name: getattr(tokens, name).sum(-1) for name in ("logps", "log_sum_sq_probs")}
    refs = (x.to(dtype) for x in pairs.refs.values())
    inputs = Pairs(*sums["logps"].chunk(2), *pairs.keep.sum(-1).chunk(2), 0.1, *refs, sums)
    tensors = named_tensors(pairs, case.tensors, leaves)
    losses = case.naive(as_numbers(inputs), **tensors) if is_naive else case.function(inputs, **tensors)
    return with_gradients(losses.mean(), leaves)


@cases
def test_on_the_fused_head_loss_and_gradients_are_those_of_the_logits(case):
    pairs = head_batch(torch.float64)
    actual, expected = fused(pairs, case, "torch"), plain(pairs, case, torch.float64, is_naive=True)
    for name, value in actual.items():
        assert value.dtype == torch.float64
        assert expected[name].any()
        assert relative_error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize(
    "name", ["dpo", "ipo", "aot smoothed", "kto", "tdpo1", "orpo", "cpo", "f-dpo js", "wpo dpo", "mpo"]
)
def test_on_the_fused_head_fp32_is_as_accurate_as_plain_pytorch(name, backend):
    case, pairs = CASES[name], head_batch(torch.float32)
    actual = fused(pairs, case, backend)
    naive_values = plain(pairs, case, torch.float32, is_naive=False)
    exact = plain(pairs, case, torch.float64, is_naive=True)
    size = max(-x.min().item() for x in pairs.refs.values())
    for of, value in actual.items():
        # Sums of log-probs of this size, in no place weighing more than one by one.
        assert_as_accurate(value, naive_values[of], exact[of], of, conditioning=size)


# Limits and identities

seeds = st.integers(0, 2**16)
betas = st.sampled_from([0.05, 0.1, 0.5, 2.0])
few = settings(max_examples=10)
IS_DPO = {
    "label_smoothing 0": (partial(methods.dpo, label_smoothing=0.0), {}, False),
    "robust, ε = 0": (partial(methods.robust, label_smoothing=0.0), {}, False),
    "odpo, no offset": (methods.odpo, {"offset": 0.0}, False),
    "r_dpo, no penalty": (partial(methods.r_dpo, length_penalty=0.0), {}, False),
    "r_dpo, equal lengths": (partial(methods.r_dpo, length_penalty=0.3), {}, True),
    "tdpo1, no KL": (methods.tdpo1, {"chosen_kl": 0.0, "rejected_kl": 0.0}, False),
    "tdpo2, equal KL": (methods.tdpo2, {"chosen_kl": 0.7, "rejected_kl": 0.7}, False),
    "tdpo2, weight 0": (partial(methods.tdpo2, kl_weight=0.0), {"chosen_kl": 1.0, "rejected_kl": 2.0}, False),
    "α = 1": (methods.with_f_divergence(methods.dpo, "alpha_divergence", 1.0), {}, False),
    "reverse KL": (methods.with_f_divergence(methods.dpo, "reverse_kl"), {}, False),
    "a sum of one": (methods.weighted_sum((methods.dpo, 1.0)), {}, False),
}


@pytest.mark.parametrize(("function", "values", "equal_lengths"), IS_DPO.values(), ids=IS_DPO)
@few
@given(seed=seeds, beta=betas)
def test_what_is_dpo_in_the_limit_is_dpo(function, values, equal_lengths, seed, beta):
    pairs = draw_pairs(seed, beta, equal_lengths)
    tensors = {name: torch.full((PAIRS,), value, dtype=torch.float64) for name, value in values.items()}
    assert_close(function(pairs, **tensors), methods.dpo(pairs), rtol=1e-12)


@few
@given(seed=seeds, beta=betas, distance=st.sampled_from([1e-7, -1e-7, 1e-11]))
def test_alpha_divergence_tends_to_reverse_kl(seed, beta, distance):
    pairs = draw_pairs(seed, beta)
    near = methods.with_f_divergence(methods.dpo, "alpha_divergence", 1 + distance)
    # The score is off by the square of the log-ratio, at most 9, times half the distance.
    torch.testing.assert_close(near(pairs), methods.dpo(pairs), rtol=0, atol=20 * beta * abs(distance))


@few
@given(seed=seeds, beta=betas)
def test_alpha_divergence_at_0_is_forward_kl(seed, beta):
    pairs = draw_pairs(seed, beta)
    alpha = methods.with_f_divergence(methods.dpo, "alpha_divergence", 0.0)
    assert_close(alpha(pairs), methods.with_f_divergence(methods.dpo, "forward_kl")(pairs), rtol=1e-12)


@pytest.mark.parametrize("log_ratio", [1e-6, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    "function",
    [methods.dpo, methods.with_f_divergence(methods.dpo, "js_divergence"), methods.kto, methods.apo_down],
    ids=["dpo", "js", "kto", "apo_down"],
)
def test_fp32_stays_finite_for_extreme_ratios(function, sign, log_ratio):
    logps = torch.full((PAIRS,), -2e4, requires_grad=True)
    lengths = torch.full((PAIRS,), 10)
    refs = (logps.detach() - sign * log_ratio, logps.detach() + sign * log_ratio)
    tensors = {"kl": torch.tensor(0.1)} if function is methods.kto else {}
    losses = function(Pairs(logps, logps.clone(), lengths, lengths, 2.0, *refs), **tensors)
    (slope,) = torch.autograd.grad(losses.sum(), logps)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(slope).all()


@few
@given(seed=seeds, beta=betas, share=st.floats(0.0, 0.45))
def test_robust_is_unbiased_when_labels_are_flipped(seed, beta, share):
    pairs = draw_pairs(seed, beta)
    flipped = replace(
        pairs,
        chosen_logps=pairs.rejected_logps,
        rejected_logps=pairs.chosen_logps,
        ref_chosen_logps=pairs.ref_rejected_logps,
        ref_rejected_logps=pairs.ref_chosen_logps,
    )
    robust = partial(methods.robust, label_smoothing=share)
    mean = (1 - share) * robust(pairs) + share * robust(flipped)
    assert_close(mean, methods.dpo(pairs), rtol=1e-9)


@few
@given(beta=betas, smoothing=st.floats(1e-4, 0.5))
def test_exo_is_zero_where_the_policy_has_the_smoothed_preference(beta, smoothing):
    pairs = draw_pairs(0, beta)
    margin = math.log((1 - smoothing) / smoothing) / beta
    refs = (pairs.chosen_logps.detach() - margin, pairs.rejected_logps.detach())
    at_optimum = replace(pairs, ref_chosen_logps=refs[0], ref_rejected_logps=refs[1])
    exo = partial(methods.exo_pair, label_smoothing=smoothing)
    assert exo(at_optimum).abs().max() < 1e-12
    assert (exo(pairs) >= 0).all()


@few
@given(seed=seeds, beta=betas)
def test_kto_without_kl_is_apo_zero_sequence_by_sequence(seed, beta):
    pairs = draw_pairs(seed, beta)
    chosen, rejected = methods.kto(pairs, kl=torch.tensor(0.0)).chunk(2)
    assert_close(chosen + rejected, methods.apo_zero(pairs), rtol=1e-12)


@few
@given(seed=seeds, weights=st.tuples(st.floats(0, 3), st.floats(0, 3)))
def test_kto_under_a_great_kl_gives_up_on_chosen_and_is_content_with_rejected(seed, weights):
    pairs = draw_pairs(seed, 2.0)
    losses = methods.kto(
        pairs, kl=torch.tensor(1e3), desirable_weight=weights[0], undesirable_weight=weights[1]
    )
    assert_close(losses, torch.tensor([weights[0]] * PAIRS + [0.0] * PAIRS, dtype=torch.float64))


@pytest.mark.parametrize(("shift", "expected"), [(0.25, 0.25), (-0.25, 0.0), (0.0, 0.0)])
def test_kto_kl_is_the_mean_log_ratio_and_never_negative(shift, expected):
    logps = torch.tensor([-3.0, -5.0, -1.0], requires_grad=True)
    kl = methods.kto_kl(logps + shift, logps.detach().roll(1))
    assert kl.item() == pytest.approx(expected, abs=1e-6)
    assert kl.shape == ()
    assert not kl.requires_grad


DISTRIBUTED = """
import torch, torch.distributed as dist
from focalkern.methods import kto_kl

dist.init_process_group("gloo")
rank = dist.get_rank()
refs = torch.zeros(3)
assert kto_kl(refs + 4.0 * rank - 1.0, refs) == 1.0  # of -1 and 3: the mean is taken before the cut at 0
own = [dist.new_group([i]) for i in range(2)][rank]
assert kto_kl(refs + 4.0 * rank - 1.0, refs, own) == 3.0 * rank
dist.destroy_process_group()
"""


def test_kto_kl_is_the_mean_over_all_ranks_of_its_group(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(DISTRIBUTED, encoding="utf-8")
    run_ranks(script)


@few
@given(seed=seeds, a=st.floats(-2, 2), b=st.floats(-2, 2))
def test_weighted_sum_is_linear(seed, a, b):
    pairs, tensors = draw_pairs(seed), draw_tensors(("offset",), seed)
    both = methods.weighted_sum((methods.odpo, a), (methods.ipo, b), (methods.sft, 1))
    expected = a * methods.odpo(pairs, **tensors) + b * methods.ipo(pairs) + methods.sft(pairs)
    assert_close(both(pairs, **tensors), expected, rtol=1e-12)


def test_weighted_sum_gives_a_module_the_tensors_that_it_takes():
    class Shifted(torch.nn.Module):
        def forward(self, pairs: Pairs, *, offset: torch.Tensor) -> torch.Tensor:
            return methods.odpo(pairs, offset=offset)

    pairs, tensors = draw_pairs(0), draw_tensors(("offset",))
    both = methods.weighted_sum((Shifted(), 2.0), (methods.dpo, 1.0))
    expected = 2 * methods.odpo(pairs, **tensors) + methods.dpo(pairs)
    assert_close(both(pairs, **tensors), expected, rtol=1e-12)


def test_a_sum_of_sums_gives_its_tensors_on():
    pairs, tensors = draw_pairs(0), draw_tensors(("offset",))
    inner = methods.weighted_sum((methods.odpo, 2.0), (methods.dpo, 1.0))
    outer = methods.weighted_sum((inner, 0.5), (methods.ipo, 1.0))
    expected = methods.odpo(pairs, **tensors) + 0.5 * methods.dpo(pairs) + methods.ipo(pairs)
    assert_close(outer(pairs, **tensors), expected, rtol=1e-12)


def test_terms_of_different_shapes_are_refused_also_where_they_would_broadcast():
    pairs = draw_pairs(0)
    one = replace(
        pairs,
        **{
            name: getattr(pairs, name)[:1]
            for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
        },
    )
    with pytest.raises(ValueError, match=r"^terms must give losses of one shape, or 0-dim; got"):
        methods.weighted_sum((methods.kto, 1.0), (methods.dpo, 1.0))(one, kl=torch.zeros(()))


@pytest.mark.parametrize("f_divergence", ["forward_kl", "alpha_divergence", "js_divergence"])
def test_scores_far_from_the_reference_stay_finite(f_divergence):
    logps = [torch.full((PAIRS,), -300.0, requires_grad=True) for _ in range(2)]
    lengths = torch.full((PAIRS,), 9)
    far = Pairs(*logps, lengths, lengths, 0.1, torch.full((PAIRS,), -10.0), torch.full((PAIRS,), -299.0))
    alpha = 0.5 if f_divergence == "alpha_divergence" else None
    losses = methods.with_f_divergence(methods.dpo, f_divergence, alpha)(far)
    gradients = torch.autograd.grad(losses.sum(), logps)
    assert all(torch.isfinite(x).all() for x in (losses, *gradients))


def test_an_f_divergence_that_would_change_nothing_is_refused():
    pairs = draw_pairs(0)
    for function in (methods.cpo, methods.sft):
        with pytest.raises(ValueError, match=r"^f_divergence must be 'reverse_kl' with this loss"):
            methods.with_f_divergence(function, "js_divergence")(pairs)
    twice = methods.with_f_divergence(methods.with_f_divergence(methods.dpo, "forward_kl"), "js_divergence")
    with pytest.raises(ValueError, match=r"^f_divergence must be one"):
        twice(pairs)
    with pytest.raises(ValueError, match=r"^alpha must be None with f_divergence='js_divergence'; got 0\.3"):
        methods.with_f_divergence(methods.dpo, "js_divergence", 0.3)
    with pytest.raises(TypeError, match=r"^alpha must be a number"):
        methods.with_f_divergence(methods.dpo, "alpha_divergence")


def test_wpo_weights_need_one_loss_for_each_pair():
    pairs = draw_pairs(0)
    with pytest.raises(ValueError, match=r"^function must give one loss for each pair"):
        methods.with_wpo_weights(methods.kto)(pairs, kl=torch.zeros(()))


def test_discopop_is_finite_for_a_badly_misranked_pair():
    logps = [torch.tensor([-1000.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)]
    lengths = torch.tensor([9])
    losses = methods.discopop(Pairs(*logps, lengths, lengths, 0.1, torch.zeros(1), torch.zeros(1)))
    gradients = torch.autograd.grad(losses.sum(), logps)
    assert losses.item() == pytest.approx(99.0)
    assert [g.item() for g in gradients] == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize(
    "terms",
    [(), ([(methods.dpo, 1.0)],), (methods.dpo, methods.sft), ((methods.dpo,),)],
    ids=["none", "a list", "functions", "no weight"],
)
def test_terms_of_another_shape_are_refused_with_what_they_should_be(terms):
    with pytest.raises(ValueError, match=r"^terms must be \(function, weight\) pairs"):
        methods.weighted_sum(*terms)


def test_combined_losses_show_what_they_are_made_of():
    function = methods.weighted_sum((methods.with_wpo_weights(methods.dpo), 1.0), (methods.sft, 0.1))
    assert "sft" in repr(function)
    assert "dpo" in repr(function)


@pytest.mark.parametrize(
    "function",
    [
        partial(methods.r_dpo, length_penalty=math.nan),
        partial(methods.cpo, nll_weight=math.inf),
        partial(methods.slic_hf, margin="1"),
        partial(methods.rrhf, regularization=None),
    ],
    ids=lambda f: f.func.__name__,
)
def test_an_option_that_is_no_number_is_refused_by_name(function):
    (name,) = function.keywords
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        function(draw_pairs(0))


@few
@given(seed=seeds, beta=betas)
def test_wpo_of_a_sum_is_the_sum_of_wpo(seed, beta):
    pairs = draw_pairs(seed, beta)
    terms = ((methods.dpo, 0.5), (methods.hinge, 2.0))
    inside = methods.weighted_sum(*((methods.with_wpo_weights(f), weight) for f, weight in terms))
    assert_close(methods.with_wpo_weights(methods.weighted_sum(*terms))(pairs), inside(pairs), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("other", [-1e-30, -1e-9, -0.7, -300.0])
@pytest.mark.parametrize("near_zero", [0.0, -1e-30, -1e-9, -1e-3])
@pytest.mark.parametrize("sure_of", ["chosen", "rejected"])
def test_orpo_is_finite_where_the_model_is_sure(sure_of, near_zero, other, dtype):
    values = (near_zero, other) if sure_of == "chosen" else (other, near_zero)
    chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in values)
    lengths = torch.tensor([1])
    losses = methods.orpo(
        Pairs(chosen, rejected, lengths, lengths, 0.1, token_sums={"logps": torch.cat([chosen, rejected])})
    )
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(losses.sum(), (chosen, rejected)))


# What is refused


@pytest.mark.parametrize(
    ("function", "name", "values"),
    [
        (methods.dpo, "label_smoothing", [-0.1, 0.51, math.nan]),
        (methods.cpo, "label_smoothing", [-0.1, 0.51]),
        (methods.aot, "label_smoothing", [-0.1, 0.51]),
        (methods.aot_unpaired, "label_smoothing", [-0.1, 0.51]),
        (methods.robust, "label_smoothing", [-0.1, 0.5, 1.0]),
        (methods.exo_pair, "label_smoothing", [0.0, -0.1, 0.51]),
        (methods.discopop, "discopop_tau", [0.0, -0.05, math.inf]),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_an_option_out_of_range_is_refused_by_name(function, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must be .*; got "):
            function(draw_pairs(0), **{name: value})


@pytest.mark.parametrize("f_divergence", ["kl", "", None, "jeffreys"])
def test_an_unknown_divergence_is_refused(f_divergence):
    with pytest.raises(ValueError, match=r"^f_divergence must be one of 'reverse_kl'"):
        methods.with_f_divergence(methods.dpo, f_divergence)


def test_alpha_must_be_a_number():
    with pytest.raises(ValueError, match=r"^alpha must be finite"):
        methods.with_f_divergence(methods.dpo, "alpha_divergence", math.inf)


OF_LOG_RATIOS = {name: case for name, case in CASES.items() if case.of_log_ratios}


@pytest.mark.parametrize("case", OF_LOG_RATIOS.values(), ids=OF_LOG_RATIOS)
def test_a_loss_of_log_ratios_takes_no_other_divergence(case):
    function = methods.with_f_divergence(case.function, "js_divergence")
    with pytest.raises(ValueError, match=r"^f_divergence must be 'reverse_kl' with this loss"):
        function(draw_pairs(0), **draw_tensors(case.tensors))


@pytest.mark.parametrize("missing", ["ref_chosen_logps", "ref_rejected_logps"])
@cases
def test_a_missing_reference_is_named_where_it_is_needed(case, missing):
    pairs, tensors = draw_pairs(0, **{missing: None}), draw_tensors(case.tensors)
    if not case.needs_reference:
        assert torch.isfinite(case.function(pairs, **tensors)).all()
        return
    with pytest.raises(ValueError, match=rf"^{missing} must be given, \[B\] = \[{PAIRS}\]"):
        case.function(pairs, **tensors)


@pytest.mark.parametrize(
    "function",
    [
        methods.aot,
        methods.aot_unpaired,
        partial(methods.aot, label_smoothing=0.1),
        methods.weighted_sum((methods.dpo, 1.0), (methods.aot, 1.0)),
    ],
    ids=["aot", "aot_unpaired", "partial", "in a sum"],
)
def test_wpo_does_not_weigh_what_is_sorted(function):
    with pytest.raises(ValueError, match=r"^function must keep the pairs apart"):
        methods.with_wpo_weights(function)


def test_wpo_without_its_output_is_refused():
    pairs = draw_pairs(0)
    pairs = replace(pairs, token_sums={"logps": pairs.token_sums["logps"]})
    with pytest.raises(ValueError, match=r"^outputs must name 'log_sum_sq_probs'.*got .*'logps'"):
        methods.with_wpo_weights(methods.dpo)(pairs)


def test_a_sum_of_nothing_and_a_weight_that_is_no_number_are_refused():
    with pytest.raises(ValueError, match=r"^terms must be"):
        methods.weighted_sum()
    with pytest.raises(TypeError, match=r"^weight must be a number"):
        methods.weighted_sum((methods.dpo, "1"))


def test_a_tensor_that_no_term_takes_is_refused():
    with pytest.raises(TypeError, match=r"^offsets is taken by none"):
        methods.weighted_sum((methods.odpo, 1.0), (methods.dpo, 1.0))(draw_pairs(0), offsets=torch.zeros(5))
