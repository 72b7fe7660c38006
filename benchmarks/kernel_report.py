"""What the compiler makes of the Triton kernels: registers, spills, shared memory, instructions. Needs no GPU.

    python benchmarks/kernel_report.py                                    # each line of the tile tables, for each GPU
    python benchmarks/kernel_report.py --arch 90 --widths 128 --all       # all variants of a kernel
    python benchmarks/kernel_report.py --widths 128 --labels hard soft    # the kernels of the half about labels
    python benchmarks/kernel_report.py --arch 90 --widths 128 --terms 1 --kernel row_lse --plan "128 64 32 128 4 2 3"

The launches are those of `genscl_loss._backends.fused` itself: it runs on tensors without memory, and an object that
notes the arguments stands where the kernels are. The command ends with 1 if a kernel spills, exceeds a multiprocessor,
became a trap for want of tensor memory, or loses the overlap of matrix products with other instructions, none of which
Triton says by itself.

Columns of the table:
    regs, spill, shared, fit   registers of a thread, bytes spilled to memory, KB of a program, and how many programs
                               fit on a multiprocessor at a time / should, by the tile table
    instr                      machine instructions of a thread in the main loop, predicated ones included, over the
                               entries of its tile; too many on sm_100, where loops that wait for matrix products are
                               inside the main loop and are taken for parts of it
    issue, exp, mma, shared, L2, bound
                               a model, not a measurement: see `model`
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # kernels that are interpreted cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from genscl_loss import _linear_fused, _linear_kernels
from genscl_loss._backends import fused, kernels, plans
from genscl_loss._positives import fused as label_half
from genscl_loss._positives import kernels as label_kernels

WIDTHS = (16, 32, 64, 128, 256, 512, 768, 1024)
TABLED = ("row_lse", "row_lse_grad", "softmax_weights")  # which have lines in the tile tables
KERNELS = (*TABLED, "rescale", "split_rows", "gradient_weights", "merge_lse")
LABEL_KERNELS = (
    "inverse_lengths", "first_of_class", "label_sums", "sums_of_others", "class_sums", "align", "align_classes",
    "align_grad", "align_classes_grad", "losses", "losses_grad",
)  # fmt: skip
MODULES = (kernels, label_kernels, _linear_kernels)
RANGES = ("fixed", "online", "check", "weighted")  # of exponents: see `fused._variants`
PROBLEMS = ("self", "ragged", "rectangular", "first")


class Chip(NamedTuple):
    """One GPU generation: what a multiprocessor has, and how much of it one program may take."""

    multiprocessors: int
    shared: int  # KB
    shared_per_program: int
    threads: int
    flops: int  # of fp16 matrix products with float32 sums, per cycle


CHIPS = {
    80: Chip(108, 164, 163, 2048, 2048),  # A100
    89: Chip(142, 100, 99, 1536, 1024),  # L40S
    90: Chip(132, 228, 227, 2048, 4096),  # H100, H200
    100: Chip(148, 228, 227, 2048, 8192),  # B200
}
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100
PREFETCHING = (90,)  # whose lines have to
FAST_FLOAT64 = (80, 90, 100)
FLOAT64_TENSOR_CORES = (80, 90)  # that every Triton uses: on sm_100 it does from 3.9 on
L2_BYTES = 32  # per cycle and multiprocessor: an assumption


# ---- Recording launches ----


class Launch(NamedTuple):
    """All that the compiled code of a kernel depends on."""

    arch: int
    kernel: str
    range: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    programs: int  # that should fit at a time; 0 if nothing relies on it


def kernel_named(name: str) -> Any:
    """The kernel, or whatever a module of kernels has by that name."""
    return next(getattr(module, name) for module in MODULES if hasattr(module, name))


class _Recorder:
    """Stands where `fused` expects the module of kernels, and notes each launch."""

    def __init__(self, arch: int) -> None:
        self.backend = make_backend(GPUTarget("cuda", arch, 32))
        self.launches: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        kernel = kernel_named(name)
        if not isinstance(kernel, JITFunction):
            return kernel
        binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)

        def note(*args: Any, **options: Any) -> None:
            bound, specialization, rest = binder(*args, **options)
            _, signature, constants, attributes = kernel._pack_args(self.backend, options, bound, specialization, rest)
            named = {kernel.arg_names[index]: value for (index,), value in constants.items()}
            self.launches.append((name, (signature, named, attributes, rest)))

        return _AnyGrid(note)


class _AnyGrid:
    def __init__(self, note: Any) -> None:
        self.note = note

    def __getitem__(self, grid: Any) -> Any:
        return self.note


def record(
    arch: int, width: int, terms: int, problem: str, range: str, plan: plans.Plan | None = None
) -> Iterator[Launch]:
    """Launches of a forward and a backward pass; with `plan`, as if the tile tables had this line.

    Of wide rows also those that make the gradient in chunks.

    Args:
        arch: Compute capability, 80 for 8.0.
        width: Number of features.
        terms: fp16 terms of a number.
        problem: "self", a self-contrast; "ragged", one with few rows, of numbers that are no multiples of anything;
            "rectangular", other rows as contrasts; "first", that with self terms.
        range: "fixed", one shift for all exponents; "online", a running maximum; "check", the device chooses;
            "weighted", a running maximum, and weights of the contrasts.
        plan: In place of the table's line.
    """
    launches = list(_record(arch, width, terms, problem, range, plan, in_chunks=False))
    yield from launches
    if width >= plans.WIDE:
        others = {launch.kernel for launch in launches}
        in_chunks = _record(arch, width, terms, problem, range, plan, in_chunks=True)
        yield from (launch for launch in in_chunks if launch.kernel not in others)


def _record(
    arch: int, width: int, terms: int, problem: str, range: str, plan: plans.Plan | None, *, in_chunks: bool
) -> Iterator[Launch]:
    rows, features = (1001, width - 1) if problem == "ragged" else (1 << (13 if in_chunks else 16), width)
    anchors = torch.empty(rows, features, device="meta")
    contrasts = torch.empty(rows, features, device="meta") if problem in ("rectangular", "first") else None
    left_out = [] if problem == "rectangular" else [0]
    scale = torch.tensor(10.0, device="meta" if range == "check" else "cpu")
    unit = range != "online"
    weight = torch.empty(rows if contrasts is None else len(contrasts), device="meta") if range == "weighted" else None
    recorder = _Recorder(arch)
    replaced: dict[str, Any] = {
        "_kernels": lambda: recorder,
        "_chip": lambda device: arch,
        "_FEW_PAIRS": 0 if in_chunks else 1 << 62,
        "_multiply": lambda *_: None,
        "_multiprocessors": lambda device: CHIPS[arch].multiprocessors,
    }
    if plan is not None:
        block_out = plans.block_out(arch, width, terms, plan)
        replaced["forward_plan"] = lambda *line: plan
        replaced["backward_plan"] = lambda *line: (plan, block_out)
        replaced["weights_plan"] = lambda *line: plan
    with mock.patch.multiple(fused, **replaced):
        lse, sums, split, other = fused.row_lse(
            anchors, contrasts, scale, weight, left_out, unit, "highest" if terms == 2 else "high"
        )
        m = rows if contrasts is None else len(contrasts)
        fused.row_lse_grad(lse, sums, split, other, scale, weight, left_out, unit, m, features, m)
    tables = {"row_lse": plans._FORWARD, "row_lse_grad": plans._BACKWARD, "softmax_weights": plans._WEIGHTS}
    lines = {kernel: plan or table[arch].get((width, terms)) for kernel, table in tables.items()}
    programs = {kernel: line.programs for kernel, line in lines.items() if line}
    for kernel, launch in recorder.launches:
        yield Launch(arch, kernel, range, *launch, programs.get(kernel, 0))


def record_labels(arch: int, width: int, classes: int, labels: str, problem: str) -> Iterator[Launch]:
    """Launches of the label half, and of what joins both, in a forward and a backward pass of the whole loss.

    Args:
        arch: Compute capability.
        width: Number of features.
        classes: Number of classes, of soft labels.
        labels: "hard", class numbers, or "soft", or "both", soft ones and a teacher's.
        problem: As in `record`.
    """
    rows, features = (1001, width - 1) if problem == "ragged" else (1 << 13, width)
    anchors = torch.empty(rows, features, device="meta")
    contrasts = torch.empty(rows, features, device="meta") if problem in ("rectangular", "first") else None
    self_offset = None if problem == "rectangular" else 0
    recorder = _Recorder(arch)
    is_hard = labels == "hard"

    def some() -> torch.Tensor:
        shape = (rows,) if is_hard else (rows, classes)
        return torch.empty(shape, dtype=torch.int64 if is_hard else torch.float32, device="meta")

    pair = (some(), None if contrasts is None else some())
    all_labels = [pair] * (2 if labels == "both" else 1)
    is_fast = arch in FAST_FLOAT64
    with (
        mock.patch.multiple(
            fused,
            _kernels=lambda: recorder,
            _chip=lambda device: arch,
            _multiprocessors=lambda device: CHIPS[arch].multiprocessors,
        ),
        mock.patch.multiple(label_half, _kernels=lambda: recorder, has_fast_float64=lambda device: is_fast),
        mock.patch.object(_linear_fused, "_kernels", lambda: recorder),
    ):
        if not _linear_fused.suits(anchors, contrasts, all_labels, self_offset, True):
            return
        if is_hard:
            label_half.class_numbers(*pair)
        scale = torch.tensor(10.0)
        loss, *kept = _linear_fused.losses(
            anchors, contrasts, scale, None, all_labels, self_offset, "highest", is_probability=True
        )
        _linear_fused.losses_grad(
            loss, anchors, contrasts, scale, None, all_labels, kept, self_offset, 0 if contrasts is None else rows, True
        )
    for kernel, launch in recorder.launches:
        if kernel in LABEL_KERNELS:
            yield Launch(arch, kernel, labels, *launch, 0)


# ---- Compiling them ----


class Compiled(NamedTuple):
    """A compiled kernel, as the tools that come with Triton see it."""

    registers: int
    spilled: int  # bytes stored and loaded
    stack: int
    shared: int
    tensor_memory: int  # columns
    serialized: bool  # whether the assembler gave up running matrix products beside other instructions
    float64_products: int  # instructions of the tensor cores
    in_flight: int | None  # copies to shared memory under way while the main loop is at a tile; None: there are none
    is_trap: bool  # whether the assembler made a kernel that writes nothing and only reports an error when it runs
    loop: dict[str, float]  # how often the main loop has each machine instruction, by its name


def compile_launch(launch: Launch) -> Compiled:
    """Compile a kernel as Triton does when it is first launched."""
    kernel = kernel_named(launch.kernel)
    constants = {(kernel.arg_names.index(name),): value for name, value in launch.constants.items()}
    source = ASTSource(kernel, launch.signature, constants, launch.attributes)
    # The assembler's remarks are printed when it runs, hence neither a quiet assembler nor a cached result.
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    remarks = io.StringIO()
    with contextlib.redirect_stdout(remarks):
        made = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    log = remarks.getvalue()
    lines = _disassemble(made.asm["cubin"])
    is_trap = not any((_instruction(line) or "").startswith(("STG", "RED", "ATOM")) for line in lines)
    is_tiled = "BLOCK_EDGE" in launch.constants
    return Compiled(
        registers=_number(r"Used (\d+) registers", log),
        spilled=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        shared=made.metadata.shared,
        tensor_memory=getattr(made.metadata, "tmem_size", None) or 0,
        serialized="serialized" in log,
        float64_products=sum((_instruction(line) or "").startswith("DMMA") for line in lines),
        in_flight=_in_flight(made.asm["ttgir"]),
        is_trap=is_trap,
        loop=_main_loop(lines, launch) if is_tiled and not is_trap else {},
    )


def _in_flight(text: str) -> int | None:
    """Of the first loop that waits for copies: those that it does not wait for, issued one turn or more ahead."""
    found = re.search(r"ttg\.async_wait %[^{]*\{num = (\d+)", text)
    return int(found[1]) if found else None


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the assembler's remarks lack {pattern!r}: {text!r}")
    return int(found[1])


def _disassemble(cubin: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.nvdisasm.path
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return text.splitlines()


def _instruction(line: str) -> str | None:
    """Its name; a matrix product that reads its rows, too, from shared memory has one of its own."""
    found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]+)(?:\s+\w+, (gdesc))?", line)
    return found[1] + (".SHARED" if found[2] else "") if found else None


def _main_loop(lines: list[str], launch: Launch) -> dict[str, float]:
    """The loop over tiles that need no mask. If it holds a loop over pieces of a row, that counts as often as it runs.

    Of the loops with exponentials it has the most, as the other one takes narrower tiles. How often the loop inside it
    runs is seen from the matrix products that have to be in a tile.
    """
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        found = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if found and labels.get(found[1], i) < i:
            ends[labels[found[1]]] = i
    constants, warps = launch.constants, launch.options["num_warps"]
    entries = constants["BLOCK_M"] * constants["BLOCK_N"] // (32 * warps)
    exponentials = {loop: count for loop in ends.items() if (count := _count(lines, [loop]).get("MUFU.EX2", 0))}
    innermost = [a for a in exponentials if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in exponentials)]
    first, last = max(innermost, key=exponentials.__getitem__)
    inside = [
        loop for loop in ends.items() if first < loop[0] and loop[1] < last and _products(_count(lines, [loop]), warps)
    ]
    counts = _count(lines, [(first, last)])
    if inside:
        # Warps may repeat each other's logits: then they take as many more exponentials.
        repeats = counts["MUFU.EX2"] // (entries * _exponentials(constants))
        products = repeats * _products_of_logits(constants) + _products_of_gradient(constants)
        more = (products - _products(counts, warps)) / _products(_count(lines, inside), warps)
        for name, count in _count(lines, inside).items():
            counts[name] += more * count
    return counts


def _count(lines: list[str], loops: Iterable[tuple[int, int]]) -> dict[str, float]:
    names = [_instruction(line) for first, last in loops for line in lines[first : last + 1]]
    return {name: float(names.count(name)) for name in dict.fromkeys(names) if name}


def _products(counts: dict[str, float], warps: int) -> float:
    """Multiplications in matrix products of all warps of a program; 0 where instructions do not show them (sm_100)."""
    total = 0.0
    for name, count in counts.items():
        if name.startswith("HMMA.16816"):
            total += count * 16 * 8 * 16 * warps
        elif found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
            total += count * int(found[1]) * int(found[2]) * int(found[3]) * warps / 4
    return total


def _products_of_logits(constants: dict[str, Any]) -> int:
    return constants["BLOCK_M"] * constants["BLOCK_N"] * constants["WIDTH"] * (3 if constants["TERMS"] == 2 else 1)


def _products_of_gradient(constants: dict[str, Any]) -> int:
    return _products_of_logits(constants) * constants.get("BLOCK_OUT", 0) // constants["WIDTH"]


def _exponentials(constants: dict[str, Any]) -> int:
    """For each entry of a tile."""
    return 1 if constants["FIXED"] or not (constants.get("ROW_TERM") and constants.get("COL_TERM")) else 2


# ---- What follows from them ----


def fit(launch: Launch, made: Compiled) -> int:
    """How many programs are on one multiprocessor at a time."""
    chip, warps = CHIPS[launch.arch], launch.options.get("num_warps", 4)
    limits = [chip.threads // (32 * warps), chip.shared * 1024 // (-(-made.shared // 128) * 128 + 1024)]
    # Each quarter of a multiprocessor has a quarter of the registers and of the warps.
    warps_of_quarter = (1 << 14) // (-(-made.registers // 8) * 8 * 32)
    limits.append(warps_of_quarter * 4 // warps)
    if made.tensor_memory:
        limits.append(TENSOR_MEMORY // made.tensor_memory)
    return min(limits)


def faults(launch: Launch, made: Compiled) -> list[str]:
    """What must not be; nothing if all is well."""
    found = []
    if made.is_trap:
        found.append("compiled into a trap")
    if made.tensor_memory > TENSOR_MEMORY:
        found.append(f"{made.tensor_memory} columns of tensor memory")
    if made.spilled or (made.stack and launch.arch < 100):
        found.append(f"{made.spilled} bytes spilled, {made.stack} bytes of stack")
    if made.shared > CHIPS[launch.arch].shared_per_program * 1024:
        found.append(f"{made.shared / 1024:.0f} KB of shared memory")
    if launch.kernel in ("label_sums", "align", "align_grad") and launch.arch in FLOAT64_TENSOR_CORES:
        found += [] if made.float64_products else ["products of float64 without tensor cores"]
    if launch.kernel in TABLED and made.in_flight == 0 and launch.arch in PREFETCHING:
        found.append("no prefetch: the main loop waits for what it has just asked for")
    if made.serialized:
        found.append("serialized matrix products")
    if (programs := fit(launch, made)) < max(launch.programs, 1):
        found.append(f"{programs} programs fit, {launch.programs} should")
    return found


class Model(NamedTuple):
    """Cycles that one multiprocessor needs for 128 rows and 128 columns. A model, not a measurement."""

    issue: float
    exp: float
    mma: float
    shared: float
    l2: float
    bound: float


def per_pair(launch: Launch, made: Compiled) -> float:
    """Machine instructions of the main loop of a thread, over the entries of its tile."""
    entries = launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"] / (32 * launch.options["num_warps"])
    return sum(made.loop.values()) / entries


def model(launch: Launch, made: Compiled) -> Model:
    """What keeps each unit busy in the main loop, and the least time that this implies.

    A multiprocessor issues 4 instructions per cycle for 32 threads each, takes 16 exponentials, `Chip.flops` of matrix
    products, moves 128 bytes to or from shared memory, and reads L2_BYTES. No unit can do better than its own share;
    a program waits for its matrix products before it takes exponentials, so that only programs side by side overlap
    the two. Nothing is said about latencies.
    """
    c, chip = launch.constants, CHIPS[launch.arch]
    tile, width, planes = c["BLOCK_M"] * c["BLOCK_N"], c["WIDTH"], c["TERMS"]
    pieces, out = c["BLOCK_K"] < width, c.get("BLOCK_OUT", 0)
    columns = width + (out if pieces else 0)
    loaded = 2 * planes * (c["BLOCK_N"] * columns + (c["BLOCK_M"] * width if pieces else 0))
    repeats = -(-width // out) if out else 1  # programs that share a block of rows repeat each other's exponentials
    exponentials = sum(count for name, count in made.loop.items() if name.startswith("MUFU"))
    scale = repeats * 128 * 128 / tile
    issue = scale * sum(made.loop.values()) * launch.options["num_warps"] / 4
    exp = scale * exponentials * 32 * launch.options["num_warps"] / 16
    products = _products(made.loop, launch.options["num_warps"]) or _products_of_logits(c) + _products_of_gradient(c)
    mma = scale * 2 * products / chip.flops
    shared = scale * sum(count * _shared_bytes(name) for name, count in made.loop.items())
    shared *= launch.options["num_warps"] / 128
    l2 = scale * loaded / L2_BYTES
    programs = max(fit(launch, made), 1)
    bound = max(issue, exp, mma, shared, l2, (max(mma, shared) + max(issue, exp)) / programs)
    return Model(issue, exp, mma, shared, l2, bound)


def _shared_bytes(name: str) -> float:
    """Bytes of shared memory that an instruction of one warp reads or writes."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):  # of four warps
        rows, cols, depth = (int(number) for number in found.groups())
        return 2 * depth * (cols + (rows if name.endswith("SHARED") else 0)) / 4
    if found := re.match(r"(?:LDSM|STSM)\..*?(\d)(?:\.|$)", name.replace("16.M", "M").replace("M88.", "")):
        return 128.0 * int(found[1])
    if re.match(r"(LDS|STS|LDGSTS)\b", name):
        return 512.0 if "128" in name else 256.0 if "64" in name else 128.0
    return 0.0


