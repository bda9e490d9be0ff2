"""Statistics of vocabulary shards put together, against those of all logits in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_threads import run_ranks_as_threads

from focalkern import VocabShard, linear_logps
from focalkern.logps.shards import reduced_over_shards, targets_of_shard
from focalkern.logps.torch_form import block_statistics
from focalkern.records import OUTPUTS, Head, LogitTransform

INF, NAN = torch.inf, torch.nan
FLOATS = ("logps", "entropy", "mean_logits", "log_sum_sq_probs")


def forward_of_shards(
    z: torch.Tensor,  # [n, V]
    targets: torch.Tensor,  # [n]
    cuts: list[int],
    bias: torch.Tensor | None = None,  # [V]
    hidden: torch.Tensor | None = None,  # [n, n]
) -> list[dict[str, torch.Tensor]]:
    """By each of the ranks that the vocabulary is cut over: outputs, lse, 1 − p, the rank's own mass.

    The logits are z itself: hidden is one-hot.
    """
    hidden = torch.eye(len(z), dtype=z.dtype) if hidden is None else hidden
    borders = [0, *cuts, z.shape[1]]

    def run(group) -> dict[str, torch.Tensor]:
        start, end = borders[group.rank() : group.rank() + 2]
        head = Head(hidden, z[:, start:end].T.contiguous(), None if bias is None else bias[start:end])
        shard = VocabShard(group, start, z.shape[1])
        own_targets = targets_of_shard(targets, shard, head.vocab_size)
        blocks = block_statistics(head, own_targets, LogitTransform(), OUTPUTS)
        values, saved = reduced_over_shards(blocks, targets, own_targets, head.vocab_size, shard)
        mass = saved.rest_mass
        assert saved.entropy is values.entropy
        return values._asdict() | {"lse": saved.lse, "one_minus_p": saved.one_minus_p, "mass": mass}

    return run_ranks_as_threads(len(borders) - 1, run)


def in_float64(z: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    z = z.double()
    log_p = z.log_softmax(-1)
    target_z = z.gather(1, targets[:, None])
    is_before = torch.arange(z.shape[1]) < targets[:, None]
    rest = torch.scatter(z, 1, targets[:, None], -INF).logsumexp(-1)
    return {
        "logps": log_p.gather(1, targets[:, None])[:, 0],
        "entropy": torch.special.entr(log_p.exp()).sum(-1),
        "mean_logits": z.mean(-1),
        "is_top1": torch.where(is_before, target_z > z, target_z >= z).all(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "lse": z.logsumexp(-1),
        "one_minus_p": torch.sigmoid(rest - target_z[:, 0]),
    }


def rounding(z: torch.Tensor) -> float:
    """What is made of a few numbers of the size of the logits may be off by so much."""
    return 8 * torch.finfo(z.dtype).eps * (z[z.isfinite()].abs().max().item() + math.log(z.shape[1]) + 1)


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], z: torch.Tensor) -> None:
    most = rounding(z)
    for name in (*FLOATS, "lse"):
        torch.testing.assert_close(actual[name].double(), expected[name], atol=most, rtol=0)
    torch.testing.assert_close(actual["one_minus_p"].double(), expected["one_minus_p"], atol=0, rtol=most)
    assert torch.equal(actual["is_top1"], expected["is_top1"])


@st.composite
def shards(draw):
    """(vocabulary, where it is cut, seed): shards of any size, down to a single entry."""
    vocab_size = draw(st.integers(2, 600))
    cuts = draw(st.sets(st.integers(1, vocab_size - 1), max_size=min(3, vocab_size - 1)))
    return vocab_size, sorted(cuts), draw(st.integers(0, 2**16))


@given(
    shards=shards(),
    n=st.integers(1, 5),
    sharpness=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    offset=st.sampled_from([0.0, -50.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_shards_together_are_the_whole_vocabulary(shards, n, sharpness, offset, dtype):
    vocab_size, cuts, seed = shards
    generator = torch.Generator().manual_seed(seed)
    z = (offset + sharpness * torch.randn(n, vocab_size, generator=generator)).to(dtype)
    targets = torch.randint(vocab_size, (n,), generator=generator)
    forwards = forward_of_shards(z, targets, cuts)
    assert_close(forwards[0], in_float64(z, targets), z)

    p = z.double().softmax(-1).scatter(1, targets[:, None], 0.0)
    borders = [0, *cuts, vocab_size]
    for (start, end), own in zip(itertools.pairwise(borders), forwards, strict=True):
        torch.testing.assert_close(own["mass"].double(), p[:, start:end].sum(-1), atol=rounding(z), rtol=0)
        for name in (*FLOATS, "is_top1", "lse", "one_minus_p"):
            assert torch.equal(own[name], forwards[0][name]), name


@given(shards=shards(), n=st.integers(1, 8), levels=st.integers(1, 4), removed=st.sampled_from([0.0, 0.5]))
def test_the_first_of_equal_maxima_is_the_top_one_in_every_division(shards, n, levels, removed):
    vocab_size, cuts, seed = shards
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(levels, (n, vocab_size), generator=generator).float()
    targets = torch.randint(vocab_size, (n,), generator=generator)
    # Half of the labels are a first maximum, as far as the shard borders decide.
    first = (z == z.amax(1, keepdim=True)).float().argmax(1)
    targets[::2] = first[::2]
    is_removed = torch.rand(vocab_size, generator=generator) < removed
    bias = torch.where(is_removed.index_fill(0, targets, False), -INF, 0.0)
    whole = forward_of_shards(z, targets, cuts, bias)[-1]
    expected = in_float64(z + bias, targets) | {"mean_logits": whole["mean_logits"].double()}
    assert_close(whole, expected, z + bias)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 1e-44, 3e38])
def test_a_tie_across_the_border_goes_to_the_earlier_shard(value):
    z = torch.full((2, 300), -abs(value) - 1)
    z[:, 99], z[:, 100] = value, value
    for cut in (100, 99, 101, 128):
        whole = forward_of_shards(z, torch.tensor([99, 100]), [cut])[0]
        assert whole["is_top1"].tolist() == [True, False]


def test_zeros_of_either_sign_are_equal():
    z = torch.full((1, 300), -1.0)
    z[:, 10], z[:, 200] = -0.0, 0.0
    assert not forward_of_shards(z, torch.tensor([200]), [128])[0]["is_top1"]
    assert forward_of_shards(z, torch.tensor([10]), [128])[0]["is_top1"]


@pytest.mark.parametrize("target", [0, 127, 128, 199, 200, 201, 399, 400, 500])
def test_a_label_at_the_border_of_a_shard_belongs_to_one(target):
    z = 3 * torch.randn(1, 501, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([target])
    for whole in forward_of_shards(z, targets, [200, 400]):
        assert_close(whole, in_float64(z, targets), z)


def test_a_shard_without_mass_changes_nothing():
    z = 3 * torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 99, 100, 149])
    bias = torch.zeros(400)
    bias[150:] = -INF
    for cuts in ([150], [200], [150, 300]):
        results = forward_of_shards(z, targets, cuts, bias)
        without = forward_of_shards(z[:, :150], targets, [])[0]
        for name in ("logps", "entropy", "log_sum_sq_probs", "is_top1", "lse", "one_minus_p"):
            torch.testing.assert_close(results[0][name], without[name])
        assert (results[-1]["mass"] == 0).all()


@pytest.mark.parametrize("tau", [0.0, 2.0**-9])
def test_a_label_that_has_all_the_mass_gets_no_gradient(tau):
    """No shard has anything else: shares of nothing."""
    z = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([7, 7])
    bias = torch.full((300,), -INF)
    bias[7] = 0.0

    def run(group):
        rows = slice(0, 140) if group.rank() == 0 else slice(140, 300)
        weight = z[:, rows].T.clone().requires_grad_()
        shard = VocabShard(group, rows.start, 300)
        out = linear_logps(torch.eye(2), weight, labels, bias=bias[rows], vocab_shard=shard, tau=tau)
        out.logps.sum().backward()
        return out.logps.detach(), weight.grad

    for logps, dweight in run_ranks_as_threads(2, run):
        assert (logps == 0).all()
        assert (dweight == 0).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("entry", [5, 250])
def test_what_is_not_finite_in_any_shard_is_seen_by_all(value, entry):
    z = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 140, 299])
    z[1, entry] = value  # of the weight: every row's logit may be wrong
    for whole in forward_of_shards(z, targets, [100, 200]):
        assert whole["logps"].isnan().all()
        assert whole["mean_logits"].isnan().all()
        assert not whole["is_top1"].any()


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_hidden_state_that_is_not_finite_is_its_row_alone(value):
    z = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    hidden = torch.eye(3)
    hidden[1, 0] = value
    for whole in forward_of_shards(z, torch.tensor([0, 140, 299]), [100, 200], hidden=hidden):
        assert whole["logps"].isnan().tolist() == [False, True, False]
        assert whole["lse"].isnan().tolist() == [False, True, False]
