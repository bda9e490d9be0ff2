"""The kernels that the launchers would launch on a GPU, compiled for it ahead of time; it need not be there.

`compiled_launches` runs launchers on tensors without storage. Triton's own JIT specialises what it is given
and compiles, for a driver that knows the architecture and nothing else; only the launch is left out.
`launch_head` and `launch_kl` call the launchers for a Llama-3 head. Used by `resources.py` and by the tests.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from focalkern import records, triton_launch
from focalkern.distributed import AsyncReduction
from focalkern.kl import triton_form as kl
from focalkern.logps import triton_form as logps
from focalkern.logps.function import WORKSPACE_BYTES


@dataclass(frozen=True)
class CompiledLaunch:
    """A kernel as the JIT compiled it for one launch, and all that are alike."""

    kernel: CompiledKernel
    tile: records.Tile | None  # of kernels that multiply

    @property
    def name(self) -> str:
        return self.kernel.metadata.name

    @property
    def shared_bytes(self) -> int:
        return self.kernel.metadata.shared

    @property
    def registers(self) -> int:
        return self._resources["REG"]

    @property
    def spilled_bytes(self) -> int:
        """The stack of a thread: the kernels put nothing there themselves."""
        return self._resources["STACK"] + self._resources["LOCAL"]

    @functools.cached_property
    def _resources(self) -> dict[str, int]:
        found = re.findall(r"(REG|STACK|LOCAL):(\d+)", self.disassembled("-res-usage"))
        return {name: int(number) for name, number in found}

    def disassembled(self, what: str) -> str:
        # Shipped with Triton.
        disassembler = Path(nvidia.__path__[0], "bin", "cuobjdump")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            command = [disassembler, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def __str__(self) -> str:
        types = sorted(set(re.findall(r"\*\w+", str(self.kernel.src.signature))))
        metadata = self.kernel.metadata
        return f"{self.name} {self.tile} {metadata.num_warps} warps, {metadata.num_stages} stages, {types}"


def driver_of(capability: int) -> SimpleNamespace:
    """Of a GPU that is not there. Each architecture is a device to the JIT, with kernels of its own."""
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("meta"),
    )


def compiled_launches(arch: str, run: Callable[[], object], only: str = "") -> list[CompiledLaunch]:
    """The distinct kernels that `run()` launches, or one of them, with the tiles of this architecture."""
    launches: dict[int, CompiledLaunch] = {}
    compile_or_launch = JITFunction.run

    def compile_only(
        jit: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **kwargs: object
    ) -> CompiledKernel | None:
        assert all(size > 0 for size in grid)
        if only not in ("", jit.fn.__name__):
            return None
        kernel = compile_or_launch(jit, *args, grid=grid, warmup=True, **kwargs)
        tiles = (records.Tile(*(x.value for x in arg)) for arg in args if isinstance(arg, records.Tile))
        launches.setdefault(id(kernel), CompiledLaunch(kernel, next(tiles, None)))
        return kernel

    with (
        mock.patch.object(triton_launch, "arch_of", lambda device: arch),
        mock.patch.object(driver, "_active", driver_of(int(arch.removeprefix("sm_")))),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        run()
    return list(launches.values())


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_head(
    dtype: torch.dtype,
    softcap: float | None = None,
    bias: bool = False,
    hidden_size: int = 4096,
    outputs: bool = False,
    rank: int = 0,
    n: int = 8192,
    vocab_size: int = 128256,
    is_shard: bool = False,
) -> None:
    """Run forward, exact and certified backward of a Llama-3 head, or a shard of one, without storage."""
    head = _head(dtype, n, hidden_size, vocab_size, bias)
    if rank:
        update = meta(n, rank, dtype=dtype), meta(vocab_size, rank, dtype=dtype)
        head = head._replace(update_hidden=update[0], update_weight=update[1])
    names = records.OUTPUTS if outputs else ()
    needs = records.Needs(True, True, bias, rank > 0, rank > 0)
    common = head, meta(n, dtype=torch.int64), records.LogitTransform(softcap=softcap)
    reduction = _NoReduction() if is_shard else None

    blocks = logps.block_statistics(*common, names)
    if not is_shard:
        logps.reduced(blocks, common[1], head, names)
    entropy = meta(n) if outputs else None
    saved = records.Saved(meta(n), meta(n), blocks.lse, entropy)
    forward = records.Forward(*common, saved)
    logps.exact_backward(forward, records.RowGradients(meta(n), entropy), needs, reduction)
    pairs = kept_pairs(n, blocks.lse.shape[1])
    forward = forward._replace(saved=saved._replace(entropy=None))  # with its gradient a backward is exact
    logps.certified_backward(forward, meta(n), pairs, 2.0**-13, needs, reduction, WORKSPACE_BYTES)


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
    """Run forward and backward of two heads' KL without storage."""
    policy = _head(dtype, n, hidden_size, vocab_size, bias)
    ref = _head(dtype, n, ref_hidden_size, vocab_size, ref_bias)
    transform = records.LogitTransform(softcap=softcap)
    kl.forward(policy, ref, transform)
    saved = records.KLForward(meta(n), meta(n), meta(n))
    kl.backward(policy, ref, transform, saved, meta(n), records.Needs(True, True, bias))


def _head(dtype: torch.dtype, n: int, hidden_size: int, vocab_size: int, bias: bool) -> records.Head:
    return records.Head(
        meta(n, hidden_size, dtype=dtype),
        meta(vocab_size, hidden_size, dtype=dtype),
        meta(vocab_size, dtype=dtype) if bias else None,
    )


class _NoReduction(AsyncReduction):
    """In place of the other shards, which are not there."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]

    def start(self, *tensors: torch.Tensor) -> None:
        pass


def kept_pairs(n: int, blocks: int, share: float = 0.05) -> records.KeptPairs:
    """As many pairs as a trained model keeps, spread evenly, as far as the host knows them."""
    per_row = int(share * blocks)
    sizes = (n * per_row, n * per_row, blocks, n)
    row, block, per_block, per_n = (meta(size, dtype=torch.int64) for size in sizes)
    of_blocks, of_rows = torch.full((blocks,), n * per_row // blocks), torch.full((n,), per_row)
    return records.KeptPairs(row, block, records.KeptCounts(per_block, per_n, of_blocks, of_rows))