# ---- The command ----


def _case(launch: Launch) -> str:
    """What a launch computes, in a few words."""
    c = launch.constants
    words = []
    if launch.kernel in LABEL_KERNELS:
        words = [launch.range]
    if "AS_ANCHOR" in c:
        words.append({(1, 1): "both", (1, 0): "rows", (0, 1): "cols"}[c["AS_ANCHOR"], c["AS_CONTRAST"]])
    if "FIXED" in c:
        words = [launch.range if launch.range != "check" else "check" + ("+" if c["FIXED"] else "-")]
    if "ROW_TERM" in c:
        words.append({(True, True): "both", (True, False): "rows", (False, True): "cols"}[c["ROW_TERM"], c["COL_TERM"]])
    if c.get("HAS_SELF"):
        words.append("self")
    if c.get("PARTIAL"):
        words.append("part")
    features = list(launch.signature).index("num_features") if "num_features" in launch.signature else None
    if features is not None and not launch.attributes.get((features,)):
        words.append("odd")
    return " ".join(words)


def _row(launch: Launch, made: Compiled) -> SimpleNamespace:
    """A line of the table, also as it is saved."""
    c = launch.constants
    row = SimpleNamespace(arch=launch.arch, kernel=launch.kernel, width=c.get("WIDTH"), terms=c.get("TERMS"))
    row.case = _case(launch)
    row.tile = [c[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_EDGE", "BLOCK_K") if name in c and "BLOCK_EDGE" in c]
    row.warps, row.stages = launch.options.get("num_warps", 4), launch.options.get("num_stages", 3)
    row.registers, row.spilled, row.stack, row.shared = made.registers, made.spilled, made.stack, made.shared
    row.in_flight = made.in_flight
    row.float64_products = made.float64_products
    row.serialized, row.is_trap, row.tensor_memory = made.serialized, made.is_trap, made.tensor_memory
    row.fit, row.programs = fit(launch, made), launch.programs
    row.per_pair = per_pair(launch, made) if made.loop else None
    row.model = model(launch, made)._asdict() if made.loop else None
    row.faults = faults(launch, made)
    return row


_HEADER = (
    f"{'arch':>6} {'kernel':16} {'case':20} {'width':>5} x  {'m':>3} {'n':>3} {'edge':>4} {'k':>4} {'w':>2} s"
    f"  {'regs':>4} {'spill':>5} {'shared':>6} {'fit':>4} {'instr':>5}"
    f"  {'issue':>6} {'exp':>6} {'mma':>6} {'shared':>6} {'L2':>6} {'bound':>6}"
)


def _format(row: SimpleNamespace) -> str:
    tile = "{:>3} {:>3} {:>4} {:>4}".format(*row.tile) if row.tile else " " * 17
    text = (
        f"sm_{row.arch:<3} {row.kernel:16} {row.case:20} {row.width or '':>5} {row.terms or '':1}"
        f"  {tile} {row.warps:>2} {row.stages:>1}"
        f"  {row.registers:>4} {row.spilled:>5} {row.shared / 1024:>5.0f}K {f'{row.fit}/{row.programs}':>4}"
    )
    if row.model:
        numbers = (row.model[name] for name in ("issue", "exp", "mma", "shared", "l2", "bound"))
        text += f" {row.per_pair:>5.2f}  " + " ".join(f"{number:>6.0f}" for number in numbers)
    return text + "".join(f"  FAULT: {fault}" for fault in row.faults)


def _work(launch: Launch) -> SimpleNamespace:
    try:
        return _row(launch, compile_launch(launch))
    except Exception as error:
        raise RuntimeError(f"cannot compile {launch}") from error


def kind(launch: Launch) -> str:
    """What registers and memory depend on: how many pieces a row is read in, if it is, is the length of a loop."""
    constants = dict(launch.constants)
    if constants.get("BLOCK_K", constants.get("WIDTH")) != constants.get("WIDTH"):
        constants["WIDTH"] = "pieces"
    return repr(launch._replace(constants=constants))


def report(launches: Iterable[Launch], *, by_kind: bool = False) -> Iterator[SimpleNamespace]:
    """Lines of the table, in order, compiled in as many processes as there are cores; one of each kind, if so."""
    found: dict[str, list[Launch]] = {}
    for launch in {repr(launch): launch for launch in launches}.values():
        found.setdefault(kind(launch) if by_kind else repr(launch), []).append(launch)
    unique = [alike[0] for alike in found.values()]
    # A fresh process each, as this one may hold threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(unique)), mp_context=context) as pool:
        for row, alike in zip(pool.map(_work, unique), found.values(), strict=True):
            row.widths = [launch.constants.get("WIDTH") for launch in alike]
            yield row


def main() -> int:
    """Print the table; 1 if there is a fault in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=CHIPS, default=list(plans._FORWARD))
    parser.add_argument("--kernel", nargs="+", choices=(*KERNELS, *LABEL_KERNELS), default=list(TABLED))
    parser.add_argument("--widths", type=int, nargs="+", choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--terms", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    parser.add_argument("--ranges", nargs="+", choices=RANGES, default=["fixed"])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["self"])
    parser.add_argument("--labels", nargs="+", choices=("hard", "soft", "both"), help="the half about these")
    parser.add_argument("--classes", type=int, nargs="+", default=[100], help="of soft labels (100)")
    parser.add_argument("--all", action="store_true", help="all ranges and problems")
    parser.add_argument("--kinds", action="store_true", help="lines that differ in the length of a loop only as one")
    parser.add_argument("--plan", help='a line in place of the table\'s: "m n edge k  warps stages programs"')
    parser.add_argument("--json", type=Path, help="save the lines here")
    args = parser.parse_args()
    if args.all:
        args.ranges, args.problems = RANGES, PROBLEMS
    if args.labels:
        args.kernel = args.kernel if "--kernel" in sys.argv else LABEL_KERNELS
    plan = args.plan and plans.Plan(*map(int, args.plan.split()))
    launches = [
        launch
        for choice in itertools.product(args.arch, args.widths, args.terms, args.problems, args.ranges)
        for launch in record(*choice, plan)
        if launch.kernel in args.kernel
    ]
    if args.labels:
        cases = itertools.product(args.arch, args.widths, args.classes, args.labels, args.problems)
        launches = [launch for case in cases for launch in record_labels(*case) if launch.kernel in args.kernel]
    print(f"Triton {triton.__version__}. The last six columns are a model, not a measurement.\n{_HEADER}")
    rows = []
    for row in report(launches, by_kind=args.kinds):
        print(_format(row), flush=True)
        rows.append(vars(row))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
