"""The loss of one batch on several processes, beside gathering everything and computing the loss on each of them.

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py            # minutes; on GPUs if there are any
    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --smoke    # seconds: does it run at all?
    python benchmarks/bench_distributed.py --model                         # no measurement: a model of many GPUs

Every method of a case gets the same tensors and is checked against float64. It then runs once for what it receives and
once for its memory; then all methods take turns, one forward and one backward pass each, in the same order everywhere.
A turn takes as long as on the slowest process. On GPUs this has not been tried yet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import TEMPERATURE, Case, Problem, make_problem
from contenders import Run, plain_dense
from measure import quartiles
from meters import run_for_memory, time_once
from report import describe_machine, describe_versions, git_commit, head_lines, milliseconds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genscl_loss import gen_supcon_loss
from genscl_loss._backends import choose

MATRICES = 5.4  # of all logits, that the plain equation holds at its peak: as in contenders.py
LIMITS = {"loss_error": 1e-5, "gradient_error": 1e-3}  # relative; beyond, a method is wrong and nothing is timed
DENSE_REFERENCE = 16384  # rows up to which float64 is the plain equation: beyond, its matrices are too large

# ---- Who is measured ----


def with_group(x: Tensor, y: Tensor) -> Tensor:
    return gen_supcon_loss(x, y, temperature=TEMPERATURE, base_temperature=None, group=dist.group.WORLD)


def whole(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The usual way: gather all features with their gradient, and compute the whole loss on every process."""
    return lambda x, y: loss(gather_with_gradient(x), gather(y))


def own_rows(x: Tensor, y: Tensor) -> Tensor:
    """The better usual way: the plain equation of the anchors here and the contrasts of all; the mean over these."""
    z, every, classes = F.normalize(x.float(), dim=1), F.normalize(gather_with_gradient(x).float(), dim=1), gather(y)
    w = F.normalize(y, dim=1) @ F.normalize(classes, dim=1).T if y.dim() == 2 else (y[:, None] == classes).to(z.dtype)
    itself = torch.zeros_like(w, dtype=torch.bool)
    itself.diagonal(dist.get_rank() * len(x)).fill_(True)
    w = w.masked_fill(itself, 0)
    s = (z / TEMPERATURE) @ every.T
    log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return (-(w * log_p).sum(1) / (w.sum(1) + 1e-8)).mean()


def without_group(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    options = {"temperature": TEMPERATURE, "base_temperature": None, "backend": backend}
    return lambda x, y: gen_supcon_loss(x, y, **options)


METHODS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "group": ("genscl, group=", with_group),
    "plain": ("gather, plain dense", whole(lambda x, y: plain_dense(x, y, TEMPERATURE))),
    "own_rows": ("gather, plain dense of own rows", own_rows),
    "dense": ("gather, genscl dense", whole(without_group("dense"))),
    "auto": ("gather, genscl auto", whole(without_group("auto"))),
}


def gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_gather

    with warnings.catch_warnings():  # what people use, although torch 2.13 would like them to use something else
        warnings.simplefilter("ignore", FutureWarning)
        return torch.cat(all_gather(x))


# ---- What travels ----


