"""What the machine can do at best, measured in the same run: rates of large matrix products, of copies, of exp2."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from contenders import float32_precision
from meters import time_call

from genscl_loss._backends.products import product

# Edge of the square matrices, and how many numbers are copied: more than any cache holds.
SIZES = {"cpu": (1024, 2**26), "cuda": (8192, 2**28), "smoke": (128, 2**20)}
READINGS = 10


def measure_ceilings(device: torch.device, edge: int, copied: int) -> dict[str, float]:
    """Floating-point operations, bytes read plus written, and exponentials, each a second; medians on random data."""
    rates = {f"matmul {name}": rate for name, rate in matmul_rates(device, edge).items()}
    x = torch.randn(copied, device=device)
    y = torch.empty_like(x)
    rates["copy"] = 2 * x.nbytes / seconds(lambda: y.copy_(x), device)
    if device.type == "cpu":  # a tile stays in its cache; on a GPU, memory would be measured instead
        x, y = torch.randn(2**16), torch.empty(2**16)
        rates["exp2"] = x.numel() / seconds(lambda: torch.exp2(x, out=y), device, times=8)
    return rates


def matmul_rates(device: torch.device, edge: int) -> dict[str, float]:
    a, b = torch.randn(2, edge, edge, device=device)

    def rate(dtype: torch.dtype = torch.float32, precision: str = "highest", mm: Callable = torch.mm) -> float:
        x, y = a.to(dtype), b.to(dtype)
        out = torch.empty_like(x)
        with float32_precision(precision):
            return 2 * edge**3 / seconds(lambda: mm(x, y.T, out=out), device)

    if device.type == "cpu":  # by the faster of the two libraries that the package uses
        return {"float32": max(rate(), rate(mm=product))}
    return {
        "bfloat16": rate(torch.bfloat16),
        "float16": rate(torch.float16),
        "tf32": rate(precision="high"),
        "float32": rate(),
    }


def seconds(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    for _ in range(3):
        call()
    return statistics.median(time_call(call, device, times) for _ in range(READINGS))
