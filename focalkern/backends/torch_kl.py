"""`linear_kl` in plain PyTorch: logits of both heads by chunks, KL by vocabulary block, exact backward.

The same steps as the Triton kernels; called through `torch_backend`.
"""

from __future__ import annotations

import torch

from focalkern.backends import VOCAB_BLOCK, Gradients, HeadInputs, KLForward, LogitTransform, Needs
from focalkern.backends.torch_tiles import (
    TILE_ROWS,
    HeadGradients,
    RowLogits,
    compute_dtype,
    nonfinite_to_nan,
    vocab_chunks,
)
from focalkern.layout import Rows, spread_over_outputs


def kl_forward(policy: HeadInputs, ref: HeadInputs, rows: Rows, transform: LogitTransform) -> KLForward:
    n, vocab_size = rows.targets.numel(), policy.weight.shape[0]
    dtype, device = compute_dtype(policy.hidden), policy.hidden.device
    shape = (n, -(-vocab_size // VOCAB_BLOCK))
    block_lse, block_ref_lse, block_kl = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))

    for row_start in range(0, n, TILE_ROWS):
        tile_rows = slice(row_start, row_start + TILE_ROWS)
        index = rows.hidden_index[tile_rows]
        logits, ref_logits = RowLogits(policy, index, transform), RowLogits(ref, index, transform)
        for start, end in vocab_chunks(vocab_size, index.numel()):
            tile = tile_rows, slice(start // VOCAB_BLOCK, -(-end // VOCAB_BLOCK))
            ref_log_p, block_ref_lse[tile] = _block_log_softmax(ref_logits, start, end)
            log_p, block_lse[tile] = _block_log_softmax(logits, start, end)
            block_kl[tile] = _kl_terms(log_p, ref_log_p).sum(-1)

    lse, ref_lse = torch.logsumexp(block_lse, dim=-1), torch.logsumexp(block_ref_lse, dim=-1)
    # KL of the blocks' probabilities, and within each block in proportion to them.
    ref_log_p = block_ref_lse - ref_lse[:, None]
    ref_p = ref_log_p.exp()
    # A block that the reference never uses may be one that the policy cannot: 0·inf.
    within = torch.where(ref_p == 0.0, 0.0, ref_p * block_kl)
    kl = (_kl_terms(block_lse - lse[:, None], ref_log_p) + within).sum(-1)
    return KLForward(spread_over_outputs(kl, rows), lse, ref_lse)


def kl_backward(
    policy: HeadInputs,
    ref: HeadInputs,
    rows: Rows,
    transform: LogitTransform,
    lse: torch.Tensor,  # [n]
    ref_lse: torch.Tensor,  # [n]
    grad_kl: torch.Tensor,  # [outputs]
    needs: Needs,
) -> Gradients:
    logits = RowLogits(policy, rows.hidden_index, transform)
    ref_logits = RowLogits(ref, rows.hidden_index, transform)
    gradients = HeadGradients(policy, rows, logits.hidden, needs)
    g = grad_kl[rows.output_index].to(logits.dtype)

    for start, end in vocab_chunks(policy.weight.shape[0], g.numel()):
        ref_z, _, _ = ref_logits(start, end)
        ref_p = ref_z.sub_(ref_lse[:, None]).exp_()
        z, slope, weights = logits(start, end)
        # d KL / dz_v = p_v − ref_p_v
        dz = z.sub_(lse[:, None]).exp_().sub_(ref_p).mul_(g[:, None])
        if isinstance(slope, torch.Tensor) or slope != 1.0:
            dz = dz.mul_(slope)
        gradients.add(dz, weights, start, end)
    return gradients.result()


def _block_log_softmax(logits: RowLogits, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [rows, blocks, 128] within each block of a chunk, and the blocks' logsumexp."""
    z, _, weights = logits(start, end)
    if z.shape[1] % VOCAB_BLOCK:
        z = torch.nn.functional.pad(z, (0, -z.shape[1] % VOCAB_BLOCK), value=-torch.inf)
    z = z.view(z.shape[0], -1, VOCAB_BLOCK)
    block_max = z.amax(-1)
    shift = torch.where(block_max == -torch.inf, 0.0, block_max)
    z = z.sub_(shift[..., None])
    log_sum = z.exp().sum(-1).log_()
    # A block of −inf alone keeps its −inf.
    log_p = z.sub_(torch.where(log_sum == -torch.inf, 0.0, log_sum)[..., None])
    poison = logits.poison()[:, None] + sum(nonfinite_to_nan(w) for w in weights)
    return log_p, shift + log_sum + poison


def _kl_terms(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """q − p − p·log(q/p), whose sum over distributions p and q is KL(p ‖ q), from their logarithms.

    No term is negative, and an error common to all log q or all log p cancels to first order: what is left
    when p and q nearly agree is not the rounding of Σp. Where p = 0 the term is q.
    """
    q, p, d = log_q.exp(), log_p.exp(), log_q - log_p
    near = (torch.expm1(d) - d).mul_(p)
    far = q - p - p * d
    terms = torch.where(d.abs() < 1.0, near, far)
    terms = terms.clamp_(min=0.0)  # where expm1(d) is rounded below d
    return torch.where(p == 0.0, q, terms)
