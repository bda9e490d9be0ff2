"""Heads split by vocabulary, sequences cut over ranks, ranks without pairs, and ranks that die.

Each group of checks is one start of `parallel_worker`, each check a test case that looks for its line.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import parallel_dying
import parallel_sequences
import parallel_vocabulary
import pytest
from conftest import INTERPRETED
from parallel_common import CHECKS

WORKER = Path(__file__).with_name("parallel_worker.py")
TIMEOUT = 240


def cases(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", CHECKS[group])


@pytest.fixture(scope="module")
def output_of(tmp_path_factory):
    """What the ranks of a group of checks printed; they run once."""

    @cache
    def run(group: str, ranks: int = 2) -> str:
        # The cores are shared. The backend is Triton's where its kernels are interpreted.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(WORKER), group, str(ranks), str(tmp_path_factory.mktemp("ranks"))]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = f"{process.communicate()[0]}\nkilled after {TIMEOUT} s"
        return output

    return run


def assert_done(output: str, name: str, ranks: int = 2) -> None:
    lines = output.splitlines()
    if all(f"rank {rank} done: {name}" in lines for rank in range(ranks)):
        return
    failed = [
        name for start, _, name in (line.partition("failed: ") for line in lines) if start[:4] == "rank"
    ]
    if failed and name not in failed:
        pytest.fail(f"not reached: {failed[0]!r} failed before it")
    pytest.fail(output[-6000:])


@cases(parallel_vocabulary.TORCH)
def test_a_head_split_by_vocabulary_is_that_of_one_process(name, output_of):
    assert_done(output_of(parallel_vocabulary.TORCH), name)


@pytest.mark.skipif(not INTERPRETED, reason="of Triton's kernels on CPU tensors")
@cases(parallel_vocabulary.TRITON)
def test_a_head_split_by_vocabulary_is_that_of_one_process_with_triton(name, output_of, backend):
    assert_done(output_of(parallel_vocabulary.TRITON), name)


@cases(parallel_sequences.SEQUENCES)
def test_slices_of_sequences_make_up_the_batch_of_one_process(name, output_of):
    assert_done(output_of(parallel_sequences.SEQUENCES), name)


@cases(parallel_sequences.DATA)
def test_ranks_with_few_pairs_or_none_make_up_the_batch_of_one_process(name, output_of):
    assert_done(output_of(parallel_sequences.DATA), name)


@pytest.mark.slow
@cases(parallel_sequences.GRID)
def test_both_divisions_of_four_ranks_are_one_process(name, output_of):
    assert_done(output_of(parallel_sequences.GRID, 4), name, ranks=4)


@pytest.mark.parametrize("case", parallel_dying.CASES)
def test_a_rank_that_dies_or_stops_ends_the_others(case, output_of):
    lines = output_of("dying").splitlines()
    ends = next((line.removeprefix(f"{case}: [") for line in lines if line.startswith(f"{case}: [")), None)
    assert ends is not None, "\n".join(lines)[-6000:]
    exit_code, exit_code_of_other, seconds = json.loads("[" + ends)
    assert exit_code > 0
    assert exit_code_of_other == (parallel_dying.DEAD if "dies" in case else None)
    # All the cases run at once, on few cores.
    assert seconds < parallel_dying.TIMEOUT + 15
    message = next(line for line in lines if line.startswith(f"{case}: rank 0 ends with RuntimeError: "))
    # Gloo has two ways to say it: "Timed out waiting", "Application timeout caused pair closure".
    assert (re.search("timed out|timeout", message, re.IGNORECASE) is not None) == ("stops" in case), message
