"""The tiled backend stores nothing of size N x N, between the passes or within one, and its memory grows linearly."""

from __future__ import annotations

import pytest
import torch

from genscl_loss import gen_supcon_loss
from genscl_loss._backends import choice
from genscl_loss._backends.tiled import TILE

D, C = 32, 20


def make(n: int, kind: str):
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, D, generator=generator, requires_grad=True)
    soft = torch.softmax(3 * torch.randn(n, C, generator=generator), 1)
    return features, {"hard": soft.argmax(1), "soft": soft}[kind]


def peak_bytes(features, labels, backend: str, **options) -> int:
    """Highest sum of allocations minus frees over a forward and a backward pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(gen_supcon_loss(features, labels, backend=backend, **options), features)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_forward_pass_saves_no_matrix(kind):
    n = 1200
    features, labels = make(n, kind)

    def largest_saved(backend: str) -> int:
        sizes = []

        def see(tensor):
            sizes.append(tensor.untyped_storage().size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            gen_supcon_loss(features, labels, backend=backend)
        return max(sizes)

    matrix = 4 * n * n
    assert largest_saved("dense") >= matrix  # the hook sees what there is to see
    assert largest_saved("tiled") <= 8 * n * (D + C)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_no_matrix_exists_at_any_time(kind):
    n = 3000
    features, labels = make(n, kind)
    matrix = 4 * n * n
    assert peak_bytes(features, labels, "dense") > 2 * matrix
    assert peak_bytes(features, labels, "tiled") < matrix / 3


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_memory_grows_linearly(kind):
    few, many = 4096, 16384
    per_row = (peak_bytes(*make(many, kind), "tiled") - peak_bytes(*make(few, kind), "tiled")) / (many - few)
    assert per_row <= 16 * 4 * (D + C)  # sixteen rows of features and labels; a matrix would take 4 (many + few) bytes


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_dense_equation_holds_three_matrices_and_a_part(kind):
    """Weights, logarithms of probabilities and the gradient: what the choice of a backend counts on."""
    n = 3072
    assert peak_bytes(*make(n, kind), "dense") <= choice._MATRICES / 2 * 4 * n * n


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_three_arrays_of_the_size_of_the_features_are_enough(kind):
    """Rows, rows times the scale, and their gradient; then the gradients of rows and of features."""
    n, d, c = 16384, 128, 100
    features = torch.randn(n, d, requires_grad=True)
    soft = torch.softmax(torch.randn(n, c), 1)
    labels = soft.argmax(1) if kind == "hard" else soft
    tiles = 5 * 4 * TILE**2
    assert peak_bytes(features, labels, "auto") <= 3 * 4 * n * d + tiles


@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("n", [512, 2048])
def test_many_classes_take_one_copy_of_their_labels_and_two_parts_of_it(n, backend):
    """A part is 256 rows in float64, however wide."""
    d, c = 64, 20_000
    labels = torch.rand(n, c, generator=torch.Generator().manual_seed(n)).pow_(8)
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert peak_bytes(features, labels, backend) <= 4 * n * (c + 4 * d) + 2 * 8 * 256 * c


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_million_contrasts_take_two_copies_at_most(kind):
    m, d, c = 10**6, 16, 10
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, d, generator=generator, requires_grad=True)
    soft = torch.rand(64 + m, c, generator=generator)
    labels = soft.argmax(1) if kind == "hard" else soft
    contrasts = {"contrast_features": torch.randn(m, d, generator=generator), "contrast_labels": labels[64:]}
    rows = 4 * m * (d if kind == "hard" else d + c)
    assert peak_bytes(features, labels[:64], "auto", **contrasts) <= 2 * rows


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_few_anchors_copy_no_set(kind):
    """Logits are multiplied by what makes rows, and label vectors, of the set unit ones."""
    m, d, c = 10**5, 128, 64
    features, others = torch.randn(4, d, requires_grad=True), torch.randn(m, d)
    soft = torch.rand(4 + m, c)
    labels = soft.argmax(1) if kind == "hard" else soft
    peak = peak_bytes(features, labels[:4], "auto", contrast_features=others, contrast_labels=labels[4:])
    assert peak < 4 * m * min(c, d) / 2
