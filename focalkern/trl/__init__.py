"""focalkern in TRL: a trainer, packed batches, `patch()` for TRL's own trainers. Needs `focalkern[trl]`."""

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError(
        "focalkern.trl needs TRL 1.16 or later and PEFT: pip install 'focalkern[trl]' (Python 3.11 or later)"
    ) from error

from focalkern.trl.collator import PackedPreferenceCollator
from focalkern.trl.config import FocalPOConfig
from focalkern.trl.patching import patch, unpatch
from focalkern.trl.trainer import FocalPOTrainer

__all__ = ["FocalPOConfig", "FocalPOTrainer", "PackedPreferenceCollator", "patch", "unpatch"]
