"""Triton's interpreter as the tests need it: with a GPU's NaN, and in half the time."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def improve() -> None:
    """Change the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    # A GPU's minimum and maximum take the other operand where one is NaN; numpy's do not.
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)

    # A launch replaces the functions of triton.language by interpreted ones, and each call of a
    # function on the device looks for all of them again. Once in a launch is enough.
    replace, replaced = interpreter._patch_lang, set[str]()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            replaced.clear()

    def replace_once(fn: Any) -> interpreter._LangPatchScope:
        modules = {m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core}
        if modules <= replaced:
            return Scope()
        replaced.update(modules)
        return replace(fn)

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = replace_once

    # numpy's dtype of a type is looked up in a table that each look-up builds anew.
    look_up, known = interpreter._get_np_dtype, dict[str, np.dtype]()

    def look_up_once(t: Any) -> np.dtype:
        name = t.scalar.name
        if name not in known:
            known[name] = look_up(t)
        return known[name]

    interpreter._get_np_dtype = look_up_once
