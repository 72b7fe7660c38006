"""Runs the notebooks of examples/: `python tests/notebooks.py` puts what they print and draw into the files.

What changes from run to run without need (times, the version of Python, numbers of cells) is not kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook after a run from its first cell to its last, in this folder."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.coalesce_streams = True  # what is printed arrives in pieces of any size
    client.extra_arguments = ["--IPKernelApp.log_level=40"]  # no hints about its sockets
    client.execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(executed(path, path.parent), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    sys.exit(not NOTEBOOKS)
