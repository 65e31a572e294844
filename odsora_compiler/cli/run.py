"""odsora-run: run a bundle on named tensors, or make a film of a prompt."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from odsora_compiler.cli.film import (
    FilmOptions,
    check_fit,
    film_roles,
    frame_rate,
    prompt_inputs,
    save_film,
)
from odsora_compiler.cli.reporting import (
    Reporter,
    budget_bytes,
    guarded,
    print_table,
    size_text,
)

if TYPE_CHECKING:
    import torch

    from odsora_compiler.runtime.bundle import Bundle
    from odsora_compiler.runtime.runner import Progress, Runner
    from odsora_compiler.runtime.summary import RunSummary
    from odsora_compiler.runtime.trace import Trace

HELP = """Run a bundle that odsora-compile wrote.

A bundle of a whole text-to-video pipeline makes a film of a prompt. Any bundle runs on tensors:
inputs and outputs are safetensors files with one tensor a name. Without a prompt or inputs, the
names, types and shapes that the bundle takes and gives are printed. Loading a bundle runs no code
of it.

Examples:

    odsora-run model.odsora

    odsora-run film.odsora --prompt "a red circle moving left" --seed 7 -o film.mp4

    odsora-run model.odsora --inputs in.safetensors -o out.safetensors

    odsora-run model.odsora --example

    odsora-run model.odsora --inputs in.safetensors -o out.safetensors --function base

    odsora-run model.odsora --inputs in.safetensors --memory-budget 1GB --trace trace.json

    odsora-run model.odsora --example --profile here.json --timeline run.png
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_FILMS = "Films"
_TENSORS = ".safetensors"


