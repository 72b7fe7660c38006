"""Every Python block of the README and of docs/ runs as it stands, and every local link leads somewhere.

What stands in a block of text right below one is what it prints, but for the last digits of numbers.

The pairs "before" and "after" of `docs/coming-from.md` run in the order of the page, each side of a section in a
namespace of its own, and their losses are compared.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_parity
import torch

ROOT = Path(__file__).resolve().parent.parent
README_AND_DOCS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [*README_AND_DOCS, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES += [page for folder in ("examples", "benchmarks") for page in sorted(ROOT.glob(f"{folder}/**/*.md"))]

COMPARISONS = ROOT / "docs" / "coming-from.md"

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLED = re.compile(r'^```python(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"\s*^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
IMPORT = re.compile(r"^from ([\w.]+) import", re.MULTILINE)
LINK = re.compile(r"\]\(<?([^()\s>]+)>?\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks():
    for path in README_AND_DOCS:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[1] == "python" and path != COMPARISONS:
                line = text.count("\n", 0, match.start(2)) + 1
                printed = PRINTED.match(text, match.end())
                yield pytest.param(path, line, match[2], printed and printed[1], id=f"{place(path)}:{line}")


def local_links():
    for path in PAGES:
        prose = FENCE.sub("", path.read_text(encoding="utf-8"))
        for target in LINK.findall(prose):
            if not re.match(r"[a-z]+:", target):
                yield pytest.param(path, target, id=f"{place(path)}->{target}")


def anchors(page: Path) -> set[str]:
    """The fragments that a Markdown page's headings offer, as code hosts and site generators spell them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.fixture
def _elsewhere(tmp_path, monkeypatch):
    """A working directory for what a block writes to, and a trainer's choice of device forgotten after it."""
    monkeypatch.chdir(tmp_path)
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def execute(source, path, line, namespace):
    # The blank lines in front make a traceback name the line in the page.
    exec(compile("\n" * (line - 1) + source, str(path), "exec"), namespace)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # of a trainer where there is no GPU
@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(("path", "line", "source", "printed"), list(python_blocks()))
def test_python_block_runs(path, line, source, printed, capsys):
    torch.manual_seed(0)
    execute(source, path, line, {"__name__": "__main__"})
    if printed is not None:
        found = capsys.readouterr().out
        assert NUMBER.sub("#", found) == NUMBER.sub("#", printed)
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (found, printed)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.02)


def test_what_the_first_program_prints_is_checked():
    first = next(param.values for param in python_blocks() if param.values[0].name == "README.md")
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d\d)", first[3])]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4


def sections():
    """(title, source, line) of the blocks of each section that has some."""
    text = COMPARISONS.read_text(encoding="utf-8")
    heads = [(match.start(), match[1]) for match in re.finditer(r"^## +(.+)$", text, re.MULTILINE)]
    ends = [start for start, _ in heads[1:]] + [len(text)]
    for (start, name), end in zip(heads, ends, strict=True):
        blocks = [(m[1] or "", m[2], text.count("\n", 0, m.start(2)) + 1) for m in TITLED.finditer(text, start, end)]
        if blocks:
            yield pytest.param(blocks, id=name)


def run_side(blocks, side):
    """Run what both sides start from and one of them; the losses of that one, in order, under their titles."""
    skip_unless_importable(blocks, side)
    torch.manual_seed(0)
    namespace, losses = {"__name__": "__main__"}, []
    for title, source, line in blocks:
        if title and not title.startswith(side):
            continue
        # The generator starts anew where the sides part, so that both continue with the same numbers.
        torch.manual_seed(line if not title else 0)
        execute(source, COMPARISONS, line, namespace)
        if title:
            losses.append((title, namespace.get("loss")))
    if "Model" in namespace:
        losses[-1] = (losses[-1][0], one_step_of(namespace["Model"]()))
    return losses


def skip_unless_importable(blocks, side):
    """Skip what shows a package that is not there, or is broken in ways of its own."""
    for name in {name for title, source, _ in blocks if title.startswith(side) for name in IMPORT.findall(source)}:
        try:
            importlib.import_module(name)
        except Exception as error:
            pytest.skip(f"{name} cannot be imported: {type(error).__name__}")


