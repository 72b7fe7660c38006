"""What options given by name may be: types for those who check them, tuples for those who do not."""

from typing import Literal, get_args

ContrastMode = Literal["all", "one", "first"]
EmptyAnchors = Literal["zero", "ignore"]
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "dense", "tiled", "triton"]

CONTRAST_MODES: tuple[str, ...] = get_args(ContrastMode)
EMPTY_ANCHORS: tuple[str, ...] = get_args(EmptyAnchors)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
BACKENDS: tuple[str, ...] = get_args(Backend)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
