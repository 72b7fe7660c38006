"""Docstrings are written for `help()`; here they become what the site's Markdown needs.

Formulas are written as for Sphinx and become `$...$`. The section "Example" becomes "Examples", which is the name that
griffe knows. Arguments that are there to be refused are left out.
"""

import re
import textwrap

import griffe

BLOCK = re.compile(r"^( *)\.\. math::[ \t]*\n((?:\1[ ]+\S.*\n?|[ \t]*\n)+)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
REFUSED = re.compile(r"^ +\*+\w+: Refused.*\n", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring that the site shows."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = rewritten(obj.docstring.value)

    def on_function(self, *, func, **_):
        for parameter in [parameter for parameter in func.parameters if str(parameter.annotation) == "NoReturn"]:
            del func.parameters[parameter.name]


def rewritten(text):
    text = REFUSED.sub("", text)
    text = EXAMPLE.sub("Examples:", text)
    text = BLOCK.sub(lambda found: f"{found[1]}$$\n{textwrap.dedent(found[2]).strip()}\n$$\n\n", text)
    return INLINE.sub(r"$\1$", text)
