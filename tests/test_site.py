"""The documentation site builds without a warning, asks nobody for anything when it is read, and has all its parts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")

ROOT = Path(__file__).resolve().parent.parent
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
FETCHING_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest"}


class Resources(HTMLParser):
    """Addresses that a browser fetches by itself to show a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "link" and FETCHING_LINKS & set((attributes.get("rel") or "").split()):
            self.found.append(attributes["href"])
        elif (address := attributes.get(FETCHED.get(tag))) is not None:
            self.found.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_every_page_of_docs_is_there(site):
    for page in ROOT.glob("docs/*.md"):
        assert (site / page.name).with_suffix(".html").exists()


def test_pages_fetch_only_what_is_in_the_site(site, pages):
    for page in pages:
        for address in Resources(page).found:
            if address.startswith("data:"):
                continue
            assert not re.match(r"(?:[a-z]+:)?//", address), f"{page.name} fetches {address}"
            local = address.partition("?")[0].partition("#")[0]
            place = site / local.lstrip("/") if local.startswith("/") else page.parent / local
            assert place.exists(), f"{page.name}: {address} is missing"


def test_style_sheets_fetch_nothing_from_elsewhere(site):
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text), sheet.name


def test_formulas_became_mathml(site, pages):
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "arithmatex" not in text
        prose = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
        for leftover in (":math:", ".. math::", "\\(", "\\[", "$"):
            assert leftover not in prose, f"{page.name}: {leftover}"
        for formula in re.findall(r"<math\b.*?</math>", text, flags=re.DOTALL):
            assert "\\" not in formula, f"{page.name}: {formula}"  # a command that was not understood
    assert "<math" in (site / "loss.html").read_text(encoding="utf-8")
    assert "<math" in (site / "api.html").read_text(encoding="utf-8")


def test_every_report_is_on_the_page_of_benchmarks(site):
    text = (site / "benchmarks.html").read_text(encoding="utf-8")
    reports = [path for path in ROOT.glob("benchmarks/results/*/*.json") if path.parent.name != "local"]
    assert reports
    for path in reports:
        assert f'href="{path.relative_to(ROOT).as_posix()}"' in text
        assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_every_public_name_is_on_the_page_of_the_api(site):
    import genscl_loss

    text = (site / "api.html").read_text(encoding="utf-8")
    for name in genscl_loss.__all__:
        if name != "__version__":
            assert f'id="genscl_loss.{name}"' in text


def test_docstrings_are_read_as_they_are_meant(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    assert "<blockquote>" not in text  # what Markdown makes of a line that begins with ">", such as that of a doctest
    assert text.count('<span class="gp">&gt;&gt;&gt; </span>') > 20
