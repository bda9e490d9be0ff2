"""What keeps torch.compile out of the public functions."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable)


def not_compiled(function: _Function) -> _Function:
    """`torch.compiler.disable`, once torch._dynamo has been imported by others: the import takes 2 s."""
    disabled = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else None

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
