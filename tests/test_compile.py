"""Every kernel, as its launcher launches it and with every entry of the launch table, compiles for GPUs.

None needs to be there. Held: no spilled registers, shared memory within the architecture's limit, tensor
cores used. No threads: CPython 3.11's parser, which Triton calls, is not safe with them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton", reason="no triton on this platform: nothing to compile")
if INTERPRETED:
    pytest.skip("kernels are decorated for the interpreter in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from triton.compiler.errors import CompilationError

from benchmarks.resources import compiled_launches, launch_head, launch_kl, meta
from csrc_triton.launch import KERNELS, LAUNCH_TABLE, launch_config
from focalkern import triton_launch
from focalkern.logps.triton_form import exact_backward
from focalkern.pairs.objective import MODULATIONS
from focalkern.pairs.triton_form import pair_forward, sequence_sums
from focalkern.records import (
    OUTPUTS,
    Forward,
    Head,
    LogitTransform,
    Needs,
    PairConstants,
    PairObjective,
    RowGradients,
    Saved,
)

# CUDA programming guide, table of compute capabilities: maximum shared memory per thread block.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
}
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "sm_120": "mma.sync"}
HEAD_KERNELS = {
    "linear_logps_fwd_kernel",
    "linear_logps_reduce_kernel",
    "linear_logps_bwd_dz_kernel",
    "linear_logps_certified_dz_kernel",
    "linear_logps_certified_dweight_kernel",
    "linear_logps_certified_product_kernel",
    "linear_logps_certified_dhidden_kernel",
}
KL_KERNELS = {"linear_kl_fwd_kernel", "linear_kl_reduce_kernel", "linear_kl_bwd_dz_kernel"}

VARIANTS = {
    "plain": {},
    "vocabulary not a multiple of 16": {"vocab_size": 50257},
    "softcap, bias, odd hidden size": {"softcap": 30.0, "bias": True, "hidden_size": 4100},
    "few rows": {"n": 200},
    "few rows, softcap, bias": {"n": 200, "softcap": 30.0, "bias": True},
    "outputs and entropy gradient": {"outputs": OUTPUTS},
    "everything, odd hidden size": {"softcap": 30.0, "bias": True, "hidden_size": 4100, "outputs": OUTPUTS},
    "update of rank 16": {"rank": 16},
    "update of rank 12": {"rank": 12},
    "update of rank 200, softcap, bias": {"rank": 200, "softcap": 30.0, "bias": True},
    "update of rank 40, everything, odd hidden size": {
        "rank": 40,
        "softcap": 30.0,
        "bias": True,
        "hidden_size": 4100,
        "outputs": OUTPUTS,
    },
    "a shard of the vocabulary": {"is_shard": True, "vocab_size": 16032},
    "a shard, few rows, an update": {"is_shard": True, "vocab_size": 16032, "rank": 16, "n": 200},
}
IN_EVERY_RUN = {
    "plain",
    "vocabulary not a multiple of 16",
    "softcap, bias, odd hidden size",
    "few rows",
    "few rows, softcap, bias",
    "outputs and entropy gradient",
    "update of rank 16",
    "update of rank 40, everything, odd hidden size",
    "a shard, few rows, an update",
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
KL_IN_EVERY_RUN = {"plain", "vocabulary not a multiple of 16", "softcap, biases, odd hidden sizes"}


def check_head(arch, dtype, precision="highest", **variant):
    expected = set(HEAD_KERNELS)
    if variant.get("bias"):
        expected.add("linear_logps_certified_dbias_kernel")
    if variant.get("is_shard"):  # its block statistics are reduced together with those of the others
        expected.remove("linear_logps_reduce_kernel")
    check(arch, lambda: launch_head(dtype, **variant), expected, precision)


def check_kl(arch, dtype, precision="highest", **variant):
    check(arch, lambda: launch_kl(dtype, **variant), KL_KERNELS, precision)


def check(arch, run, expected, precision="highest"):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        launches = compiled_launches(arch, run)
    finally:
        torch.set_float32_matmul_precision(before)
    assert {launch.name for launch in launches} == expected
    for launch in launches:
        print(f"{arch} {launch}: {launch.registers} registers, {launch.shared_bytes} bytes shared")
        assert launch.spilled_bytes == 0, f"{launch} spills {launch.spilled_bytes} bytes"
        assert launch.shared_bytes <= SHARED_LIMIT[arch], str(launch)
        if launch.tile is not None:
            # wgmma takes tiles of 64 rows; smaller ones have the instruction of older architectures.
            instruction = "mma.sync" if launch.tile.m < 64 else TENSOR_CORE.get(arch, "mma.sync")
            assert instruction in launch.kernel.asm["ptx"], f"{launch} does not use tensor cores"


def cases(variants: dict, of_fp16: set[str], in_every_run: set[str]) -> list:
    """All variants in bf16 and fp32; of fp16, whose kernels differ from bf16's in one instruction, a few. Of
    fp32 and fp16 those that are not for every run are slow."""

    def case(dtype: torch.dtype, variant: str):
        is_slow = dtype != torch.bfloat16 and variant not in in_every_run
        return pytest.param(dtype, variant, marks=pytest.mark.slow if is_slow else ())

    both = [case(dtype, variant) for dtype in (torch.bfloat16, torch.float32) for variant in variants]
    return both + [case(torch.float16, variant) for variant in variants if variant in of_fp16]


def on(archs: list[str], *marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Those of an architecture in one process of `--dist loadgroup`: none compiles what another one does."""
    groups = {arch: (pytest.mark.xdist_group(arch), *marks) for arch in archs}
    return pytest.mark.parametrize("arch", [pytest.param(arch, marks=groups[arch]) for arch in archs])


