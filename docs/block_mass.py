"""Draw how a real model's probability mass lies in its vocabulary blocks, for `certified-backward.md`.

    python docs/block_mass.py capture.pt --out docs/figures/block-mass.png

`capture.pt` is a file of `benchmarks/capture.py`. Every token counts with the same |g|, as at the first step
of a training, where policy and reference are one model.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.inputs import Capture, transformed
from csrc_triton.launch import VOCAB_BLOCK
from focalkern.logps.selection import Selection, select_pairs
from focalkern.options import automatic_tau

VOCAB_CHUNK = 32 * VOCAB_BLOCK  # entries whose logits are held at once, for all tokens
KEPT, LABEL, DROPPED = "tab:blue", "tab:orange", "silver"
LOWEST_MASS = 1e-12  # smaller blocks are drawn as empty


@dataclass(frozen=True)
class BlockStatistics:
    """What the forward knows of N tokens and their ceil(V / 128) vocabulary blocks, in fp32."""

    block_lse: torch.Tensor  # [N, NB] logsumexp of each block without the label
    target_z: torch.Tensor  # [N] logit of the label
    labels: torch.Tensor  # [N]

    @property
    def lse(self) -> torch.Tensor:  # [N]
        return torch.logaddexp(self.block_lse.logsumexp(-1), self.target_z)

    @property
    def one_minus_p(self) -> torch.Tensor:  # [N] 1 − p_y
        return torch.sigmoid(self.block_lse.logsumexp(-1) - self.target_z)

    @property
    def mass(self) -> torch.Tensor:  # [N, NB]
        """P[t, b], the label's probability included."""
        log_p = (self.target_z - self.lse)[:, None]
        mass = torch.exp(self.block_lse - self.lse[:, None])
        return mass.scatter_add_(1, self.own_block[:, None], log_p.exp())

    @property
    def own_block(self) -> torch.Tensor:  # [N]
        return self.labels // VOCAB_BLOCK

    def select(self, tau: float) -> Selection:
        g = torch.ones_like(self.lse)
        return select_pairs(self.block_lse, self.lse, self.one_minus_p, self.labels, g, tau)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        capture = Capture.load(args.capture)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    statistics = block_statistics(capture)
    selection = statistics.select(args.tau)
    needed = selection.keep.sum(1)
    token = int(needed.argsort(stable=True)[len(needed) // 2]) if args.token is None else args.token
    if not 0 <= token < len(needed):
        raise SystemExit(f"--token {token}: the capture has {len(needed)} tokens")
    draw(statistics, selection, args.tau, token, args.out)

    blocks, dropped = selection.keep.shape[1], selection.dropped_mass
    print(
        f"{capture.model} on {capture.data}: {len(needed)} tokens, V = {len(capture.weight)}, {blocks} blocks"
    )
    print(f"tau = {args.tau:.3g}: {needed.double().mean():.1f} blocks per token")
    print(f"  from {needed.amin()} to {needed.amax()}, median {needed.double().quantile(0.5):g}")
    print(f"  {needed.sum() / selection.keep.numel():.1%} of the pairs; left out are")
    print(f"  {dropped.mean():.1e} of the probability mass on average, {dropped.amax():.1e} at most")
    print(f"token {token} needs {needed[token]}; written to {args.out}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("capture", type=Path, metavar="CAPTURE", help="a file of benchmarks/capture.py")
    add("--out", type=Path, required=True, metavar="PNG", help="the picture to write")
    add(
        "--tau", type=float, default=automatic_tau(torch.bfloat16), help="default: 2^-13, that of bfloat16"
    )  # fmt: skip
    add("--token", type=int, help="the token of the left panel; default: one that needs the median of blocks")
    args = parser.parse_args(arguments)
    if not args.tau > 0:
        parser.error(f"--tau must be positive, got {args.tau}")
    return args


def block_statistics(capture: Capture) -> BlockStatistics:
    hidden, labels = capture.hidden.float(), capture.labels
    target_z = torch.empty(len(labels))
    parts = []
    for start in range(0, len(capture.weight), VOCAB_CHUNK):
        chunk = slice(start, start + VOCAB_CHUNK)
        bias = None if capture.bias is None else capture.bias[chunk].float()
        z = transformed(F.linear(hidden, capture.weight[chunk].float(), bias), capture.shape.transform)
        row = ((labels >= start) & (labels < start + z.shape[1])).nonzero()[:, 0]
        target_z[row] = z[row, labels[row] - start]
        z[row, labels[row] - start] = -math.inf
        z = F.pad(z, (0, -z.shape[1] % VOCAB_BLOCK), value=-math.inf)
        parts.append(z.unflatten(1, (-1, VOCAB_BLOCK)).logsumexp(-1))
    return BlockStatistics(torch.cat(parts, 1), target_z, labels)


def draw(statistics: BlockStatistics, selection: Selection, tau: float, token: int, path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    one, all_tokens = figure.subplots(1, 2)
    draw_token(one, statistics, selection, tau, token)
    draw_needed(all_tokens, selection.keep.sum(1), selection.keep.shape[1], tau)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_token(axes: Axes, statistics: BlockStatistics, selection: Selection, tau: float, token: int) -> None:
    """Mass of each block for one token, in the order of the vocabulary."""
    mass, keep = statistics.mass[token], selection.keep[token]
    own = int(statistics.own_block[token])
    others = keep.clone()
    others[own] = False
    threshold = tau
    while (mass[others] <= threshold).any():  # a row that would drop too much has its τ halved
        threshold /= 2
    colours = [KEPT if kept else DROPPED for kept in keep.tolist()]
    colours[own] = LABEL
    axes.bar(range(len(mass)), mass.clamp(min=LOWEST_MASS).tolist(), color=colours, width=0.85)
    line = axes.axhline(threshold, color="black", linestyle="--", linewidth=1)

    axes.set_yscale("log")
    axes.set_ylim(max(mass.amin().item(), LOWEST_MASS) / 3, 3)
    axes.set_xlim(-1, len(mass))
    axes.set_xlabel(f"vocabulary block of {VOCAB_BLOCK} entries, in the order of token ids")
    axes.set_ylabel("probability mass of the block")
    axes.set_title(f"One token: {int(keep.sum())} of {len(mass)} blocks are computed")
    axes.legend(
        [Patch(color=LABEL), Patch(color=KEPT), Patch(color=DROPPED), line],
        ["block of the label", "other kept blocks", "left out", f"threshold {power_of_two(threshold)}"],
        ncols=2,
        fontsize=9,
    )


def draw_needed(axes: Axes, needed: torch.Tensor, blocks: int, tau: float) -> None:
    """How many blocks each token needs: a histogram over all tokens."""
    step = -(-blocks // 60)
    edges = [edge + 0.5 for edge in range(0, blocks + step, step)]
    shares = [100 / len(needed)] * len(needed)
    axes.hist(needed.tolist(), bins=edges, weights=shares, color=KEPT)
    mean = needed.double().mean().item()
    axes.axvline(mean, color="black", linewidth=1, label=f"mean: {mean:.1f} ({mean / blocks:.0%})")
    axes.axvline(blocks, color="tab:red", linestyle=":", label=f"exact: all {blocks}")
    axes.set_xlim(0, blocks * 1.02)
    axes.set_xlabel(f"blocks that a token needs at τ = {power_of_two(tau)}")
    axes.set_ylabel("tokens (%)" if step == 1 else f"tokens (%), in bins of {step} blocks")
    axes.set_title(f"All {len(needed)} tokens")
    axes.legend(fontsize=9)


def power_of_two(x: float) -> str:
    exponent = math.log2(x) if x > 0 else math.nan
    return f"$2^{{{exponent:.0f}}}$" if exponent.is_integer() else f"{x:.2g}"


if __name__ == "__main__":
    main()
