"""focalkern in TRL: a trainer, its batches, `patch()` for TRL's own trainers. Needs `focalkern[trl]`."""

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError(
        "focalkern.trl needs TRL and PEFT: pip install 'trl>=1.16,<2' 'peft>=0.18' (Python 3.11 or later)"
    ) from error

from focalkern.trl.collator import PackedPreferenceCollator, SharedPromptCollator
from focalkern.trl.config import FocalPOConfig
from focalkern.trl.patching import patch, unpatch
from focalkern.trl.progress import ProgressPlot
from focalkern.trl.trainer import FocalPOTrainer

__all__ = [
    "FocalPOConfig",
    "FocalPOTrainer",
    "PackedPreferenceCollator",
    "ProgressPlot",
    "SharedPromptCollator",
    "patch",
    "unpatch",
]
