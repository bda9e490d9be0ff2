"""The pages hold the numbers of the result files: `benchmarks/report.py`, on copies and on the repository."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import report

LLAMA = f"{report.EPYC[0]}.json"
GPU = "NVIDIA H200"


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """The pages, results and figures. The plans, which take ten seconds, are as they stand there."""
    begin, end = report.markers("plan")
    plans = (report.ROOT / "docs/training.md").read_text().split(begin)[1].split(end)[0].strip()
    monkeypatch.setattr(report, "plans", lambda: plans)
    for page in report.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(report.ROOT / page, tmp_path / page)
    for folder in (report.RESULTS, report.FIGURE.parent):
        shutil.copytree(report.ROOT / folder, tmp_path / folder)
    return tmp_path


def result(root: Path, name: str = LLAMA) -> dict:
    return json.loads((root / report.RESULTS / name).read_text())


def test_the_repository_is_up_to_date(capsys):
    pytest.importorskip("trl", reason="the plans need it")
    assert report.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "page, part", [(page, part) for page, parts in report.PAGES.items() for part in parts]
)
def test_check_names_the_part_in_which_a_number_was_changed(page, part, copy, capsys):
    path = copy / page
    text = path.read_text()
    begin, end = report.markers(part)
    place = text.index(begin) + re.search(rf"\w(?=\W*{end})", text[text.index(begin) :]).start()
    changed = text[:place] + ("2" if text[place] == "1" else "1") + text[place + 1 :]
    path.write_text(changed)
    assert report.main(["--check"], copy) == 1
    assert capsys.readouterr().out == f'{page}, part "{part}" is out of date: make report\n'
    assert path.read_text() == changed
    assert report.main([], copy) == 0
    assert path.read_text() == text


def test_new_results_reach_tables_and_figures_and_text_outside_the_markers_stays(copy, capsys):
    for name in (LLAMA, f"{report.SHARPNESS}.json"):
        data = result(copy, name)
        rows = {row["id"]: row for row in data["comparisons"][0]["rows"]}
        rows["trl"]["both_ms"]["median"] = 3.9 * rows["torch"]["both_ms"]["median"]
        report.write_json(data, copy / report.RESULTS / name)
    page, figure = copy / "README.md", copy / report.FIGURE
    page.write_text(f"Above.\n{page.read_text()}Below.")
    before = figure.read_bytes()

    assert report.main(["--check"], copy) == 1
    stale = capsys.readouterr().out
    assert all(what in stale for what in ('README.md, part "results"', '"table"', '"sharpness"', figure.name))
    assert figure.read_bytes() == before
    assert report.main([], copy) == 0 and report.main(["--check"], copy) == 0
    assert figure.read_bytes() != before
    text = page.read_text()
    assert "| 3.90× |" in text and text.startswith("Above.\n") and text.endswith("Below.")


def test_results_of_a_gpu_come_first(copy):
    assert "not been timed on a GPU" in (copy / "README.md").read_text()
    cpu, found = result(copy)["device"], result(copy) | {"device": GPU}
    for row, name in zip(found["comparisons"][0]["rows"], ("triton", "triton-exact"), strict=False):
        row |= {"id": name, "peer": name}
    tests = {"passed": 61, "failed": {"test_a": "wrong"}, "skipped": {}}
    data = {"device": GPU, "gpu_tests": tests, "reports": {"shipped": found}}
    report.write_json(data, copy / report.RESULTS / "nvidia-h200.json")
    assert report.main([], copy) == 0
    readme, page = ((copy / name).read_text() for name in ("README.md", "docs/performance.md"))
    assert "not been timed" not in readme and f"{GPU}: 61 GPU tests passed, 1 failed." in readme
    assert 0 < readme.index(f"| {GPU}, 1024 × 4096 × 128256, bf16 |") < readme.index(f"| {cpu}, 1024")
    assert 0 < page.index(f"| {GPU}, 1024 × 4096 × 128256, bf16, kept") < page.index(f"| {cpu}, 1024")
    assert "\n| triton |" in page


def test_an_unfinished_run_and_a_page_without_its_markers_are_refused(copy):
    page = (copy / "README.md").read_text()
    (copy / "README.md").write_text(page.replace("<!-- measured: end results -->", ""))
    with pytest.raises(SystemExit, match=r"README\.md: needs one "):
        report.main(["--check"], copy)
    report.write_json(result(copy) | {"finished": False}, copy / report.RESULTS / "cpu-new.json")
    with pytest.raises(SystemExit, match=r"cpu-new\.json: its run has not ended"):
        report.main(["--check"], copy)


def test_tables_fit_into_80_columns_on_a_terminal_and_have_six_columns_on_a_page():
    for comparison in report.Results(report.ROOT).comparisons(*report.EPYC, report.SMALL, report.SHARPNESS):
        said = report.terminal(comparison)
        assert max(map(len, said.splitlines())) <= 80, said
        ours = next(row for row in comparison["rows"] if row["id"] == "torch")
        (line,) = (line for line in said.splitlines() if line.startswith("focalkern (torch) "))
        times = [report.duration(ours[f"{part}_ms"]["median"]) for part in ("forward", "both")]
        assert " ".join(line.split()).startswith(f"focalkern (torch) {' '.join(times)} 1.00×")
    for page in report.PAGES:
        measured = re.findall("measured: begin.*?measured: end", (report.ROOT / page).read_text(), re.DOTALL)
        assert all(line.count("|") <= 7 for part in measured for line in part.splitlines())
