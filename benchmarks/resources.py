"""What the kernels take of a GPU by ahead-of-time compilation: registers, shared memory, code.

    python benchmarks/resources.py            # a table for sm_80 and sm_90
    python benchmarks/resources.py --write    # into benchmarks/compiled.json, which a test holds

No GPU is needed: `compiled_launches` runs launchers on tensors without storage. Triton's own JIT specialises
and compiles, for a driver that knows the architecture and nothing else; only the launch is left out. The
table is of a Llama-3 head (H = 4096, V = 128256) in bf16. `tune.py` and `tests/test_compile.py` compile, too.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pandas as pd
import torch
import triton
from tqdm import tqdm
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import parser_of
from focalkern import records, triton_launch
from focalkern.distributed import AsyncReduction
from focalkern.kl import triton_form as kl
from focalkern.logps import triton_form as logps
from focalkern.logps.function import WORKSPACE_BYTES

BASELINE = Path(__file__).with_name("compiled.json")
ARCHS = ("sm_80", "sm_90")


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
        return self._resources["STACK"] + self._resources["LOCAL"]  # the kernels put nothing there themselves

    @functools.cached_property
    def _resources(self) -> dict[str, int]:
        found = re.findall(r"(REG|STACK|LOCAL):(\d+)", self.disassembled("-res-usage"))
        return {name: int(number) for name, number in found}

    def disassembled(self, what: str) -> str:
        disassembler = Path(nvidia.__path__[0], "bin", "cuobjdump")  # shipped with Triton
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            return subprocess.check_output([disassembler, what, file.name], text=True)

    def __str__(self) -> str:
        types = sorted(set(re.findall(r"\*\w+", str(self.kernel.src.signature))))
        metadata = self.kernel.metadata
        return f"{self.name} {self.tile} {metadata.num_warps} warps, {metadata.num_stages} stages, {types}"


def compiled_launches(arch: str, run: Callable[[], object], only: str = "") -> list[CompiledLaunch]:
    """The distinct kernels that `run()` launches, or one of them, with the tiles of this architecture."""
    launches: dict[int, CompiledLaunch] = {}
    compile_or_launch = JITFunction.run
    capability = int(arch.removeprefix("sm_"))
    # Each architecture is a device to the JIT, with kernels of its own.
    no_gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("meta"),
    )

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
        mock.patch.object(driver, "_active", no_gpu),
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
    outputs: tuple[str, ...] = (),
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
    needs = records.Needs(True, True, bias, rank > 0, rank > 0)
    common = head, meta(n, dtype=torch.int64), records.LogitTransform(softcap=softcap)
    # Of the other shards, which are not there.
    reduction = mock.create_autospec(AsyncReduction, instance=True) if is_shard else None

    blocks = logps.block_statistics(*common, outputs)
    if not is_shard:
        logps.reduced(blocks, common[1], head, outputs)
    entropy = meta(n) if outputs else None
    saved = records.Saved(meta(n), meta(n), blocks.lse, entropy)
    forward = records.Forward(*common, saved)
    logps.exact_backward(forward, records.RowGradients(meta(n), entropy), needs, reduction)
    pairs = kept_pairs(n, blocks.lse.shape[1])
    forward = forward._replace(saved=saved._replace(entropy=None))  # with its gradient a backward is exact
    # All pairs at once: counts of some rows' pairs would be read from tensors without storage.
    logps.certified_backward(forward, meta(n), pairs, 2.0**-13, needs, reduction, 4 * WORKSPACE_BYTES)


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


def kept_pairs(n: int, blocks: int, share: float = 0.05) -> records.KeptPairs:
    """As many pairs as a trained model keeps, spread evenly, as far as the host knows them."""
    per_row = int(share * blocks)
    sizes = (n * per_row, n * per_row, blocks, n)
    row, block, per_block, per_n = (meta(size, dtype=torch.int64) for size in sizes)
    of_blocks, of_rows = torch.full((blocks,), n * per_row // blocks), torch.full((n,), per_row)
    return records.KeptPairs(row, block, records.KeptCounts(per_block, per_n, of_blocks, of_rows))


# Beside Llama-3's 8192 rows: Gemma-2's softcap, the entropy and its like, and the tiles for few rows.
VARIANTS = {
    "plain": launch_head,
    "softcap": partial(launch_head, softcap=30.0),
    "outputs": partial(launch_head, outputs=records.OUTPUTS),
    "512 rows": partial(launch_head, n=512),
    "KL": launch_kl,
}


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {BASELINE.name}")
    options = parser.parse_args(argv)
    found = {arch: compiled_kernels(arch) for arch in tqdm(ARCHS, leave=False, disable=None)}
    for arch, kernels in found.items():
        table = pd.DataFrame(kernels)
        print(f"{arch}, triton {triton.__version__}", table.to_string(index=False), sep="\n", end="\n\n")
    if options.write:
        BASELINE.write_text(json.dumps({"triton": triton.__version__, "kernels": found}, indent=2) + "\n")
    return 0


def compiled_kernels(arch: str) -> list[dict[str, Any]]:
    """Every kernel that has an entry in the launch table, in all variants; the first that launches it."""
    found: dict[int, dict[str, Any]] = {}
    for variant, launch_all in VARIANTS.items():
        for launch in compiled_launches(arch, partial(launch_all, torch.bfloat16)):
            if launch.tile is not None and id(launch.kernel) not in found:
                found[id(launch.kernel)] = {
                    "kernel": launch.name.removesuffix("_kernel"),
                    "variant": variant + ", priority in L2" * ("evict_last" in launch.kernel.asm["ptx"]),
                    "tile": "{} × {} × {}".format(*launch.tile[:3]),
                    "warps": launch.kernel.metadata.num_warps,
                    "stages": launch.kernel.metadata.num_stages,
                    "registers": launch.registers,
                    "spilled_bytes": launch.spilled_bytes,
                    "shared_bytes": launch.shared_bytes,
                    **instruction_mix(launch.disassembled("-sass")),
                }
    return list(found.values())


def instruction_mix(code: str) -> dict[str, int]:
    """Instructions of a warp, in the innermost loop with a tensor-core instruction and outside it."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?;)", code, re.M)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for end, (_, line) in enumerate(lines):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", line)
        start = place.get(int(target[1], 16), end) if target else end
        if any("MMA" in inside for _, inside in lines[start:end]):
            loops.append([inside for _, inside in lines[start : end + 1]])
    loop = min(loops, key=len, default=[])
    loads = [line for line in loop if re.search(r"\bLDG(STS)?\.", line)]
    return {
        "main_loop": len(loop),
        "tensor_core": sum("MMA" in line for line in loop),
        "narrow_loads": sum(".128" not in line for line in loads),  # less than 16 bytes a thread
        "others": len(lines) - len(loop),
    }


if __name__ == "__main__":
    sys.exit(main())
