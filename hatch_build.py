"""Makes the addresses in the metadata (`addresses.py`), and of README.md the description on the package index.

Its links lead to files that are not there. With a `Repository` in `[project.urls]` they lead to the release's files in
it. Until there is one, their text stays, and what is nothing without them goes: pictures with what is said below them,
and the list of pages.
"""

import re
import runpy
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")
PICTURE = re.compile(r"^!\[[^]]*\]\((?![a-z]+:).*?\n\n", re.MULTILINE | re.DOTALL)
PAGES = re.compile(r"^## Documentation\n.*?(?=^## )", re.MULTILINE | re.DOTALL)


def description(markdown: str, repository: str | None, version: str) -> str:
    """Return the Markdown with relative links and pictures made absolute, or without them."""

    def lead(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        if repository is None:
            return text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/v{version}/{target})"

    if repository is None:
        markdown = PAGES.sub("", PICTURE.sub("", markdown))
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lead, prose) for prose in parts[::2]]
    return "".join(parts)


class CustomMetadataHook(MetadataHookInterface):
    """Called by hatchling, with the `[project]` table."""

    def update(self, metadata: dict) -> None:
        """Add the addresses and the readme."""
        root = Path(self.root)
        of_project = runpy.run_path(str(root / "addresses.py"))["addresses"]
        known = of_project((root / "pyproject.toml").read_text(encoding="utf-8"))
        metadata["urls"] = {**metadata.get("urls", {}), **known}
        text = (root / "README.md").read_text(encoding="utf-8")
        text = description(text, known.get("Repository"), metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
