"""Hypothesis strategies that build whole calls: features, labels, options.

Hypothesis chooses the structure (sizes, modes, degenerate rows) and a seed; the numbers come from that seed, so that a
failing example shrinks to a small structure instead of to strange floats. Float extremes are drawn on purpose, through
the temperature, the positive mass and the scale of the features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from genscl_loss import gen_supcon_loss

MODES = ("all", "one", "first")
LABEL_KINDS = ("none", "hard", "one_class", "lone", "onehot", "soft", "per_view", "multihot", "near_disjoint")

seeds = st.integers(0, 2**31 - 1)
# Log-uniform 1e-3 .. 10, with both ends and the temperatures people use.
temperatures = st.one_of(
    st.sampled_from([1e-3, 0.005, 0.01, 0.07, 0.5, 1.0, 10.0]),
    st.floats(-3.0, 1.0, width=32).map(lambda exponent: float(10.0**exponent)),
)
# TILE is patched to these values; N runs from 1 to 11, so N = TILE - 1, TILE, TILE + 1 and several tiles all occur.
tiles = st.sampled_from([1, 2, 3, 4, 5])


@dataclass(frozen=True)
class Problem:
    """One call: `features` (N, V, D) in float64 and the keyword arguments (labels among them)."""

    features: Tensor
    options: dict = field(default_factory=dict)
    tile: int = 4

    @property
    def number(self) -> int:
        return self.features.shape[0]

    @property
    def views(self) -> int:
        return self.features.shape[1]

    def but(self, **changes) -> dict:
        """The options with some of them changed."""
        return {**self.options, **changes}


def to_numpy(value):
    """Tensors, also inside lists and dicts, to NumPy arrays: what the oracle takes."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()
    if isinstance(value, (list, tuple)):
        return [to_numpy(item) for item in value]
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    return value


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_features(number: int, views: int, dim: int, seed: int) -> Tensor:
    """Gaussian rows (N, V, D) in float64, at lengths that differ from row to row."""
    rng = generator(seed)
    rows = torch.randn(number, views, dim, generator=rng, dtype=torch.float64)
    return rows * (0.5 + torch.rand(number, views, 1, generator=rng, dtype=torch.float64))


def soft_rows(number: int, classes: int, seed: int) -> Tensor:
    return torch.rand(number, classes, generator=generator(seed), dtype=torch.float64).softmax(dim=1)


def near_disjoint_rows(number: int, mass: float, seed: int) -> Tensor:
    """Rows (N, N + 1) whose pairwise cosine is about `mass`: an own class each, and a trace of a common one."""
    rows = torch.eye(number, number + 1, dtype=torch.float64)
    rows[:, -1] = mass**0.5 * (0.5 + torch.rand(number, generator=generator(seed), dtype=torch.float64))
    return rows


def make_labels(kind: str, number: int, views: int, classes: int, mass: float, seed: int):
    """Labels of the named kind, in the form that users hand over."""
    rng = generator(seed)
    if kind == "none":
        return None
    if kind == "hard":
        return torch.randint(-2, classes, (number,), generator=rng)
    if kind == "one_class":
        return torch.full((number,), 7)
    if kind == "lone":  # no two samples share a class: positives are only the other views
        return torch.randperm(number, generator=rng)
    if kind == "onehot":
        return torch.eye(classes, dtype=torch.float64)[torch.randint(0, classes, (number,), generator=rng)]
    if kind == "soft":
        return soft_rows(number, classes, seed)
    if kind == "per_view":
        return torch.stack([soft_rows(number, classes, seed + v) for v in range(views)], dim=1)
    if kind == "multihot":  # zero rows ("unlabelled") are among them
        rows = torch.randint(0, 2, (number, classes + 1), generator=rng)
        # Integers (N, V) may be refused: they could be class numbers of views.
        return rows.double() if classes + 1 == views else rows
    if kind == "near_disjoint":
        return near_disjoint_rows(number, mass, seed)
    raise AssertionError(kind)


@st.composite
def problems(
    draw,
    *,
    kinds=LABEL_KINDS,
    modes=MODES,
    max_number: int = 11,
    max_views: int = 3,
    min_dim: int = 1,
    extras: bool = True,
    degenerate: bool = True,
) -> Problem:
    """A valid self-contrast call. `extras`: reductions, weights, teacher. `degenerate`: duplicate and zero rows."""
    kind = draw(st.sampled_from(kinds))
    mode = draw(st.sampled_from(modes))
    number = draw(st.integers(1, max_number))
    views = draw(st.integers(2 if kind == "none" or mode == "one" else 1, max_views))
    dim = draw(st.integers(min_dim if views == 1 else max(2, min_dim), 9))  # views of one number each are refused
    classes = draw(st.integers(2, 5))
    seed = draw(seeds)
    features = random_features(number, views, dim, seed)
    if degenerate:
        damage = draw(st.sampled_from(["no", "no", "duplicate", "opposite", "equal", "zero"]))
        row = draw(st.integers(0, number - 1))
        if damage == "duplicate":
            features[row] = features[0].clone()
        elif damage == "opposite":
            features[row] = -features[0]
        elif damage == "equal":
            features[:] = features[0, 0].clone()
        elif damage == "zero":
            features[row] = 0.0
    mass = 10.0 ** draw(st.floats(-6.0, -1.0))
    options = {
        "labels": make_labels(kind, number, views, classes, mass, seed + 1),
        "contrast_mode": mode,
        "temperature": draw(temperatures),
        "base_temperature": draw(st.sampled_from([None, 0.07, 1.0])),
    }
    if extras:
        options["empty_anchors"] = draw(st.sampled_from(["zero", "ignore"]))
        options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
        if draw(st.booleans()):
            shape = draw(st.sampled_from([(number,), (number, views)]))
            weights = torch.rand(shape, generator=generator(seed + 2), dtype=torch.float64)
            options["sample_weight"] = weights * (weights > draw(st.sampled_from([0.0, 0.5, 1.0])))
        if draw(st.booleans()):
            options["teacher_labels"] = soft_rows(number, classes, seed + 3)
            options["teacher_weight"] = draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    return Problem(features, options, draw(tiles))


