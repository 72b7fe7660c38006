"""Tile shapes of the kernels, for each GPU generation, width of the rows and number of fp16 terms.

A fixed table: nothing is tried out while a program runs, so a batch size never costs seconds when it is first seen, and
the same inputs give the same bits everywhere on one generation. Each line compiles without spilling a register, but for
two of wide rows with Triton 3.9, and on sm_90 copies the next tile while it works on one; the tests compile all of
them. No line was timed yet: `python benchmarks/tune.py` tries others out on a GPU.
"""

from typing import NamedTuple

PAD = 256  # rows are padded to a multiple of this, the largest block of rows or columns in the table
MAX_FEATURES = 1024


class Plan(NamedTuple):
    """How one program works; see `kernels.py` for the names."""

    block_m: int
    block_n: int
    block_edge: int
    block_k: int  # features held at a time; below the width, rows and columns are read piece by piece
    num_warps: int
    num_stages: int
    programs: int  # that fit on one multiprocessor at a time


def width(num_features: int) -> int:
    """Features of a padded row: what the table has lines for."""
    for size in (16, 32, 64, 128, 256, 512, 768):
        if num_features <= size:
            return size
    return MAX_FEATURES


def _plans(text: str) -> dict[tuple[int, int], Plan]:
    """Read lines of "width terms  m n edge k  warps stages programs"."""
    lines = (tuple(map(int, line.split())) for line in text.strip().splitlines())
    return {(width, terms): Plan(*rest) for width, terms, *rest in lines}


# One table for each size of shared memory and kind of tensor core, named after the first chip that has it.
_FORWARD = {
    80: _plans("""
          16 1  128  64 32  16  4 3 3
          32 1  128  64 32  32  4 3 3
          64 1  128  64 32  64  4 3 3
         128 1  128  64 32 128  4 2 3
         256 1  128  64 32  64  4 3 2
         512 1  128 128 64  64  8 3 1
         768 1  128 128 64  64  8 3 1
        1024 1  128 128 64  64  8 3 1
          16 2  128  32 32  16  4 2 3
          32 2  128  32 32  32  4 2 3
          64 2  128  32 32  64  4 2 3
         128 2  128  32 32 128  4 2 2
         256 2  128  64 32  32  8 3 1
         512 2  128  64 32  32  8 3 1
         768 2  128  64 32  32  8 3 1
        1024 2  128  64 32  32  8 3 1
    """),
    89: _plans("""
          16 1  128  64 32  16  4 3 3
          32 1  128  64 32  32  4 3 3
          64 1  128  64 32  64  4 2 3
         128 1  128  64 32 128  4 2 2
         256 1  128  64 32  64  4 3 2
         512 1  128  64 32  64  4 3 2
         768 1  128  64 32  64  4 2 2
        1024 1  128  64 32  64  4 3 2
          16 2  128  32 32  16  4 2 3
          32 2  128  32 32  32  4 2 3
          64 2  128  32 32  64  4 2 2
         128 2   64  32 32 128  4 2 2
         256 2  128  64 32  32  8 3 1
         512 2  128  64 32  32  8 3 1
         768 2  128  64 32  32  8 3 1
        1024 2  128  64 32  32  8 3 1
    """),
    90: _plans("""
          16 1  128 128 64  16  8 3 2
          32 1  128 128 64  32  8 3 2
          64 1  128 128 64  64  8 3 2
         128 1  256  64 32 128  8 3 2
         256 1  128  64 32 256  8 3 1
         512 1  128 256 64  64  8 3 1
         768 1  128 256 64  64  8 3 1
        1024 1  128 256 64  64  8 3 1
          16 2  128 128 64  16  8 3 2
          32 2  128 128 64  32  8 3 2
          64 2  128  64 32  64  8 3 2
         128 2  128  64 32 128  8 3 1
         256 2  128 256 64  32  8 3 1
         512 2  128 256 64  32  8 3 1
         768 2  128 256 64  32  8 3 1
        1024 2  128 256 64  32  8 3 1
    """),
    100: _plans("""
          16 1  128 128 64  16  4 3 2
          32 1  128 128 64  32  4 3 2
          64 1  128 128 64  64  4 3 2
         128 1  128 128 64 128  4 2 2
         256 1  128 128 64 256  8 2 1
         512 1  128 256 64  64  8 3 1
         768 1  128 256 64  64  8 3 1
        1024 1  128 256 64  64  8 3 1
          16 2  128  64 32  16  4 2 2
          32 2  128  64 32  32  4 2 2
          64 2  128  64 32  64  4 2 2
         128 2  128  64 32 128  4 2 1
         256 2  128 128 64  64  8 2 1
         512 2  128 128 64  64  8 2 1
         768 2  128 128 64  64  8 2 1
        1024 2  128 128 64  64  8 2 1
    """),
}
_BACKWARD = {
    80: _plans("""
          16 1   64  64 32  16  4 3 3
          32 1   64  64 32  32  4 3 3
          64 1   64  64 32  64  4 3 3
         128 1   64  64 32 128  4 2 2
         256 1   64  64 16  64  8 2 1
         512 1   64 128 32  64  8 2 1
         768 1   64 128 32  64  8 2 1
        1024 1   64 128 32  64  8 2 1
          16 2   64  32 32  16  4 2 3
          32 2   64  32 32  32  4 2 3
          64 2   64  32 32  64  4 2 2
         128 2  128  32 16 128  8 2 1
         256 2   64  32 16  64  8 2 1
         512 2   64  64 16  32  8 2 1
         768 2   64  64 16  32  8 2 1
        1024 2   64  64 16  32  8 2 1
    """),
    89: _plans("""
          16 1   64  64 32  16  4 3 3
          32 1   64  64 32  32  4 3 3
          64 1   64  64 32  64  4 3 3
         128 1   64  64 32 128  4 2 2
         256 1   64  64 16  64  8 2 1
         512 1   64 128 32  64  8 2 1
         768 1   64 128 32  64  8 2 1
        1024 1   64 128 32  64  8 2 1
          16 2   64  32 32  16  4 2 3
          32 2   64  32 32  32  4 2 3
          64 2   64  32 32  64  4 2 2
         128 2  128  32 16 128  8 2 1
         256 2   64  32 16  64  8 2 1
         512 2   64  64 16  32  8 2 1
         768 2   64  64 16  32  8 2 1
        1024 2   64  64 16  32  8 2 1
    """),
    90: _plans("""
          16 1  128  64 32  16  4 3 2
          32 1  128  64 32  32  4 3 2
          64 1  128  64 32  64  4 3 2
         128 1   64  64 32 128  4 3 3
         256 1  128  64 32 256  8 3 1
         512 1   64 128 32  64  8 3 1
         768 1   64 128 32  64  8 3 1
        1024 1   64 128 32  64  8 3 1
          16 2  128  64 32  16  8 3 2
          32 2  128  64 32  32  8 3 2
          64 2  128  64 32  64  8 3 2
         128 2   64  32 32 128  4 3 2
         256 2  128  32 32 256  8 3 1
         512 2  128 128 64  32  8 3 1
         768 2  128 128 64  32  8 3 1
        1024 2  128 128 64  32  8 3 1
    """),
    100: _plans("""
          16 1  128  64 32  16  4 3 2
          32 1  128  64 32  32  4 3 2
          64 1  128  64 32  64  4 3 2
         128 1  128  64 32 128  4 2 2
         256 1  128  64 32 256  8 2 1
         512 1   64 128 32  64  8 2 1
         768 1   64 128 32  64  8 2 1
        1024 1   64 128 32  64  8 2 1
          16 2  128  64 32  16  4 2 1
          32 2  128  64 32  32  4 2 1
          64 2  128  64 32  64  4 2 1
         128 2   64  64 32 128  4 2 1
         256 2   64 128 32  64  4 2 1
         512 2   64 128 32  64  4 2 1
         768 2   64  64 32  64  4 2 1
        1024 2   64 128 32  64  4 2 1
    """),
}

