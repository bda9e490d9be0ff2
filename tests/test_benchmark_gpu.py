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
from unittest import mock

import psutil
import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton", reason="no triton on this platform: nothing to tune")
if INTERPRETED:
    pytest.skip("kernels are decorated for the interpreter in this process", allow_module_level=True)

from test_compile import SHARED_LIMIT

from benchmarks import gpu, throughput, tune
from benchmarks.gpu import Step
from benchmarks.report import ROOT
from benchmarks.tune import Setting
from csrc_triton.launch import LAUNCH_TABLE, Launch

HOPPER = Setting("sm_90", SHARED_LIMIT["sm_90"])


def has_ended(pid: int) -> bool:
    """On a busy machine a killed process goes later, and it may stay as a zombie."""
    for _ in range(400):
        statuses = {process.pid: process.info["status"] for process in psutil.process_iter(["status"])}
        if statuses.get(pid, psutil.STATUS_ZOMBIE) == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def make_gpu(tmp_path, monkeypatch):
    """`gpu.main` with other steps, where there seems to be a GPU: its status, theirs, and the report."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = {"device": "NVIDIA H200", "commit": None}
    monkeypatch.setattr("benchmarks.report.environment", lambda device_type: dict(about))
    for name, value in {"ROOT": tmp_path, "GRACE_SECONDS": 1, "LEAST_SECONDS": 1}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.chdir(tmp_path)
    Path("result.json").write_text("{}")
    before = signal.getsignal(signal.SIGTERM)

    def run(*steps: Step, arguments: tuple[str, ...] = ()) -> tuple[int, list[str], dict]:
        monkeypatch.setattr(gpu, "steps", lambda folder: iter(steps))
        status = gpu.main(["--out", ".", *arguments])
        report = json.loads(Path("nvidia-h200.json").read_text())
        return status, [step["status"] for step in report["steps"]], report

    yield run
    signal.signal(signal.SIGTERM, before)


def step(name: str, code: str, seconds: float = 20, result: str = "result.json") -> Step:
    """A step that runs code."""
    imports = "import os, shutil, signal, subprocess, time\n"
    return Step(name, seconds, [sys.executable, "-c", imports + code], Path(result))


def test_what_is_missing_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", ("pytest", "no_such_package"))
    for is_available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_available: found)
        with pytest.raises(SystemExit, match="2"):
            gpu.main([])
    package, device = capsys.readouterr().err.splitlines()
    assert package == "make gpu needs no_such_package: python -m pip install no_such_package"
    assert "needs a CUDA device" in device


HANG = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
open("pid", "w").write(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""


def test_steps_that_fail_or_hang_are_recorded_and_the_next_goes_on(make_gpu):
    status, outcomes, report = make_gpu(
        step("good", """open("result.json", "w").write('{"comparisons": []}')"""),
        step("bad", "shutil.copy('nvidia-h200.json', 'seen.json'); raise SystemExit(3)"),
        step("hanging", HANG, seconds=8),
        step("killed", "os.kill(os.getpid(), 9)", result="none.json"),
        step("tuning", ""),
        arguments=("--commit", "abc"),
    )
    no_result = "failed: no result (FileNotFoundError), failed with exit status -9"
    assert (status, outcomes) == (1, ["ok", "failed with exit status 3", "cut after 8 s", no_result, "ok"])
    assert has_ended(int(Path("pid").read_text()))
    assert [step["name"] for step in json.loads(Path("seen.json").read_text())["steps"]] == ["good"]
    assert report["reports"]["hanging"] == {"comparisons": [], "commit": "abc"}
    assert report["tuning"] == {"comparisons": []}


def test_a_step_is_cut_at_the_deadline_and_none_starts_after_it(make_gpu):
    steps = [step(name, "time.sleep(30)", seconds=30) for name in ("first", "second")]
    status, outcomes, _ = make_gpu(*steps, arguments=("--minutes", str(4 / 60)))
    assert (status, outcomes) == (1, ["cut after 3 s", gpu.NO_TIME])
    assert make_gpu(steps[1], arguments=("--minutes", "0"))[:2] == (0, [gpu.NO_TIME])


def test_a_run_that_is_terminated_takes_its_step_along_and_writes_its_report(make_gpu):
    terminate = "open('pid', 'w').write(str(os.getpid())); os.kill(os.getppid(), 15); time.sleep(60)"
    with pytest.raises(SystemExit):
        make_gpu(step("long", terminate, seconds=60))
    assert has_ended(int(Path("pid").read_text()))
    assert '"failed: make gpu was ended"' in Path("nvidia-h200.json").read_text()


TESTS = """
import os, pytest, time
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong(): assert 1 == 2, 'the reason'
@pytest.mark.skip(reason='not today')
def test_skipped(): pass
def test_fatal(): os._exit(9)
def test_of_2_to_the_31_elements(): pass
def test_interrupted(): time.sleep(1); os.kill(os.getppid(), 2); time.sleep(60)
"""


def test_outcomes_of_tests_are_collected_also_after_a_crash_and_an_interrupt(tmp_path, make_gpu):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    selected = gpu.test_step(tmp_path, "tests", 300, "not 2_to_the_31", 1)
    huge = gpu.test_step(tmp_path, "huge", 300, "2_to_the_31", 1)
    status, outcomes, report = make_gpu(selected, huge)
    assert (status, outcomes) == (1, ["failed with exit status 2", "ok"])
    passed, failed, skipped = report["gpu_tests"].values()
    assert passed == 2 and "the reason" in failed["tests.test_some::test_wrong"]
    assert "not today" in skipped["tests.test_some::test_skipped"]
    assert any("test_fatal" in name and "crashed" in message for name, message in failed.items())


def test_every_step_calls_a_program_with_options_that_it_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: mock.Mock(total_memory=140 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = list(gpu.steps(tmp_path))
    tests, huge, shipped, tuning, sizes = steps
    for step in (shipped, sizes):
        options = throughput.parse(step.command[2:])
        assert (options.device, options.json) == ("cuda", step.result)
    assert sum(step.seconds for step in steps) <= 60 * 8 - 15
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):  # it has the options, and asks for a GPU
        tune.main(tuning.command[2:])
    assert "tune.py needs a CUDA device" in capsys.readouterr().err
    for each, name in ((tests, "test_gpu.py"), (huge, "2_to_the_31")):
        command = [x for x in each.command if not x.endswith(".py") or x.endswith("test_gpu.py")]
        assert name in subprocess.check_output([*command, "--collect-only"], cwd=ROOT, text=True)


@pytest.mark.parametrize("arch", sorted(LAUNCH_TABLE))
def test_candidates_begin_with_the_shipped_entry_and_the_nearest_compiles(arch):
    setting = Setting(arch, SHARED_LIMIT[arch])
    jobs = tune.in_order(setting)
    assert jobs[:10] == [(name, setting.shipped(name)) for name in tune.TUNED]
    assert [name for name, _ in jobs[10:20]] == list(tune.TUNED) and len(jobs) == len(set(jobs)) > 100
    assert all(tune.fits(entry, setting) for _, entry in jobs)
    assert arch not in ("sm_80", "sm_90") or tune.compile_candidate(setting, jobs[10]) == (jobs[10], "")


@pytest.mark.parametrize("changed", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_agree_within_rounding_and_a_lost_tile_shows_where_all_is_small(dtype, changed):
    expected = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected[:10] *= 2**-12
    assert tune.agree(expected * (1 + torch.finfo(dtype).eps / 2), expected)
    found = expected.clone()
    found[5, :16] = changed
    assert not tune.agree(found, expected)


RIGHT, OTHER = torch.ones(2, 8, 64, dtype=torch.bfloat16)
OTHER[5, 5] += 0.0078125  # agrees, and is not the same


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([RIGHT, RIGHT, RIGHT.clone()], "ok"),
        ([RIGHT, 0 * RIGHT, 0 * RIGHT], "wrong"),
        ([RIGHT, OTHER, RIGHT], "wrong"),
        ([RIGHT, RuntimeError("out of resources")], "failed"),
    ],
)
def test_a_candidate_that_is_wrong_or_differs_from_run_to_run_is_refused(results, status, monkeypatch):
    steps = [x if isinstance(x, Exception) else ([x], []) for x in results]
    monkeypatch.setattr(tune, "launched", mock.Mock(side_effect=steps))
    monkeypatch.setattr(tune, "milliseconds", lambda launches: 1.0)
    assert tune.measure(HOPPER, "fwd", HOPPER.shipped("fwd"))["status"] == status


def broken_measure(setting: Setting, name: str, entry: Launch) -> dict:
    """In place of `tune.measure` in the other process: candidates hang, end it or break CUDA in it."""
    if entry.num_stages == 6:
        time.sleep(60)
    if entry.num_stages == 7:
        os._exit(7)
    illegal = mock.Mock(side_effect=RuntimeError("an illegal memory access was encountered"))
    with (
        mock.patch.object(tune, "launched", illegal if entry.num_stages == 9 else lambda *_: ([], [])),
        mock.patch.object(tune, "milliseconds", lambda launches: os.getpid()),
        mock.patch.multiple(torch.cuda, is_available=lambda: True, synchronize=illegal),
    ):
        return tune.measure(setting, name, entry)


def test_a_candidate_that_hangs_or_dies_costs_no_more_than_itself(monkeypatch):
    monkeypatch.setattr(tune, "measure", broken_measure)
    monkeypatch.setattr(tune, "CANDIDATE_SECONDS", 2)
    measurer, shipped = tune.Measurer(), HOPPER.shipped("fwd")
    stages = (4, 6, 3, 7, 9, 8)
    rows = [measurer.measure(HOPPER, ("fwd", replace(shipped, num_stages=each))) for each in stages]
    assert [row["status"] for row in rows] == ["ok", "lost", "ok", "lost", "lost", "ok"]
    assert "an illegal memory access" in rows[4]["note"]
    measurer.pool.shutdown()
    assert all(has_ended(row["ms"]) for row in rows if row["status"] == "ok")


@pytest.mark.parametrize(
    ("ms", "again", "fastest"),  # of the shipped entry and of others; 0 for a result that is wrong
    [
        ((10.0, 9.8, 0), (), None),
        ((0, 5.0), (), None),
        ((10.0, 9.0, 8.0, 11.0), (10.0, 8.0), 2),
        ((10.0, 5.0), (10.0, 9.9), None),
    ],
)
def test_the_table_has_what_is_right_and_twice_clearly_faster(ms, again, fastest, tmp_path, monkeypatch):
    jobs = [("fwd", HOPPER.shipped("fwd"))]
    jobs += [("fwd", replace(jobs[0][1], num_stages=9 + i, source="measured")) for i in range(1, len(ms))]
    rows = [{"status": "ok", "ms": time} if time else {"status": "wrong"} for time in ms + again]
    monkeypatch.setattr(tune, "compiled", lambda setting, jobs, deadline: [(job, "") for job in jobs])
    monkeypatch.setattr(tune.Measurer, "measure", mock.Mock(side_effect=rows))
    tune.sweep(HOPPER, jobs, tmp_path / "tuned.json", 60)
    entries = json.loads((tmp_path / "tuned.json").read_text())["entries"]
    assert entries == ({"fwd": asdict(jobs[fastest][1])} if fastest else {})


# In a process of its own, whose kernels are decorated for the interpreter.
SWEEP = """
import sys
from pathlib import Path
from benchmarks import tune
from csrc_triton.launch import Launch

tune.CANDIDATE_SECONDS = tune.START_SECONDS = 200
setting = tune.Setting("interpret", 2**20, "fp32", tokens=16, hidden=32, vocab=2048, sharpness=4)
tile = Launch(32, 128, 32, 1, 1)
jobs = [("fwd", tile), ("certified_dz_few", tile), ("certified_dweight", Launch(128, 64, 32, 1, 1))]
tune.sweep(setting, jobs, Path(sys.argv[1]), 350)
"""


@pytest.mark.slow
def test_the_sweep_runs_from_end_to_end_in_the_interpreter(tmp_path):
    path = tmp_path / "tuned.json"
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", SWEEP, str(path)], env=env, timeout=400, check=True)
    found = json.loads(path.read_text())["candidates"]
    assert [row["status"] for row in found] == ["ok"] * 3, found
