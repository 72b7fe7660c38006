"""Run the script of the command line; fail if it leaves a thread of gloo, which may abort the process as it ends.

Such a thread may still hold the tensor of the last collective when the interpreter goes, and cannot let go of it any
more. None is left once the process group is destroyed *and* nothing refers to it.
"""

import runpy
import sys
from pathlib import Path

TASKS = Path("/proc/self/task")  # of Linux; elsewhere nothing is looked at

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as Python itself does for a script
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    names = [(task / "comm").read_text().strip() for task in TASKS.iterdir()] if TASKS.exists() else []
    if left := [name for name in names if "gloo" in name]:
        sys.exit(f"threads are left: {left}")