class Received(TorchDispatchMode):
    """Bytes that collectives bring to this process, its own share of them included."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and args and func._schema.name != "c10d::barrier":
            # The result comes first; a reduce-scatter sums up what the argument after it holds.
            what = args[1] if "reduce_scatter" in func._schema.name else args[0]
            self.total += sum(leaf.nbytes for leaf in tree_leaves(what) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def bytes_with_group(case: Case, world: int, backend: str) -> tuple[int, int]:
    """Forward and backward, for a self-contrast of rows (N, D) in one view. docs/distributed.md explains the terms."""
    hard, numbers = case.labels == "hard", {"tiled": 2, "triton": 3}[backend]
    classes = 8 * case.c * (case.d + 1)
    forward = 24 * world + item(case) * case.n * case.d + (8 * case.n if hard else classes) + 4
    return forward, 4 * numbers * case.n + (4 * case.n if hard else classes) + 4


def bytes_of_gathering(case: Case) -> tuple[int, int]:
    """Of the usual ways: features and labels forward, the gradient of the features backward."""
    rows = item(case) * case.n * case.d
    return rows + (8 if case.labels == "hard" else 4 * case.c) * case.n, rows


def item(case: Case) -> int:
    return 4 if case.dtype == "float32" else 2


# ---- One case ----


def measure(case: Case, keys: list[str], turns: int, device: torch.device) -> list[dict[str, Any]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    every = make_problem(case, device)
    own = slice(rank * (case.n // world), (rank + 1) * (case.n // world))
    leaf, labels = every.features.detach()[own].clone().requires_grad_(), every.labels[own].contiguous()
    loss, gradient = reference(every)
    backend = choose("auto", leaf, case.n, may_be_dense=False)
    rows, runs = [], {}
    for key in keys:
        title, function = METHODS[key]
        runs[key] = Run(leaf, lambda f=function: f(leaf, labels), Tensor.backward)
        forward, backward = Received(), Received()
        leaf.grad = None
        with forward:
            value = runs[key].forward()
        with backward:
            runs[key].backward(value)
        value = mean_over_processes(value.detach()) if key == "own_rows" else value.detach()
        off = (leaf.grad.double() / world - gradient[own]).norm() / gradient[own].norm()
        formula = bytes_with_group(case, world, backend) if key == "group" else bytes_of_gathering(case)
        row = {
            "method": key,
            "title": title,
            "backend": backend if key == "group" else None,
            "received_bytes": [forward.total, backward.total],
            "formula_bytes": list(formula),
            "loss_error": largest([abs(float(value.double() / loss) - 1)], device)[0],
            "gradient_error": largest([float(off)], device)[0],
        }
        if wrong := [name for name, limit in LIMITS.items() if not row[name] <= limit]:
            raise RuntimeError(f"{title} is wrong on {case}: {', '.join(f'{name} {row[name]:.1e}' for name in wrong)}")
        del value
        row["extra_bytes"] = int(largest([run_for_memory(runs[key], device)[1]], device)[0])
        rows.append(row)
    order, generator, taken = list(runs), random.Random(0), {key: [] for key in runs}
    for _ in range(turns):
        generator.shuffle(order)  # alike on all processes, or they would wait for each other forever
        for key in order:
            dist.barrier()
            taken[key].append(1e3 * time_once(runs[key], device)[1])
    for row in rows:
        row["ms"] = quartiles(largest(taken[row["method"]], device))
    return rows


def reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the whole batch in float64."""
    leaf = problem.features.detach().double().requires_grad_()
    labels = problem.labels.double() if problem.labels.dim() == 2 else problem.labels
    small = problem.case.n <= DENSE_REFERENCE
    loss = plain_dense(leaf, labels, TEMPERATURE) if small else without_group("tiled")(leaf, labels)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def largest(values: list[float], device: torch.device) -> list[float]:
    """Of each number, the largest of all processes; NaN if one is."""
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    return gather(numbers[None]).amax(0).tolist()


def mean_over_processes(x: Tensor) -> Tensor:
    return gather(x[None]).mean()


def table(case: Case, rows: list[dict[str, Any]], world: int) -> str:
    lines = [f"{case.n // world} rows on each of {world}: {case}"]
    lines.append(
        f"  {'':32}{'fwd+bwd ms':>11}{'quartiles':>20}{'over group=':>12}{'MB in':>9}{'extra MB':>10}{'errors':>19}"
    )
    ours = next((row["ms"][1] for row in rows if row["method"] == "group"), None)
    for row in rows:
        low, middle, high = row["ms"]
        lines.append(
            f"  {row['title']:32}{milliseconds(middle):>11}{f'[{milliseconds(low)}, {milliseconds(high)}]':>20}"
            f"{f'{middle / ours:.2f}x' if ours else '':>12}{sum(row['received_bytes']) / 1e6:>9.2f}"
            f"{row['extra_bytes'] / 1e6:>10.1f}{row['loss_error']:>10.0e}{row['gradient_error']:>9.0e}"
        )
    return "\n".join([*lines, ""])


# ---- A model of many GPUs ----

NODE = 8  # GPUs
NVLINK = (
    450e9  # bytes per second into a GPU: half of the 900 GB/s of NVIDIA's H100 SXM data sheet, which adds both ways
)
NETWORK = NODE * 50e9  # into a node: 400 Gb/s InfiniBand for each GPU, as in NVIDIA's DGX H100 data sheet
HBM = 3.35e12  # bytes per second, H100 SXM data sheet
# Bytes read and written for each gathered number by the label half with hard labels, both passes, counted operation by
# operation where all classes differ. Sorting is not in it.
LABEL_TRAFFIC = 250
FEWEST = 512  # rows of a GPU: the model is not for fewer


