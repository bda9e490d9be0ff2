"""Preference losses for `FusedPairLoss`: the baselines of the three papers, and TRL's.

    loss_fn = FusedPairLoss(ipo, beta=0.1)
    loss_fn = FusedPairLoss(partial(robust, label_smoothing=0.1), beta=0.1)

In every docstring: Δ = score_w − score_l, score = log(π_θ/π_ref), r = β·score, logp and |·| the log-prob of a
sequence and its number of completion tokens, w the chosen and l the rejected one. Where TRL's DPOTrainer has
the loss, its `loss_type` is named. FocalPO, SimPO, α-DPO and plain DPO have a faster form in
`FusedFocalPOLoss`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid

from focalkern import checks
from focalkern.pairs.pair_loss import PairLoss, Pairs, check_function, described, parameters_of

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# ------------------------------------------------------------------------------------- functions of Δ alone


def dpo(pairs: Pairs, label_smoothing: float = 0.0) -> torch.Tensor:  # [B]
    """−(1−ε)·log σ(β·Δ) − ε·log σ(−β·Δ): DPO (Rafailov et al. 2023), with ε > 0 cDPO. TRL: "sigmoid"."""
    logits = pairs.beta * (pairs.chosen_scores - pairs.rejected_scores)
    return _smoothed(logits, label_smoothing)


def hinge(pairs: Pairs) -> torch.Tensor:  # [B]
    """max(0, 1 − β·Δ): the hinge loss of RSO and SLiC (Liu et al. 2024). TRL: "hinge"."""
    return torch.relu(1 - pairs.beta * (pairs.chosen_scores - pairs.rejected_scores))


def ipo(pairs: Pairs) -> torch.Tensor:  # [B]
    """(Δ − 1/(2β))² with scores per token: IPO (Azar et al. 2024, Eq. 17, averaged). TRL: "ipo"."""
    chosen = _per_token(pairs.chosen_scores, pairs.chosen_lengths)
    rejected = _per_token(pairs.rejected_scores, pairs.rejected_lengths)
    return (chosen - rejected - 1 / (2 * pairs.beta)) ** 2


def sigmoid_norm(pairs: Pairs) -> torch.Tensor:  # [B]
    """−log σ(β·Δ) with scores per token: length-normalised DPO (Tülu 3). TRL: "sigmoid_norm"."""
    chosen = _per_token(pairs.chosen_scores, pairs.chosen_lengths)
    rejected = _per_token(pairs.rejected_scores, pairs.rejected_lengths)
    return -logsigmoid(pairs.beta * (chosen - rejected))


def exo_pair(pairs: Pairs, label_smoothing: float = 1e-3) -> torch.Tensor:  # [B]
    """KL(q ‖ (1−ε, ε)) with q = (σ(β·Δ), σ(−β·Δ)): EXO (Ji et al. 2024, Eq. 16), ε > 0. TRL: "exo_pair"."""
    checks.check_number("label_smoothing", label_smoothing, low=0.0, high=0.5, exclude_low=True)
    logits = pairs.beta * (pairs.chosen_scores - pairs.rejected_scores)
    log_q_w, log_q_l = logsigmoid(logits), logsigmoid(-logits)
    chosen = log_q_w.exp() * (log_q_w - math.log1p(-label_smoothing))
    return chosen + log_q_l.exp() * (log_q_l - math.log(label_smoothing))


def robust(pairs: Pairs, label_smoothing: float) -> torch.Tensor:  # [B]
    """[−(1−ε)·log σ(β·Δ) + ε·log σ(−β·Δ)]/(1−2ε): unbiased when a share ε < 1/2 of the labels is flipped.

    Robust DPO (Chowdhury et al. 2024). TRL: "robust".
    """
    checks.check_number("label_smoothing", label_smoothing, low=0.0, high=0.5, exclude_high=True)
    logits = pairs.beta * (pairs.chosen_scores - pairs.rejected_scores)
    flipped = label_smoothing * logsigmoid(-logits)
    return (flipped - (1 - label_smoothing) * logsigmoid(logits)) / (1 - 2 * label_smoothing)


def discopop(pairs: Pairs, discopop_tau: float = 0.05) -> torch.Tensor:  # [B]
    """−(1−m)·log σ(u) + m·e^(−u), u = β·Δ, m = σ(u/τ): DiscoPOP (Lu et al. 2024, Eq. 5). TRL: "discopop"."""
    checks.check_number("discopop_tau", discopop_tau, low=0.0, exclude_low=True)
    logits = pairs.beta * (pairs.chosen_scores - pairs.rejected_scores)
    mixture = torch.sigmoid(logits / discopop_tau)
    # m·e^(−u) as one exponent: its factors are 0 and inf for a badly misranked pair.
    return (1 - mixture) * -logsigmoid(logits) + torch.exp(logsigmoid(logits / discopop_tau) - logits)


def odpo(pairs: Pairs, *, offset: torch.Tensor) -> torch.Tensor:  # [B]
    """−log σ(β·Δ − offset): ODPO (Amini et al. 2024).

    `offset` [B] is the paper's α·log(reward_w − reward_l), or whatever says by how much a pair should be
    apart.
    """
    return -logsigmoid(pairs.beta * (pairs.chosen_scores - pairs.rejected_scores) - offset)


def r_dpo(pairs: Pairs, length_penalty: float) -> torch.Tensor:  # [B]
    """−log σ(β·Δ + α·(|w| − |l|)), α = `length_penalty` per token: R-DPO (Park et al. 2024).

    α > 0 holds the length down: pairs whose chosen is the shorter count for more. The code of α-DPO's authors
    has the opposite sign.
    """
    checks.check_number("length_penalty", length_penalty)
    longer = (pairs.chosen_lengths - pairs.rejected_lengths).to(pairs.chosen_logps)
    return -logsigmoid(pairs.beta * (pairs.chosen_scores - pairs.rejected_scores) + length_penalty * longer)


# ----------------------------------------------------------------- functions of the two log-ratios themselves


def nca_pair(pairs: Pairs) -> torch.Tensor:  # [B]
    """−log σ(r_w) − ½·log σ(−r_w) − ½·log σ(−r_l): NCA (Chen et al. 2024). TRL: "nca_pair"."""
    chosen, rejected = _rewards(pairs)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: Pairs) -> torch.Tensor:  # [B]
    """−log σ(r_w) − log σ(−r_l): BCO (Jung et al. 2024) without its running δ. TRL: "bco_pair"."""
    chosen, rejected = _rewards(pairs)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(pairs: Pairs) -> torch.Tensor:  # [B]
    """(score_w − 1/(2β))² + (score_l + 1/(2β))²: SPPO (Wu et al. 2024, Eq. 4.7, hard). TRL: "sppo_hard"."""
    target = 0.5 / pairs.beta
    return (pairs.chosen_log_ratios - target) ** 2 + (pairs.rejected_log_ratios + target) ** 2


def apo_zero(pairs: Pairs) -> torch.Tensor:  # [B]
    """1 − σ(r_w) + σ(r_l): APO-zero (D'Oosterlinck et al. 2024, Eq. 7), w up, l down. TRL: "apo_zero"."""
    chosen, rejected = _rewards(pairs)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs) -> torch.Tensor:  # [B]
    """σ(r_w) + 1 − σ(r_w − r_l): APO-down (D'Oosterlinck et al. 2024, Eq. 8), both down. TRL: "apo_down"."""
    chosen, rejected = _rewards(pairs)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def aot(pairs: Pairs, label_smoothing: float = 0.0) -> torch.Tensor:  # [B]
    """DPO's loss of the sorted log-odds of π_θ minus the sorted log-odds of π_ref: AOT (Melnyk et al. 2024).

    Sorted within the batch of this process. TRL: "aot".
    """
    ref_chosen_logps, ref_rejected_logps = pairs.references()
    log_odds, ref_log_odds = pairs.chosen_logps - pairs.rejected_logps, ref_chosen_logps - ref_rejected_logps
    delta = log_odds.sort().values - ref_log_odds.sort().values
    return _smoothed(pairs.beta * delta, label_smoothing)


