"""Settings of torch that hold for a whole program: the loss and its gradients are those without them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from genscl_loss import FeatureQueue, GenSupConLoss, gen_supcon_loss, mixup_cutmix, smooth_labels, teacher_labels
from genscl_loss._backends import float32_precision

N, D, C = 40, 16, 5
HAS_NEW_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set one, and put back what was there."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def called(setter: Callable[[Any], None], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings(action="error"), called(torch.set_warn_always, True, False):
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "deterministic algorithms": lambda: called(torch.use_deterministic_algorithms, True, False),
    "default dtype float64": lambda: called(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: called(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: torch.device("meta"),
    "anomaly mode": torch.autograd.detect_anomaly,
    "warnings as errors": warnings_as_errors,
    "one thread": lambda: called(torch.set_num_threads, 1, torch.get_num_threads()),
    "flush denormals": lambda: called(torch.set_flush_denormal, True, False),
    "no oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "precision high": lambda: called(torch.set_float32_matmul_precision, "high", "highest"),
    "allow tf32": lambda: attribute(torch.backends.cuda.matmul, "allow_tf32", True),
    "cudnn allow tf32": lambda: attribute(torch.backends.cudnn, "allow_tf32", False),
}
if HAS_NEW_PRECISION:
    NEW = {
        "generic": (torch.backends, "tf32"),
        "cuda": (torch.backends.cuda.matmul, "tf32"),
        "cuda ieee": (torch.backends.cuda.matmul, "ieee"),
        "mkldnn": (torch.backends.mkldnn, "tf32"),
        "mkldnn matmul": (torch.backends.mkldnn.matmul, "tf32"),
        "cudnn conv": (torch.backends.cudnn.conv, "tf32"),
    }
    for name, (owner, value) in NEW.items():
        SETTINGS[f"precision of {name}"] = lambda owner=owner, value=value: attribute(owner, "fp32_precision", value)


def calls() -> dict[str, dict[str, Any]]:
    numbers = torch.Generator(device="cpu").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers, device="cpu", dtype=torch.float32)

    features, soft, classes = randn(N, D), randn(N, C).softmax(1), torch.arange(N, device="cpu") % C
    queue = {"contrast_features": randn(30, D), "contrast_labels": torch.arange(30, device="cpu") % C}
    return {
        "hard": {"features": features, "labels": classes},
        "soft": {"features": features, "labels": soft, "teacher_labels": randn(N, C).softmax(1)},
        "none": {"features": features.view(N // 2, 2, D)},
        "similarity": {"features": features, "label_similarity": randn(N, N).exp()},
        "queue": {"features": features, "labels": classes, **queue},
        "weights": {"features": features, "labels": soft, "sample_weight": randn(N).exp(), "empty_anchors": "ignore"},
        "half": {"features": features.half(), "labels": classes},
        "double": {"features": features.double(), "labels": soft.double()},
        "learnable": {"features": features, "labels": classes, "temperature": randn(1)[0].exp().requires_grad_()},
        "empty": {"features": features[:0], "labels": classes[:0]},
    }


def value_and_gradients(call: dict[str, Any], backend: str) -> list[Tensor]:
    call = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in call.items()}
    leaves = [
        value.requires_grad_() for value in (call["features"], call.get("temperature")) if isinstance(value, Tensor)
    ]
    loss = gen_supcon_loss(**call, backend=backend)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backend", ["dense", "tiled", "auto"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")  # of switching oneDNN on again
def test_values_and_gradients_do_not_change(setting, backend):
    expected = {name: value_and_gradients(call, backend) for name, call in calls().items()}
    with SETTINGS[setting]():
        found = {name: value_and_gradients(call, backend) for name, call in calls().items()}
    for name, wanted in expected.items():
        assert [x.dtype for x in found[name]] == [x.dtype for x in wanted], name
        # tf32 and bfloat16 are torch's to use where it was told that they may be: then these digits are its
        torch.testing.assert_close(
            found[name], wanted, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")  # of switching oneDNN on again
def test_what_is_around_the_loss_works_too(setting):
    numbers = torch.Generator(device="cpu").manual_seed(0)
    images, classes = torch.rand(8, 3, 4, 4, device="cpu", dtype=torch.float32), torch.arange(8, device="cpu") % C
    with SETTINGS[setting]():
        mixed, soft = mixup_cutmix(images, classes, C, generator=numbers)
        assert mixed.dtype == soft.dtype == smooth_labels(classes, C).dtype == torch.float32
        assert teacher_labels(soft.log()).dtype == torch.float32
        criterion = GenSupConLoss(learnable_temperature=True)
        repr(criterion)
    queue = FeatureQueue(6, 3 * 4 * 4)
    with SETTINGS[setting]():
        queue.enqueue(images.flatten(1), classes)
        assert queue.features.dtype == torch.float32


@pytest.mark.parametrize("backend", ["dense", "tiled", "auto"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(mode, backend):
    expected = {name: value_and_gradients(call, backend)[0] for name, call in calls().items()}
    with mode():
        for name, call in calls().items():
            loss = gen_supcon_loss(**call, backend=backend)
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not HAS_NEW_PRECISION, reason="torch 2.9 has a precision for each library")
@pytest.mark.parametrize("first", ["old", "new"])
def test_precision_is_read_whichever_way_it_was_set(first):
    old = called(torch.set_float32_matmul_precision, "high", "highest")
    new = attribute(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    with old if first == "old" else new:
        assert float32_precision("cuda") == "high"
    assert float32_precision("cuda") == float32_precision("cpu") == float32_precision("mps") == "highest"
    unset = [
        attribute(library.matmul, "fp32_precision", "none") for library in (torch.backends.cuda, torch.backends.mkldnn)
    ]
    with unset[0], unset[1], attribute(torch.backends, "fp32_precision", "tf32"):  # which the old way may have set
        assert float32_precision("cuda") == float32_precision("cpu") == "high"
    with attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"):
        assert (float32_precision("cpu"), float32_precision("cuda")) == ("medium", "highest")
    with called(torch.set_float32_matmul_precision, "medium", "highest"):
        assert float32_precision("cpu") == "medium"


@pytest.mark.skipif(not HAS_NEW_PRECISION, reason="torch 2.9 has a precision for each library")
def test_large_batches_work_with_the_new_way_to_set_precision():
    features, labels = torch.randn(600, 8), torch.arange(600) % 4  # more than "dense" is taken for
    expected = gen_supcon_loss(features, labels)
    with attribute(torch.backends.cuda.matmul, "fp32_precision", "tf32"):
        torch.testing.assert_close(gen_supcon_loss(features, labels), expected)
        compiled = torch.compile(gen_supcon_loss, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(features, labels), expected)
