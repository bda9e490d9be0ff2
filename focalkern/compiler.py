"""What keeps torch.compile out of the public functions."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable)

_REASON = "focalkern is not traced: compile without fullgraph=True, or the model alone"


def not_compiled(function: _Function) -> _Function:
    """`torch.compiler.disable`, once torch._dynamo has been imported by others: the import takes 2 s."""
    disabled: Callable | None = None
    if "torch._dynamo" in sys.modules:
        disabled = torch.compiler.disable(function, reason=_REASON)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            if torch.compiler.is_compiling():  # which does not trace `disable`, and would not say why
                torch._dynamo.graph_break(msg=_REASON)
            disabled = torch.compiler.disable(function, reason=_REASON)
        return disabled(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
