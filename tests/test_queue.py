"""FeatureQueue against a plain list: order, state, errors, pending gradients, and processes that share one queue."""

from __future__ import annotations

import copy
import io
import pickle
import re

import distributed
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from genscl_loss import FeatureQueue, GenSupConLoss, gen_supcon_loss, validate

DIM, CLASSES = 3, 4
NAN = float("nan")


def batch(count: int, seed: int, soft: bool = False, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, dim, generator=generator)
    if soft:
        return features, torch.rand(count, CLASSES, generator=generator)
    return features, torch.randint(0, CLASSES, (count,), generator=generator)


def filled(size: int = 5, counts: tuple[int, ...] = (4, 3), soft: bool = False, **options) -> FeatureQueue:
    queue = FeatureQueue(size, DIM, CLASSES if soft else None, **options)
    for seed, count in enumerate(counts):
        queue.enqueue(*batch(count, seed, soft))
    return queue


def reloaded(state: dict) -> dict:
    """Return the state after a trip through a file that is read without executing anything."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal(left: FeatureQueue, right: FeatureQueue) -> None:
    """Equal bit for bit, position included."""
    assert len(left) == len(right)
    assert torch.equal(left.features, right.features)
    assert torch.equal(left.labels, right.labels)
    assert torch.equal(left.get_extra_state(), right.get_extra_state())


# ------------------------------------------------------------------ one process
@given(size=st.integers(1, 7), counts=st.lists(st.integers(0, 16), max_size=8), soft=st.booleans())
def test_it_is_the_end_of_a_list(size, counts, soft):
    queue, rows, labels = FeatureQueue(size, DIM, CLASSES if soft else None), [], []
    for seed, count in enumerate(counts):
        x, y = batch(count, seed, soft)
        queue.enqueue(x, y)
        rows, labels = [*rows, *x.tolist()][-size:], [*labels, *y.tolist()][-size:]
        assert queue.features.tolist() == rows
        assert queue.labels.tolist() == labels
        assert len(queue) == len(rows)
    assert queue.features.shape == (len(rows), DIM)
    assert queue.labels.shape == ((len(rows), CLASSES) if soft else (len(rows),))
    assert queue.labels.dtype == (torch.float32 if soft else torch.int64)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("counts", [(), (2,), (4, 3), (12,)])
def test_the_loss_is_that_of_the_same_rows_by_hand(backend, soft, counts):
    queue, criterion = filled(5, counts, soft), GenSupConLoss(backend=backend)
    anchors, labels = batch(6, 99, soft)
    loss = criterion(anchors, labels, contrast_features=queue.features, contrast_labels=queue.labels)
    if not counts:
        assert loss == 0
        return
    rows, row_labels = (
        torch.cat(parts)[-5:] for parts in zip(*(batch(n, i, soft) for i, n in enumerate(counts)), strict=True)
    )
    assert torch.equal(loss, criterion(anchors, labels, contrast_features=rows, contrast_labels=row_labels))
    assert loss > 0


def test_rows_are_those_of_earlier_steps_when_contrasted_before_enqueue():
    """The order that the docstring asks for: in the other one each sample is its own positive, and the loss tells."""
    criterion = GenSupConLoss(temperature=0.05)
    queue, late = FeatureQueue(8, DIM), FeatureQueue(8, DIM)
    for step in range(4):
        x = batch(4, step)[0]
        labels = 4 * step + torch.arange(4)  # all different: no sample has a positive but itself
        loss = criterion(x, labels, contrast_features=queue.features, contrast_labels=queue.labels)
        assert loss == 0
        assert not set(queue.labels.tolist()) & set(labels.tolist())
        queue.enqueue(x, labels)
        late.enqueue(x, labels)
        assert criterion(x, labels, contrast_features=late.features, contrast_labels=late.labels) > 0


def test_rows_are_copies_without_gradient():
    queue = FeatureQueue(4, DIM, CLASSES)
    features, labels = (values.requires_grad_() for values in batch(2, 0, soft=True))
    queue.enqueue(features, labels)
    assert not queue.features.requires_grad
    assert not queue.labels.requires_grad
    before = queue.features.clone(), queue.labels.clone()
    with torch.no_grad():
        for values in (features, labels, queue.features, queue.labels):
            values.fill_(0.5)
    assert torch.equal(queue.features, before[0])
    assert torch.equal(queue.labels, before[1])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("counts", [(2,), (5,), (4, 3)])
@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_a_pending_backward_pass_is_safe(soft, counts, backend):
    def gradient(after: bool) -> torch.Tensor:
        queue, (anchors, labels) = filled(5, counts, soft), batch(6, 99, soft)
        anchors.requires_grad_()
        rows = {"contrast_features": queue.features, "contrast_labels": queue.labels}
        loss = gen_supcon_loss(anchors, labels, **rows, backend=backend)
        if after:
            queue.enqueue(*batch(5, 7, soft))
            queue.load_state_dict(FeatureQueue(5, DIM, CLASSES if soft else None).state_dict())
        loss.backward()
        return anchors.grad

    assert gradient(False).abs().max() > 0
    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("counts", [(), (3,), (5,), (4, 3), (4, 3, 3)])
@pytest.mark.parametrize("way", ["file", "memory", "deepcopy", "pickle"])
def test_a_restored_queue_goes_on_bit_for_bit(soft, counts, way):
    queue = filled(5, counts, soft)
    if way in ("file", "memory"):
        state = queue.state_dict() if way == "memory" else reloaded(queue.state_dict())
        other = filled(5, (2, 2, 2), soft)
        assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    else:
        other = copy.deepcopy(queue) if way == "deepcopy" else pickle.loads(pickle.dumps(queue))
    assert_equal(other, queue)
    anchors, labels = batch(6, 99, soft)
    for seed in (50, 51):
        losses = []
        for one in (queue, other):
            losses.append(gen_supcon_loss(anchors, labels, contrast_features=one.features, contrast_labels=one.labels))
            one.enqueue(*batch(2, seed, soft))
        assert torch.equal(*losses)
        assert_equal(other, queue)


def test_copies_share_no_memory():
    queue = filled()
    state, twin = queue.state_dict(), copy.deepcopy(queue)
    snapshot = filled()
    queue.enqueue(*batch(5, 8))
    assert_equal(twin, snapshot)
    fresh = FeatureQueue(5, DIM)
    fresh.load_state_dict(state)
    assert_equal(fresh, snapshot)
    fresh.enqueue(*batch(2, 9))  # must not write to the state that it came from
    other = FeatureQueue(5, DIM)
    other.load_state_dict(state)
    assert_equal(other, snapshot)


def test_it_is_in_the_state_of_a_model_and_no_buffer():
    model = nn.ModuleDict({"encoder": nn.Linear(2, DIM), "queue": filled()})
    assert not list(model["queue"].buffers())  # DDP would overwrite them with those of process 0
    other = nn.ModuleDict({"encoder": nn.Linear(2, DIM), "queue": FeatureQueue(5, DIM)})
    other.load_state_dict(reloaded(model.state_dict()))
    assert_equal(other["queue"], model["queue"])


@pytest.mark.parametrize(
    "other",
    [FeatureQueue(6, DIM), FeatureQueue(5, DIM + 1), FeatureQueue(5, DIM, CLASSES)],
    ids=["size", "dim", "soft"],
)
def test_the_state_of_another_queue_is_refused(other):
    queue = filled()
    with pytest.raises(
        ValueError, match=r"state is of a queue of size . *, dim . and num_classes .*; this one has size 5"
    ):
        queue.load_state_dict(other.state_dict())
    assert_equal(queue, filled())


def test_a_missing_or_foreign_state_is_refused():
    queue = filled()
    with pytest.raises(RuntimeError, match='Missing key.*"_extra_state"'):
        queue.load_state_dict({})
    assert queue.load_state_dict({}, strict=False).missing_keys == ["_extra_state"]
    with pytest.raises(TypeError, match="^_extra_state: state must be what a FeatureQueue saves, .* got NoneType"):
        queue.load_state_dict({"_extra_state": None})
    for foreign in ({}, {"features": torch.zeros(5, DIM)}):
        with pytest.raises(ValueError, match="^_extra_state: state must be a tensor.* features, labels, next, count"):
            queue.load_state_dict({"_extra_state": foreign})
    assert_equal(queue, filled())


@pytest.mark.parametrize("labelled", [False, True])
def test_reset_empties_it(labelled):
    queue = FeatureQueue(5, DIM)
    queue.enqueue(*batch(7, 0)[: 1 + labelled])
    queue.reset()
    assert len(queue) == 0
    assert queue.features.shape == (0, DIM)
    assert queue.labels.shape == (0,)
    queue.enqueue(*batch(2, 3))
    for memory, rows in zip((queue.features, queue.labels), batch(2, 3), strict=True):
        assert torch.equal(memory, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_it_follows_casts(dtype):
    queue = nn.Sequential(filled(soft=True)).to(dtype)[0]
    assert queue.features.dtype == queue.labels.dtype == dtype
    x, y = batch(2, 5, soft=True)
    queue.enqueue(x, y)  # float32 here
    assert torch.equal(queue.features[-2:], x.to(dtype))
    assert torch.equal(queue.labels[-2:], y.to(dtype))
    anchors = x.to(dtype)
    loss = gen_supcon_loss(anchors, y, contrast_features=queue.features, contrast_labels=queue.labels)
    assert loss.isfinite()
    hard = filled().to(dtype)
    assert hard.features.dtype == dtype
    assert hard.labels.dtype == torch.int64
    single = filled()
    single.load_state_dict(hard.state_dict())
    assert single.features.dtype == torch.float32  # as with buffers: the values come, the dtype stays
    assert torch.equal(single.features, hard.features.float())


def test_float64_rows_keep_their_digits():
    queue, x = FeatureQueue(4, DIM).double(), torch.full((2, DIM), 1 / 3, dtype=torch.float64)
    queue.enqueue(x, torch.tensor([0, 1]))
    assert torch.equal(queue.features, x)


SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED])
def test_class_numbers_of_any_integer_dtype(dtype):
    queue = FeatureQueue(4, DIM)
    largest = 1 if dtype == torch.bool else min(torch.iinfo(dtype).max, 2**63 - 1)
    smallest = torch.iinfo(dtype).min if dtype in SIGNED else 0
    queue.enqueue(torch.zeros(1, DIM), torch.tensor([7]))
    queue.enqueue(torch.zeros(2, DIM), torch.tensor([smallest, largest], dtype=dtype))
    assert queue.labels.tolist() == [7, smallest, largest]
    assert queue.labels.dtype == torch.int64


def test_a_class_number_that_int64_does_not_hold_is_refused():
    queue = FeatureQueue(4, DIM)
    labels = torch.tensor([1, 2**63], dtype=torch.uint64)
    with pytest.raises(ValueError, match=r"^labels must be below 2\*\*63"):
        queue.enqueue(torch.zeros(2, DIM), labels)
    assert len(queue) == 0


def test_multi_hot_labels_become_vectors():
    queue = FeatureQueue(4, DIM, 2)
    queue.enqueue(torch.zeros(2, DIM), torch.tensor([[0, 1], [1, 1]]))
    assert queue.labels.tolist() == [[0.0, 1.0], [1.0, 1.0]]


# ------------------------------------------------------------------ without labels
@given(size=st.integers(1, 7), counts=st.lists(st.integers(0, 16), max_size=6))
def test_without_labels_it_is_the_end_of_a_list_too(size, counts):
    queue, rows = FeatureQueue(size, DIM), []
    for seed, count in enumerate(counts):
        queue.enqueue(batch(count, seed)[0])
        rows = [*rows, *batch(count, seed)[0].tolist()][-size:]
        assert queue.features.tolist() == rows
        twin = FeatureQueue(size, DIM)
        twin.load_state_dict(reloaded(queue.state_dict()))
        assert torch.equal(twin.get_extra_state(), queue.get_extra_state())
    if not rows:
        assert queue.labels.shape == (0,)  # none yet: labels may still come
        return
    for one in (queue, twin, copy.deepcopy(queue), pickle.loads(pickle.dumps(queue))):
        with pytest.raises(ValueError, match=r"^labels: the rows of this queue have none"):
            one.labels  # noqa: B018
        with pytest.raises(ValueError, match=r"^labels must be left out: .*reset\(\)"):
            one.enqueue(*batch(2, 0))
        assert one.features.tolist() == rows


@pytest.mark.parametrize("soft", [False, True])
def test_a_queue_with_labels_goes_on_wanting_them(soft):
    message = "a queue with num_classes holds label vectors" if soft else r"the rows in this queue have labels; .*reset"
    for counts in [(3,), (4, 3)]:
        queue = filled(5, counts, soft)
        for rows in (ROWS, ROWS[:0]):
            with pytest.raises(ValueError, match=f"^labels is missing: {message}"):
                queue.enqueue(rows)
        assert_equal(queue, filled(5, counts, soft))
    if soft:
        with pytest.raises(ValueError, match=f"^labels is missing: {message}"):
            FeatureQueue(5, DIM, CLASSES).enqueue(ROWS)


def test_no_rows_decide_nothing():
    queue = FeatureQueue(5, DIM)
    queue.enqueue(ROWS[:0])
    queue.enqueue(ROWS[:0], HARD[:0])
    queue.enqueue(ROWS)
    with pytest.raises(ValueError, match="^labels must be left out"):
        queue.enqueue(ROWS[:0], HARD[:0])


def test_a_queue_without_labels_takes_the_place_of_one_with_them():
    """Loading decides anew, as it does about everything that changes."""
    without = FeatureQueue(5, DIM)
    without.enqueue(batch(2, 0)[0])
    queue = filled()
    queue.load_state_dict(without.state_dict())
    queue.enqueue(batch(2, 1)[0])
    assert torch.equal(queue.features, torch.cat([batch(2, 0)[0], batch(2, 1)[0]]))
    without.load_state_dict(filled().state_dict())
    assert_equal(without, filled())


def test_moco_by_hand(backend):
    """The recipe without labels is the cross-entropy of MoCo: the key against the key and the queue."""
    queue, criterion = FeatureQueue(5, DIM), GenSupConLoss(temperature=0.2, base_temperature=None, backend=backend)
    past = []
    for step in range(3):
        queries, keys = batch(4, 2 * step)[0], batch(4, 2 * step + 1)[0]
        contrasts = torch.cat([keys, queue.features])
        loss = criterion(queries, label_similarity=torch.eye(4, len(contrasts)), contrast_features=contrasts)
        rows = torch.cat([keys, torch.cat(past)[-5:]]) if past else keys
        logits = nn.functional.normalize(queries.double()) @ nn.functional.normalize(rows.double()).T / 0.2
        expected = nn.functional.cross_entropy(logits, torch.arange(4))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        queue.enqueue(keys)
        past.append(keys)


# ------------------------------------------------------------------ devices
@pytest.mark.parametrize("soft", [False, True])
def test_nothing_reads_the_device(soft):
    """Meta tensors have no values: reading one raises."""
    queue = filled(5, (), soft).to("meta")
    for count in (3, 4, 12, 0):
        queue.enqueue(*(values.to("meta") for values in batch(count, 0, soft)))
        assert queue.features.device.type == queue.labels.device.type == "meta"
    assert len(queue) == 5
    assert repr(queue).endswith("len=5)")
    assert queue.state_dict()["_extra_state"].is_meta


@pytest.mark.parametrize("soft", [False, True])
def test_from_meta_it_comes_empty(soft):
    """`to_empty` gives memory without values: rows there were are gone, and the queue says so."""
    with torch.device("meta"):
        made_there = FeatureQueue(5, DIM, CLASSES if soft else None)
    for queue in (made_there, filled(soft=soft).to("meta")):
        with pytest.raises(ValueError, match=r"^features must be on the device of the queue, meta; got cpu.*to_empty"):
            queue.enqueue(*batch(2, 0, soft))
        nn.Sequential(queue).to_empty(device="cpu")
        assert len(queue) == 0
        assert queue.features.shape == (0, DIM)
        queue.enqueue(*batch(4, 0, soft))
        queue.enqueue(*batch(3, 1, soft))
        assert torch.equal(queue.features, filled(soft=soft).features)
        assert torch.equal(queue.labels, filled(soft=soft).labels)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_on_meta_it_goes_where_the_state_is(soft, assign):
    queue = FeatureQueue(5, DIM, CLASSES if soft else None).to("meta")
    queue.load_state_dict(filled(soft=soft).state_dict(), assign=assign)
    assert_equal(queue, filled(soft=soft))
    queue.enqueue(*batch(2, 0, soft))


def test_a_state_from_meta_has_no_values():
    state = filled().to("meta").state_dict()
    queue = filled()
    with pytest.raises(ValueError, match="^_extra_state: state .* on meta, where there are no values"):
        queue.load_state_dict(state)
    assert_equal(queue, filled())
    queue = filled().to("meta")
    queue.load_state_dict(state)
    assert len(queue) == 5


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_type_casts_no_class_numbers(kind):
    queue, numbers = FeatureQueue(2, DIM), torch.tensor([2**40 + 1, 4097])
    queue.enqueue(torch.zeros(2, DIM), numbers)
    nn.Sequential(queue).type(kind)
    assert queue.features.dtype == kind
    assert queue.labels.dtype == torch.int64  # which `torch.equal` does not look at
    assert torch.equal(queue.labels, numbers)


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64])
def test_rows_stay_floating_point(kind):
    queue = filled()
    with pytest.raises(TypeError, match="^dtype must be floating-point.*FeatureQueue; got torch"):
        queue.type(kind)
    assert_equal(queue, filled())


def test_made_moved_and_loaded_in_inference_mode_it_works_on_outside():
    with torch.inference_mode():
        queue = FeatureQueue(5, DIM).double().float()
        queue.enqueue(*batch(4, 0))
        other = FeatureQueue(5, DIM)
        other.load_state_dict(queue.state_dict())
    for one in (queue, other):
        one.enqueue(*batch(3, 1))
        assert_equal(one, filled())


def test_sharing_memory_keeps_the_rows():
    queue = filled().share_memory()
    assert_equal(queue, filled())
    queue.enqueue(*batch(2, 2))
    assert_equal(queue, filled(counts=(4, 3, 2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    queue, data = filled().cuda(), [values.cuda() for values in batch(4, 7)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = gen_supcon_loss(*data, contrast_features=queue.features, contrast_labels=queue.labels)
        queue.enqueue(*data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = filled()
    assert torch.isfinite(loss)
    on_host.enqueue(*batch(4, 7))
    assert_equal(queue.cpu(), on_host)


# ------------------------------------------------------------------ the rest
def test_beside_a_compiled_loss():
    torch._dynamo.reset()
    compiled, criterion = torch.compile(GenSupConLoss(), backend="eager", fullgraph=True), GenSupConLoss()
    queue = FeatureQueue(9, DIM)
    for step in range(4):
        x, y = batch(4, step)
        rows = {"contrast_features": queue.features, "contrast_labels": queue.labels}
        torch.testing.assert_close(compiled(x, y, **rows), criterion(x, y, **rows))
        queue.enqueue(x, y)


def test_it_shows_its_sizes():
    assert repr(filled()) == "FeatureQueue(size=5, dim=3, len=5)"
    assert repr(FeatureQueue(2, 3, 4)) == "FeatureQueue(size=2, dim=3, num_classes=4, len=0)"


@pytest.mark.parametrize("name", ["size", "dim", "num_classes"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "must be at least 1; got 0"),
        (-3, ValueError, "must be at least 1; got -3"),
        (2.0, TypeError, "must be an integer; got float"),
        (True, TypeError, "must be an integer; got bool"),
        ("4", TypeError, "must be an integer; got str"),
    ],
)
def test_sizes_are_positive_integers(name, value, error, message):
    with pytest.raises(error, match=f"^{name} {message}"):
        FeatureQueue(**{"size": 4, "dim": 3, name: value})


ROWS, HARD, SOFT = torch.zeros(2, DIM), torch.zeros(2, dtype=torch.int64), torch.zeros(2, CLASSES)
WRONG = {
    "features list": (False, [[0.0]], HARD, TypeError, "features must be a tensor; got list"),
    "features int": (False, ROWS.int(), HARD, TypeError, "features must be floating-point; got torch.int32"),
    "features complex": (False, ROWS + 0j, HARD, TypeError, "features must be real; got torch.complex64"),
    "features 1-D": (False, ROWS[0], HARD, ValueError, r"features must be \(B, D\) with D = 3; got shape \(3,\)"),
    "features 3-D": (False, ROWS[:, None], HARD, ValueError, r"features must be \(B, D\) .* \(2, 1, 3\)"),
    "features wide": (False, ROWS[:, :2], HARD, ValueError, r"features must be \(B, D\) .* \(2, 2\)"),
    "features device": (
        False,
        ROWS.to("meta"),
        HARD,
        ValueError,
        "features must be on the device of the queue, cpu; got meta",
    ),
    "labels device": (
        False,
        ROWS,
        HARD.to("meta"),
        ValueError,
        "labels must be on the device of the queue, cpu; got meta",
    ),
    "labels list": (False, ROWS, [0, 1], TypeError, "labels must be a tensor; got list"),
    "features sparse": (False, ROWS.to_sparse(), HARD, TypeError, r"features must be dense; .* features.to_dense\(\)"),
    "labels sparse": (False, ROWS, HARD.to_sparse(), TypeError, r"labels must be dense; .* labels.to_dense\(\)"),
    "hard float": (False, ROWS, HARD.float(), TypeError, "labels must be class numbers.*float32"),
    "hard complex": (False, ROWS, HARD + 0j, TypeError, "labels must be real; got torch.complex64"),
    "hard count": (False, ROWS, HARD[:1], ValueError, r"labels must be \(B,\) with B = 2 .* \(1,\)"),
    "hard 2-D": (False, ROWS, HARD[:, None], ValueError, r"labels must be \(B,\) with B = 2 .* \(2, 1\)"),
    "soft numbers": (True, ROWS, HARD, ValueError, r"labels must be \(B, C\) .* C = 4; .*one_hot"),
    "soft width": (True, ROWS, SOFT[:, :3], ValueError, r"labels must be \(B, C\) .* \(2, 3\)"),
    "soft count": (True, ROWS, SOFT[:1], ValueError, r"labels must be \(B, C\) with B = 2 .* \(1, 4\)"),
    "soft complex": (True, ROWS, SOFT + 0j, TypeError, "labels must be real; got torch.complex64"),
    "soft negative": (True, ROWS, SOFT - 1, ValueError, "labels must be >= 0; the smallest entry is -1"),
    "soft NaN": (True, ROWS, SOFT * NAN, ValueError, "labels has NaN or infinite entries"),
}


@pytest.mark.parametrize(("soft", "features", "labels", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_rows_are_refused_and_change_nothing(soft, features, labels, error, message):
    queue = filled(soft=soft)
    with pytest.raises(error, match=f"^{message}"):
        queue.enqueue(features, labels)
    assert_equal(queue, filled(soft=soft))


def test_features_are_looked_at_if_asked_for():
    queue = filled()
    with validate(), pytest.raises(ValueError, match="^features has NaN or infinite entries"):
        queue.enqueue(ROWS * NAN, HARD)
    queue.enqueue(ROWS * NAN, HARD)
    anchors, labels = batch(3, 0)
    assert gen_supcon_loss(anchors, labels, contrast_features=queue.features, contrast_labels=queue.labels).isnan()
    queue.enqueue(*batch(5, 1))
    assert gen_supcon_loss(anchors, labels, contrast_features=queue.features, contrast_labels=queue.labels).isfinite()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_a_group_is_a_process_group():
    with pytest.raises(
        TypeError, match='^group must be "world", for all processes, or a torch.distributed.ProcessGroup'
    ):
        FeatureQueue(4, DIM, group="all")
    with pytest.raises(ValueError, match="^group.*init_process_group"):  # looked up at each call
        FeatureQueue(4, DIM, group="world").enqueue(ROWS, HARD)


# ------------------------------------------------------------------ several processes
WORLD = 3
UNEVEN = [(2, 5, 0), (3, 1, 4), (0, 0, 0), (7, 0, 0), (0, 0, 1), (9, 9, 9)]  # rows of each process, step by step
# What process 1 does differently: the queue that it makes, rows and labels, and what the others hear.
BROKEN = {
    "features": ({}, (ROWS[:, :2], HARD), r"process 1 could not take part: ValueError: features must be \(B, D\)"),
    "list": ({}, ([[0.0]], HARD), "process 1 could not take part: TypeError: features must be a tensor"),
    "labels": ({}, (ROWS, HARD.float()), "process 1 could not take part: TypeError: labels must be class numbers"),
    "size": ({"size": 6}, (ROWS, HARD), "processes differ in size: 5 on processes 0, 2; 6 on process 1"),
    "dim": ({"dim": 2}, (ROWS[:, :2], HARD), "processes differ in dim: 3 on processes 0, 2; 2 on process 1"),
    "kind": (
        {"num_classes": 4},
        (ROWS, SOFT),
        "processes differ in num_classes: None on processes 0, 2; 4 on process 1",
    ),
    "labels missing": (
        {},
        (ROWS,),
        "processes differ in labels: given on processes 0, 2; missing on process 1",
    ),
    "dtype": (
        {"dtype": torch.float64},
        (ROWS, HARD),
        "processes differ in the dtype of the queue: torch.float32 on processes 0, 2; torch.float64 on",
    ),
    "rows": (
        {"fill": 2},
        (ROWS, HARD),
        "processes differ in the rows in the queue: 0, the next one at 0 on processes 0, 2; 2, ",
    ),
}


def _steps(
    rank: int, size: int, group: object, soft: bool, resume_at: int | None = None, labelled: bool = True
) -> list:
    """What the queue of a process holds after each step."""
    queue, states = FeatureQueue(size, DIM, CLASSES if soft else None, group=group), []
    for step, counts in enumerate(UNEVEN):
        if step == resume_at:
            state = reloaded(queue.state_dict())
            queue = FeatureQueue(size, DIM, CLASSES if soft else None, group=group)
            queue.load_state_dict(state)
        features, labels = batch(counts[rank], 10 * step + rank, soft)
        queue.enqueue(features.requires_grad_(), labels if labelled else None)
        states.append(_seen(queue, labelled))
    return states


def _seen(queue: FeatureQueue, labelled: bool) -> dict:
    labels = {"labels": queue.labels} if labelled else {}
    return {"features": queue.features, **labels, "state": queue.get_extra_state()}


def _broken(rank: int, group: object) -> dict:
    """What each process hears if process 1 goes wrong, and whether its queue can be used afterwards."""
    heard = {}
    for name, (options, rows, _) in BROKEN.items():
        options = dict(options) if rank == 1 else {}
        dtype, fill = options.pop("dtype", torch.float32), options.pop("fill", 0)
        queue = FeatureQueue(**{"size": 5, "dim": DIM, **options}, group=group).to(dtype)
        if fill:  # a queue that was filled elsewhere: only this process resumed
            alone = filled(5, (fill,))
            queue.load_state_dict(alone.state_dict())
        try:
            queue.enqueue(*(rows if rank == 1 else (ROWS, HARD)))
            heard[name] = "nothing"
        except (TypeError, ValueError) as error:
            heard[name] = f"{type(error).__name__}: {error}"
        heard[name] = heard[name], len(queue) == fill
    after = FeatureQueue(5, DIM, group=group)
    after.enqueue(*batch(2, rank))
    return {"errors": heard, "after": after.labels}


def _outsider(pair: object) -> str:
    try:
        FeatureQueue(5, DIM, group=pair)
        return "nothing"
    except ValueError as error:
        return str(error)


def _copied(rank: int, group: object) -> tuple:
    queue = FeatureQueue(5, DIM, group=group)
    twin = copy.deepcopy(queue)
    twin.enqueue(*batch(1, rank))
    try:
        pickle.dumps(queue)
    except TypeError as error:
        return len(twin), len(queue), str(error), repr(queue)
    return len(twin), len(queue), "nothing", repr(queue)


def _in_ddp(rank: int, group: object) -> dict:
    """Queues of their own, of different length, inside of a model that DDP keeps in step."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.norm, self.queue = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), FeatureQueue(5, DIM)

        def forward(self, x, y):
            z = self.norm(self.encoder(x))
            loss = gen_supcon_loss(z, y, contrast_features=self.queue.features, contrast_labels=self.queue.labels)
            self.queue.enqueue(x, y)
            return loss

    model = Model()
    for seed in range(rank + 1):
        model.queue.enqueue(*batch(2, seed))
    wrapped = DistributedDataParallel(model, process_group=group)
    for seed in (20, 30):
        wrapped(*batch(2, seed + rank)).backward()
    expected = [batch(2, seed) for seed in range(rank + 1)] + [batch(2, 20 + rank), batch(2, 30 + rank)]
    same = torch.equal(model.queue.features, torch.cat([x for x, _ in expected])[-5:])
    return {"own rows": same, "gradient": bool(model.encoder.weight.grad.abs().max() > 0)}


