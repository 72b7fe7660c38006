"""In what order a search finds pages that have its words: whoever searches wants to do something."""

from pathlib import Path

RECIPES = 2.0
ABOUT_THE_PROJECT = 0.3  # files outside docs/, but for the first page


def on_page_markdown(markdown, page, config, **_):
    """Called by MkDocs with the Markdown of each page."""
    inside = Path(page.file.abs_src_path).is_relative_to(config["docs_dir"])
    if page.file.src_uri == "recipes.md":
        page.meta["search"] = {"boost": RECIPES}
    elif not inside and page.file.src_uri != "README.md":
        page.meta["search"] = {"boost": ABOUT_THE_PROJECT}
    return markdown
