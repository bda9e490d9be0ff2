"""Registers, spills, shared memory and code of the shipped tiles do not get worse unnoticed."""

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
IDENTITY = ("kernel", "variant", "tile", "warps", "stages")


def by_name(kernels: list[dict]) -> dict[tuple, dict]:
    return {tuple(kernel[name] for name in IDENTITY): kernel for kernel in kernels}


@pytest.mark.skipif(
    triton.__version__ != BASELINE["triton"], reason=f"compiled by triton {BASELINE['triton']}"
)
@pytest.mark.parametrize("arch", resources.ARCHS)
def test_the_shipped_tiles_take_no_more_than_before(arch):
    found, before = by_name(resources.compiled_kernels(arch)), by_name(BASELINE["kernels"][arch])
    assert found.keys() == before.keys()
    for name, kernel in found.items():
        for what, old in before[name].items():
            said = f"{what} of {name}: measure, then python benchmarks/resources.py --write"
            if what in ("main_loop", "others"):  # the compiler may move a little of it
                assert kernel[what] <= 1.05 * old, said
            elif what in ("registers", "spilled_bytes", "shared_bytes"):
                # A baseline far above the kernel would hold nothing.
                assert 0.9 * old <= kernel[what] <= old, said
            elif what != "tensor_core":
                assert kernel[what] == old, said


def test_instructions_are_counted_inside_and_outside_the_innermost_loop_with_products():
    code = [
        "        /*0000*/    MOV R1, c ;",
        "        /*0010*/    LDGSTS ;",  # outer loop
        "        /*0020*/    HGMMA.64x256x16 ;",  # main loop
        "        /*0030*/    LDGSTS.E.BYPASS.128 [R1], [R2.64] ;",
        "        /*0040*/    LDG.E.U16 R3, [R4.64] ;",
        "        /*0050*/    @!P0 BRA 0x20 ;",
        "        /*0060*/    MUFU.EX2 ;",
        "        /*0070*/    @P1 BRA 0x10 ;",
        "        /*0080*/    EXIT ;",
        "        /*0090*/    BRA 0x90 ;",
    ]
    assert list(resources.instruction_mix("\n".join(code)).values()) == [4, 1, 1, 6]
    assert list(resources.instruction_mix("\n".join(code[-2:])).values()) == [0, 0, 0, 2]
