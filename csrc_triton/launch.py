"""Launch configurations of the GEMM-shaped kernels, per architecture and element width.

A table, not an autotuner: nothing is compiled or timed at start-up beyond what runs.

`estimated`: chosen from the compiled code (registers, spills, shared memory, counted cycles); `measured`:
timed on that device. `tests/test_compile.py` compiles them and holds them to the architecture's limits; the
entries hold for Triton 3.6 to 3.9 (`make test-tritons`).
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


# The vocabulary is described in blocks of this many entries: one lse per row and block.
VOCAB_BLOCK = 128
# Row tiles in flight together: their hidden states and one head tile stay in L2.
GROUP_M = 8

# What each kernel's tile is made of, m × n over k:
#   fwd, bwd_dz        rows × vocabulary over hidden size; n is a multiple of 128, the vocabulary block
#   certified_dz       rows that need one block of 128 vocabulary entries × the block over hidden size
#   certified_dweight  the block × hidden size over its rows; these are gathered, and the pipeliner spends
#                      half of num_stages on the index: 5 stages give it two tiles in flight, as 3 give others
#   certified_product  rows × hidden size over the block
#   kl_fwd, kl_bwd_dz  rows × vocabulary over the hidden size, for two models in turn: two tiles of logits are
#                      alive at a time; n is 128, the vocabulary block
# `*_narrow` where n is at most `NARROW_COLUMNS`, as is the rank of an update: the launcher cuts the tile's n
# to the next power of two. Such a product is bound by reading dz: small tiles, many at once.
# `*_small` where the large tile would spill registers: optional outputs, softcap (also in kl_fwd) or entropy
# gradient in the backward.
# `*_odd` where the hidden size is not a multiple of 64: masks, and loads that may not be vectorised.
# `*_few` where the kept blocks have at most `FEW_ROWS` rows on average: a tile of 128 rows would be mostly
# padding.
NARROW_COLUMNS = 128
FEW_ROWS = 48
KERNELS = (
    *("fwd", "fwd_small", "fwd_odd"),
    *("bwd_dz", "bwd_dz_small", "bwd_dz_odd"),
    *("kl_fwd", "kl_fwd_small", "kl_fwd_odd"),
    *("kl_bwd_dz", "kl_bwd_dz_small", "kl_bwd_dz_odd"),
    *("certified_dz", "certified_dz_few", "certified_dz_small", "certified_dz_odd"),
    *("certified_dweight", "certified_dweight_narrow", "certified_dweight_odd"),
    *("certified_product", "certified_product_few", "certified_product_narrow", "certified_product_odd"),
)

_NARROW = {
    "certified_dweight_narrow": Launch(128, 64, 32, 8, 5),
    "certified_product_narrow": Launch(64, 64, 32, 4, 3),
}
_FEW = {
    "certified_dz_few": Launch(32, 128, 64, 4, 4),
    "certified_product_few": Launch(32, 128, 32, 4, 3),
}
_SPECIAL = {
    "fwd_small": Launch(128, 128, 64, 8, 3),
    "bwd_dz_small": Launch(128, 128, 64, 8, 3),
    "kl_fwd_small": Launch(64, 128, 32, 8, 3),
    "kl_bwd_dz_small": Launch(64, 128, 32, 8, 3),
    "certified_dz_small": Launch(64, 128, 64, 8, 3),
    "fwd_odd": Launch(64, 128, 64, 8, 3),
    "bwd_dz_odd": Launch(64, 128, 64, 8, 3),
    "kl_fwd_odd": Launch(64, 128, 32, 8, 3),
    "kl_bwd_dz_odd": Launch(64, 128, 32, 8, 3),
    "certified_dz_odd": Launch(64, 128, 64, 8, 3),
    "certified_dweight_odd": Launch(128, 64, 32, 8, 5),
    "certified_product_odd": Launch(64, 128, 32, 8, 3),
    **_FEW,
    **_NARROW,
}
# fp32 products are three tf32 products of parts that take registers: small tiles. Where there are one or two
# stages, another one spills on some Triton of 3.6 to 3.9.
_FP32 = {
    "fwd": Launch(64, 128, 32, 8, 2),
    "fwd_small": Launch(32, 128, 32, 8, 3),
    "fwd_odd": Launch(32, 128, 32, 8, 3),
    "bwd_dz": Launch(64, 128, 32, 8, 3),
    "bwd_dz_small": Launch(32, 128, 32, 8, 3),
    "bwd_dz_odd": Launch(32, 128, 32, 8, 3),
    "kl_fwd": Launch(64, 128, 16, 8, 3),
    "kl_fwd_small": Launch(32, 128, 16, 8, 2),
    "kl_fwd_odd": Launch(32, 128, 16, 8, 1),
    "kl_bwd_dz": Launch(64, 128, 16, 8, 2),
    "kl_bwd_dz_small": Launch(32, 128, 16, 8, 3),
    "kl_bwd_dz_odd": Launch(32, 128, 16, 8, 2),
    "certified_dz": Launch(64, 128, 32, 8, 3),
    "certified_dz_small": Launch(32, 128, 32, 8, 3),
    "certified_dz_odd": Launch(32, 128, 32, 8, 3),
    "certified_dweight": Launch(128, 64, 32, 8, 5),
    "certified_dweight_odd": Launch(128, 32, 32, 8, 3),
    "certified_product": Launch(64, 128, 32, 8, 3),
    "certified_product_odd": Launch(64, 64, 32, 8, 3),
    **_FEW,
    "certified_dz_few": Launch(32, 128, 32, 8, 2),
    **_NARROW,
}
# wgmma reads the parts of one operand from shared memory; 128 rows share each read. It cannot read them
# transposed: certified_product takes 32 rows, for which the compiler takes mma.sync.
_FP32_HOPPER = {
    **_FP32,
    "fwd": Launch(128, 128, 16, 8, 3),
    "bwd_dz": Launch(128, 128, 32, 8, 2),
    "kl_fwd": Launch(128, 128, 16, 8, 3),
    "kl_fwd_odd": Launch(32, 128, 16, 8, 2),
    "kl_bwd_dz": Launch(128, 128, 16, 8, 3),
    "certified_dz": Launch(128, 128, 32, 8, 2),
    "certified_dweight": Launch(128, 32, 32, 8, 5),
    "certified_product": Launch(32, 128, 32, 4, 3),
}
_FP32_BLACKWELL = {**_FP32, "certified_dz": Launch(32, 128, 32, 8, 3)}
# mma.sync: block_k 32 keeps the 128 × 256 tile below 255 registers. Consumer GPUs, too, take these tiles: at
# most 99 KB of shared memory.
_AMPERE = {
    "fwd": Launch(128, 256, 32, 8, 4),
    "bwd_dz": Launch(128, 256, 32, 8, 4),
    "kl_fwd": Launch(128, 128, 32, 8, 4),
    "kl_bwd_dz": Launch(128, 128, 32, 8, 4),
    "certified_dz": Launch(128, 128, 32, 4, 4),
    "certified_dweight": Launch(128, 128, 32, 4, 5),
    "certified_product": Launch(64, 256, 32, 4, 3),
    **_SPECIAL,
}
# wgmma reads its operands from shared memory: fewer registers, deeper tiles. certified_dz with 3 stages
# leaves room for a second program, which multiplies while the first gathers its rows.
_HOPPER = {
    "fwd": Launch(128, 256, 64, 8, 3),
    "bwd_dz": Launch(128, 256, 64, 8, 3),
    "kl_fwd": Launch(128, 128, 64, 8, 4),
    "kl_bwd_dz": Launch(128, 128, 64, 8, 4),
    "certified_dz": Launch(128, 128, 64, 8, 3),
    "certified_dweight": Launch(128, 256, 64, 8, 5),
    "certified_product": Launch(128, 128, 64, 4, 3),
    **_SPECIAL,
}
# The accumulator lies in tensor memory; read back whole for the epilogue, 128 × 256 of it spills.
_BLACKWELL = {
    **_HOPPER,
    "fwd": Launch(128, 128, 64, 8, 4),
    "bwd_dz": Launch(128, 128, 64, 8, 4),
    "kl_fwd": Launch(64, 128, 64, 8, 4),
}

LAUNCH_TABLE: dict[str, dict[int, dict[str, Launch]]] = {
    "sm_80": {16: _AMPERE, 32: _FP32},
    "sm_86": {16: _AMPERE, 32: _FP32},
    "sm_89": {16: _AMPERE, 32: _FP32},
    "sm_90": {16: _HOPPER, 32: _FP32_HOPPER},
    "sm_100": {16: _BLACKWELL, 32: _FP32_BLACKWELL},
    "sm_120": {16: _AMPERE, 32: _FP32},
}
# dhidden is made in rounds of a multiple of this many columns.
PRODUCT_COLUMNS = 256
# Bytes of products, and of their sums, that are to stay in the L2 cache: 40 MB on an A100. dz and weight pass
# through it meanwhile, 20 MB a part, and would push them out but for the products' priority. The memory of
# sm_90 and sm_100 is fast enough for fewer, larger launches; the L2 cache of sm_86 is too small.
PRODUCTS_IN_L2 = dict.fromkeys(("sm_80", "sm_89", "sm_120"), 32 * 2**20)
# The interpreter runs the kernels on the CPU, for tests: tiles small enough that small shapes have several.
_INTERPRET = dict.fromkeys(KERNELS, Launch(16, 128, 32, 1, 1))


def launch_config(kernel: str, arch: str, element_bits: int) -> Launch:
    """The entry for an architecture, `sm_80` or `interpret`; one not in the table takes the nearest
    older's."""
    if arch == "interpret":
        return _INTERPRET[kernel]
    return LAUNCH_TABLE[_nearest(arch)][element_bits][kernel]


def _nearest(arch: str) -> str:
    def number(name: str) -> int:
        return int(name.removeprefix("sm_"))

    known = sorted(LAUNCH_TABLE, key=number)
    return next((name for name in reversed(known) if number(name) <= number(arch)), known[0])
