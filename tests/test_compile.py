"""torch.compile without graph breaks or recompilation, and torch.export; by AOT eager, which needs no C++ compiler."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from genscl_loss import GenSupConLoss, gen_supcon_loss


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def labels_of(kind: str, n: int):
    soft = torch.softmax(torch.randn(n, 7), 1)
    return {"none": None, "hard": torch.arange(n) % 3, "soft": soft, "per view": (soft, soft.flip(0))}[kind]


@pytest.mark.strength(1)
@pytest.mark.parametrize("mode", ["all", "one", "first"])
@pytest.mark.parametrize("kind", ["none", "hard", "soft", "per view"])
@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_one_graph_serves_all_batch_sizes(backend, kind, mode):
    def loss(features, labels):
        return gen_supcon_loss(features, labels, contrast_mode=mode, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (10, 17, 40):
        features, labels = torch.randn(n, 2, 16, requires_grad=True), labels_of(kind, n)
        expected = loss(features, labels)
        value = compiled(features, labels)
        torch.testing.assert_close(value, expected)
        gradients = (torch.autograd.grad(x, features)[0] for x in (value, expected))
        torch.testing.assert_close(*gradients)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_every_tensor_argument_compiles(backend):
    torch.manual_seed(0)
    features, temperature = torch.randn(12, 2, 8, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    soft, queue = torch.softmax(torch.randn(12, 5), 1), torch.randn(30, 8)
    queue_labels = torch.softmax(torch.randn(30, 5), 1)

    def loss(features, temperature, weight):
        return gen_supcon_loss(
            features,
            soft,
            temperature=temperature,
            contrast_features=queue,
            contrast_labels=queue_labels,
            teacher_labels=soft.flip(0),
            contrast_teacher_labels=queue_labels.flip(0),
            teacher_weight=0.5,
            sample_weight=weight,
            empty_anchors="ignore",
            backend=backend,
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weight = torch.rand(12, requires_grad=True)
    results = []
    for function in (loss, compiled):
        value = function(features, temperature, weight)
        results.append((value, *torch.autograd.grad(value, (features, temperature, weight))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)


def test_label_similarity_compiles(backend):
    features, similarity = torch.randn(6, 2, 4), torch.rand(6, 6)

    def loss(features, similarity):
        return gen_supcon_loss(features, label_similarity=similarity, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, similarity), loss(features, similarity))


def test_the_module_with_a_learnable_temperature_compiles(backend):
    criterion = GenSupConLoss(backend=backend, learnable_temperature=True)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    features, labels = torch.randn(9, 2, 4), torch.arange(9) % 2
    with torch.no_grad():
        criterion.log_temperature.fill_(3.0)  # far outside; the forward pass moves it back
    value = compiled(features, labels)
    value.backward()
    torch.testing.assert_close(value, gen_supcon_loss(features, labels, temperature=torch.tensor(1.0)))
    assert criterion.log_temperature.item() == 0
    assert criterion.log_temperature.grad.isfinite()


def test_compiles_under_autocast(backend):
    def loss(features, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gen_supcon_loss(features, labels, backend=backend)

    features, labels = torch.randn(20, 2, 8), torch.softmax(torch.randn(20, 4), 1)
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(features, labels)
    torch.testing.assert_close(value, gen_supcon_loss(features, labels, backend=backend))


@pytest.mark.parametrize("kind", ["none", "hard", "soft"])
def test_exports_with_a_dynamic_batch(backend, kind):
    criterion = GenSupConLoss(backend=backend)
    features, labels = torch.randn(10, 2, 4), labels_of(kind, 10)
    batch = torch.export.Dim("batch", min=4, max=1000)
    shapes = {"features": {0: batch}, "labels": None if labels is None else {0: batch}}
    program = torch.export.export(criterion, (features, labels), dynamic_shapes=shapes)
    features, labels = torch.randn(33, 2, 4), labels_of(kind, 33)
    torch.testing.assert_close(program.module()(features, labels), criterion(features, labels))
