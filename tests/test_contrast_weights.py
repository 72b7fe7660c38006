"""Contrasts that weigh more or less, and rows that are not there: padding, an ignored class, filtered rows."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import oracle_loss
from strategies import rounding_of_half, run_loss, to_numpy
from test_contrast_sets import KINDS, MODES, D, M, N, V, hard, labels_of, rows, soft
from test_memory import peak_bytes
from torch import Tensor
from torch_reference import reference_loss

import genscl_loss
from genscl_loss import GenSupConLoss, gen_supcon_loss

NAN = float("nan")


def weights(*shape: int, seed: int = 0, zeros: bool = True) -> Tensor:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return x * (torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.7) if zeros else x


def close(backend: str, ours, theirs, atol: float = 1e-10, rtol: float = 0.0) -> None:
    """Compare in float64; "triton" computes in float32."""
    if not isinstance(ours, Tensor):
        for a, b in zip(ours, theirs, strict=True):
            close(backend, a, b, atol, rtol)
        return
    atol = max(atol, 1e-4) if backend == "triton" else atol
    torch.testing.assert_close(ours.double(), torch.as_tensor(theirs, dtype=torch.float64), rtol=rtol, atol=atol)


def check(backend: str, features, **options) -> Tensor:
    """The loss, after comparing it with the oracle and its gradients with the reference."""
    wanted = oracle_loss(to_numpy(features), **to_numpy(options))
    loss = run_loss(features, **options, backend=backend)
    close(backend, loss, wanted)
    leaves = [x for x in (features, options.get("contrast_features")) if isinstance(x, Tensor) and x.requires_grad]
    ours = torch.autograd.grad(loss.sum(), leaves)
    theirs = torch.autograd.grad(reference_loss(features, **options).sum(), leaves)
    close(backend, ours, theirs, 1e-9)
    return loss


@pytest.mark.parametrize(("mode", "kind"), list(itertools.product(MODES, KINDS)))
@pytest.mark.parametrize("of", ["samples", "views", "the batch and a memory"])
@pytest.mark.usefixtures("small_tile")
def test_weights_are_those_of_the_definition(backend, mode, kind, of):
    features, options = rows(N, V, D).requires_grad_(), {"contrast_mode": mode}
    if of == "the batch and a memory":
        own = N if mode == "one" else N * V
        options |= {"contrast_features": rows(M, D, seed=7), "include_batch": True, "contrast_weight": weights(own + M)}
        options |= labels_of(kind, mode, M)
    else:
        options["contrast_weight"] = weights(N) if of == "samples" else weights(N, V)
        options |= {k: y for k, y in labels_of(kind, mode, 0).items() if not k.startswith("contrast")}
    for reduction in ("mean", "none"):
        check(backend, features, **options, reduction=reduction)


@pytest.mark.parametrize("kind", ["hard", "soft", "none"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.usefixtures("small_tile")
def test_weights_of_a_set_alone(backend, kind, learned):
    options = {"contrast_features": rows(M, D, seed=7).requires_grad_(learned), "contrast_weight": weights(M)}
    check(backend, rows(N, V, D).requires_grad_(), **options, **labels_of(kind, "all", M))


@pytest.mark.parametrize("temperature", [1e-3, 0.07])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_weights_of_any_size(backend, size, temperature):
    """One factor for all adds its logarithm, however large it is, also beside ones."""
    features, labels = rows(N, V, D).requires_grad_(), hard(N)
    weight = weights(N, zeros=False)
    options, exact = {"temperature": temperature, "base_temperature": None, "backend": backend}, backend != "triton"
    one = run_loss(features, labels, contrast_weight=weight, **options)
    large = run_loss(features, labels, contrast_weight=weight * size, **options)
    # But for the 1e-8 beside the positive mass, which is at least one.
    close(backend, large - one, torch.tensor(size, dtype=torch.float64).log(), 1e-7, 1e-8 if exact else 1e-5)
    ours, theirs = torch.autograd.grad(large, features), torch.autograd.grad(one, features)
    close(backend, ours, theirs, 1e-7, 1e-7 if exact else 1e-3)
    weight = torch.where(torch.arange(N) < 3, weight, weight * size)
    loss = run_loss(features.detach(), labels, contrast_weight=weight, **options)
    wanted = oracle_loss(
        to_numpy(features), to_numpy(labels), contrast_weight=to_numpy(weight),
        temperature=temperature, base_temperature=None,
    )  # fmt: skip
    close(backend, loss, wanted, 1e-7, 1e-9 if exact else 1e-5)


def test_weights_of_one_change_nothing(backend):
    features, labels = rows(N, V, D).float(), hard(N)
    plain = gen_supcon_loss(features, labels, backend=backend)
    torch.testing.assert_close(plain, gen_supcon_loss(features, labels, contrast_weight=torch.ones(N), backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_in_single_precision(backend, dtype):
    features, weight = rows(300, D).to(dtype), weights(300)
    loss = gen_supcon_loss(features, hard(300), contrast_weight=weight, backend=backend)
    exact = gen_supcon_loss(features.double(), hard(300), contrast_weight=weight, backend="dense")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5 + rounding_of_half(backend, dtype, 0.07))


# ---- Rows that are not there ----


def filtered(features: Tensor, keep: Tensor, labels, **options) -> Tensor:
    """The loss of the rows that are left, with the gradient of the others zero."""
    return run_loss(features[keep], labels[keep], **options)


@pytest.mark.parametrize("held", [0.0, 1.0, NAN, float("inf"), 1e30])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("small_tile")
def test_padding_is_as_good_as_nothing(backend, mode, kind, held):
    features, there = rows(N + 5, V, D), torch.arange(N + 5) < N
    features[N:] = held
    features.requires_grad_()
    labels = hard(N + 5) if kind == "hard" else soft(N + 5)
    options = {"contrast_mode": mode, "backend": backend}
    padded = run_loss(features, labels, contrast_weight=there, **options)
    alone = filtered(features, there, labels, **options)
    close(backend, padded, alone)
    ours, theirs = (torch.autograd.grad(loss, features)[0] for loss in (padded, alone))
    close(backend, ours, theirs)
    assert not ours[N:].any()


@pytest.mark.parametrize("empty_anchors", ["zero", "ignore"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.usefixtures("small_tile")
def test_an_ignored_class_is_as_good_as_nothing(backend, views, reduction, empty_anchors):
    features, labels = rows(12, views, D).requires_grad_(), hard(12)
    labels[3] = 7  # an anchor without positives, if it has one view
    there = labels != 1
    options = {"reduction": reduction, "empty_anchors": empty_anchors, "backend": backend}
    options |= {"teacher_labels": soft(12), "sample_weight": weights(12)}
    loss = run_loss(features, labels, ignore_index=1, **options)
    kept = {name: x[there] if isinstance(x, Tensor) else x for name, x in options.items()}
    alone = filtered(features, there, labels, **kept)
    if reduction == "none":
        of_rows = loss.view(views, 12)
        assert not of_rows[:, ~there].any()
        close(backend, of_rows[:, there].flatten(), alone)
    else:
        close(backend, loss, alone)
    ours, theirs = (torch.autograd.grad(x.sum(), features)[0] for x in (loss, alone))
    close(backend, ours, theirs)
    assert not ours[~there].any()


@pytest.mark.parametrize("beside", [False, True])
def test_ignored_rows_of_a_set(backend, beside):
    features, memory = rows(N, D).requires_grad_(), rows(M, D, seed=1).requires_grad_()
    y, of_memory = hard(N), hard(M, seed=1)
    options = {"include_batch": beside, "backend": backend}
    loss = run_loss(features, y, contrast_features=memory, contrast_labels=of_memory, ignore_index=2, **options)
    a, b = y != 2, of_memory != 2
    alone = run_loss(features[a], y[a], contrast_features=memory[b], contrast_labels=of_memory[b], **options)
    close(backend, loss, alone)
    for ours, theirs in zip(*(torch.autograd.grad(x, [features, memory]) for x in (loss, alone)), strict=True):
        close(backend, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float32, torch.float64])
def test_an_ignored_class_of_any_dtype(backend, dtype):
    labels = torch.tensor([0, 100, 1, 0, 100, 1]).to(dtype)
    loss = run_loss(rows(N, D), labels, ignore_index=100, backend=backend)
    close(backend, loss, filtered(rows(N, D), labels != 100, labels, backend=backend))


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("memory", [False, True])
def test_hardly_anything_is_left(backend, left, kind, memory):
    """Nobody to be contrasted with: zero, with a zero gradient, as if the batch had been so small."""
    features = rows(N, D).requires_grad_()
    labels = hard(N) if kind == "hard" else soft(N)
    options = {"contrast_weight": (torch.arange(N) < left), "backend": backend}
    if memory:
        options |= {"contrast_features": rows(2, D), "contrast_labels": labels[:2], "include_batch": True}
        options["contrast_weight"] = torch.cat([options["contrast_weight"], torch.zeros(2)])
    loss = run_loss(features, labels, **options)
    assert loss == 0
    assert not torch.autograd.grad(loss, features)[0].any()


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_a_similarity_of_rows_that_are_not_there(backend):
    """Where values are not looked at, a row of it may be anything, too."""
    features, there, similarity = rows(N, D), torch.arange(N) < 4, rows(N, N, seed=1).abs()
    alone = gen_supcon_loss(features[:4], label_similarity=similarity[:4, :4], backend=backend)
    similarity[4:] = similarity[:, 4:] = NAN
    compiled = torch.compile(gen_supcon_loss, fullgraph=True, backend="eager")
    loss = compiled(features, label_similarity=similarity, contrast_weight=there, backend=backend)
    torch.testing.assert_close(loss, alone)


def test_pixels(backend):
    """(B, D, H, W) and classes (B, H, W) with 255 for what has none."""
    maps, classes = rows(2, D, 3, 4), hard(2, 3, 4)
    classes[0, 1] = 255
    z, y = maps.permute(0, 2, 3, 1).reshape(-1, D), classes.reshape(-1)
    loss = run_loss(z, y, ignore_index=255, backend=backend)
    close(backend, loss, run_loss(z[y != 255], y[y != 255], backend=backend))


def test_validating_does_not_look_at_padding():
    features = rows(N, D)
    features[0] = NAN
    with genscl_loss.validate():
        assert gen_supcon_loss(features, hard(N), contrast_weight=torch.arange(N) > 0).isfinite()
        with pytest.raises(ValueError, match="^features has NaN"):
            gen_supcon_loss(features, hard(N), contrast_weight=torch.arange(N) < 2)


def test_second_derivatives_of_weighted_contrasts():
    features, labels = rows(5, D).requires_grad_(), hard(5)
    weight = weights(5, seed=3)

    def loss(z: Tensor) -> Tensor:
        return gen_supcon_loss(z, labels, contrast_weight=weight, backend="dense")

    assert torch.autograd.gradcheck(loss, features)
    assert torch.autograd.gradgradcheck(loss, features)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_label_that_has_a_gradient(backend, kind):
    features = rows(N, D)
    weight = weights(N, seed=3)
    labels = soft(N).requires_grad_()
    loss = gen_supcon_loss(features, labels, contrast_weight=weight, backend=backend)
    wanted = reference_loss(features, labels, contrast_weight=weight)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(loss, labels), torch.autograd.grad(wanted, labels), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_a_temperature_that_has_a_gradient(backend):
    features, tau = rows(N, V, D), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    for options in ({"contrast_weight": weights(N, V)}, {"ignore_index": 1}):
        loss = gen_supcon_loss(features, hard(N), temperature=tau, backend=backend, **options)
        wanted = reference_loss(features, hard(N), temperature=tau, **options)
        torch.testing.assert_close(torch.autograd.grad(loss, tau), torch.autograd.grad(wanted, tau), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_padding_to_one_shape(dynamic):
    """One graph for batches of any size, without a host read: padded, they are all as large."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def step(z: Tensor, y: Tensor, there: Tensor) -> Tensor:
        return gen_supcon_loss(z, y, contrast_weight=there, backend="tiled")

    for n in (6, 7, 12):
        z, y = rows(n, D), hard(n)
        padded = torch.cat([z, torch.full((16 - n, D), NAN, dtype=z.dtype)]).requires_grad_()
        loss = step(padded, torch.nn.functional.pad(y, (0, 16 - n)), torch.arange(16) < n)
        z.requires_grad_()
        exact = gen_supcon_loss(z, y, backend="tiled")
        torch.testing.assert_close(loss, exact, rtol=0, atol=1e-10)
        grad = torch.autograd.grad(loss, padded)[0]
        torch.testing.assert_close(grad[:n], torch.autograd.grad(exact, z)[0], rtol=0, atol=1e-10)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("ignored", [None, 1])
