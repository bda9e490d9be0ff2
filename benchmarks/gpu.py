"""`make gpu`: GPU tests, throughput benchmark, tuning sweep, and the benchmark of more sizes.

    python benchmarks/gpu.py --minutes 8 --out benchmarks/results

It runs with the active python, installs nothing and needs no network. Each step is a process with a time
limit; one that fails does not stop the others. <device>.json holds all results, and is written after each.
The exit status is 1 where a step failed, 2 without a CUDA device or a package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import parser_of

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("hypothesis", "numpy", "pandas", "psutil", "pytest", "tqdm", "triton")
GRACE_SECONDS = 15  # between interrupt and kill: pytest writes its report
LEAST_SECONDS = 15  # with less time left, no step starts
NO_TIME = "skipped: no time left"
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}  # by JUnit's name
SLOW_PEERS = ("torch", "torch-exact", "cce-compile", "torch-lce-rows")


class Step(NamedTuple):
    name: str
    seconds: float
    command: list[str]
    result: Path  # that the command writes: JUnit's XML, or JSON


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps (default: 8)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--commit", metavar="ID", help="of a tree that was copied without .git")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(2, f"make gpu needs a CUDA device; torch {torch.__version__} sees none\n")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        install = f"python -m pip install {' '.join(missing)}"
        parser.exit(2, f"make gpu needs {', '.join(missing)}: {install}\n")
    from benchmarks.report import environment, write_json

    deadline = time.monotonic() + 60 * options.minutes - GRACE_SECONDS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, on which a step is ended
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, in steps too
    about = environment("cuda")
    about["commit"] = about["commit"] or options.commit
    report = {"device": about["device"], "environment": about, "steps": [], "reports": {}}
    path = options.out / (re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-") + ".json")
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(Path(folder)):
            try:
                run_step(step, deadline, report)
            finally:
                write_json(report, path)
    print(f"\n{about['device']}, written to {path}")
    for step in report["steps"]:
        print(f"  {step['name']}: {step['status']}, {step['seconds']:.0f} s")
    return 1 if any(step["status"] not in ("ok", NO_TIME) for step in report["steps"]) else 0


def steps(folder: Path) -> Iterator[Step]:
    memory = torch.cuda.get_device_properties(0).total_memory
    # A test holds up to 15 GiB. Those of 2^31 elements hold more and run one at a time.
    processes = max(1, min(6, (os.cpu_count() or 1) // 2, memory // (20 * 2**30)))
    yield test_step(folder, "tests", 130, "not 2_to_the_31", processes)
    yield test_step(folder, "tests of 2^31 elements", 40, "2_to_the_31", 1)

    from benchmarks.peers import PEERS

    peers = [name for name in PEERS if name not in SLOW_PEERS]
    yield benchmark_step(folder, "shipped", 100, "--tokens", "8192", "--only", *peers)
    table = folder / "tuning.json"
    tune = [sys.executable, "benchmarks/tune.py", "--seconds", "80", "--json", str(table)]
    yield Step("tuning", 95, tune, table)
    peers.remove("compile")  # takes long for each size
    sizes = ["--tokens", "8192", "1024", "256", "--head", "full", "frozen"]
    yield benchmark_step(folder, "sizes", 100, *sizes, "--only", *peers)


def test_step(folder: Path, name: str, seconds: float, selected: str, processes: int) -> Step:
    """Tests with the mark `gpu`, in several processes and each with a time limit where plugins allow it."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    files = [str(path) for path in paths if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    result = folder / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={result}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(processes)]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=100", "--timeout-method=thread"]  # a signal would wait for what hangs in CUDA
    command += ["--continue-on-collection-errors", "-m", "gpu", "-k", selected, *files]
    return Step(name, seconds, command, result)


def benchmark_step(folder: Path, name: str, seconds: float, *options: str) -> Step:
    result = folder / f"{name}.json"
    usual = ["--shape", "llama3-8b", "--dtype", "bf16", "--sharpness", "50", "--json", str(result)]
    return Step(name, seconds, [sys.executable, "benchmarks/throughput.py", *usual, *options], result)


def run_step(step: Step, deadline: float, report: dict[str, Any]) -> None:
    """Run it within its time and the time left; outcome and result go into the report.

    When its time is up, it is interrupted, then killed with all that it started.
    """
    began = time.monotonic()
    seconds = min(step.seconds, deadline - began)
    outcome = {"name": step.name, "status": NO_TIME, "seconds": 0.0}
    report["steps"].append(outcome)
    if seconds < LEAST_SECONDS:
        return
    print(f"\n{step.name}: {shlex.join(step.command)}", flush=True)
    outcome["status"] = "failed: make gpu was ended"
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    process = subprocess.Popen(step.command, cwd=ROOT, env=env, start_new_session=True)
    try:
        code = process.wait(seconds)
        outcome["status"] = f"failed with exit status {code}" if code else "ok"
    except subprocess.TimeoutExpired:
        outcome["status"] = f"cut after {seconds:.0f} s"
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        outcome["seconds"] = round(time.monotonic() - began, 1)
        try:
            collect(step, report)
        except Exception as error:  # the next step is to have its turn whatever this one left
            outcome["status"] = f"failed: no result ({type(error).__name__}), {outcome['status']}"


def collect(step: Step, report: dict[str, Any]) -> None:
    """Take over the result of a step, also of one that was cut."""
    if step.result.suffix == ".json":
        result = json.loads(step.result.read_text(encoding="utf-8"))
        if step.name == "tuning":
            report["tuning"] = result
        else:
            report["reports"][step.name] = result | {"commit": report["environment"]["commit"]}
        return
    tests = report.setdefault("gpu_tests", {"passed": 0, "failed": {}, "skipped": {}})
    for case in ElementTree.parse(step.result).iter("testcase"):
        if "name" not in case.attrib:  # the test was interrupted
            continue
        found = next((child for child in case if child.tag in OUTCOMES), None)
        if found is None:
            tests["passed"] += 1
        else:
            name = f"{case.get('classname')}::{case.get('name')}"
            tests[OUTCOMES[found.tag]][name] = found.get("message", "")[:600]


if __name__ == "__main__":
    sys.exit(main())
