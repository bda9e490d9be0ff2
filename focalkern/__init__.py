"""focalkern: preference-optimisation losses fused with the LM head."""

from focalkern import diagnostics, methods, recipes, reference
from focalkern.distributed import VocabShard
from focalkern.kl.operator import linear_kl
from focalkern.lm_head import lm_head_logps
from focalkern.logps.certificate import Certificate
from focalkern.logps.operator import LinearLogps, linear_logps
from focalkern.low_rank import LowRankUpdate
from focalkern.model_logits import logit_options
from focalkern.pairs.focalpo import FocalPOOutput, FusedFocalPOLoss
from focalkern.pairs.pair_loss import FusedPairLoss, PairLossOutput, Pairs, check_pair_loss
from focalkern.schedules import CosineGamma, ExponentialGamma, GammaSchedule, LinearGamma
from focalkern.shared_prompts import SharedPrompts, share_prompts, shared_attention_mask

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
    "SharedPrompts",
    "VocabShard",
    "check_pair_loss",
    "diagnostics",
    "linear_kl",
    "linear_logps",
    "lm_head_logps",
    "logit_options",
    "methods",
    "recipes",
    "reference",
    "share_prompts",
    "shared_attention_mask",
]
