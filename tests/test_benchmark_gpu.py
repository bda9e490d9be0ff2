"""`make gpu` gets through whatever happens to a step; the tuning sweep picks what is right and fastest."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton", reason="no triton on this platform: nothing to tune")
if INTERPRETED:
    pytest.skip("kernels are decorated for the interpreter in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_compile import SHARED_LIMIT

from benchmarks import gpu, targets, throughput, tune
from benchmarks.gpu import Step
from benchmarks.tune import Measured, Setting, Sweep
from csrc_triton.launch import LAUNCH_TABLE, Launch, launch_config

HOPPER = Setting("sm_90", "bf16", 8192, 4096, 128256)
ROOT = Path(gpu.__file__).resolve().parents[1]


def code(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody waits for is as good as gone.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


# The steps.


def test_without_a_cuda_device_it_says_what_there_is():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert f"needs a CUDA device: torch {torch.__version__}, built " in done.stderr


def test_steps_that_fail_or_hang_are_recorded_and_the_next_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CLEAN_UP_SECONDS", 1.0)
    path, grandchild = tmp_path / "results" / "device.json", tmp_path / "pid"
    # Deaf to SIGTERM, and so is what it started.
    hang = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen(['sleep', '60']); open({str(grandchild)!r}, 'w').write(str(child.pid))\n"
        "print('about to hang', flush=True); time.sleep(60)"
    )
    written = []

    def steps():
        yield Step("good", [code("print('fine')")], 20, lambda report: report.update(good=1) or "")
        written.append(json.loads(path.read_text()))
        yield Step("bad", [code("print('why'); raise SystemExit(3)"), code("print('beside it')")], 20)
        written.append(json.loads(path.read_text()))
        yield Step("hanging", [code(hang)], 8)  # a busy machine starts a Python in seconds
        yield Step("no result", [code("")], 20, lambda report: gpu.collect_json(report, "x", tmp_path / "x"))
        yield Step(
            "cut without result", [code(hang)], 1, lambda report: gpu.collect_json(report, "x", Path())
        )
        yield Step("cannot start", [["/no/such/program"]], 20)
        yield Step("last", [code("print('reached')")], 20)

    report = {}
    began = time.monotonic()
    gpu.run_steps(steps(), report, path, began + 100)
    assert time.monotonic() - began < 40
    found = {step["name"]: step for step in report["steps"]}
    assert found["good"]["status"] == "ok" and report["good"] == 1
    assert found["bad"]["status"] == "failed with exit status 3"
    assert "why" in found["bad"]["tail"] and "beside it" in found["bad"]["tail"]
    assert found["hanging"]["status"] == "cut after 8 s" and "about to hang" in found["hanging"]["tail"]
    assert found["no result"]["status"].startswith("failed: left no result")
    assert found["cut without result"]["status"].startswith("failed, cut after 1 s: left no result")
    assert found["cannot start"]["status"].startswith("failed: FileNotFoundError")
    assert (found["last"]["status"], found["last"]["tail"]) == ("ok", "reached\n")
    assert not is_alive(int(grandchild.read_text()))
    assert [len(report["steps"]) for report in written] == [1, 2]
    assert path.read_text() == gpu.without_paths(json.dumps(report, indent=2)) + "\n"
    assert str(tmp_path) not in path.read_text() and sys.prefix not in path.read_text()


def test_a_step_is_cut_at_the_deadline_and_none_is_begun_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CLEAN_UP_SECONDS", 0.5)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1.0)
    report = {}
    steps = [Step(name, [code("import time; time.sleep(30)")], 30) for name in ("first", "second")]
    began = time.monotonic()
    gpu.run_steps(iter(steps), report, tmp_path / "device.json", began + 2.5)
    assert time.monotonic() - began < 5
    assert [step["status"] for step in report["steps"]] == ["cut after 2 s", "skipped: no time left"]
    assert gpu.exit_status(report) == 1
    assert gpu.exit_status({"steps": [{"status": "ok"}, report["steps"][1]]}) == 0


def test_a_step_that_cannot_be_made_ends_the_run_but_loses_nothing(tmp_path):
    def steps():
        yield Step("good", [code("")], 20)
        raise ImportError("no peers")

    report = {}
    gpu.run_steps(steps(), report, tmp_path / "device.json", time.monotonic() + 60)
    assert [step["status"] for step in report["steps"]] == ["ok", "failed: ImportError: no peers"]
    assert json.loads((tmp_path / "device.json").read_text()) == report


def test_outcomes_of_tests_survive_their_process(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import os, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'the reason'\n"
        "@pytest.mark.parametrize('name', ['a, b'])\n"
        "def test_fatal(name): os._exit(9)\n"
        "@pytest.mark.skip(reason='not today')\n"
        "def test_skipped(): pass\n"
        "def test_of_2_to_the_31_elements(): pass\n"
    )
    logs = [tmp_path / f"{i}.jsonl" for i in range(2)]
    own = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tests)]
    commands = [gpu.pytest_command(log, i, 2, own) for i, log in enumerate(logs)]
    report = {}
    step = Step("tests", commands, 60, lambda report: gpu.collect_tests(report, logs))
    found = gpu.run_step(step, time.monotonic() + 100, report)
    tests = report["gpu_tests"]
    assert found["status"] == "failed with exit status 1, 9: 1 failed, 1 unfinished" or (
        found["status"] == "failed with exit status 9: 1 failed, 1 unfinished"
    )
    assert (tests["passed"], tests["unfinished"]) == (2, ["test_some.py::test_fatal[a, b]"])
    assert "the reason" in tests["failed"]["test_some.py::test_wrong"]
    assert "not today" in tests["skipped"]["test_some.py::test_skipped"]


def test_tests_that_the_step_did_not_get_to_are_told(tmp_path):
    tests, broken = tmp_path / "test_some.py", tmp_path / "test_broken.py"
    tests.write_text(
        "import time\n"
        "def test_first(): pass\n"
        "def test_hanging(): time.sleep(60)\n"
        "def test_after_it(): pass\n"
        "def test_of_2_to_the_31_elements(): pass\n"
    )
    broken.write_text("import no_such_module\n")
    logs = [tmp_path / "log.jsonl"]
    own = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(broken), str(tests)]
    commands = [gpu.pytest_command(logs[0], 0, 1, [*own, "--continue-on-collection-errors"])]
    report = {}
    step = Step("gpu tests", commands, 10, lambda report: gpu.collect_tests(report, logs))
    found = gpu.run_step(step, time.monotonic() + 100, report)
    tests = report["gpu_tests"]
    assert found["status"] == "failed, cut after 10 s: 1 unfinished, 1 not begun"
    assert tests["passed"] == 2 and "test_some.py::test_of_2_to_the_31_elements" in tests["seconds"]
    assert tests["unfinished"] == ["test_some.py::test_hanging"]
    assert tests["not begun"] == ["test_some.py::test_after_it"]
    assert next(iter(tests["seconds"])) == "test_some.py::test_of_2_to_the_31_elements"
    assert gpu.test_lines(report)[0] == (
        "gpu tests: 2 passed, 0 failed, 0 skipped, 1 unfinished, 1 not begun"
    )


def test_huge_tests_are_the_first_of_the_last_process(tmp_path):
    class Item:
        def __init__(self, name):
            self.name = name

    names = ["a", "of_2_to_the_31", "b", "c", "d"]
    shares = []
    for index in range(2):
        items = [Item(name) for name in names]
        gpu.TestShare(tmp_path / "log", index, 2).pytest_collection_modifyitems(items)
        shares.append([item.name for item in items])
    assert shares == [["a", "c"], ["of_2_to_the_31", "b", "d"]]


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """`gpu.main` with steps that measure nothing."""
    from benchmarks import report

    monkeypatch.setattr(gpu, "cuda_device", lambda: ("NVIDIA H200", "torch"))
    monkeypatch.setattr(gpu, "memory_gib", lambda: 140)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(report, "environment", lambda device_type: {"commit": None})

    def set_steps(*steps: Step) -> None:
        monkeypatch.setattr(gpu, "steps", lambda folder, gib: iter(steps))

    return set_steps


def test_an_earlier_report_stays_until_there_is_another_to_compare(tmp_path, as_if_on_a_gpu, measured):
    path, partial = tmp_path / "nvidia-h200.json", tmp_path / "nvidia-h200.partial.json"
    path.write_text("earlier")
    as_if_on_a_gpu(Step("bad", [code("raise SystemExit(3)")], 20))
    assert gpu.main(["--out", str(tmp_path), "--commit", "abc"]) == 1
    assert path.read_text() == "earlier"
    found = json.loads(partial.read_text())
    assert found["steps"][0]["status"] == "failed with exit status 3"
    assert found["environment"]["commit"] == "abc"

    source, seen = tmp_path / "source" / "report.json", []
    source.parent.mkdir()
    source.write_text(json.dumps(measured | {"commit": None}))

    def collect(report):
        seen.append(path.read_text())
        return gpu.collect_throughput(report, "shipped", source)

    as_if_on_a_gpu(Step("shipped", [code("")], 20, collect))
    assert gpu.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    assert seen == ["earlier"] and not partial.exists()
    assert json.loads(path.read_text())["reports"]["shipped"]["commit"] == "abc"


def test_a_folder_that_cannot_be_written_to_is_noticed_before_the_first_step(
    tmp_path, as_if_on_a_gpu, capsys
):
    began = tmp_path / "began"
    as_if_on_a_gpu(Step("first", [code(f"open({str(began)!r}, 'w')")], 20))
    (tmp_path / "file").write_text("")
    assert gpu.main(["--out", str(tmp_path / "file" / "results")]) == 2
    assert "cannot be written to" in capsys.readouterr().err and not began.exists()


def test_a_run_in_which_every_test_was_skipped_is_no_success(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"name": "test", "outcome": "skipped", "message": "no CUDA device"}) + "\n")
    assert gpu.collect_tests({}, [log]) == "no test passed"


def test_every_step_calls_a_program_with_options_that_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "launch-table.json").write_text(json.dumps({"entries": {"fwd": {}}}))
    steps = list(gpu.steps(tmp_path, 140))
    names = ["gpu tests", "shipped", "tuning", "tuned", "sharpness", "small batches", "frozen head"]
    assert [step.name for step in steps[:7]] == names
    assert "compile" in steps[1].commands[0] and "compile" not in steps[3].commands[0]
    # Those that matter most have their turn even if each takes all it may.
    assert sum(step.seconds for step in steps[:4]) < 60 * gpu.parse([]).minutes
    assert len({step.name for step in steps}) == len(steps)
    for step in steps[1:]:
        ((_, script, *arguments),) = step.commands
        assert ("--launch-table" in arguments) == (steps.index(step) > 2)
        (tune if script.endswith("tune.py") else throughput).parse(arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """A throughput report, from a real run on the CPU, that passes for one of Triton on a GPU."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    size = ["--device", "cpu", "--hidden", "48", "--vocab", "1000", "--tokens", "64", "--pairs", "2"]
    run = [
        "--dtype",
        "fp32",
        "--repeats",
        "2",
        "--threads",
        "1",
        "--only",
        "torch",
        "torch-exact",
        "eager",
        "--no-memory",
    ]
    threads = torch.get_num_threads()
    assert throughput.main([*size, *run, "--sharpness", "50", "flat", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    report = json.loads(path.read_text().replace("(torch", "(triton").replace('"torch', '"triton'))
    report |= {"device": "NVIDIA H200", "device_type": "cuda"}
    comparison = report["comparisons"][0]
    comparison |= {
        "tokens": 8192,
        "dtype": "bf16",
        "shape": {"name": "head", "hidden": 4096, "vocab": 128256},
    }
    comparison["input"]["entries"] = 50.0
    return report


def test_summary_tells_what_was_reached_in_fifty_lines(measured):
    failed = {f"test_{i}": "message" for i in range(9)}
    tests = {"passed": 3, "failed": failed, "skipped": {}, "unfinished": ["test_hanging"], "not begun": []}
    sweep = Sweep(HOPPER, tune.in_order(["fwd", "certified_dz"], HOPPER), None)
    sweep.add(Measured("fwd", HOPPER.shipped("fwd"), "ok", 10.0))
    sweep.add(Measured("fwd", replace(HOPPER.shipped("fwd"), num_stages=4), "ok", 8.0))
    sweep.add(Measured("certified_dz", HOPPER.shipped("certified_dz"), "ok", 1.0))
    shipped, tuned = copy.deepcopy(measured), copy.deepcopy(measured)
    for found, forward in ((shipped, 1.2), (tuned, 1.1)):
        gemm = found["comparisons"][0]["bare_gemm_ms"]["median"]
        found["comparisons"][0]["rows"][0]["forward_ms"]["median"] = forward * gemm
    certified, exact = tuned["comparisons"][0]["rows"][:2]
    certified["extra_bytes"], exact["extra_bytes"] = 100 * 2**20, 200 * 2**20
    report = {
        "gpu_tests": tests,
        "steps": [{"name": "sharpness", "status": "cut after 90 s"}, {"name": "tuned", "status": "ok"}],
        "reports": {"shipped": shipped, "tuned": tuned},
        "tuning": sweep.as_json(),
    }
    lines = gpu.summary(report)
    text = "\n".join(lines)
    assert len(lines) <= 48 and all(len(line) <= 140 for line in lines), text
    assert "gpu tests: 3 passed, 9 failed, 0 skipped, 1 unfinished, 0 not begun" in lines
    assert "  and 4 more" in lines
    assert "step sharpness: cut after 90 s" in lines
    comparison = measured["comparisons"][0]
    row = comparison["rows"][0]
    assert "forward, over one bare GEMM: ≤ 1.15×: shipped 1.2× MISSED, tuned 1.1× met" in lines
    assert "extra memory: ≤ 300 MiB: shipped not measured, tuned 200 MiB met" in lines
    against_cce = "forward and backward, speed against CCE: ≥ 2×: shipped not measured, tuned not measured"
    assert against_cce in lines
    assert sum("TRL's head: ≥" in line for line in lines) == 1  # none of those for CPUs
    assert any(
        line.startswith("  focalkern (triton) ") and f"{row['x_floor']:.2f}x GEMM" in line for line in lines
    )
    assert "  fwd: 128x256x64, 8 warps, 4 stages: 8 ms, 1.25x the shipped entry" in lines
    assert "  as shipped: certified_dz 1 ms" in lines
    assert sum(line.startswith("shipped: ") for line in lines) == 2


@pytest.mark.parametrize(
    ("device", "limits"),
    [("NVIDIA H100 80GB HBM3", [1.15]), ("NVIDIA A100-SXM4-80GB", [1.1]), ("NVIDIA L40S", [])],
)
def test_limit_of_the_forward_is_that_of_the_gpu(device, limits):
    own = [target for target in targets.TARGETS if target.is_for(device, "cuda")]
    assert [target.limit for target in own if target.what == "forward, over one bare GEMM"] == limits
    assert not any(target.is_for(device, "cpu") for target in own)


def test_summary_of_a_run_that_got_nowhere():
    report = {"steps": [{"name": "gpu tests", "status": "failed"}]}
    assert gpu.summary(report) == ["gpu tests: no result", "step gpu tests: failed"]


# The candidates.


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", sorted(LAUNCH_TABLE))
def test_candidates_begin_with_the_shipped_entry_and_fit(arch, dtype):
    setting = replace(HOPPER, arch=arch, dtype=dtype)
    for kernel in tune.TUNED:
        found = tune.candidates(kernel, setting)
        assert found[0] == setting.shipped(kernel) and len(found) == len(set(found)) > 1
        assert all(tune.fits(kernel, entry, setting) for entry in found[1:])
        if kernel.startswith(("fwd", "bwd_dz")):
            assert all(entry.block_n % 128 == 0 for entry in found)
        if kernel.startswith("certified_dz"):
            assert all(entry.block_n == 128 for entry in found)
        if kernel.startswith("certified_dweight"):
            assert all(entry.block_m == 128 for entry in found)
        if kernel.startswith("certified_product"):
            assert all(128 % entry.block_k == 0 for entry in found)


def check_candidate(setting: Setting, kernel: str, entry: Launch) -> None:
    launches = tune.compiled(setting, kernel, entry)
    assert {launch.name for launch in launches} == {tune.TUNED[kernel].name}
    for launch in launches:
        assert launch.shared_bytes <= SHARED_LIMIT[setting.arch], (kernel, entry)
        assert launch.spilled_bytes == 0, (kernel, entry)


@pytest.mark.parametrize("kernel", ["certified_dz", "certified_dweight"])
def test_likely_candidates_compile_without_spills(kernel):
    check_candidate(HOPPER, kernel, tune.candidates(kernel, HOPPER)[1])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", tune.TUNED)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_candidate_compiles_without_spills(arch, kernel):
    setting = replace(HOPPER, arch=arch)
    for entry in tune.candidates(kernel, setting):
        check_candidate(setting, kernel, entry)


# As a launch would look for it: on tensors with storage.
FIND_IN_CACHE = """
import json, sys
import torch, triton
from benchmarks import tune
from benchmarks.tune import Setting
from csrc_triton.launch import Launch

kernel, setting, entry = sys.argv[1], Setting(**json.loads(sys.argv[2])), Launch(**json.loads(sys.argv[3]))
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
empty = torch.empty
torch.empty = lambda *args, **options: empty(*args, **options | {"device": "cpu"}).zero_()
tune.compile_candidate(setting, kernel, entry)
print(json.dumps(hits))
"""


def test_compiling_elsewhere_fills_the_cache_that_the_launch_looks_into(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.chdir(ROOT)
    setting = Setting("sm_90", "bf16", 256, 256, 4096)
    job = "fwd", tune.candidates("fwd", setting)[1]
    with tune.compiling(setting, [job]) as under_way:
        under_way[job].get(timeout=120)
    arguments = ["fwd", json.dumps(asdict(setting)), json.dumps(asdict(job[1]))]
    done = subprocess.run(
        code(FIND_IN_CACHE) + arguments, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [True]


# The choice among them.


def test_best_is_right_clearly_faster_and_as_last_measured():
    shipped = HOPPER.shipped("fwd")
    deep, wide, wrong, broken = (replace(shipped, num_stages=stages) for stages in (4, 5, 6, 7))
    sweep = Sweep(HOPPER, [("fwd", entry) for entry in (shipped, deep, wide, wrong, broken)], None)
    assert sweep.best("fwd") is None and sweep.as_json()["entries"] == {}
    sweep.add(Measured("fwd", shipped, "ok", 10.0))
    sweep.add(Measured("fwd", wrong, "wrong", 1.0))
    sweep.add(Measured("fwd", broken, "failed", None, "OutOfResources"))
    sweep.add(Measured("fwd", deep, "ok", 9.75))
    assert sweep.best("fwd") == shipped
    sweep.add(Measured("fwd", wide, "ok", 8.0))
    found = sweep.as_json()
    assert found["entries"]["fwd"] == asdict(replace(wide, source="measured")) and found["not_tried"] == 0
    assert found["gains"]["fwd"]["speedup"] == pytest.approx(1.25)
    sweep.confirmed["fwd"] = {shipped: 10.0, wide: 12.0, deep: 9.0}
    assert sweep.best("fwd") == deep


def test_table_of_a_sweep_takes_the_place_of_the_shipped_entries(tmp_path, monkeypatch):
    monkeypatch.setitem(LAUNCH_TABLE, "sm_90", dict(LAUNCH_TABLE["sm_90"]))
    path = tmp_path / "tuned.json"
    sweep = Sweep(HOPPER, tune.in_order(["fwd"], HOPPER), path)
    fast = tune.candidates("fwd", HOPPER)[1]
    sweep.add(Measured("fwd", HOPPER.shipped("fwd"), "ok", 10.0))
    sweep.add(Measured("fwd", fast, "ok", 5.0))
    other = LAUNCH_TABLE["sm_90"][32]["fwd"]

    with pytest.raises(ValueError, match="entries for sm_90; the device here is interpret"):
        tune.load_table(path)
    monkeypatch.setattr(tune.triton_launch, "arch_of", lambda device: "sm_90")
    tune.load_table(path)
    assert launch_config("fwd", "sm_90", 16) == replace(fast, source="measured")
    assert launch_config("fwd", "sm_90", 32) == other
    # As one would write it into the table.
    written = tune.as_python(sweep.as_json()["entries"]["fwd"])
    assert eval(written, {"Launch": Launch}) == replace(fast, source="measured")

    path.write_text(json.dumps({"device": "NVIDIA H200", "tuning": sweep.as_json()}))
    tune.load_table(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_may_differ_by_rounding_and_no_more(dtype):
    expected = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert tune.excess(expected * (1 + torch.finfo(dtype).eps / 4), expected) <= 1
    wrong = expected.clone()
    wrong[::100] = 0
    assert tune.excess(wrong, expected) > 1
    assert not tune.excess(expected * torch.nan, expected) <= 1


class Given(tune.Bench):
    """Its runs give what they were given to give, the expected result being all ones."""

    def __init__(self, *results: torch.Tensor) -> None:
        self.setting, self.device = HOPPER, torch.device("cpu")
        self.shipped_results = "fwd", [torch.ones(1024, 64, dtype=torch.bfloat16)]
        self.results = iter(results)

    def launches(self, kernel, entry):
        return [next(self.results)], [lambda: None]


def measured_as(*results: torch.Tensor) -> Measured:
    return Given(*results).measure("fwd", HOPPER.shipped("fwd"))


def test_a_candidate_that_leaves_out_a_tile_or_differs_from_run_to_run_is_refused():
    right = torch.ones(1024, 64, dtype=torch.bfloat16)
    assert measured_as(right, right.clone()).status == "ok"
    # In the whole, the difference is less than rounding may make.
    hole, nan, other = right.clone(), right.clone(), right.clone()
    hole[128:256, :16] = 0
    nan[5, 5] = torch.nan
    other[5, 5] += 0.0078125
    assert measured_as(hole, hole.clone()).status == "wrong"
    assert measured_as(nan, nan.clone()).status == "wrong"
    twice = measured_as(right, other)
    assert twice.status == "wrong" and "differs from run to run" in twice.note
    assert tune.excess(other, right) < 1


def test_a_lost_tile_of_many_shows_in_its_block_alone():
    expected = torch.randn(128 * 1000, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected[: 128 * 10] *= 2**-6
    result = expected.clone()
    result[128:256] = 0
    whole = torch.linalg.vector_norm((result - expected).float()) / torch.linalg.vector_norm(expected.float())
    assert whole < torch.finfo(torch.bfloat16).eps and tune.excess(result, expected) > 1
    assert tune.excess(torch.zeros(5), torch.zeros(5)) == 0 and tune.excess(torch.ones(5), torch.zeros(5)) > 1


def test_the_device_is_busy_before_the_clock_starts(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    bench = Given()
    bench.device = torch.device("cuda")
    assert bench.time_once([lambda: order.append("launch")] * 2) == 1.5
    assert order == ["sleep", "record", "launch", "launch", "record", "synchronize"]


# A measuring process that some numbers of stages undo.
BODY = """
import os, time
def body(setting, connection):
    connection.send(4.5)
    while (job := connection.recv()) is not None:
        kernel, entry = job
        if isinstance(entry, list):
            connection.send(([2.0, 1.0, 1.5][:len(entry)], True))
        elif entry.num_stages == 6:
            time.sleep(60)
        elif entry.num_stages == 7:
            os._exit(7)
        else:
            connection.send(((kernel, entry, entry.num_stages), entry.num_stages != 9))
"""


class Answers(tune.Measurer):
    """Its process answers with what it was asked for."""

    def ask(self, job, until):
        found = super().ask(job, until)
        return found if isinstance(found, list) else Measured(found[0], found[1], "ok", float(found[2]))


def test_a_candidate_that_hangs_or_dies_costs_no_more_than_itself(tmp_path, monkeypatch):
    (tmp_path / "measuring_body.py").write_text(BODY)
    monkeypatch.syspath_prepend(tmp_path)
    import measuring_body

    shipped = replace(HOPPER.shipped("certified_dz"), num_stages=4)
    monkeypatch.setattr(Setting, "shipped", lambda self, kernel: shipped)
    entries = [shipped, *(replace(shipped, num_stages=stages) for stages in (6, 7, 9, 8))]
    sweep = Sweep(HOPPER, [("certified_dz", entry) for entry in entries], tmp_path / "tuned.json")
    measurer = Answers(None, measuring_body.body, candidate_seconds=2.0)
    tune.run(sweep, measurer, {}, time.monotonic() + 60)
    measurer.stop()
    statuses = [found.status for found in sweep.measured]
    assert statuses == ["ok", "hung", "crashed", "crashed", "ok"], sweep.measured
    assert sweep.measured[2].note == "took the measuring process with it (exit status 7)"
    assert measurer.starts == 4 and sweep.scale == 4.5
    # Side by side, the one that had been slower was twice as fast as the shipped entry.
    assert sweep.best("certified_dz") == entries[4]
    assert json.loads((tmp_path / "tuned.json").read_text()) == sweep.as_json()


class Slow:
    """Measures one candidate after the other in its own time."""

    scale = None

    def measure(self, kernel, entry, until):
        time.sleep(0.3)
        return Measured(kernel, entry, "ok", 1.0)

    def ask(self, job, until):
        raise tune.Lost("no answer in 0 s")


def test_a_candidate_that_hangs_in_the_compiler_is_not_waited_for(monkeypatch):
    class Never:
        def ready(self):
            return False

    monkeypatch.setattr(tune, "START_SECONDS", 0.0)
    monkeypatch.setattr(tune, "CANDIDATE_SECONDS", 0.5)
    hanging, *others = jobs = tune.in_order(["fwd"], HOPPER)[:3]
    sweep = Sweep(HOPPER, jobs, None)
    tune.run(sweep, Slow(), {hanging: Never()}, time.monotonic() + 600)
    assert [(found.kernel, found.entry) for found in sweep.measured] == others
    assert sweep.as_json()["not_tried"] == 1


def test_nothing_is_measured_after_the_time_is_up(tmp_path):
    sweep = Sweep(HOPPER, tune.in_order(list(tune.TUNED), HOPPER), tmp_path / "tuned.json")
    tune.run(sweep, Slow(), {}, time.monotonic() + 2)
    found = json.loads((tmp_path / "tuned.json").read_text())
    assert 2 <= len(found["candidates"]) <= 7
    assert found["not_tried"] == len(sweep.jobs) - len(found["candidates"])


# In a process of its own, whose kernels are decorated for the interpreter.
SWEEP = """
import json, sys, time
from pathlib import Path
from benchmarks import tune

setting = tune.Setting("interpret", "fp32", 16, 32, 2048, sharpness=4)
tune.print_entries(tune.tune(setting, sys.argv[2:], Path(sys.argv[1]), time.monotonic() + 300))
"""


@pytest.mark.slow
def test_the_sweep_runs_from_end_to_end_in_the_interpreter(tmp_path):
    path = tmp_path / "tuned.json"
    kernels = ["fwd", "certified_dz_few", "certified_dweight", "bwd_dz"]
    done = subprocess.run(
        [*code(SWEEP), path, *kernels],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["not_tried"] == 0 and set(found["entries"]) == set(kernels), done.stdout
    assert {row["status"] for row in found["candidates"]} == {"ok"}
