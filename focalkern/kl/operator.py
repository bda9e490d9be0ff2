"""`linear_kl`: per-token KL divergence between the distributions of two LM heads, policy and reference."""

from __future__ import annotations

import torch

from focalkern import checks
from focalkern.autocast import autocast_head, autocast_tensors
from focalkern.backends import select_backend
from focalkern.compiler import not_compiled
from focalkern.kl.function import LinearKLFunction
from focalkern.options import HeadOptions
from focalkern.rows import pick_rows


@not_compiled
def linear_kl(
    hidden: torch.Tensor,  # [..., T, H]
    weight: torch.Tensor,  # [V, H]
    ref_hidden: torch.Tensor,  # [..., T, H_ref]
    ref_weight: torch.Tensor,  # [V, H_ref]
    labels: torch.Tensor,  # [..., T]
    *,
    bias: torch.Tensor | None = None,  # [V]
    ref_bias: torch.Tensor | None = None,  # [V]
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Per-token KL(π_ref ‖ π_θ) of two LM heads, without holding the `[tokens, vocab]` logits of either.

        z = logit_scale·(hidden @ weightᵀ + bias);  z = softcap·tanh(z/softcap);  z = z/temperature
        KL_t = Σ_v p_ref[t, v]·(log p_ref[t, v] − log p[t, v]),  p = softmax(z) of each model

    Summed along a sequence this is the sequential KL divergence of α-DPO (Eq. 18) and of TDPO (Zeng et al.,
    2024); with a teacher as reference, the forward-KL distillation loss. What is kept per token in the
    forward are three numbers for each block of 128 vocabulary entries.

    Args:
        hidden: `[..., T, H]` fp32, fp16 or bf16 (fp64 with the torch backend): the policy's last hidden
            states.
        weight: `[V, H]`, dtype of hidden: the policy's head. Under autocast all of hidden, weight and bias,
            of either model, are cast to the autocast dtype.
        ref_hidden: `[..., T, H_ref]`, dtype of hidden: the reference's; H_ref may differ from H.
        ref_weight: `[V, H_ref]`, dtype of hidden: the reference's head over the same vocabulary.
        labels: `[..., T]` int64 or int32, in [0, V) or `ignore_index`: they say which positions count.
        bias, ref_bias: `[V]`, dtype of hidden.
        shift: labels are the input ids (prompt masked), position t predicts label t+1, the result is `[..., T
            − 1]`. One dimension is one sequence, unless `cu_seqlens` says otherwise.
        cu_seqlens: `[S + 1]` int32 or int64, boundaries of packed sequences, for hidden `[N, H]` and labels
            `[N]`; the result is `[N]`, with `shift` 0 at each sequence's last position.
        temperature, softcap, logit_scale: of the logits of both models.
        backend: "triton", "torch", or "auto": triton on CUDA where it is installed, else torch.

    Returns:
        The KL in nats, fp32 (fp64 for fp64 inputs), shape of the (shifted) labels, 0 where ignored, never
        negative, and 0 exactly between equal models. Differentiable in hidden, weight and bias, always
        exactly; the reference is a constant. Masked positions take no part, NaN there included; NaN or inf
        elsewhere in hidden or weight of either model gives NaN. An entry that a bias of −inf removes from the
        reference adds nothing; one that it removes from the policy alone makes the KL inf.

    Raises:
        ValueError, TypeError: naming the argument; also where a tensor of the reference requires grad while
            gradients are being recorded.

    On CUDA the forward waits for the device once, as that of `linear_logps`.
    """
    options = HeadOptions(
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        backend=backend,
    )
    hidden, weight, bias = autocast_head(hidden, weight, bias)
    checks.check_head(hidden, weight, bias)
    ref_hidden, ref_weight, ref_bias = autocast_tensors(hidden.device, ref_hidden, ref_weight, ref_bias)
    checks.check_ref_head(ref_hidden, ref_weight, ref_bias, hidden, weight)
    checks.check_labels(labels, hidden)
    checks.check_shift(shift, labels, cu_seqlens)
    if cu_seqlens is not None:
        checks.check_packed_hidden(hidden)
        checks.check_cu_seqlens(cu_seqlens, hidden)

    rows = pick_rows(labels, ignore_index, shift, cu_seqlens, hidden.device)
    rows.check_targets(weight.shape[0], ignore_index)
    kl = LinearKLFunction.apply(
        rows.gather(hidden),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        rows.gather(ref_hidden),
        ref_weight.contiguous(),
        None if ref_bias is None else ref_bias.contiguous(),
        options.transform,
        select_backend(backend, hidden),
    )
    return rows.spread(kl)
