"""Of pages that have the words of a search, recipes come first: whoever searches wants to do something."""

BOOST = 2


def on_page_markdown(markdown, page, **_):
    """Called by MkDocs with the Markdown of each page."""
    if page.file.src_uri == "recipes.md":
        page.meta["search"] = {"boost": BOOST}
    return markdown
