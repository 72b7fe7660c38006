"""Every public name says what it takes, gives and refuses, where it comes from, and shows it in an example."""

from __future__ import annotations

import inspect
import re

import pytest

import genscl_loss

NAMES = sorted(name for name in genscl_loss.__all__ if name != "__version__")
TOOLS = {"auto_backend", "available_backends", "validate"}  # of this package, not of a paper
SECTION = re.compile(r"^([A-Z][a-z]+):\n((?: .*\n|\n)*)", re.MULTILINE)


def sections(function) -> dict[str, str]:
    return dict(SECTION.findall(inspect.getdoc(function) + "\n"))


def parameters(name: str) -> list[str]:
    return list(inspect.signature(getattr(genscl_loss, name)).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_its_sections_are_there_in_order(name):
    public = getattr(genscl_loss, name)
    found = list(sections(public))
    wanted = ["Args", "Returns", "Raises", "Example", "References"]
    if not parameters(name):
        wanted = [section for section in wanted if section not in ("Args", "Raises")]
    if inspect.isclass(public):
        wanted.remove("Returns")
    if name in TOOLS:
        wanted.remove("References")
    if name == "validate":
        wanted[wanted.index("Returns")] = "Yields"
    assert [section for section in found if section != "Attributes"] == wanted


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_described_in_order(name):
    described = re.findall(r"^    \*{0,2}(\w+): ", sections(getattr(genscl_loss, name)).get("Args", ""), re.MULTILINE)
    assert described == parameters(name)


@pytest.mark.parametrize("name", NAMES)
def test_its_example_is_a_doctest(name):
    assert ">>> " in sections(getattr(genscl_loss, name))["Example"]


@pytest.mark.parametrize("name", NAMES)
def test_no_description_begins_as_a_quote_or_a_list(name):
    # Markdown would make one of it on the page of the API.
    assert not re.search(r"^ +\w+: [>*#+-] ?", inspect.getdoc(getattr(genscl_loss, name)), re.MULTILINE)
