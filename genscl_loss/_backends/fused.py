"""Linear memory on NVIDIA GPUs: logits exist only in registers, one tile at a time. Triton kernels.

The row log-sum-exp is one pass over all pairs. Its gradient is one more, of two products, because a row's gradient can
take in what the row gets as an anchor and what it gets as a contrast at once:

    dz_i = scale * sum_{j != i} (g_i e^{s_ij - lse_i} + g_j e^{s_ij - lse_j}) z_j.

Each program owns its rows of the result: no atomics, and the same bits in every run. Nothing here waits for the device
or depends on what it computed, so all of it can be captured in a CUDA graph.

Tensor cores multiply fp16, which for entries of at most one is as good as tf32 and twice as fast. `precision` "highest"
splits every number into two of them (see `kernels.py`), any other takes one.
"""

import importlib.metadata
import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genscl_loss._backends.plans import PAD, WIDE, Plan, backward_plan, chip, forward_plan, weights_plan, width
from genscl_loss._library import LAUNCH, on_device

_MOST_SPLITS = 32  # of the columns, where rows alone would leave multiprocessors idle
_MOST_PARTS = 2**23  # numbers that the splits of a gradient may hold until they are added up
_WORKSPACE = 2**26  # bytes beside the result, 64 MB, where the gradient of wide rows is made in chunks
_CHUNK_ROWS = 4096  # that the library's matrix product takes at a time: enough to keep a large GPU busy
_FEW_PAIRS = 2**22  # that are not worth three launches instead of one
ENTRIES_UP_TO_ONE = True  # which is what fp16 is as good as tf32 for

_BLOCK = 128  # rows of a program in the kernels that take rows one by one


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on a device; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _is_too_old():
        return "it needs Triton 3.3 or newer"
    if _is_interpreted():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, and this GPU has {major}.{minor}"


