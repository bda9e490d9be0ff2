"""`linear_kl`: value and gradient against plain PyTorch, between (nearly) equal models, and its edges."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, INTERPRETED, LOW_PRECISION
from hypothesis import given
from hypothesis import strategies as st
from largest import Largest
from tolerance import assert_as_accurate, relative_error

from focalkern import linear_kl, reference

DTYPES = [torch.float32, *LOW_PRECISION]
EPS = torch.finfo(torch.float32).eps
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "negative logit_scale": {"logit_scale": -0.5},
    "all of them": {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.9},
}
NAMES = ("hidden", "weight", "bias")


@dataclass
class Models:
    """Random hidden states and heads of a policy and a reference; a third of the labels is masked."""

    shape: tuple[int, ...] = (2, 9)
    hidden_size: int = 24
    ref_hidden_size: int = 40
    vocab_size: int = 300
    dtype: torch.dtype = torch.float32
    has_bias: bool = False
    sharpness: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator)

        def model(hidden_size: int) -> list[torch.Tensor]:
            weight = draw(self.vocab_size, hidden_size) * self.sharpness / hidden_size**0.5
            tensors = [draw(*self.shape, hidden_size), weight, draw(self.vocab_size)]
            return [x.to(DEVICE, self.dtype) for x in tensors[: 3 if self.has_bias else 2]]

        self.policy, self.ref = model(self.hidden_size), model(self.ref_hidden_size)
        self.labels = torch.randint(self.vocab_size, self.shape, generator=generator).to(DEVICE)
        self.labels[(torch.rand(self.shape, generator=generator) < 1 / 3).to(DEVICE)] = -100
        self.grad = draw(*self.shape).to(DEVICE)

    def leaves(self, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Fresh copies of the policy's hidden, weight and bias (if there is one) that ask for a gradient."""
        return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in self.policy]


def run(models: Models, backend: str, leaves: list[torch.Tensor] | None = None, **options) -> torch.Tensor:
    hidden, weight, bias = [*(leaves or models.policy), None][:3]
    ref_hidden, ref_weight, ref_bias = [*models.ref, None][:3]
    labels = options.pop("labels", models.labels)
    biases = {"bias": bias, "ref_bias": ref_bias}
    return linear_kl(hidden, weight, ref_hidden, ref_weight, labels, **biases, backend=backend, **options)


def run_reference(models: Models, leaves: list[torch.Tensor], **options) -> torch.Tensor:
    hidden, weight, bias = [*leaves, None][:3]
    ref_hidden, ref_weight, ref_bias = [*(x.to(hidden.dtype) for x in models.ref), None][:3]
    return reference.linear_kl(
        hidden, weight, ref_hidden, ref_weight, models.labels, bias, ref_bias, **options
    )


