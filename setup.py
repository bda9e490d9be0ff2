"""Packaging: the library and its kernels (`csrc_triton`); torch and triton to run, extras for the rest."""

import re
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
version = re.search(
    r'^__version__ = "(.+)"$', (root / "focalkern/__init__.py").read_text(encoding="utf-8"), re.M
)
assert version

# TRL 1.16 itself needs Python 3.11; on 3.10 everything but TRL is there.
trl = [
    "transformers>=5.19",
    *(f'{name}; python_version >= "3.11"' for name in ("trl>=1.16,<2", "peft>=0.18")),
]
# Other fused heads; both need triton. QuACK's, for Hopper GPUs alone, is not installed with them.
peers = [f'{name}; platform_system == "Linux"' for name in ("liger-kernel>=0.8.5", "cut-cross-entropy>=25.1")]
bench = [*trl, *peers, "matplotlib>=3.9", "pandas>=2.2", "psutil>=6", "tqdm>=4.66"]
deepspeed = "deepspeed>=0.17"
tools = [
    "hypothesis>=6.100",
    "mypy>=1.18",
    "numpy",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.14",
    "setuptools>=77",
]
test = [*bench, f'{deepspeed}; platform_system == "Linux"', *tools]

setup(
    name="focalkern",
    version=version[1],
    description="Preference-optimisation losses fused with the LM head, in Triton",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "focalkern",
        "focalkern.cli",
        "focalkern.kl",
        "focalkern.logps",
        "focalkern.pairs",
        "focalkern.trl",
        "csrc_triton",
    ],
    package_data={"focalkern": ["py.typed"]},
    entry_points={"console_scripts": ["focalkern = focalkern.cli.main:main"]},
    install_requires=["torch>=2.8", 'triton>=3.6; platform_system == "Linux"'],
    extras_require={
        "trl": trl,
        "deepspeed": [deepspeed],
        "flash-attn": ["flash-attn>=2.7"],
        "watch": ["matplotlib>=3.9", "tensorboard>=2.16"],
        "bench": bench,
        "test": test,
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
