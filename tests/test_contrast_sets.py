"""Who is contrasted with whom: the batch beside a memory, keys before a queue."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from oracle import oracle_loss
from strategies import memory_problems, run_loss, to_numpy, tolerance
from torch import Tensor
from torch_reference import reference_loss

from genscl_loss import FeatureQueue, GenSupConLoss, collapsed_loss, gen_supcon_loss

N, V, D, C, M = 6, 2, 5, 4, 9
MODES = ("all", "one", "first")
KINDS = ("hard", "per view", "soft", "soft per view", "none", "similarity", "similarity of rows", "teacher")


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft(*shape: int, seed: int = 0) -> Tensor:
    return (2 * rows(*shape, C, seed=seed)).softmax(-1)


def hard(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(seed))


def labels_of(kind: str, mode: str, m: int, *, views: int = V) -> dict:
    """Labels of a batch and of a set of m rows beside it."""
    if kind == "hard":
        return {"labels": hard(N, seed=1), "contrast_labels": hard(m, seed=2)}
    if kind == "per view":
        return {"labels": [hard(N, seed=v) for v in range(views)], "contrast_labels": hard(m, seed=9)}
    if kind == "soft":
        return {"labels": soft(N, seed=1), "contrast_labels": soft(m, seed=2)}
    if kind == "soft per view":
        return {"labels": soft(N, views, seed=1), "contrast_labels": soft(m, seed=2)}
    if kind == "teacher":
        of_teacher = {"teacher_labels": soft(N, seed=3), "contrast_teacher_labels": soft(m, seed=4)}
        return labels_of("hard", mode, m, views=views) | of_teacher | {"teacher_weight": 0.7}
    anchors, own = (N * views if mode == "all" else N), (N if mode == "one" else N * views)
    if kind == "similarity":
        return {"label_similarity": rows(N, N + m, seed=1).abs()}
    if kind == "similarity of rows":
        return {"label_similarity": rows(anchors, own + m, seed=1).abs()}
    return {}


def check(backend: str, features, **options) -> Tensor:
    """The loss, after comparing it with the oracle and its gradients with the reference."""
    wanted = oracle_loss(to_numpy(features), **to_numpy(options))
    loss = run_loss(features, **options, backend=backend)
    exact = backend != "triton"
    torch.testing.assert_close(
        loss.double(), torch.as_tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-10 if exact else 1e-4
    )
    leaves = [x for x in (features, options.get("contrast_features")) if isinstance(x, Tensor) and x.requires_grad]
    if leaves:
        ours = torch.autograd.grad(loss.sum(), leaves)
        theirs = torch.autograd.grad(reference_loss(features, **options).sum(), leaves)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 if exact else 1e-4)
    return loss


# ---- The batch beside a memory ----


@pytest.mark.parametrize("m", [M, 1, 0])
@pytest.mark.parametrize(("mode", "kind"), list(itertools.product(MODES, KINDS)))
@pytest.mark.usefixtures("small_tile")
def test_the_batch_and_a_memory(backend, mode, kind, m):
    features = rows(N, V, D).requires_grad_()
    options = {"contrast_features": rows(m, D, seed=7), "include_batch": True, "contrast_mode": mode}
    check(backend, features, **options, **labels_of(kind, mode, m))


@pytest.mark.parametrize(("mode", "kind"), list(itertools.product(("all", "first"), KINDS)))
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.usefixtures("small_tile")
def test_one_view_and_a_set_with_a_gradient(backend, mode, kind, learned):
    features = rows(N, 1, D).requires_grad_()
    options = {"contrast_features": rows(M, D, seed=7).requires_grad_(learned), "include_batch": True}
    check(backend, features, contrast_mode=mode, **options, **labels_of(kind, mode, M, views=1))


@given(problem=memory_problems())
def test_any_memory(backend, monkeypatch, problem):
    monkeypatch.setattr("genscl_loss._backends.tiled.TILE", problem.tile)
    loss = run_loss(problem.features, **problem.options, backend=backend)
    wanted = torch.as_tensor(oracle_loss(to_numpy(problem.features), **to_numpy(problem.options)), dtype=torch.float64)
    dtype = torch.float32 if backend == "triton" else torch.float64
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=tolerance(problem.options, dtype))


@pytest.mark.parametrize("kind", ["hard", "soft", "none", "similarity"])
@pytest.mark.usefixtures("small_tile")
def test_an_empty_memory_is_the_batch_alone(backend, kind):
    """Bit for bit, so by the same way: half the work of the other one."""
    features, labels = rows(N, V, D).float().requires_grad_(), labels_of(kind, "all", 0)
    empty = {"contrast_features": torch.zeros(0, D), "include_batch": True}
    alone = {name: value for name, value in labels.items() if not name.startswith("contrast")}
    ours = gen_supcon_loss(features, **labels, **empty, backend=backend)
    theirs = gen_supcon_loss(features, **alone, backend=backend)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(loss, features)[0] for loss in (ours, theirs)))


def test_an_empty_memory_that_has_a_gradient_gets_one():
    empty = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    features = rows(N, D).requires_grad_()
    options = {"contrast_features": empty, "contrast_labels": hard(0), "include_batch": True}
    for backend in ("dense", "tiled"):
        loss = gen_supcon_loss(features, hard(N), **options, backend=backend)
        of_rows, of_set = torch.autograd.grad(loss, [features, empty])
        assert of_rows.abs().max() > 0
        assert of_set.shape == (0, D)


def test_both_roles_of_a_row_have_a_gradient(backend):
    """That of a self-contrast, to which the memory adds: a memory far from everything adds nothing."""
    features, labels = rows(N, D).requires_grad_(), hard(N)
    alone = torch.autograd.grad(run_loss(features, labels, backend=backend), features)[0]
    memory = {"contrast_features": torch.full((3, D), -1e-30, dtype=torch.float64), "contrast_labels": hard(3) + 9}
    lowered = torch.autograd.grad(
        run_loss(features, labels, **memory, include_batch=True, backend=backend, temperature=1e-3), features
    )[0]
    cold = torch.autograd.grad(run_loss(features, labels, backend=backend, temperature=1e-3), features)[0]
    torch.testing.assert_close(lowered, cold, rtol=1e-4, atol=1e-4)
    assert (alone - cold).abs().max() > 0.1


@pytest.mark.parametrize("memory_size", [8, 16, 20, 32])
def test_it_is_the_cross_batch_memory_of_others_step_by_step(backend, memory_size):
    """Of pytorch-metric-learning, whose memory holds the batch as well: N rows of it are here the batch itself."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.CrossBatchMemory(losses.SupConLoss(temperature=0.1), embedding_size=D, memory_size=memory_size)
    ours = GenSupConLoss(0.1, base_temperature=None, empty_anchors="ignore", include_batch=True, backend=backend)
    batch = 8
    queue = FeatureQueue(size=memory_size - batch, dim=D) if memory_size > batch else None
    for step in range(9):
        z, y = rows(batch, D, seed=step).float(), hard(batch, seed=step)
        memory = (torch.zeros(0, D), hard(0)) if queue is None else (queue.features, queue.labels)
        loss = ours(z, y, contrast_features=memory[0], contrast_labels=memory[1])
        torch.testing.assert_close(loss, theirs(z, y), rtol=2e-5, atol=1e-5)
        if queue is not None:
            queue.enqueue(z, y)


