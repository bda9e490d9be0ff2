"""Runs the checks of parallel heads in several ranks, processes that make up one gloo group.

    python tests/parallel_worker.py GROUP RANKS FOLDER

Started by `test_parallel_heads`. The ranks are forks of one process, which has imported everything: started
one by one, they would take three times as long. They meet in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import parallel_dying
import parallel_sequences  # noqa: F401
import parallel_vocabulary  # noqa: F401
import torch
import torch.distributed as dist
from parallel_common import CHECKS, IS_INTERPRETED

if IS_INTERPRETED:
    import interpreted  # noqa: F401

DONE, FAILED = "done: ", "failed: "


def join(rank: int, ranks: int, store: Path, timeout: float) -> None:
    dist.init_process_group(
        "gloo",
        init_method=store.as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )


def run_checks(rank: int, group: str, ranks: int, folder: Path) -> None:
    """One check after the other, until one fails: the other ranks may wait within it."""
    join(rank, ranks, folder / "store", timeout=300)
    poison_allocations()
    for name, check in CHECKS[group].items():
        try:
            check()
        except Exception:
            say(f"rank {rank} {FAILED}{name}\n{traceback.format_exc()}")
            os._exit(1)  # closes the connections: the others fail at once
        say(f"rank {rank} {DONE}{name}")
    dist.destroy_process_group()


def run_case(rank: int, case: str, ranks: int, folder: Path) -> None:
    join(rank, ranks, folder / f"store of {case}", timeout=parallel_dying.TIMEOUT)
    try:
        parallel_dying.CASES[case]()
    except Exception as error:
        say(f"{case}: rank {rank} ends with {type(error).__name__}: {' '.join(str(error).split())}")
        raise


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # at once, where several processes write


def poison_allocations() -> None:
    """As conftest does it for the tests of one process: an output left unwritten is then seen."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return wrapper

    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)


def run_dying(folder: Path) -> None:
    """All cases at once: how the first rank of each has ended, and when. The second may have to be ended."""
    fork, start = get_context("fork").Process, time.monotonic()
    running = {}
    for case in parallel_dying.CASES:
        running[case] = [fork(target=run_case, args=(rank, case, 2, folder)) for rank in range(2)]
        for process in running[case]:
            process.start()
    while running:
        for case, (first, second) in list(running.items()):
            if first.exitcode is None:
                continue
            died_with = second.exitcode
            second.kill()
            say(f"{case}: {json.dumps([first.exitcode, died_with, time.monotonic() - start])}")
            del running[case]
        time.sleep(0.05)


def main(group: str, ranks: str, folder: str) -> int:
    torch.set_num_threads(1)
    if group == "dying":
        run_dying(Path(folder))
        return 0
    processes = [
        get_context("fork").Process(target=run_checks, args=(rank, group, int(ranks), Path(folder)))
        for rank in range(int(ranks))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
