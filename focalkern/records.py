"""The records that travel from the public functions down to the kernels. Imports nothing of the library.

n rows (completion tokens), H hidden size, V vocabulary, R rank of an update, NB = ceil(V / 128) blocks of the
vocabulary. A NamedTuple is one argument of a kernel in `csrc_triton`: its tensors are pointers there, its
None members are compiled away, and so are those of a `Tile`, which are constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class LogitTransform(NamedTuple):
    """z = T(hidden @ weightᵀ + bias): times logit_scale, softcap·tanh(·/softcap), over temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Head(NamedTuple):
    """What logits are made of: hidden @ weightᵀ (+ update_hidden @ update_weightᵀ) (+ bias). Contiguous.

    `Needs` and `Gradients` have an entry for each, in this order.
    """

    hidden: torch.Tensor  # [n, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None = None  # [V]
    update_hidden: torch.Tensor | None = None  # [n, R]
    update_weight: torch.Tensor | None = None  # [V, R]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def products(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The (hidden, weight) whose products the logits are the sum of."""
        if self.update_hidden is None or self.update_weight is None:
            return [(self.hidden, self.weight)]
        return [(self.hidden, self.weight), (self.update_hidden, self.update_weight)]

    def with_hidden(self, hidden: list[torch.Tensor]) -> Head:
        """With other hidden states of each product."""
        return self._replace(hidden=hidden[0], update_hidden=hidden[1] if len(hidden) > 1 else None)


class Needs(NamedTuple):
    """Which gradients of a `Head` are needed."""

    hidden: bool
    weight: bool
    bias: bool
    update_hidden: bool = False
    update_weight: bool = False

    @property
    def of_hidden(self) -> tuple[bool, bool]:
        """Of the hidden states of each product."""
        return self.hidden, self.update_hidden

    @property
    def of_weight(self) -> tuple[bool, bool]:
        return self.weight, self.update_weight


