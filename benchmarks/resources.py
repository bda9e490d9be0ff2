"""What the kernels take of a GPU by ahead-of-time compilation: registers, shared memory, occupancy, code.

    python benchmarks/resources.py            # a table for sm_80 and sm_90
    python benchmarks/resources.py --write    # into benchmarks/compiled.json, which a test holds

No GPU is needed. The launches are those of a Llama-3 head (H = 4096, V = 128256) in bf16: forward, exact and
certified backward. As long as an entry of the launch table says `estimated`, it was chosen by these numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.aot import KernelLaunch, compile_launch, launch_head, machine_code, recorded_launches
from csrc_triton.launch import LAUNCH_TABLE, TMA_KERNELS, Launch, replace_entries

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

# As `launch_head` takes it. Beside Llama-3's 8192 rows: Gemma-2's softcap, and the tiles for few rows.
VARIANTS = {"plain": {}, "softcap": {"softcap": 30.0}, "512 rows": {"n": 512}}
# The tiles that a tuning run tries first where the kernels have a form with TMA.
TMA_TILES = dict.fromkeys(TMA_KERNELS, Launch(128, 256, 64, 8, 3, tma=True)) | {
    "bwd_dhidden": Launch(128, 128, 64, 8, 4, tma=True)
}


@dataclass(frozen=True)
class Compiled:
    """One kernel with one tile. `main_loop`, `tensor_core` and `others` count instructions per warp."""

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
    """Every GEMM-shaped kernel of the shipped table, and on Hopper of the tiles with TMA."""
    launches: dict[KernelLaunch, str] = {}
    for variant, options in VARIANTS.items():
        for launch in launches_of(arch, lambda options=options: launch_head(torch.bfloat16, **options)):
            launches.setdefault(launch, variant)
    if arch == "sm_90":
        for launch in with_entries(arch, TMA_TILES, lambda: launch_head(torch.bfloat16)):
            launches.setdefault(launch, "TMA")
    return [compiled(launch, variant, arch) for launch, variant in launches.items()]


def launches_of(arch: str, run: Callable[[], None]) -> list[KernelLaunch]:
    return [
        launch
        for launch in recorded_launches(arch, run)
        if "BLOCK_K" in dict(launch.constants) and launch.options
    ]


def with_entries(arch: str, entries: dict[str, Launch], run: Callable[[], None]) -> list[KernelLaunch]:
    shipped = LAUNCH_TABLE[arch][16]
    replace_entries(arch, 16, entries)
    try:
        return launches_of(arch, run)
    finally:
        LAUNCH_TABLE[arch][16] = shipped


def compiled(launch: KernelLaunch, variant: str, arch: str) -> Compiled:
    resources, options = compile_launch(launch, arch), dict(launch.options)
    programs = programs_per_multiprocessor(
        arch, options["num_warps"], resources.registers, resources.shared_bytes
    )
    main_loop, tensor_core, others = instruction_mix(machine_code(launch, arch))
    return Compiled(
        launch.name.removesuffix("_kernel"),
        variant,
        " × ".join(str(value) for name, value in launch.constants if re.fullmatch("BLOCK_[MNVK]", name)),
        options["num_warps"],
        options["num_stages"],
        resources.registers,
        resources.spilled_bytes,
        resources.shared_bytes,
        programs,
        programs * options["num_warps"] / MULTIPROCESSORS[arch].warps,
        main_loop,
        tensor_core,
        others,
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


def instruction_mix(code: list[str]) -> tuple[int, int, int]:
    """Instructions of the innermost loop with a tensor-core instruction, those of them, and all others."""
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
        return 0, 0, len(code)
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    return end - start, sum(is_product[start:end]), len(code) - (end - start)


def print_table(arch: str, kernels: list[Compiled]) -> None:
    columns = list(Compiled.__dataclass_fields__)
    table = Table(*columns, title=f"{arch}, triton {triton.__version__}", title_justify="left")
    for kernel in kernels:
        row = asdict(replace(kernel, occupancy=round(kernel.occupancy, 3)))
        table.add_row(*(str(row[column]) for column in columns))
    Console(width=170).print(table)


if __name__ == "__main__":
    sys.exit(main())
