"""What ranks exchange, in one process: ranks are threads here, or there is only one of them."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from parallel_common import (
    IGNORED,
    TAU,
    H,
    V,
    agree,
    agree_in_fields,
    in_float64,
    leaf,
    make_batch,
    make_loss,
    normal,
)
from rank_threads import default_group, run_ranks_as_threads
from torch.testing._internal.distributed.fake_pg import FakeStore

from focalkern import LinearLogps, VocabShard, linear_logps
from focalkern.distributed import (
    AsyncReduction,
    SumOverSlices,
    all_gather,
    check_same_pairs,
    copies_within,
    gathered_numbers,
)
from focalkern.records import OUTPUTS


@pytest.fixture
def one_rank():
    """A group that this process has for itself."""
    with default_group() as group:
        yield group


@pytest.fixture
def one_thread(same_threads_afterwards):
    """Ranks that are threads would each set the number for all."""
    torch.set_num_threads(1)


# What is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"process_group": None}, TypeError, "^process_group must be a torch.distributed process group; got"),
        ({"process_group": "world"}, TypeError, "^process_group must be .* got str"),
        ({"start": -1}, ValueError, "^start must be >= 0; got -1"),
        ({"start": 1.0}, TypeError, "^start must be an int; got float"),
        ({"start": True}, TypeError, "^start must be an int; got bool"),
        ({"vocab_size": 0}, ValueError, "^vocab_size must be >= 1; got 0"),
        ({"vocab_size": "V"}, TypeError, "^vocab_size must be an int; got str"),
    ],
)
def test_a_shard_is_refused_by_the_name_of_its_argument(changes, error, message, one_rank):
    with pytest.raises(error, match=message):
        VocabShard(**{"process_group": one_rank, "start": 0, "vocab_size": 10, **changes})


def test_a_group_that_this_rank_is_not_in_is_refused(one_rank):
    with pytest.raises(TypeError, match=r"^process_group must be a torch\.distributed process group; got"):
        VocabShard(dist.GroupMember.NON_GROUP_MEMBER, 0, 10)


def test_a_shard_must_be_one(one_rank):
    batch = make_batch()
    message = "^vocab_shard must be a focalkern.VocabShard; got ProcessGroup"
    with pytest.raises(TypeError, match=message):
        linear_logps(batch.hidden, batch.weight, batch.labels, vocab_shard=one_rank)
    with pytest.raises(TypeError, match=message):
        make_loss("SimPO")(batch.hidden, batch.weight, batch.labels, vocab_shard=one_rank)


def test_rows_beyond_the_vocabulary_are_refused(one_rank):
    batch = make_batch()
    for start, vocab_size in ((0, V - 1), (1, V), (0, V + 1)):
        with pytest.raises(ValueError, match=rf"vocab_shard.*\[{start}, {start + V}, {vocab_size}\]"):
            linear_logps(
                batch.hidden,
                batch.weight,
                batch.labels,
                vocab_shard=VocabShard(one_rank, start, vocab_size),
            )


OTHER_LABELS = {
    "a label less": [IGNORED, 11, 12],
    "a label more": [10, 11, 12, 13],
    "another label": [10, 11, 13],
    "another order": [11, 10, 12],
    "another order, apart": [12, 11, 10],
    "labels that add up to as much": [9, 12, 12],
    "the same labels elsewhere": [10, IGNORED, 11, 12],
    "out of range": [10, V, 12],
    "negative": [10, -1, 12],
    "out of range beyond int32": [10, 2**40, 12],
}


@pytest.mark.parametrize("other", OTHER_LABELS)
@pytest.mark.parametrize("is_shifted", [False, True])
def test_labels_that_differ_between_the_ranks_are_refused_by_all_in_every_call(other, is_shifted):
    """Before any rank looks whether its own are in range: what only one raised, the others would wait for."""
    hidden, weight = torch.randn(5, H), torch.randn(V, H)
    of_first, of_last = torch.full((2, 5), IGNORED)
    of_first[1:4] = torch.tensor([10, 11, 12])
    of_last[1 : 1 + len(OTHER_LABELS[other])] = torch.tensor(OTHER_LABELS[other])

    def run(group):
        rows, shard = shard_of(group, [0, 300, 600, V])

        def call(labels):
            return linear_logps(hidden, weight[rows], labels, shift=is_shifted, vocab_shard=shard)

        expected = call(of_first).logps
        for _ in range(2):
            with pytest.raises(ValueError, match=r"^hidden and labels must be the same.*checksums of labels"):
                call(of_last if group.rank() == 2 else of_first)
            assert torch.equal(call(of_first).logps, expected)

    run_ranks_as_threads(3, run)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_what_takes_a_gradient_on_one_rank_alone_is_refused_by_all(name):
    """The backward of one rank would wait for that of the other."""
    labels = torch.tensor([IGNORED, 10, 11, 12, IGNORED])
    inputs = {"hidden": torch.randn(5, H), "weight": torch.randn(V, H)}

    def run(group):
        rows, shard = shard_of(group, [0, 600, V])
        own = {"hidden": inputs["hidden"].clone(), "weight": inputs["weight"][rows].clone()}
        own[name].requires_grad_(group.rank() == 0)
        with pytest.raises(ValueError, match="whether gradients are taken"):
            linear_logps(**own, labels=labels, vocab_shard=shard)

    run_ranks_as_threads(2, run)


def test_a_loss_refuses_labels_that_differ_between_the_ranks_too():
    batch = make_batch()

    def run(group):
        rows, shard = shard_of(group, [0, 600, V])
        labels = batch.labels.clone()
        labels[1, 2] = 10 + group.rank()
        with pytest.raises(ValueError, match=r"^hidden and labels must be the same.*checksums of labels"):
            make_loss("SimPO")(batch.hidden, batch.weight[rows], labels, vocab_shard=shard)

    run_ranks_as_threads(2, run)


def test_a_batch_without_pairs_is_refused_where_there_is_one_process():
    batch = make_batch()
    for kind in ("FocalPO", "pair loss"):
        loss_fn = make_loss(kind)
        with pytest.raises(ValueError, match=r"^hidden must hold an even number.*got \[0, "):
            loss_fn(batch.hidden[:0], batch.weight, batch.labels[:0])
        with pytest.raises(ValueError, match=r"^cu_seqlens must be \[2B \+ 1\].*got \[1\]"):
            loss_fn(torch.empty(0, H), batch.weight, batch.labels[0, :0], cu_seqlens=torch.tensor([0]))
        with pytest.raises(ValueError, match=r"^labels must hold an even number.*got \[0, "):
            loss_fn.from_logps(LinearLogps(torch.empty(0, 5)), batch.labels[:0, :5])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["FocalPO", "SimPO", "α-DPO", "pair loss", "pair loss with entropies"])
def test_a_rank_without_pairs_has_a_loss_of_0(kind, reduction, one_rank, backend, device):
    """Of any layout, and with gradients of the right shapes."""
    batch = make_batch()
    empty = torch.empty(0, device=device)
    references = {"ref_chosen_logps": empty, "ref_rejected_logps": empty}
    for hidden, labels, cu_seqlens in (
        (batch.hidden[:0], batch.labels[:0], None),
        (batch.hidden[0, :0], batch.labels[0, :0], torch.tensor([0], device=device)),
    ):
        hidden, weight = leaf(hidden.to(device)), leaf(batch.weight.to(device))
        loss_fn = make_loss(kind, reduction=reduction, backend=backend)
        out = loss_fn(hidden, weight, labels.to(device), cu_seqlens=cu_seqlens, **references)
        out.loss.sum().backward()
        assert out.loss.sum() == 0
        assert out.losses.shape == out.prob.shape == (0,)
        assert hidden.grad.shape == hidden.shape
        assert weight.grad.shape == weight.shape
        assert (weight.grad == 0).all()
        assert out.certificate().kept_share == 1.0


# One rank, several threads


@pytest.mark.parametrize("backward", ["certified", "exact"])
def test_the_only_shard_is_the_whole_head_bit_by_bit(backward, one_rank, backend, device):
    batch = make_batch()
    g = normal(torch.Generator().manual_seed(0), *batch.labels.shape).float().to(device)
    results = []
    for shard in (None, VocabShard(one_rank, 0, V)):
        hidden, weight, bias = (leaf(x.to(device)) for x in (batch.hidden, batch.weight, batch.bias))
        out = linear_logps(
            hidden,
            weight,
            batch.labels.to(device),
            bias=bias,
            vocab_shard=shard,
            backward=backward,
            tau=TAU,
            backend=backend,
        )
        out.logps.backward(g)
        left_out = () if backward == "exact" else (out.dropped_mass, out.kept_share)
        results.append((hidden.grad, weight.grad, bias.grad, *left_out))
        assert out.vocab_group is (None if shard is None else one_rank)
    for actual, expected in zip(*results, strict=True):
        # Triton's forward of one process reduces its blocks in a kernel of its own.
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 if backend == "triton" else 0)


def shard_of(group, borders: list[int]) -> tuple[slice, VocabShard]:
    start, end = borders[group.rank() : group.rank() + 2]
    return slice(start, end), VocabShard(group, start, borders[-1])


# A rank with one row, ranks that end on a block, one whose rows are all in others' blocks.
DIVISIONS = [[0, 1, V], [0, 256, 512, V], [0, 130, 140, V - 1, V]]


@pytest.mark.parametrize("borders", DIVISIONS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_any_number_of_uneven_shards_are_one_head_in_float64(borders, softcap, one_thread):
    """To rounding, with every output and a gradient through the entropy."""
    batch = in_float64(make_batch())
    g = normal(torch.Generator().manual_seed(0), 2, *batch.labels.shape)

    def gradients(rows: slice, shard: VocabShard | None):
        leaves = leaf(batch.hidden), leaf(batch.weight[rows]), leaf(batch.bias[rows])
        hidden, weight, bias = leaves
        out = linear_logps(
            hidden, weight, batch.labels, bias=bias, vocab_shard=shard, softcap=softcap, outputs=OUTPUTS
        )
        values = [out.logps, out.entropy]
        return out, torch.autograd.grad(values, leaves, [*g])

    whole, (dhidden, *of_rows) = gradients(slice(None), None)
    results = run_ranks_as_threads(len(borders) - 1, lambda group: gradients(*shard_of(group, borders)))
    for (out, (own_dhidden, *own)), (start, end) in zip(results, itertools.pairwise(borders), strict=True):
        for name in ("logps", *OUTPUTS):
            torch.testing.assert_close(getattr(out, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
        of_shard = [x[start:end] for x in of_rows]
        for actual, expected in zip((own_dhidden, *own), (dhidden, *of_shard), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
        assert torch.equal(own_dhidden, results[0][1][0])


@pytest.mark.parametrize("borders", DIVISIONS)
def test_any_number_of_uneven_shards_are_certified_together(borders, one_thread):
    batch = make_batch()
    batch = replace(batch, hidden=0.5 * batch.hidden)  # what is left out shows
    is_live = batch.labels != IGNORED
    tau = 2.0**-9

    def run(group):
        rows, shard = shard_of(group, borders)
        hidden = leaf(batch.hidden)
        out = linear_logps(hidden, leaf(batch.weight[rows]), batch.labels, vocab_shard=shard, tau=tau)
        out.logps.sum().backward()
        return out.certificate(), out.dropped_mass, hidden.grad

    results = run_ranks_as_threads(len(borders) - 1, run)
    exact = leaf(batch.hidden.double())
    linear_logps(exact, batch.weight.double(), batch.labels).logps.sum().backward()
    for certificate, dropped_mass, dhidden in results:
        assert certificate == results[0][0]
        assert 0 < certificate.kept_share < 0.6
        assert 1e-4 < dropped_mass[is_live].max() <= 2.0**-7
        error = (dhidden.double() - exact.grad).norm(dim=-1).max()
        assert certificate.dhidden_bound / 100 < error <= certificate.dhidden_bound


def test_activation_checkpointing_exchanges_again(one_thread):
    batch = make_batch()
    borders = [0, 600, V]

    def run(group, is_checkpointed):
        rows, shard = shard_of(group, borders)
        hidden, weight = leaf(batch.hidden), leaf(batch.weight[rows])

        def head(hidden):
            out = linear_logps(hidden, weight, batch.labels, vocab_shard=shard, tau=TAU)
            return out.logps

        if is_checkpointed:
            logps = torch.utils.checkpoint.checkpoint(head, hidden, use_reentrant=False)
        else:
            logps = head(hidden)
        logps.sum().backward()
        return hidden.grad, weight.grad

    plain, checkpointed = (
        run_ranks_as_threads(2, lambda group, flag=flag: run(group, flag)) for flag in (False, True)
    )
    for expected, actual in zip(plain, checkpointed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_shards_without_gradients(mode):
    batch = make_batch()

    def run(group):
        rows, shard = (slice(None), None) if group is None else shard_of(group, [0, 600, V])
        with mode():
            out = linear_logps(
                batch.hidden, batch.weight[rows], batch.labels, vocab_shard=shard, outputs=OUTPUTS
            )
        assert not out.logps.requires_grad
        assert out.kept_share.isnan()
        return out

    whole = run(None)
    for out in run_ranks_as_threads(2, run):
        for name in ("logps", *OUTPUTS):
            agree(name, getattr(out, name), getattr(whole, name))


def test_autocast_casts_a_shard_as_it_casts_a_head(one_thread):
    batch = make_batch()

    def run(group):
        rows, shard = (slice(None), None) if group is None else shard_of(group, [0, 600, V])
        hidden, weight = leaf(batch.hidden), leaf(batch.weight[rows])
        with torch.autocast("cpu", torch.bfloat16):
            loss_fn = make_loss("FocalPO", backend="torch")
            out = loss_fn(hidden, weight, batch.labels, **batch.references, vocab_shard=shard)
        out.loss.backward()
        return out, hidden.grad, weight.grad

    out, dhidden, dweight = run(None)
    for own, own_dhidden, own_dweight in run_ranks_as_threads(2, run):
        assert own.loss.dtype == own_dhidden.dtype == own_dweight.dtype == torch.float32
        agree("loss", own.loss, out.loss)
        torch.testing.assert_close(own_dhidden, dhidden, rtol=2e-2, atol=1e-5)
    torch.testing.assert_close(own_dweight, dweight[600:], rtol=2e-2, atol=1e-5)


def test_slices_of_one_rank_are_the_whole_sequences(one_rank):
    batch = make_batch()
    results = []
    for group in (None, one_rank):
        leaves = leaf(batch.hidden), leaf(batch.weight)
        out = make_loss("SimPO")(*leaves, batch.labels, sequence_group=group)
        out.loss.backward()
        results.append((out, [x.grad for x in leaves]))
    (whole, expected), (out, actual) = results
    agree_in_fields(out, whole)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# The parts


def test_sums_over_slices_do_not_count_a_gradient_twice():
    values = torch.arange(6.0).view(3, 2)

    def run(group):
        own = leaf(values[group.rank()])
        total = SumOverSlices.apply(own, group)
        (total**2).sum().backward()
        return own.grad, total.detach()

    for grad, total in run_ranks_as_threads(3, run):
        assert torch.equal(total, values.sum(0))
        assert torch.equal(grad, 2 * values.sum(0))


def test_reductions_are_complete_after_waiting():
    def run(group):
        reduction = AsyncReduction(group)
        first, second = torch.ones(3), torch.full((2,), float(group.rank()))
        reduction.start(first)
        reduction.start(second)
        reduction.wait()
        reduction.wait()  # nothing is under way any more
        return first, second

    for first, second in run_ranks_as_threads(3, run):
        assert first.tolist() == [3.0] * 3
        assert second.tolist() == [3.0] * 2


def test_what_is_gathered_keeps_its_bits_and_its_shape():
    values = torch.tensor([1, -5, 2**31 - 1], dtype=torch.int32).view(torch.float32)

    def run(group):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return all_gather(torch.stack([values, values * 0]), group)

    for gathered in run_ranks_as_threads(2, run):
        assert gathered.shape == (2, 2, 3)
        assert gathered[1, 0].view(torch.int32).tolist() == [1, -5, 2**31 - 1]


def test_numbers_of_all_ranks_come_in_their_order_in_every_call():
    large = 2**63 - 1  # a checksum may be any int64

    def run(group):
        for call in range(3):
            gathered = gathered_numbers(group, torch.device("cpu"), [call, group.rank(), large])
            assert gathered == [[call, 0, large], [call, 1, large]]

    run_ranks_as_threads(2, run)


def test_numbers_of_sequences_are_compared_in_every_call():
    def run(group):
        for _ in range(2):
            check_same_pairs(group, torch.device("cpu"), 4)
            with pytest.raises(ValueError, match=r"^labels must be slices of the same.*are \[4, 6, 8\]"):
                check_same_pairs(group, torch.device("cpu"), 4 + 2 * group.rank())

    run_ranks_as_threads(3, run)


@pytest.mark.parametrize(
    ("statistics", "shared_by", "copies"),
    [
        (None, [], 1),
        (None, [None, None], 1),
        (None, [[0, 1], None], 2),
        (None, [None, [0, 2]], 2),
        (None, [[0, 1], [0, 2]], 4),
        ([0, 2], [[0, 1]], 1),
        ([0, 1], [[0, 1]], 2),
        ([0, 2], [[0, 1], [0, 2]], 2),
        ([0, 1, 4, 5], [[0, 1, 2, 3]], 2),
    ],
)
def test_ranks_that_share_their_pairs_are_counted_within_the_group(statistics, shared_by, copies):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        group, *groups = (
            None if ranks is None else dist.new_group(ranks) for ranks in (statistics, *shared_by)
        )
        assert copies_within(group, *groups) == copies
    finally:
        dist.destroy_process_group()
