"""Work on CPUs in two threads of Python, each with half of torch's.

torch's threads wait for each other after every operation, which takes longer than a small one. Two that work
on parts of their own do not: the forward of 2048 × 512 × 32768 takes 373 in place of 423 ms, and 358 in place
of 494 where waiting threads sleep (bf16, OMP_WAIT_POLICY=PASSIVE; 2 cores of an AMD EPYC Zen 4, 2026-12). A
dispatch mode, such as a counter of operations, does not see into these threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")

# New threads of the process take over the count that was set last: one user's threads at a time set it.
_setting_threads = Lock()


def in_two_threads(
    work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device
) -> list[Result]:
    """What `work` gives for each part.

    One after the other on GPUs, where torch has one thread, and beside another thread's call.
    """
    threads = torch.get_num_threads()
    is_apart = device.type == "cpu" and threads > 1 and len(parts) > 1
    if not is_apart or not _setting_threads.acquire(blocking=False):
        return [work(part) for part in parts]
    is_inference = torch.is_inference_mode_enabled()  # a thread begins without

    def run(part: Part) -> Result:
        torch.set_num_threads(threads // 2)
        with torch.inference_mode(is_inference), torch.no_grad():
            return work(part)

    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, parts))
    finally:
        torch.set_num_threads(threads)
        _setting_threads.release()


def sums_in_two_threads(
    work: Callable[[Part, list[torch.Tensor | None]], None],
    halves: tuple[Part, Part],
    totals: list[torch.Tensor | None],
    device: torch.device,
) -> None:
    """`work` adds what each half gives to totals of its own; then they are added up."""
    own = totals, [None if x is None else torch.zeros_like(x) for x in totals]
    in_two_threads(lambda half: work(*half), list(zip(halves, own, strict=True)), device)
    for total, other in zip(*own, strict=True):
        if total is not None and other is not None:
            total += other
