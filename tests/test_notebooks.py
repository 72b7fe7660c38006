"""The notebooks of examples/ run, anywhere, and hold what they print: `make notebooks` after a change of them."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import nbformat
from notebooks import NOTEBOOKS, executed

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
LINK = re.compile(r"\]\((?!https:)([^)#]+)[^)]*\)")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request):
    return request.param


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def kinds(cell) -> list[set[str]]:
    return [set(output.get("data", {output.output_type})) for output in cell.outputs]


def test_there_are_two():
    assert [path.name for path in NOTEBOOKS] == ["from_supcon_to_soft_labels.ipynb", "tour.ipynb"]


@pytest.mark.exhaustive
def test_it_holds_what_it_prints(path, tmp_path):
    kept, fresh = nbformat.read(path, as_version=4), executed(path, tmp_path)
    assert [cell.source for cell in fresh.cells] == [cell.source for cell in kept.cells]
    for found, wanted in zip(code(fresh), code(kept), strict=True):
        assert kinds(found) == kinds(wanted), wanted.source
        assert NUMBER.sub("#", printed(found)) == NUMBER.sub("#", printed(wanted))
        # Another machine rounds in another way, and training makes more of it.
        numbers = [[float(number) for number in NUMBER.findall(printed(cell))] for cell in (found, wanted)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.05)
    assert not list(tmp_path.iterdir())  # it leaves nothing behind


def test_it_is_small_and_has_a_picture_and_no_complaint(path):
    assert path.stat().st_size < 100_000
    outputs = [output for cell in code(nbformat.read(path, as_version=4)) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}


def test_nothing_changes_with_every_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.execution_count is None for cell in code(notebook))
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert json.loads(path.read_text(encoding="utf-8"))["nbformat"] == 4


def test_it_opens_on_a_hosted_service(path):
    first, *others = code(nbformat.read(path, as_version=4))
    assert re.search(r'if find_spec\("genscl_loss"\) is None:.*\n +%pip install --quiet genscl-loss$', first.source)
    modules = {name for cell in others for name in re.findall(r"^(?:from|import) (\w+)", cell.source, re.MULTILINE)}
    assert modules <= {"genscl_loss", "matplotlib", "sklearn", "torch"}


def test_its_links_lead_somewhere(path):
    prose = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    links = LINK.findall(prose)
    assert links
    for target in links:
        assert (path.parent / target).exists(), target
