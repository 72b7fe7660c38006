"""Drop-in parity with the losses that users come from, each re-derived here from its documented behaviour."""

from __future__ import annotations

import pytest
import torch
from strategies import generator, random_features, soft_rows

from genscl_loss import GenSupConLoss, gen_supcon_loss

N, D = 10, 12
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 0])
LONE = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 4, 5])


def unit_views(views: int, seed: int = 0) -> torch.Tensor:
    """(N, V, D) of unit rows: the two older codes leave the normalisation to the caller."""
    return torch.nn.functional.normalize(random_features(N, views, D, seed), dim=-1)


# --- SupContrast: features (bsz, n_views, ...), labels or mask (bsz, bsz), modes "all" and "one" --------------------


def supcontrast(features, labels=None, mask=None, *, mode="all", tau=0.07, base=0.07):
    """Equality mask (or the given one, or the identity) repeated over views; anchors without positives count 0."""
    size, views = features.shape[:2]
    rows = torch.cat(features.flatten(2).unbind(1))
    if labels is not None:
        mask = (labels[:, None] == labels).to(rows)
    if mask is None:
        mask = torch.eye(size, dtype=rows.dtype)
    anchors = views if mode == "all" else 1
    mask = mask.to(rows).repeat(anchors, views)
    logits = rows[: anchors * size] @ rows.T / tau
    self_pairs = torch.eye(views * size, dtype=torch.bool)[: anchors * size]
    mask = mask.masked_fill(self_pairs, 0)
    log_prob = logits - logits.masked_fill(self_pairs, float("-inf")).logsumexp(1, keepdim=True)
    positives = mask.sum(1)
    positives = torch.where(positives < 1e-6, torch.ones_like(positives), positives)
    return -(tau / base) * ((mask * log_prob).sum(1) / positives).mean()


SUPCONTRAST_MODE = {"all": "all", "one": "first"}  # its "one" is our "first"


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("labels", [LABELS, LONE], ids=["every anchor has a positive", "lone classes"])
def test_supcontrast_with_labels(backend, labels, views, mode):
    features = unit_views(views)
    wanted = supcontrast(features, labels, mode=mode, tau=0.1)
    for normalise in (True, False):
        actual = gen_supcon_loss(
            features,
            labels,
            temperature=0.1,
            contrast_mode=SUPCONTRAST_MODE[mode],
            normalize=normalise,
            backend=backend,
        )
        torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [2, 3])
def test_supcontrast_without_labels_is_simclr(backend, views, mode):
    features = unit_views(views, seed=1)
    actual = gen_supcon_loss(features, contrast_mode=SUPCONTRAST_MODE[mode], backend=backend)
    torch.testing.assert_close(actual, supcontrast(features, mode=mode), rtol=1e-7, atol=1e-7)


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_supcontrast_mask_is_our_label_similarity(backend, views, mode):
    features = unit_views(views, seed=2)
    mask = torch.rand(N, N, generator=generator(3), dtype=torch.float64)  # asymmetric and soft
    mask = mask * (mask > 0.5)
    mask[4] = 0
    actual = gen_supcon_loss(features, label_similarity=mask, contrast_mode=SUPCONTRAST_MODE[mode], backend=backend)
    torch.testing.assert_close(actual, supcontrast(features, mask=mask, mode=mode), rtol=1e-7, atol=1e-7)


@pytest.mark.not_on_triton("needs float64")
def test_supcontrast_flattens_feature_maps(backend):
    features = unit_views(2, seed=4)
    maps = features.reshape(N, 2, 3, 2, 2)
    actual = gen_supcon_loss(maps, LABELS, backend=backend)
    torch.testing.assert_close(actual, supcontrast(maps, LABELS), rtol=1e-7, atol=1e-7)


def test_supcontrast_call_sites_run_unchanged():
    # positional constructor arguments and a positional call, as in that repository's trainer
    criterion = GenSupConLoss(0.1, "all", 0.07)
    features = unit_views(2, seed=5)
    torch.testing.assert_close(criterion(features, LABELS), supcontrast(features, LABELS, tau=0.1), rtol=1e-7, atol=0)


@pytest.mark.not_on_triton("needs float64")
def test_supcontrast_gradients_are_the_same_through_the_users_own_normalisation(backend):
    raw = random_features(N, 2, D, seed=6)
    gradients = []
    for function in (supcontrast, lambda x, y: gen_supcon_loss(x, y, normalize=False, backend=backend)):
        leaf = raw.clone().requires_grad_()
        function(torch.nn.functional.normalize(leaf, dim=-1), LABELS).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


# --- the official GenSCL code: tuples of views, tuples of soft labels, modes "all" and "one" ------------------------


def official(features, labels, *, mode="all", tau=0.07, base=0.07):
    """Cosine of the label rows as weights, divided by their sum + 1e-8; "one" is view 0 against view 1, all pairs."""
    if mode == "all":
        queries, query_labels = torch.cat(list(features)), torch.cat(list(labels))
        keys, key_labels = queries, query_labels
    else:
        queries, keys = features[0], features[1]
        query_labels, key_labels = labels[0], labels[1]
    logits = queries @ keys.T / tau
    lengths = query_labels.norm(dim=1)[:, None] * key_labels.norm(dim=1)[None, :]
    weights = query_labels @ key_labels.T / lengths
    spread = logits
    if mode == "all":
        self_pairs = torch.eye(len(queries), dtype=torch.bool)
        spread, weights = logits.masked_fill(self_pairs, float("-inf")), weights.masked_fill(self_pairs, 0)
    log_prob = logits - spread.logsumexp(1, keepdim=True)
    return -(tau / base) * ((weights / (weights.sum(1, keepdim=True) + 1e-8)) * log_prob).sum(1).mean()


