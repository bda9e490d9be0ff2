"""A low-rank update of a head, such as a LoRA on `lm_head`: part of the logits, never merged into the weight.

Made by the caller, taken by the operator and the losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from focalkern import checks


@dataclass(frozen=True)
class LowRankUpdate:
    """A low-rank update of a head: its logits are hidden @ weightᵀ + update.hidden @ update.weightᵀ (+ bias).

    Both tensors have the dtype of the loss's hidden and weight; under autocast they are cast as those are.
    Each gets a gradient where it asks for one, and so, through `hidden`, does what that was made of.
    """

    hidden: torch.Tensor  # [..., T, R], the tokens of the loss's hidden
    weight: torch.Tensor  # [V, R]

    @classmethod
    def lora(
        cls,
        hidden: torch.Tensor,  # [..., T, H]
        a: torch.Tensor,  # [R, H]
        b: torch.Tensor,  # [V, R]
        scaling: float = 1.0,
    ) -> LowRankUpdate:
        """LoRA (Hu et al., 2021): weight + scaling·b @ a, as scaling·(hidden @ aᵀ) and b.

        Args:
            hidden: `[..., T, H]`, as given to the loss, or that after LoRA's dropout.
            a: `[R, H]`, dtype of hidden, unless under autocast, which casts both.
            b: `[V, R]`.
            scaling: LoRA's α/R, or α/√R.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        checks.check_lora(hidden, a, b, scaling)
        return cls(torch.nn.functional.linear(hidden, a) * scaling, b)
