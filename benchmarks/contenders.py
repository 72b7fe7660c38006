"""Who is measured: the package, what one would use without it, and parts of the work as yardsticks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import Case, Problem, compute_dtype, unit_rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genscl_loss import available_backends, gen_supcon_loss
from genscl_loss._backends import row_lse
from genscl_loss._backends.tiled import TILE


class Run(NamedTuple):
    """One method on one problem: `backward` takes what `forward` returned, and leaves a gradient on `leaf`."""

    leaf: Tensor
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object]


@dataclass(frozen=True)
class Method:
    key: str
    title: str
    kind: str  # "ours", "peer" (computes the same), or "yardstick": a part of the work, or something else
    prepare: Callable[[Problem], Run]
    precision: str = "highest"  # torch's float32 matmul precision during both passes
    quantity: str | None = "loss"  # what float64 says about it: see reference.py; None: timed only
    matrices: float = 0  # N x N matrices of the computing dtype that it holds at its peak
    compiles: bool = False
    samples: bool = False  # it can let a few anchors count, and so be checked at any size
    skips_empty_anchors: bool = False  # its mean is over the anchors that have positives
    labels: tuple[str, ...] = ("soft", "hard")
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16", "float16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    fits: Callable[[Case], bool] = lambda case: True

    @property
    def ours(self) -> bool:
        return self.kind == "ours" or self.quantity == "lse"

    def suits(self, case: Case, device: str) -> bool:
        return device in self.devices and case.labels in self.labels and case.dtype in self.dtypes and self.fits(case)

    def start(self, problem: Problem) -> Run:
        """Prepare; float32 products have `precision` during both passes, and what they had before at other times."""
        run = self.prepare(problem)
        return Run(run.leaf, partial(self._call, run.forward), partial(self._call, run.backward))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with float32_precision(self.precision):
            return function(*arguments)


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Set a process-wide state, which the thread of the backward pass sees too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- The whole loss ----


def plain_dense(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The paper's equation, written down."""
    z = F.normalize(features.to(compute_dtype(features)), dim=1)
    if labels.is_floating_point():
        y = F.normalize(labels, dim=1)
        w = y @ y.T
    else:
        w = (labels[:, None] == labels).to(z.dtype)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    w.masked_fill_(itself, 0)
    s = (z / temperature) @ z.T
    log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return (-(w * log_p).sum(1) / (w.sum(1) + 1e-8)).mean()


