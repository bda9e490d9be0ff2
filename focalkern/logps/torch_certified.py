"""The certified backward in plain PyTorch: per vocabulary block, the rows that need it.

One block after the other would be many small calls. Several blocks share the gathering of their rows and the
element-wise work; each has its own three products. Half of the blocks are worked on in a thread of its own:
forward and backward of 2048 × 512 × 32768 with a fifth of the pairs kept are then 2.1 times as fast as exact
ones, and 1.8 times otherwise (bf16, 2 cores of an AMD EPYC, torch 2.13, 2026-11). A dispatch mode, such as a
counter of operations, does not see into these threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.distributed import AsyncReduction
from focalkern.products import HeadGradients
from focalkern.records import Forward, Gradients, KeptPairs, Needs
from focalkern.torch_logits import Product, compute_dtype, matmul, targets_in, times_slope, transform_logits

# oneDNN builds a kernel for every new shape, in more time than a block's product takes (300 against 130 µs
# at 450 × 512 × 128, 2 cores of an AMD EPYC, torch 2.13, 2026-11). The rows of a block are padded to a
# multiple of this: few shapes, that come again.
_PADDING = 32
# Rows and vocabulary blocks of a group: what they need stays in the processor's cache.
_GROUP_ROWS = 1024
_GROUP_BLOCKS = 32
# Where this much may be left out, how oneDNN adds up a logit (see `Product`) does not show.
_ROUNDING_TAU = 2.0**-20


def certified_backward(
    forward: Forward,
    g: torch.Tensor,  # [n] dL/dlogps
    pairs: KeptPairs,
    tau: float,
    needs: Needs,
    reduction: AsyncReduction | None,
    workspace_bytes: int,
) -> Gradients:
    """dz of the kept pairs, group by group, and its products; rows of dweight that no pair needs are zero."""
    step = _Step(forward, g, pairs, tau, needs, reduction, workspace_bytes)
    gradients = step.gradients
    # Each half adds its blocks up by itself.
    sums = [gradients.dhidden, [None if x is None else torch.zeros_like(x) for x in gradients.dhidden]]
    tasks = [partial(step.process, *half) for half in zip(_halves(step.parts), sums, strict=True)]
    _run_side_by_side(tasks, g.device)

    gradients.dhidden = [
        None if one is None or other is None else one.add_(other)[: g.numel()]
        for one, other in zip(*sums, strict=True)
    ]
    gradients.start_reduction()
    return gradients.result()


@dataclass(frozen=True)
class _Part:
    """Rows that need one vocabulary block; those of a block may be in several parts."""

    rows: slice  # of the padded list of rows
    block: slice  # of the vocabulary
    is_first: bool
    is_last: bool

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass
class _Group:
    """Parts that are processed together; for each product, what every part is multiplied with."""

    parts: list[_Part]
    row: torch.Tensor  # [k] the rows of all parts
    hidden: list[torch.Tensor]  # of each product, [k, K] in the dtype of the inputs
    wide: list[torch.Tensor]  # the same in fp32
    weights: list[list[torch.Tensor]]  # of each product and part, [128, K] in fp32

    @property
    def sizes(self) -> list[int]:
        return [part.size for part in self.parts]


class _Step:
    """One backward: its tensors with one more row, which pads lists of rows, and the gradients so far."""

    def __init__(
        self,
        forward: Forward,
        g: torch.Tensor,
        pairs: KeptPairs,
        tau: float,
        needs: Needs,
        reduction: AsyncReduction | None,
        workspace_bytes: int,
    ) -> None:
        head, targets, self.transform, saved = forward
        self.head, self.dtype = head, compute_dtype(head.hidden)
        self.needs_weight = any(needs.of_weight)
        self.is_native = _has_native_product(head.hidden)
        self.is_fp32 = head.hidden.dtype == torch.float32 and tau < _ROUNDING_TAU

        # The padding row has no gradient, and p = 0, whatever the bias.
        self.hidden = [_extended(hidden, 0.0) for hidden, _ in head.products]
        self.targets, self.lse = _extended(targets, -1), _extended(saved.lse, torch.inf)[:, None]
        self.minus_g = -_extended(g, 0.0)[:, None]
        self.target_dz = _extended(g * saved.one_minus_p, 0.0)

        # Bytes of one row of a group: hidden in both dtypes, its gradient, logits, dz in both dtypes.
        width = sum(hidden.shape[1] for hidden in self.hidden) + VOCAB_BLOCK
        row_bytes = width * (8 + head.hidden.element_size())
        self.group_rows = max(min(_GROUP_ROWS, workspace_bytes // row_bytes) // _PADDING, 1) * _PADDING
        self.row_list, self.first_v = _padded_rows(pairs, targets.numel())
        self.parts = list(_parts(pairs, head.vocab_size, self.group_rows))

        padded = head._replace(**dict(zip(("hidden", "update_hidden"), self.hidden, strict=False)))
        self.gradients = HeadGradients(padded, needs, reduction, self.dtype)
        for i_block in (pairs.counts.per_block_host == 0).nonzero().flatten().tolist():
            for gradient in (*self.gradients.dweight, self.gradients.dbias):
                if gradient is not None:
                    gradient[_vocab_range(i_block, head.vocab_size)] = 0.0

    def process(self, parts: list[_Part], dhidden: list[torch.Tensor | None]) -> None:
        """Gradients of the blocks of these parts; `dhidden` takes what they add to that of each product."""
        sums_of_weight = [_BlockSum(gradient) for gradient in self.gradients.dweight]
        sum_of_bias = _BlockSum(self.gradients.dbias)
        for parts_of_group in _groups(parts, self.group_rows):
            group = self.gather(parts_of_group)
            dz = self.dz(group)
            self.add_dhidden(dhidden, group, dz)
            self.add_dweight(sums_of_weight, group, dz)
            sum_of_bias.add(group.parts, (part.sum(0) for part in dz.split(group.sizes)))

    def gather(self, parts: list[_Part]) -> _Group:
        row = self.row_list[parts[0].rows.start : parts[-1].rows.stop]
        first = parts[0].block.start
        weights = []
        for _, weight in self.head.products:
            span = weight[first : parts[-1].block.stop].to(self.dtype)
            weights.append([span[part.block.start - first : part.block.stop - first] for part in parts])
        hidden = [h.index_select(0, row) for h in self.hidden]  # several times as fast as h[row]
        return _Group(parts, row, hidden, [h.to(self.dtype) for h in hidden], weights)

    def dz(self, group: _Group) -> torch.Tensor:  # [k, 128]
        """Gradient of hidden @ weightᵀ."""
        hidden = zip(*(h.split(group.sizes) for h in group.wide), strict=True)
        weights = zip(*group.weights, strict=True)
        bias = self.head.bias
        x = [
            Product(list(h), self.is_fp32)(list(w), None if bias is None else bias[part.block].to(self.dtype))
            for part, h, w in zip(group.parts, hidden, weights, strict=True)
        ]
        z, slope = transform_logits(torch.cat(x), self.transform)

        # d logps / dz_v = 1[v = y] − p_v
        dz = z.sub_(self.lse[group.row]).exp_().mul_(self.minus_g[group.row])
        first_v = self.first_v[group.parts[0].rows.start : group.parts[-1].rows.stop]
        label_row, column = targets_in(self.targets[group.row] - first_v, dz.shape[1])
        dz[label_row, column] = self.target_dz[group.row[label_row]]
        return times_slope(dz, slope)

    def add_dhidden(self, dhidden: list[torch.Tensor | None], group: _Group, dz: torch.Tensor) -> None:
        for total, weights in zip(dhidden, group.weights, strict=True):
            if total is None:
                continue
            for row, dz_part, weight in zip(
                group.row.split(group.sizes), dz.split(group.sizes), weights, strict=True
            ):
                total.index_add_(0, row, matmul(dz_part, weight.t()))

    def add_dweight(self, sums: list[_BlockSum], group: _Group, dz: torch.Tensor) -> None:
        if not self.needs_weight:
            return
        native = dz.to(self.head.hidden.dtype) if self.is_native else dz
        for block_sum, hidden in zip(sums, group.hidden if self.is_native else group.wide, strict=True):
            if block_sum.gradient is not None:
                operands = zip(native.split(group.sizes), hidden.split(group.sizes), strict=True)
                product = torch.mm if self.is_native else _fp32_product
                block_sum.add(group.parts, (product(dz_part.t(), h) for dz_part, h in operands))


class _BlockSum:
    """Sums over the parts of each block, written to a gradient with the last; nothing where there is none."""

    def __init__(self, gradient: torch.Tensor | None) -> None:
        self.gradient = gradient
        self.total = torch.zeros(())

    def add(self, parts: list[_Part], values: Iterator[torch.Tensor]) -> None:
        if self.gradient is None:
            return
        dtype = compute_dtype(self.gradient)
        for part, value in zip(parts, values, strict=True):
            self.total = value if part.is_first else self.total.to(dtype) + value
            if part.is_last:
                self.gradient[part.block] = self.total


def _has_native_product(x: torch.Tensor) -> bool:
    """Whether products of this 16-bit dtype are faster than fp32's and add up in fp32."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return x.is_cuda or (x.device.type == "cpu" and x.dtype == torch.bfloat16 and _HAS_BF16_PRODUCTS)