@app.command(help=HELP)
def run_command(
    bundle: Annotated[Path, typer.Argument(help="Bundle, a folder NAME.odsora.")],
    inputs: Annotated[Path | None, typer.Option(help="Input tensors, safetensors.")] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Run on the example inputs the bundle carries.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="What to write: .safetensors has the outputs; .mp4 and .gif a film, .png a sheet "
            "of its frames (default with a prompt: BUNDLE-SEED.mp4).",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of all that is drawn at random (default: 0).")
    ] = None,
    function: Annotated[
        str, typer.Option(help="Function of the component to call (default: what the host calls).")
    ] = "",
    memory_budget: Annotated[
        str,
        typer.Option(
            help="Most bytes of weights and all other tensors in memory, such as 1GB; the program "
            "itself, Python and PyTorch, comes on top (default: no limit)."
        ),
    ] = "",
    profile: Annotated[
        str,
        typer.Option(
            help="Profile of this machine to plan with, a name or a .json of odsora-plan "
            "--calibrate (default: a machine of which nothing is known)."
        ),
    ] = "",
    plan: Annotated[
        Path | None,
        typer.Option(help="Follow a plan that odsora-plan --json wrote, within its budget."),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="mil interprets the packages anywhere; coreml needs macOS.")
    ] = "mil",
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace (opens in Perfetto).")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw what was loaded and computed when, .png or .svg.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
    prompt: Annotated[
        str | None, typer.Option(help="What the film shows.", rich_help_panel=_FILMS)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="How much the prompt weighs (default: the bundle's).", rich_help_panel=_FILMS
        ),
    ] = None,
    aesthetic_score: Annotated[
        float | None,
        typer.Option(
            help="0 to 10, told to the model with the prompt (default: the bundle's).",
            rich_help_panel=_FILMS,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="The size the film must have; a bundle makes one.",
            rich_help_panel=_FILMS,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Write the first frames only (default: all).", rich_help_panel=_FILMS),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames a second (default: the bundle's).", rich_help_panel=_FILMS),
    ] = None,
    scale: Annotated[
        int | None,
        typer.Option(
            help="Repeat every pixel so often (default: until the shorter side has 128).",
            rich_help_panel=_FILMS,
        ),
    ] = None,
) -> None:
    """Parse the command line; see HELP."""
    options = FilmOptions(prompt, guidance, aesthetic_score, size, frames, fps, scale)
    if prompt is not None and out is None:
        out = Path(f"{bundle.resolve().stem}-{seed or 0}.mp4")

    def work() -> None:
        from odsora_compiler.errors import UsageError
        from odsora_compiler.planning.plan import SchedulePlan
        from odsora_compiler.planning.profile import find_profile
        from odsora_compiler.runtime.bundle import Bundle
        from odsora_compiler.runtime.executors import make_executor
        from odsora_compiler.runtime.film import is_film
        from odsora_compiler.runtime.prompt import check_seed
        from odsora_compiler.runtime.runner import Runner
        from odsora_compiler.runtime.trace import Trace

        budget = budget_bytes(memory_budget)
        sources = [prompt is not None, inputs is not None, example]
        written = {"-o": out, "--trace": trace, "--timeline": timeline}
        _check_sources(sources, next((path for path in written.values() if path), None))
        writes_film = out is not None and is_film(out)
        options.check(writes_film)
        check_seed(seed or 0)
        _check_files(inputs, written, force)
        if plan is not None and budget is not None:
            raise UsageError("a plan has a budget of its own", "Give --plan or --memory-budget.")
        device = find_profile(profile) if profile else None
        opened, record = Bundle(bundle), Trace()
        runner = Runner(opened, make_executor(executor), budget, record, profile=device)
        if not any(sources):
            _print_signature(runner, opened)
            return
        roles = film_roles(opened, runner) if writes_film or prompt is not None else None
        if roles is not None:
            check_fit(options, roles, runner)
            if writes_film:
                frame_rate(options, roles)  # Raises before the work.
        with Reporter(quiet) as reporter:
            expected: dict[str, torch.Tensor] = {}
            if prompt is not None and roles is not None:
                tensors = prompt_inputs(options, roles, runner, seed or 0, reporter.say)
            elif inputs is not None:
                tensors = _read(inputs)
            else:
                tensors, expected = opened.examples()
            with reporter.stage("plan"):
                if plan is not None:
                    runner.follow(SchedulePlan.load(plan), function or None)
                runner.plan_run(function or None)
            with reporter.stage("run"):
                results, calls = _run(runner, tensors, function, seed or 0, reporter)
            said = ""
            if out is not None:
                with reporter.stage("write"):
                    if roles is not None and writes_film:
                        said = save_film(results[roles.video], out, options, roles)
                    else:
                        said = _write(results, out)
            if trace is not None:
                _save_trace(record, trace)
            if timeline is not None:
                _draw(runner, timeline)
        if not writes_film:
            _print_outputs(results, {} if function or seed else expected)
        if said:
            print(said)
        print(f"{calls}; {_in_words(runner.summary)}")

    left = ""
    if out is not None:
        left = f"{out} was not changed" if os.path.exists(out) else f"nothing was left at {out}"
    guarded(work, left)


def _check_sources(given: list[bool], written: Path | None) -> None:
    """At most one of a prompt, inputs and the example; one where something is to be written."""
    from odsora_compiler.errors import UsageError

    if sum(given) > 1:
        raise UsageError("--prompt, --inputs and --example exclude each other", "Give one of them.")
    if written is not None and not any(given):
        raise UsageError(
            f"nothing to compute for {written}", "Give --prompt, --inputs or --example."
        )


def _check_files(inputs: Path | None, written: dict[str, Path | None], force: bool) -> None:
    """Whether inputs are there and all can be `written`, by option."""
    from odsora_compiler.cli.timeline import check_drawing
    from odsora_compiler.errors import UsageError
    from odsora_compiler.runtime.film import EXTENSIONS
    from odsora_compiler.runtime.output_file import check_output_file

    if inputs is not None and not inputs.exists():
        raise UsageError(f"{inputs}: no such file", "Inputs are a safetensors file.")
    known = (*EXTENSIONS, _TENSORS)
    seen: dict[Path, str] = {}
    for option, path in written.items():
        if path is None:
            continue
        if option == "-o" and path.suffix.lower() not in known and not path.is_dir():
            raise UsageError(
                f"{path}: nothing can be written as '{path.suffix}'",
                f"Known extensions: {', '.join(known)} (.png: a sheet of frames).",
            )
        if option == "--timeline":
            check_drawing(path)
        check_output_file(path, force)
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise UsageError(
                f"{other} and {option} both name {path}", f"Give {option} a file of its own."
            )


