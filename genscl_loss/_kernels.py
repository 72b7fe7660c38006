"""What Triton kernels of several files share."""

import triton
import triton.language as tl


@triton.jit
def number(X, ON_DEVICE: tl.constexpr):
    """A 0-dim argument: a number of the host, or a tensor that the host has not read."""
    if ON_DEVICE:
        return tl.load(X)
    else:
        return X


@triton.jit
def exponent_of(X):
    """floor(log2 x) of the number x >= 0 at X, float32, held where its negative is an exponent too."""
    exponent = (tl.load(X).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(tl.maximum(exponent, -100), 100)


@triton.jit
def power_of_two(exponent):
    """2 to an exponent in [-126, 127], float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_length(squares):
    """One over the length of a row from the sum of its squares, float64: see `genscl_loss._unit.inverse_lengths`."""
    length = tl.sqrt(squares.to(tl.float64))
    length = tl.where(length < 1e-18, 1.0, length)
    return tl.where(length == float("inf"), float("nan"), 1.0 / length)
