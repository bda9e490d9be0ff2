"""The names that a configuration has for losses, and the functions of `focalkern.methods` behind them."""

from __future__ import annotations

from focalkern import methods
from focalkern.pairs.pair_loss import PairLoss

FOCALPO = "focalpo"

# TRL's loss types, each as TRL computes it: "sigmoid" has no label smoothing there.
LOSS_TYPES: dict[str, PairLoss] = {
    "sigmoid": methods.dpo,
    "hinge": methods.hinge,
    "ipo": methods.ipo,
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
    "sigmoid_norm": methods.sigmoid_norm,
}
# The losses that take `label_smoothing`, and which ends of [0, 0.5] they leave out.
SMOOTHED: dict[str, dict[str, bool]] = {
    "exo_pair": {"exclude_low": True},
    "robust": {"exclude_high": True},
    "aot": {},
    "aot_unpaired": {},
}