# Of `kernels.softmax_weights`, for rows that are so wide that the library makes the second product of the gradient.
WIDE = 512
_WEIGHTS = {
    80: _plans("""
         512 1  128 128 128  64  8 3 1
         768 1  128 128 128  64  8 3 1
        1024 1  128 128 128  64  8 3 1
         512 2  128  64  64  32  4 3 1
         768 2  128  64  64  32  4 3 1
        1024 2  128  64  64  32  4 3 1
    """),
    89: _plans("""
         512 1  128  64  64  64  8 3 1
         768 1  128  64  64  64  8 3 1
        1024 1  128  64  64  64  8 3 1
         512 2  128  64  64  32  4 3 1
         768 2  128  64  64  32  4 3 1
        1024 2  128  64  64  32  4 3 1
    """),
    90: _plans("""
         512 1  128 128 128  64  8 3 1
         768 1  128 128 128  64  8 3 1
        1024 1  128 128 128  64  8 3 1
         512 2  128 128 128  64  8 3 1
         768 2  128 128 128  64  8 3 1
        1024 2  128 128 128  64  8 3 1
    """),
    100: _plans("""
         512 1  128  64  64  64  8 3 1
         768 1  128  64  64  64  8 3 1
        1024 1  128  64  64  64  8 3 1
         512 2  128  64  64  64  8 2 1
         768 2  128  64  64  64  8 2 1
        1024 2  128  64  64  64  8 2 1
    """),
}

# Features of the gradient that one program makes when rows are read piece by piece: 256 if not said here. With fewer
# the logits are computed more often; but in two terms there is no room for sums of 256, on sm_90 in registers, on
# sm_100 in tensor memory.
_BLOCK_OUT = {(90, 2): 128, (100, 2): 128}


def forward_plan(chip: int, width: int, terms: int) -> Plan:
    """Plan of `kernels.row_lse`."""
    return _FORWARD[chip][width, terms]


def backward_plan(chip: int, width: int, terms: int) -> tuple[Plan, int]:
    """Plan of `kernels.row_lse_grad`, and how many features of the gradient a program makes."""
    plan = _BACKWARD[chip][width, terms]
    return plan, block_out(chip, width, terms, plan)


def weights_plan(chip: int, width: int, terms: int) -> Plan:
    """Plan of `kernels.softmax_weights`, which has no edge."""
    return _WEIGHTS[chip][width, terms]


def block_out(chip: int, width: int, terms: int, plan: Plan) -> int:
    """How many features of the gradient a program makes: all of them if it holds whole rows."""
    return width if plan.block_k == width else _BLOCK_OUT.get((chip, terms), 256)


def chip(capability: tuple[int, int]) -> int:
    """The table for a compute capability: chips with little shared memory, and unknown ones, share the smallest."""
    exact = {(8, 0): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}
    return exact.get(capability, 89)
