"""odsora-plan: what running a bundle in a budget of memory would be like on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from odsora_compiler.cli.reporting import Reporter, guarded, print_table, size_text

if TYPE_CHECKING:
    from odsora_compiler.planning.plan import Residents, SchedulePlan
    from odsora_compiler.planning.profile import DeviceProfile
    from odsora_compiler.planning.simulate import Timeline
    from odsora_compiler.planning.workload import Workload

HELP = """Plan when a bundle's chunks are loaded, and predict the run, without running anything.

What stays in memory, what comes and goes, how long it takes on a device and how far that is from
what no schedule can beat. The plan never takes more than the budget, whatever the timing; it counts
weights and all other tensors, but not the program itself.

A device is a profile: a name, or the path of a JSON file. --calibrate measures this machine, with
the chunks of the bundle where one is given, and writes such a file.

Examples:

    odsora-plan film.odsora --memory-budget 1GB

    odsora-plan film.odsora --memory-budget 1GB --profile iphone15pro --timeline plan.png

    odsora-plan film.odsora --calibrate -o here.json

    odsora-plan film.odsora --memory-budget 1GB --profile here.json --executor mil --json plan.json

    odsora-run film.odsora --prompt "a red circle" -o film.mp4 --plan plan.json
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_DEFAULT_PROFILE = "iphone15pro"


