"""The losses of `examples/own_loop.py` under every engine, on two ranks; started by `test_own_loop`."""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import own_loop
import torch
import torch.distributed as dist
from ranks import compile_no_deepspeed_ops

STEPS = 3


def main(path: str) -> None:
    compile_no_deepspeed_ops()
    # Not the whole standard library, which takes each rank seconds to read.
    few = functools.partial(own_loop.docstring_pairs, library=Path(asyncio.__file__).parent)
    own_loop.docstring_pairs = few
    found = {"none": own_loop.train("none", STEPS, torch.device("cpu"))}
    with own_loop.process_group("ddp") as device:
        # The last one stays in transformers' attention.
        for engine in own_loop.ENGINES[1:]:
            found[engine] = own_loop.train(engine, STEPS, device)
        if dist.get_rank() == 0:
            Path(path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
