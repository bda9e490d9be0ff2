"""The probability mass that a certified backward skipped: recorded by that backward, summed up on demand.

A `BackwardRecord` travels from the forward through `LinearLogpsFunction` to the caller's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from focalkern import checks
from focalkern.logps.selection import Selection
from focalkern.records import KeptCounts, LogitTransform
from focalkern.rows import Rows

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


@dataclass(frozen=True)
class DroppedMass:
    """Probability mass that a backward skipped, per row; one shard's values until `totals` is reduced."""

    totals: torch.Tensor  # [n + 2] fp32: δ_t of each row, the pairs that are kept, and all
    g: torch.Tensor  # [n] dL/dlogps

    @classmethod
    def of(cls, selection: Selection, counts: KeptCounts, g: torch.Tensor) -> DroppedMass:
        return cls._of(selection.dropped_mass, counts.total, counts.possible, g)

    @classmethod
    def nothing(cls, counts: KeptCounts, g: torch.Tensor) -> DroppedMass:
        return cls._of(torch.zeros_like(g), counts.possible, counts.possible, g)

    @classmethod
    def _of(cls, mass: torch.Tensor, kept: int, possible: int, g: torch.Tensor) -> DroppedMass:
        # Filled on the device: a tensor of the numbers would be copied there, and waited for.
        pairs = (mass.new_full((1,), float(number), dtype=torch.float32) for number in (kept, possible))
        return cls(torch.cat([mass.float(), *pairs]), g)

    @property
    def per_row(self) -> torch.Tensor:  # [n]
        return self.totals[:-2]

    @property
    def kept_share(self) -> torch.Tensor:  # []
        kept, possible = self.totals[-2:].unbind()
        return torch.where(possible > 0, kept / possible, 1.0)

    @property
    def largest_error(self) -> torch.Tensor:  # [] max_t |g_t|·δ_t
        return torch.where(self.g == 0, 0.0, self.g.abs() * self.per_row).amax()


class BackwardRecord:
    """What one certified backward skipped; NaN until it has run, then filled in place."""

    def __init__(
        self,
        rows: Rows,
        weight: torch.Tensor,  # [V, H] as the caller gave it
        product_dtype: torch.dtype,  # of weight and hidden
        transform: LogitTransform,
        vocab_group: dist.ProcessGroup | None = None,  # the ranks that share the head
    ) -> None:
        def pending(shape: torch.Size) -> torch.Tensor:
            return torch.full(shape, torch.nan, dtype=torch.float32, device=weight.device)

        self.per_token = pending(rows.shape)
        self.kept_share = pending(torch.Size([]))
        self.largest_error = pending(torch.Size([]))  # max_t |g_t|·δ_t
        self.tokens = rows.targets.numel()
        self.position = rows.position
        # As given, not the copy that autocast makes: either lives as long as this record. A parameter itself,
        # not a tensor that shares its storage: what gathered it (ZeRO-3) frees it by emptying the parameter.
        self.weight = weight if weight.is_leaf else weight.detach()
        # Tensors of inference mode have no version, and no backward either.
        self.weight_version = None if weight.is_inference() else weight._version
        # Not "dtype": what casts the outputs of models takes an object that has one for a tensor.
        self.product_dtype = product_dtype
        self.vocab_group = vocab_group
        self.slope = abs(transform.logit_scale) / transform.temperature

    def fill(self, dropped: DroppedMass | None) -> None:
        """None stands for nothing."""
        self.per_token.zero_()
        if dropped is None:
            self.kept_share.fill_(1.0)
            self.largest_error.zero_()
            return
        self.per_token.view(-1).index_copy_(0, self.position, dropped.per_row)
        self.kept_share.copy_(dropped.kept_share)
        self.largest_error.copy_(dropped.largest_error)

    @torch.no_grad()
    def largest_weight_norm(self) -> float:
        """max_v ‖W_v‖₂ in the dtype of the product."""
        # An optimizer counts up the version of a DTensor, not that of its shard.
        weight = self.weight.to_local() if checks.is_dtensor(self.weight) else self.weight
        if not weight.numel() or not weight.untyped_storage().nbytes():
            raise RuntimeError(
                "certificate() needs the weight of the forward, and it is sharded again: call it within"
                " deepspeed.zero.GatheredParameters([lm_head.weight]), or, under FSDP2, between unshard() and"
                " reshard() of the module that holds lm_head"
            )
        if self.weight._version != self.weight_version:
            raise RuntimeError(
                "certificate() needs the weight of the forward, and it has been changed since:"
                " call it before optimizer.step()"
            )
        chunks = (chunk.to(self.product_dtype).float() for chunk in weight.split(_NORM_ROWS))
        largest = torch.stack([torch.linalg.vector_norm(chunk, dim=1).amax() for chunk in chunks]).amax()
        if self.vocab_group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.vocab_group)
        return largest.item()


def certify(record: BackwardRecord | None, dropped_mass: torch.Tensor | None) -> Certificate:
    """The summary of a backward's record; None both stand for an exact backward."""
    if record is None and dropped_mass is not None:
        raise RuntimeError(
            "certificate() needs the record that linear_logps made, and these log-probs come without: ask"
            " what linear_logps returned"
        )
    if record is None:
        return Certificate(0.0, 0.0, 1.0, 0.0)
    kept_share = record.kept_share.item()
    if math.isnan(kept_share):
        raise RuntimeError(
            "certificate() describes a backward, and none has run: call it after loss.backward()"
            " (after a forward under no_grad there is none)"
        )
    if kept_share == 1.0:
        return Certificate(0.0, 0.0, 1.0, 0.0)
    return Certificate(
        mean_dropped_mass=record.per_token.sum().item() / record.tokens,
        max_dropped_mass=record.per_token.amax().item(),
        kept_share=kept_share,
        # |dz| is at most the gradient of the logit times the largest slope of the logit transform.
        dhidden_bound=record.largest_error.item() * record.slope * record.largest_weight_norm(),
    )
