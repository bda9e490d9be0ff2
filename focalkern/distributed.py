"""What ranks exchange: groups and how a head is split over them, reductions, sums over slices of sequences.

Called by `focalkern.logps`, `focalkern.pairs`, `focalkern.products` and `focalkern.triton_launch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from focalkern import checks
from focalkern.autograd import FirstOrderFunction
from focalkern.rows import sent


@dataclass(frozen=True)
class VocabShard:
    """Where this rank's rows of a head stand in the vocabulary, for a head split by vocabulary over ranks.

        rows = torch.arange(V).tensor_split(group.size())[group.rank()]      # or as uneven as you like
        shard = VocabShard(group, start=int(rows[0]), vocab_size=V)
        out = loss_fn(hidden, full_weight[rows], labels, vocab_shard=shard, ...)

    All ranks of the group call together, with the same hidden, labels and options and their own rows of
    weight, bias and `update.weight`. Loss and log-probs come out the same on all of them, bit by bit; so does
    the gradient of hidden, which is summed over the group: nothing else must reduce it. Those of weight and
    bias are of the own rows. A DTensor weight with the placement `Shard(0)` on a mesh of one dimension brings
    its shard itself. Every call compares what the ranks were given, and waits for them once for that.

    Args:
        process_group: the ranks that hold the head together.
        start: the first entry of the vocabulary in this rank's weight.
        vocab_size: V of the whole head; labels are in [0, V).

    Raises:
        ValueError, TypeError: naming the argument.
    """

    process_group: dist.ProcessGroup
    start: int
    vocab_size: int

    def __post_init__(self) -> None:
        check_group("process_group", self.process_group)
        checks.check_integer("start", self.start, low=0)
        checks.check_integer("vocab_size", self.vocab_size, low=1)


class AsyncReduction:
    """All-reduces that are under way over the ranks of a group: each tensor holds its sum after `wait`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._works: list[Any] = []

    def start(self, *tensors: torch.Tensor) -> None:
        self._works += [dist.all_reduce(x, group=self.group, async_op=True) for x in tensors]

    def wait(self) -> None:
        """On CUDA the stream waits, not the host."""
        while self._works:
            self._works.pop(0).wait()


def check_group(name: str, group: object) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed process group; got {type(group).__name__}")


def all_gather(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:  # [ranks, ...]
    """The values of all ranks, which must have one shape."""
    gathered = values.new_empty(dist.get_world_size(group), *values.shape)
    # Its name since torch 2.13, which warns of the one before.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(gathered.flatten(0, 1), values, group=group)
    return gathered


def gathered_numbers(
    group: dist.ProcessGroup, device: torch.device, numbers: list[int], *on_device: torch.Tensor
) -> list[list[int]]:
    """The numbers of all ranks, to be compared: where they differ, the next exchange would hang, or abort.

    Waits for the ranks, once.
    """
    own = torch.stack([*sent(torch.tensor(numbers), device), *on_device])
    return all_gather(own, group).tolist()


def check_same_pairs(group: dist.ProcessGroup, device: torch.device, sequences: int) -> None:
    """Raise on every rank where they have different numbers of sequences."""
    gathered = gathered_numbers(group, device, [sequences])
    if any(numbers != [sequences] for numbers in gathered):
        raise ValueError(
            "labels must be slices of the same pairs on all ranks of sequence_group; the numbers of sequences"
            f" are {[numbers[0] for numbers in gathered]}"
        )


class SumOverSlices(FirstOrderFunction):
    """Sums over the ranks of a group that each hold a slice of the same sequences.

    What every rank then computes from them is the same, and no rank's copy counts twice: the gradient of a
    slice's part is that of the sum.
    """

    @staticmethod
    def forward(ctx, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def copies_within(
    group: dist.ProcessGroup | None,  # None: all ranks
    *shared_by: dist.ProcessGroup | None,  # groups whose ranks work on the same pairs
) -> int:
    """How many ranks of `group` have the pairs of this one."""
    copies = 1
    for shared in shared_by:
        if shared is not None:
            sharers = set(dist.get_process_group_ranks(shared))
            copies *= len(sharers.intersection(dist.get_process_group_ranks(group)))
    return copies