def measure(function, models: Models, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    """The KL, and its gradients in hidden, weight and bias."""
    leaves = models.leaves(dtype)
    kl = function(models, leaves, **options)
    return [kl.detach(), *torch.autograd.grad(kl, leaves, models.grad.to(kl.dtype))]


def conditioning(models: Models, **options) -> list[float]:
    """How many ulps of fp32 the KL and its gradients move when the logits move by one: what p and p_ref are
    known to, and p − p_ref, whose terms cancel."""
    keep = models.labels != -100
    g = models.grad[keep].double()[:, None]
    sizes, log_probs = [], []
    for hidden, weight, *bias in ([x.double() for x in model] for model in (models.policy, models.ref)):
        x = (F.linear(hidden[keep], weight, *bias) * options.get("logit_scale", 1.0)).requires_grad_()
        softcap = options.get("softcap")
        z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / options.get("temperature", 1.0)
        slope = torch.autograd.grad(z.sum(), x)[0].abs() * abs(options.get("logit_scale", 1.0))
        sizes.append(x.abs().max().item() / options.get("temperature", 1.0))
        log_probs.append((z.log_softmax(-1).detach(), slope))
    size = max(*sizes, 1.0)
    (log_p, slope), (ref_log_p, _) = log_probs
    p, ref_p = log_p.exp(), ref_log_p.exp()
    total, dz = g.abs() * (p + ref_p) * slope, g * (p - ref_p) * slope
    hidden, weight = models.policy[0][keep].double(), models.policy[1].double()
    kl = (ref_p * (ref_log_p - log_p)).sum(-1)
    ratios = [
        (p + ref_p * (1 + (ref_log_p - log_p).abs())).sum(-1).norm() / kl.norm(),
        (total @ weight.abs()).norm() / (dz @ weight).norm(),
        (total.T @ hidden.abs()).norm() / (dz.T @ hidden).norm(),
        total.sum(0).norm() / dz.sum(0).norm(),
    ]
    return [size * ratio.item() for ratio in ratios]


def assert_matches_the_reference(models: Models, backend: str, **options) -> None:
    def fused(models, leaves, **options):
        return run(models, backend, leaves, **options)

    actual = measure(fused, models, models.dtype, **options)
    naive = measure(run_reference, models, models.dtype, **options)
    exact = measure(run_reference, models, torch.float64, **options)
    assert actual[0].dtype == torch.float32
    assert actual[0].shape == models.labels.shape
    assert not actual[0][models.labels == -100].any()
    assert [x.dtype for x in actual[1:]] == [models.dtype] * (len(actual) - 1)
    names = ["KL", "dhidden", "dweight", "dbias"]
    for values in zip(actual, naive, exact, names, conditioning(models, **options), strict=False):
        assert_as_accurate(*values)


def assert_equal(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# Value and gradient


@pytest.mark.parametrize(
    ("transform", "has_bias"), [("plain", False), *((transform, True) for transform in TRANSFORMS)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_match_the_reference(dtype, transform, has_bias, backend):
    models = Models(dtype=dtype, has_bias=has_bias)
    assert_matches_the_reference(models, backend, **TRANSFORMS[transform])


@pytest.mark.parametrize(
    ("vocab_size", "hidden_size", "ref_hidden_size"),
    [(2, 1, 1), (127, 33, 64), (128, 64, 1), (129, 1, 33), (515, 33, 33), (515, 64, 96)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes_match_the_reference(dtype, vocab_size, hidden_size, ref_hidden_size, backend):
    models = Models((19,), hidden_size, ref_hidden_size, vocab_size, dtype, has_bias=True)
    assert_matches_the_reference(models, backend)


@given(
    shape=st.sampled_from([(1,), (7,), (2, 5), (17,), (2, 1, 9)]),
    sizes=st.tuples(*[st.integers(1, 70)] * 2),
    vocab_size=st.integers(2, 400),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    sharpness=st.floats(0.1, 8.0),
    transform=st.sampled_from(list(TRANSFORMS)),
    seed=st.integers(0, 10**6),
)
def test_random_problems_match_the_reference(
    backend, shape, sizes, vocab_size, dtype, has_bias, sharpness, transform, seed
):
    models = Models(shape, *sizes, vocab_size, dtype, has_bias, sharpness, seed)
    models.labels.view(-1)[0] = 0
    assert_matches_the_reference(models, backend, **TRANSFORMS[transform])


def test_more_vocabulary_than_a_chunk_matches_the_reference(backend):
    assert_matches_the_reference(Models((3,), 8, 16, vocab_size=4500, has_bias=True), backend)


@pytest.mark.skipif(INTERPRETED, reason="float64 is for the torch backend")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_float64_gradients_match_finite_differences(transform):
    models = Models((4,), 3, 5, vocab_size=140, dtype=torch.float64, has_bias=True)
    models.labels[:] = torch.tensor([0, -100, 130, 2])

    def kl(*leaves):
        return run(models, "torch", list(leaves), **TRANSFORMS[transform])

    leaves = models.leaves()
    assert kl(*leaves).dtype == torch.float64
    torch.testing.assert_close(
        kl(*leaves), run_reference(models, leaves, **TRANSFORMS[transform]), rtol=1e-13, atol=0
    )
    assert torch.autograd.gradcheck(kl, leaves)


def test_a_vocabulary_of_one_leaves_nothing_to_diverge(backend):
    models = Models(vocab_size=1, has_bias=True)
    leaves = models.leaves()
    kl = run(models, backend, leaves)
    for x in (kl, *torch.autograd.grad(kl, leaves, models.grad)):
        assert not x.any()


def test_the_sum_along_a_sequence_is_tdpos_sequential_kl(backend):
    models = Models((2, 9))
    inputs, labels = models.labels, models.labels
    sequential = run(models, backend, labels=inputs, shift=True).sum(-1)
    for b in range(2):
        logits, ref_logits = (
            hidden[b].double() @ weight.double().T for hidden, weight in (models.policy, models.ref)
        )
        predicts = torch.tensor([t for t in range(8) if labels[b, t + 1] != -100], device=DEVICE)
        expected = F.kl_div(
            logits[predicts].log_softmax(-1), ref_logits[predicts].softmax(-1), reduction="sum"
        )
        assert sequential[b].item() == pytest.approx(expected.item(), rel=1e-5)


# Equal and nearly equal models


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [33, 64])
def test_equal_models_have_no_divergence_and_no_gradient(hidden_size, dtype, transform, backend):
    models = Models(
        hidden_size=hidden_size, ref_hidden_size=hidden_size, vocab_size=515, dtype=dtype, has_bias=True
    )
    models.ref = [x.clone() for x in models.policy]
    leaves = models.leaves()
    kl = run(models, backend, leaves, **TRANSFORMS[transform])
    for x in (kl, *torch.autograd.grad(kl, leaves, models.grad)):
        assert not x.any()


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_divergence_of_nearly_equal_models_does_not_cancel(distance, backend):
    models = Models(hidden_size=32, ref_hidden_size=32)
    models.ref = [x + distance * torch.randn_like(x) for x in models.policy]
    models.labels[:] = 0
    exact = run_reference(models, models.leaves(torch.float64)).detach()
    z, ref_z = (hidden @ weight.T for hidden, weight in (models.policy, models.ref))
    # KL is about half the variance of the logits' difference, which is known to eps of a logit.
    allowed = 4 * EPS * z.abs().max() / (z - ref_z).std()
    assert relative_error(run(models, backend), exact) <= allowed


@given(distance=st.floats(1e-7, 1.0), sharpness=st.floats(0.1, 20.0), seed=st.integers(0, 10**6))
def test_the_divergence_is_never_negative(backend, distance, sharpness, seed):
    models = Models((16,), 16, 16, vocab_size=200, sharpness=sharpness, seed=seed)
    models.ref = [x + distance * torch.randn_like(x) for x in models.policy]
    assert (run(models, backend) >= 0).all()


# Offsets, saturation, removed entries


@pytest.mark.parametrize("whose", ["policy", "reference", "both"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_logits_changes_nothing_but_their_rounding(offset, whose, backend):
    models = Models(has_bias=True)
    for bias in (models.policy[2], models.ref[2]):
        bias.zero_()
    plain = measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32)
    for name, model in (("policy", models.policy), ("reference", models.ref)):
        if whose in (name, "both"):
            model[2].fill_(offset)
    moved = measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32)
    ulp = 2.0**-10  # of 1e4 in fp32; a log-prob of either model is known to that, and what they weigh
    assert ((moved[0] - plain[0]).abs() <= 2 * ulp * (1 + plain[0])).all()
    for a, b in zip(moved[1:3], plain[1:3], strict=True):
        assert relative_error(a, b) <= 2 * ulp


def test_logits_far_apart_give_a_large_but_finite_divergence(backend):
    hidden = torch.ones(2, 8, device=DEVICE)
    weight, ref_weight = torch.zeros(2, 300, 8, device=DEVICE)
    weight[7], ref_weight[200] = 1e3, 1e3  # logits of 8000 among zeros
    leaves = [hidden.clone().requires_grad_(), weight.requires_grad_()]
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    kl = linear_kl(*leaves, hidden, ref_weight, labels, backend=backend)
    assert kl.tolist() == [8000.0, 8000.0]
    _, dweight = torch.autograd.grad(kl.sum(), leaves)
    assert dweight[7].tolist() == [2.0] * 8
    assert dweight[200].tolist() == [-2.0] * 8
    assert dweight.count_nonzero() == 16


REMOVED = {
    "first": [0],
    "last": [299],
    "a whole block": list(range(128, 256)),
    "every third": list(range(0, 300, 3)),
    "all but two": list(range(2, 300)),
}


@pytest.mark.parametrize("removed", REMOVED)
def test_an_entry_removed_from_both_models_takes_no_part(removed, backend):
    models, removed = Models(has_bias=True), REMOVED[removed]
    kept = [v for v in range(300) if v not in set(removed)]
    smaller = Models(vocab_size=len(kept), has_bias=True)
    smaller.policy, smaller.ref = ([h, w[kept], b[kept]] for h, w, b in (models.policy, models.ref))
    smaller.labels, smaller.grad = models.labels.clamp(max=0), models.grad
    for model in (models.policy, models.ref):
        model[2][removed] = -math.inf
    kl, dhidden, dweight, dbias = measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32)
    assert not dweight[removed].any()
    assert not dbias[removed].any()
    actual = [kl, dhidden, dweight[kept], dbias[kept]]
    naive = measure(run_reference, smaller, torch.float32)
    exact = measure(run_reference, smaller, torch.float64)
    for values in zip(actual, naive, exact, ["KL", *NAMES], conditioning(smaller), strict=True):
        assert_as_accurate(*values)


@pytest.mark.parametrize("removed", REMOVED)
def test_an_entry_removed_from_the_reference_adds_nothing(removed, backend):
    models, removed = Models(has_bias=True), REMOVED[removed]
    kept = [v for v in range(300) if v not in set(removed)]
    models.ref[2][removed] = -math.inf
    kl, _, dweight, dbias = measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32)
    log_p, ref_log_p = (
        F.linear(h.double(), w.double(), b.double()).log_softmax(-1)[..., kept]
        for h, w, b in (models.policy, models.ref)
    )
    exact = (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1) * (models.labels != -100)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=0)
    assert dbias[removed].any()  # what the policy gives them is pushed down
    assert torch.isfinite(dweight).all()


@pytest.mark.parametrize("removed", REMOVED)
def test_an_entry_removed_from_the_policy_alone_makes_the_divergence_infinite(removed, backend):
    models = Models(has_bias=True)
    models.policy[2][REMOVED[removed]] = -math.inf
    kl, *gradients = measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32)
    assert torch.equal(kl == math.inf, models.labels != -100)
    for gradient in gradients:
        assert torch.isfinite(gradient).all()


def test_an_entry_removed_from_the_policy_costs_nothing_where_the_reference_has_no_mass_left(backend):
    models = Models(has_bias=True)
    models.ref[2][128:256] = -1e3  # the whole block underflows
    models.policy[2][130] = -math.inf
    kept = torch.arange(300, device=DEVICE) != 130
    log_p, ref_log_p = (
        F.linear(h.double(), w.double(), b.double()).log_softmax(-1)[..., kept]
        for h, w, b in (models.policy, models.ref)
    )
    exact = (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1) * (models.labels != -100)
    torch.testing.assert_close(run(models, backend).double(), exact, rtol=1e-5, atol=0)


# NaN, inf and masks


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["policy", "reference"])
class TestNonFiniteInputs:
    def test_in_hidden_gives_nan_there_alone(self, whose, bad, softcap, backend):
        models = Models()
        models.labels[:] = 5
        model = models.policy if whose == "policy" else models.ref
        clean = run(models, backend, softcap=softcap)
        model[0][1, 3, 2] = bad
        spoiled = run(models, backend, softcap=softcap)
        assert spoiled[1, 3].isnan()
        spoiled[1, 3] = clean[1, 3]
        assert torch.equal(spoiled, clean)

    def test_in_weight_gives_nan_everywhere(self, whose, bad, softcap, backend):
        models = Models()
        (models.policy if whose == "policy" else models.ref)[1][290, 3] = bad
        assert torch.equal(run(models, backend, softcap=softcap).isnan(), models.labels != -100)

    def test_at_a_masked_position_takes_no_part(self, whose, bad, softcap, backend):
        models = Models(has_bias=True)
        measured = []
        for filling in (0.0, bad):
            for model in (models.policy, models.ref):
                model[0][models.labels == -100] = filling
            measured.append(
                measure(lambda m, x, **o: run(m, backend, x, **o), models, torch.float32, softcap=softcap)
            )
        assert_equal(*measured)
        assert not measured[1][1][models.labels == -100].any()