def test_exported_for_batches_of_any_size(backend, ignored):
    class Loss(torch.nn.Module):
        def forward(self, z: Tensor, y: Tensor, there: Tensor) -> Tensor:
            weight = there if ignored is None else None
            return gen_supcon_loss(z, y, contrast_weight=weight, ignore_index=ignored, backend=backend)

    def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
        return rows(n, V, D), hard(n), torch.arange(n) % 3 > 0

    size = {0: torch.export.Dim("size", min=4, max=1000)}
    for strict in (False, True):
        program = torch.export.export(Loss(), batch(9), dynamic_shapes=(size, size, size), strict=strict)
        torch.testing.assert_close(program.module()(*batch(20)), Loss()(*batch(20)))


# ---- What they are for ----


def balanced(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """The balanced contrastive loss of Zhu et al., arXiv:2207.09052, as published: classes of a denominator average."""
    z = torch.nn.functional.normalize(z, dim=1)
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        logit = {j: z[i] @ z[j] / temperature for j in others}
        total = sum(sum(logit[j].exp() for j in others if y[j] == c) / (y == c).sum() for c in y.unique().tolist())
        positives = [j for j in others if y[j] == y[i]]
        losses.append(-sum(logit[j] - total.log() for j in positives) / max(1, len(positives)))
    return torch.stack([torch.as_tensor(x, dtype=z.dtype) for x in losses]).mean()


def test_the_balanced_contrastive_loss(backend):
    z, y = rows(20, D), torch.tensor([0] * 12 + [1] * 5 + [2] * 2 + [3])
    sizes = torch.zeros(4, dtype=torch.float64).index_add_(0, y, torch.ones(20, dtype=torch.float64))
    loss = run_loss(z, y, contrast_weight=1 / sizes[y], temperature=0.2, base_temperature=None, backend=backend)
    close(backend, loss, balanced(z, y, 0.2), 1e-8)


def test_the_log_q_correction(backend):
    """Sampled negatives over their probability: the mean over samples is the sum over everything."""
    generator = torch.Generator().manual_seed(0)
    query, items = rows(1, D), rows(50, D, seed=1)
    q = torch.rand(50, generator=generator, dtype=torch.float64) + 0.05
    q /= q.sum()
    logits = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(items).T / 0.5
    number = 4_000 if backend == "triton" else 40_000  # interpreted
    drawn = torch.multinomial(q, number, replacement=True, generator=generator)
    loss = run_loss(
        query,
        contrast_features=torch.cat([items[:1], items[drawn]]),
        contrast_weight=torch.cat([torch.zeros(1, dtype=q.dtype).fill_(1e-9), 1 / (len(drawn) * q[drawn])]),
        temperature=0.5,
        base_temperature=None,
        backend=backend,
    )
    close(backend, loss, logits.logsumexp(1)[0] - logits[0, 0], 0, 0.01 * (40_000 / number) ** 0.5)


# ---- Bad input ----

SOFT = {"labels": soft(N)}
SET = {"contrast_features": rows(M, D), "contrast_labels": hard(M)}
ONES = torch.ones(N)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"contrast_weight": -ONES}, ValueError, "^contrast_weight must be >= 0; the smallest entry is -1"),
        ({"contrast_weight": ONES * NAN}, ValueError, "^contrast_weight has NaN"),
        ({"contrast_weight": ONES / 0}, ValueError, "^contrast_weight has NaN or infinite"),
        ({"contrast_weight": ONES[1:]}, ValueError, r"^contrast_weight must be \(N,\) or \(N, V\) .*N = 6 and V = 1"),
        ({"contrast_weight": torch.ones(N, 2)}, ValueError, r"^contrast_weight must be .*got shape \(6, 2\)"),
        ({"contrast_weight": ONES, **SET}, ValueError, r"^contrast_weight must be \(9,\), one for each contrast; got"),
        (
            {"contrast_weight": torch.ones(M), **SET, "include_batch": True},
            ValueError,
            r"^contrast_weight must be \(15,\), one for each contrast, those of the batch first; got",
        ),
        ({"contrast_weight": 1e50 * ONES.double()}, ValueError, "^contrast_weight has entries .*too large .*float32"),
        ({"contrast_weight": 1e-50 * ONES.double()}, ValueError, "^contrast_weight has entries too small .*float32"),
        ({"contrast_weight": ONES.to("meta")}, ValueError, "^contrast_weight must be on the device"),
        ({"contrast_weight": ONES.clone().requires_grad_()}, ValueError, r"^contrast_weight gets no gradient.*detach"),
        ({"contrast_weight": [1.0] * N}, TypeError, "^contrast_weight must be a tensor; got list"),
        ({"contrast_weight": ONES.cfloat()}, TypeError, "^contrast_weight must be real"),
        ({"ignore_index": 0, **SOFT}, ValueError, "^ignore_index is a class number.* got label vectors"),
        (
            {"ignore_index": 0, "labels": None, "contrast_features": rows(N, D)},
            ValueError,
            "^ignore_index .* no labels",
        ),
        (
            {"ignore_index": 0, "labels": None, "label_similarity": torch.ones(N, N)},
            ValueError,
            "^ignore_index .* label_similarity",
        ),
        ({"ignore_index": 1.0}, TypeError, "^ignore_index must be an integer"),
        ({"ignore_index": True}, TypeError, "^ignore_index must be an integer.*bool"),
        (
            {"ignore_index": 2**63},
            ValueError,
            "^ignore_index must be in the range of torch.int64; got 9223372036854775808",
        ),
        ({"ignore_index": torch.tensor(1)}, TypeError, "^ignore_index must be an integer.*Tensor"),
    ],
)
def test_what_cannot_be_meant(options, error, message):
    with pytest.raises(error, match=message):
        gen_supcon_loss(rows(N, D).float(), **{"labels": hard(N), **options})