def _work() -> dict:
    rank, world, pair = dist.get_rank(), dist.group.WORLD, dist.new_group([0, 1])
    results = {
        "hard": _steps(rank, 11, world, soft=False),
        "soft": _steps(rank, 4, world, soft=True),
        "resumed": _steps(rank, 11, world, soft=False, resume_at=2),
        "unlabelled": _steps(rank, 11, world, soft=False, resume_at=2, labelled=False),
        "broken": _broken(rank, world),
        "pair": _outsider(pair) if rank == 2 else _steps(rank, 11, pair, soft=True),
        "copied": _copied(rank, world),
        "ddp": _in_ddp(rank, world),
    }
    dist.barrier()
    return results


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What three processes found, started once for all tests: starting is what takes the time."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    return distributed.run(WORLD, _work, tmp_path_factory.mktemp("processes"))


def _by_one_process(size: int, soft: bool, ranks: int = WORLD, labelled: bool = True) -> list:
    queue, states = FeatureQueue(size, DIM, CLASSES if soft else None), []
    for step, counts in enumerate(UNEVEN):
        parts = [batch(counts[rank], 10 * step + rank, soft) for rank in range(ranks)]
        rows, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        queue.enqueue(rows, labels if labelled else None)
        states.append(_seen(queue, labelled))
    return states