def test_only_the_batch_gets_a_gradient_of_a_memory(monkeypatch):
    """A memory is as large as it likes: the product that would make its gradient is not taken."""
    from genscl_loss._backends import tiled

    asked = []
    original = tiled.row_lse_grad
    monkeypatch.setattr(tiled, "row_lse_grad", lambda *given: asked.append(given[-1]) or original(*given))
    features, memory = rows(N, D).requires_grad_(), rows(50, D)
    options = {"contrast_features": memory, "contrast_labels": hard(50), "include_batch": True, "backend": "tiled"}
    gen_supcon_loss(features, hard(N), **options).backward()
    options["contrast_features"] = memory.requires_grad_()
    gen_supcon_loss(features, hard(N), **options).backward()
    assert asked == [N, N + 50]


def test_a_collapsed_model_and_its_memory(backend):
    loss = gen_supcon_loss(
        torch.ones(N, V, D),
        hard(N),
        contrast_features=torch.ones(M, D),
        contrast_labels=hard(M),
        include_batch=True,
        backend=backend,
    )
    assert abs(loss - collapsed_loss(N * V - 1 + M)) < 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def step(z: Tensor, y: Tensor, memory: Tensor, of_memory: Tensor) -> Tensor:
        return gen_supcon_loss(
            z, y, contrast_features=memory, contrast_labels=of_memory, include_batch=True, backend="tiled"
        )

    for n, m in ((6, 9), (7, 12), (8, 30)):
        z = rows(n, D).requires_grad_()
        given = (hard(n), rows(m, D, seed=1), hard(m, seed=1))
        exact = step._torchdynamo_orig_callable(z, *given)
        loss = step(z, *given)
        torch.testing.assert_close(loss, exact)
        torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(exact, z))


# ---- Without labels: keys, and rows that are nobody's ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.usefixtures("small_tile")
def test_keys_and_then_a_queue(backend, mode, views):
    features, contrasts = rows(N, views, D).requires_grad_(), rows(N + M, D, seed=5).requires_grad_()
    loss = check(backend, features, contrast_features=contrasts, contrast_mode=mode)
    positives = {"label_similarity": torch.eye(N, N + M, dtype=torch.float64)}
    by_hand = run_loss(features, **positives, contrast_features=contrasts, contrast_mode=mode, backend=backend)
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-7)


