"""One batch on several processes: the loss and its gradients are those of one process that has all of it."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from genscl_loss import FeatureQueue, GenSupConLoss, _distributed, available_backends, collapsed_loss, gen_supcon_loss

SIZES = [(4, 4), (1, 5), (0, 6), (3, 3, 3), (4, 0, 1), (2, 2, 2, 2), (0, 4, 0, 3)]
MORE_SIZES = [pytest.param(sizes, marks=pytest.mark.exhaustive) for sizes in ((1, 6, 2), (3, 1, 5, 1))]
D_IN, D, C = 5, 7, 4


def batch_of(case: dict[str, Any], n: int, seed: int) -> dict[str, Any]:
    """Inputs of the encoder and tensors of the loss, for a batch of n samples on one process."""
    generator = torch.Generator().manual_seed(seed)
    views, kind = case.get("views", 2), case.get("labels", "hard")
    dtype = case.get("dtype", torch.float64)

    def soft(*shape: int) -> torch.Tensor:
        return torch.softmax(case.get("sharpness", 2.0) * torch.randn(*shape, C, generator=generator, dtype=dtype), -1)

    hard = torch.randint(C, (n,), generator=generator)
    batch: dict[str, Any] = {"inputs": torch.randn(n, views, D_IN, generator=generator, dtype=dtype)}
    alone = torch.arange(n) + 100 * seed  # most anchors without a positive anywhere
    alone[:1] = 0
    labels = {"hard": hard, "float": hard / 2 + 0.5, "soft": soft(n), "per view": soft(n, views), "alone": alone}.get(
        kind
    )
    batch["labels"] = labels
    if case.get("teacher"):
        batch["teacher_labels"] = soft(n)
    if case.get("weights"):
        batch["sample_weight"] = torch.rand(n, views, generator=generator, dtype=dtype)
    if case.get("contrasts"):
        m = n if kind == "none" else n + 2
        batch["contrast_inputs"] = torch.randn(m, D_IN, generator=generator, dtype=dtype)
        if kind == "hard":
            batch["contrast_labels"] = torch.randint(C, (m,), generator=generator)
        elif kind == "soft":
            batch["contrast_labels"] = soft(m)
        if case.get("teacher"):
            batch["contrast_teacher_labels"] = soft(m)
    return batch


def compute(case: dict[str, Any], batch: dict[str, Any], group: Any = None) -> dict[str, torch.Tensor]:
    """The loss, and the gradients that DDP would have averaged."""
    generator = torch.Generator().manual_seed(99)
    weight = torch.randn(D_IN, D, generator=generator, dtype=batch["inputs"].dtype).requires_grad_()
    temperature: Any = case.get("temperature", 0.2)
    leaves = [weight]
    if case.get("learnable"):
        temperature = torch.tensor(temperature, dtype=weight.dtype, requires_grad=True)
        leaves.append(temperature)
    tensors = {name: value for name, value in batch.items() if not name.endswith("inputs")}
    if "contrast_inputs" in batch:
        keys = batch["contrast_inputs"] @ weight
        tensors["contrast_features"] = keys.detach() if case["contrasts"] == "detached" else keys
    if case.get("label_gradient"):
        shift = torch.zeros(C, dtype=weight.dtype, requires_grad=True)
        leaves.append(shift)
        tensors["labels"] = torch.softmax(tensors["labels"].log() + shift, -1)
    loss = gen_supcon_loss(
        batch["inputs"] @ weight, temperature=temperature, group=group, **tensors, **case.get("options", {})
    )
    gradients = torch.autograd.grad(loss.sum() * case.get("loss_scale", 1.0), leaves)
    if group is not None:
        gradients = [sum_of(gradient, group) / dist.get_world_size(group) for gradient in gradients]
    return {"loss": loss.detach(), **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)}}


def sum_of(x: torch.Tensor, group: Any) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def together(batches: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: None if value is None else torch.cat([b[name] for b in batches]) for name, value in batches[0].items()
    }


def options(**values: Any) -> dict[str, Any]:
    return {"options": values}


CASES: dict[str, dict[str, Any]] = {}
for mode, kind in itertools.product(("all", "first", "one"), ("hard", "soft", "per view", "none")):
    CASES[f"{mode}, {kind}"] = {"labels": kind, **options(contrast_mode=mode)}
for kind, contrasts in itertools.product(("hard", "soft", "none"), ("with gradient", "detached")):
    CASES[f"contrasts {contrasts}, {kind}"] = {"labels": kind, "contrasts": contrasts, "views": 1}
CASES |= {
    "one view": {"views": 1},
    "one view, soft": {"views": 1, "labels": "soft"},
    "float classes": {"labels": "float"},
    "teacher": {"teacher": True, **options(teacher_weight=0.7)},
    "teacher, soft": {"labels": "soft", "teacher": True},
    "teacher, contrasts": {"labels": "soft", "teacher": True, "contrasts": "with gradient"},
    "weights": {"weights": True},
    "weights, sum": {"weights": True, **options(reduction="sum")},
    "sum": options(reduction="sum"),
    "sum, soft": {"labels": "soft", **options(reduction="sum")},
    "empty anchors ignored": {"labels": "alone", "views": 1, **options(empty_anchors="ignore")},
    "empty anchors zero": {"labels": "alone", "views": 1},
    "empty anchors ignored, weights": {
        "labels": "alone",
        "views": 1,
        "weights": True,
        **options(empty_anchors="ignore"),
    },
    "learnable": {"learnable": True},
    "learnable, soft, first": {"learnable": True, "labels": "soft", **options(contrast_mode="first")},
    "learnable, dense": {"learnable": True, "labels": "soft", **options(backend="dense")},
    "not normalised": options(normalize=False),
    "not normalised, huge": {"temperature": 1e-3, **options(normalize=False)},
    "no base temperature": options(base_temperature=None),
    "sharp labels": {"labels": "soft", "sharpness": 30.0},
    "label gradient": {"labels": "soft", "label_gradient": True},
    "dense": options(backend="dense"),
    "dense, first": {"labels": "soft", **options(backend="dense", contrast_mode="first")},
    "dense, contrasts": {"labels": "soft", "contrasts": "with gradient", **options(backend="dense")},
    "scaled": {"loss_scale": 1024.0},
}


def exact_everywhere(sizes: tuple[int, ...], names: list[str]) -> dict[str, dict[str, float]]:
    """The largest errors of each case, relative to the largest number."""
    rank = dist.get_rank()
    errors = {}
    for name in names:
        case = CASES[name]
        batches = [batch_of(case, n, seed) for seed, n in enumerate(sizes)]
        ours, exact = compute(case, batches[rank], dist.group.WORLD), compute(case, together(batches))
        errors[name] = {
            key: float((ours[key] - value).abs().max() / value.abs().max().clamp(min=1e-12))
            for key, value in exact.items()
        }
    return errors


@pytest.mark.parametrize("sizes", [*SIZES, *MORE_SIZES])
def test_loss_and_gradients_are_those_of_one_process(sizes, tmp_path: Path):
    for errors in distributed.run(len(sizes), exact_everywhere, tmp_path, sizes, list(CASES)):
        assert not {name: found for name, found in errors.items() if not max(found.values()) <= 1e-10}


def exact_at_random(world: int, rounds: int) -> list[str]:
    generator = torch.Generator().manual_seed(world)
    wrong = []
    for number in range(rounds):
        sizes = tuple(torch.randint(1, 9, (world,), generator=generator).tolist())
        name = list(CASES)[int(torch.randint(len(CASES), (), generator=generator))]
        if not max(exact_everywhere(sizes, [name])[name].values()) <= 1e-10:
            wrong.append(f"{number}: {name}, {sizes}")
    return wrong


@pytest.mark.parametrize("world", [2, 3])
def test_random_sizes(world, tmp_path: Path):
    assert distributed.run(world, exact_at_random, tmp_path, world, 40) == [[]] * world


def single_precision(names: list[str], backend: str, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    for name in names:
        CASES[name] = CASES[name] | {"dtype": dtype}
        CASES[name] |= options(**(CASES[name].get("options", {}) | {"backend": backend}))
    return exact_everywhere((70, 3), names)


KINDS = [
    "one view",
    "one view, soft",
    "first, soft",
    "one, hard",
    "contrasts with gradient, soft",
    "learnable",
    "teacher",
]


@pytest.mark.parametrize("backend", ["auto", "tiled", "dense", pytest.param("triton", marks=pytest.mark.exhaustive)])
def test_single_precision(backend, tmp_path: Path):
    if backend == "triton" and backend not in available_backends():
        pytest.skip("needs Triton's interpreter")
    names = [*KINDS, "not normalised"]
    for errors in distributed.run(2, single_precision, tmp_path, names, backend, torch.float32):
        assert not {name: found for name, found in errors.items() if not max(found.values()) <= 2e-5}


def own_anchors() -> tuple[torch.Tensor, torch.Tensor]:
    """reduction="none": losses of this process, and those of the same samples on one process."""
    case = {"labels": "soft", **options(reduction="none")}
    batches = [batch_of(case, n, seed) for seed, n in enumerate((3, 5))]
    rank, first = dist.get_rank(), (0, 3)[dist.get_rank()]
    losses = compute(case, batches[rank], dist.group.WORLD)["loss"]
    every = compute(case, together(batches))["loss"].view(2, 8)  # view-major
    return losses, every[:, first : first + losses.numel() // 2].flatten()


def test_without_reduction_each_process_has_the_losses_of_its_anchors(tmp_path: Path):
    for ours, exact in distributed.run(2, own_anchors, tmp_path):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)


# ---- Around it: DDP, FSDP, sub-groups, autocast, compiled models, accumulated gradients ----


def net(dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(D_IN, 16), torch.nn.Tanh(), torch.nn.Linear(16, D)).to(dtype)


class WithLoss(torch.nn.Module):
    """Encoder and criterion in one module, as DDP wants it where the criterion has a parameter."""

    def __init__(self, encoder: torch.nn.Module, criterion: GenSupConLoss) -> None:
        super().__init__()
        self.encoder, self.criterion = encoder, criterion

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.encoder(inputs), labels)


def trained(model: torch.nn.Module, batches: list[dict[str, Any]], micro: int = 1) -> list[torch.Tensor]:
    """Parameters after two steps of gradient descent, each of which accumulates `micro` batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for number, batch in enumerate(batches):
        is_last = (number + 1) % micro == 0
        with nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync():
            model(batch["inputs"], batch["labels"]).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    return [full(parameter.detach()) for parameter in model.parameters()]


