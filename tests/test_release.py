"""What is published: the wheel, the source archive, their metadata, the change log, and what an import costs.

`make build` sets DIST and so has the archives checked that it built. Otherwise they are built here, from the tree.
"""

from __future__ import annotations

import email
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from datetime import date
from email.message import Message
from pathlib import Path

import pytest

import genscl_loss

ROOT = Path(__file__).resolve().parent.parent
VERSION = genscl_loss.__version__
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
RELATIVE_LINK = re.compile(r"\]\((?![a-z]+:|#)")

needs_sources = pytest.mark.skipif(not (ROOT / "genscl_loss").exists(), reason="needs the sources of the package")


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with both archives."""
    if "DIST" in os.environ:
        return ROOT / os.environ["DIST"]
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    code = "import sys; from hatchling.build import *; build_wheel(sys.argv[1]); build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist) -> zipfile.ZipFile:
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    return email.message_from_bytes(wheel.read(f"genscl_loss-{VERSION}.dist-info/METADATA"))


def test_the_oldest_torch_that_is_tested_is_the_oldest_that_is_allowed(metadata):
    tested = re.search(r"^OLDEST := torch==(\d+\.\d+)\.\d+ ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert metadata.get_all("Requires-Dist")[0] == f"torch>={tested[1]}"


@needs_sources
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    package = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("genscl_loss/**/*.py")}
    about = {f"genscl_loss-{VERSION}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert set(wheel.namelist()) == package | about | {"genscl_loss/py.typed"}


@needs_sources
def test_the_wheel_is_small(wheel):
    assert Path(wheel.filename).name == f"genscl_loss-{VERSION}-py3-none-any.whl"
    assert Path(wheel.filename).stat().st_size < 150_000  # what belongs in it is listed above; it has no data


@needs_sources
def test_the_source_archive_holds_the_repository(dist):
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a repository")
    files = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    if "pyproject.toml" not in files:
        pytest.skip("inside of another repository")
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archived = {name.partition("/")[2] for name in archive.getnames()}
    assert archived == files | {"PKG-INFO"}


@needs_sources
def test_metadata(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("genscl-loss", VERSION)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == f">={PYTHONS[0]}"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line)[0] for line in required] == ["torch"]
    assert set(metadata.get_all("Provides-Extra")) == {"bench", "dev", "examples", "release", "triton"}


@needs_sources
def test_the_same_pythons_are_named_everywhere(metadata):
    yaml = pytest.importorskip("yaml")
    named = [line.rpartition(" ")[2] for line in metadata.get_all("Classifier") if "Python :: 3." in line]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert named == workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS


@needs_sources
def test_the_description_has_the_readme_with_links_that_work(metadata):
    text = metadata.get_payload(decode=True).decode()
    assert "from genscl_loss import GenSupConLoss" in text
    assert not RELATIVE_LINK.search(text)
    assert ("## Documentation" in text) == ("/docs/choosing.md" in text)  # no list of pages that cannot be opened


def test_links_of_the_description():
    pytest.importorskip("hatchling")
    description = runpy.run_path(str(ROOT / "hatch_build.py"))["description"]
    same = " [e](https://f) [g](#h)\n```python\n[i](j)\n```\n"
    pages = "## Documentation\n\n[k](docs/k.md)\n\n"
    page = f"![c](d.png)<br>\n*said below*\n\n[a\nb](docs/x.md#y){same}{pages}## Next\n"
    assert description(page, None, "1.2") == f"a\nb{same}## Next\n"
    there = "https://host/name"
    led = page.replace("(d.png)", f"({there}/raw/v1.2/d.png)").replace("(docs/", f"({there}/blob/v1.2/docs/")
    assert description(page, there, "1.2") == led


def test_the_version_is_written_once():
    places = [ROOT / name for name in ("CITATION.cff", "hatch_build.py", "mkdocs.yml", "pyproject.toml")]
    places += (path for path in Path(genscl_loss.__file__).parent.rglob("*.py"))
    number = re.compile(rf"(?<![\d.]){re.escape(VERSION)}(?![\d.])")
    found = [path.name for path in places for _ in number.finditer(path.read_text(encoding="utf-8"))]
    assert found == ["__init__.py"]


def test_the_change_log_dates_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    assert len(sections) == text.count("\n## ")
    assert sections[0] == ("Unreleased", "")
    assert sections[1][0] == VERSION
    days = [date.fromisoformat(day) for _, day in sections[1:]]
    assert days == sorted(days, reverse=True)


IMPORT = """
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
import genscl_loss
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def import_after_torch() -> tuple[float, list[str]]:
    """Processor seconds of importing the package after torch, in a new process, and the packages that it brought."""
    not_kept = ("PYTHONDONTWRITEBYTECODE", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")  # which cost time
    environment = {name: value for name, value in os.environ.items() if name not in not_kept}
    environment["PYTHONPATH"] = str(Path(genscl_loss.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def test_importing_is_quick_and_brings_nothing_along():
    # What else runs on the machine can only add to the time, so the shortest of a few counts.
    times = []
    while len(times) < 5 and not (times and min(times) < 0.05):
        seconds, packages = import_after_torch()
        times.append(seconds)
        # No Triton, no NumPy, and no part of torch (its compiler) that it does not load itself
        assert set(packages) - set(sys.stdlib_module_names) == {"genscl_loss"}
    assert min(times) < 0.05, times
