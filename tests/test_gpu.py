"""What a GPU does beside computing, for every kind of labels: waiting, graphs, streams, compiling, the same bits.

`test_triton.py` has what the kernels compute. What does not need a GPU runs in Triton's interpreter too.
"""

from __future__ import annotations

import os

import pytest
import torch

from genscl_loss import GenSupConLoss, available_backends, gen_supcon_loss

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
if "triton" not in available_backends():
    pytest.skip('needs backend "triton"', allow_module_level=True)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
N, REPEATS = (700, 30) if ON_GPU else (70, 2)
KINDS = ["none", "hard", "soft", "teacher"]


def problem(kind: str, seed: int = 0):
    """Features of a batch, a leaf, and the labels' part of the arguments."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N // 2, 2, 64) if kind == "none" else (N, 64)
    features = torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()
    soft = torch.softmax(3 * torch.randn(N, 7, generator=generator), 1).to(DEVICE)
    labels = {"none": {}, "hard": {"labels": soft.argmax(1)}, "soft": {"labels": soft}}
    return features, labels.get(kind, {"labels": soft, "teacher_labels": soft.flip(1)})


def step(criterion, features, labels) -> torch.Tensor:
    features.grad = None
    loss = criterion(features, **labels)
    loss.backward()
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind):
    features, labels = problem(kind)
    criterion = GenSupConLoss(backend="triton")
    first = step(criterion, features, labels).detach(), features.grad
    for _ in range(REPEATS - 1):
        assert torch.equal(step(criterion, features, labels), first[0])
        assert torch.equal(features.grad, first[1])


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_algorithms_are_all_there_are(kind, monkeypatch):
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        features, labels = problem(kind)
        assert step(GenSupConLoss(backend="triton"), features, labels).isfinite()
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_never_waits(kind, learnable):
    criterion = GenSupConLoss(learnable_temperature=learnable, backend="triton").to(DEVICE)
    features, labels = problem(kind)
    step(criterion, features, labels)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(criterion, features, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "tiled", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_captured_in_a_graph(kind, backend):
    if backend == "tiled" and kind != "none":
        pytest.skip("sums over classes wait on this backend where they are short")
    criterion = GenSupConLoss(backend=backend).to(DEVICE)
    features, labels = problem(kind)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(criterion, features, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(criterion, features, labels)
    other, _ = problem(kind, seed=1)
    with torch.no_grad():
        features.copy_(other)
    graph.replay()
    torch.testing.assert_close(loss, step(criterion, other, labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(features.grad, other.grad, rtol=1e-5, atol=1e-8)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_another_stream_gives_the_same(kind):
    features, labels = problem(kind)
    criterion = GenSupConLoss(backend="triton")
    expected = step(criterion, features, labels).detach(), features.grad
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss = step(criterion, features, labels)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(loss, expected[0])
    assert torch.equal(features.grad, expected[1])


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing_on_the_device(kind):
    features, labels = problem(kind)
    criterion = GenSupConLoss(backend="triton")
    expected = step(criterion, features, labels).detach(), features.grad
    with torch.autocast("cuda", torch.bfloat16):
        loss = criterion(features, **labels)
    features.grad = None
    loss.backward()
    assert torch.equal(loss, expected[0])
    assert torch.equal(features.grad, expected[1])


@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", ["none", "hard", "soft"])
def test_inductor_compiles_it_and_makes_a_graph_of_it(kind, mode):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    criterion = GenSupConLoss(backend="triton").to(DEVICE)
    compiled = torch.compile(criterion, mode=mode, fullgraph=True)
    for seed in range(3):
        features, labels = problem(kind, seed)
        loss = step(compiled, features, labels).clone()
        gradient = features.grad.clone()
        torch.testing.assert_close(loss, step(criterion, features, labels), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, features.grad, rtol=1e-4, atol=1e-7)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@needs_gpu
@pytest.mark.parametrize("n", [2, 700, 5000])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_that_of_float64_on_matrices(kind, n):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(n, 128, generator=generator).to(DEVICE)
    soft = torch.softmax(3 * torch.randn(n, 10, generator=generator), 1).to(DEVICE)
    labels = soft if kind == "soft" else soft.argmax(1)
    ours, exact = features.clone().requires_grad_(), features.double().requires_grad_()
    loss = gen_supcon_loss(ours, labels, backend="triton")
    right = gen_supcon_loss(exact, labels.double() if kind == "soft" else labels, backend="dense")
    loss.backward()
    right.backward()
    torch.testing.assert_close(loss.double(), right, rtol=2e-6, atol=1e-7)
    assert (ours.grad - exact.grad).norm() <= 1e-5 * exact.grad.norm()