# Private to torch. Without these instructions a bf16 product is emulated, at less than fp32's speed.
_HAS_BF16_PRODUCTS = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def _fp32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return matmul(a, b.t())


def _extended(values: torch.Tensor, value: float) -> torch.Tensor:
    return torch.cat([values, values.new_full((1, *values.shape[1:]), value)])


def _halves(parts: list[_Part]) -> list[list[_Part]]:
    """The parts in two runs of about as many rows, each block in one of them."""
    total = parts[-1].rows.stop if parts else 0
    middle = next(
        (i for i, part in enumerate(parts) if part.is_first and 2 * part.rows.start >= total), len(parts)
    )
    return [parts[:middle], parts[middle:]]


def _run_side_by_side(tasks: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Each task with its share of the threads: products this small gain little from more than one."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < len(tasks):
        for task in tasks:
            task()
        return

    def run(task: Callable[[], None]) -> None:
        torch.set_num_threads(threads // len(tasks))
        with torch.no_grad():
            task()

    try:
        with ThreadPoolExecutor(len(tasks)) as pool:
            for future in [pool.submit(run, task) for task in tasks]:
                future.result()
    finally:
        # Threads started later take over what was set last, in whichever thread; one started in the meantime
        # keeps half.
        torch.set_num_threads(threads)


def _padded_counts(pairs: KeptPairs) -> torch.Tensor:
    return (pairs.counts.per_block_host + _PADDING - 1) // _PADDING * _PADDING


def _padded_rows(pairs: KeptPairs, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all blocks, each block's padded with n; and beside each the first entry of its block."""
    counts, padded, device = pairs.counts.per_block_host, _padded_counts(pairs), pairs.row.device
    shift = ((padded - counts).cumsum(0) - (padded - counts)).to(device)
    row = pairs.row.new_full((int(padded.sum()),), n)
    row[torch.arange(len(pairs.row), device=device) + shift[pairs.block]] = pairs.row
    first_v = torch.arange(len(counts), device=counts.device).repeat_interleave(padded) * VOCAB_BLOCK
    return row, first_v.to(device)


def _parts(pairs: KeptPairs, vocab_size: int, group_rows: int) -> Iterator[_Part]:
    start = 0
    for i_block, size in enumerate(_padded_counts(pairs).tolist()):
        block = _vocab_range(i_block, vocab_size)
        for first in range(0, size, group_rows):
            last = min(first + group_rows, size)
            yield _Part(slice(start + first, start + last), block, first == 0, last == size)
        start += size


def _groups(parts: list[_Part], group_rows: int) -> Iterator[list[_Part]]:
    """Consecutive parts that are processed together; their blocks have one width."""
    group: list[_Part] = []
    for part in parts:
        if group:
            first = group[0]
            too_long = part.rows.stop - first.rows.start > group_rows
            too_wide = part.block.stop - first.block.start > _GROUP_BLOCKS * VOCAB_BLOCK
            narrower = part.block.stop - part.block.start < first.block.stop - first.block.start
            if too_long or too_wide or narrower:
                yield group
                group = []
        group.append(part)
    if group:
        yield group


def _vocab_range(i_block: int, vocab_size: int) -> slice:
    return slice(i_block * VOCAB_BLOCK, min((i_block + 1) * VOCAB_BLOCK, vocab_size))
