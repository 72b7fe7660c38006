"""A kernel that can go beyond 32 bits."""

import triton
import triton.language as tl


@triton.jit
def squares(x):
    value = tl.load(x)
    tl.store(x, value * value)