def row_lse(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    left_out: Sequence[int],
    unit: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log-sum-exp of each row of logits without the self term; see `genscl_loss._backends.row_lse`.

    Returns:
        The log-sum-exp, and as `row_lse_grad` takes them what it was made of, (2, A), anchors and contrasts.
    """
    self_offset = _self_offset(left_out)
    with on_device(anchors.device):
        rows = _split_rows(anchors, precision)
        cols = None if contrasts is None else _split_rows(contrasts, precision)
        num_cols = anchors.shape[0] if contrasts is None else contrasts.shape[0]
        others = rows if cols is None else cols
        logs = None if weight is None else _log_weights(weight, others)
        n = anchors.shape[0]
        lse, parts = _launch_lse(rows, others, n, num_cols, scale, logs, self_offset, unit)
        if lse is not None:
            return lse, parts[0], rows, cols
        lse, sums = parts.new_empty(n), parts.new_empty(2, n)
        _kernels().merge_lse[-(-n // _BLOCK),](parts, lse, sums, n, len(parts), _BLOCK, **LAUNCH)
    return lse, sums, rows, cols


def row_lse_grad(
    grad: Tensor,
    sums: Tensor,
    rows: Tensor,
    cols: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    left_out: Sequence[int],
    unit: bool,
    num_contrasts: int,
    num_features: int,
    num_live: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `row_lse` with respect to anchors and, if not 0, so many contrasts, from what `row_lse` returned."""
    if len(grad) == 0:  # the share of a process that has no samples
        return grad.new_zeros(0, num_features), grad.new_zeros(num_live, num_features) if num_live else None
    self_offset = _self_offset(left_out)
    with on_device(grad.device):
        largest = torch.linalg.vector_norm(grad, torch.inf)
        parts = grad_parts(
            grad, largest, sums, rows, cols, scale, weight, self_offset, unit, num_contrasts, num_features, num_live
        )
        d_anchors, d_contrasts = (None if x is None else _added_up(x) for x in parts)
    assert d_anchors is not None
    return d_anchors, d_contrasts


def numbers_to_share(grad: Tensor, sums: Tensor) -> Tensor:
    """Of each anchor its upstream gradient and what its log-sum-exp was made of, (A, 3)."""
    return torch.stack([grad, *sums], 1)


def mirrored_grad(
    numbers: Tensor,
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    self_offset: int,
    unit: bool,
    num_anchors: int,
    num_features: int,
) -> Tensor:
    """Gradient with respect to the anchors, where they are some of the contrasts, all of which have a log-sum-exp."""
    grads, sums = numbers[:, 0].contiguous(), numbers[:, 1:].T.contiguous()
    own = slice(self_offset, self_offset + num_anchors)
    with on_device(numbers.device):
        largest = torch.linalg.vector_norm(grads, torch.inf)
        col_weights = _launch_weights(grads, sums, cols.shape[1], largest)
        row_weights = _launch_weights(grads[own], sums[:, own].contiguous(), rows.shape[1], largest)
        logs = own_logs = None
        if weight is not None:
            logs, own_logs = _log_weights(weight, cols), _log_weights(weight[own], rows)
        left = _Side(rows, num_anchors, row_weights, own_logs)
        right = _Side(cols, len(grads), col_weights, logs)
        return _added_up(_launch_grad(left, right, self_offset, largest, scale, unit, num_features))


def kept_shape(num_rows: int, num_features: int, precision: str) -> tuple[int, int, int]:
    """Shape of rows as the kernels take them: fp16 terms of each number, padded rows, padded features."""
    return 2 if precision == "highest" else 1, -(-num_rows // PAD) * PAD, width(num_features)


# ---- As parts of a fused loss: rows that are normalised on the way, results that are still to be added up ----


def split_unit_rows(x: Tensor, precision: str, factor: Tensor) -> Tensor:
    """Unit rows as the kernels take them; what each row of x is multiplied by, (n,) float64, is written to `factor`."""
    return _split_rows(x, precision, factor)


def lse_parts(
    rows: Tensor, cols: Tensor, n: int, m: int, scale: Tensor, weight: Tensor | None, self_offset: int | None
) -> Tensor:
    """What `row_lse` of n unit rows and m contrasts is made of, (splits, 2, A)."""
    logs = None if weight is None else _log_weights(weight, cols)
    return _launch_lse(rows, cols, n, m, scale, logs, self_offset, True, partial=True)[1]


def grad_parts(
    grad: Tensor,
    largest: Tensor,
    sums: Tensor,
    rows: Tensor,
    cols: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    self_offset: int | None,
    unit: bool,
    num_contrasts: int,
    num_features: int,
    num_live: int,
) -> tuple[Tensor, Tensor | None]:
    """As `row_lse_grad`, (splits, A, D) and (splits, contrasts, D); `largest` is the largest of |grad|."""
    shared = (largest, scale, unit, num_features)
    weights = _launch_weights(grad.contiguous(), sums, rows.shape[1], largest)
    logs = None if weight is None else _log_weights(weight, rows if cols is None else cols)
    if cols is None:
        both = _Side(rows, grad.shape[0], weights, logs)
        return _launch_grad(both, both, self_offset, *shared), None
    anchors, contrasts = _Side(rows, grad.shape[0], weights, None), _Side(cols, num_contrasts, None, logs)
    d_anchors = _launch_grad(anchors, contrasts, self_offset, *shared)
    if not num_live:
        return d_anchors, None
    reverse = None if self_offset is None else -self_offset
    return d_anchors, _launch_grad(contrasts._replace(num_rows=num_live), anchors, reverse, *shared)


# ---- Launches, one function for each ----


def _split_rows(x: Tensor, precision: str, factor: Tensor | None = None) -> Tensor:
    n, d = x.shape
    terms, padded, features = kept_shape(n, d, precision)
    out = x.new_empty(terms, padded, features, dtype=torch.float16)
    block = min(features, 64)
    _kernels().split_rows[padded // 64, features // block](
        x, out, x if factor is None else factor, n, d, *x.stride(), padded * features,
        64, block, features, terms, factor is not None, **LAUNCH,
    )  # fmt: skip
    return out


def _log_weights(weight: Tensor, rows: Tensor) -> Tensor:
    """Logarithms of the weights of such rows, padded as they are; minus infinity where there is nothing."""
    out = weight.new_full((rows.shape[1],), -torch.inf)
    torch.log2(weight, out=out[: len(weight)])
    return out


def _launch_lse(
    rows: Tensor,
    cols: Tensor,
    n: int,
    m: int,
    scale: Tensor,
    logs: Tensor | None,
    self_offset: int | None,
    unit: bool,
    *,
    partial: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """The result, and what it is made of, (splits, 2, A); only that where there are several splits, or if asked for."""
    terms, _, features = rows.shape
    plan = forward_plan(_chip(rows.device), features, terms)
    blocks = -(-n // plan.block_m)
    splits, cols_per_split = _share(blocks, m, plan, _MOST_SPLITS, rows.device)
    partial = partial or splits > 1
    parts = rows.new_empty(splits, 2, n, dtype=torch.float32)
    lse = parts if partial else parts.new_empty(n)
    for variant in _variants(scale, unit and logs is None):
        _kernels().row_lse[blocks, splits](
            rows, cols, lse, parts, lse if logs is None else logs, argument(scale),
            n, m, self_offset or 0, cols_per_split, rows.stride(0), cols.stride(0),
            plan.block_m, plan.block_n, plan.block_edge, plan.block_k, features, terms,
            HAS_SELF=self_offset is not None, PARTIAL=partial, WEIGHTED=logs is not None,
            **variant, **_options(plan),
        )  # fmt: skip
    return None if partial else lse, parts


def _launch_weights(grad: Tensor, sums: Tensor, padded: int, largest: Tensor) -> Tensor:
    out = sums.new_empty(2, padded)
    _kernels().gradient_weights[padded // _BLOCK,](grad, sums, largest, out, len(grad), padded, _BLOCK, **LAUNCH)
    return out


class _Side(NamedTuple):
    """The rows of a gradient, or those that it is summed over."""

    rows: Tensor  # as `kept_shape` says
    num_rows: int
    weights: Tensor | None  # what they bring as anchors; None: they are none
    logs: Tensor | None  # of what multiplies their exponentials as contrasts; None: nothing


def _pointers(left: _Side, right: _Side, anything: Tensor) -> list[Tensor]:
    """Weights and logarithms of both sides; any tensor stands for what is not read."""
    given = left.weights, right.weights, left.logs, right.logs
    return [anything if x is None else x for x in given]


def _roles(left: _Side, right: _Side) -> dict[str, bool]:
    """Whether rows are anchors, contrasts are, and contrasts have weights."""
    return {
        "ROW_TERM": left.weights is not None,
        "COL_TERM": right.weights is not None,
        "WEIGHTED": left.logs is not None or right.logs is not None,
    }


def _launch_grad(
    left: _Side,
    right: _Side,
    self_offset: int | None,
    largest: Tensor,
    scale: Tensor,
    unit: bool,
    num_features: int,
) -> Tensor:
    rows, cols, n, m = left.rows, right.rows, left.num_rows, right.num_rows
    terms, padded_rows, features = rows.shape
    if features >= WIDE and n * m > _FEW_PAIRS and _library_multiplies(rows.device):
        return _launch_grad_in_chunks(left, right, self_offset, largest, scale, unit, num_features)
    plan, block_out = backward_plan(_chip(rows.device), features, terms)
    chunks = -(-num_features // block_out)
    blocks = -(-n // plan.block_m)
    most = min(_MOST_SPLITS, max(1, _MOST_PARTS // max(1, n * num_features)))
    splits, cols_per_split = _share(blocks * chunks, m, plan, most, rows.device)
    out = largest.new_empty(splits, n, num_features)
    pointers, roles = _pointers(left, right, out), _roles(left, right)
    for variant in _variants(scale, unit and not roles["WEIGHTED"]):
        _kernels().row_lse_grad[blocks, splits, chunks](
            rows, cols, *pointers, out, argument(scale), largest, n, m, num_features, self_offset or 0, cols_per_split,
            rows.stride(0), cols.stride(0), padded_rows, cols.shape[1],
            plan.block_m, plan.block_n, plan.block_edge, plan.block_k, block_out, features, terms,
            HAS_SELF=self_offset is not None, **roles, **variant, **_options(plan),
        )  # fmt: skip
    return out


def _launch_grad_in_chunks(
    left: _Side,
    right: _Side,
    self_offset: int | None,
    largest: Tensor,
    scale: Tensor,
    unit: bool,
    num_features: int,
) -> Tensor:
    """As `_launch_grad`: softmax weights, a chunk of them at a time, and the library's product of these and columns.

    A program cannot hold wide rows of the gradient, and would have to make the weights again for each part of them.
    """
    rows, cols, n, m = left.rows, right.rows, left.num_rows, right.num_rows
    terms, padded_rows, features = rows.shape
    padded_cols = cols.shape[1]
    plan = weights_plan(_chip(rows.device), features, terms)
    height, width = _chunk(padded_rows, padded_cols, num_features, terms, plan)
    weights = rows.new_empty(terms, height, width)
    part = largest.new_empty(height, num_features)
    out = largest.new_empty(1, n, num_features)
    pointers, roles = _pointers(left, right, out), _roles(left, right)
    for first, col in itertools.product(range(0, n, height), range(0, padded_cols, width)):
        num_rows, num_cols = min(height, n - first), min(width, padded_cols - col)
        for variant in _variants(scale, unit and not roles["WEIGHTED"]):
            _kernels().softmax_weights[-(-num_rows // plan.block_m), -(-num_cols // plan.block_n)](
                rows, cols, *pointers, weights, argument(scale),
                first, first + num_rows, col, m, self_offset or 0, rows.stride(0), cols.stride(0),
                padded_rows, padded_cols, weights.stride(0), width,
                plan.block_m, plan.block_n, plan.block_k, features, terms,
                HAS_SELF=self_offset is not None, **roles, **variant, **_options(plan),
            )  # fmt: skip
        total, some = out[0, first : first + num_rows], part[:num_rows]
        for k, (i, j) in enumerate([(0, 0)] if terms == 1 else [(1, 0), (0, 1), (0, 0)]):  # small terms first
            is_first = col == 0 and k == 0
            _multiply(
                weights[i, :num_rows, :num_cols], cols[j, col : col + num_cols, :num_features],
                total if is_first else some,
            )  # fmt: skip
            if not is_first:
                total += some
    _kernels().rescale[-(-out.numel() // 1024),](
        out, argument(scale), largest, out.numel(), 1024, not is_known(scale), **LAUNCH
    )
    return out


def _chunk(padded_rows: int, padded_cols: int, num_features: int, terms: int, plan: Plan) -> tuple[int, int]:
    """Rows and columns whose softmax weights exist at a time, beside a product of as many rows."""
    height = min(padded_rows, max(_CHUNK_ROWS // plan.block_m, 1) * plan.block_m)
    room = (_WORKSPACE - 4 * height * num_features) // (2 * terms * height)
    return height, min(padded_cols, max(room // plan.block_n, 1) * plan.block_n)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the matrix product of fp16 numbers, with sums in float32."""
    if a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _added_up(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


# ---- What a launch depends on ----


def _self_offset(left_out: Sequence[int]) -> int | None:
    """The one diagonal that kernels can leave out."""
    assert len(left_out) <= 1
    return left_out[0] if left_out else None


def _library_multiplies(device: torch.device) -> bool:
    """Whether the library multiplies fp16 with sums and results in float32, in the same bits in every run."""
    if device.type != "cuda":
        return True
    has_product = hasattr(torch.ops.aten.mm, "dtype_out")  # from torch 2.8 on
    # Sums in fp16 cannot be had in float32. And where all has to be deterministic, torch lets the library multiply only
    # if an environment variable says how: kernels need none.
    sums_in_half = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return has_product and not sums_in_half and not torch.are_deterministic_algorithms_enabled()


def _kernels() -> ModuleType:
    from genscl_loss._backends import kernels  # Triton is loaded when first used

    return kernels


@cache
def _is_too_old() -> bool:
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
        return (int(major), int(minor)) < (3, 3)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # built by other means: let it try
        return False


def _is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _chip(device: torch.device) -> int:
    return chip(torch.cuda.get_device_capability(device)) if device.type == "cuda" else 90


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _options(plan: Plan) -> dict[str, Any]:
    return {"num_warps": plan.num_warps, "num_stages": plan.num_stages, **LAUNCH}


def argument(scale: Tensor) -> Tensor | float:
    """A temperature that the host knows goes to the kernel as a number."""
    return float(scale) if is_known(scale) else scale


def is_known(scale: Tensor) -> bool:
    return scale.device.type == "cpu"


def _variants(scale: Tensor, unit: bool) -> list[dict[str, bool]]:
    """Kernels to launch: without a shift of exponents, with a running maximum, or both and the device chooses."""
    if not unit:
        return [{"FIXED": False, "CHECK": False, "SCALE_ON_DEVICE": not is_known(scale)}]
    if is_known(scale):
        return [{"FIXED": _fits(float(scale)), "CHECK": False, "SCALE_ON_DEVICE": False}]
    return [{"FIXED": fixed, "CHECK": True, "SCALE_ON_DEVICE": True} for fixed in (True, False)]


def _fits(scale: float) -> bool:
    """Whether exponentials of rows of unit length need no shift: `kernels._fits` on the host."""
    kernels = _kernels()
    return bool(scale * math.log2(math.e) * kernels.SLACK.value <= kernels.LARGEST.value)


def _share(blocks: int, num_cols: int, plan: Plan, most: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts, at most so many, to split the columns, and the length of a part.

    Programs run in waves of as many as the device holds. Parts make the last wave as full as the others, and cost a
    little each: their first loads are not hidden behind anything.
    """
    slots = _multiprocessors(device) * plan.programs
    tiles = -(-num_cols // plan.block_n)
    cost = {}
    for splits in range(1, min(most, tiles) + 1):
        tiles_each = -(-tiles // splits)
        cost[splits] = -(-blocks * splits // slots) * (tiles_each + 2)
    best = min(cost, key=lambda splits: (cost[splits], splits))
    cols_per_split = -(-tiles // best) * plan.block_n
    return -(-num_cols // cols_per_split), cols_per_split
