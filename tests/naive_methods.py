"""The losses of `focalkern.methods` once more: each paper's equation word for word, for float64.

In probabilities and plain logarithms, nothing stabilised: e^reward overflows where the library's forms do
not. `test_methods.py` compares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Numbers:
    """What the equations are about: w the chosen, l the rejected one; [B] each."""

    logp_w: Tensor
    logp_l: Tensor
    ref_w: Tensor
    ref_l: Tensor
    len_w: Tensor
    len_l: Tensor
    beta: float
    plain_logp_w: Tensor  # without LD-DPO's weights
    plain_logp_l: Tensor
    norm_w: Tensor  # Σ_t log Σ_v p_tv²
    norm_l: Tensor

    @property
    def ratio_w(self) -> Tensor:  # π_θ/π_ref
        return torch.exp(self.logp_w) / torch.exp(self.ref_w)

    @property
    def ratio_l(self) -> Tensor:
        return torch.exp(self.logp_l) / torch.exp(self.ref_l)

    @property
    def reward_w(self) -> Tensor:
        return self.beta * torch.log(self.ratio_w)

    @property
    def reward_l(self) -> Tensor:
        return self.beta * torch.log(self.ratio_l)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def preferred(first: Tensor, second: Tensor) -> Tensor:
    """Bradley-Terry: the probability that the first is preferred."""
    return torch.exp(first) / (torch.exp(first) + torch.exp(second))


def dpo(x: Numbers, smoothing: float = 0.0) -> Tensor:
    w_wins, l_wins = preferred(x.reward_w, x.reward_l), preferred(x.reward_l, x.reward_w)
    return -(1 - smoothing) * torch.log(w_wins) - smoothing * torch.log(l_wins)


def hinge(x: Numbers) -> Tensor:
    return torch.clamp(1 - (x.reward_w - x.reward_l), min=0)


def ipo(x: Numbers) -> Tensor:
    h = x.reward_w / x.beta / x.len_w - x.reward_l / x.beta / x.len_l
    return (h - 1 / (2 * x.beta)) ** 2


def sigmoid_norm(x: Numbers) -> Tensor:
    return -torch.log(preferred(x.reward_w / x.len_w, x.reward_l / x.len_l))


def exo_pair(x: Numbers, smoothing: float) -> Tensor:
    q = torch.stack([preferred(x.reward_w, x.reward_l), preferred(x.reward_l, x.reward_w)])
    p = q.new_tensor([[1 - smoothing], [smoothing]])
    return (q * torch.log(q / p)).sum(0)


def robust(x: Numbers, smoothing: float) -> Tensor:
    clean = -torch.log(preferred(x.reward_w, x.reward_l))
    flipped = -torch.log(preferred(x.reward_l, x.reward_w))
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def discopop(x: Numbers, tau: float) -> Tensor:
    rho = x.reward_w - x.reward_l
    mixing = sigmoid(rho / tau)
    return (1 - mixing) * torch.log(1 + torch.exp(-rho)) + mixing * torch.exp(-rho)


def odpo(x: Numbers, offset: Tensor) -> Tensor:
    return -torch.log(sigmoid(x.reward_w - x.reward_l - offset))


def r_dpo(x: Numbers, alpha: float) -> Tensor:
    # The reward that is maximised is r(x, y) − α·|y|, so that r = β·log(π_θ/π_ref) + α·|y| + β·log Z.
    return -torch.log(preferred(x.reward_w + alpha * x.len_w, x.reward_l + alpha * x.len_l))


def nca_pair(x: Numbers) -> Tensor:
    down = torch.log(sigmoid(-x.reward_w)) + torch.log(sigmoid(-x.reward_l))
    return -(torch.log(sigmoid(x.reward_w)) + down / 2)


def bco_pair(x: Numbers) -> Tensor:
    return -torch.log(sigmoid(x.reward_w)) - torch.log(1 - sigmoid(x.reward_l))


def sppo_hard(x: Numbers) -> Tensor:
    eta = 1 / x.beta
    won, lost = 1, 0  # the probability of winning against the other of the pair
    chosen = torch.log(x.ratio_w) - eta * (won - 0.5)
    rejected = torch.log(x.ratio_l) - eta * (lost - 0.5)
    return chosen**2 + rejected**2


def apo_zero(x: Numbers) -> Tensor:
    return (1 - sigmoid(x.reward_w)) + sigmoid(x.reward_l)


def apo_down(x: Numbers) -> Tensor:
    return sigmoid(x.reward_w) + (1 - sigmoid(x.reward_w - x.reward_l))


def aot(x: Numbers, smoothing: float = 0.0) -> Tensor:
    policy, ref = x.logp_w - x.logp_l, x.ref_w - x.ref_l
    u = x.beta * (policy[torch.argsort(policy)] - ref[torch.argsort(ref)])
    return -(1 - smoothing) * torch.log(sigmoid(u)) - smoothing * torch.log(sigmoid(-u))


def aot_unpaired(x: Numbers, smoothing: float = 0.0) -> Tensor:
    u = x.reward_w[torch.argsort(x.reward_w)] - x.reward_l[torch.argsort(x.reward_l)]
    return -(1 - smoothing) * torch.log(sigmoid(u)) - smoothing * torch.log(sigmoid(-u))


def kto(x: Numbers, kl: Tensor, desirable: float = 1.0, undesirable: float = 1.0) -> Tensor:
    r_w, r_l = x.reward_w / x.beta, x.reward_l / x.beta
    value_w = desirable * sigmoid(x.beta * (r_w - kl))
    value_l = undesirable * sigmoid(x.beta * (kl - r_l))
    return torch.cat([desirable - value_w, undesirable - value_l])


def tdpo1(x: Numbers, chosen_kl: Tensor, rejected_kl: Tensor) -> Tensor:
    u = x.reward_w - x.reward_l
    delta = x.beta * rejected_kl - x.beta * chosen_kl
    return -torch.log(sigmoid(u - delta))


def tdpo2(
    x: Numbers, chosen_kl: Tensor, rejected_kl: Tensor, alpha: float = 0.5, constant: bool = True
) -> Tensor:
    u = x.reward_w - x.reward_l
    delta = x.beta * rejected_kl - x.beta * (chosen_kl.detach() if constant else chosen_kl)
    return -torch.log(sigmoid(u - alpha * delta))


def sft(x: Numbers) -> Tensor:
    return -x.plain_logp_w.sum() / x.len_w.sum()


def cpo(x: Numbers, nll_weight: float = 1.0, smoothing: float = 0.0) -> Tensor:
    w, l = torch.exp(x.beta * x.logp_w), torch.exp(x.beta * x.logp_l)  # noqa: E741
    prefer = -(1 - smoothing) * torch.log(w / (w + l)) - smoothing * torch.log(l / (w + l))
    return prefer + nll_weight * sft(x)


def orpo(x: Numbers) -> Tensor:
    p_w, p_l = torch.exp(x.logp_w / x.len_w), torch.exp(x.logp_l / x.len_l)
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return sft(x) - x.beta * torch.log(sigmoid(torch.log(odds_ratio)))


def slic_hf(x: Numbers, margin: float = 1.0, regularization: float = 0.1) -> Tensor:
    return torch.clamp(margin - x.logp_w + x.logp_l, min=0) - regularization * x.logp_w


def rrhf(x: Numbers, regularization: float = 1.0) -> Tensor:
    return torch.clamp(x.logp_l / x.len_l - x.logp_w / x.len_w, min=0) - regularization * x.logp_w


GENERATORS = {
    "reverse_kl": lambda t, alpha: t * torch.log(t),
    "forward_kl": lambda t, alpha: -torch.log(t),
    "js_divergence": lambda t, alpha: t * torch.log(t) - (t + 1) * torch.log((t + 1) / 2),
    "alpha_divergence": lambda t, alpha: (t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1)),
}


def f_prime(f_divergence: str, t: Tensor, alpha: float) -> Tensor:
    """f′(t) − f′(1) of D_f = E_ref[f(π_θ/π_ref)], by autograd. The constant is in log Z(x), which cancels."""
    at = torch.stack([t, torch.ones_like(t)])
    if not at.requires_grad:
        at.requires_grad_()
    with torch.enable_grad():
        f = GENERATORS[f_divergence](at, alpha)
    (slope,) = torch.autograd.grad(f.sum(), at, create_graph=True)
    return slope[0] - slope[1]


def f_dpo(method, f_divergence: str, alpha: float = 0.5):
    """The method where log(π_θ/π_ref) is replaced by f′(π_θ/π_ref)."""

    def naive(x: Numbers, **tensors) -> Tensor:
        # The method sees log-probs whose ratio to the reference is the score.
        score_w, score_l = f_prime(f_divergence, x.ratio_w, alpha), f_prime(f_divergence, x.ratio_l, alpha)
        return method(replace(x, logp_w=x.ref_w + score_w, logp_l=x.ref_l + score_l), **tensors)

    return naive


def wpo(method):
    """The method times w(y_w)·w(y_l), w = Π_t (p_t(y_t)/Σ_v p_tv²)^(1/|y|), constants."""

    def naive(x: Numbers, **tensors) -> Tensor:
        weight_w = (torch.exp(x.plain_logp_w) / torch.exp(x.norm_w)) ** (1 / x.len_w)
        weight_l = (torch.exp(x.plain_logp_l) / torch.exp(x.norm_l)) ** (1 / x.len_l)
        return (weight_w * weight_l).detach() * method(x, **tensors)

    return naive
