"""`python -m focalkern`, also behind `accelerate launch -m` and `torchrun -m`."""

import sys

from focalkern.cli.main import main

sys.exit(main())
