"""Where the completion tokens are: from labels (padded, shifted or packed) to the rows the head works on.

Called by the public functions. Hidden states are never copied or shifted here, only indexed. On CUDA nothing
waits for the device: the arrays have the length of the worst case, and `count` tells the kernels how much of
them is real.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Rows that are converted to the dtype of hidden together.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Rows:
    """The completion tokens of a batch; entries past `count` are 0 and stand for nothing."""

    hidden_index: torch.Tensor  # [n] int64, row of hidden.reshape(-1, H)
    output_index: torch.Tensor  # [n] int64, position in the flattened output
    targets: torch.Tensor  # [n] int64, in [0, V)
    count: torch.Tensor  # [1] int32, on the device: how many of the n rows are real
    output_shape: torch.Size  # shape of the (shifted) labels


@dataclass(frozen=True)
class Sequences:
    """The 2B sequences of a preference batch, chosen first, as ranges of the flattened per-token output."""

    offsets: torch.Tensor  # [2B + 1] int64
    lengths: torch.Tensor  # [2B] int64, completion tokens


def sequence_of_output(offsets: torch.Tensor, outputs: int) -> torch.Tensor:  # [outputs] int64
    """The sequence that each position of the flattened output belongs to."""
    position = torch.arange(outputs, device=offsets.device)
    return torch.searchsorted(offsets[1:], position, right=True)


def aligned_labels(
    labels: torch.Tensor,  # [N], [S, T]
    ignore_index: int,
    shift: bool,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1], with 1-D labels only
) -> torch.Tensor:
    """Labels in the shape of the output, each beside the hidden state that predicts it.

    Padded: `[S, T]`, or `[S, T − 1]` when shifted. One-dimensional without `cu_seqlens`: one sequence.
    Packed: `[N]`, where the last position of each sequence predicts nothing and becomes `ignore_index`.
    """
    if not shift:
        return labels
    if cu_seqlens is None:
        return labels[..., 1:]
    if not labels.numel():
        return labels
    # An empty sequence repeats its predecessor's end; at the very start that is -1, the end of the last
    # sequence.
    ends = (cu_seqlens[1:].long() - 1) % labels.numel()
    return torch.roll(labels.long(), -1).index_fill(0, ends, ignore_index)


def pick_rows(
    labels: torch.Tensor,  # aligned
    hidden_length: int,  # T of hidden [S, T, H]; the labels' own length when not shifted
    ignore_index: int,
    synchronize: bool,
) -> Rows:
    """Index the completion tokens. With `synchronize`, the arrays have exactly their number of entries."""
    flat = labels.reshape(-1)
    keep = flat != ignore_index

    if synchronize:
        output_index = keep.nonzero().squeeze(-1)
        count = torch.full((1,), output_index.numel(), dtype=torch.int32, device=labels.device)
        targets = flat[output_index].long()
    else:
        n = flat.numel()
        position = torch.arange(n, device=labels.device)
        # Masked tokens all land in one extra slot, which is cut off.
        slot = torch.where(keep, keep.cumsum(0) - 1, n)
        output_index = position.new_zeros(n + 1).scatter_(0, slot, position)[:n]
        count = keep.sum(dtype=torch.int32).reshape(1)
        targets = torch.where(position < count, flat[output_index].long(), 0)

    hidden_index = output_index
    label_length = labels.shape[-1]
    if label_length != hidden_length and label_length:
        hidden_index = output_index // label_length * hidden_length + output_index % label_length
    return Rows(hidden_index, output_index, targets, count, labels.shape)


def spread_over_outputs(values: torch.Tensor, rows: Rows) -> torch.Tensor:  # [outputs]
    """Values of the rows at their places in the flattened output, 0 elsewhere."""
    outputs = rows.output_shape.numel()
    position = torch.arange(values.numel(), device=values.device)
    # As in `pick_rows`: what is not real lands in one extra slot.
    place = torch.where(position < rows.count, rows.output_index, outputs)
    return values.new_zeros(outputs + 1).scatter_(0, place, values)[:outputs]


def spread_over_hidden(
    dh: torch.Tensor,  # [n, K]
    hidden: torch.Tensor,  # [M, K]
    rows: Rows,
) -> torch.Tensor:  # [M, K]
    """Gradients of the rows at their places in that of hidden, 0 elsewhere."""
    position = torch.arange(dh.shape[0], device=dh.device)
    # What is not real lands in one extra row.
    place = torch.where(position < rows.count, rows.hidden_index, hidden.shape[0])
    dhidden = torch.zeros((hidden.shape[0] + 1, hidden.shape[1]), dtype=hidden.dtype, device=dh.device)
    # Some rows at a time: a copy of all in their own dtype would come on top of both.
    for rows_of_place, values in zip(place.split(_ROWS_AT_ONCE), dh.split(_ROWS_AT_ONCE), strict=True):
        dhidden.index_copy_(0, rows_of_place, values.to(hidden.dtype))
    return dhidden[:-1]


def sequence_ranges(
    labels: torch.Tensor,  # aligned
    ignore_index: int,
    cu_seqlens: torch.Tensor | None,
) -> Sequences:
    """Ranges and completion lengths of the sequences of a batch."""
    keep = labels != ignore_index
    if cu_seqlens is None:
        count, length = labels.shape
        offsets = torch.arange(count + 1, device=labels.device) * length
        return Sequences(offsets, keep.sum(-1))
    offsets = cu_seqlens.long().contiguous()
    running = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return Sequences(offsets, running[offsets[1:]] - running[offsets[:-1]])


def tail_weights(
    labels: torch.Tensor,  # aligned
    ignore_index: int,
    sequences: Sequences,
    weight: float,
    dtype: torch.dtype,
) -> torch.Tensor:  # [outputs]
    """1 for the first min(|w|, |l|) completion tokens of both sequences of a pair, `weight` for the rest."""
    count = (labels.reshape(-1) != ignore_index).cumsum(0)
    sequence = sequence_of_output(sequences.offsets, count.numel())
    before = torch.cat([count.new_zeros(1), count])[sequences.offsets[:-1]]
    chosen, rejected = sequences.lengths.chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)
    one = torch.ones((), dtype=dtype, device=count.device)
    return torch.where(count - before[sequence] <= shared[sequence], one, weight * one)
