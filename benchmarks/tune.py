"""Tuning sweep of the launch table on the GPU of this machine; `gpu.py` runs it.

    python benchmarks/tune.py --seconds 90 --json tuned.json

The table has the entries that are clearly faster than those of `csrc_triton/launch.py`. A candidate's results
must agree with the shipped entry's and repeat bit for bit; then its kernel is timed. Several processes
compile candidates into Triton's cache. One process measures them; if a candidate ends it, another one starts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import parser_of
from benchmarks.inputs import Recipe, Shape, calibrate
from benchmarks.peers import first_line
from benchmarks.report import DTYPES, write_json
from benchmarks.resources import compiled_launches, launch_head
from csrc_triton.launch import VOCAB_BLOCK, Launch, launch_config
from csrc_triton.linear_logps import linear_logps_fwd_kernel
from focalkern import linear_logps, triton_launch
from focalkern.records import OUTPUTS

GAIN = 0.97  # an entry replaces the shipped one if it takes at most this share of its time
START_SECONDS = 75  # for the input of a new process, and its first launches
CANDIDATE_SECONDS = 15  # to measure one
CONFIRM_SHARE = 0.15  # of the time, to measure each kernel's best again beside the shipped entry
FEW_TOKENS = 512  # of which a kept block has about 20 rows
ACCUMULATORS = 128  # registers of a thread for the sums of its tile: half of all
SPAWN = multiprocessing.get_context("spawn")

# Entries that are tuned, those of a usual step first, and the options of `linear_logps` that launch them.
TUNED: dict[str, dict[str, Any]] = {
    "fwd": {},
    "certified_dz": {},
    "certified_dweight": {},
    "certified_product": {},
    "bwd_dz": {},
    "bwd_dz_small": {"softcap": 30.0},
    "certified_dz_small": {"softcap": 30.0},
    "fwd_small": {"outputs": OUTPUTS},
    "certified_dz_few": {},
    "certified_product_few": {},
}
# Numbers to combine: block_m, block_n, block_k, num_warps, num_stages.
ROWS, FEW_ROWS = (64, 128, 256), (16, 32, 64)
CHOICES = {
    "fwd": (ROWS, (128, 256), (32, 64), (4, 8), (2, 3, 4, 5)),
    "bwd_dz": (ROWS, (128, 256), (32, 64), (4, 8), (2, 3, 4, 5)),
    "certified_dz": (ROWS, (VOCAB_BLOCK,), (32, 64, 128), (4, 8), (2, 3, 4, 5)),
    # Half of the stages are the index of the gathered rows.
    "certified_dweight": ((VOCAB_BLOCK,), (64, 128, 256), (32, 64), (4, 8), (3, 5, 7)),
    "certified_product": (ROWS, (128, 256), (32, 64), (4, 8), (1, 2, 3, 4)),
}
Job = tuple[str, Launch]  # the entry's name, and a candidate for it
Rows = dict[Job, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What is tuned for."""

    arch: str
    shared_bytes: int  # that a program may have
    dtype: str = "bf16"
    tokens: int = 8192
    hidden: int = 4096
    vocab: int = 128256
    sharpness: int = 50  # of the input, as throughput.py takes it

    def shipped(self, name: str) -> Launch:
        return launch_config(name, self.arch, 8 * DTYPES[self.dtype].itemsize)

    def tokens_for(self, name: str) -> int:
        return min(self.tokens, FEW_TOKENS) if name.endswith("_few") else self.tokens


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="for the whole sweep (default: 90)")
    parser.add_argument("--json", type=Path, required=True, metavar="PATH", help="the table")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(2, f"tune.py needs a CUDA device; torch {torch.__version__} sees none\n")
    device = torch.device("cuda", torch.cuda.current_device())
    shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    setting = Setting(triton_launch.arch_of(device), shared_bytes)
    rows = sweep(setting, in_order(setting), options.json, options.seconds)
    print(f"{len(rows)} candidates measured; faster than shipped:")
    for name, entry in chosen(rows, setting).items():
        print(f"  {name}: {entry}: {rows[name, entry]['ms'] / rows[name, setting.shipped(name)]['ms']:.0%}")
    return 0 if any(row["status"] == "ok" for row in rows.values()) else 1


# Candidates


def in_order(setting: Setting) -> list[Job]:
    """All shipped entries, then the nearest candidate for each, and so on."""
    of_each = ([(name, entry) for entry in candidates(name, setting)] for name in TUNED)
    return [job for jobs in itertools.zip_longest(*of_each) for job in jobs if job]


