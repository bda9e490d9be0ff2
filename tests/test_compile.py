"""Every kernel, as its launcher launches it and with every entry of the launch table, compiles for GPUs.

None needs to be there. Held: no spilled registers, shared memory within the architecture's limit, tensor
cores used.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton", reason="no triton on this platform: nothing to compile")
if INTERPRETED:
    pytest.skip("kernels are decorated for the interpreter in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.aot import (
    compile_launch,
    float32_matmul_precision,
    launch_head,
    launch_kl,
    recorded_launches,
)
from benchmarks.resources import TMA_TILES
from csrc_triton.launch import KERNELS, LAUNCH_TABLE, launch_config
from focalkern.backends import PairObjective, triton_backend
from focalkern.layout import Sequences

# CUDA programming guide, table of compute capabilities: maximum shared memory per thread block.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
}
BF16 = torch.bfloat16
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "sm_120": "mma.sync"}
GEMM_KERNELS = ("fwd", "dz", "dweight", "bwd_dhidden", "certified_product")

VARIANTS = {
    "plain": {},
    "vocabulary not a multiple of 16": {"vocab_size": 50257},
    "softcap, bias, odd hidden size": {"softcap": 30.0, "bias": True, "hidden_size": 4100},
    "few rows": {"n": 200},
    "few rows, softcap, bias": {"n": 200, "softcap": 30.0, "bias": True},
    "outputs and entropy gradient": {"outputs": True},
    "everything, odd hidden size": {"softcap": 30.0, "bias": True, "hidden_size": 4100, "outputs": True},
    "update of rank 16": {"rank": 16},
    "update of rank 12": {"rank": 12},
    "update of rank 200, softcap, bias": {"rank": 200, "softcap": 30.0, "bias": True},
    "update of rank 40, everything, odd hidden size": {
        "rank": 40,
        "softcap": 30.0,
        "bias": True,
        "hidden_size": 4100,
        "outputs": True,
    },
    "a shard of the vocabulary": {"is_shard": True, "vocab_size": 16032},
    "a shard, few rows, an update": {"is_shard": True, "vocab_size": 16032, "rank": 16, "n": 200},
}


KL_VARIANTS = {
    "plain": {},
    "vocabulary not a multiple of 16": {"vocab_size": 50257},
    "a larger reference with a bias": {"ref_hidden_size": 8192, "ref_bias": True},
    "reference of odd hidden size": {"ref_hidden_size": 4100},
    "softcap, biases, odd hidden sizes": {
        "softcap": 30.0,
        "bias": True,
        "ref_bias": True,
        "hidden_size": 4100,
        "ref_hidden_size": 4100,
    },
    "softcap": {"softcap": 30.0},
}


def check_head_kernels(arch, dtype, precision="highest", launch=launch_head, at_least=9, **variant):
    with float32_matmul_precision(precision):
        launches = recorded_launches(arch, lambda: launch(dtype, **variant))
    has_tensor_cores = dtype != torch.float32 or precision != "highest"
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(compile_launch, launches, [arch] * len(launches))
    for launch, resources in zip(launches, compiled, strict=True):
        print(f"{arch} {launch}: {resources.registers} registers, {resources.shared_bytes} bytes shared")
        assert resources.spilled_bytes == 0, f"{launch} spills {resources.spilled_bytes} bytes"
        assert resources.shared_bytes <= SHARED_LIMIT[arch], str(launch)
        is_gemm = launch.name.removesuffix("_kernel").endswith(GEMM_KERNELS)
        if is_gemm and has_tensor_cores:
            # wgmma takes tiles of 64 rows; smaller ones have the instruction of older architectures.
            small = dict(launch.constants).get("BLOCK_M", 64) < 64
            instruction = "mma.sync" if small else TENSOR_CORE.get(arch, "mma.sync")
            assert instruction in resources.ptx, f"{launch} does not use tensor cores"
    # A shard's block statistics are reduced together with those of the others.
    assert len(launches) >= at_least - variant.get("is_shard", False)


def check_kl_kernels(arch, dtype, precision="highest", **variant):
    check_head_kernels(arch, dtype, precision, launch_kl, at_least=5, **variant)


def cases(variants: dict, of_fp16: set[str]) -> list[tuple[torch.dtype, str]]:
    """All variants in bf16 and fp32; of fp16, whose kernels differ from bf16's in one instruction, a few."""
    both = [(dtype, variant) for dtype in (torch.bfloat16, torch.float32) for variant in variants]
    return both + [(torch.float16, variant) for variant in variants if variant in of_fp16]