class Gradients(NamedTuple):
    """Gradients of a `Head`; None where not needed."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    update_hidden: torch.Tensor | None = None
    update_weight: torch.Tensor | None = None

    @classmethod
    def of_products(
        cls,
        dhidden: list[torch.Tensor | None],  # of each product
        dweight: list[torch.Tensor | None],  # of each product
        dbias: torch.Tensor | None,
    ) -> Gradients:
        update = (dhidden[1], dweight[1]) if len(dhidden) > 1 else (None, None)
        return cls(dhidden[0], dweight[0], dbias, *update)


class RowValues(NamedTuple):
    """What a head gives for each row, [n] each; beside `logps` those that are asked for, by name.

    The first two are differentiable.
    """

    logps: torch.Tensor  # z_y − logsumexp_v z_v
    entropy: torch.Tensor | None = None  # −Σ_v p_v log p_v
    mean_logits: torch.Tensor | None = None  # mean over the vocabulary of z
    is_top1: torch.Tensor | None = None  # bool: the label is the (first) maximum of z
    log_sum_sq_probs: torch.Tensor | None = None  # log Σ_v p_v²


OUTPUTS = RowValues._fields[1:]


class BlockStatistics(NamedTuple):
    """The forward of one shard of the vocabulary, block by block. A statistic that no output needs is None.

    The label is left out of all but `sum_z`, so that 1 − p_y is a ratio of sums. What is not finite in
    hidden or weight makes `lse`, `target_z` or `sum_z` NaN.
    """

    target_z: torch.Tensor  # [n] the label's logit, −inf where it is in another shard
    lse: torch.Tensor  # [n, NB]
    entropy: torch.Tensor | None = None  # [n, NB] of the distribution within the block
    log_sum_sq: torch.Tensor | None = None  # [n, NB] log Σp² of it
    sum_z: torch.Tensor | None = None  # [n, NB]
    max_z: torch.Tensor | None = None  # [n, NB]; the label's own block: −inf if it is the maximum, or inf


class Saved(NamedTuple):
    """What the backward needs of the forward."""

    lse: torch.Tensor  # [n] logsumexp over the vocabulary
    one_minus_p: torch.Tensor  # [n] 1 − p_y
    block_lse: torch.Tensor | None = None  # [n, NB] without the label
    entropy: torch.Tensor | None = None  # [n]
    rest_mass: torch.Tensor | None = None  # [n] of a shard: its part of 1 − p_y


class Forward(NamedTuple):
    """Inputs and saved results of a forward, from which its backward recomputes the softmax."""

    head: Head
    targets: torch.Tensor  # [n]; negative where the label is in another shard
    transform: LogitTransform
    saved: Saved


class RowGradients(NamedTuple):
    """Gradients of the loss in what a head gives for each row, [n] each."""

    logps: torch.Tensor
    entropy: torch.Tensor | None = None


@dataclass(frozen=True)
class KeptCounts:
    """How many (row, vocabulary block) pairs a certified backward keeps, on the device and on the host."""

    per_block: torch.Tensor  # [NB] int64
    per_row: torch.Tensor  # [n] int64
    per_block_host: torch.Tensor
    per_row_host: torch.Tensor

    @property
    def total(self) -> int:
        return int(self.per_block_host.sum())

    @property
    def possible(self) -> int:
        return self.per_block_host.numel() * self.per_row_host.numel()

    @property
    def share(self) -> float:
        """Of the kept pairs; 1 when there is no row."""
        return self.total / self.possible if self.possible else 1.0


@dataclass(frozen=True)
class KeptPairs:
    """The kept pairs, one vocabulary block after the other, rows ascending within each."""

    row: torch.Tensor  # [K] int64
    block: torch.Tensor  # [K] int64
    counts: KeptCounts


class PairObjective(NamedTuple):
    """The numbers of the pairwise loss; formulas in `focalkern.pairs.objective`."""

    beta: float
    gamma: float
    modulation: str
    margin: float
    length_normalize: bool
    label_smoothing: float | None  # None, or 0, is none


class PairConstants(NamedTuple):
    """What the loss of a pair takes beside the log-probs of the policy."""

    lengths: torch.Tensor  # [2B] int64, completion tokens
    ref_logps: torch.Tensor | None = None  # [2B]; None when reference-free
    adaptive_margin: torch.Tensor | None = None  # [B], on top of the objective's margin


class PairForward(NamedTuple):
    """Per pair and per sequence (chosen first), fp32."""

    losses: torch.Tensor  # [B]
    prob: torch.Tensor  # [B] p = σ(u)
    slope: torch.Tensor  # [B] dL/du
    rewards: torch.Tensor  # [2B] β·score
    grad_logps: torch.Tensor  # [2B] dL/dlogps of the sequence's sum, and so of every token of it


# ------------------------------------------------------------------------------------ of the kernels alone


class Sizes(NamedTuple):
    V: int
    H: int
    R: int = 0


class Scales(NamedTuple):
    """z = x·inner, or outer·tanh(x·inner) with a softcap. `inner` None is 1; `outer` None is no softcap."""

    inner: float | None
    outer: float | None

    @classmethod
    def of(cls, transform: LogitTransform) -> Scales:
        temperature, softcap, logit_scale = transform
        if softcap is not None:
            return cls(logit_scale / softcap, softcap / temperature)
        return cls(None if logit_scale == temperature else logit_scale / temperature, None)


class Tile(NamedTuple):
    """One program's part of a product, and how it is made. Constants of the kernel."""

    m: int
    n: int
    k: int
    r: int  # divides R; 0 where the head has no update
    even_k: bool  # k divides the size that is summed over
    even_v: bool  # 128 divides V
    precision: str  # of products of fp32
    group_m: int  # tiles of m that are in flight together


class Chunk(NamedTuple):
    """A range of the vocabulary, and the row pitch of what holds its dz."""

    start: int
    size: int
    pitch: int


class PairGroup(NamedTuple):
    """Kept pairs whose dz is held together, as ranges in the list of all pairs."""

    start: torch.Tensor  # [NB] int64, of the block's range in the list
    size: torch.Tensor  # [NB] int64
    place: torch.Tensor  # [NB] int64, of the range in dz


class PairTiles(NamedTuple):
    """The tiles of rows that a group's pairs make, block after block."""

    end: torch.Tensor  # [NB] int64, tiles up to and with the block
    block: torch.Tensor  # [tiles] int64


class KLStatistics(NamedTuple):
    """The forward of two heads, block by block."""

    lse: torch.Tensor  # [n, NB] of the policy
    ref_lse: torch.Tensor  # [n, NB]
    kl: torch.Tensor  # [n, NB] KL of the distributions within the block


class KLForward(NamedTuple):
    """KL(ref ‖ policy) of each row, and what the backward needs."""

    kl: torch.Tensor  # [n]
    lse: torch.Tensor  # [n] logsumexp over the vocabulary, of the policy
    ref_lse: torch.Tensor  # [n]