def one_step_of(model):
    """What Lightning does with a module that trains alone."""
    model.setup("fit")
    model.all_gather = lambda x, sync_grads=False: x[None]  # outside of a trainer it has no processes to gather from
    return model.training_step((torch.rand(2, 8, 784), torch.arange(8) % 3), 0)


class OfSupContrast:
    """In place of the file `losses.py` of SupContrast, which is no package: what it is documented to do."""

    def __init__(self, temperature=0.07, contrast_mode="all", base_temperature=0.07):
        self.options = {"tau": temperature, "mode": contrast_mode, "base": base_temperature}

    def __call__(self, features, labels=None, mask=None):
        return test_parity.supcontrast(features, labels, mask, **self.options)


class OfficialGenSCL:
    """In place of the file `loss.py` of the official GenSCL code."""

    def __init__(self, temperature=0.07, contrast_mode="all", base_temperature=0.07):
        self.options = {"tau": temperature, "mode": contrast_mode, "base": base_temperature}

    def __call__(self, features, labels):
        return test_parity.official(features, labels, **self.options)


def of_solo_learn(z, indexes, temperature=0.1):
    """In place of a function of solo-learn: positives are added up inside of the logarithm."""
    z = torch.nn.functional.normalize(z, dim=-1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    positives = logits.masked_fill(indexes[:, None] != indexes, -torch.inf)
    return (logits.logsumexp(1) - positives.logsumexp(1)).mean()


class OfOpenCLIP:
    """In place of open_clip's loss, which is for unit rows."""

    def __call__(self, image, text, logit_scale):
        logits, pairs = logit_scale * image @ text.T, torch.arange(len(image))
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


STAND_INS = [
    ("losses", "SupConLoss", OfSupContrast),
    ("loss", "GenSupConLoss", OfficialGenSCL),
    ("solo.losses.simclr", "simclr_loss_func", of_solo_learn),
    ("open_clip", "ClipLoss", OfOpenCLIP),
]


@pytest.fixture
def _files_of_others(monkeypatch):
    for file, name, stand_in in STAND_INS:
        module = ModuleType(file)
        setattr(module, name, stand_in)
        monkeypatch.setitem(sys.modules, file, module)


@pytest.mark.parametrize("blocks", list(sections()))
def test_after_runs(blocks):
    assert run_side(blocks, "After")


@pytest.mark.usefixtures("_files_of_others")
@pytest.mark.parametrize("blocks", list(sections()))
def test_before_is_what_after_replaces(blocks):
    before, after = run_side(blocks, "Before"), run_side(blocks, "After")
    assert len(before) == len(after)
    for (_, theirs), (title, ours) in zip(before, after, strict=True):
        if title == "After":  # and not "After: another loss"
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_labels_of_kornia_are_what_was_mixed():
    pytest.importorskip("kornia")
    (blocks,) = next(param.values for param in sections() if param.id == "kornia")
    classes = torch.arange(8) % 5
    images = torch.nn.functional.one_hot(classes, 10)[:, :, None, None].expand(8, 10, 32, 32).float()
    namespace = {}
    torch.manual_seed(0)
    for title, source, line in blocks:
        if not title:
            execute(source, COMPARISONS, line, namespace)
            namespace |= {"encoder": lambda x: x.flatten(1), "images": [images, images], "labels": classes}
        elif title == "Before":
            execute(source, COMPARISONS, line, namespace)
    # How much of an image is of which class can be read from its channels.
    torch.testing.assert_close(namespace["targets"][0], namespace["blended"].mean((2, 3)))
    torch.testing.assert_close(namespace["targets"][1], namespace["pasted"].mean((2, 3)))
    assert (namespace["targets"][0].amax(1) < 1).any()


@pytest.mark.parametrize(("path", "target"), list(local_links()))
def test_local_link_resolves(path, target):
    relative, _, fragment = target.partition("#")
    page = (path.parent / relative).resolve() if relative else path
    assert page.is_relative_to(ROOT)
    assert page.exists()
    assert not fragment or fragment in anchors(page)


@pytest.mark.parametrize("path", PAGES, ids=place)
def test_fences_are_closed(path):
    assert path.read_text(encoding="utf-8").count("\n```") % 2 == 0


def test_the_readme_has_blocks():
    assert any(param.values[0].name == "README.md" for param in python_blocks())
