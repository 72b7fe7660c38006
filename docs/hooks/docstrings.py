"""Docstrings have formulas as Sphinx writes them, which `help()` shows well; the site has them as `$...$`."""

import re
import textwrap

import griffe

BLOCK = re.compile(r"^( *)\.\. math::[ \t]*\n((?:\1[ ]+\S.*\n?|[ \t]*\n)+)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")


class Maths(griffe.Extension):
    """Rewrites `:math:` and `.. math::`."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = dollars(obj.docstring.value)


def dollars(text):
    text = BLOCK.sub(lambda found: f"{found[1]}$$\n{textwrap.dedent(found[2]).strip()}\n$$\n\n", text)
    return INLINE.sub(r"$\1$", text)
