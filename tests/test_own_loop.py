"""`examples/own_loop.py` on two ranks: whatever the engine, the losses of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

pytest.importorskip("deepspeed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import own_loop

WORKER = Path(__file__).with_name("own_loop_worker.py")
ROUNDING = 1e-5  # of losses after steps of AdamW, whose updates follow the signs of small gradients


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    path = tmp_path_factory.mktemp("own_loop") / "losses.json"
    run_ranks(WORKER, str(path))
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("engine", own_loop.ENGINES[1:])
def test_every_engine_prints_the_losses_of_one_process(engine, losses):
    assert len(set(losses["none"])) == len(losses["none"]) > 1
    assert losses[engine] == pytest.approx(losses["none"], rel=ROUNDING)


def test_an_engine_without_ranks_says_how_to_start_them(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(SystemExit, match="--engine ddp takes several ranks: torchrun"),
        own_loop.process_group("ddp"),
    ):
        pass


def test_ranks_without_an_engine_are_told_to_name_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["own_loop.py"])
    with pytest.raises(SystemExit, match="name an --engine"):
        own_loop.main()
