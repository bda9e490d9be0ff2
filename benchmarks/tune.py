"""Tuning sweep of the launch table on the GPU of this machine; `gpu.py` and `throughput.py` call it.

    python benchmarks/tune.py --seconds 90 --json tuned.json
    python benchmarks/throughput.py --launch-table tuned.json

Every candidate is run by the public function in the place of the shipped entry, on input as sharp as a
trained LM's; its results are compared with the shipped entry's, block by block, and with its own of a second
run, which are to be equal in every bit; only its own kernel is timed. Nothing that a candidate does can end
the sweep: it is compiled in another process, without the GPU, into triton's cache on disk, and measured in a
process that is started anew when a candidate has taken it down.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.aot import CompiledLaunch, compiled_launches, launch_head
from benchmarks.inputs import Recipe, Shape, calibrate
from benchmarks.report import DTYPES
from csrc_triton import launch as table
from csrc_triton import linear_logps as forward_and_exact
from csrc_triton import linear_logps_certified as certified
from csrc_triton.launch import Launch, launch_config, replace_entries
from focalkern import linear_logps, triton_launch
from focalkern.records import OUTPUTS

TAU = 2.0**-13  # of the certified backward, that of bf16 whatever the dtype
SOFTCAP = 30.0
FEW_TOKENS = 512  # of which the kept blocks have about 20 rows each
GAIN = 0.97  # an entry gives way to one that takes at most this share of its time
FINALISTS = 3  # of each kernel, measured again side by side with the shipped entry
START_SECONDS = 90.0  # for a measuring process to come up: imports, input, first launches
CANDIDATE_SECONDS = 25.0  # to compile a candidate, or to measure it
MOST_STARTS = 5
BLOCK_ROWS = 128  # of a result, compared by themselves: as many as a tile of most candidates has
BLOCK_SLACK = 4.0  # a block may differ by more than the whole, in which roundings average out
LAUNCH_CYCLES = 200_000  # for which the device is kept busy per launch: 0.1 ms, longer than the host takes


@dataclass(frozen=True)
class Tuned:
    """An entry of the launch table: the name of its kernel, and the step that launches it."""

    name: str
    mode: str  # "forward", or the backward: "exact", "certified"
    softcap: float | None = None
    outputs: tuple[str, ...] = ()
    tokens: int | None = None  # where it is not all of them


FWD, BWD_DZ = "linear_logps_fwd_kernel", "linear_logps_bwd_dz_kernel"
DZ, DWEIGHT, PRODUCT = (f"linear_logps_certified_{name}_kernel" for name in ("dz", "dweight", "product"))
# Kernels that the certified step of a trained model takes come first.
TUNED = {
    "fwd": Tuned(FWD, "forward"),
    "certified_dz": Tuned(DZ, "certified"),
    "certified_dweight": Tuned(DWEIGHT, "certified"),
    "certified_product": Tuned(PRODUCT, "certified"),
    "bwd_dz": Tuned(BWD_DZ, "exact"),
    "bwd_dz_small": Tuned(BWD_DZ, "exact", softcap=SOFTCAP),
    "certified_dz_small": Tuned(DZ, "certified", softcap=SOFTCAP),
    "fwd_small": Tuned(FWD, "forward", outputs=OUTPUTS),
    "certified_dz_few": Tuned(DZ, "certified", tokens=FEW_TOKENS),
    "certified_product_few": Tuned(PRODUCT, "certified", tokens=FEW_TOKENS),
}


@dataclass(frozen=True)
class Setting:
    """What is tuned for: sent to the processes that compile and measure."""

    arch: str
    dtype: str
    tokens: int
    hidden: int
    vocab: int
    sharpness: int = 50  # softmax entries above 2^-12 per row, as throughput.py's default

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def element_bits(self) -> int:
        return 8 * self.torch_dtype.itemsize

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.arch == "interpret" else "cuda")

    def shipped(self, kernel: str) -> Launch:
        return launch_config(kernel, self.arch, self.element_bits)


# Candidates: block_m, block_n, block_k, warps, stages; the likely ones first. Those for 16 bits compile for
# sm_80 (mma.sync) or sm_90 (wgmma) without spilled registers: tests/test_benchmark_gpu.py holds it.
Tile = tuple[int, int, int, int, int]
# fmt: off
_MMA: dict[str, list[Tile]] = {
    "fwd": [
        (128, 256, 32, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 128, 64, 8, 4),
        (128, 128, 32, 4, 4), (64, 256, 32, 8, 4), (128, 256, 32, 8, 5), (64, 128, 64, 4, 4),
    ],
    "certified_dz": [
        (64, 128, 64, 4, 4), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
        (64, 128, 64, 8, 4), (64, 128, 32, 4, 5),
    ],
    "certified_dweight": [
        (128, 256, 32, 8, 7), (128, 128, 32, 8, 7), (128, 256, 32, 8, 5), (128, 128, 64, 8, 3),
    ],
    "certified_product": [
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (128, 128, 32, 4, 4),
        (64, 256, 32, 8, 4),
    ],
    # Softcap and optional outputs want registers of their own.
    "small": [(64, 128, 64, 8, 3), (64, 128, 32, 8, 5), (128, 128, 32, 8, 4), (64, 128, 64, 4, 4)],
}
_FEW: dict[str, list[Tile]] = {
    "certified_dz_few": [
        (16, 128, 64, 4, 4), (32, 128, 64, 4, 3), (32, 128, 128, 4, 3), (64, 128, 64, 4, 4),
        (16, 128, 128, 4, 3), (32, 128, 32, 4, 5),
    ],
    "certified_product_few": [
        (32, 128, 64, 4, 2), (16, 128, 64, 4, 2), (32, 256, 32, 4, 3), (64, 128, 64, 4, 2),
        (32, 64, 64, 4, 2), (32, 128, 128, 4, 1),
    ],
}
_WGMMA: dict[str, list[Tile]] = {
    "fwd": [
        (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 4, 4),
        (128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 256, 32, 8, 6), (64, 256, 64, 4, 4),
        (128, 128, 64, 4, 3), (128, 256, 128, 8, 2), (128, 256, 64, 16, 4),
    ],
    "certified_dz": [
        (128, 128, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 4, 3), (64, 128, 128, 4, 3),
        (128, 128, 128, 8, 3), (64, 128, 64, 8, 4), (128, 128, 64, 8, 3), (256, 128, 64, 8, 3),
    ],
    "certified_dweight": [
        (128, 128, 64, 8, 5), (128, 128, 64, 4, 5), (128, 256, 64, 8, 7), (128, 256, 32, 8, 7),
        (128, 256, 64, 8, 3), (128, 128, 32, 4, 7), (128, 256, 32, 8, 5), (128, 128, 64, 8, 7),
    ],
    "certified_product": [
        (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (64, 256, 64, 4, 3),
        (128, 128, 64, 8, 2), (64, 128, 64, 4, 4), (128, 256, 64, 8, 2), (128, 128, 32, 8, 4),
    ],
    "small": [
        (64, 128, 64, 4, 4), (64, 128, 64, 8, 3), (128, 128, 32, 8, 4), (64, 128, 64, 8, 4),
        (64, 128, 32, 8, 5), (128, 128, 64, 8, 4),
    ],
}
_FP32: list[Tile] = [(64, 128, 32, 4, 3), (128, 128, 32, 8, 3), (64, 128, 16, 8, 4), (128, 128, 16, 8, 4)]
_INTERPRET: list[Tile] = [(16, 128, 16, 1, 1), (32, 128, 32, 1, 1)]
# fmt: on

# CUDA programming guide, table of compute capabilities: maximum shared memory per thread block.
_SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_120": 99, "sm_121": 99}
_SHARED_KIB_FROM_HOPPER_ON = 227


def candidates(kernel: str, setting: Setting) -> list[Launch]:
    """The shipped entry, then what else may be faster and fits into shared memory."""
    found = dict.fromkeys([setting.shipped(kernel)])
    found |= dict.fromkeys(x for x in _proposed(kernel, setting) if fits(kernel, x, setting))
    return list(found)


def _proposed(kernel: str, setting: Setting) -> Iterator[Launch]:
    if setting.arch == "interpret":
        yield from (Launch(*tile) for tile in _INTERPRET)
        return
    if setting.element_bits == 32:
        for m, n, *rest in _FP32:
            # Of dweight, m is the vocabulary: a block of it.
            yield Launch(*((n, m) if kernel == "certified_dweight" else (m, n)), *rest)
        return
    tiles = (_FEW | (_WGMMA if _has_wgmma(setting) else _MMA))[_family(kernel)]
    yield from (Launch(*tile) for tile in tiles)


def _family(kernel: str) -> str:
    if kernel.endswith("_small"):
        return "small"
    return "fwd" if kernel == "bwd_dz" else kernel


def fits(kernel: str, entry: Launch, setting: Setting) -> bool:
    """Whether the tiles in flight fit into shared memory, as triton's pipeliner allots them, or nearly so."""
    if setting.arch == "interpret":
        return True
    buffers = entry.num_stages
    if kernel == "certified_dweight":  # the other half of the stages is the gathered index's
        buffers = (buffers + 1) // 2
    elif not _has_wgmma(setting):  # mma.sync has the tile in use in registers
        buffers = max(buffers - 1, 1)
    tile = (entry.block_m + entry.block_n) * entry.block_k * setting.element_bits // 8
    limit = _SHARED_KIB.get(setting.arch, _SHARED_KIB_FROM_HOPPER_ON)
    return buffers * tile <= 1024 * limit