class Protocol(NamedTuple):
    """Microseconds of the steps of a ring in NCCL's own model (its src/graph/tuning.cc), and its share of the links."""

    base: float
    in_node: float
    between: float
    share: float


SIMPLE, LOW_LATENCY = Protocol(8.4, 3.4, 9.6, 1.0), Protocol(3.6, 0.47 * 1.8, 2.7, 0.25)


def gather_ms(received: float, world: int) -> float:
    """Of so many bytes for every GPU, in rings that enter each node through all of its adapters."""
    nodes = -(-world // NODE)
    link = NVLINK if nodes == 1 else NETWORK

    def time(protocol: Protocol) -> float:
        steps = protocol.base + (world - nodes) * protocol.in_node + (nodes - 1) * protocol.between
        return steps / 1e3 + 1e3 * received * (world - 1) / world / (link * protocol.share)

    return min(map(time, (SIMPLE, LOW_LATENCY)))


def all_reduce_ms(size: float, world: int) -> float:
    """In a tree, whose steps are those of NCCL's low-latency protocol, and each byte goes up and down."""
    nodes = -(-world // NODE)
    steps = 4.4 + 2 * (min(world - 1, NODE - 1) * 0.52 * 1.8 + log2(nodes) * 5.0)
    return steps / 1e3 + 1e3 * 2 * size / ((NVLINK if nodes == 1 else NETWORK) * LOW_LATENCY.share)


class Guess(NamedTuple):
    products: float  # ms
    moved: float  # ms
    labels: float  # ms
    memory: float  # bytes


def guess(case: Case, world: int, precision: str, rate: float) -> Guess:
    """One step of a GPU with `group=` on "triton", `rate` products of fp16 numbers per second; nothing overlaps."""
    n, classes, rows = case.n / world, 8 * case.c * (case.d + 1), item(case) * case.n * case.d
    products, terms = (3, 2) if precision == "highest" else (1, 1)
    moved, labels = gather_ms(rows, world) + gather_ms(12 * case.n, world) + 2 * all_reduce_ms(4, world), 0.0
    if case.labels == "hard":
        moved += gather_ms(8 * case.n, world) + gather_ms(4 * case.n, world)
        labels = 1e3 * LABEL_TRAFFIC * case.n * case.d / HBM
    else:
        moved += 2 * all_reduce_ms(classes, world)
    # Of all rows: float32 and their fp16 terms (or float32 twice, while half precision is made that) and some numbers.
    # Of own rows: features, rows of unit length, gradients.
    memory = max(4 + 2 * terms, 8 if item(case) == 2 else 0) * case.n * case.d + 64 * case.n + 5 * 4 * n * case.d
    return Guess(1e3 * products * 6 * n * case.n * case.d / rate, moved, labels, memory)


def model(rate: float, fraction: float, hop: float) -> str:
    lines = [
        "A model, not a measurement: nothing of it has run on a GPU. D = 128, one view, backend triton, forward and",
        f"backward; nothing overlaps. Assumed: {rate:g} TFLOP/s x {fraction:g} for products of fp16 numbers (highest:",
        f"three for one), {NVLINK / 1e9:g} GB/s into a GPU from a node of {NODE}, {NETWORK / 1e9:g} GB/s into a node,",
        f"NCCL's latencies, memory at {HBM / 1e12:g} TB/s.",
        "",
        "products   ms of the pairs: highest / high, and half precision",
        "moved      ms of communication: float32, hard labels / float32, soft labels (C = 100) / half, hard labels",
        "share      of communication in products + moved, hard labels: highest / high / half precision",
        "labels     ms of the label half, hard labels: its traffic to memory, no sorting; soft labels: about 1 or less",
        f"exchange   ms of the 24 bytes on the hosts, {hop:g} us from each to the next; hidden while the GPU has work",
        "back       ms of it for the numbers of each row, hard labels / what a reduce-scatter of gradients would take",
        "GB         on each GPU, hard labels: highest / high and half precision",
        "plain GB   on each GPU, matrices of the plain equation: own rows / all rows",
        "",
        f"{'GPUs':>4}{'batch':>10}{'own rows':>9}{'products':>16}{'moved':>19}{'share %':>13}{'labels':>7}"
        f"{'exchange':>9}{'back':>12}{'GB':>12}{'plain GB':>17}",
    ]
    for world, n in product((8, 64, 256, 1024), (32768, 262144, 1048576)):
        if n / world < FEWEST:
            continue
        kinds = (("float32", "hard", "highest"), ("float32", "hard", "high"), ("bfloat16", "hard", "high"))
        cases = [(Case(n, labels=labels, dtype=dtype), precision) for dtype, labels, precision in kinds]
        cases.append((Case(n), "high"))
        highest, high, half, soft = (guess(case, world, p, rate * 1e12 * fraction) for case, p in cases)
        share = " / ".join(f"{100 * g.moved / (g.moved + g.products):.0f}" for g in (highest, high, half))
        matrices = MATRICES * 4 * n * n / 1e9
        numbers = gather_ms(12 * n, world) + gather_ms(4 * n, world)
        back = f"{numbers:.2f} / {gather_ms(4 * n * 128, world):.2f}"  # a ring of either kind takes as long
        gb, plain = (
            f"{highest.memory / 1e9:.2f} / {high.memory / 1e9:.2f}",
            f"{matrices / world:,.1f} / {matrices:,.0f}",
        )
        lines.append(
            f"{world:4}{n:10,}{n // world:9,}{f'{highest.products:.2f} / {high.products:.2f}':>16}"
            f"{f'{high.moved:.2f} / {soft.moved:.2f} / {half.moved:.2f}':>19}{share:>13}{high.labels:7.2f}"
            f"{(world - 1) * hop / 1e3:9.2f}{back:>12}{gb:>12}{plain:>17}"
        )
    return "\n".join(lines)


# ---- The command ----


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", help="rows of each process (512; on GPUs 4096)")
    parser.add_argument("--batch", type=int, nargs="*", help="rows of all processes together (4096; on GPUs 32768)")
    parser.add_argument("--labels", nargs="+", choices=("soft", "hard"), default=["soft", "hard"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--d", type=int, default=128, help="features of a row (128)")
    parser.add_argument("--c", type=int, default=100, help="classes (100)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=9, help="turns of every method (9)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local", help="where to write")
    parser.add_argument("--smoke", action="store_true", help="tiny cases")
    parser.add_argument("--model", action="store_true", help="print a model of 8 to 1024 GPUs, and measure nothing")
    parser.add_argument("--rate", type=float, default=989.0, help="TFLOP/s, dense fp16; H100 SXM's data sheet: 989")
    parser.add_argument("--fraction", type=float, default=0.4, help="of it that the kernels reach; an assumption (0.4)")
    parser.add_argument("--hop", type=float, default=25.0, help="microseconds between two hosts; an assumption (25)")
    arguments = parser.parse_args(argv)
    if not arguments.model and "RANK" not in os.environ:
        parser.error("start the processes by torchrun --nproc-per-node W, or pass --model")
    return arguments


def choose_cases(arguments: argparse.Namespace, world: int, cuda: bool) -> list[Case]:
    rows, batches = arguments.rows, arguments.batch
    if rows is None and batches is None:
        rows, batches = ([4096], [32768]) if cuda else ([512], [4096])
    if arguments.smoke:
        rows, batches, arguments.repeats, arguments.d, arguments.c = [300], [400], 2, 32, 10
    sizes = dict.fromkeys([n * world for n in rows or ()] + [n - n % world for n in batches or ()])
    return [Case(n, arguments.d, arguments.c, labels, arguments.dtype) for n in sizes for labels in arguments.labels]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.model:
        print(model(arguments.rate, arguments.fraction, arguments.hop))
        return 0
    torch.set_num_threads(arguments.threads)
    device, backends = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backends = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backends)
    world, first = dist.get_world_size(), dist.get_rank() == 0
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "commit": git_commit(),
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "processes": world,
        "collectives": backends,
        "absent": {},
        "results": [],
    }
    path = arguments.out / f"bench_distributed_{world}.json"
    if first:
        print(head_lines(report), flush=True)
        if device.type == "cpu" and world > 1:
            print(f"{world} processes share {report['machine']['cores']} cores: compare the methods, not the times.\n")
    for case in choose_cases(arguments, world, device.type == "cuda"):
        rows = measure(case, arguments.methods, arguments.repeats, device)
        report["results"] += [asdict(case) | {"n_local": case.n // world} | row for row in rows]
        if first:
            print(table(case, rows, world), flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()
    if first:
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Without tearing the interpreter down: threads of gloo that still hold tensors then would now and then abort it
    # (torch 2.13; https://github.com/pytorch/pytorch/issues/190489).
    os._exit(status)