def _run(
    runner: Runner, tensors: dict[str, torch.Tensor], function: str, seed: int, reporter: Reporter
) -> tuple[dict[str, torch.Tensor], str]:
    """The outputs, and in words how often each component was called."""
    calls: dict[str, str] = {}

    def say(message: Warning | str, *_: Any, **__: Any) -> None:
        reporter.say(f"warning: {message}")

    with reporter.bars() as bars, warnings.catch_warnings():
        warnings.showwarning = say

        def watch(done: Progress) -> None:
            bars.update(done.component, done.call, done.calls, done.chunk / done.chunks)
            calls[done.component] = f"{done.component} {done.call} of {done.calls} calls"

        runner.progress = watch
        results = runner.run(tensors, function or None, seed)
    return results, ", ".join(calls.values())


def _print_outputs(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """What the outputs are, and how far from `expected`, where that is known."""
    rows = [
        [name, str(list(value.shape)), f"{float(value.float().std(correction=0)):.5g}"]
        for name, value in results.items()
    ]
    print_table("outputs", ["output", "shape", "standard deviation "], rows)
    if expected:
        from odsora_compiler.ir.drift import measure_drift

        print(f"against PyTorch: {measure_drift(results, expected)}")


def _print_signature(runner: Runner, bundle: Bundle) -> None:
    rows = [["input", str(spec)] for spec in runner.inputs]
    rows += [["output", str(spec)] for spec in runner.outputs]
    for name, component in bundle.manifest.components.items():
        rows += [["function", f"{name}.{function}"] for function in component.functions]
    print_table(f"{bundle.manifest.name} [{bundle.manifest.pipeline}]", ["", ""], rows)
    if bundle.manifest.text_to_video is not None:
        print(f'It makes films: odsora-run {bundle.path} --prompt "…" -o film.mp4')


def _read(path: Path) -> dict[str, torch.Tensor]:
    from odsora_compiler.ir.weights import FileWeights

    files = FileWeights(path)
    return {name: files.load(name) for name in files.names()}


def _write(results: dict[str, torch.Tensor], out: Path) -> str:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from odsora_compiler.errors import RunError
    from odsora_compiler.runtime.output_file import output_file

    # Copied, because two outputs may be one tensor, which the format does not hold.
    tensors = {name: value.clone().contiguous() for name, value in results.items()}
    try:
        with output_file(out) as partial:
            save_file(tensors, partial)
    except SafetensorError as error:
        raise RunError(f"{out} cannot be written: {error}", "Choose another -o.") from error
    return f"wrote {out}"


def _save_trace(record: Trace, path: Path) -> None:
    from odsora_compiler.runtime.output_file import output_file

    with output_file(path) as partial:
        record.save(partial)


def _draw(runner: Runner, path: Path) -> None:
    from odsora_compiler.cli.timeline import draw_timeline

    budget = runner.plan.budget
    title = f"{runner.bundle.path.name} in {size_text(budget)}, as it ran"
    draw_timeline(runner.summary.timeline, path, budget, title)


def _in_words(run: RunSummary) -> str:
    known = "this run's own loads and chunks" if run.profile is None else f"'{run.profile.name}'"
    return (
        f"time {run.seconds:.2f} s, bound {run.bound_seconds:.2f} s (by {known}), "
        f"ratio {run.ratio:.2f}, peak memory {size_text(run.peak_bytes)}, "
        f"stalls {run.stall_seconds:.2f} s"
    )


def main() -> None:
    """Entry point of `odsora-run`."""
    # PyTorch, which is not imported yet, then takes large tensors in pages of 2 MB: memory that is
    # given back at once is had again in a fraction of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    app(prog_name="odsora-run")


if __name__ == "__main__":
    main()