def candidates(name: str, setting: Setting) -> list[Launch]:
    """The shipped entry, then all that fit, by the number of changes to it."""
    shipped = setting.shipped(name)
    rows, *others = CHOICES[base(name)]
    numbers = itertools.product(FEW_ROWS if name.endswith("_few") else rows, *others)
    fitting = [entry for x in numbers if fits(entry := Launch(*x, source=shipped.source), setting)]

    def distance(entry: Launch) -> float:
        tile, other = astuple(entry)[:4], astuple(shipped)[:4]
        doublings = sum(abs(math.log2(x / y)) for x, y in zip(tile, other, strict=True))
        return doublings + abs(entry.num_stages - shipped.num_stages)

    return list(dict.fromkeys([shipped, *sorted(fitting, key=distance)]))


def fits(entry: Launch, setting: Setting) -> bool:
    """Whether the tiles in flight may fit into shared memory, and the sums of a tile into registers."""
    tile = (entry.block_m + entry.block_n) * entry.block_k * DTYPES[setting.dtype].itemsize
    sums_fit = entry.block_m * entry.block_n <= 32 * entry.num_warps * ACCUMULATORS
    return sums_fit and (entry.num_stages - 1) * tile <= setting.shared_bytes


def base(name: str) -> str:
    return name.removesuffix("_few").removesuffix("_small")


def kernel_of(name: str) -> str:
    return f"linear_logps_{base(name)}_kernel"


def installed(name: str, entry: Launch) -> contextlib.AbstractContextManager[Any]:
    """This entry in the place of the shipped one."""

    def config(wanted: str, arch: str, element_bits: int) -> Launch:
        return entry if wanted == name else launch_config(wanted, arch, element_bits)

    return mock.patch.object(triton_launch, "launch_config", config)


def compile_candidate(setting: Setting, job: Job) -> tuple[Job, str]:
    """Compile it into Triton's cache on disk; the job, and why that failed if it did."""
    name, _ = job
    size = {"hidden_size": setting.hidden, "vocab_size": setting.vocab, "n": setting.tokens_for(name)}
    launch = partial(launch_head, DTYPES[setting.dtype], **TUNED[name], **size)
    try:
        # Triton prints the whole of a kernel that ptxas refuses.
        with installed(*job), contextlib.redirect_stdout(None):
            if setting.arch != "interpret":
                compiled_launches(setting.arch, launch, only=kernel_of(name))
    except Exception as error:  # the others are still to be compiled
        return job, first_line(error)
    return job, ""


# Measuring


class Measurer:
    """The process that measures: it starts with the first candidate, and anew after one that ended it."""

    pool: ProcessPoolExecutor | None = None

    def measure(self, setting: Setting, job: Job) -> dict[str, Any]:
        seconds = CANDIDATE_SECONDS + (0 if self.pool else START_SECONDS)
        self.pool = self.pool or ProcessPoolExecutor(1, mp_context=SPAWN)
        try:
            return self.pool.submit(within, seconds, measure, setting, *job).result()
        except Exception as error:  # of a process that has ended, or whose CUDA calls all raise
            self.pool.shutdown()
            self.pool = None
            return {"status": "lost", "note": first_line(error)}


