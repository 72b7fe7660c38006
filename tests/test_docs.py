"""Every Python block of the README and of docs/ runs as it stands, and every local link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README_AND_DOCS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [*README_AND_DOCS, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES += [page for folder in ("examples", "benchmarks") for page in sorted(ROOT.glob(f"{folder}/**/*.md"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(<?([^()\s>]+)>?\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks():
    for path in README_AND_DOCS:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[1] == "python":
                line = text.count("\n", 0, match.start(2)) + 1
                yield pytest.param(path, line, match[2], id=f"{place(path)}:{line}")


def local_links():
    for path in PAGES:
        prose = FENCE.sub("", path.read_text(encoding="utf-8"))
        for target in LINK.findall(prose):
            if not re.match(r"[a-z]+:", target):
                yield pytest.param(path, target, id=f"{place(path)}->{target}")


def anchors(page: Path) -> set[str]:
    """The fragments that a Markdown page's headings offer, as code hosts and site generators spell them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("path", "line", "source"), list(python_blocks()))
def test_python_block_runs(path, line, source):
    torch.manual_seed(0)
    # The blank lines in front make a traceback name the line in the page.
    exec(compile("\n" * (line - 1) + source, str(path), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("path", "target"), list(local_links()))
def test_local_link_resolves(path, target):
    relative, _, fragment = target.partition("#")
    page = (path.parent / relative).resolve() if relative else path
    assert page.is_relative_to(ROOT)
    assert page.exists()
    assert not fragment or fragment in anchors(page)


@pytest.mark.parametrize("path", PAGES, ids=place)
def test_fences_are_closed(path):
    assert path.read_text(encoding="utf-8").count("\n```") % 2 == 0


def test_the_readme_has_blocks():
    assert any(param.values[0].name == "README.md" for param in python_blocks())
