"""Time and memory of a training step, for `throughput.py` and `trl_step.py`."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import psutil
import torch
from tqdm import trange

T = TypeVar("T")


class Step(NamedTuple):
    """A forward pass, and the backward pass that takes its result.

    A step that raises within `guard()`, which does not let the exception out, takes no further part.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], object] = lambda result: None
    guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def interleaved_times(
    steps: Mapping[str, Step],
    device: torch.device,
    warmup: int,
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Times of every step, in rounds (A B C, A B C, ...): a slow moment of the machine meets them all.

    In ms, as they stand in the JSON files. "both" is timed as one stretch in the same runs, not added up.
    """
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for round_ in trange(warmup + repeats, desc="timing", leave=False, disable=None):
        for name in list(runs):
            with steps[name].guard():
                run = time_once(steps[name], device)
                if round_ >= warmup:
                    runs[name].append(run)
                continue
            del runs[name]
    return {
        name: {
            "forward_ms": in_ms(forward for forward, _ in found),
            "backward_ms": in_ms(both - forward for forward, both in found),
            "both_ms": in_ms(both for _, both in found),
        }
        for name, found in runs.items()
    }


def in_ms(seconds: Iterable[float]) -> dict[str, Any]:
    """Median and range, and each run in the order in which they ran."""
    samples = [round(1e3 * run, 4) for run in seconds]
    median = statistics.median(samples)
    return {"median": median, "min": min(samples), "max": max(samples), "samples": samples}


def time_once(step: Step, device: torch.device) -> tuple[float, float]:
    """Seconds until the end of the forward and until the end of the backward."""
    if device.type == "cuda":
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize(device)
        start.record()
        result = step.forward()
        middle.record()
        step.backward(result)
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(middle) / 1e3, start.elapsed_time(end) / 1e3

    began = time.perf_counter()
    result = step.forward()
    forward = time.perf_counter() - began
    step.backward(result)
    return forward, time.perf_counter() - began


def release_cached() -> None:
    """Give cached memory back to the GPU after a step ran out of it."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA is not initialised


class PeakMemory(NamedTuple):
    """Bytes that a call needed at its peak beyond the memory before it and the tensors that it returned."""

    extra: int
    upper_limit: bool = False  # the process had been larger before the call than during it


def peak_extra_bytes(call: Callable[[], list[torch.Tensor]], device: torch.device) -> PeakMemory:
    """Peak memory of one call. What it returns (a step's gradients) is counted out: any method must hold it.

    On a CPU it is the largest resident size of the process. Call it `in_fresh_process`: an old process has
    freed memory that the call would find.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        returned = sum(tensor.nbytes for tensor in call())
        torch.cuda.synchronize(device)
        return PeakMemory(max(0, torch.cuda.max_memory_allocated(device) - before - returned))

    with contextlib.suppress(OSError):  # where this reset is not allowed, the old peak is an upper limit
        Path("/proc/self/clear_refs").write_text("5")
    before, peak_before = psutil.Process().memory_info().rss, peak_resident_bytes()
    returned = sum(tensor.nbytes for tensor in call())
    peak = peak_resident_bytes()
    # The counters lag by some pages per core, hence the slack; without a reset the two may be far apart.
    upper_limit = peak <= peak_before and peak_before - before > 8 * 2**20
    return PeakMemory(max(0, peak - before - returned), upper_limit)


def peak_resident_bytes() -> int:
    if sys.platform != "linux":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    # Not ru_maxrss: on Linux, a child starts with its parent's.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Result of a function here, in a process that has only imported it; `BrokenProcessPool` if killed.

    glibc gives freed tensors back there. Else a step of eager PyTorch took 5 or 6 times its logits, not 3.
    """
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["torch", f"benchmarks.{Path(function.__code__.co_filename).stem}"])
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "PYTHONPATH": os.pathsep.join(sys.path)}
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, fork) as pool:
        return pool.submit(function, *arguments).result()


@contextlib.contextmanager
def memory_limit(device: str) -> Iterator[None]:
    """Let an allocation beyond the free memory raise. Linux grants it, and kills the process later."""
    if device != "cpu" or sys.platform != "linux":
        yield
        return
    process = psutil.Process()
    before, hard = process.rlimit(psutil.RLIMIT_DATA)
    process.rlimit(psutil.RLIMIT_DATA, (process.memory_info().data + int(0.9 * available_bytes()), hard))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_DATA, (before, hard))


def available_bytes() -> int:
    """Memory of the machine, or of this container, that is still free."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
