"""Imports go down only, third parties are torch alone, and importing the package loads no Triton."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import genscl_loss

PACKAGE = "genscl_loss"
ROOT = Path(genscl_loss.__file__).parent

# Each module and the modules of the package that it may import. A new file gets a line here, or the tests fail.
ARROWS = {
    "genscl_loss": {"cached", "diagnostics", "functional", "labels", "module", "queue"},
    "cached": {"_checks", "_distributed", "_library"},
    "diagnostics": {"_batch", "_checks", "_choices", "_library", "_positives", "_unit"},
    "module": {"functional", "_checks", "_choices", "_distributed"},
    "functional": {
        "_batch",
        "_backends",
        "_checks",
        "_choices",
        "_dense",
        "_distributed",
        "_global",
        "_library",
        "_likelihood",
        "_linear",
        "_positives",
        "_unit",
    },
    "labels": {"_checks"},
    "queue": {"_checks", "_distributed", "_queue_state"},
    "_batch": {"_checks", "_choices", "_positives"},
    "_global": {"_backends", "_batch", "_distributed", "_library", "_likelihood", "_positives", "_unit"},
    "_dense": {"_backends", "_backends.dense", "_checks", "_library", "_likelihood", "_unit"},
    "_linear": {"_backends", "_library", "_likelihood", "_linear_fused", "_positives", "_unit"},
    "_linear_fused": {"_backends.fused", "_library", "_linear_kernels", "_positives.fused"},
    "_linear_kernels": {"_backends.kernels", "_kernels", "_likelihood"},
    "_positives": {"_positives.alignment", "_positives.labels", "_positives.operator"},
    "_positives.fused": {"_library", "_positives.kernels"},
    "_positives.kernels": {"_kernels"},
    "_positives.operator": {"_positives.alignment", "_positives.fused", "_positives.labels", "_library"},
    "_positives.alignment": {"_positives.sums", "_unit"},
    "_positives.sums": {"_library"},
    "_positives.labels": {"_checks", "_library", "_unit"},
    "_backends": {"_backends.choice", "_backends.dense", "_backends.operator"},
    "_backends.choice": {"_backends.fused", "_backends.plans", "_checks", "_choices", "_library"},
    "_backends.operator": {"_backends.dense", "_backends.fused", "_backends.tiled", "_library"},
    "_backends.dense": {"_library"},
    "_backends.fused": {"_backends.kernels", "_backends.plans", "_library"},
    "_backends.kernels": {"_kernels"},
    "_backends.plans": set(),
    "_backends.tiled": {"_backends.products", "_backends.threads"},
    "_backends.threads": set(),
    "_backends.products": set(),
    "_checks": set(),
    "_choices": set(),
    "_distributed": set(),
    "_kernels": set(),
    "_library": set(),
    "_likelihood": set(),
    "_queue_state": set(),
    "_unit": set(),
}
KERNELS = {"_kernels", "_linear_kernels", "_backends.kernels", "_positives.kernels"}  # Triton's, loaded when first used


def short_name(dotted: str) -> str:
    """Return the name as ARROWS spells it: without the package's prefix."""
    return dotted.removeprefix(PACKAGE + ".")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {short_name(module_name(path)): path for path in sorted(ROOT.rglob("*.py"))}


def absolute_imports(tree: ast.AST, path: Path) -> set[str]:
    """Dotted names that the statements below `tree` import, relative ones resolved, submodules told from attributes."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            children = {f"{base}.{alias.name}" for alias in node.names}
            submodules = {child for child in children if short_name(child) in FILES}
            names |= submodules if submodules == children else {base, *submodules}
    return names


def runs_at_import(tree: ast.Module) -> ast.Module:
    """Return the tree without function bodies and `if TYPE_CHECKING:` blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

        def visit_If(self, node):
            if ast.unparse(node.test).endswith("TYPE_CHECKING"):
                return [self.visit(child) for child in node.orelse] or None
            return self.generic_visit(node)

    return Strip().visit(tree)


def parse(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def test_every_module_has_its_arrows():
    assert set(FILES) == set(ARROWS)


@pytest.mark.parametrize("name", list(FILES))
def test_imports_go_down_only(name):
    imported = absolute_imports(parse(name), FILES[name])
    inside = {short_name(other) for other in imported if other.split(".")[0] == PACKAGE}
    assert inside <= ARROWS[name]


@pytest.mark.parametrize("name", list(FILES))
def test_third_parties_are_torch_alone(name):
    roots = {other.split(".")[0] for other in absolute_imports(parse(name), FILES[name])}
    own = {"triton"} if name in KERNELS else set()
    assert roots - set(sys.stdlib_module_names) <= {PACKAGE, "torch"} | own


@pytest.mark.parametrize("name", [name for name in FILES if name not in KERNELS])
def test_importing_loads_no_triton(name):
    imported = absolute_imports(runs_at_import(parse(name)), FILES[name])
    assert not {other for other in imported if "triton" in other.split(".") or other.endswith("kernels")}


@pytest.mark.parametrize(
    ("name", "statement", "expected"),
    [
        ("functional", "from ._batch import Batch", {"genscl_loss._batch"}),
        ("functional", "from . import _batch, _positives", {"genscl_loss._batch", "genscl_loss._positives"}),
        ("functional", "from genscl_loss._backends import row_lse", {"genscl_loss._backends"}),
        ("_backends", "from . import dense", {"genscl_loss._backends.dense"}),
        ("_backends", "from .dense import forward", {"genscl_loss._backends.dense"}),
        ("_backends.dense", "from .. import functional", {"genscl_loss.functional"}),
        ("_backends.dense", "def f():\n    import torch._dynamo as d", {"torch._dynamo"}),
        ("genscl_loss", "from .module import GenSupConLoss", {"genscl_loss.module"}),
        ("module", "from . import __version__", {"genscl_loss"}),
    ],
)
def test_the_parser_resolves(name, statement, expected):
    assert absolute_imports(ast.parse(statement), FILES[name]) == expected


def test_the_parser_tells_import_time_from_later():
    later = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton\ndef f():\n    import triton\n"
    path = FILES["functional"]
    assert absolute_imports(runs_at_import(ast.parse(later)), path) == {"typing"}
    assert "triton" in absolute_imports(runs_at_import(ast.parse("try:\n    import triton\nexcept E:\n    pass")), path)


TWICE = """
import sys, torch, genscl_loss
features, labels = torch.randn(600, 8), torch.arange(600) % 4
first = genscl_loss.gen_supcon_loss(features, labels, backend="tiled")
for name in [name for name in sys.modules if name.startswith("genscl_loss")]:
    del sys.modules[name]
import genscl_loss as other
for copy in (genscl_loss, other):
    assert torch.equal(copy.gen_supcon_loss(features, labels, backend="tiled"), first)
"""


def test_two_copies_can_be_loaded():
    subprocess.run(
        [sys.executable, "-c", TWICE], check=True, cwd=ROOT.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
