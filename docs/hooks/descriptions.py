"""The description of a page, which search engines and link previews show, is its first paragraph."""

import html
import re

PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)
TAG = re.compile(r"<[^>]+>")
LONGEST = 200


def on_page_content(content, page, **_):
    """Called by MkDocs with the HTML of each page."""
    if found := PARAGRAPH.search(content):
        text = html.unescape(" ".join(TAG.sub("", found[1]).split()))
        page.meta.setdefault("description", html.escape(shortened(text)))


def shortened(text):
    """As many whole sentences as there is room for, or else as many words."""
    if len(text) <= LONGEST:
        return text
    begin = text[:LONGEST]
    sentences, _, _ = begin.rpartition(". ")
    return f"{sentences}." if sentences else f"{begin.rpartition(' ')[0]} …"
