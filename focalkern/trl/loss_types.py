"""The names that a configuration has for losses, and the functions of `focalkern.methods` behind them."""

from __future__ import annotations

from dataclasses import replace

import torch

from focalkern import methods
from focalkern.pairs.pair_loss import PairLoss, Pairs

FOCALPO = "focalpo"


def ipo(pairs: Pairs, *, chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor) -> torch.Tensor:  # [B]
    return methods.ipo(replace(pairs, chosen_lengths=chosen_tokens, rejected_lengths=rejected_tokens))


def sigmoid_norm(
    pairs: Pairs, *, chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor
) -> torch.Tensor:  # [B]
    return methods.sigmoid_norm(
        replace(pairs, chosen_lengths=chosen_tokens, rejected_lengths=rejected_tokens)
    )


# TRL's loss types, each as TRL computes it: "sigmoid" has no label smoothing there.
LOSS_TYPES: dict[str, PairLoss] = {
    "sigmoid": methods.dpo,
    "hinge": methods.hinge,
    "ipo": ipo,
    "exo_pair": methods.exo_pair,
    "nca_pair": methods.nca_pair,
    "robust": methods.robust,
    "bco_pair": methods.bco_pair,
    "sppo_hard": methods.sppo_hard,
    "aot": methods.aot,
    "aot_unpaired": methods.aot_unpaired,
    "apo_zero": methods.apo_zero,
    "apo_down": methods.apo_down,
    "discopop": methods.discopop,
    "sft": methods.sft,
    "sigmoid_norm": sigmoid_norm,
}
# These divide by the tokens of a completion, and TRL counts a first one too that nothing predicts: `Pairs`
# does not.
OF_ALL_TOKENS = frozenset(("ipo", "sigmoid_norm"))
# The losses that take `label_smoothing`, and which ends of [0, 0.5] they leave out.
SMOOTHED: dict[str, dict[str, bool]] = {
    "exo_pair": {"exclude_low": True},
    "robust": {"exclude_high": True},
    "aot": {},
    "aot_unpaired": {},
}
