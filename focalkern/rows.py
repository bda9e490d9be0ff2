"""Where the completion tokens are: from labels (padded, shifted or packed) to dense rows, and back.

Called by the public functions. Everything below them knows dense rows alone: `[n, H]` and `[n]`, and nothing
of masks, padding or shifts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """The n completion tokens of S sequences, one sequence after the other."""

    index: torch.Tensor  # [n] int64: row of hidden.reshape(-1, H) that predicts the token; may repeat
    position: torch.Tensor  # [n] int64: of the token in the flattened (shifted) labels
    targets: torch.Tensor  # [n] int64
    offsets: torch.Tensor  # [S + 1] int64: where each sequence begins among the rows
    shape: torch.Size  # of the (shifted) labels
    shortest: int  # tokens of the shortest sequence
    extremes: tuple[int, int]  # of targets, and 0

    @property
    def lengths(self) -> torch.Tensor:  # [S]
        return self.offsets.diff()

    @property
    def sequence(self) -> torch.Tensor:  # [n]
        """The sequence that each row belongs to."""
        return sequence_of(self.offsets, self.targets.numel())

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., H] -> [n, H]
        """The rows' hidden states; autograd adds their gradients up where a row of hidden stands twice."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.index is self.position and len(self.index) == len(flat):
            return flat.contiguous()  # no label is left out: nothing to copy
        return flat.index_select(0, self.index)

    def check_targets(self, vocab_size: int, ignore_index: int) -> None:
        """Raise ValueError where a label is not in the vocabulary."""
        if 0 <= self.extremes[0] <= self.extremes[1] < vocab_size:
            return
        row = int(((self.targets < 0) | (self.targets >= vocab_size)).nonzero()[0])
        position = torch.unravel_index(self.position[row], self.shape)
        raise ValueError(
            f"labels must be in [0, {vocab_size}) or ignore_index = {ignore_index};"
            f" got {int(self.targets[row])} at position {[int(i) for i in position]} of the (shifted) labels"
        )

    def pick(self, values: torch.Tensor) -> torch.Tensor:  # (shifted) labels' shape -> [n]
        return values.reshape(-1).index_select(0, self.position)

    def spread(self, values: torch.Tensor) -> torch.Tensor:  # [n] -> (shifted) labels' shape
        """Values of the rows where their labels are, 0 elsewhere."""
        if len(values) == self.shape.numel():
            return values.view(self.shape)
        return values.new_zeros(self.shape.numel()).index_copy(0, self.position, values).view(self.shape)


def sequence_of(offsets: torch.Tensor, n: int) -> torch.Tensor:  # [n] int64
    """The sequence that each of n positions belongs to, for sequences that begin at `offsets` [S + 1]."""
    return torch.searchsorted(offsets[1:], torch.arange(n, device=offsets.device), right=True)


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
    ends = (sent(cu_seqlens, labels.device)[1:].long() - 1) % labels.numel()
    return torch.roll(labels.long(), -1).index_fill(0, ends, ignore_index)


def kept_labels(
    labels: torch.Tensor,  # [..., T], not aligned
    ignore_index: int,
    shift: bool,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
) -> torch.Tensor:  # (shifted) labels' shape
    """The (shifted) labels + 1 in int64, and 0 where they are ignored: padding by 0 ignores, too. A copy."""
    labels = aligned_labels(labels, ignore_index, shift, cu_seqlens)
    return (labels.long() + 1).masked_fill(labels == ignore_index, 0)


def pick_rows(
    labels: torch.Tensor,  # [..., T], not aligned
    ignore_index: int,
    shift: bool = False,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1], with 1-D labels only
    device: torch.device | None = None,  # of hidden, where labels are on the host
    known: torch.Tensor | None = None,  # `kept_labels` of log-probs that are there already
) -> Rows:
    """The completion tokens of labels. Where these are on a GPU this waits for it, once; else not at all.

    Raises:
        ValueError: `cu_seqlens` are out of order, or a label differs from the known one.
    """
    hidden_length = labels.shape[-1]
    cu_seqlens = None if cu_seqlens is None else sent(cu_seqlens, labels.device)
    labels = aligned_labels(labels, ignore_index, shift, cu_seqlens)
    flat = labels.reshape(-1)
    keep = flat != ignore_index
    offsets, in_order = _offsets(labels, keep, cu_seqlens)
    lengths = offsets.diff()
    # One transfer for all that the host has to know.
    lowest, highest = torch.nn.functional.pad(torch.where(keep, flat, 0).long(), (0, 1)).aminmax()
    shortest = lengths.amin() if lengths.numel() else offsets[0]
    differs = keep.new_zeros(0)
    if known is not None:
        known = sent(known, flat.device).reshape(-1)
        differs = keep & ((known == 0) | (flat.long() + 1 != known))
    facts = torch.stack([offsets[-1], in_order.long(), lowest, highest, shortest, differs.sum()]).tolist()
    n, is_in_order, lowest, highest, shortest, differing = facts
    if not is_in_order and cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens must start at 0, never decrease and end at N = {flat.numel()};"
            f" got {cu_seqlens.tolist()}"
        )
    if differing:
        raise ValueError(
            f"labels differ from those that linear_logps was given at {differing} tokens: give it the"
            " labels of all losses together, of which each loss may ignore some"
        )
    position = nonzero(keep, n)
    index, length = position, labels.shape[-1]
    if length != hidden_length and length:
        index = position // length * hidden_length + position % length
    device = device or labels.device
    on_device = sent(position, device)
    return Rows(
        index=on_device if index is position else sent(index, device),
        position=on_device,
        targets=sent(flat[position].long(), device),
        offsets=sent(offsets, device),
        shape=labels.shape,
        shortest=shortest,
        extremes=(lowest, highest),
    )


def _offsets(
    labels: torch.Tensor,  # aligned
    keep: torch.Tensor,  # flat
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each sequence begins among the rows, and whether the boundaries are in order."""
    true = keep.new_ones((), dtype=torch.bool)
    if cu_seqlens is None:
        counts = keep.view(labels.shape[:-1].numel(), labels.shape[-1]).sum(-1)
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), true
    bounds, n = cu_seqlens.long(), keep.numel()
    in_order = (bounds[0] == 0) & (bounds[-1] == n) & (bounds.diff() >= 0).all()
    running = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    return running[bounds.clamp(0, n)], in_order


def nonzero(mask: torch.Tensor, count: int) -> torch.Tensor:  # [count] int64
    """Where a mask [N] is true; `count` is known to be how often."""
    if mask.is_cuda and torch.version.hip is None:
        return torch.nonzero_static(mask, size=count).squeeze(1)  # waits for nothing
    return mask.nonzero().squeeze(1)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; what is on the host goes to a GPU without a wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def tail_weights(rows: Rows, weight: float, dtype: torch.dtype) -> torch.Tensor:  # [n]
    """1 for the first min(|w|, |l|) completion tokens of both sequences of a pair, `weight` for the rest."""
    chosen, rejected = rows.lengths.chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)
    sequence = rows.sequence
    place = torch.arange(len(sequence), device=sequence.device) - rows.offsets[sequence]
    one = torch.ones((), dtype=dtype, device=sequence.device)
    return torch.where(place < shared[sequence], one, weight * one)
