"""What the kernels take of a GPU by ahead-of-time compilation: registers, shared memory, code.

    python benchmarks/resources.py            # a table for sm_80 and sm_90
    python benchmarks/resources.py --write    # into benchmarks/compiled.json, which a test holds

No GPU is needed. The launches are those of a Llama-3 head (H = 4096, V = 128256) in bf16: forward, exact and
certified backward, and the KL of two. Entries of the launch table that say `estimated` were chosen by these
numbers and by counted cycles.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import triton
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import parser_of
from benchmarks.aot import CompiledLaunch, compiled_launches, launch_head, launch_kl

BASELINE = Path(__file__).with_name("compiled.json")
ARCHS = ("sm_80", "sm_90")

# Beside Llama-3's 8192 rows: Gemma-2's softcap, the entropy and its like, and the tiles for few rows.
VARIANTS = {
    "plain": launch_head,
    "softcap": partial(launch_head, softcap=30.0),
    "outputs": partial(launch_head, outputs=True),
    "512 rows": partial(launch_head, n=512),
    "KL": launch_kl,
}


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {BASELINE.name}")
    options = parser.parse_args(argv)
    found = {arch: compiled_kernels(arch) for arch in tqdm(ARCHS, leave=False, disable=None)}
    for arch, kernels in found.items():
        table = pd.DataFrame(kernels)
        print(f"{arch}, triton {triton.__version__}", table.to_string(index=False), sep="\n", end="\n\n")
    if options.write:
        BASELINE.write_text(json.dumps({"triton": triton.__version__, "kernels": found}, indent=2) + "\n")
    return 0


def compiled_kernels(arch: str) -> list[dict[str, Any]]:
    """Every kernel that has an entry in the launch table, in all variants; the first that launches it."""
    found: dict[int, dict[str, Any]] = {}
    for variant, launch_all in VARIANTS.items():
        for launch in compiled_launches(arch, partial(launch_all, torch.bfloat16)):
            if launch.tile is not None and id(launch.kernel) not in found:
                found[id(launch.kernel)] = {
                    "kernel": launch.name.removesuffix("_kernel"),
                    "variant": variant,
                    **resources(launch),
                }
    return list(found.values())


def resources(launch: CompiledLaunch) -> dict[str, Any]:
    return {
        "tile": "{} × {} × {}".format(*launch.tile[:3]),
        "warps": launch.kernel.metadata.num_warps,
        "stages": launch.kernel.metadata.num_stages,
        "registers": launch.registers,
        "spilled_bytes": launch.spilled_bytes,
        "shared_bytes": launch.shared_bytes,
        **instruction_mix(launch.disassembled("-sass")),
    }


def instruction_mix(code: str) -> dict[str, int]:
    """Instructions of a warp, in the innermost loop with a tensor-core instruction and outside it."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?;)", code, re.M)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for end, (_, line) in enumerate(lines):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", line)
        start = place.get(int(target[1], 16), end) if target else end
        if any("MMA" in inside for _, inside in lines[start:end]):
            loops.append([inside for _, inside in lines[start : end + 1]])
    loop = min(loops, key=len, default=[])
    loads = [line for line in loop if re.search(r"\bLDG(STS)?\.", line)]
    return {
        "main_loop": len(loop),
        "tensor_core": sum("MMA" in line for line in loop),
        "narrow_loads": sum(".128" not in line for line in loads),  # less than 16 bytes a thread
        "others": len(lines) - len(loop),
    }


if __name__ == "__main__":
    sys.exit(main())
