"""Triton's interpreter without half of its work. Imported where kernels are interpreted."""

from __future__ import annotations

import functools

from triton.runtime import interpreter

# A launch patches triton.language before it runs a kernel. Every call of a device function then goes through
# all members of the language again, to find them patched.
patch_language = functools.cache(interpreter._patch_lang)


def call_device_function(self: interpreter.InterpretedFunction, *args, **kwargs):
    patch_language(self.fn)  # once, as some see triton.language.core, which launches leave as it is
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = call_device_function