@st.composite
def set_problems(draw, *, max_number: int = 9) -> Problem:
    """A valid call with a separate contrast set, which may be empty."""
    kind = draw(st.sampled_from(["none", "hard", "soft", "similarity"]))
    number = draw(st.integers(1, max_number))
    size = number if kind == "none" else draw(st.integers(0, max_number))
    views, dim, classes = draw(st.integers(1, 3)), draw(st.integers(2, 7)), draw(st.integers(2, 5))
    seed = draw(seeds)
    mode = draw(st.sampled_from(MODES))
    options = {
        "contrast_mode": mode,
        "contrast_features": random_features(size, 1, dim, seed + 1)[:, 0],
        "temperature": draw(temperatures),
        "base_temperature": draw(st.sampled_from([None, 0.07])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "empty_anchors": draw(st.sampled_from(["zero", "ignore"])),
    }
    if kind == "hard":
        options["labels"] = torch.randint(0, classes, (number,), generator=generator(seed + 2))
        options["contrast_labels"] = torch.randint(0, classes, (size,), generator=generator(seed + 3))
    elif kind == "soft":
        options["labels"] = soft_rows(number, classes, seed + 2)
        options["contrast_labels"] = soft_rows(size, classes, seed + 3)
    elif kind == "similarity":
        options["label_similarity"] = torch.rand(number, size, generator=generator(seed + 2), dtype=torch.float64)
    return Problem(random_features(number, views, dim, seed), options, draw(tiles))


@st.composite
def memory_problems(draw) -> Problem:
    """A valid call with the batch and a set beside it, which may be empty."""
    kind = draw(st.sampled_from(LABEL_KINDS))
    mode = draw(st.sampled_from(MODES))
    number, size = draw(st.integers(1, 8)), draw(st.integers(0, 9))
    views = draw(st.integers(2 if kind == "none" or mode == "one" else 1, 3))
    dim, classes, seed = draw(st.integers(2, 7)), draw(st.integers(2, 5)), draw(seeds)
    both = make_labels(kind, number + size, views, classes, 1e-2, seed + 1)
    options = {
        "contrast_mode": mode,
        "contrast_features": random_features(size, 1, dim, seed + 2)[:, 0],
        "include_batch": True,
        "temperature": draw(temperatures),
        "base_temperature": draw(st.sampled_from([None, 0.07])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "empty_anchors": draw(st.sampled_from(["zero", "ignore"])),
    }
    if both is not None:
        options["labels"] = both[:number]
        options["contrast_labels"] = both[number:, 0] if kind == "per_view" else both[number:]
    if draw(st.booleans()):
        options["teacher_labels"] = soft_rows(number, classes, seed + 3)
        options["contrast_teacher_labels"] = soft_rows(size, classes, seed + 4)
    if draw(st.booleans()):
        options["sample_weight"] = torch.rand(number, generator=generator(seed + 5), dtype=torch.float64)
    return Problem(random_features(number, views, dim, seed), options, draw(tiles))


def tolerance(options: dict, dtype: torch.dtype = torch.float64) -> float:
    """How far a correct result may be from the oracle, in units of the loss.

    A similarity s lies in [-1/tau, 1/tau] and carries one relative rounding error per addition, so a loss that is a
    weighted mean of (s - lse) is good to a few eps / tau, times the factor tau / base. The label stage works in float64
    and divides by W + 1e-8; with W >= 1e-6 its rounding grows to 1e-16 / 1e-6 = 1e-10 (and to 1e-8 where W is exactly
    zero), again in units of s.
    """
    tau, base = float(options.get("temperature", 0.07)), options.get("base_temperature", 0.07)
    rounding = 32 * float(np.finfo(np.float64 if dtype == torch.float64 else np.float32).eps)
    return (1.0 / tau + 10.0) * (1.0 if base is None else tau / base) * (rounding + 1e-7)


def single(rows):
    """One tensor or several, float64 as float32."""
    if isinstance(rows, (tuple, list)):
        return type(rows)(single(view) for view in rows)
    return rows.float() if rows.dtype == torch.float64 else rows


def run_loss(features, labels=None, *, backend: str, **options) -> Tensor:
    """`gen_supcon_loss`; "triton" gets rows of float64 in float32, which is all that it computes in."""
    if backend == "triton":
        features = single(features)
        if "contrast_features" in options:
            options["contrast_features"] = single(options["contrast_features"])
    return gen_supcon_loss(features, labels, **options, backend=backend)


def rounding_of_half(backend: str, dtype: torch.dtype, tau: float) -> float:
    """How far products of 10 mantissa bits, which "triton" has for half-precision features, may move a logit."""
    return 2.0**-10 / tau if backend == "triton" and dtype in (torch.float16, torch.bfloat16) else 0.0
