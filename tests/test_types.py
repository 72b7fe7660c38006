"""Type checkers see misspelt names and choices, and every public name has a type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import genscl_loss

SNIPPET = Path(__file__).with_name("typed.py")
WRONG = {number for number, line in enumerate(SNIPPET.read_text().splitlines(), 1) if "# type: ignore" in line}
SETTINGS = {"typeCheckingMode": "standard", "enableTypeIgnoreComments": False}
ROOT = Path(genscl_loss.__file__).parents[1]


def run(folder: Path, *command: str) -> str:
    """What a tool prints, run in an empty folder, where nothing configures it, on this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix}
    result = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    return result.stdout + result.stderr


def test_pyright_finds_what_is_wrong_and_nothing_else(tmp_path):
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(SETTINGS | {"extraPaths": [str(ROOT)]}))
    report = run(tmp_path, "basedpyright", "--outputjson", "--level", "error", str(SNIPPET))
    found = [one for one in json.loads(report)["generalDiagnostics"] if one["severity"] == "error"]
    assert {1 + one["range"]["start"]["line"] for one in found} == WRONG, report


def test_every_public_name_has_a_type(tmp_path):
    report = json.loads(
        run(tmp_path, "basedpyright", "--verifytypes", "genscl_loss", "--ignoreexternal", "--outputjson")
    )
    completeness = report["typeCompleteness"]
    unknown = [
        symbol["name"] for symbol in completeness["symbols"] if not symbol["isTypeKnown"] and symbol["isExported"]
    ]
    assert completeness["completenessScore"] == 1, unknown
    assert completeness["exportedSymbolCounts"]["withKnownType"] > 40
