"""The record of a run: what Perfetto reads, and the timeline that is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from odsora_compiler.runtime.trace import Trace


def saved(trace: Trace, path: Path) -> list[dict[str, Any]]:
    trace.save(path)
    data = json.loads(path.read_text())
    assert data["displayTimeUnit"] == "ms"
    found: list[dict[str, Any]] = data["traceEvents"]
    return found


def test_the_file_is_one_that_perfetto_reads(tmp_path: Path) -> None:
    trace = Trace()
    with trace.span("load", "net-00"):
        trace.memory(100, 0)
    with trace.span("stall", "net-01"), trace.span("load", "net-01"):
        pass
    with trace.span("compute", "net-00", function="base"):
        trace.memory(100, 20)
    with trace.span("evict", "net-00"):
        pass
    trace.memory(0, 0)
    events = saved(trace, tmp_path / "trace.json")
    for event in events:
        assert isinstance(event["pid"], int) and event["ph"] in "XCM"
        if event["ph"] == "X":
            assert isinstance(event["tid"], int) and event["ts"] >= 0 and event["dur"] >= 0
    threads = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert list(threads.values()) == ["load", "compute", "stall", "evict"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [threads[event["tid"]] for event in spans] == [
        *("load", "stall", "load", "compute", "evict")
    ]
    assert all(event["cat"] == threads[event["tid"]] for event in spans)
    assert spans[3]["args"] == {"function": "base"}
    starts = [event["ts"] for event in spans]
    assert starts == sorted(starts)
    counters = [event["args"] for event in events if event["ph"] == "C"]
    assert counters == [
        {"weights": 100, "activations": 0},
        {"weights": 100, "activations": 20},
        {"weights": 0, "activations": 0},
    ]


def test_a_timeline_is_that_of_the_last_run() -> None:
    trace = Trace()
    with trace.run(), trace.span("compute", "old", function="base"):
        trace.memory(1000, 0)
    with trace.run():
        trace.memory(10, 1)
        with trace.span("load", "a"):
            pass
        with trace.span("load", "b") as details:
            details["given up"] = True
        with trace.span("compute", "a", function="base"):
            trace.memory(10, 5)
    with trace.span("evict", "a"):
        pass
    timeline = trace.timeline()
    assert [(event.lane, event.name) for event in timeline.events] == [
        ("load", "a"),
        ("load", "b"),
        ("compute", "a"),
    ]
    assert timeline.peak_bytes == 15 and [size for _, size in timeline.memory] == [11, 15]
    last = timeline.events[-1]
    assert 0 <= last.start <= last.end <= timeline.seconds
    assert trace.compute_seconds() == {"a.base": last.end - last.start}
    assert trace.load_seconds().keys() == {"a"}, "the other was given up"
