"""What the kernels take of a GPU by ahead-of-time compilation: registers, shared memory, occupancy, code.

    python benchmarks/resources.py            # a table for sm_80 and sm_90
    python benchmarks/resources.py --write    # into benchmarks/compiled.json, which a test holds

No GPU is needed. The launches are those of a Llama-3 head (H = 4096, V = 128256) in bf16: forward, exact and
certified backward, and the KL of two. Entries of the launch table that say `estimated` were chosen by these
numbers and by counted cycles.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import triton
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.aot import CompiledLaunch, compiled_launches, launch_head, launch_kl

BASELINE = Path(__file__).with_name("compiled.json")


@dataclass(frozen=True)
class Multiprocessor:
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
    "softcap": functools.partial(launch_head, softcap=30.0),
    "outputs": functools.partial(launch_head, outputs=True),
    "512 rows": functools.partial(launch_head, n=512),
    "KL": launch_kl,
}


@dataclass(frozen=True)
class Compiled:
    """One kernel with one tile. The last four count instructions per warp."""

    kernel: str
    variant: str  # the first that launches it
    tile: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs: int  # per multiprocessor
    occupancy: float  # share of the warps that a multiprocessor can hold
    main_loop: int  # the innermost loop with tensor-core instructions
    tensor_core: int  # in it
    narrow_loads: int  # in it: from global memory, less than 16 bytes a thread
    others: int  # outside it: prologue and epilogue


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--write", action="store_true", help=f"into {BASELINE.name}")
    options = parser.parse_args(argv)
    found = {}
    for arch in tqdm(MULTIPROCESSORS, leave=False, disable=None):
        found[arch] = compiled_kernels(arch)
        print_table(arch, found[arch])
    if options.write:
        kernels = {arch: [asdict(kernel) for kernel in kernels] for arch, kernels in found.items()}
        text = json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=2)
        BASELINE.write_text(text + "\n")
    return 0


def compiled_kernels(arch: str) -> list[Compiled]:
    """Every kernel that has an entry in the launch table, in all variants."""
    found: dict[int, Compiled] = {}
    for variant, launch_all in VARIANTS.items():
        for launch in compiled_launches(arch, functools.partial(launch_all, torch.bfloat16)):
            if launch.tile is not None and id(launch.kernel) not in found:
                found[id(launch.kernel)] = compiled(launch, variant, arch)
    return list(found.values())


def compiled(launch: CompiledLaunch, variant: str, arch: str) -> Compiled:
    warps, registers, shared_bytes = launch.num_warps, launch.registers, launch.shared_bytes
    programs = programs_per_multiprocessor(arch, warps, registers, shared_bytes)
    return Compiled(
        launch.name.removesuffix("_kernel"),
        variant,
        f"{launch.tile.m} × {launch.tile.n} × {launch.tile.k}",
        warps,
        launch.num_stages,
        registers,
        launch.spilled_bytes,
        shared_bytes,
        programs,
        programs * warps / MULTIPROCESSORS[arch].warps,
        *instruction_mix(launch.machine_code),
    )


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


def instruction_mix(code: list[str]) -> tuple[int, int, int, int]:
    """Instructions of the innermost loop with a tensor-core instruction; of them tensor-core instructions and
    loads of less than 16 bytes from global memory; and all others."""
    address = [int(line.split("*/")[0], 16) for line in code]
    is_product = ["MMA" in line for line in code]
    loops = []
    for i, line in enumerate(code):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", line)
        if target and int(target[1], 16) <= address[i]:
            start = address.index(int(target[1], 16))
            if any(is_product[start:i]):
                loops.append((start, i + 1))
    if not loops:
        return 0, 0, 0, len(code)
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    narrow = sum(bool(re.search(r"\bLDG(STS)?\.", line)) and ".128" not in line for line in code[start:end])
    return end - start, sum(is_product[start:end]), narrow, len(code) - (end - start)


def print_table(arch: str, kernels: list[Compiled]) -> None:
    table = pd.DataFrame(map(asdict, kernels)).round({"occupancy": 3})
    print(f"{arch}, triton {triton.__version__}", table.to_string(index=False), sep="\n", end="\n\n")


if __name__ == "__main__":
    sys.exit(main())
