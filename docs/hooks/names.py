"""Names of the package in the prose lead to the API; the page "API" has a table of them.

Both are read from the sources, which are never imported.
"""

import re
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = re.compile(r"<!-- names\s+([^>]+)-->")
PACKAGE = "genscl_loss"
SAME_OPTIONS = {"gen_supcon_loss", "GenSupConLoss", "contrastive_accuracy"}
SPLIT = re.compile(r"(<(pre|a|h[1-6]|autoref|script|style)\b.*?</\2>)", re.DOTALL)
HEADING = re.compile(r"<h[23]\b")
CODE = re.compile(r"<code>(\w+)((?:=|\().*?)?</code>")


def on_config(config):
    """Called by MkDocs first."""
    global PUBLIC, TARGETS
    module = griffe.load(PACKAGE, search_paths=[ROOT], allow_inspection=False)
    PUBLIC = {name: module[name] for name in module.exports if name != "__version__"}
    loss = f"{PACKAGE}.gen_supcon_loss"
    ours = {parameter.name for parameter in PUBLIC["gen_supcon_loss"].parameters}
    others = {parameter.name for name in PUBLIC.keys() - SAME_OPTIONS for parameter in PUBLIC[name].parameters}
    TARGETS = {name: f"{loss}({name})" for name in ours - others}  # options that mean one thing only
    TARGETS |= {name: f"{PACKAGE}.{name}" for name in PUBLIC}
    return config


def on_page_markdown(markdown, **_):
    """Called by MkDocs with the Markdown of each page: makes a table of the names that it lists."""
    return MARK.sub(lambda found: table(found[1].split()), markdown)


def table(names):
    rows = [f"| [`{name}`][{PACKAGE}.{name}] | {first_line(PUBLIC[name])} |" for name in names]
    return "\n".join(["| Name | What it is |", "|---|---|", *rows])


def first_line(item):
    return item.docstring.value.strip().partition("\n\n")[0].replace("\n", " ")


def on_page_content(content, **_):
    """Called by MkDocs with the HTML of each page: leads the first mention of a name in each section."""
    parts, seen = SPLIT.split(content), set()
    for i in range(0, len(parts), 3):  # prose, then what is left as it is and its tag
        parts[i] = CODE.sub(lambda found: led(found, seen), parts[i])
        if i + 1 < len(parts):
            if HEADING.match(parts[i + 1]):
                seen.clear()
            parts[i + 2] = ""
    return "".join(parts)


def led(found, seen):
    name = found[1]
    if name not in TARGETS or name in seen:
        return found[0]
    seen.add(name)
    return f'<autoref identifier="{TARGETS[name]}" optional>{found[0]}</autoref>'
