"""The algorithm in plain PyTorch, by chunks: what CPUs use, and any device without triton.

The same steps as the Triton kernels, on tiles small enough to stay in the processor's cache. Products are
formed in fp32 whatever the input dtype: on CPU a bf16 product rounds its result to bf16, which costs a
gradient error of 5e-2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from focalkern.backends import (
    VOCAB_BLOCK,
    Gradients,
    HeadForward,
    HeadInputs,
    LogitTransform,
    Needs,
    PairForward,
    PairObjective,
)
from focalkern.backends.row_statistics import (
    BlockStatistics,
    ShardStatistics,
    first_maximum_verdict,
    head_forward_of,
    shard_statistics,
)
from focalkern.backends.torch_certified import head_backward_certified as head_backward_certified
from focalkern.backends.torch_kl import kl_backward as kl_backward
from focalkern.backends.torch_kl import kl_forward as kl_forward
from focalkern.backends.torch_tiles import (
    TILE_ROWS,
    HeadGradients,
    RowLogits,
    compute_dtype,
    nonfinite_to_nan,
    targets_in,
    vocab_chunks,
)
from focalkern.layout import Rows, Sequences, sequence_of_output
from focalkern.objective import pair_loss, sequence_scores

if TYPE_CHECKING:
    from focalkern.distributed import PendingSums

EXACT_ROW_COUNT = True
# The certified backward is the faster one up to a share of 0.85. What stops it here is accuracy: in bf16 its
# error is 0.07, 0.23, 0.53 and 0.73 times that of bf16 logits at a share of 0.07, 0.22, 0.42 and 0.70, and on
# another model it was 1.16 times at 0.45 (docs/certified-backward.md).
EXACT_ABOVE_KEPT_SHARE = 0.4

# PyTorch 2.13: the first multi-threaded exp of a process can be off by 1e-4 in one thread's share.
torch.exp(torch.zeros(16))


def head_forward(
    head: HeadInputs, rows: Rows, transform: LogitTransform, outputs: tuple[str, ...]
) -> HeadForward:
    blocks = block_statistics(head, rows, transform, outputs)
    whole = {name: x[None] for name, x in shard_statistics(blocks, rows.targets).given().items()}
    return head_forward_of(ShardStatistics.of(whole), blocks.lse, head.weight.shape[0], rows)


def block_statistics(
    head: HeadInputs, rows: Rows, transform: LogitTransform, outputs: tuple[str, ...]
) -> BlockStatistics:
    n, vocab_size = rows.targets.numel(), head.weight.shape[0]
    dtype, device = compute_dtype(head.hidden), head.hidden.device
    stats = _BlockStats(n, vocab_size, dtype, device, outputs)
    row_poison = torch.zeros(n, dtype=dtype, device=device)
    weight_poison = torch.zeros((), dtype=dtype, device=device)

    for row_start in range(0, n, TILE_ROWS):
        tile_rows = slice(row_start, row_start + TILE_ROWS)
        index = rows.hidden_index[tile_rows]
        logits = RowLogits(head, index, transform)
        row_poison[tile_rows] = logits.poison()
        for start, end in vocab_chunks(vocab_size, index.numel()):
            z, _, weights = logits(start, end)
            if row_start == 0:
                for w in weights:
                    weight_poison += nonfinite_to_nan(w)
            stats.add_tile(z, rows.targets[tile_rows] - start, tile_rows, start)

    return stats.result(row_poison + weight_poison)


def head_backward(
    head: HeadInputs,
    rows: Rows,
    transform: LogitTransform,
    lse: torch.Tensor,  # [n]
    one_minus_p: torch.Tensor,  # [n]
    entropy: torch.Tensor | None,  # [outputs]
    grad_logps: torch.Tensor | None,  # [outputs]
    grad_entropy: torch.Tensor | None,  # [outputs]
    needs: Needs,
    sums: PendingSums | None = None,
) -> Gradients:
    """Exact: recompute the logits of all rows by vocabulary chunks, form dz, and multiply it both ways."""
    logits = RowLogits(head, rows.hidden_index, transform)
    gradients = HeadGradients(head, rows, logits.hidden, needs, sums)
    g = torch.zeros_like(lse) if grad_logps is None else grad_logps[rows.output_index].to(lse.dtype)
    target_dz = g * one_minus_p
    row_entropy = e = None
    if grad_entropy is not None and entropy is not None:
        row_entropy, e = entropy[rows.output_index][:, None], grad_entropy[rows.output_index][:, None]

    for start, end in vocab_chunks(head.weight.shape[0], g.numel()):
        z, slope, weights = logits(start, end)
        p = z.sub_(lse[:, None]).exp_()
        dz_entropy = None
        if e is not None and row_entropy is not None:
            # d entropy / dz_v = −p_v (log p_v + entropy)
            dz_entropy = (torch.special.entr(p) - p * row_entropy).mul_(e)

        # d logps / dz_v = 1[v = y] − p_v
        dz = p.mul_(-g[:, None])
        row, column = targets_in(rows.targets - start, end - start)
        dz[row, column] = target_dz[row]
        if dz_entropy is not None:
            dz += dz_entropy
        if isinstance(slope, torch.Tensor) or slope != 1.0:
            dz = dz.mul_(slope)

        gradients.add(dz, weights, start, end)
    return gradients.result()


def sequence_sums(
    logps: torch.Tensor,  # [outputs] per token, flat, 0 where ignored
    sequences: Sequences,
) -> torch.Tensor:  # [2B]
    count = sequences.lengths.numel()
    sequence = sequence_of_output(sequences.offsets, logps.numel())
    # One after the other in fp32 would lose digits over thousands of tokens.
    accumulate = torch.float32 if logps.device.type == "mps" else torch.float64
    sums = torch.zeros(count, dtype=accumulate, device=logps.device)
    return sums.index_add_(0, sequence, logps.to(accumulate)).to(logps.dtype)


def pair_forward(
    logps: torch.Tensor,  # [2B] sums over completion tokens
    ref_logps: torch.Tensor | None,  # [2B]; None when reference-free
    lengths: torch.Tensor,  # [2B] completion tokens
    adaptive_margin: torch.Tensor | None,  # [B], on top of the objective's margin
    objective: PairObjective,
) -> PairForward:
    score = sequence_scores(logps, ref_logps, lengths, objective.length_normalize)
    score_w, score_l = score.chunk(2)
    u = objective.beta * (score_w - score_l) - objective.margin
    if adaptive_margin is not None:
        u = u - adaptive_margin
    losses, slope = pair_loss(u, objective.gamma, objective.modulation, objective.label_smoothing)

    grad_logps = torch.cat([slope, -slope]) * objective.beta
    if objective.length_normalize:
        grad_logps = grad_logps / lengths
    return PairForward(losses, torch.sigmoid(u), slope, objective.beta * score, grad_logps)


class _BlockStats:
    """Statistics per row and vocabulary block without the label, taken in tile by tile."""

    def __init__(
        self, n: int, vocab_size: int, dtype: torch.dtype, device: torch.device, outputs: tuple[str, ...]
    ) -> None:
        blocks = -(-vocab_size // VOCAB_BLOCK)
        self.target_z = torch.full((n,), -torch.inf, dtype=dtype, device=device)
        self.lse = torch.empty(n, blocks, dtype=dtype, device=device)
        # Entropy and log Σp² of the distribution within the block; both do not change when all logits are
        # shifted.
        self.entropy = torch.empty_like(self.lse) if "entropy" in outputs else None
        self.log_sum_sq = torch.empty_like(self.lse) if "log_sum_sq_probs" in outputs else None
        self.sum_z = self.target_z.new_zeros(n) if "mean_logits" in outputs else None
        self.max_z = torch.empty_like(self.lse) if "is_top1" in outputs else None

    def add_tile(self, z: torch.Tensor, column: torch.Tensor, rows: slice, start: int) -> None:
        """Take in logits [rows, vocab chunk from `start`]; `column` is the label's place there, or
        outside."""
        row, column = targets_in(column, z.shape[1])
        if self.sum_z is not None:
            self.sum_z[rows] += z.sum(-1)
        target_z = z[row, column]
        self.target_z[rows][row] = target_z
        z[row, column] = -torch.inf
        if z.shape[1] % VOCAB_BLOCK:
            padding = -z.shape[1] % VOCAB_BLOCK
            z = torch.nn.functional.pad(z, (0, padding), value=-torch.inf)
        z = z.view(z.shape[0], -1, VOCAB_BLOCK)
        blocks = slice(start // VOCAB_BLOCK, start // VOCAB_BLOCK + z.shape[1])

        block_max = z.amax(-1)
        if self.max_z is not None:
            self.max_z[rows, blocks] = block_max
            own_block = z[row, column // VOCAB_BLOCK]
            before = torch.arange(VOCAB_BLOCK, device=z.device) < (column % VOCAB_BLOCK)[:, None]
            verdict = first_maximum_verdict(target_z, own_block, before)
            self.max_z[rows, blocks][row, column // VOCAB_BLOCK] = verdict

        shift = torch.where(block_max == -torch.inf, 0.0, block_max)
        exp_z = z.sub_(shift[..., None]).exp_()
        log_sum = exp_z.sum(-1).log_()
        self.lse[rows, blocks] = shift + log_sum
        if self.entropy is not None:
            self.entropy[rows, blocks] = log_sum + torch.special.entr(exp_z).sum(-1) / log_sum.exp()
        if self.log_sum_sq is not None:
            self.log_sum_sq[rows, blocks] = exp_z.square_().sum(-1).log_() - 2 * log_sum

    def result(self, poison: torch.Tensor) -> BlockStatistics:
        return BlockStatistics(
            self.target_z + poison,
            self.lse,
            self.entropy,
            self.log_sum_sq,
            None if self.sum_z is None else self.sum_z + poison,
            self.max_z,
        )
