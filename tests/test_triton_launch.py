"""What the launcher of the Triton kernels decides on the host: precision, workspace, where it runs at all."""

from __future__ import annotations

import forks
import pytest
import torch

from focalkern.backends import select_backend

triton_launch = pytest.importorskip("focalkern.triton_launch", reason="no triton on this platform")


PRECISION_OF_SETTING = {
    "": "tf32x3",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('highest')": "tf32x3",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "tf32x3",
    "torch.backends.fp32_precision = 'bf16'": "tf32x3",  # which CUDA does not know
}


def test_fp32_products_follow_torchs_settings_and_16_bits_ignore_them():
    """In a process each: torch refuses to read the older setting once the newer one has been used."""
    expected = PRECISION_OF_SETTING
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # this torch has only the older setting
        expected = {setting: x for setting, x in expected.items() if "fp32_precision" not in setting}
    ask = "print(precision(torch.float32), precision(torch.bfloat16))"
    shared = "import torch; from focalkern.triton_launch import precision"
    found = forks.printed(shared, [f"{setting}\n{ask}" for setting in expected])
    assert [x.split() for x in found] == [[x, "ieee"] for x in expected.values()]


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("n", [0, 1, 100, 8192, 65536, 10**6 // 4])
def test_gradient_workspace_is_bounded(n, element_size):
    chunk = triton_launch.vocab_chunk(n, 128256, element_size)
    assert chunk % 128 == 0
    assert 128 <= chunk <= 128256 / 4 + 128
    assert n * chunk * element_size <= 256 * 2**20
    # Beyond 64 MiB a chunk is not made larger than it must be.
    assert chunk <= 4096 or n * chunk * element_size <= 64 * 2**20 + n * 128 * element_size


def test_few_rows_take_large_chunks_of_the_vocabulary():
    assert triton_launch.vocab_chunk(256, 128256, 2) == 128 * -(-128256 // 4 // 128)
    assert triton_launch.vocab_chunk(8192, 128256, 2) == 4096


def test_small_vocabulary_takes_one_chunk():
    assert triton_launch.vocab_chunk(1000, 300, 2) == 384


def test_amd_gpus_take_the_torch_backend(monkeypatch):
    class OnGPU:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert select_backend("auto", OnGPU()) == "torch"
    with pytest.raises(ValueError, match="backend='triton' has no launch configuration for AMD"):
        select_backend("triton", OnGPU())
