"""`make gpu`: the tests that need a GPU, the launch table tuned for it, and the throughput benchmark.

    python benchmarks/gpu.py                # 8 minutes, into benchmarks/results/<device>.json
    python benchmarks/gpu.py --minutes 4 --out somewhere

With whatever python is active: nothing is installed, and no network is needed. Every step is a process (the
tests are several) with a time limit of its own; one that fails or takes too long is recorded with the end of
its output, and the next goes on. What has been found is in <device>.partial.json after every step; in the end
it takes the place of <device>.json, unless nothing was compared. The exit status is 1 where a step or a test
failed, 2 where there is no CUDA device or no way to write.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.targets import MIB, TARGETS, Target

ROOT = Path(__file__).resolve().parents[1]
TAIL = 4000  # characters of a step's output that are kept
NO_TIME = "skipped: no time left"
LEAST_SECONDS = 15.0  # with less time left than this, a step is not begun
CLEAN_UP_SECONDS = 5.0  # for a process that is told to end, before it is killed
TESTS = ("tests/test_benchmark_runs.py", "tests/test_gpu.py")  # those that take longest first
SHAPES = ("gemma2-9b", "qwen2.5-7b", "mistral-7b")
# Peers that take long, to compile or to run, and are nobody's first choice: in a step of their own.
SLOW_PEERS = ("torch", "torch-exact", "cce-compile", "torch-lce-rows")
# Takes long to compile too, but is the strongest where nothing but PyTorch is installed: in the first step.
COMPILED_PEER = "compile"


@dataclass
class Step:
    """Commands that run side by side, and what they leave behind."""

    name: str
    commands: list[list[str]]
    seconds: float
    # Takes the outcome into the report, whether the step succeeded or not; what it returns is what is wrong.
    collect: Callable[[dict[str, Any]], str] = lambda report: ""


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    began = time.monotonic()
    # Told to end, it takes its steps along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    device, seen = cuda_device()
    if device is None:
        print(f"make gpu needs a CUDA device: {seen}", file=sys.stderr)
        return 2
    from benchmarks.report import environment

    about = environment("cuda") | {"seen": seen}
    about["commit"] = about["commit"] or options.commit
    report: dict[str, Any] = {"device": device, "environment": about, "steps": []}
    path = options.out / f"{slug(device)}.json"
    partial = path.with_suffix(".partial.json")
    try:
        write(report, partial)
    except OSError as error:
        print(f"--out {options.out}: cannot be written to: {error}", file=sys.stderr)
        return 2
    print(f"{device}; {seen}; {options.minutes:g} minutes; into {path}", flush=True)
    with tempfile.TemporaryDirectory(prefix="focalkern-gpu-") as folder:
        run_steps(steps(Path(folder), memory_gib()), report, partial, began + 60 * options.minutes)
    written = settle(report, partial, path)
    try:
        print("\n".join(["", *summary(report)]))
    except (KeyError, TypeError, ValueError, IndexError):
        traceback.print_exc()  # a report of another form is in the file all the same
    print(f"written to {written}, {time.monotonic() - began:.0f} s")
    return exit_status(report)


def exit_status(report: dict[str, Any]) -> int:
    """A step that there was no time for is no failure."""
    fine = ("ok", NO_TIME)
    return 1 if any(step["status"] not in fine for step in report["steps"]) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: 8)")
    default = ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help=f"default: {default}")
    parser.add_argument(
        "--commit", metavar="ID", help="of a tree that was copied without .git; what git knows comes first"
    )
    return parser.parse_args(argv)


def cuda_device() -> tuple[str | None, str]:
    """The name of the CUDA device, None without one; and what was seen."""
    try:
        import torch
    except ImportError as error:
        return None, f"torch cannot be imported ({error})"
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    seen = f"torch {torch.__version__}, {build}"
    try:
        import triton

        seen += f", triton {triton.__version__}"
    except ImportError as error:
        seen += f", no triton ({error})"
    if not torch.cuda.is_available():
        return None, f"{seen}, sees none"
    return torch.cuda.get_device_name(), seen


def memory_gib() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# The steps.


def steps(folder: Path, gpu_gib: float) -> Iterator[Step]:
    """The most telling first; each is made when the one before it has ended."""
    yield test_step(folder, test_processes(os.cpu_count() or 1, gpu_gib))
    fast = [name for name in peers() if name not in (*SLOW_PEERS, COMPILED_PEER)]
    usual = ["--tokens", "8192", "--sharpness", "50"]
    llama = ["--shape", "llama3-8b"]
    best_of = ["--repeats", "10", "--only", *fast]
    few = ["--repeats", "5", "--only", *fast]
    yield throughput_step("shipped", folder, [*llama, *usual, *best_of, COMPILED_PEER], 90)

    table, seconds = folder / "launch-table.json", 90
    tune = [script("tune.py"), "--seconds", str(seconds), "--json", str(table)]
    yield Step("tuning", [python(*tune)], seconds + 15, lambda report: collect_json(report, "tuning", table))

    tuned = ["--launch-table", str(table)] if has_entries(table) else []
    if tuned:
        yield throughput_step("tuned", folder, [*llama, *usual, *best_of, *tuned], 50)
    inputs = ["--tokens", "8192", "--sharpness", "16", "200", "flat"]
    yield throughput_step("sharpness", folder, [*llama, *inputs, *few, *tuned], 50)
    small = ["--tokens", "256", "512", "1024", "--sharpness", "50"]
    yield throughput_step("small batches", folder, [*llama, *small, *few, *tuned], 40)
    # As for LoRA, up to batches whose logits no GPU holds.
    frozen = ["--head", "frozen", "--tokens", "1024", "16384", "65536", "--sharpness", "50"]
    yield throughput_step("frozen head", folder, [*llama, *frozen, *few, *tuned], 60)
    for shape in SHAPES:
        yield throughput_step(shape, folder, ["--shape", shape, *usual, *few, *tuned], 30)
    slow = ["--repeats", "5", "--only", "triton", *SLOW_PEERS]
    yield throughput_step("slow peers", folder, [*llama, *usual, *slow, *tuned], 60)


def has_entries(table: Path) -> bool:
    try:
        return bool(json.loads(table.read_text(encoding="utf-8"))["entries"])
    except (OSError, ValueError, KeyError):
        return False


def script(name: str) -> str:
    return str(ROOT / "benchmarks" / name)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def peers() -> list[str]:
    from benchmarks.peers import all_peers

    return list(all_peers())


def throughput_step(name: str, folder: Path, arguments: Sequence[str], seconds: float) -> Step:
    path = folder / f"{slug(name)}.json"
    run = ["--device", "cuda", "--dtype", "bf16", "--json", str(path)]
    command = python(script("throughput.py"), *arguments, *run)
    return Step(name, [command], seconds, lambda report: collect_throughput(report, name, path))


def collect_throughput(report: dict[str, Any], name: str, path: Path) -> str:
    reports = report.setdefault("reports", {})
    wrong = collect_json(reports, name, path)
    if not wrong:
        reports[name]["commit"] = reports[name]["commit"] or report["environment"]["commit"]
    return wrong


def collect_json(into: dict[str, Any], key: str, path: Path) -> str:
    """What a step wrote, under its name; a step that was cut may have left something to take."""
    try:
        into[key] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"left no result ({type(error).__name__})"
    return ""


# The tests: a process for every few, since most of their time is one compilation after the other.


def test_processes(cpus: int, gpu_gib: float) -> int:
    """As many as there are cores for, and memory: but for the huge ones, a test takes up to 15 GiB."""
    return max(1, min(6, cpus // 2, int(gpu_gib / 20)))


def test_step(folder: Path, processes: int) -> Step:
    logs = [folder / f"tests-{i}.jsonl" for i in range(processes)]
    # A file that cannot be imported leaves the other's tests alone.
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    commands = [pytest_command(log, i, processes, [*options, *TESTS]) for i, log in enumerate(logs)]
    return Step("gpu tests", commands, 150, lambda report: collect_tests(report, logs))


def pytest_command(log: Path, index: int, of: int, arguments: Sequence[str]) -> list[str]:
    code = "import sys, pytest; from benchmarks.gpu import TestShare; " + (
        "sys.exit(pytest.main(sys.argv[4:], plugins=[TestShare(*sys.argv[1:4])]))"
    )
    return python("-c", code, str(log), str(index), str(of), *arguments)


class TestShare:
    """Pytest plugin: runs every n-th test, and writes the outcome of each down as soon as it is known."""

    __test__ = False

    def __init__(self, log: str, index: str, of: str) -> None:
        self.log, self.index, self.of = Path(log), int(index), int(of)
        self.log.write_text("", encoding="utf-8")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        # Tensors of 2^31 elements: one test at a time, and before what may use up the time.
        huge = [item for item in items if "2_to_the_31" in item.name]
        others = [item for item in items if item not in huge]
        items[:] = (huge if self.index == self.of - 1 else []) + others[self.index :: self.of]

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            self.write({"name": test_name(item.nodeid), "outcome": "collected"})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write({"name": test_name(nodeid), "outcome": "begun"})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            found = {"name": test_name(report.nodeid), "outcome": report.outcome}
            found |= {"message": first_lines(report), "seconds": round(report.duration, 2)}
            self.write(found)

    def write(self, found: dict[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


def test_name(nodeid: str) -> str:
    return nodeid.removeprefix("tests/")


def first_lines(report: Any) -> str:
    """What a test failed with, or why it was skipped."""
    if report.outcome == "passed":
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return "\n".join(text.splitlines()[:4])[:600]


def collect_tests(report: dict[str, Any], logs: Sequence[Path]) -> str:
    """Outcomes of all tests. One that was begun and has none took its process down, or too long; those that
    were to follow it were not begun."""
    outcomes: dict[str, dict[str, Any]] = {}
    for log in logs:
        for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
            found = json.loads(line)
            outcomes[found.pop("name")] = found
    by_outcome: dict[str, list[str]] = {}
    for name, found in outcomes.items():
        by_outcome.setdefault(found["outcome"], []).append(name)
    tests = {
        "passed": len(by_outcome.get("passed", [])),
        "failed": {name: outcomes[name]["message"] for name in by_outcome.get("failed", [])},
        "skipped": {name: outcomes[name]["message"] for name in by_outcome.get("skipped", [])},
        "unfinished": by_outcome.get("begun", []),
        "not begun": by_outcome.get("collected", []),
        "seconds": {name: found["seconds"] for name, found in outcomes.items() if "seconds" in found},
    }
    report["gpu_tests"] = tests
    wrong = [f"{len(tests[kind])} {kind}" for kind in ("failed", "unfinished", "not begun") if tests[kind]]
    return ", ".join(wrong) if wrong or tests["passed"] else "no test passed"


# Running them.


def run_steps(steps: Iterator[Step], report: dict[str, Any], path: Path, deadline: float) -> None:
    """One after the other until the deadline, and the report to `path` after each."""
    report["steps"] = []
    try:
        for step in steps:
            print(f"{step.name} ...", flush=True)
            found = run_step(step, deadline, report)
            report["steps"].append(found)
            if found["status"] != "ok" and found["tail"]:
                print(found["tail"], flush=True)
            print(f"{step.name}: {found['status']}, {found['seconds']} s", flush=True)
            write(report, path)
    except Exception as error:  # what was measured is to be seen even if the next step cannot be made
        status = f"failed: {type(error).__name__}: {error}"
        report["steps"].append({"name": "the next step", "status": status, "seconds": 0.0, "tail": ""})
    write(report, path)


def run_step(step: Step, deadline: float, report: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    seconds = min(step.seconds, deadline - CLEAN_UP_SECONDS - began)
    if seconds < min(LEAST_SECONDS, step.seconds):
        return {"name": step.name, "status": NO_TIME, "seconds": 0.0, "tail": ""}
    try:
        status, tail = run_commands(step.commands, seconds)
        wrong = step.collect(report)
        if wrong:
            cut = f", {status}" if status.startswith("cut") else ""
            status = f"{status if status.startswith('failed') else f'failed{cut}'}: {wrong}"
    except Exception as error:  # the next step is to have its turn whatever happened to this one
        status, tail = f"failed: {type(error).__name__}: {error}", ""
    return {"name": step.name, "status": status, "seconds": round(time.monotonic() - began, 1), "tail": tail}


def run_commands(commands: Sequence[Sequence[str]], seconds: float) -> tuple[str, str]:
    """Run them side by side for at most so long; how it went, and the end of what they said."""
    until = time.monotonic() + seconds
    environment = environment_of_steps()
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        stack.callback(end, processes)
        for command, output in zip(commands, outputs, strict=True):
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            processes.append(process)
        late = [not ended(process, until) for process in processes]
        end(processes)
        said = "\n".join(tail(output, TAIL // len(commands)) for output in outputs)
    if any(late):
        return f"cut after {seconds:.0f} s", said
    codes = sorted({process.returncode for process in processes} - {0})
    return (f"failed with exit status {', '.join(map(str, codes))}" if codes else "ok"), said


def environment_of_steps() -> dict[str, str]:
    """focalkern need not be installed. Triton keeps what it compiles in the home directory, if it may."""
    changed = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    if "TRITON_CACHE_DIR" not in os.environ and not os.access(Path.home(), os.W_OK):
        changed["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "focalkern-triton")
    return os.environ | changed


def ended(process: subprocess.Popen[bytes], until: float) -> bool:
    try:
        process.wait(max(until - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return False
    return True


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Every process with all that it started: first asked to, then killed."""
    until = time.monotonic() + CLEAN_UP_SECONDS
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            # The group may outlive the process that leads it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal_number)
        for process in processes:
            ended(process, until)
        until += CLEAN_UP_SECONDS


