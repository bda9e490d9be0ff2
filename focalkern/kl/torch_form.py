"""`linear_kl` in plain PyTorch: logits of both heads by chunks, KL by vocabulary block, exact backward."""

from __future__ import annotations

import torch

from csrc_triton.launch import VOCAB_BLOCK
from focalkern.products import ExactGradients
from focalkern.records import Gradients, Head, KLForward, LogitTransform, Needs
from focalkern.torch_logits import (
    TILE_ROWS,
    Logits,
    compute_dtype,
    in_blocks,
    nonfinite_to_nan,
    times_slope,
    vocab_chunks,
)


def forward(policy: Head, ref: Head, transform: LogitTransform) -> KLForward:
    n, vocab_size, dtype = len(policy.hidden), policy.vocab_size, compute_dtype(policy.hidden)
    shape = (n, -(-vocab_size // VOCAB_BLOCK))
    block_lse, block_ref_lse, block_kl = (
        torch.empty(shape, dtype=dtype, device=policy.hidden.device) for _ in range(3)
    )

    for row_start in range(0, n, TILE_ROWS):
        rows = slice(row_start, row_start + TILE_ROWS)
        logits, ref_logits = Logits(policy, transform, rows), Logits(ref, transform, rows)
        for start, end in vocab_chunks(vocab_size, len(block_kl[rows])):
            tile = rows, slice(start // VOCAB_BLOCK, -(-end // VOCAB_BLOCK))
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
    return KLForward(kl=kl, lse=lse, ref_lse=ref_lse)


def backward(
    policy: Head, ref: Head, transform: LogitTransform, saved: KLForward, grad_kl: torch.Tensor, needs: Needs
) -> Gradients:
    logits, ref_logits = Logits(policy, transform), Logits(ref, transform)
    gradients = ExactGradients(policy, logits.hidden, needs)
    for start, end in vocab_chunks(policy.vocab_size, grad_kl.numel()):
        ref_z, _, _ = ref_logits(start, end)
        ref_p = ref_z.sub_(saved.ref_lse[:, None]).exp_()
        z, slope, weights = logits(start, end)
        # d KL / dz_v = p_v − ref_p_v
        dz = z.sub_(saved.lse[:, None]).exp_().sub_(ref_p).mul_(grad_kl[:, None])
        gradients.add(times_slope(dz, slope), weights, start)
    return gradients.result()


def _block_log_softmax(logits: Logits, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [rows, blocks, 128] within each block of a chunk, and the blocks' logsumexp."""
    z, _, weights = logits(start, end)
    z = in_blocks(z)
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
