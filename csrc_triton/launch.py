"""Launch configurations of the GEMM-shaped kernels, per architecture and element width. A table, not an autotuner:
nothing is compiled or timed at start-up beyond what runs.

`estimated`: chosen from ahead-of-time compilation (registers, spills, shared memory, occupancy); `measured`: timed on
that device. Every entry is compiled by `tests/test_compile.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """An output tile of `block_m × block_n`, accumulated in steps of `block_k`."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    source: str = "estimated"


# Row tiles in flight together: their hidden states and one head tile stay in L2.
GROUP_M = 8

# What each kernel's tile is made of (m × n over k):
#   fwd, bwd_dz   rows × vocabulary over hidden size (block_n: a multiple of 128, the vocabulary block)
#   bwd_dweight   vocabulary × hidden size over rows
#   bwd_dhidden   rows × hidden size over vocabulary
KERNELS = ("fwd", "bwd_dz", "bwd_dweight", "bwd_dhidden")

_AMPERE = {
    16: {
        "fwd": Launch(128, 128, 64, 8, 3),
        "bwd_dz": Launch(128, 128, 64, 8, 3),
        "bwd_dweight": Launch(128, 128, 64, 8, 3),
        "bwd_dhidden": Launch(128, 128, 64, 8, 3),
    },
    32: {
        "fwd": Launch(64, 128, 32, 8, 3),
        "bwd_dz": Launch(64, 128, 32, 8, 3),
        "bwd_dweight": Launch(64, 128, 32, 8, 3),
        "bwd_dhidden": Launch(64, 128, 32, 8, 3),
    },
}
LAUNCH_TABLE: dict[str, dict[int, dict[str, Launch]]] = {
    "sm_80": _AMPERE,
    "sm_90": _AMPERE,
}
# The interpreter runs the kernels on the CPU for tests: small tiles, so that small shapes have several of them.
_INTERPRET = {width: dict.fromkeys(KERNELS, Launch(16, 128, 32, 1, 1)) for width in (16, 32)}


def launch_config(kernel: str, arch: str, element_bits: int) -> Launch:
    """The entry for an architecture (`sm_80`, …, or `interpret`); unknown ones take that of the nearest older."""
    if arch == "interpret":
        return _INTERPRET[element_bits][kernel]
    return LAUNCH_TABLE[nearest_arch(arch)][element_bits][kernel]


def nearest_arch(arch: str) -> str:
    known = sorted(LAUNCH_TABLE, key=_number)
    older = [name for name in known if _number(name) <= _number(arch)]
    return older[-1] if older else known[0]


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))
