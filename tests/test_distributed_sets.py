"""Contrast sets, weights and ignored rows on several processes: the loss and gradients of one that has everything."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from genscl_loss import available_backends, gen_supcon_loss

SIZES = {2: [(4, 4), (1, 5), (0, 6), (0, 0)], 3: [(3, 3, 3), (4, 0, 1)]}
D, C, V, IGNORED = 5, 4, 2, 1
NAN = float("nan")

CASES: dict[str, dict[str, Any]] = {
    f"memory, {kind}, {mode}": {"kind": kind, "mode": mode, "memory": True}
    for kind, mode in itertools.product(("hard", "soft", "none"), ("all", "first", "one"))
}
CASES |= {
    f"{what}, {kind}, {mode}": {"kind": kind, "mode": mode, **options}
    for kind, mode in itertools.product(("hard", "soft"), ("all", "first", "one"))
    for what, options in {
        "weights": {"weights": True},
        "weights of a memory": {"weights": True, "memory": True},
        "weights of a set": {"weights": True, "set": True},
    }.items()
}
CASES |= {f"ignored, {mode}": {"kind": "hard", "mode": mode, "ignored": "some"} for mode in ("all", "first", "one")}
CASES |= {
    "memory with a gradient": {"kind": "hard", "memory": True, "learned": True},
    "memory, not normalised": {"kind": "hard", "memory": True, "normalize": False},
    "memory, teacher": {"kind": "hard", "memory": True, "teacher": True},
    "memory, keys": {"kind": "none", "memory": True, "views": 1},
    "keys and a queue": {"kind": "none", "set": True, "views": 1},
    "weights, teacher": {"kind": "hard", "weights": True, "teacher": True},
    "weights, dense": {"kind": "hard", "weights": True, "backend": "dense"},
    "weights without labels": {"kind": "none", "weights": True},
    "weights, not normalised": {"kind": "hard", "weights": True, "normalize": False},
    "weights, tiny temperature": {"kind": "hard", "weights": True, "temperature": 2e-3},
    "weights, sum": {"kind": "hard", "weights": True, "reduction": "sum"},
    "ignored, empty anchors": {"kind": "hard", "ignored": "some", "empty_anchors": "ignore"},
    "ignored in a memory": {"kind": "hard", "ignored": "some", "memory": True},
    "ignored, a whole share": {"kind": "hard", "ignored": "all of the first"},
    "ignored, all": {"kind": "hard", "ignored": "all"},
    "ignored, temperature": {"kind": "hard", "ignored": "some", "learnable": True},
}
OPTIONS = ("backend", "normalize", "reduction", "empty_anchors")


def share_of(case: dict[str, Any], n: int, rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    views, m = case.get("views", V), n if case["kind"] == "none" else n + 2
    made = {"features": torch.randn(n, views, D, generator=generator, dtype=dtype)}
    made["set"] = torch.randn(m, D, generator=generator, dtype=dtype)
    made["weights"] = torch.rand(n, views, generator=generator, dtype=dtype)
    made["weights"] *= torch.rand(n, views, generator=generator) < 0.7
    made["weights of set"] = torch.rand(m, generator=generator, dtype=dtype)
    for name, count in (("labels", n), ("contrast_labels", m)):
        made[name] = torch.randint(C, (count,), generator=generator)
        if case["kind"] == "soft":
            made[name] = torch.rand(count, C, generator=generator, dtype=dtype)
    made["teacher_labels"], made["contrast_teacher_labels"] = (
        torch.rand(count, C, generator=generator, dtype=dtype) for count in (n, m)
    )
    if case.get("ignored") == "all" or (case.get("ignored") == "all of the first" and rank == 0):
        made["labels"].fill_(IGNORED)
    return made


def compute(case: dict[str, Any], given: dict[str, Tensor], group: Any = None) -> dict[str, Tensor]:
    """The loss, and the gradients of what all processes share."""
    x, mode = given["features"], case.get("mode", "all")
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(x.dtype)
    leaves = [weight.requires_grad_()]
    has_set = case.get("memory") or case.get("set")
    options: dict[str, Any] = {name: case[name] for name in OPTIONS if name in case}
    options["temperature"] = case.get("temperature", 0.2)
    if case.get("learnable"):
        options["temperature"] = torch.tensor(0.2, dtype=x.dtype, requires_grad=True)
        leaves.append(options["temperature"])
    if has_set:
        own = given["set"] @ weight
        options |= {"contrast_features": own if case.get("learned") else own.detach()}
        options["include_batch"] = bool(case.get("memory"))
    if case["kind"] != "none":
        options["labels"] = given["labels"]
        if has_set:
            options["contrast_labels"] = given["contrast_labels"]
    if case.get("teacher"):
        options["teacher_labels"] = given["teacher_labels"]
        if has_set:
            options["contrast_teacher_labels"] = given["contrast_teacher_labels"]
    z = x @ weight
    if case.get("weights"):
        of_batch = given["weights"]
        parts = [of_batch[:, 1] if mode == "one" else of_batch.T.flatten()] if case.get("memory") else []
        options["contrast_weight"] = torch.cat([*parts, given["weights of set"]]) if has_set else of_batch
    if case.get("ignored"):
        options["ignore_index"] = IGNORED
        z = torch.where((given["labels"] == IGNORED)[:, None, None], NAN, z)
    loss = gen_supcon_loss(z, contrast_mode=mode, group=group, **options)
    gradients = torch.autograd.grad(loss, leaves)
    if group is not None:
        for gradient in gradients:
            dist.all_reduce(gradient, group=group)
        gradients = [gradient / dist.get_world_size(group) for gradient in gradients]
    return {"loss": loss.detach(), **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)}}


def errors(sizes: tuple[int, ...], names: list[str], backend: str, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of each case, relative to the largest number."""
    rank, found = dist.get_rank(), {}
    for name in names:
        case = CASES[name] | ({"backend": backend} if backend else {})
        shares = [share_of(case, n, r, dtype) for r, n in enumerate(sizes)]
        whole = {key: torch.cat([share[key] for share in shares]) for key in shares[0]}
        ours = compute(case, shares[rank], dist.group.WORLD)
        exact = compute(CASES[name], {key: x.double() if x.is_floating_point() else x for key, x in whole.items()})
        found[name] = max(
            # A loss of nothing but a pair is zero, up to rounding.
            float((ours[key] - value).abs().max() / value.abs().max().clamp(min=1e-3))
            for key, value in exact.items()
        )
    return found


