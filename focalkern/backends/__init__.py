"""What a backend takes and returns, and the choice between the two.

Chosen by the public functions, called by `focalkern.autograd`. A backend knows tensors and numbers, not
autograd.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from csrc_triton.launch import VOCAB_BLOCK as VOCAB_BLOCK
from focalkern.layout import Rows, Sequences

if TYPE_CHECKING:
    from focalkern.backends.row_statistics import BlockStatistics
    from focalkern.distributed import PendingSums
    from focalkern.selection import KeptPairs

try:
    import triton  # noqa: F401

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

# tl.dot on bf16 needs tensor cores of Ampere or later; older GPUs take the torch backend.
_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class LogitTransform:
    """z = T(hidden @ weightᵀ + bias): times logit_scale, softcap·tanh(·/softcap), over temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class HeadInputs:
    """What logits are made of: hidden @ weightᵀ (+ update_hidden @ update_weightᵀ) (+ bias).

    `Needs` and `Gradients` have an entry for each, in this order.
    """

    hidden: torch.Tensor  # [M, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None = None  # [V]
    update_hidden: torch.Tensor | None = None  # [M, R]
    update_weight: torch.Tensor | None = None  # [V, R]

    @property
    def products(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The (hidden, weight) whose products the logits are the sum of."""
        if self.update_hidden is None or self.update_weight is None:
            return [(self.hidden, self.weight)]
        return [(self.hidden, self.weight), (self.update_hidden, self.update_weight)]


Needs = tuple[bool, bool, bool, bool, bool]
Gradients = tuple[
    torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


def gradients_in_order(
    dhidden: list[torch.Tensor | None],  # of each product
    dweight: list[torch.Tensor | None],  # of each product
    dbias: torch.Tensor | None,
) -> Gradients:
    update = (dhidden[1], dweight[1]) if len(dhidden) > 1 else (None, None)
    return dhidden[0], dweight[0], dbias, *update


@dataclass(frozen=True)
class HeadForward:
    """Per row (n completion tokens) what the backward needs; per output position what the caller sees.

    Outputs are flat, 0 where ignored; those not asked for are None. The label is left out of `block_lse`, so
    that 1 − p_y is a ratio of sums and not a difference of nearly equal numbers.
    """

    logps: torch.Tensor  # [outputs] fp32
    lse: torch.Tensor  # [n] logsumexp over the vocabulary
    one_minus_p: torch.Tensor  # [n] 1 − p_y
    block_lse: torch.Tensor  # [n, ceil(V / 128)] logsumexp of each vocabulary block without the label
    entropy: torch.Tensor | None = None  # [outputs]
    mean_logits: torch.Tensor | None = None  # [outputs]
    is_top1: torch.Tensor | None = None  # [outputs] bool
    log_sum_sq_probs: torch.Tensor | None = None  # [outputs]


@dataclass(frozen=True)
class KLForward:
    """KL(ref ‖ policy) per output position, and per row (n completion tokens) what the backward needs."""

    kl: torch.Tensor  # [outputs] fp32, flat, 0 where ignored
    lse: torch.Tensor  # [n] logsumexp over the vocabulary, of the policy
    ref_lse: torch.Tensor  # [n] and of the reference


@dataclass(frozen=True)
class PairObjective:
    """The numbers of the pairwise loss; formulas in `focalkern.objective`."""

    beta: float
    gamma: float
    modulation: str
    margin: float
    length_normalize: bool
    label_smoothing: float


@dataclass(frozen=True)
class PairForward:
    """Per pair and per sequence (chosen first), fp32."""

    losses: torch.Tensor  # [B]
    prob: torch.Tensor  # [B] p = σ(u)
    slope: torch.Tensor  # [B] dL/du
    rewards: torch.Tensor  # [2B] β·score
    grad_logps: torch.Tensor  # [2B] dL/dlogps of the sequence's sum, and so of every token of it


class Backend(Protocol):
    """The functions of a backend; `torch_backend` and `triton_backend` are modules of this shape."""

    @property
    def EXACT_ROW_COUNT(self) -> bool:
        """Whether `Rows` must have exactly its real entries, at the price of waiting for the device."""

    @property
    def EXACT_ABOVE_KEPT_SHARE(self) -> float:
        """The share of kept (row, block) pairs above which the exact backward is faster or more accurate."""

    def head_forward(
        self, head: HeadInputs, rows: Rows, transform: LogitTransform, outputs: tuple[str, ...]
    ) -> HeadForward:
        """Log-probs of the rows, and the optional outputs that are named."""

    def block_statistics(
        self, head: HeadInputs, rows: Rows, transform: LogitTransform, outputs: tuple[str, ...]
    ) -> BlockStatistics:
        """What the forward of a head's vocabulary shard has before it knows of the others; targets of other
        shards are negative."""

    def head_backward(
        self,
        head: HeadInputs,
        rows: Rows,
        transform: LogitTransform,
        lse: torch.Tensor,  # [n]
        one_minus_p: torch.Tensor,  # [n]
        entropy: torch.Tensor | None,  # [outputs]
        grad_logps: torch.Tensor | None,  # [outputs]
        grad_entropy: torch.Tensor | None,  # [outputs]
        needs: Needs,
        sums: PendingSums | None = None,  # over the shards of the vocabulary
    ) -> Gradients:
        """Those that `needs` asks for; dhidden summed in fp32 by `sums`, from as soon as it is complete."""

    def head_backward_certified(
        self,
        head: HeadInputs,
        rows: Rows,
        transform: LogitTransform,
        lse: torch.Tensor,  # [n]
        one_minus_p: torch.Tensor,  # [n]
        g: torch.Tensor,  # [n] dL/dlogps of each row
        pairs: KeptPairs,
        tau: float,  # threshold that the pairs were selected by
        needs: Needs,
        workspace_bytes: int,
        sums: PendingSums | None = None,
    ) -> Gradients:
        """As `head_backward`, of the kept pairs alone."""

    def kl_forward(
        self, policy: HeadInputs, ref: HeadInputs, rows: Rows, transform: LogitTransform
    ) -> KLForward:
        """KL(ref ‖ policy) of the rows; neither head has an update."""

    def kl_backward(
        self,
        policy: HeadInputs,
        ref: HeadInputs,
        rows: Rows,
        transform: LogitTransform,
        lse: torch.Tensor,  # [n]
        ref_lse: torch.Tensor,  # [n]
        grad_kl: torch.Tensor,  # [outputs]
        needs: Needs,
    ) -> Gradients:
        """Those of the policy that `needs` asks for."""

    def sequence_sums(
        self,
        logps: torch.Tensor,  # [outputs] per token, flat, 0 where ignored
        sequences: Sequences,
    ) -> torch.Tensor:  # [2B]
        """Sums of the log-probs over the tokens of each sequence."""

    def pair_forward(
        self,
        logps: torch.Tensor,  # [2B] sums over completion tokens
        ref_logps: torch.Tensor | None,  # [2B]; None when reference-free
        lengths: torch.Tensor,  # [2B] completion tokens
        adaptive_margin: torch.Tensor | None,  # [B], on top of the objective's margin
        objective: PairObjective,
    ) -> PairForward:
        """Loss, metrics and gradient of each pair."""


def select_backend(name: str, hidden: torch.Tensor) -> Backend:
    """`auto`: triton where it runs (CUDA of capability 8.0 or later, not float64), else torch."""
    reason = _why_not_triton(hidden)
    if name == "triton" and reason:
        raise ValueError(f"backend='triton' {reason}; use backend='torch' or 'auto'")
    # Only by name under the interpreter, which runs the kernels on the CPU for tests, very slowly.
    if name == "triton" or (name == "auto" and hidden.is_cuda and not reason):
        from focalkern.backends import triton_backend

        return triton_backend
    from focalkern.backends import torch_backend

    return torch_backend


def _why_not_triton(hidden: torch.Tensor) -> str | None:
    if not HAS_TRITON:
        return "needs the triton package, which is not installed"
    if hidden.dtype == torch.float64:
        return "takes float32, float16 or bfloat16 hidden; got float64"
    if not hidden.is_cuda:
        if hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"needs hidden on a CUDA device; got {hidden.device}"
    if torch.version.hip is not None:
        return "has no launch configuration for AMD GPUs"
    if torch.cuda.get_device_capability(hidden.device) < _MIN_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or later"
    return None