def test_non_finite_gradients_come_out_as_nan(backend):
    models = Models()
    models.policy[0][models.labels != -100] = math.nan
    _, dhidden, dweight = measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32)
    assert dhidden[models.labels != -100].isnan().all()
    assert dweight.isnan().all()


@pytest.mark.parametrize("shape", [(9,), (3, 5), (2, 2, 4), (3, 1)], ids=str)
def test_shift_equals_slicing(shape, backend):
    models = Models(shape)
    labels = models.labels.clone()
    labels[..., 0] = 10**6  # predicted by nothing: may be anything
    leaves, sliced = models.leaves(), models.leaves()
    shifted = run(models, backend, leaves, labels=labels, shift=True)
    models.ref[0] = models.ref[0][..., :-1, :]
    expected = run(
        models, backend, [sliced[0][..., :-1, :], sliced[1]], labels=models.labels[..., 1:].contiguous()
    )
    assert shifted.shape == labels[..., 1:].shape
    grad = models.grad[..., 1:]
    assert_equal(
        [shifted, *torch.autograd.grad(shifted, leaves, grad)],
        [expected, *torch.autograd.grad(expected, sliced, grad)],
    )


@pytest.mark.parametrize("shift", [False, True])
def test_packed_gives_the_same_as_padded(shift, backend):
    """Sequences of 4, 1, 0 and 6 tokens, their padding left out; and their sums, as TDPO takes them."""
    lengths = torch.tensor([4, 1, 0, 6], device=DEVICE)
    models = Models((4, 6))
    real = torch.arange(6, device=DEVICE) < lengths[:, None]
    models.labels[~real] = -100
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    leaves = models.leaves()
    padded = run(models, backend, leaves, shift=shift).sum(-1)

    packed_leaves = [leaves[0].detach()[real].requires_grad_(), models.leaves()[1]]
    packed = linear_kl(
        *packed_leaves,
        models.ref[0][real],
        models.ref[1],
        models.labels[real],
        shift=shift,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    assert packed.shape == (11,)
    sums = torch.segment_reduce(packed, "sum", offsets=cu_seqlens)
    torch.testing.assert_close(sums, padded, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(sums.sum(), packed_leaves)
    expected = torch.autograd.grad(padded.sum(), leaves)
    torch.testing.assert_close(gradients[0], expected[0][real], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cu_seqlens", "exception", "message"),
    [
        (torch.tensor([0, 4, 3, 9]), ValueError, "must start at 0, never decrease and end at N = 9"),
        (torch.tensor([0, 8]), ValueError, "must start at 0, never decrease and end at N = 9"),
        (torch.tensor([0.0, 9.0]), TypeError, "must be int64 or int32"),
        (torch.tensor([9]), ValueError, r"must be \[S \+ 1\]"),
    ],
    ids=["falling", "short", "dtype", "one"],
)
def test_bad_boundaries_of_packed_sequences_are_refused(cu_seqlens, exception, message):
    models = Models((9,))
    with pytest.raises(exception, match=f"^cu_seqlens {message}"):
        run(models, "torch", cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"^hidden must be \[N, H\] when cu_seqlens is given"):
        run(Models((3, 3)), "torch", cu_seqlens=torch.tensor([0, 9]))


def test_the_ignored_label_may_be_a_token(backend):
    models = Models(vocab_size=4)
    labels = models.labels.where(models.labels != -100, 3)
    inside = run(models, backend, labels=labels, ignore_index=3)
    assert torch.equal(inside, run(models, backend, labels=labels.masked_fill(labels == 3, -100)))
    assert torch.equal(inside == 0, labels == 3)


def test_a_batch_without_a_single_position_that_counts_has_zero_divergence_and_gradients(backend):
    models = Models(has_bias=True)
    models.labels.fill_(-100)
    for x in measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32):
        assert not x.any()


def test_labels_only_say_which_positions_count(backend):
    models = Models()
    other = models.labels.where(models.labels == -100, (models.labels + 17) % 300).int()
    assert torch.equal(run(models, backend), run(models, backend, labels=other))


# Which gradients come back


@pytest.mark.parametrize(
    "trained", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("weight", "bias")], ids="+".join
)
def test_only_what_is_trained_gets_a_gradient_and_the_same_one(trained, backend):
    models = Models(has_bias=True)

    def gradients(*names: str) -> dict[str, torch.Tensor | None]:
        leaves = dict(zip(NAMES, models.leaves(), strict=True))
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in names)
        run(models, backend, list(leaves.values())).backward(models.grad)
        return {name: leaf.grad for name, leaf in leaves.items()}

    alone, all_of_them = gradients(*trained), gradients(*NAMES)
    for name, gradient in alone.items():
        if name in trained:
            assert torch.equal(gradient, all_of_them[name])
        else:
            assert gradient is None


