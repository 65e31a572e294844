"""The output path: complete or untouched, and nothing left beside it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from odsora_compiler.driver.output import output_folder
from odsora_compiler.errors import UsageError


def put(out: Path, force: bool = False) -> None:
    """What a compile does, in short."""
    with output_folder(out, force) as folder:
        (folder / "manifest.json").write_text("{}")


def test_a_link_is_replaced_by_force_and_what_it_names_is_not(tmp_path: Path) -> None:
    put(tmp_path / "old.odsora")
    link = tmp_path / "net.odsora"
    link.symlink_to("old.odsora")
    put(link, force=True)
    assert not link.is_symlink() and (link / "manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.odsora", "old.odsora"]


def test_a_link_to_nothing_is_refused_before_the_work(tmp_path: Path) -> None:
    link = tmp_path / "net.odsora"
    link.symlink_to("nowhere")
    with pytest.raises(UsageError, match="link to nothing"):
        put(link)
    assert [path.name for path in tmp_path.iterdir()] == ["net.odsora"]


KILLED = """
import sys, time
from pathlib import Path
from odsora_compiler.driver.output import output_folder

with output_folder(Path(sys.argv[1]), False) as folder:
    (folder / "half").write_text("written")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_compile_left_is_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "net.odsora"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    try:
        hour_ago = time.time() - 3600
        os.utime(left, (hour_ago, hour_ago))
        put(tmp_path / "other.odsora")
        put(out)
        assert (left / "half").is_file(), "its process still works there"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (left / "half").is_file()
    put(out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.odsora", "other.odsora"]
