"""Every address of the project, made from one: the line `Repository` under `[project.urls]` in pyproject.toml.

    python addresses.py    # writes them into the files that hold them as text

What is built works them out for itself: `hatch_build.py` makes the metadata and the description on the package index,
`docs/hooks/repository.py` the site. A file that others read as it stands has two marks, such as `<!-- badges -->` and
`<!-- /badges -->`, and this script writes between them. Without a `Repository` there is no address and nothing is
between the marks. CONTRIBUTING.md, "Releasing", lists all places.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
GITHUB = re.compile(r"https://github\.com/([\w-]+)/([\w.-]+)")
HEADING = re.compile(r"^## \[(.+?)\]", re.MULTILINE)


def written(project: str, label: str) -> str | None:
    """What a line `label = "https://..."` in the text of pyproject.toml says, or None."""
    found = re.search(rf'^{label} = "(.+)"$', project, re.MULTILINE)
    return found[1] if found else None


def addresses(project: str) -> dict[str, str]:
    """The addresses, by the names that the package index gives them, from the text of pyproject.toml.

    The pages are on GitHub's own server, unless a line `Documentation` says where.
    """
    repository = written(project, "Repository")
    if repository is None:
        return {}
    found = GITHUB.fullmatch(repository)
    if found is None:
        raise ValueError(f"Repository: expected https://github.com/OWNER/NAME, got {repository}")
    owner, name = found.groups()
    return {
        "Repository": repository,
        "Documentation": written(project, "Documentation") or f"https://{owner.lower()}.github.io/{name}/",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


# ---- What stands between the marks ----


def badges(known: dict[str, str], *_: str) -> str:
    ci = f"{known['Repository']}/actions/workflows/ci.yml"
    index = "https://pypi.org/project/genscl-loss/"
    return (
        f"\n[![Tests]({ci}/badge.svg)]({ci})\n"
        f"[![On the package index](https://img.shields.io/pypi/v/genscl-loss)]({index})\n"
        f"[Documentation]({known['Documentation']})\n"
    )


def advisories(known: dict[str, str], *_: str) -> str:
    return f"\n[Report a vulnerability]({known['Repository']}/security/advisories/new)\n"


def versions(known: dict[str, str], text: str, _: str) -> str:
    """Where the headings of the change log lead: to what changed since the release below."""
    repository, (newest, *releases) = known["Repository"], HEADING.findall(text)
    ends = {newest: "HEAD"} | {release: f"v{release}" for release in releases}
    lines = [
        f"[{name}]: {repository}/compare/v{before}...{end}"
        for (name, end), before in zip(ends.items(), releases, strict=False)
    ]
    return "\n".join(["", *lines, f"[{releases[-1]}]: {repository}/releases/tag/v{releases[-1]}", ""])


def software(known: dict[str, str], *_: str) -> str:
    return f"repository-code: {known['Repository']}\nurl: {known['Documentation']}\n"


def open_in(known: dict[str, str], _: str, path: str) -> str:
    name = known["Repository"].removeprefix("https://github.com/")
    colab = "https://colab.research.google.com"
    return f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{name}/blob/main/{path})"


PLACES = {
    "README.md": ("badges", badges),
    "SECURITY.md": ("advisories", advisories),
    "CITATION.cff": ("software", software),
    "CHANGELOG.md": ("versions", versions),
    "docs/**/*.ipynb": ("open-in", open_in),
    "examples/**/*.ipynb": ("open-in", open_in),
}


def filled(root: Path, known: dict[str, str]) -> Iterator[tuple[Path, str, str]]:
    """Yield each file, its text, and its text with the addresses; with nothing between its marks if none are known."""
    for pattern, (name, write) in PLACES.items():
        slot = re.compile(rf"(<!-- {name} -->|# {name}\n).*?(<!-- /{name} -->|# /{name}\n)", re.DOTALL)
        for path in sorted(root.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            between = write(known, text, path.relative_to(root).as_posix()) if known else ""
            yield path, text, slot.sub(rf"\g<1>{between}\g<2>", text)


def main() -> None:
    known = addresses((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for path, text, new in filled(ROOT, known):
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