def test_nothing_to_train_needs_no_graph(backend):
    models = Models()
    frozen = run(models, backend)
    assert not frozen.requires_grad
    with torch.no_grad():
        inside = run(models, backend, models.leaves())
    assert not inside.requires_grad
    assert torch.equal(frozen, inside)


def test_a_reference_with_parameters_is_taken_where_no_gradient_is_recorded(backend):
    models = Models()
    expected = run(models, backend)
    models.ref[1] = torch.nn.Parameter(models.ref[1])
    with torch.no_grad():
        assert torch.equal(run(models, backend), expected)


def test_a_second_backward_through_one_forward_gives_the_same(backend):
    models = Models(has_bias=True)
    leaves = models.leaves()
    kl = run(models, backend, leaves, softcap=3.0)
    first = torch.autograd.grad(kl, leaves, models.grad, retain_graph=True)
    assert_equal(first, torch.autograd.grad(kl, leaves, models.grad))


def test_inputs_are_left_alone(backend):
    models, copy = Models(has_bias=True), Models(has_bias=True)
    measure(lambda m, leaves: run(m, backend, leaves, softcap=3.0), models, torch.float32)
    assert_equal(
        [*models.policy, *models.ref, models.labels, models.grad],
        [*copy.policy, *copy.ref, copy.labels, copy.grad],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bitwise_equal(dtype, backend):
    models = Models((3, 15), dtype=dtype, has_bias=True)
    runs = [measure(lambda m, x: run(m, backend, x, softcap=5.0), models, dtype) for _ in range(2)]
    assert_equal(*runs)


# Memory layout and dtypes


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_non_contiguous_inputs_give_the_same(whose, name, backend):
    models = Models(has_bias=True)
    expected = measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32)
    model, i = models.policy if whose == "policy" else models.ref, NAMES.index(name)
    model[i] = torch.stack([model[i], torch.full_like(model[i], math.nan)], dim=-1)[..., 0]
    assert not model[i].is_contiguous()
    leaves = [x.detach().requires_grad_() for x in models.policy]
    kl = run(models, backend, leaves)
    assert_equal([kl.detach(), *torch.autograd.grad(kl, leaves, models.grad)], expected)