def tail(output: Any, characters: int) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")[-characters:]


def write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    text = without_paths(json.dumps(report, indent=2, allow_nan=False))
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def settle(report: dict[str, Any], partial: Path, path: Path) -> Path:
    """Where the report is: in the place of an earlier one's only if there is something to compare in it."""
    if not any(found["comparisons"] for found in report.get("reports", {}).values()):
        return partial
    return partial.replace(path)


def without_paths(text: str) -> str:
    """The file is to be published; where things lie on this machine is nobody's business."""
    places = {str(ROOT): ".", sys.prefix: "python", tempfile.gettempdir(): "tmp", str(Path.home()): "~"}
    for place, name in places.items():
        if len(place) > 1:
            text = text.replace(json.dumps(place)[1:-1], name)
    return text


# The summary.


OURS, EXACT = "triton", "triton-exact"
TABLES = ("shipped", "tuned")  # steps by the launch table that they ran with


def timed(comparison: dict[str, Any], peer: str, part: str) -> float | None:
    """Median milliseconds of a peer, by the name that `throughput.py --only` takes."""
    row = next((row for row in comparison["rows"] if row["id"] == peer), {})
    return row[part]["median"] if part in row else None


def target_lines(reports: dict[str, Any]) -> list[str]:
    """The verdict on every target of this device, of each launch table that was measured."""
    measured = {name: reports[name] for name in TABLES if name in reports}
    return [
        f"{target.what}: {target.bound}: "
        + ", ".join(f"{name} {verdict(target, report)}" for name, report in measured.items())
        for target in TARGETS
        if any(target.is_for(report["device"], report["device_type"]) for report in measured.values())
    ]


