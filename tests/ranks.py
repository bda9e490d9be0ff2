"""Runs a script in several processes that make up one gloo group, as torchrun or accelerate starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run_ranks(script: Path, *arguments: str, launcher: tuple[str, ...] = TORCHRUN, timeout: int = 300) -> str:
    """What the processes printed; where one of them failed, AssertionError with it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Several processes share the cores; no extension of DeepSpeed's is compiled.
    environment |= {"OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, str(script), *arguments]
    run = subprocess.run(
        command,
        timeout=timeout,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:]
    return run.stdout
