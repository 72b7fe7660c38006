"""Triton's interpreter, in half the time; what it computes and what it checks is the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import numpy as np

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def hasten() -> None:
    """Do once what it does for each call of a function in a kernel, and in one step what takes it many.

    Once: to put NumPy's operations in the place of those of the language, and to look up NumPy's name of a type. In one
    step: to make sure that no sum, difference or product of integers is too large for their type.
    """
    from triton import language
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton
        return
    put_in_place, look_up = interpreter._patch_lang, interpreter._get_np_dtype

    @functools.cache
    def languages(fn: Callable) -> list[object]:
        return [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (language, language.core)]

    def put_in_place_once(fn: Callable) -> object:
        if any(language.core.is_builtin(module.program_id) for module in languages(fn)):
            return put_in_place(fn)
        return interpreter._LangPatchScope()

    def check_overflow(_: object, left: language.tensor, right: language.tensor, operation: Callable) -> None:
        kind = left.type.scalar
        if kind.int_bitwidth < 64:
            exact = EXACT[operation.__name__](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
            fits = exact.min() >= kind.get_int_min_value() and exact.max() <= kind.get_int_max_value()
            assert fits, f"overflow of {kind} in {operation.__name__}"

    known = functools.cache(look_up)
    interpreter._patch_lang = put_in_place_once
    interpreter._get_np_dtype = lambda kind: (look_up if kind.scalar.is_ptr() else known)(kind.scalar)
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