@app.command(help=HELP)
def plan_command(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle, a folder NAME.odsora.")] = None,
    memory_budget: Annotated[
        str,
        typer.Option(help="Most bytes of tensors in memory, such as 1GB (default: the device's)."),
    ] = "",
    profile: Annotated[
        str, typer.Option(help="Name of a device profile, or path of its .json.")
    ] = _DEFAULT_PROFILE,
    function: Annotated[
        str, typer.Option(help="Function of the component to call (default: what the host calls).")
    ] = "",
    executor: Annotated[
        str,
        typer.Option(
            help="Count bytes as this executor takes them on this machine: mil or coreml. Such a "
            "plan can be followed, odsora-run --plan (default: as the profile says)."
        ),
    ] = "",
    json: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw the predicted timeline, .png or .svg.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine and write its profile.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Profile to write with --calibrate (default: stdout)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Parse the command line; see HELP."""

    def work() -> None:
        from odsora_compiler.runtime.output_file import check_output_file

        _check_options(bundle, calibrate, out, [json, timeline])
        for path in (json, timeline, out):
            if path is not None:
                check_output_file(path, force)
        with Reporter(quiet) as reporter:
            if calibrate:
                _calibrate(bundle, out, reporter)
            elif bundle is not None:
                _plan(bundle, memory_budget, profile, function, executor, json, timeline)

    guarded(work)


def _check_options(
    bundle: Path | None, calibrate: bool, out: Path | None, planned: list[Path | None]
) -> None:
    from odsora_compiler.cli.timeline import check_drawing
    from odsora_compiler.errors import UsageError

    if bundle is None and not calibrate:
        raise UsageError("no bundle to plan for", "For example odsora-plan film.odsora")
    if calibrate and any(planned):
        raise UsageError(
            "--calibrate writes a profile and makes no plan", "Leave out --json and --timeline."
        )
    if out is not None and not calibrate:
        raise UsageError("-o is for --calibrate", "Write the plan with --json plan.json")
    if planned[1] is not None:
        check_drawing(planned[1])


def _calibrate(bundle: Path | None, out: Path | None, reporter: Reporter) -> None:
    import json as encoding

    from odsora_compiler.runtime.bundle import Bundle
    from odsora_compiler.runtime.calibration import calibrate
    from odsora_compiler.runtime.output_file import output_file

    opened = None if bundle is None else Bundle(bundle)
    folder = Path.cwd() if bundle is None else bundle.resolve().parent
    with reporter.stage("calibrate"):
        measured = calibrate(opened, folder, reporter.say)
    text = encoding.dumps(measured.to_data(), indent=1)
    if out is None:
        print(text)
    else:
        with output_file(out) as partial:
            partial.write_text(text + "\n")
        print(f"wrote {out}")


def _plan(
    bundle: Path,
    memory_budget: str,
    profile: str,
    function: str,
    executor: str,
    json: Path | None,
    drawing: Path | None,
) -> None:
    from odsora_compiler.cli.reporting import budget_bytes
    from odsora_compiler.cli.timeline import draw_timeline, timeline_text
    from odsora_compiler.planning.planner import make_plan
    from odsora_compiler.planning.profile import find_profile
    from odsora_compiler.planning.simulate import simulate
    from odsora_compiler.runtime.output_file import output_file

    device = find_profile(profile)
    budget = budget_bytes(memory_budget) or device.memory
    workload = _workload(bundle, device, function or None, executor)
    plan = make_plan(workload, device, budget)
    predicted = simulate(workload, plan, device)
    title = f"{bundle.name} in {size_text(budget)} on {device.name}"
    if json is not None:
        with output_file(json) as partial:
            plan.save(partial)
    if drawing is not None:
        draw_timeline(predicted, drawing, budget, title)
    _print_phases(workload, plan, predicted, title)
    print(timeline_text(predicted, budget))
    print(_summary(workload, plan, predicted))
    for path in (json, drawing):
        if path is not None:
            print(f"wrote {path}")


def _workload(bundle: Path, device: DeviceProfile, function: str | None, executor: str) -> Workload:
    from odsora_compiler.planning.from_bundle import bundle_workload

    if not executor:
        return bundle_workload(bundle, device, function)
    from odsora_compiler.runtime.bundle import Bundle
    from odsora_compiler.runtime.executors import make_executor
    from odsora_compiler.runtime.runner import Runner

    return Runner(Bundle(bundle), make_executor(executor), profile=device).workload(function)


def _print_phases(workload: Workload, plan: SchedulePlan, predicted: Timeline, title: str) -> None:
    computing = [event for event in predicted.events if event.lane == "compute"]
    rows = []
    for phase in plan.residents(workload):
        start = computing[phase.uses.start - 1].end if phase.uses.start else 0.0
        rows.append(
            [
                f"{phase.component}.{phase.function}",
                str(phase.calls),
                f"{start:.4g}",
                f"{computing[phase.uses.stop - 1].end:.4g}",
                f"{len(phase.chunks)} of {len(phase.chunks) + len(phase.streamed)}",
                size_text(phase.bytes),
                str(phase.loads),
                _staying(phase),
            ]
        )
    headings = [
        "phase",
        "calls ",
        "from, s ",
        "to, s ",
        "stay ",
        "bytes ",
        "loads ",
        "chunks that stay",
    ]
    print_table(title, headings, rows)


def _staying(phase: Residents) -> str:
    if phase.calls == 1:
        return "each used once"
    names = [name.removeprefix(f"{phase.component}-") for name in phase.chunks]
    return ("all" if not phase.streamed else ", ".join(names)) or "none"


def _summary(workload: Workload, plan: SchedulePlan, predicted: Timeline) -> str:
    loaded = sum(workload.chunks[load.chunk].read_bytes for load in plan.loads)
    ratio = plan.predicted_seconds / plan.bound_seconds if plan.bound_seconds else 1.0
    return (
        f"predicted {plan.predicted_seconds:.4g} s, bound {plan.bound_seconds:.4g} s, ratio "
        f"{ratio:.3f}; waiting for chunks {predicted.total('stall'):.4g} s; "
        f"{len(plan.loads)} loads of {size_text(loaded)}, up to {plan.prefetch_depth} ahead\n"
        f"memory: at most {size_text(plan.peak_bytes)} of {size_text(plan.budget)} whatever the "
        f"timing, {size_text(predicted.peak_bytes)} predicted; least possible budget "
        f"{workload.least_budget} bytes"
    )


def main() -> None:
    """Entry point of `odsora-plan`."""
    app(prog_name="odsora-plan")


if __name__ == "__main__":
    main()