def label_views(views: int, kind: str) -> tuple[torch.Tensor, ...]:
    if kind == "one-hot":
        return (torch.eye(6, dtype=torch.float64)[LONE],) * views
    return tuple(soft_rows(N, 6, seed=v) * (v + 1) for v in range(views))


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("kind", ["one-hot", "soft, per view"])
@pytest.mark.parametrize(("mode", "views"), [("all", 1), ("all", 2), ("all", 3), ("one", 2), ("one", 3)])
def test_official_code_on_tuples(backend, mode, views, kind):
    features, labels = tuple(unit_views(views, seed=7).unbind(1)), label_views(views, kind)
    actual = gen_supcon_loss(features, labels, temperature=0.1, contrast_mode=mode, backend=backend)
    torch.testing.assert_close(actual, official(features, labels, mode=mode, tau=0.1), rtol=1e-10, atol=1e-12)


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("mode", ["all", "one"])
def test_official_trainer_with_a_teacher(backend, mode):
    # loss(l_q, l_k) + alpha * loss(teacher_q, teacher_k)
    features = tuple(unit_views(2, seed=8).unbind(1))
    labels, teacher = label_views(2, "soft, per view"), tuple(soft_rows(N, 6, seed=40 + v) for v in range(2))
    wanted = official(features, labels, mode=mode) + 0.7 * official(features, teacher, mode=mode)
    actual = gen_supcon_loss(
        features, labels, contrast_mode=mode, teacher_labels=teacher, teacher_weight=0.7, backend=backend
    )
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


def test_the_two_meanings_of_mode_one_differ():
    # so a user who moves from SupContrast has to write "first"; the values are far apart
    features, labels = unit_views(2, seed=9), torch.eye(6, dtype=torch.float64)[LABELS]
    ours = {mode: gen_supcon_loss(features, labels, contrast_mode=mode).item() for mode in ("one", "first")}
    assert ours["one"] == pytest.approx(official(features.unbind(1), (labels, labels), mode="one").item(), rel=1e-9)
    assert ours["first"] == pytest.approx(supcontrast(features, LABELS, mode="one").item(), rel=1e-6)
    assert abs(ours["one"] - ours["first"]) > 0.1


# --- pytorch-metric-learning ---------------------------------------------------------------------------------------


@pytest.fixture
def metric_losses():
    return pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_metric_learning_supcon_when_every_anchor_has_a_positive(backend, metric_losses, tau, scale):
    # it has no base temperature, so neither have we here; it normalises inside, so do we
    features = random_features(N, 1, D, seed=10)[:, 0] * scale
    wanted = metric_losses.SupConLoss(temperature=tau)(features, LABELS)
    assert wanted.item() > 0
    for options in ({"base_temperature": None}, {"base_temperature": tau}):
        actual = gen_supcon_loss(features, LABELS, temperature=tau, **options, backend=backend)
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=0)


@pytest.mark.not_on_triton("needs float64")
def test_metric_learning_supcon_ignores_anchors_without_positives(backend, metric_losses):
    features = random_features(N, 1, D, seed=11)[:, 0]
    wanted = metric_losses.SupConLoss(temperature=0.1)(features, LONE)
    # its mean is over anchors with a loss above zero; make sure that here this means "with a positive"
    each = gen_supcon_loss(features, LONE, temperature=0.1, base_temperature=None, reduction="none")
    assert (each[:7] > 1e-3).all()
    assert torch.equal(each[7:], torch.zeros(3, dtype=torch.float64))
    actual = gen_supcon_loss(
        features, LONE, temperature=0.1, base_temperature=None, empty_anchors="ignore", backend=backend
    )
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=0)
    zero = gen_supcon_loss(features, LONE, temperature=0.1, base_temperature=None, backend=backend)
    torch.testing.assert_close(zero, wanted * 7 / 10, rtol=1e-5, atol=0)


@pytest.mark.not_on_triton("needs float64")
def test_metric_learning_supcon_against_a_reference_set(backend, metric_losses):
    features, reference = random_features(N, 1, D, seed=12)[:, 0], random_features(7, 1, D, seed=13)[:, 0]
    reference_labels = torch.arange(7) % 4
    wanted = metric_losses.SupConLoss(temperature=0.1)(features, LABELS, ref_emb=reference, ref_labels=reference_labels)
    actual = gen_supcon_loss(
        features,
        LABELS,
        contrast_features=reference,
        contrast_labels=reference_labels,
        temperature=0.1,
        base_temperature=None,
        backend=backend,
    )
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=0)


@pytest.mark.not_on_triton("needs float64")
def test_metric_learning_supcon_gradients(backend, metric_losses):
    raw = random_features(N, 1, D, seed=14)[:, 0]
    theirs, ours = raw.clone().requires_grad_(), raw.clone().requires_grad_()
    metric_losses.SupConLoss(temperature=0.1)(theirs, LABELS).backward()
    gen_supcon_loss(ours, LABELS, temperature=0.1, base_temperature=None, backend=backend).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.not_on_triton("needs float64")
def test_metric_learning_ntxent_on_two_views(backend, metric_losses):
    # self-supervised pairs: labels repeated over two views
    features = random_features(N, 2, D, seed=15)
    wanted = metric_losses.SupConLoss(temperature=0.5)(torch.cat(features.unbind(1)), torch.arange(N).repeat(2))
    actual = gen_supcon_loss(features, temperature=0.5, base_temperature=None, backend=backend)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=0)
