"""Formulas become MathML while the site is built: no script and no font has to be loaded to read them.

`pymdownx.arithmatex` finds the formulas, `$...$` and `$$...$$`, and marks them; this hook replaces what it marked.
"""

import html
import re

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content, **_):
    """Called by MkDocs with the HTML of each page, docstrings included."""
    content = BLOCK.sub(lambda found: f'<div class="maths">{mathml(found[1], "block")}</div>', content)
    return INLINE.sub(lambda found: mathml(found[1], "inline"), content)


def mathml(tex, display):
    return convert(html.unescape(tex).strip(), display=display)
