"""focalkern: preference-optimisation losses fused with the LM head."""

from focalkern.certificate import Certificate
from focalkern.functional import LinearLogps, linear_logps
from focalkern.loss import FocalPOOutput, FusedFocalPOLoss

__version__ = "0.1.0"

__all__ = ["Certificate", "FocalPOOutput", "FusedFocalPOLoss", "LinearLogps", "linear_logps"]
