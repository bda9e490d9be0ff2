"""The pages say what the result files hold: `benchmarks/publish.py`, on copies and on the repository."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import publish

PAGES = ("README.md", "docs/certified-backward.md", "docs/performance.md")
CPU_FILE = "cpu-4096x512x128256-bf16.json"
GPU = "NVIDIA H200"


@pytest.fixture
def copy(tmp_path) -> Path:
    """The pages, results and plots, up to date."""
    for page in PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(publish.ROOT / page, tmp_path / page)
    for folder in (publish.RESULTS, publish.FIGURES):
        shutil.copytree(publish.ROOT / folder, tmp_path / folder)
    shutil.copy(publish.ROOT / publish.COMPILED, tmp_path / publish.COMPILED)
    assert publish.main([], tmp_path) == 0
    return tmp_path


def result(root: Path, name: str = CPU_FILE) -> dict:
    return json.loads((root / publish.RESULTS / name).read_text())


def write(root: Path, name: str, data: dict) -> None:
    (root / publish.RESULTS / name).write_text(json.dumps(data))


def report_of_a_gpu(root: Path) -> dict:
    """A CPU's report as a GPU of the targets' size would have written it."""
    report = result(root) | {"device": GPU, "device_type": "cuda"}
    comparison = report["comparisons"][0]
    comparison |= {"tokens": 8192, "loss": "dpo"}
    comparison["shape"] |= {"hidden": 4096, "vocab": 128256}
    for row, name in zip(
        comparison["rows"], ("torch", "torch-exact", "triton", "triton-exact"), strict=False
    ):
        row["id"] = name
    return report


def write_gpu(root: Path) -> dict:
    report = report_of_a_gpu(root)
    data = {
        "device": GPU,
        "environment": {name: report[name] for name in ("date", "commit", "versions")},
        "gpu_tests": {"passed": 61, "failed": {"test_a": "wrong"}, "skipped": {}, "unfinished": []},
        "tuning": None,
        "reports": {"llama3-8b": report, "failed": {"error": "out of memory"}},
        "steps": [{"name": "tests", "status": "ok"}, {"name": "tuning", "status": "took too long"}],
    }
    write(root, "nvidia-h200.json", data)
    return report


def test_the_repository_is_up_to_date(capsys):
    status = publish.main(["--check"])
    assert status == 0, capsys.readouterr()


def test_a_second_run_changes_nothing(copy):
    def state() -> dict[str, tuple[bytes, int]]:
        files = [copy / page for page in PAGES] + sorted((copy / publish.FIGURES).iterdir())
        return {file.name: file.read_bytes() for file in files}

    before = state()
    assert publish.main([], copy) == 0
    assert state() == before
    assert publish.main(["--check"], copy) == 0


@pytest.mark.parametrize(
    ("page", "part"),
    [
        ("README.md", "results"),
        ("docs/certified-backward.md", "times"),
        ("docs/performance.md", "tables"),
        ("docs/performance.md", "compiled"),
    ],
)
def test_check_names_the_part_in_which_a_number_was_changed(page, part, copy, capsys):
    path = copy / page
    text = path.read_text()
    begin = text.index(f": begin {part} ")
    # The last cell of the part's first table that ends in a digit.
    place = begin + re.search(r"\d(?=[^\d|]* \|$)", text[begin:], re.M).start()
    changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
    path.write_text(changed)
    assert publish.main(["--check"], copy) == 1
    assert capsys.readouterr().out == f'{page}, part "{part}" is stale: make report\n'
    assert path.read_text() == changed
    assert publish.main([], copy) == 0
    assert path.read_text() == text


def test_text_outside_the_markers_stays(copy):
    path = copy / "README.md"
    text = f"Above.\n{path.read_text()}Below."
    path.write_text(text)
    assert publish.main([], copy) == 0
    assert path.read_text() == text


def test_new_results_reach_the_tables_the_targets_and_the_plots(copy, capsys):
    data = result(copy)
    rows = {row["id"]: row for row in data["comparisons"][0]["rows"]}
    rows["trl"]["both_ms"]["median"] = 3.9 * rows["torch"]["both_ms"]["median"]
    write(copy, CPU_FILE, data)
    sweep = result(copy, "cpu-sharpness-bf16.json")
    sweep["comparisons"][0]["rows"][2]["both_ms"]["median"] *= 2
    write(copy, "cpu-sharpness-bf16.json", sweep)
    picture = copy / publish.FIGURES / "measured-cpu-sharpness-bf16.png"
    before = picture.read_bytes()

    assert publish.main(["--check"], copy) == 1
    stale = capsys.readouterr().out
    for what in (picture.name, 'README.md, part "results"', '"tables"', '"targets"'):
        assert what in stale
    assert publish.main([], copy) == 0
    assert picture.read_bytes() != before
    assert "| 3.90× |" in (copy / "README.md").read_text()
    assert "3.90× (`cpu-4096x512x128256-bf16.json`) | **no** |" in (copy / "docs/performance.md").read_text()


def test_without_a_gpu_the_pages_say_so(copy):
    assert "No GPU has timed it yet" in (copy / "README.md").read_text()
    assert "not measured: no GPU" in (copy / "docs/performance.md").read_text()


def test_results_of_a_gpu_come_first(copy):
    write_gpu(copy)
    assert publish.main([], copy) == 0
    readme, page = ((copy / name).read_text() for name in ("README.md", "docs/performance.md"))
    assert "No GPU has timed it" not in readme
    assert "61 passed, 1 failed. Steps of `make gpu`: tuning: took too long." in " ".join(readme.split())
    assert 0 < readme.index(f"| {GPU}, 8192 × 4096 × 128256, bf16 |") < readme.index("| AMD EPYC, 4096")
    assert page.index("### `nvidia-h200.json`, llama3-8b") < page.index("### `cpu-")
    comparison = result(copy)["comparisons"][0]
    rows = {row["id"]: row for row in comparison["rows"]}
    ours = rows["torch"]
    ratio = rows["trl"]["both_ms"]["median"] / ours["both_ms"]["median"]
    forward = ours["forward_ms"]["median"] / comparison["bare_gemm_ms"]["median"]
    where = "(`nvidia-h200.json`, llama3-8b)"
    assert f"TRL's head: ≥ 2.5× | {ratio:.2f}× {where} | yes |" in page
    assert f"one bare GEMM: ≤ 1.15× | {forward:.2f}× {where} | **no** |" in page
    assert f"extra memory: ≤ 300 MiB | {ours['extra_bytes'] / 2**20:.0f} MiB" in page
    assert "not measured: no A100 |" in page and "against CCE: ≥ 2× | not measured |" in page


def test_a_launch_table_that_is_not_shipped_meets_no_target_and_is_named(copy):
    write_gpu(copy)
    data = result(copy, "nvidia-h200.json")
    data["reports"]["llama3-8b"]["launch_table"] = "launch-table.json"
    write(copy, "nvidia-h200.json", data)
    assert publish.main([], copy) == 0
    page = " ".join((copy / "docs/performance.md").read_text().split())
    assert "extra memory: ≤ 300 MiB | not measured" in page
    assert "launch table of the tuning run; `nvidia-h200.json`, llama3-8b." in page


def test_a_run_that_has_not_ended_is_refused_and_a_partial_file_of_make_gpu_passed_over(copy, capsys):
    write(copy, "nvidia-h200.partial.json", {"steps": []})
    assert publish.main(["--check"], copy) == 0
    write(copy, "cpu-new.json", result(copy) | {"finished": False})
    assert publish.main(["--check"], copy) == 2
    assert "cpu-new.json: its run has not ended" in capsys.readouterr().err


def test_rows_without_a_time_are_named_with_the_reason(copy):
    data = result(copy)
    data["comparisons"][0]["rows"].append(
        {"id": "cce", "peer": "CCE", "status": "failed", "note": "RuntimeError: no kernel image"}
    )
    write(copy, CPU_FILE, data)
    assert publish.main([], copy) == 0
    said = " ".join((copy / "docs/performance.md").read_text().split())
    assert (
        "focalkern (triton), focalkern (triton, exact): skipped: the triton backend needs a CUDA device."
        in said
    )
    assert "CCE: failed: RuntimeError: no kernel image." in said


@pytest.mark.parametrize("key", ["repeats", "both_ms.median", "tokens"])
def test_a_key_that_is_missing_is_an_error_that_names_the_file(key, copy, capsys):
    data = result(copy)
    comparison = data["comparisons"][0]
    if key == "repeats":
        del data["repeats"]
    elif key == "tokens":
        del comparison["tokens"]
    else:
        del comparison["rows"][2]["both_ms"]["median"]
    write(copy, CPU_FILE, data)
    before = [(copy / page).read_text() for page in PAGES]
    assert publish.main([], copy) == 2
    assert capsys.readouterr().err.startswith(f"{CPU_FILE}: no '{key.split('.')[-1]}'")
    assert [(copy / page).read_text() for page in PAGES] == before


def test_a_page_without_its_markers_is_an_error(copy, capsys):
    path = copy / "README.md"
    path.write_text(path.read_text().replace("<!-- measured: end results -->", ""))
    assert publish.main(["--check"], copy) == 2
    assert capsys.readouterr().err.startswith("README.md: needs one ")


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0123456, "0.0123"),
        (0.9996, "1.00"),
        (1.2, "1.20"),
        (99.96, "100"),
        (123.4, "123"),
        (16513.7, "16,500"),
    ],
)
def test_times_have_three_digits(value, text):
    assert publish.significant(value, 3) == text
