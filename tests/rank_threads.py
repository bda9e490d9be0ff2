"""Ranks as threads of one process, with gloo between them: tests of what is exchanged that start nothing."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

_Result = TypeVar("_Result")


@cache
def groups_of(ranks: int) -> list[dist.ProcessGroup]:
    """One group, as each of its ranks has it."""
    store = dist.HashStore()
    gloo = dist.ProcessGroup.BackendType.GLOO

    def join(rank: int) -> dist.ProcessGroup:
        group = dist.ProcessGroup(store, rank, ranks)
        group._set_default_backend(gloo)
        backend = dist.ProcessGroupGloo(store, rank, ranks, timedelta(minutes=5))
        group._register_backend(torch.device("cpu"), gloo, backend)
        group._set_group_name(f"{ranks} threads")
        return group

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(join, range(ranks)))


# PyTorch 2.13: a thread of gloo's that outlives the interpreter aborts it now and then.
atexit.register(groups_of.cache_clear)


@contextmanager
def default_group() -> Iterator[dist.ProcessGroup]:
    """torch.distributed initialised, as on any rank; this process is the only one of its default group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def run_ranks_as_threads(ranks: int, function: Callable[[dist.ProcessGroup], _Result]) -> list[_Result]:
    """What the function returns on each rank, or the exception of the first that raises one.

    Not for kernels under Triton's interpreter, which changes its own module while one of them runs.
    """
    groups = groups_of(ranks)
    try:
        with default_group(), ThreadPoolExecutor(ranks) as pool:
            futures = [pool.submit(function, group) for group in groups]
            return [future.result() for future in futures]
    except BaseException:
        groups_of.cache_clear()  # what these ranks exchange from now on would be out of step
        raise
