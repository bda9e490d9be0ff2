"""Versions and GPUs of this machine, for a bug report."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

import torch

import focalkern

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "deepspeed",
    "flash-attn",
    "bitsandbytes",
    "tensorboard",
    "matplotlib",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(arguments: argparse.Namespace) -> int:
    rows = {"focalkern": focalkern.__version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            rows[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows[name] = "not installed"
    rows["platform"] = platform.platform()
    rows["CUDA"] = torch.version.cuda or "not in this torch"
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        memory = f"{found.total_memory / 2**30:.1f} GiB"
        rows[f"GPU {i}"] = f"{found.name}, {memory}, sm_{found.major}{found.minor}"
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    return 0
