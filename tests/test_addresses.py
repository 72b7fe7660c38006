"""One line of pyproject.toml fills every place that needs the repository's address: in a copy, all are seen filled."""

from __future__ import annotations

import email
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import genscl_loss

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/Someone/some-loss"
PAGES = "https://someone.github.io/some-loss/"
ADDRESSES = runpy.run_path(str(ROOT / "addresses.py"))
VERSION = genscl_loss.__version__
COPIED = ("docs", "examples", "benchmarks", "genscl_loss", "*.md", "*.py", "*.toml", "*.yml", "CITATION.cff", "LICENSE")
NOTEBOOK = '{"cells": [{"cell_type": "markdown", "source": ["# A\\n", "<!-- open-in --><!-- /open-in -->"]}]}\n'

needs_sources = pytest.mark.skipif(not (ROOT / "genscl_loss").exists(), reason="needs the sources of the package")


def run(folder: Path, *command: str, **environment: str) -> str:
    environment = os.environ | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository after one line was written, and one command run."""
    folder = tmp_path_factory.mktemp("copy")
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("local", "__pycache__"))
        else:
            shutil.copy(path, folder)
    project = folder / "pyproject.toml"
    lines = [line for line in project.read_text().splitlines() if not line.startswith("Repository = ")]
    lines.insert(lines.index("[project.urls]") + 1, f'Repository = "{REPOSITORY}"')
    project.write_text("\n".join(lines) + "\n")
    (folder / "examples" / "a.ipynb").write_text(NOTEBOOK)
    run(folder, sys.executable, "addresses.py")
    return folder


def test_files_hold_the_addresses_that_the_project_has():
    # Whoever writes the line also runs the command.
    known = ADDRESSES["addresses"]((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for path, text, filled in ADDRESSES["filled"](ROOT, known):
        assert filled == text, f"{path.name}: run addresses.py"


@pytest.mark.parametrize(
    ("file", "expected"),
    {
        "README.md": [f"{REPOSITORY}/actions/workflows/ci.yml/badge.svg", f"[Documentation]({PAGES})"],
        "SECURITY.md": [f"]({REPOSITORY}/security/advisories/new)"],
        "CITATION.cff": [f"\nrepository-code: {REPOSITORY}\nurl: {PAGES}\n"],
        "CHANGELOG.md": [f"\n[Unreleased]: {REPOSITORY}/compare/v", f"\n[0.1.0]: {REPOSITORY}/releases/tag/v0.1.0\n"],
        "examples/a.ipynb": [
            "](https://colab.research.google.com/github/Someone/some-loss/blob/main/examples/a.ipynb)"
        ],
    }.items(),
)
def test_a_file_is_filled(copy, file, expected):
    text = (copy / file).read_text(encoding="utf-8")
    for address in expected:
        assert address in text


def test_filling_again_changes_nothing_and_without_the_line_it_empties(copy):
    known = ADDRESSES["addresses"](f'Repository = "{REPOSITORY}"')
    assert all(filled == text for _, text, filled in ADDRESSES["filled"](copy, known))
    assert not any("ithub.com/Someone" in filled for _, _, filled in ADDRESSES["filled"](copy, {}))


def test_files_stay_readable_for_machines(copy):
    json.loads((copy / "examples" / "a.ipynb").read_text(encoding="utf-8"))
    citation = pytest.importorskip("yaml").safe_load((copy / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == REPOSITORY


def test_releases_are_compared_with_the_one_before(tmp_path):
    text = "## [Unreleased]\n## [0.2.0] - 2030-01-02\n## [0.1.0] - 2030-01-01\n<!-- versions --><!-- /versions -->\n"
    (tmp_path / "CHANGELOG.md").write_text(text)
    ((_, _, filled),) = ADDRESSES["filled"](tmp_path, {"Repository": "R"})
    assert filled.partition("<!-- versions -->\n")[2].splitlines() == [
        "[Unreleased]: R/compare/v0.2.0...HEAD",
        "[0.2.0]: R/compare/v0.1.0...v0.2.0",
        "[0.1.0]: R/releases/tag/v0.1.0",
        "<!-- /versions -->",
    ]


def test_an_address_is_one_of_github_and_pages_can_be_elsewhere():
    addresses = ADDRESSES["addresses"]
    assert addresses('# `Repository = "https://github.com/OWNER/NAME"` belongs here\n') == {}
    assert (
        addresses(f'Repository = "{REPOSITORY}"\nDocumentation = "https://a.b/"\n')["Documentation"] == "https://a.b/"
    )
    for wrong in ("https://github.com/Someone", f"{REPOSITORY}/", "http://github.com/a/b", "https://host/a/b"):
        with pytest.raises(ValueError, match=r"^Repository: "):
            addresses(f'Repository = "{wrong}"')


# ---- The package index ----


@needs_sources
def test_metadata_and_description_have_addresses(copy, tmp_path):
    pytest.importorskip("hatchling")
    build = "import sys; from hatchling.build import *; build_wheel(sys.argv[1])"
    run(copy, sys.executable, "-c", build, str(tmp_path))
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        metadata = email.message_from_bytes(archive.read(f"genscl_loss-{VERSION}.dist-info/METADATA"))
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert urls == {
        "Paper": "https://arxiv.org/abs/2206.00384",
        "Repository": REPOSITORY,
        "Documentation": PAGES,
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    }
    text = metadata.get_payload(decode=True).decode()
    assert f"]({REPOSITORY}/blob/v{VERSION}/docs/choosing.md)" in text
    assert f"]({REPOSITORY}/raw/v{VERSION}/docs/assets/digits-embeddings.png)" in text
    assert not re.search(r"\]\((?![a-z]+:|#)", text)


# ---- The site, with the pages of two releases ----


@pytest.fixture(scope="module")
def branch(copy, tmp_path_factory) -> Path:
    """What the branch gh-pages holds after two releases."""
    for name in ("mike", "mkdocs", "latex2mathml"):
        pytest.importorskip(name)
    if shutil.which("git") is None:
        pytest.skip("needs git")
    found = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where mike looks for mkdocs
    who = {"PATH": found, "NO_MKDOCS_2_WARNING": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    who |= {f"GIT_{role}_{what}": "a" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    run(copy, "git", "init", "--quiet", **who)
    run(copy, "git", "add", ".", **who)
    run(copy, "git", "commit", "--quiet", "--message", "All", **who)
    mike = [sys.executable, "-c", "from mike.driver import main; main()"]
    for version in ("1.0.0", "1.1.0"):
        run(copy, *mike, "deploy", "--update-aliases", version, "latest", **who)
    run(copy, *mike, "set-default", "latest", **who)
    folder = tmp_path_factory.mktemp("pages")
    run(copy, "git", "worktree", "add", "--quiet", str(folder / "pages"), "gh-pages", **who)
    return folder / "pages"


@needs_sources
@pytest.mark.exhaustive
def test_each_release_has_its_pages_and_the_newest_another_name(branch):
    listed = json.loads((branch / "versions.json").read_text(encoding="utf-8"))
    assert [(entry["version"], entry["aliases"]) for entry in listed] == [("1.1.0", ["latest"]), ("1.0.0", [])]
    for version in ("1.0.0", "1.1.0", "latest"):
        assert (branch / version / "loss.html").exists()
    assert "latest/" in (branch / "index.html").read_text(encoding="utf-8")


@needs_sources
@pytest.mark.exhaustive
def test_pages_know_the_repository_and_the_newest_of_them(branch):
    page = (branch / "1.0.0" / "loss.html").read_text(encoding="utf-8")
    assert f'<link rel="canonical" href="{PAGES}latest/loss.html">' in page
    assert f'<a href="{REPOSITORY}" title="Go to repository"' in page
    assert f'href="{REPOSITORY}/edit/main/docs/loss.md"' in page
    config = json.loads(re.search(r'<script id="__config"[^>]*>(.*?)</script>', page)[1])
    assert config["version"]["provider"] == "mike"
    assert '<a href="../."><strong>' in page  # shown where a release is not the newest
    changes = (branch / "1.0.0" / "CHANGELOG.html").read_text(encoding="utf-8")
    assert f'<a href="{REPOSITORY}/releases/tag/v0.1.0">0.1.0</a>' in changes
    assert "badge.svg" not in (branch / "1.0.0" / "index.html").read_text(encoding="utf-8")  # of another server


@needs_sources
@pytest.mark.exhaustive
def test_the_page_for_missing_pages_works_in_any_folder(branch):
    page = (branch / "latest" / "404.html").read_text(encoding="utf-8")
    assert '"base": "/some-loss/latest/"' in page  # where the search finds its index
    assert '<a id="wanted" href="/some-loss/latest/index.html">' in page  # leads to a search for the address's words
    for address in re.findall(r'(?:href|src)="([^"]+)"', page):
        assert re.match(r"https://|#|data:|/some-loss/latest/", address), address
    for address in re.findall(r'<link rel="stylesheet" href="([^"]+)"', page):
        assert (branch / address.removeprefix("/some-loss/")).exists()


@needs_sources
@pytest.mark.exhaustive
def test_the_list_of_versions_finds_the_same_page(branch):
    # The theme takes what all addresses begin with for that of the folder, and wants it among them.
    addresses = re.findall(r"<loc>(.*?)</loc>", (branch / "1.0.0" / "sitemap.xml").read_text(encoding="utf-8"))
    assert os.path.commonprefix(addresses) == f"{PAGES}latest/"
    assert {f"{PAGES}latest/", f"{PAGES}latest/loss.html", f"{PAGES}latest/api/index.html"} <= set(addresses)
