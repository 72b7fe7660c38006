"""What a trained model gets: errors of loss and gradient against float64, from a loss near its minimum to a random one.

    python benchmarks/accuracy.py              # a minute or two on a CPU; the kernels run in Triton's interpreter
    python benchmarks/accuracy.py --smoke      # seconds

Embeddings lie around the place that their labels ask for: two views around their sample, rows around their class.
Noise is set so that the cross-entropy is as far above its minimum, the entropy of the labels, as the first column says;
what no noise reaches is left out. Errors are relative, but for the row's: that is the largest of an anchor, in units of
eps / tau, the rounding of the largest logit. It goes to `accuracy.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import describe_machine, describe_versions, git_commit, head_lines
from torch import Tensor
from torch.nn.functional import normalize

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from genscl_loss import available_backends, gen_supcon_loss, smooth_labels

EPS = torch.finfo(torch.float32).eps
KINDS = ("views", "classes", "soft labels")
TEMPERATURES = (0.01, 0.05, 0.2, 1.0)
ABOVE = (1e-6, 1e-4, 1e-2, 1.0, 10.0)  # nats above the minimum
CLASSES = 16


class Problem(NamedTuple):
    """Two views of samples, the labels that the loss is given, and the weights w that they mean."""

    features: Tensor  # (N, 2, D), float32
    labels: Tensor | None
    weights: Tensor  # (2 N, 2 N), float64
    temperature: float


def problems(kind: str, n: int, d: int, temperature: float) -> Callable[[float], Problem]:
    """Of a kind, by the size of the noise."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(n) % CLASSES
    axes, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    samples = normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
    places = samples if kind == "views" else axes[classes]
    noise = torch.randn(n, 2, d, generator=generator, dtype=torch.float64) / d**0.5
    labels: Tensor | None = None if kind == "views" else classes
    rows = torch.eye(n) if kind == "views" else torch.eye(CLASSES)[classes]
    if kind == "soft labels":
        # Two classes are as similar as the softmax of their places: cos = 0 there, 1 within a class.
        share = smoothing(math.exp(-1 / temperature))
        labels = rows = smooth_labels(classes, CLASSES, share)
    y = normalize(rows.double(), dim=1).repeat(2, 1)
    weights = (y @ y.T).fill_diagonal_(0)

    def make(size: float) -> Problem:
        return Problem(normalize(places[:, None] + size * noise, dim=2).float(), labels, weights, temperature)

    return make


def smoothing(cosine: float) -> float:
    """How much smoothing gives label vectors of two classes this cosine."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        rest = middle / CLASSES
        top = 1 - middle + rest
        found = (2 * top * rest + (CLASSES - 2) * rest**2) / (top**2 + (CLASSES - 1) * rest**2)
        low, high = (middle, high) if found < cosine else (low, middle)
    return low


def exact(problem: Problem, features: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each anchor in float64, and how far the mean is above its minimum."""
    z = normalize(torch.cat(features.unbind(1)), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool)
    log_q = (z @ z.T / problem.temperature).masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
    p = problem.weights / (problem.weights.sum(1, keepdim=True) + 1e-8)
    losses = -(p * log_q).sum(1)
    return losses, losses.mean() + torch.special.xlogy(p, p).sum(1).mean()


def trained(make: Callable[[float], Problem], above: float) -> Problem | None:
    """The problem whose loss is so far above its minimum; None if there is none."""
    low, high = 1e-4, 1e2
    for _ in range(40):
        middle = (low * high) ** 0.5
        problem = make(middle)
        too_far = exact(problem, problem.features.double())[1] > above
        low, high = (low, middle) if too_far else (middle, high)
    found = exact(problem, problem.features.double())[1]
    return problem if abs(found / above - 1) < 0.05 else None


def errors(problem: Problem, backend: str) -> dict[str, float]:
    """Of the loss and its gradient, relative, and the largest of a row in units of eps / tau."""
    options: dict[str, Any] = {"temperature": problem.temperature, "base_temperature": None, "backend": backend}
    x, x64 = problem.features.clone().requires_grad_(), problem.features.double().requires_grad_()
    rows = gen_supcon_loss(x, problem.labels, reduction="none", **options)
    loss = gen_supcon_loss(x, problem.labels, **options)
    exact_rows, _ = exact(problem, x64)
    (gradient,) = torch.autograd.grad(loss, x)
    (exact_gradient,) = torch.autograd.grad(exact_rows.mean(), x64)
    return {
        "loss": abs(loss.item() / exact_rows.mean().item() - 1),
        "gradient": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
        "row": ((rows - exact_rows).abs().max() * problem.temperature / EPS).item(),
    }


def measure(n: int, d: int, backends: list[str], smoke: bool) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        for temperature in TEMPERATURES[1:2] if smoke else TEMPERATURES:
            make = problems(kind, n, d, temperature)
            for above in ABOVE[1:3] if smoke else ABOVE:
                problem = trained(make, above)
                if problem is None:
                    continue
                value = exact(problem, problem.features.double())[0].mean().item()
                found = {backend: errors(problem, backend) for backend in backends}
                yield {"labels": kind, "temperature": temperature, "above": above, "loss": value, "errors": found}


def line(entry: dict[str, Any]) -> str:
    cells = [f"{found['loss']:8.0e} {found['gradient']:6.0e} {found['row']:7.2g}" for found in entry["errors"].values()]
    head = f"{entry['labels']:11} {entry['temperature']:5g} {EPS / entry['temperature']:8.0e}"
    return "  ".join([f"{head} {entry['above']:7.0e} {entry['loss']:9.3g}", *cells])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=128, help="samples, two views each (128)")
    parser.add_argument("--d", type=int, default=64, help="features (64)")
    parser.add_argument("--backends", nargs="+", choices=("dense", "tiled", "triton"), help="default: all there are")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local", help="where to write")
    parser.add_argument("--smoke", action="store_true", help="a few tiny cases")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.n = min(arguments.n, 32)
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(torch.device("cpu")),
        "versions": describe_versions(),
        "commit": git_commit(),
        "n": arguments.n,
        "d": arguments.d,
        "absent": {},
        "accuracy": [],
    }
    print(head_lines(report), flush=True)
    backends = arguments.backends or list(available_backends())
    heads = [f"{name:>8} {'grad':>6} {'row':>7}" for name in backends]
    print("  ".join([f"{'labels':11} {'tau':>5} {'eps/tau':>8} {'above':>7} {'loss':>9}", *heads]), flush=True)
    for entry in measure(arguments.n, arguments.d, backends, arguments.smoke):
        report["accuracy"].append(entry)
        print(line(entry), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "accuracy.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
