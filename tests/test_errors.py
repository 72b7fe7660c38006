"""Wrong input: every mistake raises, and the message begins with the argument's name and says what was wrong."""

from __future__ import annotations

import inspect
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

import genscl_loss
from genscl_loss import GenSupConLoss, collapsed_loss, gen_supcon_loss

N, V, D, C = 4, 2, 3, 5
F = torch.linspace(-1.0, 1.0, N * V * D).sin().reshape(N, V, D)  # fixed, without equal rows
ONE = F[:, 0]
HARD = torch.tensor([0, 0, 1, 1])
SOFT = torch.full((N, C), 0.2)
W = torch.ones(N, N)
PROJECTION = torch.linspace(-1, 1, N * C).reshape(N, C).requires_grad_()
KEYS = torch.linspace(0.5, 2.0, 6 * D).cos().reshape(6, D)
PAIRS = KEYS[:4]
PAIRED = {"labels": SOFT, "contrast_features": PAIRS, "contrast_labels": SOFT}
HARD_PAIRED = {"labels": HARD, "contrast_features": PAIRS, "contrast_labels": HARD}
NAN, INF = float("nan"), float("inf")
with warnings.catch_warnings(action="ignore"):  # torch says that nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([ONE, ONE[:2]])
SMALL = torch.tensor(1e-39)
EITHER = (TypeError, ValueError)  # where the contract leaves the type open


