"""Random calls of `gen_supcon_loss`, right ones and wrong ones: each gives the right answer or an error with a name.

    python tests/fuzz.py --seconds 300           # and add what is new to the corpus
    python tests/fuzz.py --seed 1234             # one call, shown

A call is made from a seed. Half of them are then spoiled, once or twice: a wrong type, shape, dtype or value, NaN, a
stride, a size of zero. A call that was not spoiled must have the value and gradients of the reference. A spoiled one
must raise ValueError or TypeError that begins with the name of an argument, or have the value of the reference all the
same; NaN is an answer only where the reference is not finite either.

The corpus, `fuzz_corpus.json`, keeps one seed for every way in which a call has ended so far; `test_fuzz.py` plays it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from oracle import oracle_loss
from strategies import to_numpy
from torch import Tensor
from torch_reference import reference_loss

from genscl_loss import gen_supcon_loss

CORPUS = Path(__file__).with_name("fuzz_corpus.json")
ARGUMENTS = tuple(name for name in inspect.signature(gen_supcon_loss).parameters if name not in ("more", "unknown"))
BACKENDS = ("dense", "tiled", "auto")
DTYPES = (torch.float64, torch.float64, torch.float32, torch.float16, torch.bfloat16)
WRONG = ("text", 1.5, None, [], [1, 2], {}, object(), torch.tensor(1.0), torch.ones(2, 2, 2, 2), torch.ones(0))
WRONG_NUMBERS = (0, -1, float("nan"), float("inf"), "0.1", None, True, 1e-300, torch.tensor([0.1]), torch.tensor(-1.0))


def make_call(seed: int) -> tuple[dict[str, Any], list[str]]:
    """Arguments by name, and how they were spoiled."""
    choose, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    n, v, c = choose.choice([0, *range(1, 10)]), choose.randint(1, 3), choose.randint(2, 5)
    d = choose.choice([1 if v == 1 else 2, 2, 3, 8, 33])  # views of one number each are refused
    dtype = choose.choice(DTYPES)
    separate = choose.random() < 0.4
    m = choose.choice([0, 1, 2, 7, 20])

    def rows(count: int, width: int) -> Tensor:
        x = torch.randn(count, width, generator=numbers, dtype=torch.float64)
        if choose.random() < 0.15:
            x[choose.randrange(count) if count else slice(0, 0)] = 0
        return x.to(dtype)

    def vectors(count: int) -> Tensor:
        y = torch.rand(count, c, generator=numbers, dtype=torch.float64)
        y = (choose.choice([1, 30]) * y).softmax(1) if choose.random() < 0.5 else y
        return y * (torch.rand(count, 1, generator=numbers) < 0.9)

    def classes(count: int) -> Tensor:
        return torch.randint(-1, 3, (count,), generator=numbers).to(kind_of_number)

    kind_of_number = choose.choice([torch.int64, torch.int8, torch.float32, torch.float64])
    call: dict[str, Any] = {"features": rows(n, d)}
    if v > 1:
        views = [rows(n, d) for _ in range(v)]
        call["features"] = views if choose.random() < 0.4 else torch.stack(views, 1)
    beside = separate and choose.random() < 0.5
    modes = ["all", "all", "first"] + (["one"] if v > 1 or (separate and not beside) else [])
    call["contrast_mode"] = choose.choice(modes)
    kind = choose.choice(["classes", "vectors", "classes of views", "vectors of views", "none", "similarity"])
    if kind == "none" and v == 1 and not separate:
        kind = "classes"
    own = 0 if separate and not beside else n if call["contrast_mode"] == "one" else n * v  # contrasts of the batch
    if kind == "none" and separate and not (beside and v > 1):  # row n is the positive of sample n
        m = n + choose.choice([0, 0, m])
    if kind == "classes":
        call["labels"] = classes(n)
    elif kind == "vectors":
        call["labels"] = [vectors(n)] if v == 1 and c == d else vectors(n)  # of the shape of features: a second view?
    elif kind == "classes of views":
        call["labels"] = [classes(n) for _ in range(v)]
    elif kind == "vectors of views":
        call["labels"] = [vectors(n) for _ in range(v)]
    elif kind == "similarity":
        columns = (n if own or not separate else 0) + (m if separate else 0)
        call["label_similarity"] = torch.rand(n, columns, generator=numbers, dtype=torch.float64)
    if separate:
        call["contrast_features"] = rows(m, d)
        call["include_batch"] = beside
        if kind.startswith("classes"):
            call["contrast_labels"] = classes(m)
        elif kind.startswith("vectors"):
            call["contrast_labels"] = vectors(m)
    if choose.random() < 0.3:
        call["teacher_labels"] = vectors(n)
        call["teacher_weight"] = choose.choice([0, 0.5, 2.0])
        if separate:
            call["contrast_teacher_labels"] = vectors(m)
    if choose.random() < 0.3:
        call["sample_weight"] = torch.rand(n, generator=numbers, dtype=torch.float64) * choose.choice([0, 1, 1, 1])
    if choose.random() < 0.2:
        shape = (own + m,) if separate else choose.choice([(n,), (n, v)])
        weights = torch.rand(shape, generator=numbers, dtype=torch.float64)
        call["contrast_weight"] = weights * (torch.rand(shape, generator=numbers) < 0.7)
    if kind.startswith("classes") and choose.random() < 0.2:
        call["ignore_index"] = choose.choice([0, -1, 5])
    call["temperature"] = choose.choice([0.005, 0.05, 0.07, 0.5, 1, 10.0])
    if choose.random() < 0.2:
        call["temperature"] = torch.tensor(float(call["temperature"]), dtype=torch.float64)
    call["base_temperature"] = choose.choice([None, 0.07, 1])
    call["normalize"] = choose.random() < 0.8
    call["empty_anchors"] = choose.choice(["zero", "ignore"])
    call["reduction"] = choose.choice(["mean", "mean", "sum", "none"])
    call["backend"] = choose.choice(BACKENDS)
    spoiled = [spoil(call, choose) for _ in range(choose.choice([0, 0, 1, 2]))]
    return call, [how for how in spoiled if how]


def spoil(call: dict[str, Any], choose: random.Random) -> str:
    """Make one argument wrong or unusual, and say how."""
    name = choose.choice([name for name in ARGUMENTS if name != "group"])
    value = call.get(name)
    tensor = value if isinstance(value, Tensor) else choose.choice(value) if isinstance(value, list) and value else None
    if not isinstance(tensor, Tensor) or choose.random() < 0.25:
        call[name] = choose.choice(WRONG_NUMBERS if isinstance(value, (int, float)) else WRONG)
        return f"{name} is {type(call[name]).__name__}"
    how = choose.choice(
        ["nan", "inf", "negative", "huge", "tiny", "zeros", "cut", "wider", "flat", "more", "empty", "int", "bool"]
        + ["half", "complex", "strides", "meta", "sparse", "expanded", "reversed", "equal"]
    )
    try:
        changed = change(tensor.clone(), how, choose)
    except (RuntimeError, IndexError, TypeError):  # it has no rows or columns, is sparse, or knows no such dtype
        return ""
    call[name] = [changed if x is tensor else x for x in value] if isinstance(value, list) else changed
    return f"{name}: {how}"


def change(x: Tensor, how: str, choose: random.Random) -> Tensor:
    row = choose.randrange(len(x)) if x.dim() and len(x) else 0
    if how in ("nan", "inf", "negative", "huge", "tiny"):
        if x.dim() == 0:
            return x
        values = {"nan": float("nan"), "inf": float("inf"), "negative": -0.5, "huge": 1e25, "tiny": 1e-25}
        x[row] = values[how]
        return x
    changes = {
        "zeros": lambda: x * 0,
        "cut": lambda: x[:-1],
        "wider": lambda: torch.cat([x, x], -1),
        "flat": lambda: x.flatten(),
        "more": lambda: x[None],
        "empty": lambda: x[:0],
        "int": lambda: x.round().long(),
        "bool": lambda: x > 0,
        "half": lambda: x if x.is_complex() else x.half(),
        "complex": lambda: x.to(torch.complex64),
        "strides": lambda: torch.stack([x, x], -1)[..., 0],
        "meta": lambda: x.to("meta"),
        "sparse": lambda: x.to_sparse(),
        "expanded": lambda: x[:1].expand(x.shape),
        "reversed": lambda: x.flip(0),
        "equal": lambda: torch.ones_like(x),
    }
    return changes[how]()


def outcome(call: dict[str, Any], spoiled: list[str]) -> str:
    """How a call ended; AssertionError if it should not have ended so."""
    call = dict(call)
    leaves = leaves_of(call) if not spoiled else []
    try:
        loss = gen_supcon_loss(**call)
    except (ValueError, TypeError) as error:
        text = str(error)
        assert spoiled, f"a call that is right was refused: {text}"
        assert re.match("|".join(ARGUMENTS), text), f"the error names no argument: {text}"
        wanted = text.split("; got")[0].split("\n")[0]  # what came is shown as Python shows it, addresses and all
        return re.sub(r"-?\b\d[\d.]*(e[-+]\d+)?", "#", f"{type(error).__name__}: {wanted}")
    assert loss.dtype in (torch.float32, torch.float64)
    given = {name: value for name, value in call.items() if name != "backend"}
    views = given["features"] if isinstance(given["features"], list) else [given["features"]]
    rows = [x for x in (*views, given.get("contrast_features")) if isinstance(x, Tensor)]
    exact = all(x.dtype == torch.float64 for x in rows)
    if not all(x.isfinite().all() for x in rows):
        assert not loss.isfinite().all() or loss.numel() == 0 or is_blind(call), f"NaN became {loss}"
        return "not finite, as the features"
    largest = max((float(x.detach().double().abs().max()) for x in rows if x.numel()), default=0.0)
    if largest > 1e18 and not exact:  # squares that overflow float32: a documented NaN
        return "overflow"
    for name in given:
        if "labels" in name or ("features" in name and given.get("normalize", True)):
            given[name] = without_short_rows(given[name])
    given["temperature"] = float(
        given["temperature"]
    )  # NumPy would divide a number of half precision in half precision
    with torch.no_grad():
        found = torch.as_tensor(oracle_loss(**to_numpy(given)), dtype=torch.float64)
    wanted = reference_loss(**given)
    size = 1.0 if given.get("normalize", True) else max(1.0, largest**2)  # of logits, to which rounding is relative
    tolerance = max(1e-8, 1e-12 * size) if exact else 1e-4 * size
    close(loss.detach().double(), found, tolerance, "value")
    if leaves and loss.requires_grad:
        actual = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        expected = torch.autograd.grad(wanted.sum(), leaves, allow_unused=True)
        for x, a, b in zip(leaves, actual, expected, strict=True):
            zero = torch.zeros(())
            rounded = 3e-2 if any(y.dtype in (torch.float16, torch.bfloat16) for y in leaves) else 30 * tolerance
            # A row of zeros has no direction: its gradient is a convention, and the reference has another.
            counts = (x.detach() != 0).any(-1, keepdim=True) if call.get("normalize", True) else 1
            ours, theirs = ((zero if g is None else g.detach()).double() * counts for g in (a, b))
            close(ours, theirs, rounded, "gradient")
    return "right" + (", though spoiled: " + ", ".join(spoiled) if spoiled else "")


def leaves_of(call: dict[str, Any]) -> list[Tensor]:
    """Have all features require a gradient."""
    views = call["features"] if isinstance(call["features"], list) else [call["features"]]
    rows = [*views, *([call["contrast_features"]] if "contrast_features" in call else [])]
    return [x.requires_grad_() for x in rows]


def without_short_rows(value: Any) -> Any:
    """Rows shorter than 1e-18 count as rows of zeros."""
    if isinstance(value, list):
        return [without_short_rows(x) for x in value]
    if not isinstance(value, Tensor) or value.dim() < 2 or not value.is_floating_point():
        return value
    return torch.where(value.detach().double().norm(dim=-1, keepdim=True) < 1e-18, torch.zeros_like(value), value)


def is_blind(call: dict[str, Any]) -> bool:
    """Whether what is not finite may have no part in the loss: other views in mode "one", rows that weigh nothing."""
    return (
        call["contrast_mode"] == "one"
        or call.get("contrast_features") is not None
        or any(name in call for name in ("sample_weight", "contrast_weight", "ignore_index"))
    )


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    scale = max(1.0, float(b.abs().max()) if b.numel() else 1.0)
    error = float((a - b).abs().max()) if a.numel() and b.numel() else 0.0
    assert error <= tolerance * scale, f"{what}: {a} instead of {b}, error {error:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="where to begin (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="one call only, shown")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        call, spoiled = make_call(arguments.seed)
        print(*(f"{name} = {value!r}" for name, value in call.items()), f"spoiled: {spoiled}", sep="\n")
        print(outcome(call, spoiled))
        return
    corpus = json.loads(CORPUS.read_text(encoding="utf-8")) if CORPUS.exists() else {}
    known, new, failures, seed, began = set(corpus.values()), 0, 0, arguments.first_seed, time.monotonic()
    while time.monotonic() - began < arguments.seconds:
        call, spoiled = make_call(seed)
        try:
            ending = outcome(call, spoiled)
        except Exception as error:
            failures += 1
            print(f"seed {seed}, {spoiled}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            ending = None
        if ending is not None and ending not in known:
            known.add(ending)
            corpus[str(seed)] = ending
            new += 1
        seed += 1
    CORPUS.write_text(json.dumps(corpus, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    count = seed - arguments.first_seed
    print(f"{count} calls in {arguments.seconds:.0f} s: {failures} failures, {new} new endings, {len(known)} in all")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
