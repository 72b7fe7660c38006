"""The constants of the model of time by which "auto" chooses, for this machine.

    python benchmarks/fit_choice.py              # two minutes, on a CPU that does nothing else

Times "dense" and "tiled", forward and backward, at sizes where now one term of the model matters and now another, and
prints the constants that come closest to all of them, relatively, for `genscl_loss/_backends/choice.py`; then every
size with what either backend took and what the model says.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import astuple, dataclass
from statistics import median

import torch

from genscl_loss import gen_supcon_loss
from genscl_loss._backends.choice import Costs, Sizes

# (N, D, C) of a self-contrast, then (N, M, D, C) of a queue; C = 0: class numbers.
SELF = [(16, 128, 100), (64, 128, 0), (128, 16, 10), (256, 128, 100), (512, 16, 0), (512, 128, 100), (1024, 16, 10)]
SELF += [(1024, 128, 0), (2048, 32, 0), (2048, 128, 100), (256, 512, 1000), (512, 512, 0), (1024, 512, 100)]
SELF += [(256, 2048, 1000), (512, 2048, 0), (1024, 1024, 1000), (512, 128, 10000), (512, 32, 5000)]
SELF += [(1024, 16, 20000), (2048, 32, 10000)]
QUEUE = [(1, 65536, 128, 0), (64, 4096, 128, 100), (256, 4096, 128, 0), (64, 65536, 16, 0), (16, 32768, 128, 100)]


@dataclass(frozen=True)
class Timed:
    sizes: Sizes
    dense: float  # seconds
    linear: float


def measure(sizes: Sizes, turns: int) -> Timed:
    """Medians; the two take turns."""
    generator = torch.Generator().manual_seed(0)

    def rows(n: int) -> torch.Tensor:
        return torch.randn(n, sizes.features, generator=generator, dtype=sizes.dtype)

    def labels(n: int) -> torch.Tensor:
        if not sizes.classes:
            return torch.randint(10, (n,), generator=generator)
        return torch.rand(n, sizes.classes, generator=generator, dtype=sizes.dtype)

    x, y, options = rows(sizes.anchors).requires_grad_(), labels(sizes.anchors), {}
    if not sizes.is_self:
        options = {"contrast_features": rows(sizes.contrasts), "contrast_labels": labels(sizes.contrasts)}
    taken: dict[str, list[float]] = {"dense": [], "tiled": []}
    for turn in range(turns + 1):
        for backend, times in taken.items():
            start = time.perf_counter()
            gen_supcon_loss(x, y, backend=backend, **options).backward()
            if turn:
                times.append(time.perf_counter() - start)
    return Timed(sizes, median(taken["dense"]), median(taken["tiled"]))


def equations(timed: list[Timed]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each constant is multiplied by, and the time in picoseconds that should come out."""
    left, right = [], []
    for one in timed:
        dense_logits, dense_products = one.sizes.dense_work()
        linear_logits, linear_products = one.sizes.linear_work()
        numbers = one.sizes.numbers
        dense, linear = [1, dense_logits, numbers, dense_products], [1, linear_logits, numbers, linear_products]
        left += [dense + [0] * 4, [0] * 4 + linear]
        right += [one.dense * 1e12, one.linear * 1e12]
    return torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)


def fit(timed: list[Timed]) -> Costs:
    """Relative least squares; a constant that would be negative is zero."""
    left, right = equations(timed)
    relative, scale = left / right[:, None], (left / right[:, None]).norm(dim=0)
    used = torch.ones(left.shape[1], dtype=torch.bool)
    while True:
        found = torch.zeros(left.shape[1], dtype=torch.float64)
        columns = relative[:, used] / scale[used]
        found[used] = torch.linalg.lstsq(columns, torch.ones(len(right), 1, dtype=torch.float64)).solution[:, 0]
        if (found >= 0).all():
            return Costs(*(int(x) for x in found / scale))
        used &= found > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="one turn, and small sizes only")
    arguments = parser.parse_args()
    dtype, turns = getattr(torch, arguments.dtype), 1 if arguments.smoke else arguments.turns
    sizes = [Sizes(n, n, d, c, True, dtype, "cpu") for n, d, c in SELF]
    sizes += [Sizes(n, m, d, c, False, dtype, "cpu") for n, m, d, c in QUEUE]
    timed = [measure(one, turns) for one in sizes if not arguments.smoke or one.anchors * one.contrasts <= 2**18]
    costs = fit(timed)
    print(f"torch.{arguments.dtype}: {costs}")
    left, _ = equations(timed)
    modelled = left @ torch.tensor(astuple(costs), dtype=torch.float64) * 1e-12
    print("     A      M     D      C   dense: ms  model  linear: ms  model")
    for one, dense, linear in zip(timed, modelled[::2].tolist(), modelled[1::2].tolist(), strict=True):
        s, times = one.sizes, [1e3 * x for x in (one.dense, dense, one.linear, linear)]
        mark = "" if (times[0] < times[2]) == (times[1] < times[3]) else f"  {max(times[::2]) / min(times[::2]):.2f}x"
        print(
            f"{s.anchors:6} {s.contrasts:6} {s.features:5} {s.classes:6}  "
            + " ".join(f"{t:9.2f}" for t in times)
            + mark
        )


if __name__ == "__main__":
    main()
