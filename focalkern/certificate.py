"""What a certified backward left out: filled in by that backward, summed up on demand.

`DroppedMass` travels from the forward through `LinearLogpsFunction` to the caller's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from focalkern.backends import LogitTransform
from focalkern.layout import Rows, spread_over_outputs
from focalkern.selection import KeptCounts, Selection

# Rows of the head whose norms are taken at once.
_NORM_ROWS = 16384


@dataclass(frozen=True)
class Certificate:
    """How much of the gradient the last backward left out: nothing, and `kept_share` 1, when it was exact."""

    mean_dropped_mass: float  # over completion tokens: probability mass of the vocabulary blocks left out
    max_dropped_mass: float
    kept_share: float  # share of (token, vocabulary block) pairs that were computed
    dhidden_bound: float  # upper bound of the L2 error of any row of dhidden, rounding aside

    def __str__(self) -> str:
        return (
            f"dropped mass {self.mean_dropped_mass:.2e} mean, {self.max_dropped_mass:.2e} max per token;"
            f" {self.kept_share:.1%} of the vocabulary blocks kept;"
            f" error of a dhidden row <= {self.dhidden_bound:.2e}"
        )


class DroppedMass:
    """The record of one certified backward; NaN until it has run, then filled in place."""

    def __init__(
        self,
        rows: Rows,
        weight: torch.Tensor,  # [V, H] as the caller gave it
        product_dtype: torch.dtype,  # of weight and hidden
        transform: LogitTransform,
    ) -> None:
        def pending(shape: torch.Size) -> torch.Tensor:
            return torch.full(shape, torch.nan, dtype=torch.float32, device=weight.device)

        self.per_token = pending(rows.output_shape)
        self.kept_share = pending(torch.Size([]))
        self.largest_error = pending(torch.Size([]))  # max_t |g_t|·δ_t
        self.tokens = rows.count
        # As given, not the copy that autocast makes: either lives as long as this record.
        self.weight = weight.detach()
        # Tensors of inference mode have no version, and no backward either.
        self.weight_version = None if weight.is_inference() else weight._version
        # Not "dtype": what casts the outputs of models takes an object that has one for a tensor.
        self.product_dtype = product_dtype
        self.slope = abs(transform.logit_scale) / transform.temperature

    def fill(self, selection: Selection, counts: KeptCounts, rows: Rows) -> None:
        self.per_token.copy_(spread_over_outputs(selection.dropped_mass, rows).view_as(self.per_token))
        self.kept_share.fill_(counts.share)
        self.largest_error.copy_(selection.largest_error)

    def fill_exact(self) -> None:
        self.per_token.zero_()
        self.kept_share.fill_(1.0)
        self.largest_error.zero_()

    def largest_weight_norm(self) -> float:
        """max_v ‖W_v‖₂ in the dtype of the product."""
        if self.weight._version != self.weight_version:
            raise RuntimeError(
                "certificate() needs the weight of the forward, and it has been changed since:"
                " call it before optimizer.step()"
            )
        chunks = (chunk.to(self.product_dtype).float() for chunk in self.weight.split(_NORM_ROWS))
        return torch.stack([torch.linalg.vector_norm(chunk, dim=1).amax() for chunk in chunks]).amax().item()


def certify(dropped: DroppedMass | None, dropped_mass: torch.Tensor | None) -> Certificate:
    """The summary of a backward's record; None both stand for an exact backward."""
    if dropped is None and dropped_mass is not None:
        raise RuntimeError(
            "certificate() needs the record that linear_logps made, and these log-probs come without: ask"
            " what linear_logps returned"
        )
    if dropped is None:
        return Certificate(0.0, 0.0, 1.0, 0.0)
    kept_share = dropped.kept_share.item()
    if math.isnan(kept_share):
        raise RuntimeError(
            "certificate() describes a backward, and none has run: call it after loss.backward()"
            " (after a forward under no_grad there is none)"
        )
    if kept_share == 1.0:
        return Certificate(0.0, 0.0, 1.0, 0.0)
    return Certificate(
        mean_dropped_mass=(dropped.per_token.sum() / dropped.tokens).item(),
        max_dropped_mass=dropped.per_token.amax().item(),
        kept_share=kept_share,
        # |dz| is at most the gradient of the logit times the largest slope of the logit transform.
        dhidden_bound=dropped.largest_error.item() * dropped.slope * dropped.largest_weight_norm(),
    )
