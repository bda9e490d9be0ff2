"""Which rows of hidden predict which labels, in every layout, and which tokens belong to which sequence."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from tolerance import relative_error

from focalkern import linear_logps, reference
from focalkern.logps.function import LogpsCall, row_values
from focalkern.records import Head, LogitTransform
from focalkern.rows import Rows, aligned_labels, pick_rows

IGNORE = -100
LAYOUTS = {
    "one sequence": torch.tensor([5, IGNORE, 7, 8]),
    "padded": torch.tensor([[IGNORE, 1, 2, IGNORE], [3, 4, IGNORE, 0]]),
    "several batch dimensions": torch.tensor([[[1, IGNORE, 2]], [[IGNORE, IGNORE, 3]]]),
    "nothing masked": torch.tensor([[1, 2, 3], [4, 5, 6]]),
    "all masked": torch.full((2, 3), IGNORE),
    "one token per sequence": torch.tensor([[1], [IGNORE]]),
    "no tokens": torch.zeros(2, 0, dtype=torch.int64),
    "int32": torch.tensor([[1, IGNORE, 2]], dtype=torch.int32),
}

NOT_EMPTY = [name for name in LAYOUTS if name != "no tokens"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_stay_where_they_are_without_shift(layout):
    assert aligned_labels(LAYOUTS[layout], IGNORE, shift=False) is LAYOUTS[layout]


@pytest.mark.parametrize("layout", NOT_EMPTY)
def test_shift_moves_each_label_to_the_position_that_predicts_it(layout):
    labels = LAYOUTS[layout]
    shifted = aligned_labels(labels, IGNORE, shift=True)
    assert torch.equal(shifted, labels[..., 1:])
    # A view: labels are not copied.
    assert shifted.untyped_storage().data_ptr() == labels.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [0, 3, 5, 6, 10],
        [0, 3, 3, 6, 10],
        [0, 0, 3, 6, 10],
        [0, 3, 6, 10, 10],
        [0, 0, 0, 10, 10],
        [0, 1, 2, 3, 10],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_shift_stops_at_the_end_of_each_sequence(cu_seqlens, dtype):
    labels = torch.arange(10)
    expected = labels.clone()
    for start, end in itertools.pairwise(cu_seqlens):
        expected[start:end] = torch.cat([labels[start + 1 : end], torch.tensor([IGNORE])])[: end - start]
    shifted = aligned_labels(labels, IGNORE, shift=True, cu_seqlens=torch.tensor(cu_seqlens, dtype=dtype))
    assert shifted.tolist() == expected.tolist()
    assert labels.tolist() == list(range(10))


def test_packed_shift_of_nothing_is_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert (
        aligned_labels(nothing, IGNORE, shift=True, cu_seqlens=torch.zeros(5, dtype=torch.int64)).numel() == 0
    )


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("layout", NOT_EMPTY)
def test_rows_are_the_completion_tokens_in_order(layout, shift):
    labels = LAYOUTS[layout]
    # Each position of hidden carries its own number.
    hidden_number = torch.arange(labels.numel()).view(labels.shape)
    aligned = aligned_labels(labels, IGNORE, shift)
    predicting = hidden_number[..., :-1] if shift else hidden_number
    keep = aligned != IGNORE

    rows = pick_rows(labels, IGNORE, shift)

    assert rows.shape == aligned.shape
    assert rows.index.tolist() == predicting[keep].tolist()
    assert rows.position.tolist() == keep.flatten().nonzero().flatten().tolist()
    assert rows.targets.tolist() == aligned[keep].tolist()
    assert rows.index.dtype == rows.position.dtype == rows.targets.dtype == torch.int64
    assert rows.gather(hidden_number[..., None]).flatten().tolist() == predicting[keep].tolist()
    assert torch.equal(rows.spread(rows.targets), torch.where(keep, aligned, 0).long())
    assert torch.equal(rows.pick(aligned), aligned[keep])


def test_rows_know_an_ignore_index_that_is_a_token():
    rows = pick_rows(torch.tensor([[0, 3, 0], [3, 2, 3]]), ignore_index=3)
    assert rows.position.tolist() == [0, 2, 4]
    assert rows.targets.tolist() == [0, 0, 2]


def test_no_tokens_give_no_rows():
    rows = pick_rows(LAYOUTS["no tokens"], IGNORE)
    assert rows.index.numel() == rows.targets.numel() == 0
    assert rows.lengths.tolist() == [0, 0]


def test_hidden_states_are_copied_only_where_labels_are_left_out():
    hidden = torch.randn(2, 3, 5)
    whole = pick_rows(LAYOUTS["nothing masked"], IGNORE).gather(hidden)
    assert whole.data_ptr() == hidden.data_ptr()
    assert pick_rows(torch.tensor([[1, 2, IGNORE], [3, 4, 5]]), IGNORE).gather(hidden).shape == (5, 5)
    # As many rows as hidden states, one of them twice.
    twice = replace(pick_rows(LAYOUTS["nothing masked"], IGNORE), index=torch.tensor([0, 1, 2, 3, 4, 4]))
    assert torch.equal(twice.gather(hidden)[5], hidden[1, 1])


def test_padded_sequences_span_their_rows():
    rows = pick_rows(LAYOUTS["padded"], IGNORE)
    assert rows.offsets.tolist() == [0, 2, 5]
    assert rows.lengths.tolist() == [2, 3]
    assert rows.sequence.tolist() == [0, 0, 1, 1, 1]
    assert rows.shortest == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_span_their_rows(dtype):
    labels = torch.tensor([IGNORE, 1, 2, 3, IGNORE, IGNORE, 4])
    rows = pick_rows(labels, IGNORE, cu_seqlens=torch.tensor([0, 2, 2, 4, 6, 7, 7], dtype=dtype))
    assert rows.offsets.tolist() == [0, 1, 1, 3, 3, 4, 4]
    assert rows.offsets.dtype == torch.int64
    assert rows.lengths.tolist() == [1, 0, 2, 0, 1, 0]
    assert rows.sequence.tolist() == [0, 2, 2, 4]
    assert rows.shortest == 0


@pytest.mark.parametrize("value", [-1, 8, 10**12, -(10**12)])
@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
def test_a_label_out_of_range_is_told_by_its_position(value, shift):
    labels = torch.tensor([[1, IGNORE, 2, 3], [4, value, 5, IGNORE]])
    rows = pick_rows(labels, IGNORE, shift)
    message = rf"^labels must be in \[0, 8\) .*; got {value} at position \[1, {0 if shift else 1}\] "
    with pytest.raises(ValueError, match=message):
        rows.check_targets(8, IGNORE)
    pick_rows(labels[:1], IGNORE, shift).check_targets(8, IGNORE)


@pytest.mark.parametrize("bounds", [[0, 5, 3, 8], [1, 3, 5, 8], [0, 3, 5, 7], [0, 3, 100, 8], [-9, 3, 5, 8]])
@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
def test_boundaries_out_of_order_are_refused(bounds, shift):
    with pytest.raises(ValueError, match=r"^cu_seqlens must start at 0, .* end at N = 8; got"):
        pick_rows(torch.arange(8), IGNORE, shift, torch.tensor(bounds))


# What rows are for: the head on hidden states that stand in them


def head_inputs(n, hidden_size=32, vocab_size=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, hidden_size, generator=generator)
    return hidden.to(DEVICE), torch.randn(vocab_size, hidden_size, generator=generator).to(DEVICE)


def call(backend, backward):
    return LogpsCall(LogitTransform(), (), {"exact": 0.0, "certified": 1e-6}[backward], None, backend, None)


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_two_labels_of_one_hidden_state_give_the_sum_of_both_gradients(backend, backward):
    """As chosen and rejected, which share a prompt, are predicted by its last token."""
    hidden, weight = head_inputs(4)
    index = torch.tensor([0, 1, 1, 3, 0], device=DEVICE)
    targets = torch.tensor([7, 200, 3, 128, 7], device=DEVICE)
    g = torch.tensor([1.0, -0.5, 2.0, 0.25, 3.0], device=DEVICE)
    rows = Rows(
        index, torch.arange(5, device=DEVICE), targets, torch.tensor([0, 5]), torch.Size([5]), 5, (3, 200)
    )

    def gradients():
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = row_values(Head(rows.gather(leaves[0]), leaves[1]), targets, call(backend, backward))
        return torch.autograd.grad((values.logps * g).sum(), leaves)

    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logps = reference.linear_logps(exact[0][index], exact[1], targets)["logps"]
    expected = torch.autograd.grad((logps * g).sum(), exact)
    first, second = gradients(), gradients()
    for actual, again, x in zip(first, second, expected, strict=True):
        assert relative_error(actual, x) <= 1e-6
        assert torch.equal(actual, again)


def test_hidden_states_without_a_label_are_not_kept_for_the_backward(backend):
    hidden, weight = head_inputs(1000)
    labels = torch.full((1000,), IGNORE, device=DEVICE)
    labels[::100] = 5
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = hidden.clone().requires_grad_(), weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logps = linear_logps(*leaves, labels, backend=backend).logps
    of_weight = weight.untyped_storage().nbytes()
    assert of_weight in saved.values()
    # Ten rows of hidden, and of each a few numbers: the whole of hidden is 128 KB.
    assert sum(saved.values()) - of_weight <= 10 * (32 * 4 + 100)
    logps.sum().backward()
    assert leaves[0].grad.any(-1).sum() == 10
