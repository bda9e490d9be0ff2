"""`make gpu` gets through whatever happens to a step; the tuning sweep picks what is right and fastest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton", reason="no triton on this platform: nothing to tune")
if INTERPRETED:
    pytest.skip("kernels are decorated for the interpreter in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_compile import SHARED_LIMIT

from benchmarks import gpu, throughput, tune
from benchmarks.gpu import Step
from benchmarks.report import ROOT
from benchmarks.tune import Setting
from csrc_triton.launch import LAUNCH_TABLE

HOPPER = Setting("sm_90", SHARED_LIMIT["sm_90"])


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_script(*command: str, **variables: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


# The steps of `make gpu`


@pytest.fixture
def make_gpu(tmp_path, monkeypatch):
    """`gpu.main` on a machine that passes for one with a GPU, with other steps; its status and its report."""
    about = {"device": "NVIDIA H200", "commit": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.report.environment", lambda device_type: dict(about))
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)
    path = tmp_path / "out" / "nvidia-h200.json"

    def run(*steps: Step, arguments: tuple[str, ...] = ()) -> tuple[int, dict]:
        monkeypatch.setattr(gpu, "steps", lambda folder: iter(steps))
        status = gpu.main(["--out", str(path.parent), *arguments])
        return status, json.loads(path.read_text())

    yield run
    signal.signal(signal.SIGTERM, before)


def test_what_is_missing_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", ("pytest", "no_such_package"))
    for is_available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_available: found)
        assert gpu.main([]) == 2
    assert tune.main(["--json", "table.json"]) == 2
    package, device, of_tune = capsys.readouterr().err.splitlines()
    assert package == "make gpu needs no_such_package: python -m pip install no_such_package"
    assert "needs a CUDA device" in device and "needs a CUDA device" in of_tune


def test_steps_that_fail_or_hang_are_recorded_and_the_next_goes_on(tmp_path, make_gpu):
    seen, pid, result = (tmp_path / name for name in ("seen.json", "pid", "result.json"))
    good = f"open({str(result)!r}, 'w').write('{{\"comparisons\": []}}')"
    look = f"import shutil; shutil.copy({str(tmp_path / 'out' / 'nvidia-h200.json')!r}, {str(seen)!r})"
    hang = (  # deaf to the interrupt, and with a process of its own
        "import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open({str(pid)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid)); time.sleep(60)"
    )
    status, report = make_gpu(
        Step("good", 20, python(good), result),
        Step("bad", 20, python(f"{look}; raise SystemExit(3)"), result),
        Step("hanging", 8, python(hang), result),
        Step("killed", 20, python("import os; os.kill(os.getpid(), 9)"), tmp_path / "none.json"),
        Step("tuning", 20, python(""), result),
        arguments=("--commit", "abc"),
    )
    assert status == 1
    assert {step["name"]: step["status"] for step in report["steps"]} == {
        "good": "ok",
        "bad": "failed with exit status 3",
        "hanging": "cut after 8 s",
        "killed": "failed: no result (FileNotFoundError), failed with exit status -9",
        "tuning": "ok",
    }
    ends_by = time.monotonic() + 20  # on a busy machine a killed process goes later
    while is_alive(int(pid.read_text())) and time.monotonic() < ends_by:
        time.sleep(0.05)
    assert not is_alive(int(pid.read_text()))
    assert [step["name"] for step in json.loads(seen.read_text())["steps"]] == ["good"]
    assert report["reports"]["hanging"] == {"comparisons": [], "commit": "abc"}
    assert report["tuning"] == {"comparisons": []}


def test_a_step_is_cut_at_the_deadline_and_none_starts_after_it(tmp_path, make_gpu):
    result = tmp_path / "result.json"
    result.write_text("{}")
    steps = [Step(name, 30, python("import time; time.sleep(30)"), result) for name in ("first", "second")]
    status, report = make_gpu(*steps, arguments=("--minutes", str(4 / 60)))
    assert status == 1
    assert [step["status"] for step in report["steps"]] == ["cut after 3 s", gpu.NO_TIME]
    assert make_gpu(steps[1], arguments=("--minutes", "0"))[0] == 0


def test_a_run_that_is_terminated_takes_its_step_along_and_writes_its_report(tmp_path, make_gpu):
    pid = tmp_path / "pid"
    terminate = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); os.kill(os.getppid(), 15)"
    with pytest.raises(SystemExit):
        make_gpu(Step("long", 60, python(f"{terminate}; time.sleep(60)"), tmp_path / "none.json"))
    assert not is_alive(int(pid.read_text()))
    (step,) = json.loads((tmp_path / "out" / "nvidia-h200.json").read_text())["steps"]
    assert "make gpu was ended" in step["status"]


def test_outcomes_of_tests_are_collected_also_after_a_crash_and_an_interrupt(tmp_path, monkeypatch, make_gpu):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import os, pytest, time\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'the reason'\n"
        "@pytest.mark.skip(reason='not today')\n"
        "def test_skipped(): pass\n"
        "def test_fatal(): os._exit(9)\n"
        "def test_of_2_to_the_31_elements(): pass\n"
        "def test_interrupted(): time.sleep(1); os.kill(os.getppid(), 2); time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    selected = gpu.test_step(tmp_path, "tests", 300, "not 2_to_the_31", 1)
    huge = gpu.test_step(tmp_path, "huge", 300, "2_to_the_31", 1)
    status, report = make_gpu(selected, huge)
    assert status == 1
    assert [step["status"] for step in report["steps"]] == ["failed with exit status 2", "ok"]
    tests = report["gpu_tests"]
    assert tests["passed"] == 2
    assert "the reason" in tests["failed"]["tests.test_some::test_wrong"]
    assert "not today" in tests["skipped"]["tests.test_some::test_skipped"]
    assert any("test_fatal" in name and "crashed" in message for name, message in tests["failed"].items())


def test_every_step_calls_a_program_with_options_that_it_has(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        card = SimpleNamespace(total_memory=140 * 2**30)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        steps = list(gpu.steps(tmp_path))
        tests, _, shipped, tuning, sizes = steps
        for step in (shipped, sizes):
            options = throughput.parse(step.command[2:])
            assert (options.device, options.json) == ("cuda", step.result)
    assert sum(step.seconds for step in steps) <= 60 * 8 - 15
    assert tune.main(tuning.command[2:]) == 2  # it has the options, and asks for a GPU
    assert "2_to_the_31" in (ROOT / "tests" / "test_gpu.py").read_text()
    done = run_script(*tests.command, "--collect-only")
    assert done.returncode == 0 and "test_gpu.py" in done.stdout, done.stdout


# The sweep


@pytest.mark.parametrize("arch", sorted(LAUNCH_TABLE))
def test_candidates_begin_with_the_shipped_entry_and_the_nearest_compiles(arch):
    setting = Setting(arch, SHARED_LIMIT[arch])
    jobs = tune.in_order(setting)
    assert jobs[:10] == [(name, setting.shipped(name)) for name in tune.TUNED]
    assert [name for name, _ in jobs[10:20]] == list(tune.TUNED) and len(jobs) == len(set(jobs)) > 100
    assert all(tune.fits(entry, setting) for _, entry in jobs)
    assert arch not in ("sm_80", "sm_90") or tune.compile_candidate(setting, jobs[10]) == (jobs[10], "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_agree_within_rounding_and_a_lost_tile_shows_where_all_is_small(dtype):
    expected = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected[:10] *= 2**-12
    assert tune.agree(expected * (1 + torch.finfo(dtype).eps / 2), expected)
    for changed in (0.0, torch.nan, torch.inf):
        found = expected.clone()
        found[5, :16] = changed
        assert not tune.agree(found, expected)


RIGHT = torch.ones(8, 64, dtype=torch.bfloat16)
OTHER = RIGHT.clone()
OTHER[5, 5] += 0.0078125  # agrees, and is not the same
ILLEGAL = RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([RIGHT, RIGHT, RIGHT.clone()], "ok"),
        ([RIGHT, 0 * RIGHT, 0 * RIGHT], "wrong"),
        ([RIGHT, OTHER, RIGHT], "wrong"),
        ([RIGHT, RuntimeError("out of resources")], "failed"),
        ([RIGHT, ILLEGAL], "lost"),
    ],
)
def test_a_candidate_that_is_wrong_or_differs_from_run_to_run_is_refused(results, status, monkeypatch):
    left = iter(results)

    def launched(setting, name, entry):
        result = next(left)
        if isinstance(result, Exception):
            raise result
        return [result], [lambda: None]

    def synchronize() -> None:
        if results[-1] is ILLEGAL:
            raise ILLEGAL

    monkeypatch.setattr(tune, "launched", launched)
    monkeypatch.setattr(tune, "milliseconds", lambda launches: 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert tune.measure(HOPPER, "fwd", HOPPER.shipped("fwd"))["status"] == status


FAKE = """
import os, time
def measure(setting, name, entry):
    if entry.num_stages == 6:
        time.sleep(60)
    if entry.num_stages == 7:
        os._exit(7)
    status = "lost" if entry.num_stages == 9 else "ok"
    return {"status": status, "ms": float(entry.num_stages), "pid": os.getpid()}
