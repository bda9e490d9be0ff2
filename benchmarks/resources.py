"""What the kernels take of a GPU by ahead-of-time compilation: registers, shared memory, occupancy, code.

    python benchmarks/resources.py            # a table for sm_80 and sm_90
    python benchmarks/resources.py --write    # into benchmarks/compiled.json, which a test holds

No GPU is needed. The launches are those of a Llama-3 head (H = 4096, V = 128256) in bf16: forward, exact and
certified backward, and the KL of two. Entries of the launch table that say `estimated` were chosen by these
numbers and by counted cycles.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import triton
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.aot import CompiledLaunch, compiled_launches, launch_head, launch_kl

BASELINE = Path(__file__).with_name("compiled.json")


class Multiprocessor(NamedTuple):
    """What one multiprocessor has: CUDA C++ programming guide, technical specifications."""

    warps: int
    programs: int
    shared_bytes: int
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 1024),
    "sm_90": Multiprocessor(64, 32, 228 * 1024),
}
SYSTEM_SHARED_BYTES = 1024  # of each program
REGISTERS_AT_ONCE = 256  # a warp's registers are given out in multiples of this

# Beside Llama-3's 8192 rows: Gemma-2's softcap, the entropy and its like, and the tiles for few rows.
VARIANTS = {
    "plain": launch_head,
    "softcap": partial(launch_head, softcap=30.0),
    "outputs": partial(launch_head, outputs=True),
    "512 rows": partial(launch_head, n=512),
    "KL": launch_kl,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--write", action="store_true", help=f"into {BASELINE.name}")
    options = parser.parse_args(argv)
    found = {arch: compiled_kernels(arch) for arch in tqdm(MULTIPROCESSORS, leave=False, disable=None)}
    for arch, kernels in found.items():
        table = pd.DataFrame(kernels).round({"occupancy": 3})
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
                    **resources(launch, arch),
                }
    return list(found.values())


def resources(launch: CompiledLaunch, arch: str) -> dict[str, Any]:
    warps, tile = launch.kernel.metadata.num_warps, launch.tile
    programs = programs_per_multiprocessor(arch, warps, launch.registers, launch.shared_bytes)
    return {
        "tile": f"{tile.m} × {tile.n} × {tile.k}",
        "warps": warps,
        "stages": launch.kernel.metadata.num_stages,
        "registers": launch.registers,
        "spilled_bytes": launch.spilled_bytes,
        "shared_bytes": launch.shared_bytes,
        "programs": programs,  # per multiprocessor
        "occupancy": programs * warps / MULTIPROCESSORS[arch].warps,
        **instruction_mix(launch.disassembled("-sass")),
    }


def programs_per_multiprocessor(arch: str, warps: int, registers: int, shared_bytes: int) -> int:
    """How many programs a multiprocessor holds at a time: what its scarcest resource allows."""
    has = MULTIPROCESSORS[arch]
    per_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    return min(
        has.programs,
        has.warps // warps,
        has.registers // (per_warp * warps),
        has.shared_bytes // (shared_bytes + SYSTEM_SHARED_BYTES),
    )


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
