"""`cached_backward` beside its parts (two forward passes of the encoder and one backward) and one graph of everything.

    python benchmarks/bench_cached.py            # a minute on two CPU cores
    python benchmarks/bench_cached.py --smoke    # seconds: does it run at all?

Each takes its turn on the same images; memory is the peak of torch's allocator, the network itself not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import quartiles, take_turns
from meters import peak_of_profile, time_call
from report import describe_machine
from torch import Tensor, nn

from genscl_loss import cached_backward, gen_supcon_loss

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=1024, help="images in the batch")
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.n, args.chunk_size, args.turns = 48, 16, 2
    torch.manual_seed(0)
    encoder, images = network(), torch.rand(args.n, 3, 32, 32)
    methods = make_methods(encoder, images, torch.arange(args.n) % 10, args.chunk_size)
    for call in methods.values():
        call()  # once before it counts, and so that gradients exist
    times = take_turns([lambda call=call: time_call(call, CPU) for call in methods.values()], args.turns, 0.0)
    machine = describe_machine(CPU)
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {torch.__version__}: N = {args.n} in chunks of", end=" "
    )
    print(args.chunk_size)
    of_parts = quartiles(times[1])[1]
    for (name, call), seconds in zip(methods.items(), times, strict=True):
        low, median, high = quartiles(seconds)
        told = f"{1e3 * median:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f}), {median / of_parts:.3f} of its parts"
        print(f"{name:16} {told}, {peak(call) / 1e6:.1f} MB")


def network() -> nn.Module:
    def stage(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]

    convolutions = [*stage(3, 32), *stage(32, 64), *stage(64, 128)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128 * 16, 128))


def make_methods(
    encoder: nn.Module, images: Tensor, labels: Tensor, chunk_size: int
) -> dict[str, Callable[[], object]]:
    chunks, gradient = images.split(chunk_size), torch.randn(chunk_size, 128)

    def loss(z: Tensor) -> Tensor:
        return gen_supcon_loss(z, labels)

    def parts() -> None:
        with torch.no_grad():
            for chunk in chunks:
                encoder(chunk)
        for chunk in chunks:
            encoder(chunk).backward(gradient[: len(chunk)])

    return {
        "cached_backward": lambda: cached_backward(encoder, images, loss, chunk_size=chunk_size),
        "its parts": parts,
        "one graph": lambda: loss(encoder(images)).backward(),
    }


def peak(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return peak_of_profile(profile)


if __name__ == "__main__":
    main()