def _has_wgmma(setting: Setting) -> bool:
    return int(setting.arch.removeprefix("sm_")) in range(90, 120)


@contextlib.contextmanager
def installed(setting: Setting, kernel: str, entry: Launch) -> Iterator[None]:
    """This entry in the place of the shipped one."""
    shipped = setting.shipped(kernel)
    _install(setting, {kernel: entry})
    try:
        yield
    finally:
        _install(setting, {kernel: shipped})


def _install(setting: Setting, entries: Mapping[str, Launch]) -> None:
    if setting.arch == "interpret":
        # The interpreter, which shows the sweep itself on a CPU, has a table outside of the one for GPUs.
        table._INTERPRET.update(entries)
    else:
        replace_entries(setting.arch, setting.element_bits, entries)


def load_table(path: Path) -> None:
    """Take the entries of a tuning run, or those in a report of `gpu.py`, instead of the shipped ones.

    Raises ValueError where they are for another architecture than the present device's.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    found = found.get("tuning", found)
    present = triton_launch.arch_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if found["arch"] != present:
        raise ValueError(f"{path} has launch entries for {found['arch']}; the device here is {present}")
    entries = {kernel: Launch(**fields) for kernel, fields in found["entries"].items()}
    replace_entries(present, found["element_bits"], entries)


# Kernels, where their launchers look them up.


@contextlib.contextmanager
def wrapped_kernels(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Every kernel of the operator, wrapped."""
    before = [
        (module, name, value)
        for module in (forward_and_exact, certified)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    ]
    try:
        for module, name, value in before:
            setattr(module, name, wrap(value))
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _Watched:
    """A kernel that is launched as ever, and whose launches can be repeated."""

    def __init__(self, kernel: Any, wanted: str, launches: list[Callable[[], Any]]) -> None:
        self.kernel, self.launches = kernel, launches
        self.wanted = kernel.fn.__name__ == wanted

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.wanted:
                self.launches.append(lambda: self.kernel[grid](*args, **kwargs))
            return self.kernel[grid](*args, **kwargs)

        return run


