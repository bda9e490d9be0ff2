"""Registers, spills, shared memory, occupancy and code of the shipped tiles do not get worse unnoticed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import INTERPRETED

pytest.importorskip("triton", reason="no triton on this platform: nothing to compile")
if INTERPRETED:
    pytest.skip("kernels are decorated for the interpreter in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton

from benchmarks import resources

BASELINE = json.loads(resources.BASELINE.read_text())
UPDATE = "measure, then python benchmarks/resources.py --write"


@pytest.mark.skipif(
    triton.__version__ != BASELINE["triton"], reason=f"compiled by triton {BASELINE['triton']}"
)
@pytest.mark.parametrize("arch", resources.MULTIPROCESSORS)
def test_the_shipped_tiles_take_no_more_than_before(arch):
    def by_name(kernels: list[dict]) -> dict[tuple, dict]:
        names = ("kernel", "variant", "tile", "warps", "stages")
        return {tuple(kernel[name] for name in names): kernel for kernel in kernels}

    found = by_name([vars(kernel) for kernel in resources.compiled_kernels(arch)])
    before = by_name(BASELINE["kernels"][arch])
    assert found.keys() == before.keys(), (
        f"other kernels or tiles than in {resources.BASELINE.name}: {UPDATE}"
    )
    for name, kernel in found.items():
        for resource in ("registers", "spilled_bytes", "shared_bytes"):
            assert kernel[resource] <= before[name][resource], f"{resource} of {name}: {UPDATE}"
            # A baseline far above the kernel would hold nothing.
            assert kernel[resource] >= 0.9 * before[name][resource], f"{resource} of {name}: {UPDATE}"
        assert kernel["occupancy"] == before[name]["occupancy"], f"occupancy of {name}: {UPDATE}"
        for code in ("main_loop", "others"):  # the compiler may move a little of it
            assert kernel[code] <= 1.05 * before[name][code], f"{code} of {name}: {UPDATE}"
        assert kernel["narrow_loads"] == before[name]["narrow_loads"], f"narrow_loads of {name}: {UPDATE}"


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared_bytes", "programs"),
    [
        ("sm_80", 8, 255, 98304, 1),  # 65536 registers hold one program of 8 · 32 · 256
        ("sm_80", 4, 128, 61440, 2),  # 164 KiB hold two of 61 KiB
        ("sm_90", 4, 128, 61440, 3),  # 228 KiB hold three
        ("sm_90", 8, 120, 98304, 2),
        ("sm_90", 4, 32, 0, 16),  # 64 warps
        ("sm_90", 1, 32, 0, 32),
    ],
)
def test_programs_per_multiprocessor(arch, warps, registers, shared_bytes, programs):
    assert resources.programs_per_multiprocessor(arch, warps, registers, shared_bytes) == programs


def test_instructions_are_counted_inside_and_outside_the_innermost_loop_with_products():
    code = [
        "0000*/ MOV R1, c ;",
        "0010*/ LDGSTS ;",  # outer loop
        "0020*/ HGMMA.64x256x16 ;",  # main loop
        "0030*/ LDGSTS.E.BYPASS.128 [R1], [R2.64] ;",
        "0040*/ LDG.E.U16 R3, [R4.64] ;",
        "0050*/ @!P0 BRA 0x20 ;",
        "0060*/ MUFU.EX2 ;",
        "0070*/ @P1 BRA 0x10 ;",
        "0080*/ EXIT ;",
        "0090*/ BRA 0x90 ;",
    ]
    assert resources.instruction_mix(code) == (4, 1, 1, 6)
    assert resources.instruction_mix(code[-2:]) == (0, 0, 0, 2)
