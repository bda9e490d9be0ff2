"""Which rows of hidden predict which labels, in every layout, and which tokens belong to which sequence."""

from __future__ import annotations

import itertools

import pytest
import torch

from focalkern.layout import aligned_labels, pick_rows, sequence_ranges

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


@pytest.mark.parametrize("synchronize", [False, True], ids=["worst case", "synchronized"])
@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("layout", NOT_EMPTY)
def test_rows_are_the_completion_tokens_in_order(layout, shift, synchronize):
    labels = LAYOUTS[layout]
    hidden_length = labels.shape[-1]
    # Each position of hidden carries its own number.
    hidden_number = torch.arange(labels.numel()).view(labels.shape)
    aligned = aligned_labels(labels, IGNORE, shift)
    predicting = hidden_number[..., :-1] if shift else hidden_number
    keep = aligned != IGNORE

    rows = pick_rows(aligned, hidden_length, IGNORE, synchronize)

    count = rows.count.item()
    assert count == keep.sum()
    assert rows.output_shape == aligned.shape
    assert rows.hidden_index[:count].tolist() == predicting[keep].tolist()
    assert rows.output_index[:count].tolist() == keep.flatten().nonzero().flatten().tolist()
    assert rows.targets[:count].tolist() == aligned[keep].tolist()
    for index in (rows.hidden_index, rows.output_index, rows.targets):
        assert index.dtype == torch.int64
        assert index.numel() == (count if synchronize else aligned.numel())
    # What lies past the count is read by kernels that load whole tiles: it must be a valid index.
    assert not rows.output_index[count:].any()
    assert not rows.hidden_index[count:].any()
    assert not rows.targets[count:].any()


def test_rows_know_an_ignore_index_that_is_a_token():
    rows = pick_rows(torch.tensor([[0, 3, 0], [3, 2, 3]]), 3, ignore_index=3, synchronize=True)
    assert rows.output_index.tolist() == [0, 2, 4]
    assert rows.targets.tolist() == [0, 0, 2]


@pytest.mark.parametrize("synchronize", [False, True])
def test_no_tokens_give_no_rows(synchronize):
    rows = pick_rows(LAYOUTS["no tokens"], 0, IGNORE, synchronize)
    assert rows.count.item() == rows.hidden_index.numel() == rows.targets.numel() == 0


def test_padded_sequences_span_one_row_each():
    sequences = sequence_ranges(LAYOUTS["padded"], IGNORE, None)
    assert sequences.offsets.tolist() == [0, 4, 8]
    assert sequences.lengths.tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_span_their_ranges(dtype):
    labels = torch.tensor([IGNORE, 1, 2, 3, IGNORE, IGNORE, 4])
    sequences = sequence_ranges(labels, IGNORE, torch.tensor([0, 2, 2, 4, 6, 7, 7], dtype=dtype))
    assert sequences.offsets.tolist() == [0, 2, 2, 4, 6, 7, 7]
    assert sequences.offsets.dtype == torch.int64
    assert sequences.lengths.tolist() == [1, 0, 2, 0, 1, 0]
