"""`cached_backward` is `backward()` of one large graph: in value, gradients, random numbers and buffers."""

from __future__ import annotations

import copy
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscl_loss import GenSupConLoss, cached, cached_backward, gen_supcon_loss

D_IN, D, CHUNK = 6, 5, 4
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def labels_of(n: int) -> Tensor:
    return torch.arange(n) % 3


def net(*layers: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(D_IN, 16), nn.Tanh(), *layers, nn.Linear(16, D)).to(dtype)


class Checkpointed(nn.Module):
    """A network whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.net, self.reentrant = nn.Linear(D_IN, D_IN).double(), net(nn.Dropout(0.3)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, self.first(x), use_reentrant=self.reentrant)


class Cast(nn.Module):
    """A network that returns another dtype than it computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net(), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).to(self.dtype)


def embed(encoder: Callable[[Tensor], Tensor], view: Tensor, chunk_size: int = CHUNK) -> Tensor:
    """One graph of everything. In chunks for the sake of random numbers only, which come chunk by chunk."""
    return torch.cat([encoder(chunk) for chunk in view.split(chunk_size)])


def plain(encoder: Any, inputs: Any, loss: Any, *, chunk_size: int = CHUNK) -> Tensor:
    """What `cached_backward` is to equal."""
    single = isinstance(inputs, Tensor)
    features = embed(encoder, inputs, chunk_size) if single else [embed(encoder, x, chunk_size) for x in inputs]
    value = loss(features)
    value.backward()
    return value.detach()


def results(run: Callable[..., Tensor], module: nn.Module, *args: Any, **options: Any) -> dict[str, Tensor]:
    """The loss, all gradients and buffers of a copy of a module, and the next random number."""
    module = copy.deepcopy(module)
    torch.manual_seed(7)
    found = {"loss": run(module, *args, **options)}
    found |= {f"gradient of {name}": parameter.grad.clone() for name, parameter in module.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    return found | {"next number": torch.rand(())}


def assert_same(encoder: nn.Module, inputs: Any, loss: Any, chunk_size: int = CHUNK, **tolerance: float) -> None:
    ours = results(cached_backward, encoder, inputs, loss, chunk_size=chunk_size)
    exact = results(plain, encoder, inputs, loss, chunk_size=chunk_size)
    assert not ours["loss"].requires_grad
    assert any(value.count_nonzero() for name, value in exact.items() if name.startswith("gradient"))
    torch.testing.assert_close(ours, exact, **(tolerance or EXACT))


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def supcon(features: Any) -> Tensor:
    n = len(features if isinstance(features, Tensor) else features[0])
    return gen_supcon_loss(features, labels_of(n), temperature=0.2)


def towers(features: list[Tensor]) -> Tensor:
    """The second view is the contrast set of the first."""
    return gen_supcon_loss(
        features[0],
        labels_of(len(features[0])),
        contrast_features=features[1],
        contrast_labels=labels_of(len(features[1])),
    )


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "plain": net,
    "dropout": lambda: net(nn.Dropout(0.4)),
    "checkpoint": Checkpointed,
    "layer norm": lambda: net(nn.LayerNorm(16)),
    "batch norm in evaluation": lambda: net(nn.BatchNorm1d(16).eval()),
    "spectral norm": lambda: net(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)), nn.Dropout(0.4)),
    "spectral norm, of old": lambda: net(nn.utils.spectral_norm(nn.Linear(16, 16))),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # says that checkpoint without a graph
def test_reentrant_checkpoints():
    assert_same(Checkpointed(reentrant=True), rows(11, D_IN), supcon)


@pytest.mark.parametrize("n", [4, 8, 11])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_one_view(name, n):
    assert_same(ENCODERS[name](), rows(n, D_IN), supcon)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_views(name):
    assert_same(ENCODERS[name](), [rows(7, D_IN), rows(7, D_IN) + 1], supcon)


