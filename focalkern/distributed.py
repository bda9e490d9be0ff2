"""What ranks exchange: statistics of vocabulary shards, gradients of hidden, sums over slices of sequences.

Called by `focalkern.functional`, `focalkern.autograd`, `focalkern.pair_head` and `focalkern.adaptive_margin`.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from focalkern import checks
from focalkern.backends import VOCAB_BLOCK, Backend, HeadForward, HeadInputs, LogitTransform
from focalkern.backends.row_statistics import ShardStatistics, head_forward_of, shard_statistics
from focalkern.layout import Rows
from focalkern.low_rank import LowRankUpdate

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Labels in another shard: of no vocabulary block, however it is divided and rounded.
_ELSEWHERE = -VOCAB_BLOCK
# Uses of groups whose ranks have been seen to agree: on CUDA looking means waiting, so it happens once.
_agreed: set[tuple] = set()


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
    its shard itself. That the ranks agree is looked at in every call on the CPU, on CUDA in the first.

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


class PendingSums:
    """Sums over the ranks of a group that are under way: each tensor holds its own after `wait`."""

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


def all_gather_once(
    group: dist.ProcessGroup, device: torch.device, use: tuple, numbers: Callable[[], list[int]]
) -> list[list[int]] | None:
    """The numbers of all ranks, to be compared: where they differ, the next exchange would hang, or abort.

    On CUDA None from the second time on, for what a group is used for.
    """
    use = (group.group_name, *use)
    if device.type == "cuda" and use in _agreed:
        return None
    _agreed.add(use)
    return all_gather(torch.tensor(numbers(), device=device), group).tolist()


def check_same_pairs(group: dist.ProcessGroup, labels: torch.Tensor, sequences: int) -> None:
    """Raise on every rank where they have different numbers of sequences."""
    gathered = all_gather_once(group, labels.device, ("sequences",), lambda: [sequences])
    if gathered is not None and any(numbers != [sequences] for numbers in gathered):
        raise ValueError(
            "labels must be slices of the same pairs on all ranks of sequence_group; the numbers of sequences"
            f" are {[numbers[0] for numbers in gathered]}"
        )


def all_gather(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:  # [ranks, ...]
    """The values of all ranks, which must have one shape."""
    gathered = values.new_empty(dist.get_world_size(group), *values.shape)
    # Its name since torch 2.13, which warns of the one before.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(gathered.flatten(0, 1), values, group=group)
    return gathered


# ------------------------------------------------------------------------------------------------- vocabulary


def own_shard(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    update: LowRankUpdate | None,
    labels: torch.Tensor,
    vocab_shard: VocabShard | None,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, LowRankUpdate | None, torch.Tensor, VocabShard | None
]:
    """The inputs of a head as plain tensors of this rank, and the shard that a DTensor weight brings."""
    if not checks.is_dtensor(weight):
        tensors: dict[str, object] = {"hidden": hidden, "bias": bias, "labels": labels}
        if isinstance(update, LowRankUpdate):
            tensors |= {"update.hidden": update.hidden, "update.weight": update.weight}
        for name, value in tensors.items():
            if checks.is_dtensor(value):
                raise TypeError(f"{name} must be a plain tensor, as weight is; got a DTensor")
        if vocab_shard is not None and not isinstance(vocab_shard, VocabShard):
            raise TypeError(f"vocab_shard must be a focalkern.VocabShard; got {type(vocab_shard).__name__}")
        return hidden, weight, bias, update, labels, vocab_shard

    if vocab_shard is not None:
        raise ValueError("vocab_shard must not be given with a DTensor weight, which tells its shard itself")
    mesh, vocab_size = weight.device_mesh, weight.shape[0]
    _check_placements("weight", weight, mesh)
    # As DTensor splits a dimension: equal chunks, rounded up.
    start = mesh.get_local_rank() * -(-vocab_size // mesh.size())
    if vocab_size <= (mesh.size() - 1) * -(-vocab_size // mesh.size()):
        raise ValueError(
            f"weight must have rows on every rank of its mesh; its {vocab_size} rows over {mesh.size()} ranks"
            " leave none for the last"
        )
    shard = VocabShard(mesh.get_group(), start, vocab_size)

    def local(name: str, value: torch.Tensor, is_sharded: bool) -> torch.Tensor:
        if not checks.is_dtensor(value):
            if is_sharded:
                raise TypeError(f"{name} must be a DTensor, as weight is; got a plain tensor")
            return value
        if is_sharded:
            _check_placements(name, value, mesh)
            return value.to_local()
        return _replicated(name, value, mesh)

    if update is not None:
        update = replace(
            update,
            hidden=local("update.hidden", update.hidden, False),
            weight=local("update.weight", update.weight, True),
        )
    return (
        local("hidden", hidden, False),
        weight.to_local(),
        None if bias is None else local("bias", bias, True),
        update,
        local("labels", labels, False),
        shard,
    )


def _check_placements(name: str, value: DTensor, mesh: Any) -> None:
    if value.device_mesh != mesh or mesh.ndim != 1 or not value.placements[0].is_shard(0):
        raise ValueError(
            f"{name} must be split by vocabulary, Shard(0), on the one-dimensional mesh of weight; got"
            f" {value.placements} on {value.device_mesh}. One that FSDP2 has sharded is to be gathered, by"
            " calling the module that fully_shard was given (see lm_head_logps)"
        )


def _replicated(name: str, value: DTensor, mesh: Any) -> torch.Tensor:
    from torch.distributed.tensor import Replicate

    if value.device_mesh != mesh:
        raise ValueError(f"{name} must be on the mesh of weight, {mesh}; got {value.device_mesh}")
    return value.redistribute(placements=[Replicate()]).to_local()


def check_shard(
    shard: VocabShard, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, options: tuple
) -> None:
    """Raise on every rank where they do not fit together; what one rank sees alone, the others wait for."""
    rows = (shard.start, shard.start + weight.shape[0], shard.vocab_size)

    def numbers() -> list[int]:
        # The sum tells labels that differ: of one that is out of range on one rank, no other would know.
        inputs = [hidden.shape[-1], hidden.shape[-2], labels.numel(), int(labels.sum())]
        return [*inputs, zlib.crc32(repr(options).encode()), *rows]

    gathered = all_gather_once(shard.process_group, hidden.device, ("vocabulary", *rows), numbers)
    if gathered is None:
        return
    inputs = [of_rank[:4] for of_rank in gathered]
    if any(of_rank != inputs[0] for of_rank in inputs):
        raise ValueError(
            "hidden and labels must be the same on all ranks of a head split by vocabulary (ranks with"
            " batches of their own hold a weight of FSDP2, which is to be gathered: see lm_head_logps); the"
            f" H, T, labels, sum of labels of its ranks are {inputs}"
        )
    if len({of_rank[4] for of_rank in gathered}) > 1:
        raise ValueError(
            "dtype, whether gradients are taken, and all options must be the same on all ranks of a head"
            f" split by vocabulary; here they are {options}"
        )
    shards = sorted(of_rank[5:] for of_rank in gathered)
    ends = [0, *(end for _, end, _ in shards)]
    expected = [[start, end, ends[-1]] for start, end in itertools.pairwise(ends)]
    if shards != expected:
        raise ValueError(
            "vocab_shard must place every entry of the vocabulary on one rank, with start and vocab_size; the"
            f" [start, start + rows of weight, vocab_size] of its ranks are {shards}"
        )


def rows_of_shard(rows: Rows, shard: VocabShard, weight: torch.Tensor) -> Rows:
    """The same rows with targets within the shard."""
    targets = rows.targets - shard.start
    inside = (targets >= 0) & (targets < weight.shape[0])
    return replace(rows, targets=torch.where(inside, targets, _ELSEWHERE))


def head_forward_of_shards(
    head: HeadInputs,
    rows: Rows,
    own_rows: Rows,  # `rows_of_shard`
    transform: LogitTransform,
    outputs: tuple[str, ...],
    shard: VocabShard,
    backend: Backend,
) -> tuple[HeadForward, torch.Tensor]:
    """The forward of the whole vocabulary, and the mass [n] that this shard has of it, the label left out.

    One all-gather of each row's label, its logit, the shard's logsumexp, and what the outputs take: a sum of
    maxima and sums would be two exchanges, one after the other, and depend on the ranks' order.
    """
    blocks = backend.block_statistics(head, own_rows, transform, outputs)
    own = shard_statistics(blocks, own_rows.targets)
    if own.to_reach is not None:
        # A label in a later shard has to be above all of this one.
        above = torch.nextafter(own.to_reach, own.to_reach.new_full((), torch.inf))
        own = replace(
            own,
            to_reach=torch.where(rows.targets > shard.start + head.weight.shape[0] - 1, above, own.to_reach),
        )
    given = own.given()
    is_held = own_rows.targets >= 0
    code = 2 * rows.targets + is_held
    code = code.view(torch.float64) if own.rest_lse.dtype == torch.float64 else code.int().view(torch.float32)
    gathered = all_gather(torch.stack([code, *given.values()]), shard.process_group)

    _check_codes(gathered[:, 0], rows)
    shards = ShardStatistics.of({name: gathered[:, i] for i, name in enumerate(given, start=1)})
    whole = head_forward_of(shards, blocks.lse, shard.vocab_size, rows)
    share = torch.exp(own.rest_lse - torch.logsumexp(shards.rest_lse, 0))
    return whole, whole.one_minus_p * share


def _check_codes(codes: torch.Tensor, rows: Rows) -> None:
    """Twice the label, and one more on the rank that holds it, of each rank [ranks, n]."""
    codes = codes.view(torch.int64 if codes.dtype == torch.float64 else torch.int32)
    is_real = torch.arange(codes.shape[1], device=codes.device) < rows.count
    labels, holders = codes >> 1, (codes & 1).sum(0)
    checks.fail_if(
        ((labels != labels[0]).any(0) & is_real).any(),
        "labels must be the same on all ranks of a head split by vocabulary",
        lambda: "",
    )
    checks.fail_if(
        ((holders != 1) & is_real).any(),
        "vocab_shard must place every entry of the vocabulary on one rank",
        lambda: (
            f"; label {labels[0][(holders != 1) & is_real][0].item()} is on"
            f" {holders[(holders != 1) & is_real][0].item()}"
        ),
    )


# -------------------------------------------------------------------------------------------------- sequences


class SumOverSlices(torch.autograd.Function):
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