def aot_unpaired(pairs: Pairs, label_smoothing: float = 0.0) -> torch.Tensor:  # [B]
    """DPO's loss of the sorted chosen minus the sorted rejected scores. TRL: "aot_unpaired"."""
    delta = pairs.chosen_log_ratios.sort().values - pairs.rejected_log_ratios.sort().values
    return _smoothed(pairs.beta * delta, label_smoothing)


def kto(
    pairs: Pairs, *, kl: torch.Tensor, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> torch.Tensor:  # [2B]
    """λ_w·(1 − σ(r_w − β·kl)) and λ_l·(1 − σ(β·kl − r_l)), one per sequence: KTO (Ethayarajh et al. 2024).

    `kl` is the estimate of KL(π_θ ‖ π_ref), from completions beside prompts that are not their own: `kto_kl`.
    TRL: its KTOTrainer.
    """
    checks.check_number("desirable_weight", desirable_weight, low=0.0)
    checks.check_number("undesirable_weight", undesirable_weight, low=0.0)
    chosen, rejected = _rewards(pairs)
    kl = pairs.beta * kl
    return torch.cat(
        [desirable_weight * torch.sigmoid(kl - chosen), undesirable_weight * torch.sigmoid(rejected - kl)]
    )


@torch.no_grad()
def kto_kl(
    kl_logps: torch.Tensor,  # [n]
    ref_kl_logps: torch.Tensor,  # [n]
    process_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:  # []
    """max(0, mean(log π_θ − log π_ref)) of completions paired with other prompts: KTO's estimate of the KL.

    The mean is over all ranks of the process group, where torch.distributed is initialised; each with as
    many.
    """
    kl = (kl_logps - ref_kl_logps).mean()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(kl, group=process_group)
        kl /= dist.get_world_size(process_group)
    return kl.clamp(min=0)


def tdpo1(pairs: Pairs, *, chosen_kl: torch.Tensor, rejected_kl: torch.Tensor) -> torch.Tensor:  # [B]
    """−log σ(β·Δ − β·(KL_l − KL_w)): TDPO₁ (Zeng et al. 2024; α-DPO Eq. 17-18).

    `chosen_kl`, `rejected_kl` [B]: Σ_t KL(π_ref ‖ π_θ), `linear_kl(...).sum(-1)`, with their gradients.
    """
    return tdpo2(pairs, chosen_kl=chosen_kl, rejected_kl=rejected_kl, kl_weight=1.0, stop_gradient=False)


def tdpo2(
    pairs: Pairs,
    *,
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    kl_weight: float = 0.5,
    stop_gradient: bool = True,
) -> torch.Tensor:  # [B]
    """−log σ(β·Δ − a·β·(KL_l − sg[KL_w])): TDPO₂ (Zeng et al. 2024), a = `kl_weight`; KL as in `tdpo1`."""
    checks.check_number("kl_weight", kl_weight)
    chosen_kl = chosen_kl.detach() if stop_gradient else chosen_kl
    delta = pairs.chosen_log_ratios - pairs.rejected_log_ratios
    return -logsigmoid(pairs.beta * (delta - kl_weight * (rejected_kl - chosen_kl)))


# ---------------------------------------------------------------------------------------- without a reference


def sft(pairs: Pairs) -> torch.Tensor:  # []
    """−Σ logp_w / Σ |w| over the batch: the NLL of the chosen tokens. TRL: "sft"."""
    chosen, _ = pairs.sums("logps")
    return -chosen.sum() / pairs.chosen_lengths.sum().clamp(min=1)


def cpo(pairs: Pairs, nll_weight: float = 1.0, label_smoothing: float = 0.0) -> torch.Tensor:  # [B]
    """−log σ(β·(logp_w − logp_l)) + `nll_weight`·NLL per token: CPO (Xu et al. 2024). TRL: its CPOTrainer."""
    checks.check_number("nll_weight", nll_weight)
    logits = pairs.beta * (pairs.chosen_logps - pairs.rejected_logps)
    return _smoothed(logits, label_smoothing) + nll_weight * sft(pairs)


def orpo(pairs: Pairs) -> torch.Tensor:  # [B]
    """NLL − β·log σ(log odds_w − log odds_l), odds = P/(1−P), P = e^(logp/|·|): ORPO (Hong et al. 2024).

    β is the paper's λ. TRL: its ORPOTrainer, whose NLL also counts the prompt's tokens.
    """
    chosen, rejected = pairs.chosen_mean_logps, pairs.rejected_mean_logps
    log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return sft(pairs) - pairs.beta * logsigmoid(log_odds)


def slic_hf(pairs: Pairs, margin: float = 1.0, regularization: float = 0.1) -> torch.Tensor:  # [B]
    """max(0, δ − logp_w + logp_l) − λ·logp_w: SLiC-HF (Zhao et al. 2023, the chosen as SFT target)."""
    checks.check_number("margin", margin)
    checks.check_number("regularization", regularization)
    hinge = torch.relu(margin - pairs.chosen_logps + pairs.rejected_logps)
    return hinge - regularization * pairs.chosen_logps


def rrhf(pairs: Pairs, regularization: float = 1.0) -> torch.Tensor:  # [B]
    """max(0, logp_l/|l| − logp_w/|w|) − λ·logp_w: RRHF (Yuan et al. 2023, λ = 1)."""
    checks.check_number("regularization", regularization)
    ranking = torch.relu(pairs.rejected_mean_logps - pairs.chosen_mean_logps)
    return ranking - regularization * pairs.chosen_logps


# -------------------------------------------------------------------------------------- made of other losses


def with_f_divergence(function: PairLoss, f_divergence: str, alpha: float | None = None) -> PairLoss:
    """`function` with scores f′(π_θ/π_ref) in place of log(π_θ/π_ref): f-DPO (Wang et al. 2024).

    | f_divergence         | f′(t)                       |
    |----------------------|-----------------------------|
    | `"reverse_kl"`       | log t                       |
    | `"forward_kl"`       | 1 − 1/t                     |
    | `"js_divergence"`    | log(2t/(1+t))               |
    | `"alpha_divergence"` | (t^(α−1) − 1)/(α−1); α → 1 is reverse KL, α = 0 forward KL |

    For losses of Δ; others raise. α is that of TRL, 1 − α that of the paper. Where the power of t exceeds
    e^80 it is held there, without a gradient. TRL: `f_divergence_type`, where α is 0.5 if not given.
    """
    checks.check_choice("f_divergence", f_divergence, F_DIVERGENCES)
    if f_divergence == "alpha_divergence":
        checks.check_number("alpha", alpha)
    elif alpha is not None:
        raise ValueError(f"alpha must be None with f_divergence={f_divergence!r}; got {alpha!r}")
    if f_divergence == "reverse_kl" or alpha == 1:
        return function
    return _WithFDivergence(function, f_divergence, 0.0 if alpha is None else alpha)


def with_wpo_weights(function: PairLoss) -> PairLoss:
    """`function` times a_w·a_l, a = exp(mean_t(logp_t − log Σ_v p_tv²)), constants: WPO (Zhou et al. 2024).

    The weights of its Eq. 2, aligned as its authors found best. Needs `outputs=("log_sum_sq_probs",)`. Losses
    of sorted batches, `aot`, have no pairs to weigh. TRL: `use_weighting`.
    """
    if _sorts(function):
        raise ValueError("function must keep the pairs apart to be weighted; got one that sorts them")
    return _WithWPOWeights(function)


def weighted_sum(*terms: tuple[PairLoss, float]) -> PairLoss:
    """Σ weight·function(pairs), as MPO (Wang et al. 2024) mixes DPO, BCO and SFT. TRL: `loss_weights`.

    `weighted_sum((dpo, 0.8), (sft, 1.0))`. Named tensors go to the functions that take them; 0-dim losses
    count for each pair.
    """
    if not terms or not all(isinstance(term, tuple) and len(term) == 2 for term in terms):
        raise ValueError(f"terms must be (function, weight) pairs, one after the other; got {terms!r}")
    for _, weight in terms:
        checks.check_number("weight", weight)
    return _WeightedSum(terms)


class _Combined(torch.nn.Module):
    """A loss made of others. A module, so that those that are modules keep their state and mode."""

    def __init__(self, *functions: PairLoss) -> None:
        super().__init__()
        for function in functions:
            check_function(function)
        self.functions = functions
        self.inner = torch.nn.ModuleList(f for f in functions if isinstance(f, torch.nn.Module))


class _WithFDivergence(_Combined):
    def __init__(self, function: PairLoss, f_divergence: str, alpha: float) -> None:
        super().__init__(function)
        self.f_divergence, self.alpha = f_divergence, alpha

    def forward(self, pairs: Pairs, **tensors: torch.Tensor) -> torch.Tensor:
        if pairs.score_of_log_ratio is not None:
            raise ValueError("f_divergence must be one: this loss has another inside")
        used = []

        def score(log_ratio: torch.Tensor) -> torch.Tensor:
            used.append(True)
            return self.score(log_ratio)

        losses = self.functions[0](replace(pairs, score_of_log_ratio=score), **tensors)
        if not used:
            raise ValueError("f_divergence must be 'reverse_kl' with this loss, which has no reference")
        return losses

    def score(self, log_ratio: torch.Tensor) -> torch.Tensor:
        if self.f_divergence == "js_divergence":
            return math.log(2) + logsigmoid(log_ratio)
        # e^80 is a number in fp32, and no sequence at that distance from its reference has a use for more.
        exponent = ((self.alpha - 1) * log_ratio).clamp(max=80.0)
        return torch.expm1(exponent) / (self.alpha - 1)

    def extra_repr(self) -> str:
        return f"{described(self.functions[0])}, {self.f_divergence}, alpha={self.alpha}"


class _WithWPOWeights(_Combined):
    def forward(self, pairs: Pairs, **tensors: torch.Tensor) -> torch.Tensor:
        chosen, rejected = pairs.sums("logps")
        chosen_norm, rejected_norm = pairs.sums("log_sum_sq_probs")
        chosen_log_weight = _per_token(chosen - chosen_norm, pairs.chosen_lengths)
        rejected_log_weight = _per_token(rejected - rejected_norm, pairs.rejected_lengths)
        losses = self.functions[0](pairs, **tensors)
        if losses.dim() and losses.shape != chosen.shape:
            raise ValueError(
                f"function must give one loss for each pair to be weighted; got {list(losses.shape)}"
            )
        return losses * (chosen_log_weight + rejected_log_weight).detach().exp()

    def extra_repr(self) -> str:
        return described(self.functions[0])


class _WeightedSum(_Combined):
    def __init__(self, terms: Sequence[tuple[PairLoss, float]]) -> None:
        super().__init__(*(function for function, _ in terms))
        self.weights = tuple(weight for _, weight in terms)

    def forward(self, pairs: Pairs, **tensors: torch.Tensor) -> torch.Tensor:
        for name in tensors:
            if not _takes(self, name):
                raise TypeError(f"{name} is taken by none of the functions of the sum")
        losses = []
        for function, weight in zip(self.functions, self.weights, strict=True):
            own = {name: x for name, x in tensors.items() if _takes(function, name)}
            losses.append(weight * function(pairs, **own))
        shapes = {tuple(loss.shape) for loss in losses if loss.dim()}
        if len(shapes) > 1:
            raise ValueError(f"terms must give losses of one shape, or 0-dim; got {sorted(shapes)}")
        return functools.reduce(torch.add, losses)

    def extra_repr(self) -> str:
        terms = zip(self.functions, self.weights, strict=True)
        return ", ".join(f"{weight:g}·{described(function)}" for function, weight in terms)


# ------------------------------------------------------------------------------------------------ their parts


def _takes(function: PairLoss, name: str) -> bool:
    """Whether a function has a parameter of this name for a tensor."""
    if isinstance(function, _Combined):
        return any(_takes(inner, name) for inner in function.functions)
    parameters = parameters_of(function)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _rewards(pairs: Pairs) -> Sequence[torch.Tensor]:
    return pairs.beta * pairs.chosen_log_ratios, pairs.beta * pairs.rejected_log_ratios


def _smoothed(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    checks.check_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
    loss = -(1 - label_smoothing) * logsigmoid(logits)
    return loss - label_smoothing * logsigmoid(-logits) if label_smoothing else loss


def _per_token(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return values / lengths.clamp(min=1)


def _sorts(function: PairLoss) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    inner = function.functions if isinstance(function, _Combined) else ()
    return function in (aot, aot_unpaired) or any(_sorts(f) for f in inner)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − e^x) for x <= 0, by the form that does not cancel."""
    # At 0, where a sure model's log-prob rounds to, it is −∞ with an infinite slope: inf·0 in the chain rule.
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near_zero = x > -math.log(2)
    safe = torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(safe)))