def test_the_module_keeps_ignore_index():
    criterion = GenSupConLoss(ignore_index=255)
    assert "ignore_index=255" in repr(criterion)
    y = torch.tensor([0, 1, 255, 0, 1, 255])
    torch.testing.assert_close(criterion(rows(N, D), y), gen_supcon_loss(rows(N, D), y, ignore_index=255))
    weight = weights(N)
    torch.testing.assert_close(
        criterion(rows(N, D), y, contrast_weight=weight),
        gen_supcon_loss(rows(N, D), y, ignore_index=255, contrast_weight=weight),
    )
    with pytest.raises(TypeError, match="^ignore_index"):
        GenSupConLoss(ignore_index="255")


# ---- Memory ----


@pytest.mark.parametrize("case", ["weights", "ignored", "memory", "memory and weights"])
def test_memory_grows_linearly(case):
    """A matrix would take 4 (many + few) bytes for each row that is added."""
    few, many, width = 2048, 6144, 32

    def peak(n: int) -> int:
        features, labels = torch.randn(n, width, requires_grad=True), torch.arange(n) % 20
        options: dict = {"backend": "tiled"}
        if "memory" in case:
            options |= {"contrast_features": torch.randn(n, width), "contrast_labels": labels, "include_batch": True}
        if "weights" in case:
            options["contrast_weight"] = torch.rand(2 * n if "memory" in case else n)
        if case == "ignored":
            options["ignore_index"] = 3
        return peak_bytes(features, labels, **options)

    assert (peak(many) - peak(few)) / (many - few) <= 16 * 4 * width * (2 if "memory" in case else 1)


@pytest.mark.exhaustive
def test_the_benchmark_runs():
    script = Path(__file__).parents[1] / "benchmarks" / "bench_sets.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("include_batch", "contrast_weight", "ignore_index"):
        assert re.search(rf"^{name} +\d.* ms, .* of the first \(.*\), \d+\.\d MB$", done.stdout, re.MULTILINE)
