"""The figures of the FocalPO and DynamicFocalPO papers that are plots of functions, by the library's own.

Called by `reproduce.py`. Each function draws one figure; those that the papers make a claim about also return
what the claim comes to.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from focalkern import CosineGamma, ExponentialGamma, LinearGamma
from focalkern.pairs.objective import modulated_nll

MARGINS = torch.linspace(-10, 10, 2001, dtype=torch.float64)  # u = β·(s_w − s_l)
TOTAL_STEPS = 1000


def draw_all(out: Path) -> dict[str, float]:
    """Write the figures to `out`; return the numbers behind the papers' claims."""
    focalpo_figure_2(out)
    claims = focalpo_figure_3(out)
    focalpo_figure_4(out)
    dynamic_figure_1(out)
    dynamic_figure_2(out)
    return claims | lemma_1(out) | table_8()


def weight(u: torch.Tensor, gamma: float, modulation: str = "focalpo") -> torch.Tensor:
    """−dL/du, what multiplies the gradient of the score difference."""
    return -modulated_nll(u, gamma, modulation)[1]


def focalpo_figure_2(out: Path) -> None:
    """Loss against p with the focal factor (1−p)^γ, left, and with FocalPO's p^γ, right."""
    figure, axes = canvas(2)
    p = torch.linspace(1e-3, 1 - 1e-3, 999, dtype=torch.float64)
    for modulation, factor, ax in zip(("focal", "focalpo"), ("(1−p)^γ", "p^γ"), axes, strict=True):
        for gamma in (0.0, 0.05, 0.5, 1.0, 2.0):
            ax.plot(p, modulated_nll(torch.logit(p), gamma, modulation)[0], label=f"γ = {gamma:g}")
        ax.set(title=f"−{factor} log p", xlabel="p", ylabel="loss", ylim=(0, 5))
    save(figure, axes, out / "focalpo-figure-2.png")


def focalpo_figure_3(out: Path) -> dict[str, float]:
    """The terms of FocalPO's gradient (Eq. 6) at γ = 0.05, and where their sum is largest."""
    gamma, u = 0.05, MARGINS
    p = torch.sigmoid(u)
    total = weight(u, gamma)
    figure, axes = canvas(1)
    axes[0].plot(u, weight(u, 0.0), color="tab:blue", label="DPO: 1 − p")
    axes[0].plot(u, p**gamma * (1 - p), color="tab:red", label="p^γ (1 − p)")
    axes[0].plot(u, gamma * p.log() * p**gamma * (1 - p), color="tab:green", label="γ log p · p^γ (1 − p)")
    axes[0].plot(u, total, color="black", label="FocalPO: their sum")
    peak = u[total.argmax()].item()
    axes[0].axvline(peak, color="gray", linestyle=":", label=f"largest at u = {peak:.2f}")
    axes[0].set(title=f"γ = {gamma:g}", xlabel="u = β·(score of chosen − of rejected)", ylabel="−dL/du")
    save(figure, axes, out / "focalpo-figure-3.png")
    return {
        "focalpo_figure_3_peak_at_u": peak,
        "focalpo_figure_3_peak_at_p": torch.sigmoid(u)[total.argmax()].item(),
    }


def focalpo_figure_4(out: Path) -> None:
    """Weight on correct pairs (p^γ, γ = 0.05) and on incorrect ones ((1−p)^γ, γ = 1) beside DPO's."""
    figure, axes = canvas(1)
    axes[0].plot(MARGINS, weight(MARGINS, 0.0), label="DPO")
    axes[0].plot(MARGINS, weight(MARGINS, 0.05), label="p^γ, γ = 0.05: correct")
    axes[0].plot(MARGINS, weight(MARGINS, 1.0, "focal"), label="(1−p)^γ, γ = 1: incorrect")
    axes[0].set(xlabel="u = β·(score of chosen − of rejected)", ylabel="−dL/du")
    save(figure, axes, out / "focalpo-figure-4.png")


def dynamic_figure_1(out: Path) -> None:
    """γ(t) of the three schedules."""
    figure, axes = canvas(1)
    steps = range(TOTAL_STEPS + 1)
    for schedule in (LinearGamma(TOTAL_STEPS), ExponentialGamma(TOTAL_STEPS), CosineGamma(TOTAL_STEPS)):
        name = type(schedule).__name__.removesuffix("Gamma").lower()
        axes[0].plot([t / TOTAL_STEPS for t in steps], [schedule(t) for t in steps], label=name)
    axes[0].set(xlabel="t / T", ylabel="γ(t)", ylim=(0, None))
    save(figure, axes, out / "dynamicfocalpo-figure-1.png")


def dynamic_figure_2(out: Path) -> None:
    """DynamicFocalPO's weight at the stages of training, with the cosine schedule."""
    figure, axes = canvas(1)
    schedule = CosineGamma(TOTAL_STEPS)
    for name, share in {"early": 0.0, "middle": 0.5, "late": 1.0}.items():
        gamma = schedule(round(share * TOTAL_STEPS))
        axes[0].plot(MARGINS, weight(MARGINS, gamma), label=f"{name}, γ = {gamma:.3g}")
    axes[0].plot(MARGINS, weight(MARGINS, 0.0), "k--", label="DPO")
    axes[0].set(xlabel="u = β·(score of chosen − of rejected)", ylabel="−dL/du")
    save(figure, axes, out / "dynamicfocalpo-figure-2.png")


def lemma_1(out: Path) -> dict[str, float]:
    """L ≤ γ·H[p] + (1 − γ)·L_DPO for γ in [0, 1] (Lemma 1 of both papers), and their least distance."""
    figure, axes = canvas(3)
    u = MARGINS
    p, dpo = torch.sigmoid(u), modulated_nll(u, 0.0, "focalpo")[0]
    entropy = torch.special.entr(p) + torch.special.entr(torch.sigmoid(-u))
    least = math.inf
    for gamma, ax in zip((0.05, 0.1, 1.0), axes, strict=True):
        loss, bound = modulated_nll(u, gamma, "focalpo")[0], gamma * entropy + (1 - gamma) * dpo
        ax.plot(p, loss, label="−p^γ log p")
        ax.plot(p, bound, "--", label="γ H[p] + (1 − γ) L_DPO")
        ax.set(title=f"γ = {gamma:g}", xlabel="p", ylabel="loss", ylim=(0, 5))
        least = min(least, (bound - loss).min().item())
    save(figure, axes, out / "lemma-1.png")
    return {"lemma_1_least_distance": least}


def table_8() -> dict[str, float]:
    """The p that misranked pairs would need for the R of DynamicFocalPO's Table 8, early in training.

    Beside DPO's 44.2 %, the weight of misranked pairs must have fallen by the ratio of the odds, if that of
    the correctly ranked ones has not fallen at all.
    """

    def odds(share: float) -> float:
        return share / (1 - share)

    needed = {}
    for name, gamma, share in (("focalpo", 0.05, 0.624), ("dynamic", 0.1, 0.783)):
        suppression = weight(MARGINS, gamma) / weight(MARGINS, 0.0)
        at = (suppression - odds(0.442) / odds(share)).abs().argmin()
        needed[f"table_8_{name}_needs_p"] = torch.sigmoid(MARGINS[at]).item()
    return needed


def canvas(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.5 * panels, 3.4), layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def save(figure: Figure, axes: list[Axes], path: Path) -> None:
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)