def lean_dense(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The same with a finite mask, so that the fused log_softmax can be used: one matrix and one pass less."""
    z = F.normalize(features.to(compute_dtype(features)), dim=1)
    if labels.is_floating_point():
        y = F.normalize(labels, dim=1)
        w = y @ y.T
    else:
        w = (labels[:, None] == labels).to(z.dtype)
    w.fill_diagonal_(0)
    log_p = ((z / temperature) @ z.T).fill_diagonal_(-1e9).log_softmax(1)
    return (-(w * log_p).sum(1) / (w.sum(1) + 1e-8)).mean()


def run_loss(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        x, y, temperature = problem.features, problem.labels, problem.case.temperature
        # None is one, made anew each time; a tensor made anew each time would keep a GPU waiting.
        upstream = None if problem.loss_scale == 1 else torch.tensor(problem.loss_scale, device=problem.device)
        return Run(x, lambda: loss(x, y, temperature), lambda value: value.backward(upstream))

    return prepare


def run_ours(backend: str) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        options = {"base_temperature": None, "sample_weight": problem.weight, "backend": backend}
        return run_loss(lambda x, y, temperature: gen_supcon_loss(x, y, temperature=temperature, **options))(problem)

    return prepare


def run_compiled(problem: Problem) -> Run:
    return run_loss(torch.compile(plain_dense, dynamic=False))(problem)  # each shape for itself: the faster code


def run_pml(problem: Problem) -> Run:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=problem.case.temperature)
    return run_loss(lambda x, y, temperature: loss(x, y))(problem)


# ---- The pairwise half alone ----


def run_lse(backend: str, precision: str = "highest") -> Callable[[Problem], Run]:
    """The bare pairwise operator: what is left of a backend without labels and normalisation."""

    def prepare(problem: Problem) -> Run:
        leaf = unit_rows(problem).requires_grad_()
        scale = torch.tensor(1 / problem.case.temperature, dtype=leaf.dtype)  # on the CPU, as the loss has it
        upstream = mean_weights(problem, leaf)
        options = {"unit": True, "precision": precision, "backend": backend}
        return Run(leaf, lambda: row_lse(leaf, None, scale, 0, **options), lambda lse: lse.backward(upstream))

    return prepare


def run_infcl(problem: Problem) -> Run:
    """Inf-CL's InfoNCE of z with itself, row by row: log sum_j exp(s_ij) - s_ii, j running over *all* rows."""
    from inf_cl import cal_flash_loss

    leaf = unit_rows(problem).requires_grad_()
    scale, upstream = 1 / problem.case.temperature, mean_weights(problem, leaf)
    return Run(
        leaf,
        lambda: cal_flash_loss(leaf, leaf, scale=scale, head_dim=leaf.shape[1]),
        lambda rows: rows.backward(upstream),
    )


def run_memeff(problem: Problem) -> Run:
    """memeff's CLIP loss of z with itself, the mean of the same over all rows. Its own default scales the gradient."""
    from memeff import MemoryEfficientCLIPLoss

    leaf = unit_rows(problem).requires_grad_()
    loss = MemoryEfficientCLIPLoss(problem.case.temperature, normalized_inputs=True, stable=False)
    return Run(leaf, lambda: loss(leaf, leaf), lambda mean: mean.backward())


def infcl_fits(case: Case) -> bool:
    """Its gradient kernel reads out of bounds for other N; for other D it addresses the wrong columns."""
    return case.n % 64 == 0 and case.d in {16, 32, 64, 128, 256}


def run_sdpa(backend: SDPBackend | None) -> Callable[[Problem], Run]:
    """Attention of z to itself, one head, bfloat16."""

    def prepare(problem: Problem) -> Run:
        leaf = unit_rows(problem).bfloat16().requires_grad_()
        scale, shape = 1 / problem.case.temperature, (1, 1, *leaf.shape)
        upstream = torch.randn_like(leaf).view(shape)

        def forward() -> Tensor:
            z = leaf.view(shape)
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(z, z, z, scale=scale)

        return Run(leaf, forward, lambda output: output.backward(upstream))

    return prepare


def run_mm(problem: Problem) -> Run:
    """The matrix products that "tiled" performs, into buffers made beforehand, and nothing else."""
    z = unit_rows(problem)
    tiles, rows_out, cols_out = z.new_empty(TILE * TILE), z.new_empty(TILE, z.shape[1]), z.new_empty(TILE, z.shape[1])
    blocks = z.split(TILE)

    def products() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for i, rows in enumerate(blocks):
            for j, cols in enumerate(blocks[i:]):
                tile = tiles[: len(rows) * len(cols)].view(len(rows), len(cols))
                torch.mm(rows, cols.T, out=tile)
                yield tile, rows, cols if j else None

    def forward() -> Tensor:
        for _ in products():
            pass
        return tiles

    def backward(_: Tensor) -> None:
        for tile, rows, cols in products():
            torch.mm(tile, rows if cols is None else cols, out=rows_out[: len(rows)])
            if cols is not None:
                torch.mm(tile.T, rows, out=cols_out[: len(cols)])

    return Run(z, forward, backward)


def mean_weights(problem: Problem, like: Tensor) -> Tensor:
    """(N,): the gradient of the mean over the anchors that count."""
    weight = like.new_ones(len(like)) if problem.weight is None else problem.weight.to(like.dtype)
    return weight / weight.sum()


# ---- All of them ----


def all_methods() -> dict[str, Method]:
    ours = [Method("auto", "genscl auto", "ours", run_ours("auto"), samples=True)]
    if "triton" in available_backends():
        ours += triton_methods()
    ours += [
        Method("tiled", "genscl tiled", "ours", run_ours("tiled"), samples=True),
        # Numbers of matrices were found by measuring; methods without one need a fraction of a matrix.
        Method("dense", "genscl dense", "ours", run_ours("dense"), matrices=3.4, samples=True),
    ]
    peers = [
        Method("plain", "plain dense", "peer", run_loss(plain_dense), matrices=5.4),
        Method("compiled", "plain, torch.compile", "peer", run_compiled, matrices=2.2, compiles=True),
        Method(
            "compiled_tf32",
            "plain, torch.compile, TF32",
            "peer",
            run_compiled,
            precision="high",
            matrices=2.2,
            compiles=True,
            dtypes=("float32",),
            devices=("cuda",),
        ),
        Method("lean", "plain, log_softmax", "peer", run_loss(lean_dense), matrices=3.1),
        Method("pml", "PML SupConLoss", "peer", run_pml, matrices=11.4, labels=("hard",), skips_empty_anchors=True),
    ]
    yardsticks = [
        Method("lse", "genscl row_lse only", "yardstick", run_lse("tiled"), quantity="lse", samples=True),
        Method("mm", "torch.mm only", "yardstick", run_mm, quantity=None, devices=("cpu",)),
        Method(
            "infcl",
            "inf-cl (self included, no labels)",
            "yardstick",
            run_infcl,
            quantity="lse_with_self",
            dtypes=("float32",),
            devices=("cuda",),
            fits=infcl_fits,
        ),
        Method(
            "memeff",
            "memeff CLIP (self included, no labels)",
            "yardstick",
            run_memeff,
            quantity="clip",
            dtypes=("float32",),
            devices=("cuda",),
        ),
        *(
            Method(key, title, "yardstick", run_sdpa(backend), quantity=None, devices=("cuda",))
            for key, title, backend in (
                ("sdpa", "attention(z, z, z), bfloat16", None),
                ("sdpa_cudnn", "the same by cuDNN", SDPBackend.CUDNN_ATTENTION),
            )
        ),
    ]
    return {method.key: method for method in ours + peers + yardsticks}


def triton_methods() -> list[Method]:
    """In both precisions of float32 features; for half-precision ones there is one."""
    devices = ("cpu", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    every = {"samples": True, "devices": devices}
    not_double, single = ("float32", "bfloat16", "float16"), ("float32",)
    high = {"precision": "high", **every}
    return [
        Method("triton", "genscl triton", "ours", run_ours("triton"), dtypes=not_double, **every),
        Method("triton_high", "genscl triton, high", "ours", run_ours("triton"), dtypes=single, **high),
        Method(
            "lse_triton",
            "row_lse only, triton",
            "yardstick",
            run_lse("triton"),
            quantity="lse",
            dtypes=not_double,
            **every,
        ),
        Method(
            "lse_triton_high",
            "row_lse only, triton, high",
            "yardstick",
            run_lse("triton", "high"),
            quantity="lse",
            dtypes=not_double,
            **high,
        ),
    ]


def absent_packages(device: torch.device) -> dict[str, str]:
    """Optional packages that cannot be imported, and what is left out for that reason."""
    purposes = {
        "pytorch_metric_learning": "its SupConLoss is not measured",
        "tqdm": "progress is plain text",
        "matplotlib": "no plot is drawn",
    }
    if device.type == "cuda":
        purposes |= {"inf_cl": "it is not measured", "memeff": "it is not measured"}
    absent = {}
    for name, consequence in purposes.items():
        try:
            __import__(name)
        except ImportError:
            absent[name.replace("_", "-")] = consequence
    return absent
