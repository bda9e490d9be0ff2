"""A rank that dies, or that stops answering: the others end with an error, they do not wait for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from parallel_common import T, V, leaf, make_batch, make_loss

from focalkern import VocabShard

TIMEOUT = 8.0  # seconds, of the process group
DEAD = 17  # the exit code of the rank that dies


def die() -> None:
    if dist.get_rank() == 1:
        os._exit(DEAD)


def stop() -> None:
    if dist.get_rank() == 1:
        time.sleep(10 * TIMEOUT)  # until it is ended


def step(by: str, before_forward: Callable[[], None], before_backward: Callable[[], None]) -> None:
    """A training step, with the sum of the gradients that slices need."""
    batch, rank = make_batch(), dist.get_rank()
    hidden, weight, labels, arguments = batch.hidden, leaf(batch.weight), batch.labels, {}
    if by == "vocabulary":
        rows = slice(0, 600) if rank == 0 else slice(600, V)
        weight = leaf(batch.weight[rows])
        arguments = {"vocab_shard": VocabShard(dist.group.WORLD, rows.start, V)}
    else:
        columns = slice(0, T // 2) if rank == 0 else slice(T // 2, T)
        hidden, labels = hidden[:, columns], labels[:, columns]
        arguments = {"sequence_group": dist.group.WORLD}
    before_forward()
    out = make_loss("FocalPO")(leaf(hidden), weight, labels, **batch.references, **arguments)
    before_backward()
    out.loss.backward()
    assert torch.isfinite(out.loss)
    if by == "sequences":
        dist.all_reduce(weight.grad)


def nothing() -> None:
    pass


def two_steps(by: str, before_forward: Callable[[], None], before_backward: Callable[[], None]) -> None:
    step(by, nothing, nothing)
    step(by, before_forward, before_backward)


CASES: dict[str, Callable[[], None]] = {
    f"{by}, {what} before the {when}": partial(two_steps, by, *points)
    for by in ("vocabulary", "sequences")
    for what, halt in (("dies", die), ("stops", stop))
    for when, points in (("forward", (halt, nothing)), ("backward", (nothing, halt)))
}