def full(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def training_matches(kind: str) -> list[float]:
    """Relative errors of the parameters against training on one process."""
    from torch.nn.parallel import DistributedDataParallel

    rank, world = dist.get_rank(), dist.get_world_size()
    case: dict[str, Any] = {"labels": "soft"}
    shares = [[batch_of(case, 2 + 3 * r, 10 * step + r) for r in range(world)] for step in range(4)]

    def model(group: Any) -> WithLoss:
        return WithLoss(net(), GenSupConLoss(0.2, group=group, learnable_temperature=True).double())

    micro = 2 if kind == "accumulation" else 1
    exact = trained(model(None), [together(share) for share in shares], micro)
    ours = model(dist.group.WORLD)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(ours.encoder, mesh=init_device_mesh("cpu", (world,)))
        wrapped: torch.nn.Module = ours
        wrapped.criterion.log_temperature.register_hook(lambda g: sum_of(g, dist.group.WORLD) / world)
    else:
        if kind == "compile":
            ours.encoder = torch.compile(ours.encoder, backend="aot_eager")
        wrapped = DistributedDataParallel(ours)
        if kind == "compiled whole":
            wrapped = torch.compile(wrapped, backend="aot_eager")
    found = trained(wrapped, [share[rank] for share in shares], micro)
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("kind", ["ddp", "accumulation", *["fsdp"] * distributed.SHARDS, "compile", "compiled whole"])
def test_training_matches_one_process(kind, tmp_path: Path):
    for errors in distributed.run(2, training_matches, tmp_path, kind):
        assert max(errors) <= 1e-10


def compiled_loss() -> tuple[int, float]:
    """Graphs that a compiled function with the loss inside has, and the largest error over several sizes."""
    from torch._dynamo.testing import CompileCounter

    counter, case, worst = CompileCounter(), {"labels": "soft"}, 0.0
    encoder = net()

    @torch.compile(backend=counter)
    def step(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 2 * gen_supcon_loss(encoder(inputs) * 3, labels, group=dist.group.WORLD)

    for n in (3, 4, 7, 9):
        batches = [batch_of(case, n + seed, seed) for seed in range(2)]
        loss = step(*(batches[dist.get_rank()][name] for name in ("inputs", "labels")))
        whole = together(batches)
        exact = 2 * gen_supcon_loss(encoder(whole["inputs"]) * 3, whole["labels"])
        worst = max(worst, float((loss - exact).detach().abs()))
    return counter.frame_count, worst


def test_compiled_code_around_the_loss(tmp_path: Path):
    """A graph before it, once more for other batch sizes, and one after it; none of the loss itself."""
    for graphs, error in distributed.run(2, compiled_loss, tmp_path):
        assert graphs <= 3
        assert error <= 1e-12


def in_sub_groups() -> list[float]:
    """Two groups of two processes have a loss each; averaged over all four, gradients are those of the mean loss."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    case: dict[str, Any] = {"labels": "hard"}
    batches = [batch_of(case, 2 + r, r) for r in range(4)]
    own = groups[rank % 2]
    ours = compute(case, batches[rank], own)
    exact = [compute(case, together([batches[i], batches[i + 2]])) for i in range(2)]
    over_all = sum_of(ours["gradient 0"] / 2, dist.group.WORLD) / 2  # `compute` has averaged within the group
    mean = (exact[0]["gradient 0"] + exact[1]["gradient 0"]) / 2
    return [
        float((ours["loss"] - exact[rank % 2]["loss"]).abs()),
        float((ours["gradient 0"] - exact[rank % 2]["gradient 0"]).abs().max()),
        float((over_all - mean).abs().max()),
    ]


def test_sub_groups(tmp_path: Path):
    for errors in distributed.run(4, in_sub_groups, tmp_path):
        assert max(errors) <= 1e-12


def under_autocast() -> tuple[torch.dtype, float, float]:
    case: dict[str, Any] = {"dtype": torch.float32, "labels": "soft"}
    batches = [batch_of(case, 20, seed) for seed in range(2)]
    features = [batch["inputs"].to(torch.bfloat16) for batch in batches]

    def gradient(x: torch.Tensor, labels: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = gen_supcon_loss(leaf, labels, group=group)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0].float()

    rank = dist.get_rank()
    ours, d_ours = gradient(features[rank], batches[rank]["labels"], dist.group.WORLD)
    exact, d_exact = gradient(torch.cat(features), torch.cat([batch["labels"] for batch in batches]), None)
    d_exact = 2 * d_exact[20 * rank : 20 * rank + 20]
    return ours.dtype, float((ours - exact).abs() / exact), float((d_ours - d_exact).abs().max() / d_exact.abs().max())


def test_autocast_and_half_precision(tmp_path: Path):
    for dtype, error, gradient_error in distributed.run(2, under_autocast, tmp_path):
        assert dtype == torch.float32
        assert error <= 1e-6
        assert gradient_error <= 2**-8  # the gradient itself is rounded to bfloat16


def second_derivatives() -> list[str]:
    """What becomes of a second derivative, of features and of the temperature, with a group."""
    found = []
    for labels, normalize, backend in itertools.product(("hard", "soft"), (True, False), ("dense", "tiled")):
        case: dict[str, Any] = {"labels": labels}
        batches = [batch_of(case, n, seed) for seed, n in enumerate((3, 2))]
        options: dict[str, Any] = {"normalize": normalize, "temperature": 1.0, "backend": backend}

        def penalty(group: Any, batch: dict[str, Any], options: dict[str, Any]) -> Any:
            leaf = batch["inputs"].clone().requires_grad_()
            loss = gen_supcon_loss(leaf, batch["labels"], group=group, **options)
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            return torch.autograd.grad(first.square().sum(), leaf)[0]

        try:
            second = penalty(dist.group.WORLD, batches[dist.get_rank()], options)
            exact = penalty(None, together(batches), options | {"backend": "dense"})
            first_row = (0, 3)[dist.get_rank()]
            exact = dist.get_world_size() ** 2 * exact[first_row : first_row + len(second)]
            found.append(f"{backend}: {float((second - exact).abs().max() / exact.abs().max()) < 1e-9}")
        except RuntimeError as error:
            found.append(f"{backend}: {error}")
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    batch = batch_of({"labels": "hard"}, 3, 0)
    loss = gen_supcon_loss(batch["inputs"], batch["labels"], temperature=tau, group=dist.group.WORLD, backend="tiled")
    (first,) = torch.autograd.grad(loss, tau, create_graph=True)
    try:
        found.append(f"tiled: {torch.autograd.grad(first, tau)}")
    except RuntimeError as error:
        found.append(f"tiled: {error}")
    return found


def test_second_derivatives_are_right_or_refused(tmp_path: Path):
    for found in distributed.run(2, second_derivatives, tmp_path):
        assert len(found) == 9
        for text in found:
            assert text == "dense: True" or 'pass backend="dense"' in text or 'only backend="dense"' in text, text
        assert found.count("dense: True") == 4


def awkward_exchanges() -> list[str]:
    """Strides of one column, other labels with gradients, a queue beside a loss: what was a crash or a deadlock."""
    rank, world, said = dist.get_rank(), dist.get_world_size(), []
    column = torch.randn(6, 2, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)[:, :1]
    loss = gen_supcon_loss(column, torch.arange(6) % 3, normalize=False, temperature=1.0, group=dist.group.WORLD)
    both = [torch.empty_like(column.contiguous()) for _ in range(world)]
    dist.all_gather(both, column.contiguous())
    whole = gen_supcon_loss(torch.cat(both), torch.arange(6).repeat(world) % 3, normalize=False, temperature=1.0)
    said.append(str(float((loss - whole).abs()) < 1e-12))
    queue = FeatureQueue(8, 1, group=dist.group.WORLD)
    queue.enqueue(column.float(), torch.arange(6))
    said.append(str(torch.equal(queue.features.double()[-6:].float(), both[-1].float())))
    features, labels, extra = torch.randn(4, 3), torch.rand(4, 3), torch.rand(5, 3)
    (labels, extra)[rank % 2].requires_grad_()
    queue = FeatureQueue(8, 3, group=dist.group.WORLD)
    gen_supcon_loss(torch.randn(2, 2, 3), group=dist.group.WORLD, base_temperature=(1, 1.0)[rank % 2])
    for call in (
        lambda: gen_supcon_loss(
            features, labels, contrast_features=torch.randn(5, 3), contrast_labels=extra, group=dist.group.WORLD
        ),
        lambda: (
            gen_supcon_loss(features, [labels], group=dist.group.WORLD)
            if rank % 2
            else queue.enqueue(features, torch.arange(4))
        ),
    ):
        try:
            call()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_awkward_exchanges(tmp_path: Path):
    for right, queued, gradients, queue in distributed.run(2, awkward_exchanges, tmp_path):
        assert right == queued == "True"
        assert "processes differ in labels" in gradients
        assert "processes differ in" in queue


# ---- What is wrong is said on every process ----


def wrong_somewhere() -> dict[str, str]:
    """What each process says where the last one, or all, have something wrong."""
    rank, world = dist.get_rank(), dist.get_world_size()
    last = rank == world - 1
    z, y = torch.randn(3, 2, D), torch.tensor([0, 0, 1])
    soft = torch.rand(3, C)
    leaf = z.clone().requires_grad_()

    def when(condition: bool, value: Any, other: Any = None) -> Any:
        return value if condition else other

    some = dist.new_group([0])
    calls = {
        "D": lambda: loss(when(last, z[..., :5], z), y),
        "classes": lambda: loss(z, when(last, soft[:, :2], soft)),
        "kind of labels": lambda: loss(z, when(last, soft, y)),
        "dtype of labels": lambda: loss(z, when(last, y.float(), y)),
        "dtype": lambda: loss(when(last, z.double(), z), y),
        "half": lambda: loss(when(last, z.half(), z), y),
        "views": lambda: loss(when(last, z[:, :1], z), y),
        "gradient": lambda: loss(when(last, z, leaf), y),
        "mode": lambda: loss(z, y, contrast_mode=when(last, "first", "all")),
        "one or contrasts": lambda: loss(z, y, **when(last, {"contrast_features": z[:, 0], "contrast_labels": y}, {})),
        "temperature": lambda: loss(z, y, temperature=when(last, 0.07000001, 0.07)),
        "learnable": lambda: loss(z, y, temperature=torch.tensor(0.1, requires_grad=last)),
        "base_temperature": lambda: loss(z, y, base_temperature=when(last, None, 0.07)),
        "teacher": lambda: loss(z, y, teacher_labels=when(last, soft)),
        "teacher_weight": lambda: loss(z, y, teacher_labels=soft, teacher_weight=when(last, 2.0, 1.0)),
        "weights": lambda: loss(z, y, sample_weight=when(last, torch.ones(3))),
        "reduction": lambda: loss(z, y, reduction=when(last, "sum", "mean")),
        "empty_anchors": lambda: loss(z, y, empty_anchors=when(last, "ignore", "zero")),
        "normalize": lambda: loss(z, y, normalize=not last),
        "backend": lambda: loss(z, y, backend=when(last, "dense", "tiled")),
        "bad labels": lambda: loss(z, when(last, y[:2], y)),
        "bad labels on all": lambda: loss(z, y[:2]),
        "bad temperature": lambda: loss(z, y, temperature=when(last, -1.0, 0.07)),
        "NaN in labels": lambda: loss(z, when(last, soft * float("nan"), soft)),
        "no features": lambda: loss(when(last, z[:, :0], z), y),
        "similarity": lambda: loss(z, None, label_similarity=torch.ones(3, 3)),
        "not a group": lambda: gen_supcon_loss(z, y, group="all"),
        "not a member": lambda: gen_supcon_loss(z, y, group=some) if rank else None,
    }

    def loss(features: torch.Tensor, labels: Any, **options: Any) -> None:
        gen_supcon_loss(features, labels, group=dist.group.WORLD, **options)

    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = ""
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    # After all these errors processes still understand each other.
    said["then"] = f"{float(gen_supcon_loss(torch.ones(2, 2, 3), group=dist.group.WORLD)):.6f}"
    return said


DIFFER = r"^ValueError: group: processes differ in {}: {} on processes 0, 1; {} on process 2$"
SAID = {
    "D": ("D of features", "7", "5"),
    "classes": ("labels", "vectors of 4 classes", "vectors of 2 classes"),
    "kind of labels": ("labels", r"class numbers, torch\.int64", "vectors of 4 classes"),
    "dtype of labels": ("labels", r"class numbers, torch\.int64", r"class numbers, torch\.float32"),
    "dtype": ("dtype of features", r"torch\.float32", r"torch\.float64"),
    "half": ("dtype of features", r"torch\.float32", r"torch\.float16"),
    "views": ("views of features", "2", "1"),
    "gradient": ("gradient of features", "True", "False"),
    "mode": ("contrast_mode", "all", "first"),
    "one or contrasts": ("contrast_features", "None", "given"),
    "temperature": ("temperature", r"0\.07", r"0\.07000001"),
    "learnable": ("temperature", r"0\.1", r"0\.1, with gradient"),
    "base_temperature": ("base_temperature", r"0\.07", "None"),
    "teacher": ("teacher_labels", "None", "vectors of 4 classes"),
    "teacher_weight": ("teacher_weight", r"1\.0", r"2\.0"),
    "weights": ("sample_weight", "None", "given"),
    "reduction": ("reduction", "mean", "sum"),
    "empty_anchors": ("empty_anchors", "zero", "ignore"),
    "normalize": ("normalize", "True", "False"),
    "backend": ("backend", "tiled", "dense"),
}
REFUSED = {
    "bad labels": r"ValueError: labels must be",
    "bad temperature": r"ValueError: temperature must be",
    "NaN in labels": r"ValueError: labels has NaN",
    "no features": r"ValueError: features must be .* V and D at least 1",
}


def test_every_process_says_what_is_wrong(tmp_path: Path):
    results = distributed.run(3, wrong_somewhere, tmp_path)
    for rank, said in enumerate(results):
        for name, values in SAID.items():
            assert re.search(DIFFER.format(*values), said.pop(name)), (rank, name, results[rank])
        for name, text in REFUSED.items():
            prefix = "^" if rank == 2 else "^ValueError: group: process 2 could not take part: "
            assert re.search(prefix + text, said.pop(name)), (rank, name)
        assert re.search("^ValueError: labels must be", said.pop("bad labels on all"))
        assert re.search("^ValueError: label_similarity cannot be combined with group", said.pop("similarity"))
        assert re.search(
            "^TypeError: group must be .* a torch.distributed.ProcessGroup; got 'all'", said.pop("not a group")
        )
        member = said.pop("not a member")
        assert not member if rank == 0 else re.search("^ValueError: group does not contain this process", member)
        assert float(said.pop("then")) == pytest.approx(collapsed_loss(11), rel=1e-5)
        assert not said


def test_a_group_before_initialization():
    features = torch.randn(4, 2, 3)
    with pytest.raises(TypeError, match=r"^group must be \"world\".* or a torch\.distributed\.ProcessGroup; got bool"):
        gen_supcon_loss(features, group=True)
    with pytest.raises(TypeError, match=r"^group must be \"world\".* got 'all'"):
        GenSupConLoss(group="all")
    with pytest.raises(ValueError, match=r"^group=\"world\" needs"):
        gen_supcon_loss(features, group="world")
    if dist.group.WORLD is None:
        assert gen_supcon_loss(features, group=dist.group.WORLD) == gen_supcon_loss(features)


def copies_and_pickles() -> list[str]:
    criterion = GenSupConLoss(group=dist.group.WORLD)
    said = [str(copy.deepcopy(criterion).group is dist.group.WORLD), str(criterion)]
    try:
        pickle.dumps(criterion)
    except TypeError as error:
        said.append(str(error))
    criterion.group = None
    said.append(str(pickle.loads(pickle.dumps(criterion)).group))
    group = dist.new_group([0, 1])
    dist.barrier()  # the other process may still be connecting to this one
    dist.destroy_process_group(group)
    try:
        gen_supcon_loss(torch.randn(4, 2, 3), group=group)
    except ValueError as error:
        said.append(str(error))
    return said


def test_modules_with_a_group(tmp_path: Path):
    for same, shown, error, without, destroyed in distributed.run(2, copies_and_pickles, tmp_path):
        assert same == "True"
        assert "group=" in shown
        assert error.startswith("group cannot be pickled")
        assert without == "None"
        assert destroyed == "group is not initialized, or was destroyed"


# ---- What it costs ----


class Counted:
    """Bytes that collectives bring to this process, and how many of them there are."""

    def __init__(self) -> None:
        self.bytes, self.calls = 0, 0

    def __enter__(self) -> Counted:
        self.kept = {name: getattr(place, name) for place, name in self.places()}
        for place, name in self.places():
            setattr(place, name, self.counting(self.kept[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for place, name in self.places():
            setattr(place, name, self.kept[name])

    @staticmethod
    def places() -> list[tuple[Any, str]]:
        return [(_distributed, "_all_gather"), (dist, "all_reduce"), (dist, "all_to_all_single")]

    def counting(self, function: Any) -> Any:
        def counted(out: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if out.nbytes > 128:  # sizes and sums of the loss
                self.bytes += out.nbytes
                self.calls += 1
            return function(out, *args, **kwargs)

        return counted


def bytes_of_a_step(case: dict[str, Any], n: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    batch = batch_of(case, n, dist.get_rank())
    leaf = torch.randn(n, case["views"], D).to(case.get("features", torch.float32)).requires_grad_()
    largest = Largest()
    with largest, Counted() as forward:
        loss = gen_supcon_loss(leaf, batch["labels"], group=dist.group.WORLD, **case.get("options", {}))
    with largest, Counted() as backward:
        loss.backward()
    return (forward.bytes, forward.calls), (backward.bytes, backward.calls), largest.numel


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_bytes_of_a_self_contrast(kind, features, tmp_path: Path):
    """As docs/distributed.md counts them: rows in the forward pass, a few numbers of each in the backward pass."""
    world, n = 2, 700
    rows = world * 2 * n
    case = {"labels": kind, "views": 2, "dtype": torch.float32, "features": features}
    size = features.itemsize
    for forward, backward, largest in distributed.run(world, bytes_of_a_step, tmp_path, case, n):
        if kind == "hard":
            assert forward == (rows * (size * D + 8), 2)
            assert backward == (rows * (2 * 4 + 4), 2)
        else:
            assert forward == (rows * size * D + 8 * C * (D + 1), 2)
            assert backward == (rows * 2 * 4 + 8 * C * (D + 1), 2)
        assert largest < rows * 2 * n / 2  # no matrix of all pairs, not even of this process's anchors


def named_world() -> list[float]:
    """The loss of all processes: with the group, and with its name, given before the group is asked for."""
    criterion = GenSupConLoss(group="world")
    batch = batch_of({}, 3 + dist.get_rank(), dist.get_rank())
    features = batch["inputs"][..., :D]
    return [
        float(criterion(features, batch["labels"])),
        float(gen_supcon_loss(features, batch["labels"], group=dist.group.WORLD)),
    ]


def test_the_world_has_a_name(tmp_path: Path):
    results = distributed.run(2, named_world, tmp_path)
    assert len({value for found in results for value in found}) == 1


def refusals(kind: str) -> str:
    """What each process raises where process 1 does something that is wrong."""
    features, labels, options = torch.randn(4, 6), torch.arange(4) % 2, {}
    if kind == "sharded":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        try:
            gen_supcon_loss(distribute_tensor(features, mesh, [Shard(0)]), labels)
        except TypeError as error:
            return str(error)
    if dist.get_rank() == 1:
        options = {"unknown": {"labells": labels}, "precision": {}, "shape": {"sample_weight": torch.ones(3)}}[kind]
        if kind == "precision" and hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return str(float(GenSupConLoss(group="world")(features, labels, **options)))
    except (TypeError, ValueError) as error:
        return str(error)


def test_sharded_tensors_are_refused_by_name(tmp_path: Path):
    for said in distributed.run(2, refusals, tmp_path, "sharded"):
        assert re.match(r"features must be a tensor of one process; got a DTensor: .*full_tensor\(\)", said)


@pytest.mark.parametrize("kind, message", [("unknown", "labells is no argument"), ("shape", "sample_weight must be")])
def test_what_one_process_does_wrong_is_raised_on_all(kind, message, tmp_path: Path):
    others, own = distributed.run(2, refusals, tmp_path, kind)
    assert own.startswith(message)
    assert re.match(f"group: process 1 could not take part: (Type|Value)Error: {message}", others)


def test_a_setting_of_one_process_hangs_none(tmp_path: Path):
    first, second = distributed.run(2, refusals, tmp_path, "precision")
    assert float(first) == float(second)


def weights_of_two_dtypes() -> tuple[float, float]:
    """The loss where processes have sample weights of different dtypes, one of them for an empty share."""
    numbers = torch.Generator().manual_seed(0)
    features, labels = torch.randn(8, 5, generator=numbers), torch.arange(8) % 3
    weight = torch.rand(8, generator=numbers)
    own = slice(0, 8) if dist.get_rank() == 0 else slice(8, 8)
    parts = [weight.double(), weight][dist.get_rank()]
    shared = gen_supcon_loss(features[own], labels[own], sample_weight=parts[own], group="world")
    return float(shared), float(gen_supcon_loss(features, labels, sample_weight=weight))


def test_weights_may_have_different_dtypes(tmp_path: Path):
    for shared, alone in distributed.run(2, weights_of_two_dtypes, tmp_path):
        assert shared == pytest.approx(alone, rel=1e-6)