def verdict(target: Target, report: dict[str, Any]) -> str:
    values = [target.value(report, comparison) for comparison in report["comparisons"]]
    value = next((value for value in values if value is not None), None)
    if value is None:
        return "not measured"
    return f"{value:.3g}{target.unit} {'met' if target.is_met(value) else 'MISSED'}"


def summary(report: dict[str, Any], most_lines: int = 48) -> list[str]:
    """The few lines that one wants to see."""
    lines = [*test_lines(report), *step_lines(report)]
    reports = report.get("reports", {})
    lines += target_lines(reports)
    name = next((name for name in reversed(TABLES) if reports.get(name, {}).get("comparisons")), None)
    main = reports.get(name)
    if main is not None:
        comparison = main["comparisons"][0]
        lines += [f"{name}: {heading(comparison)}", *map(peer_line, comparison["rows"])]
    lines += tuning_lines(report.get("tuning"))
    for other, found in reports.items():
        if found is not main:
            lines += [f"{other}: {short_line(comparison)}" for comparison in found["comparisons"]]
    return lines[:most_lines]


def test_lines(report: dict[str, Any]) -> list[str]:
    tests = report.get("gpu_tests")
    if tests is None:
        return ["gpu tests: no result"]
    kinds = ("failed", "skipped", "unfinished", "not begun")
    counts = [f"{len(tests[kind])} {kind}" for kind in kinds]
    names = [*tests["failed"], *tests["unfinished"], *tests["not begun"]]
    lines = [f"gpu tests: {tests['passed']} passed, {', '.join(counts)}", *(f"  {x}" for x in names[:6])]
    return lines + ([f"  and {len(names) - 6} more"] if len(names) > 6 else [])


