"""Launches of the kernels that take their tiles by TMA, on Hopper, where the launch table says so.

TMA reads consecutive rows, so the rows that take part are first copied together: `[n, H]`, 64 MiB for 8192
rows of 4096, for the time of the launch.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from functools import lru_cache

import torch
import triton

from csrc_triton import linear_logps as kernels
from csrc_triton.launch import Launch
from focalkern.backends import VOCAB_BLOCK, HeadInputs, LogitTransform
from focalkern.backends.triton_launch import launch_of, scales, tile_grid, tile_options
from focalkern.layout import Rows

_ALIGNMENT = 16  # bytes, of the tensors and their strides


def tma_launch_of(kernel: str, head: HeadInputs, small: bool) -> Launch | None:
    """The table's entry, if it is one with TMA and the head is one that TMA can read; None otherwise."""
    config = launch_of(kernel, head.hidden, small)
    if not config.tma or head.update_weight is not None or head.weight.shape[0] % VOCAB_BLOCK:
        return None
    row_bytes = head.weight.stride(0) * head.weight.element_size()
    return None if row_bytes % _ALIGNMENT or head.weight.data_ptr() % _ALIGNMENT else config


def forward(
    head: HeadInputs,  # last strides of 1
    rows: Rows,
    transform: LogitTransform,
    config: Launch,
    target_z: torch.Tensor,  # [n] out
    block_lse: torch.Tensor,  # [n, NB] out
) -> None:
    n, (vocab_size, hidden_size) = rows.targets.numel(), head.weight.shape
    gathered = gather_rows(head.hidden, rows)
    grid = (min(tile_grid(config, n, vocab_size)[0], multiprocessors(head.hidden.device)),)
    with_scratch_memory(
        lambda: kernels.linear_logps_fwd_tma_kernel[grid](
            gathered,
            head.weight,
            head.bias,
            rows.targets,
            rows.count,
            target_z,
            block_lse,
            n,
            vocab_size,
            hidden_size,
            block_lse.shape[1],
            head.weight.stride(0),
            *scales(transform),
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            WARP_SPECIALIZE=config.warp_specialize,
            **tile_options(config, "BLOCK_V", head.hidden.dtype),
        ),
        head.hidden.device,
    )


def gather_rows(hidden: torch.Tensor, rows: Rows) -> torch.Tensor:  # [n, H]
    n, hidden_size = rows.targets.numel(), hidden.shape[1]
    gathered = torch.empty((n, hidden_size), dtype=hidden.dtype, device=hidden.device)
    kernels.gather_rows_kernel[(n, triton.cdiv(hidden_size, 1024))](
        hidden, rows.hidden_index, rows.count, gathered, hidden_size, hidden.stride(0), BLOCK_H=1024
    )
    return gathered


def with_scratch_memory(launch: Callable[[], object], device: torch.device) -> None:
    """Launch a kernel that makes descriptors, each program in memory of its own; the user's allocator stays."""

    def run() -> None:
        triton.set_allocator(
            lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device)
        )
        launch()

    contextvars.copy_context().run(run)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # in the interpreter: fewer programs than tiles
    return torch.cuda.get_device_properties(device).multi_processor_count
