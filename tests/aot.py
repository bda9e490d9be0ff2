"""Ahead-of-time compilation of what the launcher would launch, for a GPU that need not be there.

`recorded_launches` runs the real launcher of `focalkern.backends.triton_backend` on meta tensors with every
kernel replaced by a recorder; `compile_launch` compiles a recorded launch and asks ptxas for its resources.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from focalkern.backends import triton_backend, triton_certified, triton_kl, triton_launch, triton_tma

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
_OPTIONS = ("num_warps", "num_stages")


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "arch_of", lambda device: arch)
        backends = (triton_backend, triton_certified, triton_kl, triton_tma)
        for module in (*(backend.kernels for backend in backends), triton_backend.pair_kernels):
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, _Recorder(kernel, launches))
        run()
    return list(launches)


def compile_launch(launch: KernelLaunch, arch: str) -> Resources:
    capability = int(arch.removeprefix("sm_"))
    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible_by_16}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    ptx = compiled.asm["ptx"]
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