def within(seconds: float, function: Callable, *arguments: Any) -> Any:
    """The function's result; this process ends if there is none in time, also where it hangs in CUDA."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    result = function(*arguments)
    faulthandler.cancel_dump_traceback_later()  # not after an exception: to end may hang as well
    return result


def measure(setting: Setting, name: str, entry: Launch) -> dict[str, Any]:
    """What came of it. The status: "ok", "wrong" or "failed"; raises if this process cannot go on."""
    try:
        entries = setting.shipped(name), entry, entry
        (expected, _), (results, launches), (again, _) = (launched(setting, name, each) for each in entries)
        if not all(map(agree, results, expected)):
            return {"status": "wrong", "note": "differs from the shipped entry"}
        if not all(map(torch.equal, results, again)):
            return {"status": "wrong", "note": "differs from run to run"}
        return {"status": "ok", "ms": milliseconds(launches)}
    except Exception as error:  # whatever a candidate raises, the others are still to be measured
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # after an illegal access every call raises
        return {"status": "failed", "note": first_line(error)}


def launched(setting: Setting, name: str, entry: Launch) -> tuple[list[torch.Tensor], list[Callable]]:
    """What a step gives with this entry, and the launches of its kernel, to be repeated."""
    launches: list[Callable] = []
    interface = type(linear_logps_fwd_kernel)  # of the JIT, or of the interpreter
    launch = interface.run

    def record(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel.fn.__name__ == kernel_of(name):
            launches.append(partial(launch, kernel, *args, **kwargs))
        return launch(kernel, *args, **kwargs)

    with installed(name, entry), mock.patch.object(interface, "run", record):
        results = step(setting, name)
    if not launches:
        raise RuntimeError(f"{kernel_of(name)} was not launched")
    return results, launches


def step(setting: Setting, name: str) -> list[torch.Tensor]:
    """The log-probs, or the gradients of a backward."""
    (hidden, weight, labels, g), rows = inputs(setting), slice(setting.tokens_for(name))
    backward = "certified" if name.startswith("certified") else "exact"
    options = TUNED[name] | {"backward": backward, "tau": 2.0**-13, "backend": "triton"}
    with torch.set_grad_enabled(not name.startswith("fwd")):
        logps = linear_logps(hidden[rows], weight, labels[rows], **options).logps
    return list(torch.autograd.grad(logps, (hidden, weight), g[rows])) if logps.requires_grad else [logps]


@functools.cache
def inputs(setting: Setting) -> tuple[torch.Tensor, ...]:
    """hidden, weight, labels, and gradients of the log-probs: chosen up, rejected down."""
    device = "cpu" if setting.arch == "interpret" else "cuda"
    shape = Shape("tuned", setting.hidden, setting.vocab)
    recipe = Recipe(shape, setting.tokens, 4, DTYPES[setting.dtype], device)
    batch = calibrate(recipe, setting.sharpness).batch()
    g = torch.full((setting.tokens,), 0.01, device=device)
    g[: setting.tokens // 2] *= -1
    return batch.hidden, batch.weight, batch.labels, g


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether another order of summation explains the difference, by the size of each row. NaN never does."""
    tolerance = max(torch.finfo(expected.dtype).eps, 1e-4)
    size = expected.float().square().mean(-1, keepdim=True).sqrt()
    return bool(((found - expected).abs() <= tolerance * (expected.abs() + 4 * size)).all())


def milliseconds(launches: list[Callable]) -> float:
    """Of all, one behind the other."""

    def run() -> None:
        for launch in launches:
            launch()

    if torch.cuda.is_available():
        # As a CUDA graph: the host may take longer for many short launches than the device.
        return triton.testing.do_bench_cudagraph(run, return_mode="median")
    return 1e3 * Timer("run()", globals={"run": run}).timeit(1).median


# The sweep


def sweep(setting: Setting, jobs: list[Job], path: Path, seconds: float) -> Rows:
    """Measure, as it is compiled, what there is time for; then the best again, beside the shipped entries."""
    deadline = time.monotonic() + seconds
    measurer = Measurer()
    rows: Rows = {}
    for job, error in compiled(setting, jobs, deadline - CONFIRM_SHARE * seconds):
        rows[job] = {"status": "failed", "note": error} if error else measurer.measure(setting, job)
        write(rows, setting, path)
    for name, entry in chosen(rows, setting).items():
        for job in ((name, setting.shipped(name)), (name, entry)):
            if time.monotonic() < deadline:
                rows[job] = measurer.measure(setting, job)
                write(rows, setting, path)
    return rows


def compiled(setting: Setting, jobs: list[Job], deadline: float) -> Iterator[tuple[Job, str]]:
    """Each job when it is compiled, and why that failed if it did."""
    processes = max(1, min(12, (os.cpu_count() or 1) - 2))
    with SPAWN.Pool(processes) as pool:
        found = pool.imap_unordered(partial(compile_candidate, setting), jobs)
        with contextlib.suppress(StopIteration, multiprocessing.TimeoutError):
            while (left := deadline - time.monotonic()) > 0:
                yield found.next(left)  # never, if a compiler crashed


def chosen(rows: Rows, setting: Setting) -> dict[str, Launch]:
    """The fastest candidates, for entries where one is clearly faster than the shipped one."""
    ms = {job: row["ms"] for job, row in rows.items() if row["status"] == "ok"}
    found = {}
    for name, entry in sorted(ms, key=ms.__getitem__, reverse=True):
        if ms[name, entry] <= GAIN * ms.get((name, setting.shipped(name)), 0.0):
            found[name] = entry
    return found


def write(rows: Rows, setting: Setting, path: Path) -> None:
    best = chosen(rows, setting)
    table = {
        **asdict(setting),
        "element_bits": 8 * DTYPES[setting.dtype].itemsize,
        "entries": {name: asdict(replace(entry, source="measured")) for name, entry in best.items()},
        "candidates": [{"name": name, **asdict(entry), **row} for (name, entry), row in rows.items()],
    }
    write_json(table, path)


if __name__ == "__main__":
    sys.exit(main())
