"""focalkern: preference-optimisation losses fused with the LM head."""

from focalkern.certificate import Certificate
from focalkern.distributed import VocabShard
from focalkern.functional import LinearLogps, linear_logps
from focalkern.kl import linear_kl
from focalkern.lm_head import lm_head_logps
from focalkern.loss import FocalPOOutput, FusedFocalPOLoss
from focalkern.low_rank import LowRankUpdate
from focalkern.pair_loss import FusedPairLoss, PairLossOutput, Pairs, check_pair_loss
from focalkern.schedules import CosineGamma, ExponentialGamma, GammaSchedule, LinearGamma

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "CosineGamma",
    "ExponentialGamma",
    "FocalPOOutput",
    "FusedFocalPOLoss",
    "FusedPairLoss",
    "GammaSchedule",
    "LinearGamma",
    "LinearLogps",
    "LowRankUpdate",
    "PairLossOutput",
    "Pairs",
    "VocabShard",
    "check_pair_loss",
    "linear_kl",
    "linear_logps",
    "lm_head_logps",
]