def _assert_states(states: list, expected: list) -> None:
    assert len(states) == len(expected) == len(UNEVEN)
    for one, other in zip(states, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(one[name], value), name


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize(
    ("name", "size", "soft"),
    [("hard", 11, False), ("soft", 4, True), ("resumed", 11, False), ("unlabelled", 11, False)],
)
def test_all_processes_hold_what_one_would(processes, rank, name, size, soft):
    _assert_states(processes[rank][name], _by_one_process(size, soft, labelled=name != "unlabelled"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_of_two_out_of_three(processes, rank):
    _assert_states(processes[rank]["pair"], _by_one_process(11, True, ranks=2))


def test_a_group_of_others_is_refused(processes):
    assert processes[2]["pair"] == "group does not contain this process"


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", BROKEN)
def test_every_process_hears_what_is_wrong(processes, rank, name):
    heard, unchanged = processes[rank]["broken"]["errors"][name]
    message = BROKEN[name][2]
    own = message.split("could not take part: ")
    # Where the arguments are wrong the error is the plain one; elsewhere it says which process it was.
    expected = own[1] if rank == 1 and len(own) > 1 else f"ValueError: group: {message}"
    assert re.match(expected, heard)
    assert unchanged


@pytest.mark.parametrize("rank", range(WORLD))
def test_the_group_works_on_after_errors(processes, rank):
    expected = torch.cat([batch(2, other)[1] for other in range(WORLD)])[-5:]
    assert torch.equal(processes[rank]["broken"]["after"], expected)


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_copy_keeps_the_group_and_a_pickle_cannot(processes, rank):
    twin, original, error, shown = processes[rank]["copied"]
    assert (twin, original) == (3, 0)
    assert "cannot pickle" in error
    assert shown == "FeatureQueue(size=5, dim=3, group=ProcessGroup, len=0)"


@pytest.mark.parametrize("rank", range(WORLD))
def test_ddp_leaves_queues_of_their_own_alone(processes, rank):
    assert processes[rank]["ddp"] == {"own rows": True, "gradient": True}
