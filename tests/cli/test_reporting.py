"""How the commands tell of progress."""

from __future__ import annotations

import time

import pytest

from odsora_compiler.cli.reporting import Bars, Reporter, duration_text


def test_without_a_terminal_there_are_lines_with_calls_and_time_left() -> None:
    lines: list[str] = []
    bars = Bars(None, lines.append, between=0)
    for call in (1, 2):
        for part in (0.5, 1.0):
            time.sleep(0.3)
            bars.update("denoiser", call, 40, part)
    counts = [line.rpartition(", ")[0] for line in lines]
    assert counts == [f"denoiser  {call} of 40" for call in (1, 1, 2, 2)]
    # 0.6 s a call, 38 calls left; the machine may be busy.
    assert 22 <= int(lines[-1].rpartition(", ")[2].removesuffix(" s left")) <= 40


def test_lines_are_rare_and_quiet_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with Reporter(quiet) as reporter, reporter.bars() as bars:
            for call in range(1, 100):
                bars.update("denoiser", call, 100, 1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (9000, "2.5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