def test_default_dtype_changes_nothing(backend):
    models = Models()
    expected = measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = measure(lambda m, leaves: run(m, backend, leaves), models, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(actual, expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_autocast_casts_both_models_and_gradients_come_back_in_the_parameters_dtype(dtype, backend):
    models, narrow = Models(has_bias=True), Models(has_bias=True, dtype=dtype)
    models.ref[0] = models.ref[0].to(dtype)
    leaves, by_hand = models.leaves(), models.leaves()
    with torch.autocast(DEVICE.type, dtype=dtype):
        kl = run(models, backend, leaves)
    expected = run(narrow, backend, [x.to(dtype) for x in by_hand])
    assert kl.dtype == torch.float32
    assert torch.equal(kl, expected)
    actual = torch.autograd.grad(kl, leaves, models.grad)
    assert {x.dtype for x in actual} == {torch.float32}
    assert_equal(actual, torch.autograd.grad(expected, by_hand, models.grad))


# What is refused

BAD_INPUTS = {
    "hidden of another width": ({"hidden": torch.zeros(2, 3, 9)}, ValueError, "hidden", "H = 8"),
    "weight without entries": ({"weight": torch.zeros(0, 8)}, ValueError, "weight", "[V, H]"),
    "bias of another length": ({"bias": torch.zeros(11)}, ValueError, "bias", "[V] = [10]"),
    "ref_hidden is None": ({"ref_hidden": None}, TypeError, "ref_hidden", "NoneType"),
    "ref_hidden is int": (
        {"ref_hidden": torch.zeros(2, 3, 6, dtype=torch.int32)},
        TypeError,
        "ref_hidden",
        "int32",
    ),
    "ref_hidden of another width": (
        {"ref_hidden": torch.zeros(2, 3, 7)},
        ValueError,
        "ref_hidden",
        "H = 6, the width of ref_weight; got [2, 3, 7]",
    ),
    "ref_hidden of other tokens": (
        {"ref_hidden": torch.zeros(2, 4, 6)},
        ValueError,
        "ref_hidden",
        "the tokens of hidden, [2, 3]; got [2, 4, 6]",
    ),
    "ref_weight is a list": ({"ref_weight": [0.0]}, TypeError, "ref_weight", "torch.Tensor; got list"),
    "ref_weight is a vector": ({"ref_weight": torch.zeros(6)}, ValueError, "ref_weight", "[V, H]"),
    "ref_weight of another vocabulary": (
        {"ref_weight": torch.zeros(11, 6)},
        ValueError,
        "ref_weight",
        "V = 10, the vocabulary of weight; got [11, 6]",
    ),
    "ref_weight of another dtype": (
        {"ref_weight": torch.zeros(10, 6, dtype=torch.bfloat16)},
        TypeError,
        "ref_weight",
        "dtype of ref_hidden, torch.float32; got torch.bfloat16",
    ),
    "a reference of another dtype": (
        {
            "ref_hidden": torch.zeros(2, 3, 6, dtype=torch.bfloat16),
            "ref_weight": torch.zeros(10, 6, dtype=torch.bfloat16),
        },
        TypeError,
        "ref_hidden",
        "dtype of hidden, torch.float32; got torch.bfloat16",
    ),
    "a reference on another device": (
        {
            "ref_hidden": torch.zeros(2, 3, 6, device="meta"),
            "ref_weight": torch.zeros(10, 6, device="meta"),
        },
        ValueError,
        "ref_hidden",
        "device of hidden, cpu; got meta",
    ),
    "ref_bias of another length": ({"ref_bias": torch.zeros(9)}, ValueError, "ref_bias", "[V] = [10]"),
    "ref_bias of another dtype": (
        {"ref_bias": torch.zeros(10, dtype=torch.float64)},
        TypeError,
        "ref_bias",
        "dtype of ref_weight",
    ),
    "ref_hidden requires grad": (
        {"ref_hidden": torch.zeros(2, 3, 6, requires_grad=True)},
        ValueError,
        "ref_hidden",
        "constant; got a tensor that requires grad: detach it",
    ),
    "ref_weight is a parameter": (
        {"ref_weight": torch.nn.Parameter(torch.zeros(10, 6))},
        ValueError,
        "ref_weight",
        "detach it",
    ),
    "ref_bias requires grad": (
        {"ref_bias": torch.zeros(10, requires_grad=True)},
        ValueError,
        "ref_bias",
        "detach it",
    ),
    "labels of another shape": (
        {"labels": torch.zeros(2, 4, dtype=torch.int64)},
        ValueError,
        "labels",
        "[2, 3], the shape of hidden",
    ),
    "labels is float": ({"labels": torch.zeros(2, 3)}, TypeError, "labels", "int64 or int32"),
    "a label out of range": (
        {"labels": torch.tensor([[0, 1, 2], [3, 10, 4]])},
        ValueError,
        "labels",
        "got 10 at position [1, 1]",
    ),
    "no position to shift": (
        {
            "hidden": torch.zeros(2, 0, 8),
            "ref_hidden": torch.zeros(2, 0, 6),
            "labels": torch.zeros(2, 0, dtype=torch.int64),
            "shift": True,
        },
        ValueError,
        "labels",
        "at least one position",
    ),
    "shift is a number": ({"shift": 1}, TypeError, "shift", "True or False"),
    "ignore_index is None": ({"ignore_index": None}, TypeError, "ignore_index", "int"),
    "temperature is zero": ({"temperature": 0.0}, ValueError, "temperature", "> 0"),
    "softcap is negative": ({"softcap": -1.0}, ValueError, "softcap", "> 0"),
    "logit_scale is NaN": ({"logit_scale": math.nan}, ValueError, "logit_scale", "finite"),
    "an unknown backend": ({"backend": "cuda"}, ValueError, "backend", "'triton'"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_by_name(case):
    changes, exception, name, said = BAD_INPUTS[case]
    inputs = {
        "hidden": torch.zeros(2, 3, 8),
        "weight": torch.zeros(10, 8),
        "ref_hidden": torch.zeros(2, 3, 6),
        "ref_weight": torch.zeros(10, 6),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
    }
    with pytest.raises(exception, match=rf"^{name} must (be|have) ") as refused:
        linear_kl(**inputs | changes)
    assert said in str(refused.value)


def test_no_tensor_is_as_large_as_the_logits():
    models = Models((2048,), 16, 16, 8192)
    leaves = models.leaves()
    with Largest() as largest:
        run(models, "torch", leaves).sum().backward()
    assert 0 < largest.elements <= 2048 * 8192 / 4