"""


def test_a_candidate_that_hangs_or_dies_costs_no_more_than_itself(tmp_path, monkeypatch):
    (tmp_path / "fake_measurer.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    import fake_measurer

    monkeypatch.setattr(tune, "measure", fake_measurer.measure)
    monkeypatch.setattr(tune, "CANDIDATE_SECONDS", 2)
    measurer = tune.Measurer()
    entries = [replace(HOPPER.shipped("fwd"), num_stages=stages) for stages in (4, 6, 3, 7, 9, 8)]
    rows = [measurer.measure(HOPPER, ("fwd", entry)) for entry in entries]
    measurer.close()
    assert [row["status"] for row in rows] == ["ok", "lost", "ok", "lost", "lost", "ok"]
    assert rows[1]["note"] == "no answer in 2 s" and rows[3]["note"] == "ended the process"
    assert not any(is_alive(row["pid"]) for row in rows if "pid" in row)


def test_the_table_has_what_is_right_and_clearly_faster_than_the_shipped_entry(tmp_path):
    shipped, path = HOPPER.shipped("fwd"), tmp_path / "tuned.json"

    def entries_of(*ms: float) -> dict:
        """Of the table, given the times of the shipped entry and others; 0 for a result that is wrong."""
        entries = [shipped, *(replace(shipped, num_stages=9 + i) for i in range(3))]
        rows = {
            ("fwd", entry): {"status": "ok", "ms": time} if time else {"status": "wrong"}
            for entry, time in zip(entries, ms, strict=False)
        }
        tune.write(rows, HOPPER, path)
        return json.loads(path.read_text())["entries"]

    assert entries_of(10.0, 9.8, 0) == entries_of(0, 5.0) == {}
    assert entries_of(10.0, 9.0, 8.0, 11.0) == {
        "fwd": asdict(replace(shipped, num_stages=10, source="measured"))
    }


# In a process of its own, whose kernels are decorated for the interpreter.
SWEEP = """
import sys
from pathlib import Path
from benchmarks import tune
from csrc_triton.launch import Launch

tune.CANDIDATE_SECONDS = tune.START_SECONDS = 200
setting = tune.Setting("interpret", 2**20, "fp32", tokens=16, hidden=32, vocab=2048, sharpness=4)
other = {"certified_dweight": Launch(128, 64, 32, 1, 1)}
names = ["fwd", "certified_dz_few", "certified_dweight"]
jobs = [(name, other.get(name, Launch(32, 128, 32, 1, 1))) for name in names]
tune.sweep(setting, jobs, Path(sys.argv[1]), 350)
"""


@pytest.mark.slow
def test_the_sweep_runs_from_end_to_end_in_the_interpreter(tmp_path):
    path = tmp_path / "tuned.json"
    done = run_script(*python(SWEEP), str(path), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())["candidates"]
    assert [row["status"] for row in found] == ["ok"] * 3, found
