"""What contrast sets cost: the batch beside a queue, weights, an ignored class, each beside the call without.

    python benchmarks/bench_sets.py            # a minute on two CPU cores
    python benchmarks/bench_sets.py --smoke    # seconds: does it run at all?

Forward and backward, hard labels. The calls take turns on the same rows; the ratio is that of medians, and of each turn
apart for its quartiles. Memory is the peak of torch's allocator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import quartiles, take_turns
from meters import peak_of_profile, time_call
from report import describe_machine

from genscl_loss import gen_supcon_loss

CPU = torch.device("cpu")
Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=256, help="samples beside the queue")
    parser.add_argument("--queue", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=8192, help="of the batch that weighs and ignores")
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.n, args.queue, args.rows, args.turns = 16, 64, 48, 2
    torch.manual_seed(0)
    machine = describe_machine(CPU)
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {torch.__version__}, D = {args.d}")
    print(f"\nA queue of {args.queue}, N = {args.n}, beside the queue alone:")
    compare(with_queue(args.n, args.queue, args.d), args.turns)
    print(f"\nN = {args.rows}, tiled, beside the call without:")
    compare(with_weights(args.rows, args.d), args.turns)


def with_queue(n: int, size: int, width: int) -> dict[str, Call]:
    features, queue = torch.randn(n, width, requires_grad=True), torch.randn(size, width)
    labels, of_queue = torch.randint(10, (n,)), torch.randint(10, (size,))

    def call(include_batch: bool) -> Call:
        options = {"contrast_features": queue, "contrast_labels": of_queue, "include_batch": include_batch}
        return lambda: torch.autograd.grad(gen_supcon_loss(features, labels, **options), features)

    return {"queue": call(False), "include_batch": call(True)}


def with_weights(n: int, width: int) -> dict[str, Call]:
    features, labels = torch.randn(n, width, requires_grad=True), torch.randint(10, (n,))

    def call(**options: object) -> Call:
        return lambda: torch.autograd.grad(gen_supcon_loss(features, labels, backend="tiled", **options), features)

    weight = torch.rand(n) + 0.1
    return {"plain": call(), "contrast_weight": call(contrast_weight=weight), "ignore_index": call(ignore_index=3)}


def compare(calls: dict[str, Call], turns: int) -> None:
    for call in calls.values():
        call()  # once before it counts
    times = take_turns([lambda call=call: time_call(call, CPU) for call in calls.values()], turns, 0.0)
    for (name, call), seconds in zip(calls.items(), times, strict=True):
        low, _, high = quartiles([own / first for own, first in zip(seconds, times[0], strict=True)])
        ratio = quartiles(seconds)[1] / quartiles(times[0])[1]
        told = f"{1e3 * quartiles(seconds)[1]:9.1f} ms, {ratio:.3f} of the first ({low:.3f} to {high:.3f})"
        print(f"{name:16} {told}, {peak(call) / 1e6:.1f} MB")


def peak(call: Call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return peak_of_profile(profile)


if __name__ == "__main__":
    main()
