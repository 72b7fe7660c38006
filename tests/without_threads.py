"""Run the script of the command line; fail if it leaves a thread of gloo, which may abort the process as it ends.

Such a thread may still hold the tensor of the last collective when the interpreter goes, and cannot let go of it any
more. None is left once the process group is destroyed *and* nothing refers to it.
"""

import runpy
import sys
import time
from pathlib import Path

TASKS = Path("/proc/self/task")  # of Linux; elsewhere nothing is looked at
PATIENCE = 5.0  # seconds: one that was joined is listed for a moment more, one that was not stays


def gloo_threads() -> list[str]:
    names = []
    for task in TASKS.iterdir() if TASKS.exists() else []:
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it ended meanwhile
            continue
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as Python itself does for a script
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    end_of_patience = time.monotonic() + PATIENCE
    while (left := gloo_threads()) and time.monotonic() < end_of_patience:
        time.sleep(0.05)
    if left:
        sys.exit(f"threads are left: {left}")