def test_moco_is_a_cross_entropy_with_the_key_first(backend):
    q, k, queue = (torch.nn.functional.normalize(rows(n, D, seed=n), dim=1) for n in (N, N + 1, M))
    k = k[:N]
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ torch.cat([k, queue]).T], 1) / 0.2
    own = torch.eye(N, N + M, dtype=torch.bool)
    logits[:, 1:].masked_fill_(own, -torch.inf)
    wanted = torch.nn.functional.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    loss = run_loss(q, contrast_features=torch.cat([k, queue]), temperature=0.2, base_temperature=None, backend=backend)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-7)


def test_without_labels_a_memory_beside_two_views_holds_negatives(backend):
    """However many rows it has: the first N are nobody's keys, as they would be if there were fewer."""
    features, memory = rows(N, V, D), rows(M, D, seed=3)
    options = {"include_batch": True, "backend": backend}
    for m in (0, 2, N, M):
        loss = run_loss(features, contrast_features=memory[:m], **options)
        by_hand = run_loss(
            features,
            torch.arange(N),
            contrast_features=memory[:m],
            contrast_labels=torch.full((m,), -1),
            **options,
        )
        torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-6)


# ---- Bad input ----

QUEUE = {"contrast_features": rows(M, D), "contrast_labels": hard(M)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include_batch": True}, ValueError, "^include_batch adds the batch to contrast_features, which is missing"),
        ({"include_batch": 1, **QUEUE}, TypeError, "^include_batch must be a bool; got int"),
        ({"include_batch": torch.tensor(True), **QUEUE}, TypeError, "^include_batch must be a bool; got Tensor"),
        ({"labels": None, "contrast_features": rows(N - 1, D)}, ValueError, "^labels is missing.* 6 rows; got 5"),
        (
            {"labels": None, "contrast_features": rows(N - 1, D), "include_batch": True},
            ValueError,
            "^labels is missing.* 6 rows; got 5",
        ),
        ({"include_batch": True, "contrast_features": rows(M, D)}, ValueError, "^contrast_labels is missing"),
        ({"include_batch": True, **QUEUE, "contrast_mode": "one"}, ValueError, "^contrast_mode"),
        (
            {"labels": None, "include_batch": True, "contrast_features": QUEUE["contrast_features"],
             "label_similarity": torch.ones(N, M)},
            ValueError,
            r"^label_similarity must be \(6, 15\)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(options, error, message):
    with pytest.raises(error, match=message):
        gen_supcon_loss(rows(N, D), **{"labels": hard(N), **options})


def test_the_module_keeps_include_batch():
    criterion = GenSupConLoss(include_batch=True)
    assert "include_batch=True" in repr(criterion)
    with pytest.raises(ValueError, match="^include_batch"):
        criterion(rows(N, D), hard(N))
    torch.testing.assert_close(
        criterion(rows(N, D), hard(N), **QUEUE), gen_supcon_loss(rows(N, D), hard(N), **QUEUE, include_batch=True)
    )
    with pytest.raises(TypeError, match="^include_batch"):
        GenSupConLoss(include_batch=None)


# ---- Few anchors before a large set ----


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("kind", ["hard", "soft", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("include_batch", [False, True])
def test_rows_of_a_set_may_be_of_any_length(backend, count, kind, dtype, include_batch):
    """Whether they are scaled or, where anchors are fewer than features, the logits."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("needs float32")
    m, d = 50, 16
    lengths = torch.logspace(-17, 18, m, dtype=torch.float64)[:, None]
    lengths[3] = 0
    x, others = rows(count, d, seed=1).to(dtype), (torch.nn.functional.normalize(rows(m, d)) * lengths).to(dtype)
    given = {"contrast_features": others, "include_batch": include_batch}
    given["temperature"] = torch.tensor(0.1, dtype=dtype)
    if kind != "none":
        of_anchors, of_set = (hard(n, seed=n) if kind == "hard" else soft(n, 20, seed=n).flatten(1) for n in (count, m))
        given |= {"labels": of_anchors, "contrast_labels": of_set * lengths if kind == "soft" else of_set}
    variable = {"features": x} | {k: given[k] for k in ("temperature", *(["labels"] if kind == "soft" else []))}
    found = []
    for function, extra in ((gen_supcon_loss, {"backend": backend}), (reference_loss, {})):
        leaves = {name: value.clone().requires_grad_() for name, value in variable.items()}
        loss = function(**(given | leaves), **extra)
        found.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
    for value, expected in zip(*found, strict=True):
        error = (value.double() - expected.double()).norm() / expected.double().norm()
        assert error <= (2e-5 if dtype == torch.float32 else 1e-12)
