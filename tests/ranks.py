"""Runs a script in several processes that make up one gloo group, as torchrun or accelerate starts them.

`run_ranks` is called by the tests; what it starts on each rank is this file, which runs the script.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run_ranks(script: Path, *arguments: str, launcher: tuple[str, ...] = TORCHRUN, timeout: int = 300) -> str:
    """What the processes printed; where one of them failed, AssertionError with it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Several processes share the cores.
    environment |= {"OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, __file__, str(script), *arguments]
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


def compile_no_deepspeed_ops() -> None:
    """Else an extension is compiled on a machine's first run, whatever `DS_BUILD_OPS` says."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_on_this_rank(script: str) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        compile_no_deepspeed_ops()
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    # PyTorch 2.13: now and then a thread of gloo's outlives the interpreter, which is aborted for it.
    os._exit(0)


if __name__ == "__main__":
    del sys.argv[0]
    run_on_this_rank(sys.argv[0])