class _LeftOut:
    """In the place of a kernel that is not to be compiled."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


# Compiling: without a GPU, on tensors without storage. The cache on disk knows no difference.


def compile_candidate(setting: Setting, kernel: str, entry: Launch) -> None:
    """Compile what a step would launch into triton's cache on disk; runs in another process."""
    compiled(setting, kernel, entry)


def compiled(setting: Setting, kernel: str, entry: Launch) -> list[CompiledLaunch]:
    """The launches of this kernel in a step, compiled with this entry."""
    tuned = TUNED[kernel]

    def step_without_storage() -> None:
        launch_head(
            setting.torch_dtype,
            tuned.softcap,
            hidden_size=setting.hidden,
            outputs=bool(tuned.outputs),
            n=tuned.tokens or setting.tokens,
            vocab_size=setting.vocab,
        )

    with (
        installed(setting, kernel, entry),
        wrapped_kernels(lambda x: x if x.fn.__name__ == tuned.name else _LeftOut()),
    ):
        return compiled_launches(setting.arch, step_without_storage)


def mute(*descriptors: int) -> None:
    """Triton prints the whole of a kernel that ptxas refuses."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)


# Measuring: in a process of its own, which answers one job after the other.


@dataclass(frozen=True)
class Measured:
    """What came of a candidate. `ms`: all launches of its kernel in one step."""

    kernel: str
    entry: Launch
    status: str  # "ok", "wrong", "failed", "hung" or "crashed"
    ms: float | None = None
    note: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        rest = {"ms": self.ms, "status": self.status, "note": self.note, "seconds": round(self.seconds, 2)}
        return {"kernel": self.kernel, **asdict(self.entry), **rest}


class Bench:
    """The step that every candidate is measured in, and what the shipped entries make of it."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, setting.device
        shape = Shape("tuned", setting.hidden, setting.vocab)
        recipe = Recipe(shape, setting.tokens, 4, setting.torch_dtype, self.device.type)
        recipe = calibrate(recipe, setting.sharpness)
        self.scale = recipe.scale
        batch, _ = recipe.batch()
        self.hidden, self.weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
        self.labels = batch.labels
        # As of a preference loss: chosen up, rejected down.
        self.g = torch.full((setting.tokens,), 0.01, device=self.device)
        self.g[: setting.tokens // 2] *= -1
        self.shipped_results: tuple[str, list[torch.Tensor]] | None = None

    def step(self, kernel: str) -> list[torch.Tensor]:
        """The log-probs, or the gradients of a step with a backward."""
        tuned = TUNED[kernel]
        rows = slice(tuned.tokens)
        with torch.set_grad_enabled(tuned.mode != "forward"):
            logps = linear_logps(
                self.hidden[rows],
                self.weight,
                self.labels[rows],
                softcap=tuned.softcap,
                outputs=tuned.outputs,
                backward="certified" if tuned.mode == "certified" else "exact",
                tau=TAU,
                backend="triton",
            ).logps
        if tuned.mode == "forward":
            return [logps]
        return list(torch.autograd.grad(logps, (self.hidden, self.weight), self.g[rows]))

    def launches(self, kernel: str, entry: Launch) -> tuple[list[torch.Tensor], list[Callable[[], Any]]]:
        """What a step with this entry gives, and the launches of its kernel."""
        launches: list[Callable[[], Any]] = []
        name = TUNED[kernel].name
        with installed(self.setting, kernel, entry), wrapped_kernels(lambda x: _Watched(x, name, launches)):
            results = self.step(kernel)
        self.wait()
        return results, launches

    def measure(self, kernel: str, entry: Launch) -> Measured:
        began = time.perf_counter()
        try:
            expected = self.expected(kernel)
            results, launches = self.launches(kernel, entry)
            if not launches:
                return Measured(kernel, entry, "failed", note=f"{TUNED[kernel].name} was not launched")
            error = max(map(excess, results, expected))
            again, _ = self.launches(kernel, entry)
            repeats = all(map(torch.equal, results, again))
            del results, again
            ms = self.time(launches)
            note = f"{len(launches)} launches" + _resources(launches[0]())
            if error > 1:
                note += f"; {error:.3g} times the difference that rounding may make"
            elif not repeats:
                note += "; differs from run to run"
            self.wait()
            status = "ok" if error <= 1 and repeats else "wrong"
            return Measured(kernel, entry, status, ms, note, time.perf_counter() - began)
        except Exception as error:  # whatever a candidate raises, the others are still to be measured
            note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            return Measured(kernel, entry, "failed", None, note, time.perf_counter() - began)

    def expected(self, kernel: str) -> list[torch.Tensor]:
        if self.shipped_results is None or self.shipped_results[0] != kernel:
            self.shipped_results = None  # before the next ones, which may be as large
            results, _ = self.launches(kernel, self.setting.shipped(kernel))
            self.shipped_results = kernel, results
        return self.shipped_results[1]

    def compare(self, kernel: str, entries: Sequence[Launch]) -> list[float] | str:
        """Milliseconds of each, measured in turns: a slow moment of the device meets them all. Or why not."""
        try:
            runs = [self.launches(kernel, entry)[1] for entry in entries]
            samples = [[self.time(launches, most=3) for launches in runs] for _ in range(5)]
        except Exception as error:  # together they may need more memory than one by one
            return f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return [statistics.median(times) for times in zip(*samples, strict=True)]

    def time(self, launches: list[Callable[[], Any]], most: int = 15) -> float:
        """Milliseconds of all these launches, one behind the other: the median of 3 to `most` runs."""
        first = self.time_once(launches)
        repeats = min(max(int(60 / max(first, 1e-3)), 3), most)
        return statistics.median(self.time_once(launches) for _ in range(repeats))

    def time_once(self, launches: list[Callable[[], Any]]) -> float:
        if self.device.type == "cpu":
            began = time.perf_counter()
            for launch in launches:
                launch()
            return 1e3 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device is busy while the host enqueues: what short launches cost the host is not their time.
        torch.cuda._sleep(LAUNCH_CYCLES * (1 + len(launches)))
        start.record()
        for launch in launches:
            launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def is_sound(self) -> bool:
        """After an illegal access every call raises: another process is to take over."""
        try:
            self.wait()
        except RuntimeError:
            return False
        return True

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def excess(result: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 difference relative to the expected, as a multiple of what another order of summation may change: of
    the whole, or of the block of rows where it is largest. Infinite where something is not a number."""
    rounding = max(torch.finfo(result.dtype).eps, 1e-4)
    difference, size = _block_norms(result - expected), _block_norms(expected)
    # Of blocks with next to nothing in them, the rounding of what was summed up is all there is.
    whole = torch.linalg.vector_norm(size)
    floor = 4 * rounding * whole / len(size) ** 0.5
    by_block = (difference / size.maximum(floor).clamp_min(1e-30)).amax() / BLOCK_SLACK
    of_whole = torch.linalg.vector_norm(difference) / whole.clamp_min(1e-30)
    found = torch.maximum(by_block, of_whole).item() / rounding
    return found if math.isfinite(found) else math.inf


def _block_norms(x: torch.Tensor) -> torch.Tensor:  # [R, ...] -> [R / BLOCK_ROWS]
    rows = torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1, dtype=torch.float64).square()
    return F.pad(rows, (0, -len(rows) % BLOCK_ROWS)).view(-1, BLOCK_ROWS).sum(1).sqrt()


def _resources(compiled: Any) -> str:
    names = ("n_regs", "n_spills")
    return "".join(f", {name} {getattr(compiled, name)}" for name in names if hasattr(compiled, name))


def serve(setting: Setting, connection: multiprocessing.connection.Connection) -> None:
    """Body of the measuring process: answers until it is sent None, or its CUDA context is lost."""
    mute(1)
    bench = Bench(setting)
    connection.send(bench.scale)
    sound = True
    while sound and (job := connection.recv()) is not None:
        kernel, entries = job
        if isinstance(entries, Launch):
            answer: Any = bench.measure(kernel, entries)
        else:
            answer = bench.compare(kernel, entries)
        sound = bench.is_sound()
        connection.send((answer, sound))


class Lost(Exception):
    """The measuring process gave no answer; the message says why."""


class Measurer:
    """The measuring process, started when it is needed and again when it is lost."""

    def __init__(
        self,
        setting: Setting,
        body: Callable[..., None] = serve,
        candidate_seconds: float = CANDIDATE_SECONDS,
    ) -> None:
        self.setting, self.body, self.candidate_seconds = setting, body, candidate_seconds
        self.context = multiprocessing.get_context("spawn")
        self.process: multiprocessing.process.BaseProcess | None = None
        self.starts = 0
        self.scale: float | None = None

    def measure(self, kernel: str, entry: Launch, until: float) -> Measured:
        began = time.monotonic()
        try:
            found = self.ask((kernel, entry), until)
            return found if self.process is not None else replace(found, status="crashed")
        except Lost as lost:
            status = "hung" if "no answer" in str(lost) else "crashed"
            return Measured(kernel, entry, status, note=str(lost), seconds=time.monotonic() - began)

    def ask(self, job: Any, until: float) -> Any:
        """The answer to a job. Raises Lost where the process died or took too long."""
        self.start(until)
        self.connection.send(job)
        answer, sound = self.receive(min(self.candidate_seconds, until - time.monotonic()))
        if not sound:
            self.stop()
        return answer

    def start(self, until: float) -> None:
        if self.process is not None and self.process.is_alive():
            return
        self.stop()
        if self.starts == MOST_STARTS:
            raise RuntimeError(f"the measuring process was lost {MOST_STARTS} times")
        self.starts += 1
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(target=self.body, args=(self.setting, theirs), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.scale = self.receive(min(START_SECONDS, until - time.monotonic()))
        except Lost as lost:
            raise RuntimeError(f"the measuring process did not come up: {lost}") from lost

    def receive(self, seconds: float) -> Any:
        try:
            if self.connection.poll(max(seconds, 0.0)):
                return self.connection.recv()
        except (EOFError, OSError):
            assert self.process is not None
            self.process.join(5)
            code = self.process.exitcode
            self.stop()
            raise Lost(f"took the measuring process with it (exit status {code})") from None
        self.stop()
        raise Lost(f"no answer in {seconds:.0f} s")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
            self.connection.close()
            self.process = None


Job = tuple[str, Launch]
# A job without a process is compiled where it is measured.
Compiling = Mapping[Job, AsyncResult]


@contextlib.contextmanager
def compiling(setting: Setting, jobs: Sequence[Job]) -> Iterator[Compiling]:
    """The candidates while other processes compile them, in this order. Never in threads: ast.parse of
    CPython 3.11 fails in two at once."""
    if setting.arch == "interpret":
        yield {}
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        # Forked from a process that has the imports done, which takes each of them seconds.
        context.set_forkserver_preload(["benchmarks.tune"])
    at_once = max(1, min(12, (os.cpu_count() or 1) - 2))
    with context.Pool(at_once, initializer=mute, initargs=(1, 2)) as pool:
        yield {job: pool.apply_async(compile_candidate, (setting, *job)) for job in jobs}


# The sweep.


@dataclass
class Sweep:
    """What has been found so far, and where it is written."""

    setting: Setting
    jobs: list[Job]
    path: Path | None
    measured: list[Measured] = dataclasses.field(default_factory=list)
    confirmed: dict[str, dict[Launch, float]] = dataclasses.field(default_factory=dict)
    scale: float | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, found: Measured) -> None:
        self.measured.append(found)
        self.write()

    def times(self, kernel: str) -> dict[Launch, float]:
        """Of the candidates that gave the right result, as last measured, the fastest first."""
        own = [x for x in self.measured if x.kernel == kernel and x.status == "ok" and x.ms is not None]
        found = self.confirmed.get(kernel) or {x.entry: x.ms for x in own}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def best(self, kernel: str) -> Launch | None:
        """The fastest candidate, or the shipped entry where none is clearly faster; None before any run."""
        times, shipped = self.times(kernel), self.setting.shipped(kernel)
        fastest = next(iter(times), None)
        if fastest is not None and shipped in times and times[fastest] > GAIN * times[shipped]:
            return shipped
        return fastest

    def as_json(self) -> dict[str, Any]:
        kernels = dict.fromkeys(kernel for kernel, _ in self.jobs)
        best = {kernel: entry for kernel in kernels if (entry := self.best(kernel)) is not None}
        return {
            "arch": self.setting.arch,
            "element_bits": self.setting.element_bits,
            "shape": {name: getattr(self.setting, name) for name in ("tokens", "hidden", "vocab", "dtype")},
            "input": {"kind": "LM-like", "entries": self.setting.sharpness, "scale": self.scale},
            "entries": {kernel: asdict(replace(entry, source="measured")) for kernel, entry in best.items()},
            "gains": {kernel: self.gain(kernel, entry) for kernel, entry in best.items()},
            "candidates": [found.as_json() for found in self.measured],
            "not_tried": len(self.jobs) - len(self.measured),
            "notes": self.notes,
        }

    def gain(self, kernel: str, entry: Launch) -> dict[str, Any]:
        times = self.times(kernel)
        shipped = times.get(self.setting.shipped(kernel))
        speedup = None if shipped is None else shipped / times[entry]
        shipped_entry = asdict(self.setting.shipped(kernel))
        return {"shipped": shipped_entry, "shipped_ms": shipped, "ms": times[entry], "speedup": speedup}

    def write(self) -> None:
        if self.path is not None:
            text = json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n"
            partial = self.path.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path)


def in_order(kernels: Sequence[str], setting: Setting) -> list[Job]:
    """Each kernel's likely candidates before the unlikely ones of any."""
    lists = {kernel: candidates(kernel, setting) for kernel in kernels}
    rounds = [slice(0, 5), slice(5, 10), slice(10, None)]
    return [(kernel, entry) for part in rounds for kernel in kernels for entry in lists[kernel][part]]


def run(sweep: Sweep, measurer: Measurer, under_way: Compiling, deadline: float) -> None:
    """Measure what there is time for, then the best of each kernel once more."""
    left = list(sweep.jobs)
    last = deadline - 0.12 * (deadline - time.monotonic())  # the rest is for `confirm`
    # A candidate that hangs in the compiler, or ended its process, is not waited for when others are through.
    ended = time.monotonic() + START_SECONDS
    try:
        while left and time.monotonic() < min(last, ended + CANDIDATE_SECONDS):
            ready = next((job for job in left if job not in under_way or under_way[job].ready()), None)
            if ready is None:
                time.sleep(0.1)
                continue
            left.remove(ready)
            # It may take what is left: cut at `last`, it would leave `confirm` without a process.
            sweep.add(measurer.measure(*ready, deadline))
            sweep.scale = measurer.scale
            ended = time.monotonic()
    except RuntimeError as error:
        sweep.notes.append(str(error))
    confirm(sweep, measurer, deadline)
    sweep.write()


def confirm(sweep: Sweep, measurer: Measurer, deadline: float) -> None:
    """Time the best few of each kernel against the shipped entry once more, in turns."""
    for kernel in dict.fromkeys(kernel for kernel, _ in sweep.jobs):
        shipped, times = sweep.setting.shipped(kernel), sweep.times(kernel)
        finalists = [entry for entry in list(times)[:FINALISTS] if entry != shipped]
        if shipped not in times or not finalists or time.monotonic() > deadline:
            continue
        try:
            again = measurer.ask((kernel, [shipped, *finalists]), deadline)
            if isinstance(again, str):
                raise Lost(again)
        except (Lost, RuntimeError) as error:
            sweep.notes.append(f"{kernel} was timed only once: {error}")
            continue
        sweep.confirmed[kernel] = dict(zip([shipped, *finalists], again, strict=True))


def print_entries(found: Mapping[str, Any]) -> None:
    """Lines for the launch table, each with what it gains over the shipped entry."""
    print(f"{found['arch']}, {found['element_bits']} bits; {found['not_tried']} candidates not tried")
    statuses = [row["status"] for row in found["candidates"]]
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)))
    for note in found["notes"]:
        print(note)
    for kernel, fields in found["entries"].items():
        gain = found["gains"][kernel]
        speedup = "" if gain["speedup"] is None else f", {gain['speedup']:.2f}x the shipped entry's speed"
        print(f'    "{kernel}": {as_python(fields)},  # {gain["ms"]:.3f} ms{speedup}')


def as_python(fields: Mapping[str, Any]) -> str:
    """`Launch(...)` as one would write it."""
    *numbers, source = fields.values()
    return f"Launch({', '.join(map(str, numbers))}, {source!r})"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="time for all (default: 90)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="written after every candidate")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    options = parse(argv)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device: nothing to tune", file=sys.stderr)
        return 2
    setting = Setting(triton_launch.arch_of(torch.device("cuda")), "bf16", 8192, 4096, 128256)
    found = tune(setting, list(TUNED), options.json, began + options.seconds)
    print_entries(found)
    return 0 if found["entries"] else 1


def tune(setting: Setting, kernels: Sequence[str], path: Path | None, deadline: float) -> dict[str, Any]:
    """The whole sweep over these kernels, as JSON; written to `path` after every candidate."""
    jobs = in_order(kernels, setting)
    sweep, measurer = Sweep(setting, jobs, path), Measurer(setting)
    try:
        with compiling(setting, jobs) as under_way:
            run(sweep, measurer, under_way, deadline)
    finally:
        measurer.stop()
    return sweep.as_json()


if __name__ == "__main__":
    sys.exit(main())
