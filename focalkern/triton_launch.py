"""What every launch of a GEMM-shaped kernel needs: its tile, its sizes, its options, the device.

Used by the Triton forms of `logps` and `kl`. Under `TRITON_INTERPRET=1` the same code runs on CPU tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

from csrc_triton.launch import (
    GROUP_M,
    NARROW_COLUMNS,
    PRODUCTS_IN_L2,
    VOCAB_BLOCK,
    Launch,
    launch_config,
)
from focalkern.distributed import AsyncReduction
from focalkern.products import ExactGradients
from focalkern.records import Chunk, Gradients, Head, Needs, Sizes, Tile
from focalkern.torch_logits import fp32_products

# Said to every kernel, as Triton 3.10 changes what it does unasked.
OPTIONS = {"enable_fp_fusion": True}
# dz of an exact backward: as many vocabulary entries as `_DZ_BYTES` hold, but not more than a quarter of the
# vocabulary; at least `_LEAST_CHUNK`; and for up to a million rows, not more than `_MAX_DZ_BYTES` hold. Each
# chunk reads and writes the fp32 sums of dhidden once: by count of bytes and operations, about 160/chunk of
# the backward on an A100 or H200.
_LEAST_CHUNK = 4096
_DZ_BYTES = 64 * 2**20
_MAX_DZ_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Entry:
    """An entry of the launch table for one kernel and its operands."""

    config: Launch
    dtype: torch.dtype

    def tile(self, depth: int, rank: int = 0, vocab_size: int = 0) -> Tile:
        """The tile of products that are summed over `depth`, and over `rank`."""
        config = self.config
        tile = Tile(
            m=config.block_m,
            n=config.block_n,
            k=config.block_k,
            r=math.gcd(rank, config.block_k),
            even_k=depth % config.block_k == 0,
            even_v=vocab_size % VOCAB_BLOCK == 0,
            precision=precision(self.dtype),
            group_m=GROUP_M,
        )
        return Tile(*map(tl.constexpr, tile))

    @property
    def options(self) -> dict[str, object]:
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages, **OPTIONS}

    def grid(self, m: int, n: int) -> tuple[int]:
        return (triton.cdiv(m, self.config.block_m) * triton.cdiv(n, self.config.block_n),)


def entry(kernel: str, *hidden: torch.Tensor, small: bool = False, few_rows: bool = False) -> Entry:
    """`hidden` are the hidden states whose products the kernel sums over their size, all of one dtype."""
    first = hidden[0]
    if any(x.shape[1] % 64 for x in hidden):
        kernel += "_odd"
    elif few_rows:
        kernel += "_few"
    elif small:
        kernel += "_small"
    return Entry(launch_config(kernel, arch_of(first.device), first.element_size() * 8), first.dtype)


def product_entry(kernel: str, hidden: torch.Tensor, few_rows: bool = False) -> Entry:
    """For the product of dz with this hidden, or the weight that belongs to it: an update's is narrow."""
    width = hidden.shape[1]
    if width > NARROW_COLUMNS:
        return entry(kernel, hidden, few_rows=few_rows)
    config = launch_config(f"{kernel}_narrow", arch_of(hidden.device), hidden.element_size() * 8)
    return Entry(replace(config, block_n=min(config.block_n, power_of_two(width))), hidden.dtype)


def products_in_l2(device: torch.device) -> int | None:
    """Bytes of products and of their sums to keep in the L2 cache; None: the workspace alone limits them."""
    wanted = PRODUCTS_IN_L2.get(arch_of(device))
    if wanted is not None and device.type == "cuda":
        available = torch.cuda.get_device_properties(device).L2_cache_size
        return wanted if wanted <= 0.85 * available else None
    return wanted


def sizes_of(head: Head) -> Sizes:
    V, H = head.weight.shape
    return Sizes(V, H, 0 if head.update_weight is None else head.update_weight.shape[1])


def head_tile(found: Entry, head: Head) -> Tile:
    """The tile of a kernel that makes logits."""
    V, H, R = sizes_of(head)
    return found.tile(H, R, V)


def with_aligned_update(head: Head) -> Head:
    """The same logits from an update whose rank is a multiple of 16, by columns of zeros.

    The tile of logits has no registers left for masks or for loads of single elements.
    """
    if head.update_hidden is None or head.update_weight is None or sizes_of(head).R % 16 == 0:
        return head
    padding = (0, -sizes_of(head).R % 16)
    pad = torch.nn.functional.pad
    return head._replace(
        update_hidden=pad(head.update_hidden, padding), update_weight=pad(head.update_weight, padding)
    )


def power_of_two(columns: int) -> int:
    """The columns of a tile that is to hold so many: products take 16 or more."""
    return max(triton.next_power_of_2(columns), 16)


def exact_gradients(
    head: Head,
    needs: Needs,
    reduction: AsyncReduction | None,
    launch_dz: Callable[[torch.Tensor, Chunk], None],  # fills the chunk's columns of dz [n, pitch]
) -> Gradients:
    """The gradients of a head whose dz a kernel makes, one chunk of the vocabulary after the other."""
    n, hidden = len(head.hidden), head.hidden
    pitch = vocab_chunk(n, head.vocab_size, hidden.element_size())
    dz = torch.empty((n, pitch), dtype=hidden.dtype, device=hidden.device)
    gradients = ExactGradients(head, [hidden for hidden, _ in head.products], needs, reduction)
    for start in range(0, head.vocab_size, pitch):
        size = min(pitch, head.vocab_size - start)
        if n:
            launch_dz(dz, Chunk(start, size, pitch))
        weights = [weight[start : start + size] for _, weight in head.products]
        gradients.add(dz[:, :size], weights, start)
    return gradients.result()


def vocab_chunk(n: int, vocab_size: int, element_size: int) -> int:
    """Vocabulary entries of a chunk: a multiple of 128."""

    def fitting(available: int) -> int:
        return max(available // (max(n, 1) * element_size), VOCAB_BLOCK)

    chunk = max(min(fitting(_DZ_BYTES), triton.cdiv(vocab_size, 4)), min(_LEAST_CHUNK, vocab_size))
    chunk = min(triton.cdiv(chunk, VOCAB_BLOCK), fitting(_MAX_DZ_BYTES) // VOCAB_BLOCK)
    return chunk * VOCAB_BLOCK


def precision(dtype: torch.dtype) -> str:
    """As torch.matmul multiplies on CUDA: fp32 in full unless the user chose tf32; 16 bits know no choice.

    In full means three tf32 products of high and low parts, their sum over each tile added up in fp32. The
    error is that of fp32 products, which bank conflicts make 17 to 34 times as slow (docs/performance.md).
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if fp32_products("cuda") == "tf32" else "tf32x3"


@lru_cache
def arch_of(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpret"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextlib.contextmanager
def on_device(x: torch.Tensor) -> Iterator[None]:
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        yield