both_gpus = on(["sm_80", "sm_90"])
other_gpus = on(sorted(LAUNCH_TABLE.keys() - {"sm_80", "sm_90"}), pytest.mark.slow)


@both_gpus
@pytest.mark.parametrize(
    ("dtype", "variant"), cases(VARIANTS, {"plain", "everything, odd hidden size"}, IN_EVERY_RUN), ids=str
)
def test_head_kernels_compile_without_spills(arch, dtype, variant):
    check_head(arch, dtype, **VARIANTS[variant])


def test_few_rows_have_small_tiles_for_kept_blocks():
    launches = compiled_launches("sm_80", lambda: launch_head(torch.bfloat16, n=200))
    rows = {launch.name: launch.tile.m for launch in launches if launch.tile is not None}
    assert rows["linear_logps_certified_dz_kernel"] == 32
    assert rows["linear_logps_certified_product_kernel"] == 32


@both_gpus
@pytest.mark.parametrize("variant", ["plain", "update of rank 16"])
def test_fp32_kernels_fit_when_tf32_is_allowed(arch, variant):
    check_head(arch, torch.float32, precision="high", **VARIANTS[variant])


@other_gpus
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", ["plain", "everything, odd hidden size", "update of rank 16"])
def test_launch_table_fits_other_architectures(arch, variant, dtype):
    check_head(arch, dtype, **VARIANTS[variant])


@both_gpus
@pytest.mark.parametrize(("dtype", "variant"), cases(KL_VARIANTS, {"plain"}, KL_IN_EVERY_RUN), ids=str)
def test_kl_kernels_compile_without_spills(arch, dtype, variant):
    check_kl(arch, dtype, **KL_VARIANTS[variant])


@both_gpus
def test_fp32_kl_kernels_fit_when_tf32_is_allowed(arch):
    check_kl(arch, torch.float32, precision="high")


@other_gpus
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", ["plain", "softcap, biases, odd hidden sizes"])
def test_kl_launch_table_fits_other_architectures(arch, variant, dtype):
    check_kl(arch, dtype, **KL_VARIANTS[variant])


@both_gpus
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_pair_kernels_compile_without_spills(arch, modulation):
    def run():
        sums = sequence_sums(meta(4096), meta(17, dtype=torch.int64))
        constants = PairConstants(meta(16, dtype=torch.int64), ref_logps=meta(16), adaptive_margin=meta(8))
        pair_forward(sums, constants, PairObjective(0.1, 0.05, modulation, 0.5, True, 0.1))

    check(arch, run, {"sequence_sum_fwd_kernel", "pair_loss_fwd_kernel"})


def test_a_modulation_without_a_formula_in_the_kernel_does_not_compile():
    def run():
        constants = PairConstants(meta(16, dtype=torch.int64))
        pair_forward(meta(16), constants, PairObjective(0.1, 0.05, "unheard-of", 0.5, False, None))

    with pytest.raises(CompilationError) as failure:
        compiled_launches("sm_80", run)
    assert "modulation without a formula" in f"{failure.value} {failure.value.__cause__}"


def test_a_last_chunk_of_one_entry_compiles():
    """Triton makes a size of 1 a constant of the kernel."""
    head = Head(meta(64, 128, dtype=torch.bfloat16), meta(4097, 128, dtype=torch.bfloat16))
    saved, grads = Saved(meta(64), meta(64)), RowGradients(meta(64))
    forward = Forward(head, meta(64, dtype=torch.int64), LogitTransform(), saved)

    def run():
        needs = Needs(hidden=True, weight=True, bias=False)
        exact_backward(forward, grads, needs, None)

    with (
        mock.patch.object(triton_launch, "_DZ_BYTES", 0),
        mock.patch.object(triton_launch, "_LEAST_CHUNK", 1),
    ):
        launches = compiled_launches("sm_80", run)
    assert [launch.name for launch in launches] == ["linear_logps_bwd_dz_kernel"] * 2


def test_launch_table_names_every_kernel_and_the_source_of_every_entry():
    for arch, widths in LAUNCH_TABLE.items():
        for width, entries in widths.items():
            assert set(entries) == set(KERNELS), (arch, width)
            assert {entry.source for entry in entries.values()} <= {"estimated", "measured"}


def test_unknown_architecture_takes_the_entry_of_the_nearest_older_one():
    assert launch_config("fwd", "sm_103", 16) is LAUNCH_TABLE["sm_100"][16]["fwd"]
    assert launch_config("fwd", "sm_87", 16) is LAUNCH_TABLE["sm_86"][16]["fwd"]