@pytest.mark.parametrize("world, sizes", [(world, sizes) for world, some in SIZES.items() for sizes in some])
def test_they_are_those_of_one_process(world, sizes, tmp_path: Path):
    for found in distributed.run(world, errors, tmp_path, sizes, list(CASES), "", torch.float64):
        assert not {name: error for name, error in found.items() if not error <= 1e-10}


@pytest.mark.parametrize("sizes", [(20, 3), (0, 5)])
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_single_precision(backend, sizes, tmp_path: Path):
    if backend == "triton" and backend not in available_backends():
        pytest.skip("needs Triton's interpreter")
    names = ["memory, hard, all", "memory, not normalised", "weights, hard, all", "weights of a memory, soft, first"]
    names += ["memory with a gradient", "ignored, all"]
    for found in distributed.run(2, errors, tmp_path, sizes, names, backend, torch.float32):
        assert not {name: error for name, error in found.items() if not error <= 2e-5}


def disagreements() -> dict[str, str]:
    """What each process raises where one has what the others have not."""
    z, y = torch.randn(4, D), torch.arange(4) % 2
    is_last = dist.get_rank() == dist.get_world_size() - 1
    queue = {"contrast_features": torch.randn(3, D), "contrast_labels": torch.arange(3)}
    calls: dict[str, dict[str, Any]] = {
        "include_batch": {**queue, "include_batch": is_last},
        "contrast_weight": {"contrast_weight": torch.ones(4) if is_last else None},
        "ignore_index": {"ignore_index": 0 if is_last else 1},
        "wrong weights": {"contrast_weight": torch.ones(3 if is_last else 4)},
        "no set": {"include_batch": is_last},
    }
    said = {}
    for name, options in calls.items():
        try:
            gen_supcon_loss(z, y, group=dist.group.WORLD, **options)
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said


def test_all_raise_and_none_hangs(tmp_path: Path):
    first, last = distributed.run(2, disagreements, tmp_path)
    for name in ("include_batch", "contrast_weight", "ignore_index"):
        assert first[name] == last[name]
        assert first[name].startswith(f"group: processes differ in {name}: ")
    assert last["wrong weights"].startswith("contrast_weight must be (N,)")
    assert last["no set"].startswith("include_batch adds")
    for name in ("wrong weights", "no set"):
        assert first[name].startswith("group: process 1 could not take part: ValueError: ")