@pytest.mark.parametrize(
    ("dtype", "variant"), cases(VARIANTS, {"plain", "everything, odd hidden size"}), ids=str
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_head_kernels_compile_without_spills(arch, dtype, variant):
    check_head_kernels(arch, dtype, **VARIANTS[variant])


def test_few_rows_have_small_tiles_for_kept_blocks_and_several_programs_per_sum_of_dhidden():
    launches = {
        launch.name: launch for launch in recorded_launches("sm_80", lambda: launch_head(BF16, n=200))
    }
    assert dict(launches["certified_dz_kernel"].constants)["BLOCK_M"] == 32
    assert dict(launches["certified_product_kernel"].constants)["BLOCK_M"] == 32
    assert "linear_logps_bwd_dhidden_sum_kernel" in launches
    many = {launch.name for launch in recorded_launches("sm_80", lambda: launch_head(BF16))}
    assert "linear_logps_bwd_dhidden_sum_kernel" not in many


@pytest.mark.parametrize(
    ("dtype", "variant"),
    [
        (torch.bfloat16, "plain"),
        (torch.bfloat16, "few rows"),
        (torch.bfloat16, "softcap, bias"),
        (torch.float16, "plain"),
    ],
    ids=str,
)
def test_kernels_with_tma_compile_for_hopper_without_spills(dtype, variant, monkeypatch):
    entries = LAUNCH_TABLE["sm_90"][16]
    monkeypatch.setitem(LAUNCH_TABLE["sm_90"], 16, entries | TMA_TILES)
    options = {"plain": {}, "few rows": {"n": 200}, "softcap, bias": {"softcap": 30.0, "bias": True}}[variant]
    launches = recorded_launches("sm_90", lambda: launch_head(dtype, **options))
    by_tma = [launch for launch in launches if "_tma_" in launch.name]
    assert len(by_tma) == (3 if "softcap" in options else 4)
    for launch in by_tma:
        resources = compile_launch(launch, "sm_90")
        assert resources.spilled_bytes == 0, f"{launch} spills {resources.spilled_bytes} bytes"
        assert resources.shared_bytes <= SHARED_LIMIT["sm_90"]
        assert "wgmma" in resources.ptx and "cp.async.bulk.tensor" in resources.ptx


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_fp32_kernels_use_tensor_cores_when_tf32_is_allowed(arch):
    check_head_kernels(arch, torch.float32, precision="high")
    check_head_kernels(arch, torch.float32, precision="high", **VARIANTS["update of rank 16"])


@pytest.mark.parametrize("arch", sorted(LAUNCH_TABLE.keys() - {"sm_80", "sm_90"}))
def test_launch_table_fits_other_architectures(arch):
    check_head_kernels(arch, torch.bfloat16)
    check_head_kernels(arch, torch.bfloat16, **VARIANTS["everything, odd hidden size"])
    check_head_kernels(arch, torch.bfloat16, **VARIANTS["update of rank 16"])


@pytest.mark.parametrize(("dtype", "variant"), cases(KL_VARIANTS, {"plain"}), ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kl_kernels_compile_without_spills(arch, dtype, variant):
    check_kl_kernels(arch, dtype, **KL_VARIANTS[variant])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_fp32_kl_kernels_use_tensor_cores_when_tf32_is_allowed(arch):
    check_kl_kernels(arch, torch.float32, precision="high")


@pytest.mark.parametrize("arch", sorted(LAUNCH_TABLE.keys() - {"sm_80", "sm_90"}))
def test_kl_launch_table_fits_other_architectures(arch):
    check_kl_kernels(arch, torch.bfloat16)
    check_kl_kernels(arch, torch.bfloat16, **KL_VARIANTS["softcap, biases, odd hidden sizes"])


@pytest.mark.parametrize("modulation", ["focalpo", "inverse", "focal"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_pair_kernels_compile_without_spills(arch, modulation):
    def run():
        logps = torch.empty(4096, device="meta")
        offsets = torch.empty(17, dtype=torch.int64, device="meta")
        sequences = Sequences(offsets, offsets[1:])
        objective = PairObjective(0.1, 0.05, modulation, 0.5, True, 0.1)
        sums = triton_backend.sequence_sums(logps, sequences)
        ref_logps, margin = torch.empty(16, device="meta"), torch.empty(8, device="meta")
        triton_backend.pair_forward(sums, ref_logps, sequences.lengths, margin, objective)

    launches = recorded_launches(arch, run)
    assert [launch.name for launch in launches] == ["sequence_sum_fwd_kernel", "pair_loss_fwd_kernel"]
    for launch in launches:
        assert compile_launch(launch, arch).spilled_bytes == 0


def test_launch_table_names_every_kernel_and_the_source_of_every_entry():
    for arch, widths in LAUNCH_TABLE.items():
        for width, entries in widths.items():
            assert set(entries) == set(KERNELS), (arch, width)
            assert {entry.source for entry in entries.values()} <= {"estimated", "measured"}


def test_unknown_architecture_takes_the_entry_of_the_nearest_older_one():
    assert launch_config("fwd", "sm_103", 16) is LAUNCH_TABLE["sm_100"][16]["fwd"]
    assert launch_config("fwd", "sm_87", 16) is LAUNCH_TABLE["sm_86"][16]["fwd"]
