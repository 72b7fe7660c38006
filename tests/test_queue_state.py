"""The saved state of a queue in the hands of others: files, averages of models, wrappers, and version 0.1.0."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import distributed
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from genscl_loss import FeatureQueue

DIM, CLASSES, SIZE = 3, 4, 5
KINDS = ("hard", "soft", "none")  # of labels
KEY = "queue._extra_state"


def batch(count: int, seed: int, kind: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, DIM, generator=generator)
    if kind == "none":
        return (features,)
    if kind == "soft":
        return features, torch.rand(count, CLASSES, generator=generator)
    return features, torch.randint(-(2**40), 2**40, (count,), generator=generator)


class Model(nn.Module):
    """An encoder with buffers of both sorts, and a queue that its forward pass fills."""

    def __init__(self, kind: str = "hard", group: object = None):
        super().__init__()
        self.kind = kind
        self.encoder, self.norm = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)
        self.queue = FeatureQueue(SIZE, DIM, CLASSES if kind == "soft" else None, group=group)

    def forward(self, features: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        z = self.norm(self.encoder(features))
        self.queue.enqueue(features, *labels)
        return z

    def step(self, seed: int, count: int = 4) -> Model:
        self(*batch(count, seed, self.kind))
        return self


def trained(kind: str = "hard", seeds: tuple[int, ...] = (0, 1)) -> Model:
    """A queue that went over its end."""
    model = Model(kind)
    for seed in seeds:
        model.step(seed)
    return model


def bits(model: nn.Module) -> torch.Tensor:
    """All that the queue of a model holds."""
    (queue,) = (module for module in model.modules() if isinstance(module, FeatureQueue))
    return queue.get_extra_state()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# ------------------------------------------------------------------ what it is
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one_tensor_of_integers_that_is_a_copy(kind):
    model = trained(kind)
    state = model.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    assert [name for name in state if name.startswith("queue")] == [KEY]
    assert state[KEY].dtype == torch.int64
    memory = model.queue._features, model.queue._labels
    assert state[KEY].nbytes <= sum(one.nbytes for one in memory) + 8 * 10  # no more than the memory and some numbers
    before = state[KEY].clone()
    model.step(7)
    assert torch.equal(state[KEY], before)
    assert not torch.equal(model.state_dict()[KEY], before)  # of the moment of the call
    after = bits(model)
    state[KEY].zero_()
    assert torch.equal(bits(model), after)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_every_dtype_comes_back_bit_for_bit(dtype, soft, size):
    """Also where the rows do not fill whole words."""
    queues = [FeatureQueue(size, 3, 5 if soft else None).to(getattr(torch, dtype)) for _ in range(2)]
    octets = torch.arange(queues[0]._features.nbytes, dtype=torch.uint8) * 37 + 11  # NaN and infinity among them
    queues[0]._features = octets.view(queues[0]._features.dtype).view(size, 3)
    queues[0]._count = size
    queues[1].load_state_dict(queues[0].state_dict())
    assert torch.equal(queues[1]._features.view(torch.uint8), queues[0]._features.view(torch.uint8))
    assert torch.equal(queues[1].get_extra_state(), queues[0].get_extra_state())


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_it_is_cast_to_the_dtype_of_the_queue(kind, source, target):
    saved, loaded = trained(kind).queue.to(source), Model(kind).queue.to(target)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.features.dtype == target
    assert torch.equal(loaded.features, saved.features.to(target))
    assert torch.equal(loaded.labels, saved.labels.to(loaded.labels.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trip", ["cpu", "clone", "numpy", "strided", "pickle", "mmap", "assign"])
def test_trips_of_a_state(kind, trip, tmp_path):
    model, other = trained(kind), trained(kind, (8, 9, 10))
    state = model.state_dict()
    if trip == "cpu":
        state = {name: value.cpu() for name, value in state.items()}
    elif trip == "clone":
        state = {name: value.detach().clone() for name, value in state.items()}
    elif trip == "numpy":
        state = {name: torch.from_numpy(value.numpy()) for name, value in state.items()}
    elif trip == "strided":
        state = {name: torch.stack([value, value], -1)[..., 1] for name, value in state.items()}
    elif trip == "pickle":
        state = pickle.loads(pickle.dumps(state))
    elif trip == "mmap":
        torch.save(state, tmp_path / "model.pt")
        state = torch.load(tmp_path / "model.pt", mmap=True, weights_only=True)
    other.load_state_dict(state, assign=trip == "assign")
    assert_same(other, model)
    other.step(20)
    assert_same(other, model.step(20))


# ------------------------------------------------------------------ what is refused
def changed(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(state: torch.Tensor) -> torch.Tensor:
        state = state.clone()
        state[index] = value
        return state

    return change


DAMAGED = {
    "cast": (lambda state: state.double(), ValueError, "got torch.float64 .*a cast, or a mean"),
    "narrow": (lambda state: state.int(), ValueError, "got torch.int32"),
    "shape": (lambda state: state[None], ValueError, r"got torch.int64 of shape \(1, \d+\)"),
    "number": (lambda state: state[0], ValueError, r"shape \(\)"),
    "list": (lambda state: state.tolist(), TypeError, "got list"),
    "empty": (lambda state: state[:0], ValueError, "this is something else"),
    "header": (lambda state: state[:7], ValueError, "this is something else"),
    "foreign": (lambda state: torch.zeros_like(state), ValueError, "this is something else"),
    "short": (lambda state: state[:-1], ValueError, r"damaged: \d+ numbers expected; got \d+"),
    "long": (lambda state: torch.cat([state, state[:1]]), ValueError, "damaged: .* numbers expected"),
    "size": (changed(1, 6), ValueError, "of a queue of size 6, dim 3 and num_classes None; this one has size 5"),
    "dim": (changed(2, 2**50), ValueError, f"of a queue of size 5, dim {2**50} "),
    "classes": (changed(3, 4), ValueError, "num_classes 4; this one has size 5, dim 3 and num_classes None"),
    "dtype": (changed(4, 99), ValueError, "damaged: dtype 99"),
    "other dtype": (changed(4, 1), ValueError, "damaged: .* numbers expected"),
    "position": (changed(5, 5), ValueError, "damaged: 5 of 5 rows, the next one at 5"),
    "before": (changed(5, -1), ValueError, "damaged: 5 of 5 rows, the next one at -1"),
    "rows": (changed(6, 6), ValueError, "damaged: 6 of 5 rows"),
    "fewer rows": (changed(6, 2), ValueError, "damaged: 2 of 5 rows, the next one at 3"),
    "labelled": (changed(7, 2), ValueError, "damaged: .* labelled 2"),
    "sum": (lambda state: state + state, ValueError, "or a mean of several"),
    "mean of two": (lambda state: (state + state) // 2, ValueError, "or a mean of several"),
    "mean of three": (lambda state: (state + state + state) // 3, ValueError, "or a mean of several"),
    "mean by way of floats": (lambda state: (0.5 * state + 0.5 * state).long(), ValueError, "or a mean of several"),
    "by way of doubles": (lambda state: (state.double() * 2 / 2).long(), ValueError, "or a mean of several"),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_state_is_refused_by_key_and_changes_nothing(damage, error, message):
    model = trained()
    state = model.state_dict()
    before = bits(model)
    state[KEY] = damage(state[KEY])
    wrapped = nn.ModuleDict({"inner": model})
    with pytest.raises(error, match=rf"^inner\.queue\._extra_state: state (must|is) .*{message}"):
        wrapped.load_state_dict({f"inner.{name}": value for name, value in state.items()})
    assert torch.equal(bits(model), before)
    with pytest.raises(error, match=f"^state (must|is) .*{message}"):
        model.queue.set_extra_state(state[KEY])


def test_a_model_without_a_queue_does_not_know_the_key():
    state = trained().state_dict()
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{re.escape(KEY)}"'):
        nn.ModuleDict({"queue": nn.ModuleDict()}).load_state_dict({KEY: state[KEY]})
    model = trained()
    before = bits(model)
    del state[KEY]
    assert model.load_state_dict(state, strict=False).missing_keys == [KEY]
    assert torch.equal(bits(model), before)


# ------------------------------------------------------------------ version 0.1.0
def model_of_0_1_0() -> nn.ModuleDict:
    return nn.ModuleDict({"hard": FeatureQueue(4, 2), "soft": FeatureQueue(3, 2, 2), "empty": FeatureQueue(2, 1)})


def state_of_0_1_0() -> dict:
    """Made by 0.1.0: six rows (r, r + 0.5), two a step, with labels r, or (r, 1); and a queue without rows."""
    return torch.load(Path(__file__).with_name("queue_0_1_0.pt"), weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_0_1_0_saved_is_loaded(dtype):
    model = model_of_0_1_0().to(dtype)
    assert str(model.load_state_dict(state_of_0_1_0())) == "<All keys matched successfully>"
    for name, size in (("hard", 4), ("soft", 3)):
        rows = torch.arange(6, dtype=dtype)[-size:]
        assert torch.equal(model[name].features, torch.stack([rows, rows + 0.5], 1))
        labels = rows.long() if name == "hard" else torch.stack([rows, torch.ones_like(rows)], 1)
        assert torch.equal(model[name].labels, labels)
        with pytest.raises(ValueError, match="^labels is missing"):
            model[name].enqueue(torch.zeros(1, 2, dtype=dtype))
    model["hard"].enqueue(torch.zeros(1, 2), torch.tensor([9]))
    assert model["hard"].labels.tolist() == [3, 4, 5, 9]
    assert len(model["empty"]) == 0
    model["empty"].enqueue(torch.zeros(1, 1))  # no rows yet: nothing is decided
    again = model_of_0_1_0().to(dtype)
    again.load_state_dict(model.state_dict())
    assert_same(again, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next": 4}, "damaged: 4 of 4 rows, the next one at 4"),
        ({"count": 3}, "damaged: 3 of 4 rows, the next one at 2"),
        ({"features": torch.zeros(4)}, "damaged: features"),
        ({"features": torch.zeros(4, 2, dtype=torch.int64)}, "damaged: features"),
        ({"features": None}, "damaged: features"),
        ({"labels": torch.zeros(4)}, "damaged: labels"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "damaged: 4 features and 3 labels"),
        ({"labels": torch.zeros(4, 2)}, "num_classes 2; this one has size 4, dim 2 and num_classes None"),
        (
            {"features": torch.zeros(5, 2), "labels": torch.zeros(5, dtype=torch.int64)},
            "size 5, .* this one has size 4",
        ),
    ],
)
def test_damage_to_what_0_1_0_saved_is_refused(change, message):
    model, state = model_of_0_1_0(), state_of_0_1_0()
    before = model["hard"].get_extra_state()
    state["hard._extra_state"] = state["hard._extra_state"] | change
    with pytest.raises(ValueError, match=rf"^hard\._extra_state: state .*{message}"):
        model.load_state_dict(state)
    assert torch.equal(model["hard"].get_extra_state(), before)


def test_a_queue_that_0_1_0_pickled_has_labels():
    queue = trained().queue
    del queue.__dict__["_labelled"]  # which 0.1.0 did not know
    loaded = pickle.loads(pickle.dumps(queue))
    assert torch.equal(loaded.labels, trained().queue.labels)
    assert torch.equal(loaded.get_extra_state(), bits(trained()))


# ------------------------------------------------------------------ safetensors and Accelerate
@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_of_a_state(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    model, other = trained(kind), Model(kind)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(other, model)


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_of_a_model(kind, tmp_path):
    from safetensors.torch import load_model, save_model

    model, other = trained(kind), trained(kind, (8, 9, 10))
    model.tied, other.tied = model.encoder, other.encoder  # what `save_model` is there for
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert_same(other, model)
    other.step(20)
    assert_same(other, model.step(20))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(kind, safe, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(trained(kind))
    expected = bits(model)
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    model.step(9)
    assert not torch.equal(bits(model), expected)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(bits(model), expected)
    accelerator.free_memory()


# ------------------------------------------------------------------ averages
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_an_averaged_model_keeps_the_queue_that_it_was_made_with(kind, use_buffers, ema, tmp_path):
    model = trained(kind)
    averaged = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if ema else None, use_buffers=use_buffers and ema
    )
    expected = bits(model)
    for seed in (7, 8, 9):
        model.step(seed)
        with torch.no_grad():
            model.encoder.weight.add_(1)
        averaged.update_parameters(model)
    assert torch.equal(bits(averaged), expected)
    assert torch.equal(bits(model), bits(trained(kind, (0, 1, 7, 8, 9))))
    assert not torch.equal(averaged.module.encoder.weight, model.encoder.weight)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pt")
    other = AveragedModel(Model(kind))
    other.load_state_dict(torch.load(tmp_path / "averaged.pt", weights_only=True))
    assert_same(other, averaged)


def ema_v2(averaged: torch.Tensor, new: torch.Tensor) -> None:
    averaged.copy_(0.9 * averaged + 0.1 * new)


def ema_v3(averaged: torch.Tensor, new: torch.Tensor) -> None:
    if averaged.is_floating_point():
        averaged.lerp_(new, 0.1)
    else:
        averaged.copy_(new)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", [ema_v2, ema_v3])
def test_an_average_in_place_of_the_values_of_states(kind, update):
    """As the averages of timm do it: what they write to is not the memory of the queue."""
    import copy

    model = trained(kind)
    averaged = copy.deepcopy(model)
    expected = bits(model)
    for seed in (7, 8, 9):
        model.step(seed)
        with torch.no_grad():
            model.encoder.weight.add_(1)
            for one, other in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                update(one, other)
    assert torch.equal(bits(averaged), expected)
    assert torch.equal(bits(model), bits(trained(kind, (0, 1, 7, 8, 9))))
    assert not torch.equal(averaged.encoder.weight, model.encoder.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_states_that_copies_integers_has_the_newest_queue(kind):
    model = trained(kind)
    averaged = model.state_dict()
    for seed in (7, 8):
        for name, value in model.step(seed).state_dict().items():
            ema_v3(averaged[name], value)
    other = Model(kind)
    other.load_state_dict(averaged)
    assert torch.equal(bits(other), bits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_states_that_mixes_integers_is_refused_by_key(kind):
    states = [trained(kind, seeds).state_dict() for seeds in ((0, 1), (0, 1, 7))]
    mixed = {name: 0.5 * states[0][name] + 0.5 * states[1][name] for name in states[0]}
    mixed_back = {name: value.to(states[0][name].dtype) for name, value in mixed.items()}
    whole = {
        name: (a + b) / 2 if a.is_floating_point() else (a + b) // 2
        for (name, a), b in zip(states[0].items(), states[1].values(), strict=True)
    }
    for state in (mixed, mixed_back, whole):
        model = Model(kind)
        with pytest.raises(ValueError, match=f"^{re.escape(KEY)}: state must be what a FeatureQueue saves.* a mean"):
            model.load_state_dict(state)
        assert torch.equal(bits(model), bits(Model(kind)))
        del state[KEY]
        model.load_state_dict(state, strict=False)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch 2.8 asks itself for one
# ------------------------------------------------------------------ torch.distributed.checkpoint
@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")  # which it is
@pytest.mark.parametrize("kind", KINDS)
def test_a_distributed_checkpoint_of_one_process(kind, tmp_path):
    model = trained(kind)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "tensors")
    dcp.save({"model": model}, checkpoint_id=tmp_path / "stateful")
    in_place = trained(kind, (8, 9, 10))
    state = {"model": in_place.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "tensors")
    in_place.load_state_dict(state["model"])
    assert_same(in_place, model)
    stateful = trained(kind, (8, 9, 10))
    dcp.load({"model": stateful}, checkpoint_id=tmp_path / "stateful")
    assert_same(stateful, model)
    stateful.step(20)
    assert_same(stateful, model.step(20))


WRAPPERS = ["plain", "ddp", "compiled", "compiled ddp", "fsdp", *["fully_shard"] * distributed.SHARDS]


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if wrapper == "fully_shard":
        fully_shard(model.encoder)
        return fully_shard(model)
    if wrapper == "fsdp":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    if "ddp" in wrapper:
        model = DistributedDataParallel(model)  # which broadcasts buffers: the model has some
    return torch.compile(model, backend="eager") if "compiled" in wrapper else model


def wrapped(wrapper: str, seeds: tuple[int, ...], group: object) -> nn.Module:
    torch.manual_seed(0)
    model, rank = Model("soft", group), dist.get_rank()
    for seed in seeds:
        model.step(100 * rank + seed, count=2 + rank)
    return wrap(model, wrapper)


def through_checkpoints(folder: str, wrapper: str) -> dict[str, bool]:
    """Whether a queue of this process is what it was, after each way to save and to load it."""
    rank, found = dist.get_rank(), {}
    shared = wrapped(wrapper, (0, 1, 2), dist.group.WORLD)
    own = wrapped(wrapper, (0, 1, 2), None)  # of this process, unlike the other's

    loaded = wrapped(wrapper, (5,), None)
    set_model_state_dict(loaded, get_model_state_dict(own))
    found["in memory"] = torch.equal(bits(loaded), bits(own))

    dcp.save({"model": get_model_state_dict(shared)}, checkpoint_id=f"{folder}/shared")
    loaded = wrapped(wrapper, (5,), dist.group.WORLD)
    state = {"model": get_model_state_dict(loaded)}
    dcp.load(state, checkpoint_id=f"{folder}/shared")
    set_model_state_dict(loaded, state["model"])
    found["a shared queue in a checkpoint"] = torch.equal(bits(loaded), bits(shared))

    # What has one name is saved once, by one of the processes: queues of their own need names of their own.
    dcp.save({f"queue{rank}": {"state": bits(own)}}, checkpoint_id=f"{folder}/own")
    state = {f"queue{rank}": {"state": bits(wrapped(wrapper, (5,), None))}}
    dcp.load(state, checkpoint_id=f"{folder}/own")
    found["queues of their own in a checkpoint"] = torch.equal(state[f"queue{rank}"]["state"], bits(own))

    state = get_model_state_dict(own, options=StateDictOptions(full_state_dict=True))
    loaded = wrapped(wrapper, (5,), None)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(loaded, state if rank == 0 else {}, options=options)
    every: list = [None, None]
    dist.all_gather_object(every, bits(own))
    found["the first process's, sent to all"] = torch.equal(bits(loaded), every[0])
    found["they differ"] = not torch.equal(*every)
    return found


def in_training(wrapper: str) -> torch.Tensor:
    """The queue of this process after some steps of a wrapped model, whose forward pass fills it."""
    model = wrapped(wrapper, (0,), None)
    for seed in (20, 30):
        model(*batch(2, seed + dist.get_rank(), "soft")).sum().backward()
    return bits(model)


def all_wrappers(folder: str) -> dict:
    return {name: (through_checkpoints(f"{folder}/{name}", name), in_training(name)) for name in WRAPPERS}


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What two processes found, started once: starting is what takes the time."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("processes")
    return distributed.run(2, all_wrappers, folder, str(folder), limit=180)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_distributed_checkpoint_of_wrapped_models(processes, wrapper, rank):
    found = processes[rank][wrapper][0]
    assert len(found) == 5
    assert all(found.values()), [name for name, right in found.items() if not right]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_leave_the_queue_of_each_process_alone(processes, wrapper, rank):
    model = Model("soft")
    model.step(100 * rank, count=2 + rank)
    for seed in (20, 30):
        model.step(seed + rank, count=2)
    assert torch.equal(processes[rank][wrapper][1], bits(model))
