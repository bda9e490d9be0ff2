"""Runs a script in two processes that make up one gloo group, forked here or as accelerate starts them.

`run_ranks` is called by the tests; what it starts is this file, which runs the script on every rank.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

RANKS = 2
# Several processes share the cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT |= {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}


def run_ranks(script: Path, *arguments: str, launcher: tuple[str, ...] = (), timeout: int = 1800) -> str:
    """What the processes printed; where one of them failed, AssertionError with it.

    They are forks of one process, which has imported all that the script imports, unless a launcher starts
    them: one by one they take twice as long to start.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [*(launcher or (sys.executable,)), __file__, str(script), *arguments]
    run = subprocess.run(
        command,
        timeout=timeout,
        env=environment | ENVIRONMENT,
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
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    # PyTorch 2.13: now and then a thread of gloo's outlives the interpreter, which is aborted for it.
    os._exit(0)


def import_what_is_imported_by(script: str) -> None:
    for node in ast.parse(Path(script).read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            # Found by the script alone, once it has set its path: the ranks import it one by one.
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(name)


def fork_ranks(script: str) -> int:
    """The exit code of the first rank that fails, which ends the others, or 0."""
    from torch.distributed import TCPStore

    import_what_is_imported_by(script)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # on a port that is free
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(RANKS)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = []
    for rank in range(RANKS):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                run_on_this_rank(script)
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    if "RANK" in os.environ:
        run_on_this_rank(sys.argv[0])
    else:
        sys.exit(fork_ranks(sys.argv[0]))
