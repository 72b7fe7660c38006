"""The module holds options and delegates: same names, same defaults, same values as the function."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from strategies import random_features, soft_rows

from genscl_loss import GenSupConLoss, gen_supcon_loss

N, V, D, C = 8, 2, 6, 4
FEATURES = random_features(N, V, D, seed=0).float()
LABELS = torch.arange(N) % 3
SOFT = soft_rows(N, C, seed=1).float()


def parameters_of(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_the_module_has_the_options_of_the_function_with_the_same_defaults():
    function, module = parameters_of(gen_supcon_loss), parameters_of(GenSupConLoss)
    for name, parameter in module.items():
        if name != "learnable_temperature":
            assert parameter.default == function[name].default, name
    tensors = {
        "features",
        "labels",
        "label_similarity",
        "contrast_features",
        "contrast_labels",
        "teacher_labels",
        "contrast_teacher_labels",
        "sample_weight",
        "contrast_weight",
    }
    refused = {"more", "unknown"}
    assert set(module) - {"learnable_temperature"} == set(function) - tensors - refused
    assert set(parameters_of(GenSupConLoss.forward)) - {"self"} == tensors | refused
    assert module["learnable_temperature"].default is False


def test_the_positional_order_is_the_one_of_the_older_codes():
    positional = [
        name
        for name, parameter in parameters_of(GenSupConLoss).items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == ["temperature", "contrast_mode", "base_temperature"]


def test_every_option_reaches_the_function(backend):
    options = {
        "temperature": 0.2,
        "contrast_mode": "first",
        "base_temperature": None,
        "teacher_weight": 0.3,
        "empty_anchors": "ignore",
        "normalize": False,
        "reduction": "none",
        "backend": backend,
    }
    tensors = {"teacher_labels": SOFT, "sample_weight": torch.rand(N)}
    actual = GenSupConLoss(**options)(FEATURES, LABELS, **tensors)
    assert torch.equal(actual, gen_supcon_loss(FEATURES, LABELS, **tensors, **options))
    # and each of them matters: with one option at its default the value is another one
    for name in set(options) - {"backend", "empty_anchors", "contrast_mode", "reduction"}:
        changed = {key: value for key, value in options.items() if key != name}
        assert not torch.equal(gen_supcon_loss(FEATURES, LABELS, **tensors, **changed), actual), name


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"labels": LABELS},
        {"labels": (SOFT, SOFT.flip(0))},
        {"label_similarity": torch.rand(N, N)},
        {"contrast_features": FEATURES[:, 0]},
        {"labels": LABELS, "contrast_features": FEATURES[:5, 1], "contrast_labels": LABELS[:5]},
        {"labels": SOFT, "teacher_labels": SOFT.flip(0), "sample_weight": torch.rand(N)},
        {
            "labels": SOFT,
            "contrast_features": FEATURES[:5, 1],
            "contrast_labels": SOFT[:5],
            "teacher_labels": SOFT,
            "contrast_teacher_labels": SOFT[:5],
        },
    ],
)
def test_every_tensor_reaches_the_function(tensors):
    assert torch.equal(GenSupConLoss()(FEATURES, **tensors), gen_supcon_loss(FEATURES, **tensors))


def test_labels_may_be_positional():
    assert torch.equal(GenSupConLoss()(FEATURES, LABELS), gen_supcon_loss(FEATURES, LABELS))


def test_an_unknown_tensor_argument_is_refused():
    with pytest.raises(TypeError, match="mask"):
        GenSupConLoss()(FEATURES, mask=torch.ones(N, N))
    with pytest.raises(TypeError):
        GenSupConLoss()(FEATURES, LABELS, torch.ones(N, N))


def test_options_cannot_be_slipped_in_per_call():
    with pytest.raises(TypeError):
        GenSupConLoss()(FEATURES, LABELS, temperature=0.5)


def test_the_repr_shows_the_options():
    text = repr(GenSupConLoss(0.1, "first", None, reduction="sum", backend="dense"))
    assert text.startswith("GenSupConLoss(")
    for part in ("temperature=0.1", "first", "base_temperature=None", "sum", "dense"):
        assert part in text
    learnable = GenSupConLoss(0.1, learnable_temperature=True)
    assert "learnable_temperature=True" in learnable.extra_repr()


def test_without_a_learnable_temperature_the_module_is_empty():
    loss = GenSupConLoss()
    assert list(loss.parameters()) == []
    assert dict(loss.state_dict()) == {}
    assert loss.temperature == pytest.approx(0.07)


# --- a learnable temperature ---------------------------------------------------------------------------------------


def test_the_learnable_temperature_starts_where_it_was_put():
    for tau in (0.01, 0.07, 0.5, 1.0):
        loss = GenSupConLoss(tau, learnable_temperature=True)
        assert [name for name, _ in loss.named_parameters()] == ["log_temperature"]
        assert loss.log_temperature.dim() == 0
        assert loss.temperature.item() == pytest.approx(tau, rel=1e-6)


@pytest.mark.parametrize("base", [None, 0.07])
def test_the_learnable_temperature_gets_the_gradient_of_the_function(backend, base):
    loss = GenSupConLoss(0.2, base_temperature=base, learnable_temperature=True, backend=backend)
    value = loss(FEATURES, LABELS)
    value.backward()
    tau = torch.tensor(0.2, requires_grad=True)
    expected = gen_supcon_loss(FEATURES, LABELS, temperature=tau, base_temperature=base, backend=backend)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    # tau = exp(log tau), so d/d(log tau) = tau * d/d(tau)
    assert loss.log_temperature.grad.item() == pytest.approx(0.2 * tau.grad.item(), rel=1e-4)


@pytest.mark.strength(1)
@pytest.mark.parametrize(("perfect", "seed"), [(True, None), (False, 0), (False, 1)])
def test_steps_of_adam_keep_the_temperature_in_range(backend, perfect, seed):
    # perfectly separated features pull tau down to its bound, random ones push it up
    features = (
        torch.eye(8)[LABELS].repeat(2, 1, 1).transpose(0, 1) if perfect else random_features(N, V, D, seed).float()
    )
    loss = GenSupConLoss(learnable_temperature=True, backend=backend)
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-2)
    for _ in range(20 if backend == "triton" else 200):  # interpreted
        optimizer.zero_grad()
        value = loss(features, LABELS)
        value.backward()
        optimizer.step()
        assert value.isfinite()
        assert 0.01 * (1 - 1e-6) <= loss.temperature.item() <= 1.0 * (1 + 1e-6)
    # the pull is e^(-1/tau): below tau = .06 the rounding of a log-sum-exp may outweigh it
    assert loss.temperature.item() < 0.07 if perfect else loss.temperature.item() > 0.07


def test_the_temperature_returns_from_its_bound():
    # a plain clamp has no gradient beyond the bound: one step too far, and the parameter would be stuck for good
    loss = GenSupConLoss(0.07, learnable_temperature=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-2)
    separated = torch.eye(8)[LABELS].repeat(2, 1, 1).transpose(0, 1)
    for features, steps in ((separated, 200), (random_features(N, V, D, seed=3).float(), 400)):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(features, LABELS).backward()
            optimizer.step()
    assert loss.temperature.item() > 0.05


def test_two_batches_may_share_one_backward(backend):
    # gradient accumulation: keeping the parameter in its range must not invalidate the first graph
    loss = GenSupConLoss(1.0, learnable_temperature=True, backend=backend)
    (loss(FEATURES, LABELS) + loss(FEATURES.flip(0), LABELS)).backward()
    together = loss.log_temperature.grad.clone()
    loss.log_temperature.grad = None
    loss(FEATURES, LABELS).backward()
    loss(FEATURES.flip(0), LABELS).backward()
    torch.testing.assert_close(together, loss.log_temperature.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("far", [-100.0, 100.0])
@pytest.mark.parametrize("training", [True, False])
def test_a_parameter_out_of_range_never_reaches_the_loss(far, training):
    # one wild optimiser step, or a foreign checkpoint
    loss = GenSupConLoss(learnable_temperature=True).train(training)
    with torch.no_grad():
        loss.log_temperature.fill_(far)
    bound = 0.01 if far < 0 else 1.0
    value = loss(FEATURES, LABELS)
    assert value.item() == pytest.approx(gen_supcon_loss(FEATURES, LABELS, temperature=bound).item(), rel=1e-5)
    assert loss.temperature.item() == pytest.approx(bound, rel=1e-6)


def test_the_state_dict_round_trip_restores_value_and_optimiser_target():
    loss = GenSupConLoss(0.3, learnable_temperature=True)
    state = loss.state_dict()
    assert list(state) == ["log_temperature"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = GenSupConLoss(0.07, learnable_temperature=True)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.temperature.item() == pytest.approx(0.3, rel=1e-6)
    assert torch.equal(other(FEATURES, LABELS), loss(FEATURES, LABELS))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(how, learnable):
    loss = GenSupConLoss(0.2, "first", None, reduction="sum", learnable_temperature=learnable)
    other = copy.deepcopy(loss) if how == "deepcopy" else pickle.loads(pickle.dumps(loss))
    assert repr(other) == repr(loss)
    assert torch.equal(other(FEATURES, LABELS), loss(FEATURES, LABELS))
    if learnable:
        with torch.no_grad():
            other.log_temperature.add_(0.5)
        assert loss.temperature.item() == pytest.approx(0.2, rel=1e-6)


def test_the_module_moves_to_float64():
    loss = GenSupConLoss(0.2, learnable_temperature=True).double()
    value = loss(FEATURES.double(), LABELS)
    assert value.dtype == torch.float64
    value.backward()
    assert loss.log_temperature.grad.dtype == torch.float64


def test_a_half_precision_module_still_works():
    # model.half() casts the loss as well when it is a submodule
    loss = GenSupConLoss(0.2, learnable_temperature=True).bfloat16()
    value = loss(FEATURES.bfloat16(), LABELS)
    assert value.dtype == torch.float32
    assert value.isfinite()


def test_training_mode_does_not_matter():
    loss = GenSupConLoss()
    assert torch.equal(loss.train()(FEATURES, LABELS), loss.eval()(FEATURES, LABELS))


def test_the_temperature_can_be_scheduled():
    criterion = GenSupConLoss(temperature=0.5)
    criterion.temperature = 0.1
    features, labels = torch.randn(6, 4), torch.arange(6) % 2
    torch.testing.assert_close(criterion(features, labels), gen_supcon_loss(features, labels, temperature=0.1))
    with pytest.raises(ValueError, match="^temperature must be finite and > 0"):
        criterion.temperature = -1.0
    with pytest.raises(TypeError, match="^temperature must be a number; for a parameter pass learnable_temperature"):
        GenSupConLoss(temperature=torch.nn.Parameter(torch.tensor(0.1)))
    with pytest.raises(AttributeError, match="^temperature is learnable"):
        GenSupConLoss(learnable_temperature=True).temperature = 0.1


def test_the_module_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        criterion = GenSupConLoss(learnable_temperature=True)
    assert criterion.log_temperature.is_meta


def test_a_subclass_may_have_a_forward_of_its_own():
    class TwoViews(GenSupConLoss):
        def forward(self, query, key, classes):
            return super().forward((query, key), classes)

    q, k, classes = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 2
    expected = gen_supcon_loss((q, k), classes, temperature=0.1)
    torch.testing.assert_close(TwoViews(temperature=0.1)(q, k, classes), expected)


def test_a_learnable_temperature_can_be_made_without_memory():
    with torch.device("meta"):
        criterion = GenSupConLoss(0.2, learnable_temperature=True)
    assert "temperature=?" in repr(criterion)
    criterion.to_empty(device="cpu").reset_parameters()
    assert criterion.temperature.item() == pytest.approx(0.2)
    GenSupConLoss(0.2).reset_parameters()  # nothing to do


def test_all_processes_can_be_named_before_there_are_any():
    criterion = copy.deepcopy(GenSupConLoss(group="world"))
    assert pickle.loads(pickle.dumps(criterion)).group == "world"
    assert "group='world'" in repr(criterion)
    with pytest.raises(ValueError, match="^group.*init_process_group"):
        criterion(FEATURES, LABELS)