def step_lines(report: dict[str, Any]) -> list[str]:
    wrong = [step for step in report["steps"] if step["status"] != "ok"]
    return [f"step {step['name']}: {step['status']}" for step in wrong]


def heading(comparison: dict[str, Any]) -> str:
    shape, gemm = comparison["shape"]["name"], comparison["bare_gemm_ms"]["median"]
    entries = comparison["input"]["entries"]
    return f"{shape}, {comparison['tokens']} tokens, {entries:.0f} entries; bare GEMM {gemm:.3g} ms"


def peer_line(row: dict[str, Any]) -> str:
    if "both_ms" not in row:
        return f"  {row['peer']:28s} {row['status']}: {row['note']}"[:110]
    forward, both = (row[part]["median"] for part in ("forward_ms", "both_ms"))
    line = f"  {row['peer']:28s} forward {forward:.4g}, both {both:.4g} ms, {row['x_floor']:.2f}x GEMM"
    if "extra_bytes" in row:
        line += f", {row['extra_bytes'] / MIB:.0f} MiB"
    if row.get("kept_share") is not None:
        line += f", kept {row['kept_share']:.1%}"
    error = row.get("errors", {}).get("dhidden")
    return f"{line}, dhidden {error:.0e}" if isinstance(error, float) else line


def short_line(comparison: dict[str, Any]) -> str:
    """Our two backwards and the fastest of the others."""
    parts = [heading(comparison)]
    for name, peer in (("certified", OURS), ("exact", EXACT)):
        both = timed(comparison, peer, "both_ms")
        parts.append(f"{name} {both:.4g}" if both is not None else f"{name} not timed")
    others = {
        row["peer"]: row["both_ms"]["median"]
        for row in comparison["rows"]
        if "both_ms" in row and not row["peer"].startswith("focalkern")
    }
    if others:
        best = min(others, key=others.__getitem__)
        parts.append(f"{best} {others[best]:.4g}")
    return ", ".join(parts)


def tuning_lines(tuning: dict[str, Any] | None) -> list[str]:
    if tuning is None:
        return []
    tried, missed = len(tuning["candidates"]), tuning["not_tried"]
    lines = [f"tuning: {tried} candidates tried, {missed} not"]
    same = []
    for kernel, entry in tuning["entries"].items():
        gain = tuning["gains"][kernel]
        if gain["speedup"] is None or gain["speedup"] > 1:
            size = "x".join(str(entry[name]) for name in ("block_m", "block_n", "block_k"))
            shape = f"{size}, {entry['num_warps']} warps, {entry['num_stages']} stages"
            faster = "" if gain["speedup"] is None else f", {gain['speedup']:.2f}x the shipped entry"
            lines.append(f"  {kernel}: {shape}: {gain['ms']:.3g} ms{faster}")
        else:
            same.append(f"{kernel} {gain['ms']:.3g} ms")
    return lines + ([f"  as shipped: {', '.join(same)}"] if same else [])


if __name__ == "__main__":
    sys.exit(main())