def spoil(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy with one bad entry, away from the corner and off the diagonal."""
    tensor = tensor.clone()
    tensor.view(-1)[-2] = value
    return tensor


# (id, features, options, exception, regex of the message)
TABLE = [
    # features
    ("features a numpy array", F.numpy(), {}, TypeError, "^features"),
    ("features a nested list", F.tolist(), {}, TypeError, "^features"),
    ("features None", None, {"labels": HARD}, TypeError, "^features"),
    ("features a number", 3.0, {"labels": HARD}, TypeError, "^features"),
    ("features int64", ONE.long(), {"labels": HARD}, TypeError, "^features.*int64"),
    ("features bool", ONE > 0, {"labels": HARD}, TypeError, "^features.*bool"),
    ("features complex", ONE.cfloat(), {"labels": HARD}, TypeError, "^features.*complex64"),
    ("features 0-dim", torch.tensor(1.0), {"labels": HARD}, ValueError, "^features"),
    ("features 1-D", torch.ones(N), {"labels": HARD}, ValueError, r"^features.*\(4,\)"),
    ("features a nested tensor", NESTED, {"labels": HARD[:2]}, TypeError, r"^features must be dense.*unbind\(\)"),
    ("features a pooled map", torch.ones(N, 32, 1, 1), {"labels": HARD}, ValueError, r"^features .*flatten\(1\)"),
    ("features a pooled signal", torch.ones(N, 32, 1), {"labels": HARD}, ValueError, r"^features .*flatten\(1\)"),
    ("features a pooled map, no labels", torch.ones(N, 32, 1, 1), {}, ValueError, r"^features .*flatten\(1\)"),
    ("features without views", torch.ones(N, 0, D), {"labels": HARD}, ValueError, "^features"),
    ("features without columns", torch.ones(N, 0), {"labels": HARD}, ValueError, "^features"),
    ("features an empty tuple", (), {"labels": HARD}, ValueError, "^features"),
    ("features a tuple with an array", (ONE, ONE.numpy()), {}, TypeError, "^features"),
    ("features a tuple of unequal N", (ONE, ONE[:3]), {}, ValueError, "^features"),
    ("features a tuple of unequal D", (ONE, ONE[:, :2]), {}, ValueError, "^features"),
    ("features a tuple of 3-D tensors", (F, F), {}, ValueError, "^features"),
    ("features a tuple of 1-D tensors", (ONE[0], ONE[1]), {}, ValueError, "^features"),
    ("features a tuple on two devices", (ONE, ONE.to("meta")), {}, EITHER, "^features"),
    # labels
    ("labels missing, one view", ONE, {}, ValueError, "^labels"),
    ("labels missing, one view in a tensor", F[:, :1], {}, ValueError, "^labels"),
    ("labels missing, one view in a tuple", (ONE,), {}, ValueError, "^labels"),
    ("labels a list of numbers", ONE, {"labels": [0, 0, 1, 1]}, TypeError, "^labels"),
    ("labels a numpy array", ONE, {"labels": HARD.numpy()}, TypeError, "^labels"),
    ("labels a list of arrays", F, {"labels": [HARD.numpy(), HARD.numpy()]}, TypeError, "^labels"),
    ("labels a string", ONE, {"labels": "cat"}, TypeError, "^labels"),
    ("labels complex", ONE, {"labels": SOFT.cfloat()}, TypeError, "^labels"),
    ("labels 0-dim", ONE, {"labels": torch.tensor(1)}, ValueError, "^labels"),
    ("labels too few", ONE, {"labels": HARD[:3]}, ValueError, "^labels.*4.*3|^labels.*3.*4"),
    ("labels too many rows", ONE, {"labels": torch.ones(5, C)}, ValueError, "^labels"),
    ("labels one per view and sample", F, {"labels": HARD.repeat(2)}, ValueError, "^labels"),
    ("labels flattened by a mix builder", ONE, {"labels": torch.ones(N * C, C)}, ValueError, "^labels"),
    ("labels (N, V, C), wrong V", F, {"labels": torch.ones(N, 3, C)}, ValueError, "^labels"),
    ("labels (N, V, C), wrong N", F, {"labels": torch.ones(3, V, C)}, ValueError, "^labels"),
    ("labels 4-D", F, {"labels": torch.ones(N, V, C, 1)}, ValueError, "^labels"),
    ("labels without classes", ONE, {"labels": torch.ones(N, 0)}, ValueError, "^labels"),
    ("labels of too few views", F, {"labels": [HARD]}, ValueError, "^labels"),
    ("labels of too many views", F, {"labels": [HARD] * 3}, ValueError, "^labels"),
    ("labels of views, unequal class counts", F, {"labels": [SOFT, SOFT[:, :3]]}, ValueError, "^labels"),
    ("labels of views, unequal N", F, {"labels": [HARD, HARD[:3]]}, ValueError, "^labels"),
    ("labels of views, hard and soft", F, {"labels": [HARD, SOFT]}, EITHER, "^labels"),
    ("labels of views, 3-D", F, {"labels": [SOFT[:, None], SOFT[:, None]]}, ValueError, "^labels"),
    ("labels NaN", ONE, {"labels": spoil(SOFT, NAN)}, ValueError, "^labels"),
    ("labels NaN, 1-D", ONE, {"labels": spoil(HARD.float(), NAN)}, ValueError, "^labels"),
    ("labels inf", ONE, {"labels": spoil(SOFT, INF)}, ValueError, "^labels"),
    ("labels logits", ONE, {"labels": spoil(SOFT, -0.3)}, ValueError, "^labels.*(negative|>= 0|non-negative)"),
    ("labels logits, per view", F, {"labels": [SOFT, spoil(SOFT, -0.3)]}, ValueError, "^labels"),
    ("labels logits, (N, V, C)", F, {"labels": spoil(torch.ones(N, V, C), -2.0)}, ValueError, "^labels"),
    ("labels NaN, (N, V, C)", F, {"labels": spoil(torch.ones(N, V, C), NAN)}, ValueError, "^labels"),
    ("labels NaN, per view", F, {"labels": [SOFT, spoil(SOFT, NAN)]}, ValueError, "^labels"),
    ("labels negative int rows", ONE, {"labels": spoil(torch.ones(N, C).long(), -1)}, ValueError, "^labels"),
    ("labels a column", ONE, {"labels": HARD[:, None]}, ValueError, r"^labels of shape \(4, 1\).*squeeze\(-1\).*pad"),
    ("labels a float column", ONE, {"labels": HARD[:, None].float()}, ValueError, r"^labels.*squeeze\(-1\)"),
    ("labels a column, per view", F, {"labels": torch.ones(N, V, 1)}, ValueError, r"^labels.*squeeze\(-1\)"),
    ("labels columns of views", F, {"labels": [torch.ones(N, 1)] * V}, ValueError, r"^labels.*squeeze\(-1\)"),
    ("labels of views in integers", F, {"labels": torch.eye(N).long()[:, :V]}, ValueError, r"^labels.*unbind\(1\)"),
    ("labels of views in bools", F, {"labels": torch.eye(N)[:, :V] > 0}, ValueError, r"^labels.*unbind.*float\(\)"),
    ("labels of pixels", ONE, {"labels": torch.ones(N, 3, 3).long()}, ValueError, r"^labels.*flatten\(\).*float\(\)"),
    ("labels of views and classes", F, {"labels": torch.ones(N, V, C).long()}, ValueError, r"^labels.*float\(\)"),
    ("labels of levels", ONE, {"labels": torch.tensor([[0, 1, 5]] * N)}, ValueError, "^labels.*0 or 1.*5.*one_hot"),
    ("labels a second view", ONE, {"labels": ONE.abs()}, ValueError, r"^labels.*\[view0, view1\].*\[labels\]"),
    ("labels a projection", ONE, {"labels": PROJECTION}, ValueError, r"^labels.*embeddings.*\[view0, view1\]"),
    ("labels -100 in vectors", ONE, {"labels": torch.full((N, C), -100)}, ValueError, "^labels.*-100.*leave such rows"),
    ("labels a list of strings", ONE, {"labels": ["a", "b", "a", "b"]}, TypeError, "^labels.*strings.*numpy.unique"),
    ("labels an array of strings", ONE, {"labels": np.array(["a", "b"])}, TypeError, "^labels.*numpy.unique"),
    ("labels a ragged list", ONE, {"labels": [[0, 1], [1]]}, TypeError, "^labels.*got list of list$"),
    ("labels scalars in a list", ONE, {"labels": list(HARD)}, ValueError, "^labels"),
    ("labels on another device", ONE, {"labels": SOFT.to("meta")}, EITHER, "^labels.*device|^labels.*meta"),
    # label_similarity
    ("both labels and similarity", ONE, {"labels": HARD, "label_similarity": W}, ValueError, "^label"),
    ("similarity a numpy array", ONE, {"label_similarity": W.numpy()}, TypeError, "^label_similarity"),
    ("similarity 1-D", ONE, {"label_similarity": W[0]}, ValueError, "^label_similarity"),
    ("similarity too small", ONE, {"label_similarity": W[:3, :3]}, ValueError, "^label_similarity"),
    ("similarity not square", ONE, {"label_similarity": W[:, :3]}, ValueError, "^label_similarity"),
    (
        "similarity of V*N in mode one",
        F,
        {"label_similarity": torch.ones(8, 8), "contrast_mode": "one"},
        ValueError,
        "^label_similarity",
    ),
    ("similarity 3-D", F, {"label_similarity": W[None]}, ValueError, "^label_similarity"),
    ("similarity complex", ONE, {"label_similarity": W.cfloat()}, TypeError, "^label_similarity"),
    ("similarity negative", ONE, {"label_similarity": spoil(W, -1.0)}, ValueError, "^label_similarity"),
    ("similarity NaN", ONE, {"label_similarity": spoil(W, NAN)}, ValueError, "^label_similarity"),
    ("similarity inf", ONE, {"label_similarity": spoil(W, INF)}, ValueError, "^label_similarity"),
    ("similarity on another device", ONE, {"label_similarity": W.to("meta")}, EITHER, "^label_similarity"),
    # temperature, base_temperature
    ("temperature zero", ONE, {"labels": HARD, "temperature": 0}, ValueError, "^temperature"),
    ("temperature negative", ONE, {"labels": HARD, "temperature": -0.1}, ValueError, r"^temperature.*-0\.1"),
    ("temperature NaN", ONE, {"labels": HARD, "temperature": NAN}, ValueError, "^temperature"),
    ("temperature tensor zero", ONE, {"labels": HARD, "temperature": torch.tensor(0.0)}, ValueError, "^temperature"),
    (
        "temperature tensor negative",
        ONE,
        {"labels": HARD, "temperature": torch.tensor(-1.0)},
        ValueError,
        "^temperature",
    ),
    ("temperature tensor NaN", ONE, {"labels": HARD, "temperature": torch.tensor(NAN)}, ValueError, "^temperature"),
    ("temperature 1-D", ONE, {"labels": HARD, "temperature": torch.tensor([0.1, 0.2])}, ValueError, "^temperature"),
    ("temperature complex", ONE, {"labels": HARD, "temperature": torch.tensor(1j)}, TypeError, "^temperature"),
    ("temperature a string", ONE, {"labels": HARD, "temperature": "0.1"}, TypeError, "^temperature"),
    ("temperature None", ONE, {"labels": HARD, "temperature": None}, TypeError, "^temperature"),
    ("temperature the mode", ONE, {"labels": HARD, "temperature": "all"}, TypeError, "^temperature"),
    ("base_temperature zero", ONE, {"labels": HARD, "base_temperature": 0.0}, ValueError, "^base_temperature"),
    ("base_temperature negative", ONE, {"labels": HARD, "base_temperature": -1.0}, ValueError, "^base_temperature"),
    ("base_temperature NaN", ONE, {"labels": HARD, "base_temperature": NAN}, ValueError, "^base_temperature"),
    ("base_temperature a string", ONE, {"labels": HARD, "base_temperature": "x"}, TypeError, "^base_temperature"),
    # contrast_mode
    ("mode unknown", F, {"contrast_mode": "both"}, ValueError, "^contrast_mode.*both"),
    ("mode None", F, {"contrast_mode": None}, EITHER, "^contrast_mode"),
    ("mode one, one view", ONE, {"labels": HARD, "contrast_mode": "one"}, ValueError, "^(contrast_mode|features)"),
    # the contrast set
    ("keys a numpy array", ONE, {"contrast_features": KEYS.numpy()}, TypeError, "^contrast_features"),
    ("keys a tuple", ONE, {"contrast_features": (KEYS,)}, TypeError, "^contrast_features.*torch.cat"),
    ("keys a pooled map", ONE, {"contrast_features": KEYS[:, :, None, None]}, ValueError, "^contrast_features"),
    ("keys int", ONE, {"contrast_features": torch.ones(N, D).long()}, TypeError, "^contrast_features"),
    ("keys 1-D", ONE, {"contrast_features": KEYS[0]}, ValueError, "^contrast_features"),
    ("keys 3-D", ONE, {"contrast_features": KEYS[None]}, ValueError, "^contrast_features"),
    ("keys of another width", ONE, {"contrast_features": KEYS[:4, :2]}, ValueError, "^contrast_features"),
    ("keys of another device", ONE, {"contrast_features": PAIRS.to("meta")}, EITHER, "^contrast_features"),
    ("keys fewer than samples", ONE, {"contrast_features": KEYS[:3]}, ValueError, "^(contrast_features|labels)"),
    (
        "keys empty and unpaired",
        ONE,
        {"contrast_features": KEYS[:0]},
        ValueError,
        "^(contrast_features|labels|contrast_labels)",
    ),
    ("keys without labels", ONE, {"labels": HARD, "contrast_features": KEYS}, ValueError, "^contrast_labels"),
    ("key labels without keys", ONE, {"labels": HARD, "contrast_labels": HARD}, ValueError, "^contrast_labels"),
    ("key labels without keys and labels", F, {"contrast_labels": HARD}, ValueError, "^contrast_labels describes"),
    (
        "key labels without labels",
        ONE,
        {"contrast_features": PAIRS, "contrast_labels": HARD},
        ValueError,
        "^(contrast_)?labels",
    ),
    (
        "key labels too few",
        ONE,
        {"labels": HARD, "contrast_features": KEYS, "contrast_labels": HARD},
        ValueError,
        "^contrast_labels",
    ),
    ("key labels a list", ONE, HARD_PAIRED | {"contrast_labels": [0, 0, 1, 1]}, TypeError, "^contrast_labels"),
    ("key labels of other classes", ONE, PAIRED | {"contrast_labels": SOFT[:, :3]}, ValueError, "^contrast_labels.*3"),
    ("key labels soft, labels hard", ONE, HARD_PAIRED | {"contrast_labels": SOFT}, EITHER, "^contrast_labels"),
    ("key labels hard, labels soft", ONE, PAIRED | {"contrast_labels": HARD}, EITHER, "^contrast_labels"),
    ("key labels negative", ONE, PAIRED | {"contrast_labels": spoil(SOFT, -1)}, ValueError, "^contrast_labels"),
    ("key labels NaN", ONE, PAIRED | {"contrast_labels": spoil(SOFT, NAN)}, ValueError, "^contrast_labels"),
    ("key labels elsewhere", ONE, PAIRED | {"contrast_labels": SOFT.to("meta")}, EITHER, "^contrast_labels"),
    (
        "similarity of the wrong set",
        ONE,
        {"label_similarity": W, "contrast_features": KEYS},
        ValueError,
        "^label_similarity",
    ),
    # the teacher
    ("teacher hard", ONE, {"labels": HARD, "teacher_labels": HARD}, EITHER, "^teacher_labels"),
    ("teacher a numpy array", ONE, {"labels": HARD, "teacher_labels": SOFT.numpy()}, TypeError, "^teacher_labels"),
    ("teacher of another batch", ONE, {"labels": HARD, "teacher_labels": SOFT[:3]}, ValueError, "^teacher_labels"),
    ("teacher logits", ONE, {"labels": HARD, "teacher_labels": spoil(SOFT, -3.0)}, ValueError, "^teacher_labels"),
    ("teacher logits, per view", F, {"teacher_labels": (SOFT, spoil(SOFT, -1.0))}, ValueError, "^teacher_labels"),
    ("teacher logits, (N, V, C)", F, {"teacher_labels": spoil(torch.ones(N, V, C), -1)}, ValueError, "^teacher_labels"),
    ("teacher NaN", ONE, {"labels": HARD, "teacher_labels": spoil(SOFT, NAN)}, ValueError, "^teacher_labels"),
    ("teacher of views, unequal", F, {"teacher_labels": [SOFT, SOFT[:, :2]]}, ValueError, "^teacher_labels"),
    ("teacher on another device", ONE, {"labels": HARD, "teacher_labels": SOFT.to("meta")}, EITHER, "^teacher_labels"),
    ("teacher without the keys' part", ONE, PAIRED | {"teacher_labels": SOFT}, ValueError, "^contrast_teacher_labels"),
    (
        "teacher of the keys alone",
        ONE,
        PAIRED | {"contrast_teacher_labels": SOFT},
        ValueError,
        "^(contrast_)?teacher_labels",
    ),
    (
        "teacher of keys, no keys",
        ONE,
        {"labels": SOFT, "teacher_labels": SOFT, "contrast_teacher_labels": SOFT},
        ValueError,
        "^contrast_teacher_labels",
    ),
    (
        "teacher of keys, wrong M",
        ONE,
        PAIRED | {"teacher_labels": SOFT, "contrast_teacher_labels": SOFT[:2]},
        ValueError,
        "^contrast_teacher_labels",
    ),
    (
        "teacher of keys, wrong C",
        ONE,
        PAIRED | {"teacher_labels": SOFT, "contrast_teacher_labels": SOFT[:, :2]},
        ValueError,
        "^contrast_teacher_labels",
    ),
    (
        "teacher weight a string",
        ONE,
        {"labels": HARD, "teacher_labels": SOFT, "teacher_weight": "1"},
        TypeError,
        "^teacher_weight",
    ),
    (
        "teacher weight NaN",
        ONE,
        {"labels": HARD, "teacher_labels": SOFT, "teacher_weight": NAN},
        ValueError,
        "^teacher_weight",
    ),
    # sample_weight
    ("weight a numpy array", ONE, {"labels": HARD, "sample_weight": np.ones(N)}, TypeError, "^sample_weight"),
    ("weight a list", ONE, {"labels": HARD, "sample_weight": [1.0] * N}, TypeError, "^sample_weight"),
    ("weight complex", ONE, {"labels": HARD, "sample_weight": torch.ones(N).cfloat()}, TypeError, "^sample_weight"),
    ("weight too short", ONE, {"labels": HARD, "sample_weight": torch.ones(3)}, ValueError, "^sample_weight"),
    ("weight 0-dim", ONE, {"labels": HARD, "sample_weight": torch.tensor(1.0)}, ValueError, "^sample_weight"),
    ("weight of other views", F, {"sample_weight": torch.ones(N, 3)}, ValueError, "^sample_weight"),
    ("weight flat", F, {"sample_weight": torch.ones(N * V)}, ValueError, "^sample_weight"),
    ("weight negative", ONE, {"labels": HARD, "sample_weight": spoil(torch.ones(N), -1)}, ValueError, "^sample_weight"),
    ("weight NaN", ONE, {"labels": HARD, "sample_weight": spoil(torch.ones(N), NAN)}, ValueError, "^sample_weight"),
    ("weight inf", ONE, {"labels": HARD, "sample_weight": spoil(torch.ones(N), INF)}, ValueError, "^sample_weight"),
    (
        "weight on another device",
        ONE,
        {"labels": HARD, "sample_weight": torch.ones(N, device="meta")},
        EITHER,
        "^sample_weight",
    ),
    # options
    ("empty_anchors unknown", ONE, {"labels": HARD, "empty_anchors": "skip"}, ValueError, "^empty_anchors.*skip"),
    ("reduction unknown", ONE, {"labels": HARD, "reduction": "avg"}, ValueError, "^reduction.*avg"),
    ("reduction None", ONE, {"labels": HARD, "reduction": None}, EITHER, "^reduction"),
    ("backend unknown", ONE, {"labels": HARD, "backend": "cuda"}, ValueError, "^backend.*cuda"),
    ("backend unknown", ONE, {"labels": HARD, "backend": "cuda"}, ValueError, "^backend.*triton.*cuda"),
    ("backend None", ONE, {"labels": HARD, "backend": None}, EITHER, "^backend"),
    ("group of a wrong type", ONE, {"labels": HARD, "group": True}, TypeError, "^group.*ProcessGroup.*got bool"),
    ("group another word", ONE, {"labels": HARD, "group": "all"}, TypeError, "^group.*world.*got 'all'"),
    ("group before there is one", ONE, {"labels": HARD, "group": "world"}, ValueError, "^group.*init_process_group"),
    ("mask", ONE, {"mask": W}, TypeError, "^mask .*label_similarity=mask"),
    ("a typo", ONE, {"labells": HARD}, TypeError, "^labells .*did you mean labels"),
    ("a name of its own", ONE, {"xyz": HARD}, TypeError, "^xyz .*features, labels, label_similarity"),
    (
        "temperature a tensor too small",
        ONE,
        {"labels": HARD, "temperature": SMALL},
        ValueError,
        "^temperature is too small",
    ),
]


@pytest.mark.parametrize(
    ("features", "options", "exception", "message"), [pytest.param(*row[1:], id=row[0]) for row in TABLE]
)
def test_a_wrong_argument_is_named(features, options, exception, message):
    with pytest.raises(exception, match=message) as caught:
        gen_supcon_loss(features, **options)
    assert not isinstance(caught.value, (RuntimeError, AssertionError))
    assert len(str(caught.value)) < 600  # a message, not a tensor dump


@pytest.mark.parametrize("backend_name", ["dense", "tiled"])
@pytest.mark.parametrize("row", [row for row in TABLE if "backend" not in row[0]][::7], ids=lambda row: row[0])
def test_the_checks_do_not_depend_on_the_backend(row, backend_name):
    _, features, options, exception, message = row
    with pytest.raises(exception, match=message):
        gen_supcon_loss(features, **options, backend=backend_name)


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
def test_the_table_starts_from_valid_calls(labels):
    # otherwise a row could raise for another reason than its own
    assert gen_supcon_loss(ONE, labels).isfinite()
    assert gen_supcon_loss(F, labels).isfinite()
    assert gen_supcon_loss(F).isfinite()
    assert gen_supcon_loss(ONE, label_similarity=W).isfinite()
    assert gen_supcon_loss(ONE, contrast_features=KEYS[:4]).isfinite()
    assert gen_supcon_loss(ONE, labels, contrast_features=KEYS[:4], contrast_labels=labels).isfinite()
    assert gen_supcon_loss(ONE, labels, teacher_labels=SOFT, sample_weight=torch.ones(N)).isfinite()
    keys = {"contrast_features": KEYS[:4], "contrast_labels": labels}
    assert gen_supcon_loss(ONE, labels, **keys, teacher_labels=SOFT, contrast_teacher_labels=SOFT).isfinite()


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="^labels is the last argument by position"):
        gen_supcon_loss(ONE, HARD, 0.1)
    with pytest.raises(TypeError, match="^labels is the last argument by position.*label_similarity="):
        GenSupConLoss()(ONE, HARD, W)


def test_the_module_says_where_unknown_arguments_go():
    with pytest.raises(TypeError, match="^labells .*did you mean labels"):
        GenSupConLoss()(ONE, labells=HARD)
    with pytest.raises(TypeError, match="^mask .*label_similarity=mask"):
        GenSupConLoss()(ONE, mask=W)
    with pytest.raises(TypeError, match="^temperature .*option of the module"):
        GenSupConLoss()(ONE, HARD, temperature=0.1)


@pytest.mark.parametrize("mode", ["both", "One", "ALL", ""])
def test_the_error_for_a_wrong_mode_explains_the_two_meanings_of_one(mode):
    with pytest.raises(ValueError, match="^contrast_mode") as caught:
        gen_supcon_loss(F, contrast_mode=mode)
    text = str(caught.value)
    assert all(re.search(f"['\"]{name}['\"]", text) for name in ("all", "one", "first"))
    assert "SupContrast" in text


def test_the_error_for_a_wrong_shape_says_what_was_expected_and_what_came():
    with pytest.raises(ValueError, match="^labels") as caught:
        gen_supcon_loss(F, torch.ones(N, 3, C))
    assert "(4, 3, 5)" in str(caught.value)
    with pytest.raises(ValueError, match="^label_similarity") as caught:
        gen_supcon_loss(ONE, label_similarity=torch.ones(7, 3))
    assert "(7, 3)" in str(caught.value)


def test_errors_leave_nothing_behind():
    with pytest.raises(ValueError, match="^labels"):
        gen_supcon_loss(ONE, spoil(SOFT, -1.0))
    assert gen_supcon_loss(ONE, SOFT).isfinite()


def test_collapsed_loss_refuses_a_negative_count():
    assert collapsed_loss(0) == 0  # no contrast, no loss
    with pytest.raises(ValueError, match="^num_contrasts"):
        collapsed_loss(-1)


@pytest.mark.parametrize("name", ["temperature", "base_temperature"])
def test_collapsed_loss_needs_positive_temperatures(name):
    with pytest.raises(ValueError, match=f"^{name}"):
        collapsed_loss(7, **{name: 0.0})
    with pytest.raises(ValueError, match=r"^temperature must be a number or a 0-dim tensor; got shape \(1,\)"):
        collapsed_loss(7, torch.ones(1))


# --- validate() ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("form", ["N,D", "N,V,D", "tuple"])
def test_validate_turns_a_bad_feature_into_an_error(poison, form):
    bad = spoil(F, poison)
    features = {"N,D": bad[:, 1], "N,V,D": bad, "tuple": tuple(bad.unbind(1))}[form]
    assert not gen_supcon_loss(features, HARD).isfinite()  # by default a loss that GradScaler can see
    with genscl_loss.validate(), pytest.raises(ValueError, match="^features"):
        gen_supcon_loss(features, HARD)
    assert not gen_supcon_loss(features, HARD).isfinite()


@pytest.mark.parametrize("poison", [NAN, INF])
def test_validate_looks_at_the_contrast_set(poison):
    keys = spoil(KEYS[:4], poison)
    assert not gen_supcon_loss(ONE, contrast_features=keys).isfinite()
    with genscl_loss.validate(), pytest.raises(ValueError, match="^contrast_features"):
        gen_supcon_loss(ONE, contrast_features=keys)


def test_validate_accepts_good_input_and_changes_no_value():
    expected = gen_supcon_loss(F, SOFT, teacher_labels=SOFT, sample_weight=torch.ones(N))
    with genscl_loss.validate():
        assert torch.equal(gen_supcon_loss(F, SOFT, teacher_labels=SOFT, sample_weight=torch.ones(N)), expected)
        assert gen_supcon_loss(torch.zeros(N, D), HARD).isfinite()  # zero rows are allowed
        assert gen_supcon_loss(ONE, torch.zeros(N, C)).item() == 0  # unlabelled rows, too


def test_validate_nests_and_ends_with_its_block_also_after_an_error():
    bad = spoil(F, NAN)
    with genscl_loss.validate():
        with genscl_loss.validate():
            pass
        with pytest.raises(ValueError, match="^features"):
            gen_supcon_loss(bad)
    assert gen_supcon_loss(bad).isnan()
    with pytest.raises(ZeroDivisionError), genscl_loss.validate():
        raise ZeroDivisionError
    assert gen_supcon_loss(bad).isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": spoil(SOFT, NAN)}, "^labels"),
        ({"labels": HARD, "teacher_labels": spoil(SOFT, -1.0)}, "^teacher_labels"),
        ({"label_similarity": spoil(W, -1.0)}, "^label_similarity"),
        ({"labels": HARD, "sample_weight": spoil(torch.ones(N), NAN)}, "^sample_weight"),
        ({"labels": HARD, "temperature": torch.tensor(-0.1)}, "^temperature"),
    ],
)
def test_value_checks_hold_inside_validate_as_well(options, message):
    with genscl_loss.validate(), pytest.raises(ValueError, match=message):
        gen_supcon_loss(ONE, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "value"),
    [("labels", spoil(SOFT, -1.0)), ("sample_weight", spoil(torch.ones(N), NAN)), ("temperature", torch.tensor(-0.1))],
)
def test_on_a_gpu_values_are_checked_only_inside_validate(name, value):
    options = {"labels": HARD.cuda(), name: value.cuda()}
    gen_supcon_loss(ONE.cuda(), **options)  # no check, so no wait for the device
    with genscl_loss.validate(), pytest.raises(ValueError, match=f"^{name}"):
        gen_supcon_loss(ONE.cuda(), **options)


# --- the public surface --------------------------------------------------------------------------------------------


def test_everything_in_all_exists_and_nothing_is_missing():
    names = {
        "gen_supcon_loss",
        "FeatureQueue",
        "GenSupConLoss",
        "smooth_labels",
        "teacher_labels",
        "mixup",
        "cutmix",
        "mixup_cutmix",
        "collapsed_loss",
        "auto_backend",
        "cached_backward",
        "contrastive_accuracy",
        "available_backends",
        "validate",
        "__version__",
    }
    assert set(genscl_loss.__all__) == names
    assert all(hasattr(genscl_loss, name) for name in names)


def test_defaults_are_the_contract():
    parameters = inspect.signature(gen_supcon_loss).parameters
    others = ("features", "more", "unknown")  # the last two are refused
    assert {name: parameter.default for name, parameter in parameters.items() if name not in others} == {
        "labels": None,
        "label_similarity": None,
        "temperature": 0.07,
        "base_temperature": 0.07,
        "contrast_mode": "all",
        "contrast_features": None,
        "contrast_labels": None,
        "include_batch": False,
        "teacher_labels": None,
        "contrast_teacher_labels": None,
        "teacher_weight": 1.0,
        "sample_weight": None,
        "contrast_weight": None,
        "ignore_index": None,
        "empty_anchors": "zero",
        "normalize": True,
        "reduction": "mean",
        "group": None,
        "backend": "auto",
    }


def test_the_function_pickles():
    assert pickle.loads(pickle.dumps(gen_supcon_loss)) is gen_supcon_loss


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"temperature": 0.0}, ValueError, "^temperature"),
        ({"temperature": -1.0}, ValueError, "^temperature"),
        ({"temperature": "0.1"}, TypeError, "^temperature"),
        ({"contrast_mode": "both"}, ValueError, "^contrast_mode"),
        ({"base_temperature": 0.0}, ValueError, "^base_temperature"),
        ({"empty_anchors": "skip"}, ValueError, "^empty_anchors"),
        ({"reduction": "avg"}, ValueError, "^reduction"),
        ({"backend": "fused"}, ValueError, "^backend"),
        ({"group": 0}, TypeError, "^group.*got int"),
        ({"learnable_temperature": "yes"}, TypeError, "^learnable_temperature must be a bool; got str"),
        ({"learnable_temperature": True, "temperature": 5.0}, ValueError, "^temperature"),
        ({"learnable_temperature": True, "temperature": 0.001}, ValueError, "^temperature"),
    ],
)
def test_the_module_refuses_wrong_options_when_it_is_made(options, exception, message):
    with pytest.raises(exception, match=message):
        GenSupConLoss(**options)


def test_integers_are_classes_or_multi_hot_by_their_shape():
    features, classes = torch.randn(4, 2, 8), torch.tensor([[0, 0], [1, 1], [2, 2], [2, 2]])
    torch.testing.assert_close(gen_supcon_loss(features, classes.unbind(1)), gen_supcon_loss(features, classes[:, 0]))
    for multi_hot in (torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]]), torch.zeros(4, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"^labels of shape \(4, 2\) .* labels.unbind\(1\)"):
            gen_supcon_loss(features, multi_hot)
        vectors = gen_supcon_loss(features, multi_hot.float())
        torch.testing.assert_close(gen_supcon_loss(features, [multi_hot, multi_hot]), vectors)
        one_view = gen_supcon_loss(features[:, 0], multi_hot.float())
        torch.testing.assert_close(gen_supcon_loss(features[:, 0], multi_hot), one_view)


@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (4, 3, 3)])
def test_shapes_of_integers_are_judged_without_their_values(shape):
    features, labels = torch.ones(4, 2, 8, device="meta"), torch.ones(shape, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="^labels of shape .*could mean"):
        gen_supcon_loss(features, labels)


def test_every_refused_reading_has_a_way_through():
    features, labels = torch.randn(6, 5), torch.rand(6, 5)
    padded, similarity = torch.nn.functional.pad(labels, (0, 1)), torch.nn.functional.cosine_similarity
    expected = gen_supcon_loss(features, label_similarity=similarity(labels[:, None], labels, dim=2))
    torch.testing.assert_close(gen_supcon_loss(features, [labels]), expected)
    torch.testing.assert_close(gen_supcon_loss(features, padded), expected)
    column = torch.tensor([[1.0], [0.0], [1.0], [1.0], [0.0], [1.0]])  # of one class, or none
    there = (column @ column.T > 0).float()
    torch.testing.assert_close(
        gen_supcon_loss(features, torch.nn.functional.pad(column, (0, 1))),
        gen_supcon_loss(features, label_similarity=there),
    )
    signs = torch.randn(6, 4, 1)
    assert gen_supcon_loss(signs.unbind(1)).isfinite()
    assert gen_supcon_loss(signs, normalize=False).isfinite()
    probabilities = torch.rand(6, 5).softmax(1)
    torch.testing.assert_close(genscl_loss.teacher_labels(probabilities.log()), probabilities)


def test_integers_of_any_type_compare_by_value():
    features, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 1, 0, 2])
    queue = {"contrast_features": torch.randn(3, 5), "contrast_labels": torch.arange(3)}
    expected = gen_supcon_loss(features, labels, **queue)
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.int8):
        assert torch.equal(gen_supcon_loss(features, labels.to(dtype), **queue), expected)
    two = gen_supcon_loss([features, features.flip(0)], [labels, labels.flip(0)])
    assert torch.equal(gen_supcon_loss([features, features.flip(0)], [labels.int(), labels.flip(0)]), two)


def test_sparse_tensors_are_refused():
    features, labels = torch.randn(4, 2, 8), torch.eye(4)
    with pytest.raises(TypeError, match=r"^labels must be dense; .* labels.to_dense\(\)"):
        gen_supcon_loss(features, labels.to_sparse())
    with pytest.raises(TypeError, match="^label_similarity must be dense"):
        gen_supcon_loss(features, label_similarity=labels.to_sparse())


def test_likely_mistakes_get_a_hint():
    features = torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match="^labels .* are the views first"):
        gen_supcon_loss(features.transpose(0, 1), torch.arange(6))
    with pytest.raises(ValueError, match="^labels .* give a label for each sample, not for each row"):
        gen_supcon_loss(features, torch.arange(12))
    with pytest.raises(ValueError, match=r"^labels .*features.chunk\(2\) .* features.view\(6, 2, -1\)"):
        gen_supcon_loss(features.flatten(0, 1), torch.arange(6))
    with pytest.raises(ValueError, match=r"^labels .*features.chunk\(2\) .* features.view\(2, 2, -1\)"):
        gen_supcon_loss(torch.randn(4, 8), torch.arange(2))
    with pytest.raises(ValueError, match=r"got shape \(5,\)$"):
        gen_supcon_loss(features, torch.arange(5))
    with pytest.raises(TypeError, match="^labels .* got list: torch.tensor makes a tensor of it"):
        gen_supcon_loss(features, [0, 1, 2, 3, 4, 5])
    with pytest.raises(TypeError, match="^features .* got ndarray: torch.from_numpy makes a tensor of it"):
        gen_supcon_loss(features.numpy(), torch.arange(6))


def test_class_numbers_are_never_compared_after_rounding():
    features, queue = torch.randn(2, 4), torch.randn(1, 4)
    with pytest.raises(TypeError, match="^contrast_labels must have the dtype of labels"):
        gen_supcon_loss(
            features,
            torch.tensor([16777217, 0]),
            contrast_features=queue,
            contrast_labels=torch.tensor([16777216.0]),
        )
    with pytest.raises(TypeError, match="^labels must be of one dtype in all views"):
        gen_supcon_loss((features, features), (torch.tensor([16777217, 0]), torch.tensor([16777216.0, 0.0])))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn])
def test_rare_label_dtypes_work(dtype):
    hot = torch.eye(4)
    loss = gen_supcon_loss(torch.ones(4, 2, 3), hot.to(dtype))
    torch.testing.assert_close(loss, gen_supcon_loss(torch.ones(4, 2, 3), hot))


@pytest.mark.parametrize("option", [{"temperature": 1e-40}, {"teacher_weight": 10**400}])
def test_numbers_beyond_the_dtype_are_named(option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))}"):
        gen_supcon_loss(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]), **option)


def test_the_default_device_does_not_matter():
    features, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    expected = gen_supcon_loss(features, labels)
    with torch.device("meta"):
        assert torch.equal(gen_supcon_loss(features, labels), expected)


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"normalize": "no"}, TypeError, "^normalize must be a bool; got str"),
        ({"normalize": torch.ones(2)}, TypeError, "^normalize must be a bool; got Tensor"),
        (
            {"temperature": torch.tensor(0.1, device="meta")},
            ValueError,
            "^temperature must be on the device of features",
        ),
        ({"temperature": torch.tensor(0.1).to_sparse()}, TypeError, "^temperature must be dense"),
        ({"base_temperature": 1e-300}, ValueError, "^base_temperature is too small to compute with in torch.float32"),
    ],
)
def test_what_would_fail_deep_inside_is_named(backend, options, exception, message):
    with pytest.raises(exception, match=message):
        gen_supcon_loss(torch.randn(4, 2, 8), torch.arange(4), backend=backend, **options)


def test_values_that_do_not_exist_are_not_read():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    features, soft, tau = torch.randn(6, 4), torch.rand(6, 3), torch.tensor(0.1)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (features, soft, tau)]
        loss = gen_supcon_loss(fake[0], fake[1], temperature=fake[2], sample_weight=fake[1][:, 0])
    assert loss.shape == ()
    graph = make_fx(lambda x, y, t: gen_supcon_loss(x, y, temperature=t))(features, soft, tau)
    torch.testing.assert_close(graph(features, soft, tau), gen_supcon_loss(features, soft, temperature=tau))
