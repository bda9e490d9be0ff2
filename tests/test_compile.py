"""Every kernel, as its launcher launches it and with every entry of the launch table, compiles for GPUs.

None needs to be there. Held: no spilled registers, shared memory within the architecture's limit, tensor
cores used.
"""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton", reason="no triton on this platform: nothing to compile")
if INTERPRETED:
    pytest.skip("kernels are decorated for the interpreter in this process", allow_module_level=True)

from aot import compile_launch, float32_matmul_precision, recorded_launches

from csrc_triton.launch import KERNELS, LAUNCH_TABLE, launch_config
from focalkern.backends import HeadInputs, LogitTransform, PairObjective, triton_backend
from focalkern.layout import Rows, Sequences
from focalkern.selection import KeptCounts, KeptPairs

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
GEMM_KERNELS = ("fwd", "dz", "dweight", "bwd_dhidden", "certified_product")

VARIANTS = {
    "plain": {},
    "vocabulary not a multiple of 16": {"vocab_size": 50257},
    "softcap, bias, odd hidden size": {"softcap": 30.0, "bias": True, "hidden_size": 4100},
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
}


def launch_head(
    dtype,
    softcap=None,
    bias=False,
    hidden_size=4096,
    outputs=False,
    rank=None,
    n=8192,
    vocab_size=128256,
):
    """Run forward and backward launches of a Llama-3 head on tensors without storage."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    head = HeadInputs(
        meta(n, hidden_size, dtype=dtype),
        meta(vocab_size, hidden_size, dtype=dtype),
        meta(vocab_size, dtype=dtype) if bias else None,
        *((meta(n, rank, dtype=dtype), meta(vocab_size, rank, dtype=dtype)) if rank else ()),
    )
    needs = (True, True, bias, rank is not None, rank is not None)
    index = meta(n, dtype=torch.int64)
    rows = Rows(index, index, index, meta(1, dtype=torch.int32), torch.Size([n]))
    transform = LogitTransform(softcap=softcap)
    names = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs") if outputs else ()
    forward = triton_backend.head_forward(head, rows, transform, names)
    triton_backend.head_backward(
        head,
        rows,
        transform,
        forward.lse,
        forward.one_minus_p,
        forward.entropy,
        meta(n),
        meta(n) if outputs else None,
        needs,
    )
    triton_backend.head_backward_certified(
        head,
        rows,
        transform,
        forward.lse,
        forward.one_minus_p,
        meta(n),
        kept_pairs(n, forward.block_lse.shape[1]),
        2.0**-13,
        needs,
        workspace_bytes=256 * 2**20,
    )


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


def launch_kl(
    dtype,
    softcap=None,
    bias=False,
    ref_bias=False,
    hidden_size=4096,
    ref_hidden_size=4096,
    n=8192,
    vocab_size=128256,
):
    """Run forward and backward launches of two heads' KL on tensors without storage."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def head(hidden_size, bias):
        return HeadInputs(
            meta(n, hidden_size, dtype=dtype),
            meta(vocab_size, hidden_size, dtype=dtype),
            meta(vocab_size, dtype=dtype) if bias else None,
        )

    policy, ref = head(hidden_size, bias), head(ref_hidden_size, ref_bias)
    index = meta(n, dtype=torch.int64)
    rows = Rows(index, index, index, meta(1, dtype=torch.int32), torch.Size([n]))
    transform = LogitTransform(softcap=softcap)
    forward = triton_backend.kl_forward(policy, ref, rows, transform)
    triton_backend.kl_backward(
        policy, ref, rows, transform, forward.lse, forward.ref_lse, meta(n), (True, True, bias, False, False)
    )


def kept_pairs(n, blocks, share=0.05):
    """As many pairs as a trained model keeps, spread evenly, as far as the host knows them."""
    per_row, total = int(share * blocks), n * int(share * blocks)

    def meta(size):
        return torch.empty(size, dtype=torch.int64, device="meta")

    counts = KeptCounts(
        per_block=meta(blocks),
        per_row=meta(n),
        per_block_host=torch.full((blocks,), total // blocks),
        per_row_host=torch.full((n,), per_row),
        total=total,
        share=share,
    )
    return KeptPairs(row=meta(total), block=meta(total), counts=counts)


def check_head_kernels(arch, dtype, precision="highest", launch=launch_head, at_least=9, **variant):
    with float32_matmul_precision(precision):
        launches = recorded_launches(arch, lambda: launch(dtype, **variant))
    has_tensor_cores = dtype != torch.float32 or precision != "highest"
    for launch in launches:
        resources = compile_launch(launch, arch)
        print(f"{arch} {launch}: {resources.registers} registers, {resources.shared_bytes} bytes shared")
        assert resources.spilled_bytes == 0, f"{launch} spills {resources.spilled_bytes} bytes"
        assert resources.shared_bytes <= SHARED_LIMIT[arch], str(launch)
        is_gemm = launch.name.removesuffix("_kernel").endswith(GEMM_KERNELS)
        if is_gemm and has_tensor_cores:
            assert TENSOR_CORE.get(arch, "mma.sync") in resources.ptx, f"{launch} does not use tensor cores"
    assert len(launches) >= at_least


def check_kl_kernels(arch, dtype, precision="highest", **variant):
    check_head_kernels(arch, dtype, precision, launch_kl, at_least=5, **variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_head_kernels_compile_without_spills(arch, dtype, variant):
    check_head_kernels(arch, dtype, **VARIANTS[variant])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_fp32_kernels_use_tensor_cores_when_tf32_is_allowed(arch):
    check_head_kernels(arch, torch.float32, precision="high")
    check_head_kernels(arch, torch.float32, precision="high", **VARIANTS["update of rank 16"])


@pytest.mark.parametrize("arch", sorted(LAUNCH_TABLE.keys() - {"sm_80", "sm_90"}))
def test_launch_table_fits_other_architectures(arch):
    check_head_kernels(arch, torch.bfloat16)
    check_head_kernels(arch, torch.bfloat16, **VARIANTS["everything, odd hidden size"])
    check_head_kernels(arch, torch.bfloat16, **VARIANTS["update of rank 16"])


@pytest.mark.parametrize("variant", KL_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
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
