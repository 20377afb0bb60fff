"""Triton's interpreter without what it does over and over.

It patches `triton.language` anew in every launch and every call of a function inside a kernel, `tl.sum` and `tl.cdiv`
among them: most of the time of a small kernel. A process that interprets compiles nothing, so once for all is enough.
It computes each sum and product of integers a second time in 64 bits, to see an overflow; whatever overflows among the
few numbers of a test also shows in the result.
"""

import dataclasses
from typing import Any

from triton.runtime import interpreter


class _Kept:
    def restore(self) -> None:
        """Nothing is undone."""


def patch_once() -> None:
    """These are internals of Triton: where a version has others, kernels only take longer."""
    builder, patch = interpreter.interpreter_builder, getattr(interpreter, "_patch_lang", None)
    if hasattr(getattr(builder, "options", None), "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if patch is None:
        return
    patched: set[int] = set()  # globals of modules

    def once(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        return _Kept()

    interpreter._patch_lang = once