@pytest.mark.parametrize("sizes", [(11, 6), (3, 9), (4, 4), (5, 2)])
def test_views_with_different_numbers_of_chunks(sizes):
    assert_same(ENCODERS["dropout"](), tuple(rows(n, D_IN) for n in sizes), towers)


@pytest.mark.parametrize("chunk_size", [1, 3, 11, 100])
def test_chunk_sizes_do_not_matter(chunk_size):
    ours = results(cached_backward, net(), rows(11, D_IN), supcon, chunk_size=chunk_size)
    torch.testing.assert_close(ours, results(plain, net(), rows(11, D_IN), supcon, chunk_size=11), **EXACT)


def test_inputs_of_any_shape():
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, D)
    ).double()
    assert_same(encoder, rows(10, 3, 8, 8), supcon)
    tokens = torch.arange(30).view(10, 3)
    assert_same(nn.Sequential(nn.Embedding(30, 4), nn.Flatten(), nn.Linear(12, D)).double(), tokens, supcon)


def test_a_view_without_part_in_the_loss():
    views = [rows(6, D_IN), rows(6, D_IN) + 1, rows(6, D_IN) - 1]
    assert_same(net(), views, lambda z: gen_supcon_loss(z, labels_of(6), contrast_mode="one"))


def test_no_rows():
    """A share that is empty takes part in what the others average."""
    encoder = net()
    loss = cached_backward(encoder, rows(0, D_IN), lambda z: z.square().sum(), chunk_size=CHUNK)
    assert loss == 0
    assert all(parameter.grad.eq(0).all() for parameter in encoder.parameters())
    assert_same(net(), [rows(0, D_IN), rows(6, D_IN)], lambda z: supcon(z[1]) + z[0].sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings(dtype):
    assert_same(Cast(dtype), rows(11, D_IN), supcon)


def test_gradients_accumulate():
    encoder = net()
    for _ in range(2):
        cached_backward(encoder, rows(6, D_IN), supcon, chunk_size=CHUNK)
    twice = [parameter.grad for parameter in encoder.parameters()]
    encoder = net()
    plain(encoder, rows(6, D_IN), supcon)
    torch.testing.assert_close(twice, [2 * parameter.grad for parameter in encoder.parameters()], **EXACT)


def test_parameters_of_the_loss():
    def run(backward: Any) -> list[Tensor]:
        criterion, head = GenSupConLoss(0.2, learnable_temperature=True).double(), nn.Linear(D, D).double()
        nn.init.eye_(head.weight)
        encoder = net()
        backward(encoder, rows(11, D_IN), lambda z: criterion(head(z), labels_of(11)), chunk_size=CHUNK)
        nn.init.zeros_(head.bias)
        return [parameter.grad for module in (encoder, head, criterion) for parameter in module.parameters()]

    torch.manual_seed(0)
    ours = run(cached_backward)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, run(plain), **EXACT)
    assert ours[-1] != 0


