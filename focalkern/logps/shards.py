"""A head that is split by vocabulary over ranks: its inputs, and its forward from those of the shards.

Called by `linear_logps` and `LinearLogpsFunction`.
"""

from __future__ import annotations

import itertools
import zlib
from typing import TYPE_CHECKING, Any

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern import checks
from focalkern.distributed import VocabShard, all_gather, gathered_numbers
from focalkern.logps.statistics import ShardStatistics, shard_statistics, values_of_shards
from focalkern.low_rank import LowRankUpdate
from focalkern.records import BlockStatistics, RowValues, Saved
from focalkern.rows import Rows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Labels in another shard: of no vocabulary block, however it is divided and rounded.
_ELSEWHERE = -VOCAB_BLOCK


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
        update = LowRankUpdate(
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


def check_shard(shard: VocabShard, hidden: torch.Tensor, height: int, rows: Rows, options: tuple) -> None:
    """Raise on every rank where they do not fit together; `height` is that of this rank's weight."""
    own = (shard.start, shard.start + height, shard.vocab_size)
    # Sums that tell labels which differ, or stand elsewhere.
    place = torch.arange(1, rows.targets.numel() + 1, device=rows.targets.device)
    sums = rows.targets.sum(), (rows.targets.square() * place).sum(), (rows.position * place).sum()
    numbers = [zlib.crc32(repr(options).encode()), *own, *hidden.shape[-2:], rows.targets.numel()]
    gathered = gathered_numbers(shard.process_group, hidden.device, numbers, *sums)

    inputs = [of_rank[4:] for of_rank in gathered]
    if any(of_rank != inputs[0] for of_rank in inputs):
        raise ValueError(
            "hidden and labels must be the same on all ranks of a head split by vocabulary (ranks with"
            " batches of their own hold a weight of FSDP2, which is to be gathered: see lm_head_logps); the"
            f" T, H, completion tokens, checksums of labels of its ranks are {inputs}"
        )
    if len({of_rank[0] for of_rank in gathered}) > 1:
        raise ValueError(
            "dtype, whether gradients are taken, and all options must be the same on all ranks of a head"
            f" split by vocabulary; here they are {options}"
        )
    shards = sorted(of_rank[1:4] for of_rank in gathered)
    ends = [0, *(end for _, end, _ in shards)]
    expected = [[start, end, ends[-1]] for start, end in itertools.pairwise(ends)]
    if shards != expected:
        raise ValueError(
            "vocab_shard must place every entry of the vocabulary on one rank, with start and vocab_size; the"
            f" [start, start + rows of weight, vocab_size] of its ranks are {shards}"
        )


def targets_of_shard(targets: torch.Tensor, shard: VocabShard, height: int) -> torch.Tensor:  # [n]
    """Targets within a shard of this height; those of other shards are negative."""
    own = targets - shard.start
    return torch.where((own >= 0) & (own < height), own, _ELSEWHERE)


def reduced_over_shards(
    blocks: BlockStatistics,  # of the own shard
    targets: torch.Tensor,  # [n] in the whole vocabulary
    own_targets: torch.Tensor,  # [n] `targets_of_shard`
    height: int,  # of the shard's weight
    shard: VocabShard,
) -> tuple[RowValues, Saved]:
    """The forward of the whole vocabulary.

    One all-gather of the label's logit, the shard's logsumexp, and what the outputs take of each row: a sum
    of maxima and sums would be two exchanges, one after the other, and depend on the ranks' order.
    """
    own = shard_statistics(blocks, own_targets)
    if own.to_reach is not None:
        # A label in a later shard has to be above all of this one.
        above = torch.nextafter(own.to_reach, own.to_reach.new_full((), torch.inf))
        is_later = targets > shard.start + height - 1
        own = own._replace(to_reach=torch.where(is_later, above, own.to_reach))
    given = {name: value for name, value in own._asdict().items() if value is not None}
    gathered = all_gather(torch.stack(list(given.values())), shard.process_group)

    shards = ShardStatistics(**{name: gathered[:, i] for i, name in enumerate(given)})
    values, saved = values_of_shards(shards, blocks.lse, shard.vocab_size)
    share = torch.exp(own.rest_lse - torch.logsumexp(shards.rest_lse, 0))
    return values, saved._replace(rest_mass=saved.one_minus_p * share)
