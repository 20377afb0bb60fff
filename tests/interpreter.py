"""Triton's interpreter without what it does over and over.

It patches `triton.language` anew in every call of a function inside a kernel, `tl.sum` and `tl.cdiv` among them: most
of the time of a small kernel. What is patched stays so until the launch ends, so once a launch is enough.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """These are internals of Triton: where a version has others, kernels only take longer."""
    patch, executor = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "GridExecutor", None)
    if patch is None or executor is None:
        return
    launch = executor.__call__
    patched: set[tuple[bool, bool]] = set()

    def once(fn: Any) -> Any:
        seen = list(fn.__globals__.values())
        modules = (any(v is tl for v in seen), any(v is tl.core for v in seen))
        if modules in patched:
            return None  # only the patch that a launch begins with is undone
        patched.add(modules)
        return patch(fn)

    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, executor.__call__ = once, launched
