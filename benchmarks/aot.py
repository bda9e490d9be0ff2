"""Ahead-of-time compilation of what the launcher would launch, for a GPU that need not be there.

`recorded_launches` runs the real launchers of `focalkern.backends` with every kernel replaced by a recorder;
`launch_head` and `launch_kl` call them for a Llama-3 head on tensors without storage; `compile_launch`
compiles a recorded launch and asks ptxas for its resources. Used by `resources.py` and by the tests.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from focalkern.autograd import WORKSPACE_BYTES
from focalkern.backends import (
    VOCAB_BLOCK,
    HeadInputs,
    LogitTransform,
    triton_backend,
    triton_certified,
    triton_kl,
    triton_launch,
    triton_products,
    triton_tma,
)
from focalkern.distributed import PendingSums
from focalkern.layout import Rows
from focalkern.selection import KeptCounts, KeptPairs

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
_OPTIONS = ("num_warps", "num_stages")
MULTIPROCESSORS = 108  # of the GPU that is not there: an A100's


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel with the types its launcher gave it, as the JIT would specialise them."""

    kernel: triton.JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible_by_16: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def __str__(self) -> str:
        flags = [f"{name}={value}" for name, value in self.constants if value not in (False, None)]
        types = {kind for _, kind in self.signature if kind.startswith("*")}
        return f"{self.name}({', '.join(flags + sorted(types))}) {dict(self.options)}"


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str


def recorded_launches(arch: str, run: Callable[[], object]) -> list[KernelLaunch]:
    """The distinct launches of `run()`, with the tiles of architecture `sm_{arch}`."""
    launches: dict[KernelLaunch, None] = {}
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton_launch, "arch_of", lambda device: arch))
        for module in (triton_products, triton_tma):
            count = mock.patch.object(module, "multiprocessors", lambda device: MULTIPROCESSORS)
            patches.enter_context(count)
        backends = (triton_backend, triton_certified, triton_kl, triton_tma)
        for module in (*(backend.kernels for backend in backends), triton_backend.pair_kernels):
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patches.enter_context(mock.patch.object(module, name, _Recorder(kernel, launches)))
        run()
    return list(launches)


@functools.cache
def compile_launch(launch: KernelLaunch, arch: str) -> Resources:
    compiled = compiled_kernel(launch, arch)
    capability, ptx = int(arch.removeprefix("sm_")), compiled.asm["ptx"]
    suffix = "a" if capability >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}{suffix}", file.name]
        report = subprocess.run(
            [*command, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill", report)
    assert registers and spills, report
    return Resources(int(registers[1]), sum(map(int, spills)), compiled.metadata.shared, ptx)


def compiled_kernel(launch: KernelLaunch, arch: str) -> triton.compiler.CompiledKernel:
    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible_by_16}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=dict(launch.options))


def machine_code(launch: KernelLaunch, arch: str) -> list[str]:
    """The instructions of the kernel, each with its address, from the disassembler shipped with Triton."""
    disassembler = Path(get_ptxas(int(arch.removeprefix("sm_"))).path).with_name("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled_kernel(launch, arch).asm["cubin"])
        file.flush()
        text = subprocess.run(
            [disassembler, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    return re.findall(r"^\s+/\*([0-9a-f]{4,}\*/\s+.*?;)", text, re.M)


class _Recorder:
    def __init__(self, kernel: triton.JITFunction, launches: dict[KernelLaunch, None]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return self._record

    def _record(self, *args: object, **kwargs: object) -> None:
        options = tuple((name, kwargs.pop(name)) for name in _OPTIONS if name in kwargs)
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        assert set(arguments) == set(self.kernel.arg_names), "the launcher's arguments are not the kernel's"
        constexprs = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        signature, constants, divisible = {}, {}, []
        for name in self.kernel.arg_names:
            value = arguments[name]
            if name in constexprs or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = _TYPES[value.dtype]
                divisible.append(name)
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.append(name)
            else:
                signature[name] = "fp32"
        launch = KernelLaunch(
            self.kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), options
        )
        self.launches[launch] = None


@contextlib.contextmanager
def float32_matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_head(
    dtype: torch.dtype,
    softcap: float | None = None,
    bias: bool = False,
    hidden_size: int = 4096,
    outputs: bool = False,
    rank: int | None = None,
    n: int = 8192,
    vocab_size: int = 128256,
    is_shard: bool = False,
) -> None:
    """Run forward and backward launches of a Llama-3 head, or a shard of one, on tensors without storage."""

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
    if is_shard:
        triton_backend.block_statistics(head, rows, transform, names)
    else:
        triton_backend.head_forward(head, rows, transform, names)
    lse, one_minus_p, grad_entropy = meta(n), meta(n), meta(n) if outputs else None
    sums = _NoSums() if is_shard else None
    triton_backend.head_backward(
        head, rows, transform, lse, one_minus_p, grad_entropy, meta(n), grad_entropy, needs, sums
    )
    triton_backend.head_backward_certified(
        head,
        rows,
        transform,
        lse,
        one_minus_p,
        meta(n),
        kept_pairs(n, -(-vocab_size // VOCAB_BLOCK)),
        2.0**-13,
        needs,
        WORKSPACE_BYTES,
        sums,
    )


class _NoSums(PendingSums):
    """In place of the other shards, which are not there."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]

    def start(self, *tensors: torch.Tensor) -> None:
        pass


def launch_kl(
    dtype: torch.dtype,
    softcap: float | None = None,
    bias: bool = False,
    ref_bias: bool = False,
    hidden_size: int = 4096,
    ref_hidden_size: int = 4096,
    n: int = 8192,
    vocab_size: int = 128256,
) -> None:
    """Run forward and backward launches of two heads' KL on tensors without storage."""

    def head(hidden_size: int, bias: bool) -> HeadInputs:
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


def kept_pairs(n: int, blocks: int, share: float = 0.05) -> KeptPairs:
    """As many pairs as a trained model keeps, spread evenly, as far as the host knows them."""
    per_row, total = int(share * blocks), n * int(share * blocks)
    row, block, per_block, per_n = (meta(size, dtype=torch.int64) for size in (total, total, blocks, n))
    counts = KeptCounts(
        per_block=per_block,
        per_row=per_n,
        per_block_host=torch.full((blocks,), total // blocks),
        per_row_host=torch.full((n,), per_row),
        total=total,
        possible=n * blocks,
    )
    return KeptPairs(row=row, block=block, counts=counts)
