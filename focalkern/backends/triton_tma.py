"""Launches of the kernels that take their tiles by TMA, on Hopper, where the launch table says so.

No shipped entry does as long as that has not been timed; `benchmarks/tune.py` tries them. TMA reads
consecutive rows, so the rows that take part are first copied together: `[n, H]`, 64 MiB for 8192 rows of 4096
in bf16, for the time of the forward or of the backward.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable

import torch
import triton

from csrc_triton import linear_logps_tma as kernels
from csrc_triton.launch import Launch
from focalkern.backends import HeadInputs, LogitTransform
from focalkern.backends.triton_launch import multiprocessors, scales, tile_grid, tile_options
from focalkern.layout import Rows


def gather_rows(hidden: torch.Tensor, rows: Rows) -> torch.Tensor:  # [n, H]
    n, hidden_size = rows.targets.numel(), hidden.shape[1]
    gathered = torch.empty((n, hidden_size), dtype=hidden.dtype, device=hidden.device)
    kernels.gather_rows_kernel[(n, triton.cdiv(hidden_size, 1024))](
        hidden, rows.hidden_index, rows.count, gathered, hidden_size, hidden.stride(0), BLOCK_H=1024
    )
    return gathered


def forward(
    head: HeadInputs,  # last strides of 1
    rows: Rows,
    transform: LogitTransform,
    config: Launch,
    target_z: torch.Tensor,  # [n] out
    block_lse: torch.Tensor,  # [n, NB] out
) -> None:
    (n, blocks), (vocab_size, hidden_size) = block_lse.shape, head.weight.shape
    gathered = gather_rows(head.hidden, rows)
    kernel = kernels.linear_logps_fwd_tma_kernel[_grid(config, n, vocab_size, gathered.device)]
    with_scratch_memory(
        lambda: kernel(
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
            blocks,
            head.weight.stride(0),
            *scales(transform),
            **_logits_options(head, transform, config),
        ),
        gathered.device,
    )


def dz(
    head: HeadInputs,
    gathered: torch.Tensor,  # [n, H]
    rows: Rows,
    transform: LogitTransform,
    config: Launch,
    lse: torch.Tensor,  # [n]
    one_minus_p: torch.Tensor,  # [n]
    grad_logps: torch.Tensor,  # [outputs]
    out: torch.Tensor,  # [n, C]
    start: int,
    size: int,
) -> None:
    """The vocabulary chunk of `size` entries from `start`."""
    (n, chunk), (vocab_size, hidden_size) = out.shape, head.weight.shape
    kernel = kernels.linear_logps_bwd_dz_tma_kernel[_grid(config, n, size, out.device)]
    with_scratch_memory(
        lambda: kernel(
            gathered,
            head.weight,
            head.bias,
            rows.output_index,
            rows.targets,
            rows.count,
            lse,
            one_minus_p,
            grad_logps,
            out,
            start,
            size,
            chunk,
            n,
            vocab_size,
            hidden_size,
            head.weight.stride(0),
            *scales(transform),
            **_logits_options(head, transform, config),
        ),
        out.device,
    )


def dweight(
    dz: torch.Tensor,  # [n, C]
    gathered: torch.Tensor,  # [n, H]
    rows: Rows,
    config: Launch,
    out: torch.Tensor,  # [V, H]
    start: int,
    size: int,
) -> None:
    (n, chunk), hidden_size = dz.shape, out.shape[1]
    kernel = kernels.linear_logps_bwd_dweight_tma_kernel[_grid(config, size, hidden_size, dz.device)]
    with_scratch_memory(
        lambda: kernel(
            dz,
            gathered,
            rows.count,
            out,
            start,
            size,
            chunk,
            n,
            hidden_size,
            **tile_options(config, "BLOCK_N", dz.dtype),
        ),
        dz.device,
    )


def dhidden(
    dz: torch.Tensor,  # [n, C]
    weight: torch.Tensor,  # [V, H]
    rows: Rows,
    config: Launch,
    partial: torch.Tensor,  # [splits, n, H]
    out: torch.Tensor | None,  # [M, H]; None: what counts is `partial`
    start: int,
    size: int,
) -> None:
    (n, chunk), (vocab_size, hidden_size), splits = dz.shape, weight.shape, partial.shape[0]
    kernel = kernels.linear_logps_bwd_dhidden_tma_kernel[_grid(config, n, hidden_size, dz.device, splits)]
    with_scratch_memory(
        lambda: kernel(
            dz,
            weight,
            rows.hidden_index,
            rows.count,
            partial,
            out,
            start,
            size,
            chunk,
            n,
            vocab_size,
            hidden_size,
            weight.stride(0),
            splits,
            **tile_options(config, "BLOCK_N", dz.dtype),
        ),
        dz.device,
    )


def with_scratch_memory(launch: Callable[[], object], device: torch.device) -> None:
    """Launch a kernel whose programs make descriptors in memory of their own; the user's allocator stays."""

    def allocate(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def run() -> None:
        triton.set_allocator(allocate)
        launch()

    contextvars.copy_context().run(run)


def _grid(config: Launch, m: int, n: int, device: torch.device, splits: int = 1) -> tuple[int]:
    return (min(tile_grid(config, m, n)[0] * splits, multiprocessors(device)),)


def _logits_options(head: HeadInputs, transform: LogitTransform, config: Launch) -> dict[str, object]:
    return {
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": transform.softcap is not None,
        "WARP_SPECIALIZE": config.warp_specialize,
        **tile_options(config, "BLOCK_V", head.hidden.dtype),
    }