def test_hooks_of_parameters_run_as_often_as_there_are_gradients():
    encoder, seen = net(), []
    encoder[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    cached_backward(encoder, rows(11, D_IN), supcon, chunk_size=CHUNK)
    assert len(seen) == 3


def test_inputs_may_be_parameters():
    encoder, inputs = net(), rows(11, D_IN).requires_grad_()
    cached_backward(encoder, inputs, supcon, chunk_size=CHUNK)
    ours, inputs.grad = inputs.grad, None
    plain(encoder, inputs, supcon)
    torch.testing.assert_close(ours, inputs.grad, **EXACT)


def test_a_function_of_row_numbers():
    """Inputs that are no tensor (a dictionary of tokens and masks) are looked up by number."""
    table, encoder = {"x": rows(11, D_IN), "mask": torch.ones(11, 1).double()}, net()
    cached_backward(lambda i: encoder(table["x"][i] * table["mask"][i]), torch.arange(11), supcon, chunk_size=CHUNK)
    ours = [parameter.grad for parameter in encoder.parameters()]
    encoder = net()
    plain(encoder, rows(11, D_IN), supcon)
    torch.testing.assert_close(ours, [parameter.grad for parameter in encoder.parameters()], **EXACT)


# ---- Random numbers and buffers ----


def test_a_loss_that_draws():
    def noisy(z: Tensor) -> Tensor:
        return supcon(z + 0.1 * torch.randn_like(z))

    assert_same(ENCODERS["dropout"](), rows(11, D_IN), noisy)


def test_random_numbers_of_devices(monkeypatch):
    """With a device that is not there: its state is a number that each call of the encoder raises."""
    state, device = [torch.zeros(())], torch.device("cuda", 3)
    generator = SimpleNamespace(
        get_rng_state=lambda of: state[0] if of == device else pytest.fail(f"{of}"),
        set_rng_state=lambda value, of: state.__setitem__(0, value) if of == device else pytest.fail(f"{of}"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda of: generator)
    encoder, seen = net(), []

    def drawing(x: Tensor) -> Tensor:
        seen.append(state[0].item())
        state[0] = state[0] + 1
        return encoder(x)

    of = cached._Encoder.of

    def elsewhere(*arguments: Any) -> Any:
        return of(*arguments)._replace(devices=[device])

    monkeypatch.setattr(cached._Encoder, "of", elsewhere)
    cached_backward(drawing, rows(11, D_IN), supcon, chunk_size=CHUNK)
    assert (seen, state[0]) == ([0, 1, 2] * 2, 3)


class Counting(nn.Module):
    """A buffer that is written to, one that is replaced, one that is shared and one that a graph elsewhere needs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(D_IN).double())
        self.register_buffer("gain", torch.full((D_IN,), 1.5).double())
        self.register_buffer("none", None)
        self.twin = nn.Module()
        self.twin.register_buffer("calls", self.calls)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.net(x * self.gain * (1 + 0.01 * self.calls) - self.mean)


def test_buffers_are_updated_once_in_each_chunk():
    assert_same(Counting(), rows(11, D_IN), supcon)
    encoder = Counting()
    cached_backward(encoder, rows(11, D_IN), supcon, chunk_size=CHUNK)
    assert encoder.calls == 3
    assert encoder.twin.calls is encoder.calls


def test_graphs_that_know_a_buffer_stay_valid():
    encoder = Counting()
    other = (rows(3, D_IN).requires_grad_() * encoder.gain).sum()
    cached_backward(encoder, rows(11, D_IN), supcon, chunk_size=CHUNK)
    other.backward()


def test_batch_normalisation_sees_chunks_and_a_warning_says_so():
    encoder, found = net(nn.BatchNorm1d(16)), []
    for run in (cached_backward, plain):
        expected = pytest.warns(
            UserWarning, match=r"^encoder has batch normalisation .*\(2\).*chunk of 4 rows.*eval\(\)"
        )
        with expected if run is cached_backward else nullcontext():
            found.append(results(run, encoder, rows(8, D_IN), supcon, chunk_size=CHUNK))
    torch.testing.assert_close(*found, **EXACT)  # running statistics among it
    assert found[0]["2.num_batches_tracked"] == 2
    cached_backward(encoder, [rows(8, D_IN), rows(8, D_IN)], supcon, chunk_size=8)  # as ever: no view is cut
    with pytest.warns(UserWarning, match="batch normalisation"):
        without = net(nn.BatchNorm1d(16, track_running_stats=False).eval())
        cached_backward(without, rows(8, D_IN), supcon, chunk_size=CHUNK)


def test_the_warning_comes_once_and_points_at_the_call(recwarn):
    import warnings

    warnings.simplefilter("default")
    encoder = net(*[nn.BatchNorm1d(16) for _ in range(5)])
    for _ in range(3):
        cached_backward(encoder, rows(8, D_IN), supcon, chunk_size=CHUNK)
    (warning,) = recwarn.list
    assert warning.filename == __file__
    assert "(2, 3, 4 and 2 more)" in str(warning.message)


# ---- Autocast and gradient scalers ----


@pytest.mark.parametrize("cached_weights", [True, False])
def test_autocast(cached_weights):
    encoder, inputs = net(nn.Dropout(0.3), dtype=torch.float32), rows(11, D_IN, dtype=torch.float32)

    def in_chunks(module: nn.Module) -> Tensor:
        """Each chunk with casts of its own, whose gradients are then added in float32."""
        features = []
        for chunk in inputs.split(CHUNK):
            features.append(module(chunk))
            torch.clear_autocast_cache()
        return torch.cat(features)

    def run(module: nn.Module, is_ours: bool, enabled: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=cached_weights):
            with torch.no_grad():
                module(inputs[:1])  # casts of weights without a gradient, which some versions of torch keep
            if is_ours:
                return cached_backward(module, inputs, supcon, chunk_size=CHUNK)
            torch.clear_autocast_cache()
            value = supcon(in_chunks(module))
        value.backward()
        return value.detach()

    ours, exact, full = (results(run, encoder, *flags) for flags in ((True, True), (False, True), (False, False)))
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours["loss"], full["loss"])  # bfloat16 it was
    torch.testing.assert_close(ours, full, rtol=0.1, atol=0.1)


def test_backward_passes_run_outside_of_autocast():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            assert torch.is_autocast_enabled("cpu")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    class Looking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Look.apply(super().forward(x))

    with torch.autocast("cpu", torch.bfloat16):
        inputs = rows(11, D_IN, dtype=torch.float32)
        cached_backward(Looking(D_IN, D), inputs, lambda z: supcon(Look.apply(z)), chunk_size=CHUNK)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 4


def trained(backward: Callable[..., object], scaler: torch.amp.GradScaler) -> list[Tensor]:
    encoder = net(dtype=torch.float32)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for step in range(4):
        factor = float("inf") if step == 2 else 1.0  # a step that the scaler skips
        inputs = rows(11, D_IN, dtype=torch.float32) + step
        optimizer.zero_grad()
        backward(encoder, inputs, lambda z, factor=factor: factor * supcon(z), scaler)
        scaler.step(optimizer)
        scaler.update()
    return [parameter.detach() for parameter in encoder.parameters()]


def test_a_gradient_scaler():
    def ours(encoder: Any, inputs: Any, loss: Any, scaler: Any) -> None:
        value = cached_backward(encoder, inputs, loss, chunk_size=CHUNK, scale=scaler.scale)
        assert value.isinf() or 0 < value < 20  # not the scaled one

    def exact(encoder: Any, inputs: Any, loss: Any, scaler: Any) -> None:
        scaler.scale(loss(encoder(inputs))).backward()

    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    torch.testing.assert_close(trained(ours, scalers[0]), trained(exact, scalers[1]), rtol=1e-5, atol=1e-6)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 512.0


def test_a_number_as_scale():
    encoders = net(), net()
    losses = [
        cached_backward(encoder, rows(6, D_IN), supcon, chunk_size=CHUNK, scale=scale)
        for encoder, scale in zip(encoders, (None, 0.25), strict=True)
    ]
    assert losses[0] == losses[1]
    whole, quarter = ([parameter.grad for parameter in encoder.parameters()] for encoder in encoders)
    torch.testing.assert_close([gradient / 4 for gradient in whole], quarter, **EXACT)


def test_not_finite_is_for_the_scaler_to_see():
    encoder = net()
    encoder[0].weight.data[0] = torch.nan
    assert cached_backward(encoder, rows(6, D_IN), supcon, chunk_size=CHUNK).isnan()
    assert encoder[0].weight.grad.isnan().any()


# ---- Several processes ----

SIZES = {2: [(4, 4), (11, 3)], 3: [(5, 5, 5), (9, 1, 6)]}


def shares_of(sizes: tuple[int, ...], step: int, num_views: int) -> list[list[Tensor]]:
    """Views of the samples of each process."""
    return [[rows(n, D_IN) + step + rank + view for view in range(num_views)] for rank, n in enumerate(sizes)]


def criterion_of(group: Any) -> nn.Module:
    return GenSupConLoss(0.2, group=group, learnable_temperature=True).double()


def encoder_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(16).eval()] if kind == "buffers" else [nn.Dropout(0.3)]
    return net(*layers, nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))) if kind != "fsdp" else net(*layers)


def training_on_one_process(sizes: tuple[int, ...], kind: str, num_views: int) -> list[Tensor]:
    encoder, criterion = encoder_of(kind), criterion_of(None)
    optimizer = torch.optim.SGD([*encoder.parameters(), *criterion.parameters()], lr=0.1)
    vectors = [(name, buffer) for name, buffer in encoder.named_buffers() if "parametrizations" in name]
    for step in range(3):
        features: list[list[Tensor]] = [[] for _ in range(num_views)]
        before = [buffer.clone() for _, buffer in vectors]
        for rank, share in enumerate(shares_of(sizes, step, num_views)):
            torch.manual_seed(10 * step + rank)
            for (_, buffer), start in zip(vectors, before, strict=True):
                buffer.data.copy_(start)  # each process iterates from there, once in each chunk
            for view, inputs in enumerate(share):
                features[view].append(embed(encoder, inputs))
            if rank == 0:
                first = [buffer.clone() for _, buffer in vectors]
        for (_, buffer), end in zip(vectors, first, strict=True):
            buffer.data.copy_(end)  # what DDP sends to all in the next step
        labels = torch.cat([labels_of(n) for n in sizes])
        loss = criterion([torch.cat(view) for view in features], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [loss.detach(), *[parameter.detach() for parameter in [*encoder.parameters(), *criterion.parameters()]]]


def training_on_several(sizes: tuple[int, ...], kind: str, num_views: int) -> tuple[list[float], int]:
    """Errors of the parameters after three steps, relative to training on one process, and averages of gradients."""
    from torch.nn.parallel import DistributedDataParallel

    rank, world, averages = dist.get_rank(), dist.get_world_size(), []
    encoder, criterion = encoder_of(kind), DistributedDataParallel(criterion_of(dist.group.WORLD))
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped: Any = fully_shard(encoder, mesh=init_device_mesh("cpu", (world,)))
    else:
        if kind == "buffers" and rank > 0:
            encoder[2].running_mean += rank  # DDP sends those of the first process
        wrapped = DistributedDataParallel(encoder)

        def counted(state, bucket):
            averages.append(bucket.index())
            return dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future().then(lambda f: f.value()[0])

        wrapped.register_comm_hook(None, counted)
        if kind == "inside":
            wrapped = nn.Sequential(nn.Identity(), wrapped)
    parameters = [*wrapped.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(3):
        if kind == "buffers" and rank > 0 and step > 0:
            encoder[2].running_mean += rank
        share = shares_of(sizes, step, num_views)[rank]
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        labels = labels_of(sizes[rank])
        loss = cached_backward(wrapped, share, lambda z, labels=labels: criterion(z, labels), chunk_size=CHUNK)
        optimizer.step()
    exact = training_on_one_process(sizes, kind, num_views)
    found = [loss, *(getattr(one, "full_tensor", lambda one=one: one)().detach() for one in parameters)]
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
    return errors, len(averages)


def all_of(cases: list[tuple[tuple[int, ...], str, int]]) -> list[tuple[list[float], int]]:
    return [training_on_several(*case) for case in cases]


@pytest.mark.parametrize("world", list(SIZES))
def test_several_processes(world, tmp_path: Path):
    """As many averages as steps, each of all parameters, whatever the numbers of chunks are."""
    cases = [(sizes, "ddp", num_views) for sizes in SIZES[world] for num_views in (1, 2)]
    for found in distributed.run(world, all_of, tmp_path, cases, limit=180):
        assert all(max(errors) < 1e-12 and averages == 3 for errors, averages in found), found


def test_several_processes_otherwise(tmp_path: Path):
    cases = [((11, 3), "buffers", 2), ((11, 3), "inside", 2)]
    cases += [((11, 9), "fsdp", 2)] * distributed.SHARDS  # as many chunks in both
    for found in distributed.run(2, all_of, tmp_path, cases, limit=180):
        assert all(max(errors) < 1e-12 for errors, _ in found), found


def accumulated() -> tuple[int, float]:
    """Averages of gradients in two calls, the first of them inside the caller's `no_sync`, and what is missing."""
    rank, averages = dist.get_rank(), []
    encoder = nn.parallel.DistributedDataParallel(net())
    criterion = GenSupConLoss(0.2, group=dist.group.WORLD)

    def counted(state, bucket):
        averages.append(bucket.index())
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    encoder.register_comm_hook(None, counted)
    for number in range(2):
        with encoder.no_sync() if number == 0 else nullcontext():
            inputs, labels = rows(6, D_IN) + number + rank, labels_of(6)
            cached_backward(encoder, inputs, lambda z, labels=labels: criterion(z, labels), chunk_size=CHUNK)
    exact = net()
    for number in range(2):
        both = exact(torch.cat([rows(6, D_IN) + number, rows(6, D_IN) + number + 1]))
        gen_supcon_loss(both, labels_of(6).repeat(2), temperature=0.2).backward()
    gradients = zip(encoder.parameters(), exact.parameters(), strict=True)
    return len(averages), max(float((one.grad - two.grad).abs().max()) for one, two in gradients)


def test_no_sync_of_the_caller_stays_in_force(tmp_path: Path):
    for averages, error in distributed.run(2, accumulated, tmp_path, limit=180):
        assert averages == 1
        assert error < 1e-12


def wrong_on_the_first() -> dict[str, str]:
    """What each process says where only process 0 has a wrong argument."""
    rank, encoder, draw = dist.get_rank(), net(), torch.Generator().manual_seed(0)
    criterion = GenSupConLoss(group=dist.group.WORLD)

    def noisy(x: Tensor) -> Tensor:
        return encoder(x) + 0.1 * torch.randn(len(x), D, generator=draw)

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    wrong: dict[str, dict[str, Any]] = {
        "chunk_size": {"chunk_size": 0},
        "inputs": {"inputs": "images"},
        "an input": {"inputs": [rows(6, D_IN), None]},
        "scale": {"scale": -1.0},
        "shape": {"encoder": lambda x: x[0]},
        "noise": {"encoder": noisy},
        "failure": {"encoder": broken},
        "labels": {"loss": lambda z: criterion(z, labels_of(5))},
        "nothing": {},
    }
    said = {}
    for name, changed in wrong.items():
        views = [rows(6, D_IN), rows(6, D_IN)] if name == "an input" else rows(6, D_IN)
        arguments = {"encoder": encoder, "inputs": views, "loss": lambda z: criterion(z, labels_of(6)), "chunk_size": 4}
        try:
            said[name] = f"{cached_backward(**arguments | (changed if rank == 0 else {})):.6f}"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
            assert all(parameter.grad is None for parameter in encoder.parameters())
    return said


def test_what_one_process_raises_all_raise(tmp_path: Path):
    first, second = distributed.run(2, wrong_on_the_first, tmp_path, limit=180)
    assert first["nothing"] == second["nothing"]
    assert float(first.pop("nothing")) > 0
    for name, message in first.items():
        begin = "encoder" if name in ("shape", "noise") else "inputs" if name == "an input" else name
        assert begin == "failure" or message.split(": ")[1].startswith(begin), message
        assert second[name].startswith(f"ValueError: group: process 0 could not take part: {message[:100]}"), second[
            name
        ]


# ---- Memory ----


def peak_bytes(call: Callable[[], object]) -> int:
    """Highest sum of allocations minus frees on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("num_views", [1, 2])
def test_memory_is_that_of_the_loss_and_of_a_chunk(num_views):
    n, width, chunk_size = 1024, 1024, 64
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(D_IN, width), *[nn.GELU() for _ in range(16)], nn.Linear(width, 32))
    views = [torch.randn(n, D_IN) for _ in range(num_views)]
    inputs = views if num_views > 1 else views[0]
    cached_backward(encoder, inputs, supcon, chunk_size=n)  # gradients exist: they are no part of the peak
    features = [torch.randn(n, 32, requires_grad=True) for _ in views]
    of_loss = peak_bytes(lambda: torch.autograd.grad(supcon(features), features))
    of_chunk = peak_bytes(lambda: encoder(views[0][:chunk_size]).sum().backward())
    of_all = peak_bytes(lambda: plain(encoder, inputs, supcon, chunk_size=n))
    ours = peak_bytes(lambda: cached_backward(encoder, inputs, supcon, chunk_size=chunk_size))
    embeddings = num_views * n * 32 * 4
    assert ours <= of_loss + of_chunk + embeddings + 100_000  # and the random state of each chunk, 5 kB
    assert of_all > 5 * ours


# ---- Bad input ----


def fails(error: type[Exception], match: str, **changed: Any) -> None:
    """It raises, and leaves no gradient behind."""
    encoder = changed.pop("module", None) or net()
    arguments = {"encoder": encoder, "inputs": rows(6, D_IN), "loss": supcon, "chunk_size": CHUNK} | changed
    with pytest.raises(error, match=f"^{match}"):
        cached_backward(**arguments)
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_chunk_size_below_one(chunk_size):
    fails(ValueError, f"chunk_size must be at least 1; got {chunk_size}", chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [2.0, True, None, "4", torch.tensor(4)])
def test_chunk_size_is_an_integer(chunk_size):
    fails(TypeError, "chunk_size must be an integer; got", chunk_size=chunk_size)


@pytest.mark.parametrize("inputs", [None, 3, "images", {"x": rows(6, D_IN)}, [rows(6, D_IN), None], iter([])])
def test_inputs_of_other_types(inputs):
    fails(TypeError, "inputs must be a tensor .* or a sequence", inputs=inputs)


def test_inputs_without_rows_or_with_a_graph():
    fails(ValueError, "inputs must be .* got none", inputs=[])
    fails(ValueError, "inputs must be .* got a 0-dim tensor", inputs=torch.zeros(()))
    fails(ValueError, "inputs must not have a graph", inputs=rows(6, D_IN).requires_grad_() * 2)


@pytest.mark.parametrize(
    ("returned", "error", "got"),
    [
        (lambda x: None, TypeError, "NoneType"),
        (lambda x: (x, x), TypeError, "tuple"),
        (lambda x: x[:, 0], ValueError, r"shape \(4,\)"),
        (lambda x: x[:, None], ValueError, r"shape \(4, 1, 6\)"),
        (lambda x: x[:2], ValueError, r"shape \(2, 6\)"),
        (lambda x: x.long(), TypeError, r"torch\.int64"),
    ],
)
def test_an_encoder_that_returns_something_else(returned, error, got):
    fails(
        error,
        rf"encoder must return embeddings \(n, D\), one row for each of its n = 4 inputs.*{got}",
        encoder=returned,
    )


def test_an_encoder_that_changes_its_mind():
    module = net()
    calls = iter(range(10))
    fails(ValueError, "encoder must return embeddings of one width", encoder=lambda x: x[:, : 3 + next(calls)])
    other = "encoder must give the same embeddings twice"
    fails(ValueError, other, module=module, encoder=lambda x: module(x) * (1 + 1e-3 * next(calls)))
    calls = iter(range(2))
    fails(ValueError, other, module=module, encoder=lambda x: module(x)[:, : 3 + next(calls)], chunk_size=6)
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        return module(x + 0.01 * torch.randn(x.shape, generator=generator, dtype=x.dtype))

    fails(ValueError, other, module=module, encoder=noisy)
    fails(ValueError, other, module=module, encoder=lambda x: module(x + 0.01 * random.random()))
    learnable = GenSupConLoss(learnable_temperature=True)
    fails(
        ValueError,
        other,
        module=nn.ModuleList([module, learnable]),
        encoder=noisy,
        loss=lambda z: learnable(z, labels_of(6)),
    )


def test_rounding_is_no_change_of_mind():
    """In evaluation without a graph, torch takes other kernels for these layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D_IN, 2, 8, batch_first=True).eval()
    encoder = nn.Sequential(nn.Unflatten(1, (2, D_IN)), layer, nn.Flatten(), nn.Linear(2 * D_IN, D))
    inputs = rows(11, 2 * D_IN, dtype=torch.float32)
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            cached_backward(encoder, inputs, supcon, chunk_size=CHUNK)
    cached_backward(encoder.bfloat16(), inputs.bfloat16(), lambda z: supcon(z.float()), chunk_size=CHUNK)


def test_an_encoder_that_learns_nothing():
    fails(ValueError, "encoder has nothing to learn", encoder=lambda x: x)
    fails(ValueError, "encoder has nothing to learn", module=net().requires_grad_(False))
    fails(TypeError, "encoder must be a module or a function of a tensor; got Tensor", encoder=rows(6, D))


def test_losses_that_are_none():
    fails(TypeError, "loss must be a function", loss=torch.zeros(()))
    fails(TypeError, "loss must return a 0-dim tensor; got float", loss=lambda z: 0.5)
    fails(TypeError, "loss must return a 0-dim tensor; got tuple", loss=lambda z: (z.sum(), 1))
    fails(ValueError, r"loss must return a 0-dim tensor.*got shape \(6,\)", loss=lambda z: z.sum(1))
    fails(ValueError, "loss has no gradient", loss=lambda z: z.detach().sum())
    temperature = torch.ones((), requires_grad=True)
    fails(ValueError, "loss has no gradient for the embeddings", loss=lambda z: z.detach().sum() * temperature)
    fails(ValueError, "labels must be", loss=lambda z: gen_supcon_loss(z, labels_of(5)))
    fails(ValueError, "features must be", inputs=[rows(6, D_IN), rows(5, D_IN)])


def test_cached_weights():
    """They would be those of the first pass, without a gradient."""
    module = net(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    with nn.utils.parametrize.cached():
        fails(ValueError, "encoder must not run inside", module=module)
    assert_same(module, rows(11, D_IN), supcon)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    with context():
        fails(ValueError, r"loss has no gradient under torch\.no_grad\(\)")


def test_scales_that_are_none():
    fails(ValueError, "scale must be finite and > 0; got 0", scale=0)
    fails(ValueError, "scale must be finite and > 0; got nan", scale=float("nan"))
    fails(TypeError, "scale must be a number; got str", scale="1024")
    fails(
        TypeError, "scale must be a number or a function of the loss: .* GradScaler", scale=torch.amp.GradScaler("cpu")
    )
    fails(TypeError, "scale must return the loss times a number, .*; got float", scale=lambda loss: loss.item())


def test_an_error_of_the_encoder_leaves_its_buffers():
    encoder = Counting()
    with pytest.raises(RuntimeError):
        cached_backward(encoder, [rows(6, D_IN), rows(6, D_IN + 1)], supcon, chunk_size=CHUNK)
    assert encoder.calls == 0


@pytest.mark.exhaustive
def test_the_benchmark_runs():
    script = Path(__file__).parents[1] / "benchmarks" / "bench_cached.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^cached_backward +\d.* ms .* of its parts, \d+\.\d MB$", done.stdout, re.MULTILINE)
