"""Links from the pages to files of the repository outside docs/ lead to copies of these files in the site.

So a link works in the repository as it stands, and in the site wherever that is put. Where the repository and the
site are, for "edit this page" and the page for missing pages, is said by `addresses.py`, once it is known.

`mike`, which keeps the pages of each release in a folder of its own, says so in the environment: then the pages get a
list of versions, and name as theirs the address of the newest ones.
"""

import os
import posixpath
import re
import runpy
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent.parent
SHOWN = ("*.md", "LICENSE", "benchmarks/**/*", "examples/*", "genscl_loss/_backends/plans.py")
SUFFIXES = {"", ".md", ".py", ".json", ".png", ".ipynb"}
REPLACED = {"benchmarks/results/README.md": "benchmarks.md"}  # by pages of the site
NEWEST = "latest"  # the name under which the newest release has its pages too
LINK = re.compile(r"(\]\()([^()\s:#]+)((?:#[^()\s]*)?\))")
BADGES = re.compile(r"<!-- badges -->.*?<!-- /badges -->\n", re.DOTALL)  # pictures from elsewhere


def on_config(config):
    """Called by MkDocs first."""
    of_project = runpy.run_path(str(ROOT / "addresses.py"))["addresses"]
    known = of_project((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config.repo_url = known.get("Repository")
    config.site_url = known.get("Documentation", "")
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike", "default": NEWEST, "alias": True}
        config.site_url = config.site_url and f"{config.site_url}{NEWEST}/"
    return config


def edit_address(repository, path):
    return repository and f"{repository}/edit/main/{Path(path).relative_to(ROOT).as_posix()}"


def on_files(files, config):
    """Called by MkDocs with the files of docs/: adds those of the repository, at the same paths."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT)
            wanted = path.is_file() and path.suffix in SUFFIXES and name.as_posix() not in REPLACED
            if wanted and not {"local", "__pycache__"} & set(name.parts):
                files.append(File.generated(config, name.as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Called by MkDocs with the Markdown of each page: leads its links to where their targets are in the site."""
    file = page.file
    # Where the page is in the repository, and in the site
    inside = Path(file.abs_src_path).is_relative_to(config["docs_dir"])
    source = posixpath.join("docs", file.src_uri) if inside else file.src_uri
    page.edit_url = edit_address(config.repo_url, file.abs_src_path)

    def lead(found):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        in_site = REPLACED.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(in_site) is None:
            return found[0]  # strict mode reports it
        return found[1] + posixpath.relpath(in_site, posixpath.dirname(file.src_uri) or ".") + found[3]

    return LINK.sub(lead, BADGES.sub("", markdown))
