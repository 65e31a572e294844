"""Time and memory of a command, by the operating system's account; what the benchmarks share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a finished process, by the operating system's account.

    It is started by a small process of its own: a child's account begins with the peak of the
    process it was forked from, which would hide what it takes itself.
    """
    starter = [sys.executable, str(Path(__file__).resolve()), *command]
    found = subprocess.run(starter, capture_output=True, text=True)
    if found.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{found.stderr[-4000:]}")
    seconds, peak = json.loads(found.stdout)
    return seconds, peak


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _main(command: list[str]) -> int:
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    print(json.dumps([time.perf_counter() - begin, usage.ru_maxrss * 1024]))
    return process.returncode


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
