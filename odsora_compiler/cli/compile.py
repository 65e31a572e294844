"""odsora-compile: from a model file to a verified bundle of Core ML packages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from odsora_compiler.cli.reporting import (
    Reporter,
    guarded,
    parse_settings,
    print_table,
    size_text,
)

if TYPE_CHECKING:
    from odsora_compiler.driver.acceptance import AcceptanceReport
    from odsora_compiler.ir.program import Program
    from odsora_compiler.pipeline.instruments import Instrument
    from odsora_compiler.plugins import Registry

HELP = """Compile a PyTorch model to Core ML packages, rewritten by passes and checked by execution.

MODEL is a Python file with build(**options) that returns odsora_compiler.ModelSpec, or PipelineSpec
for several networks and the sampler that calls them; or the folder of a program saved with
--save-program. Loading a model file runs its code.

Examples:

    odsora-compile model.py --passes tdtm,cidl -o model.odsora

    odsora-compile model.py --passes 'tdtm{sites=spatial,temporal},cidl{budget=64MB}' --set depth=8

    odsora-compile model.py --weights checkpoint/ --precision fp32 --verify full

    odsora-compile pipeline.py --passes tdtm,lpl,cidl --weights checkpoints/ --set steps=50

    odsora-compile model.py --passes cidl --dry-run

    odsora-compile --describe tdtm
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=HELP)
def compile_command(
    model: Annotated[Path | None, typer.Argument(help="Model file or saved program.")] = None,
    passes: Annotated[
        str, typer.Option(help="Pipeline: pass names with options, 'tdtm{steps=15},cidl'.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Bundle to write (default: MODEL.odsora).")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Option of build(), name=value; repeatable.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights: a safetensors file or a folder of shards; for a pipeline a folder that "
            "has either for each of its checkpoints, such as denoiser.safetensors."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp16 or fp32.")] = "fp16",
    target: Annotated[str, typer.Option(help="Oldest system the packages run on.")] = "iOS18",
    verify: Annotated[
        str,
        typer.Option(
            help="structure: graphs only. numeric: also execute every distinct chunk, and whole "
            "functions where affordable. full: execute everything."
        ),
    ] = "numeric",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run the passes and print the plan; write nothing.")
    ] = False,
    save_program: Annotated[
        Path | None, typer.Option(help="Save the program as it is after the passes.")
    ] = None,
    print_ir: Annotated[
        str, typer.Option(help="Print the program: after-changed, after-all or after PASS.")
    ] = "",
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Time each pass.")] = False,
    list_passes: Annotated[
        bool, typer.Option("--list-passes", help="List the passes that are installed.")
    ] = False,
    describe: Annotated[str, typer.Option(help="Describe a pass and its options.")] = "",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Parse the command line; see HELP."""

    def work() -> None:
        from odsora_compiler.errors import UsageError

        if list_passes or describe:
            from odsora_compiler.plugins import load_registry

            registry = load_registry()
            _describe(registry, describe) if describe else _list(registry)
            return
        if model is None:
            raise UsageError("no MODEL given", "For example: odsora-compile model.py --passes cidl")
        with Reporter(quiet) as reporter:
            _compile(
                reporter,
                model,
                passes,
                out or Path(f"{model.stem}.odsora"),
                parse_settings(settings or []),
                weights,
                precision,
                target,
                verify,
                force,
                dry_run,
                save_program,
                print_ir,
                time_passes,
            )

    guarded(work, f"nothing was left at {out}" if out else "")


def _compile(
    reporter: Reporter,
    model: Path,
    passes: str,
    out: Path,
    settings: dict[str, str],
    weights: Path | None,
    precision: str,
    target: str,
    verify: str,
    force: bool,
    dry_run: bool,
    save_program: Path | None,
    print_ir: str,
    time_passes: bool,
) -> None:
    # Whatever is wrong with the command is said before the seconds of importing and tracing.
    from odsora_compiler.driver.output import check_output, check_settings

    check_settings(precision, target, verify)
    if not dry_run:
        check_output(out, force)

    from odsora_compiler.driver.compiler import lower
    from odsora_compiler.errors import UsageError, nearest
    from odsora_compiler.frontend.capture import capture_file
    from odsora_compiler.pipeline.instruments import PrintProgram, Timing
    from odsora_compiler.pipeline.manager import PassManager, Pipeline, drift_checks
    from odsora_compiler.plugins import load_registry

    registry = load_registry(report=reporter.say)
    pipeline = Pipeline.parse(passes, registry)
    moments = ("after-changed", "after-all", *registry)
    if print_ir and print_ir not in moments:
        raise UsageError(f"--print-ir '{print_ir}': no such pass", nearest(print_ir, moments))
    if save_program is not None and save_program.exists():
        raise UsageError(f"{save_program} exists", "Choose another place for --save-program.")
    with reporter.stage("capture"):
        program = capture_file(model, settings, weights)
    instruments: list[Instrument] = drift_checks(verify, reporter.say)
    if print_ir:
        instruments.append(PrintProgram(print_ir))
    if time_passes:
        instruments.append(Timing())
    with reporter.stage("passes"):
        PassManager(instruments, precision, reporter.say).run(program, pipeline)
    if save_program is not None:
        from odsora_compiler.ir.serialize import save_program as save

        save(program, save_program)
        print(f"saved {save_program}")
    if dry_run:
        _print_plan(program)
        return
    accepted: list[AcceptanceReport] = []
    with reporter.stage("lowering"):
        lower(
            program,
            out,
            precision=precision,
            target=target,
            verify=verify,
            force=force,
            progress=reporter.step,
            on_accepted=accepted.append,
        )
    _print_result(out, accepted[0] if accepted else None)


def _list(registry: Registry) -> None:
    rows = [
        [name, entry.distribution, (entry.cls.__doc__ or "").strip().splitlines()[0]]
        for name, entry in registry.items()
    ]
    print_table("passes", ["pass", "distribution", "what it does"], rows)


def _describe(registry: Registry, name: str) -> None:
    import inspect
    import typing

    from odsora_compiler.pipeline.options import option_fields, print_value, type_text

    cls = registry.find(name)
    print(f"{name}  ({registry[name].distribution})\n")
    print(inspect.cleandoc(cls.__doc__ or "").strip() + "\n")
    for what in ("requires", "establishes", "destroys"):
        facts = sorted(getattr(cls, what))
        print(f"{what:<12}{', '.join(facts) if facts else '-'}")
    print(f"{'exactness':<12}{cls().exactness}\n")
    hints = typing.get_type_hints(cls)
    rows = [
        [key, type_text(hints[key]), print_value(item.default), item.metadata.get("help", "")]
        for key, item in option_fields(cls).items()
    ]
    if rows:
        print_table("options", ["option", "takes", "default", "meaning"], rows)
    else:
        print("It takes no options.")


def _print_plan(program: Program) -> None:
    for component in program.components.values():
        names = ", ".join(component.functions)
        if component.plan is None:
            print(f"{component.name}: functions {names}, not cut (add the pass cidl)")
            continue
        rows = [
            [
                str(index),
                size_text(chunk.weight_bytes),
                ", ".join(
                    f"{name} {size_text(count)}" for name, count in chunk.crossing_bytes.items()
                ),
                chunk.reason,
            ]
            for index, chunk in enumerate(component.plan.chunks)
        ]
        title = f"{component.name}: functions {names}; budget {size_text(component.plan.budget)}"
        print_table(title, ["chunk ", "weights ", "cross the cut", "why it ends there"], rows)


def _print_result(out: Path, accepted: AcceptanceReport | None) -> None:
    from odsora_compiler.runtime.bundle import Bundle

    manifest = Bundle(out).manifest
    for name, component in manifest.components.items():
        functions = list(component.functions)
        rows = [
            [
                package,
                size_text(entry.weight_bytes),
                entry.conversion,
                *(_chunk_drift(accepted, package, function) for function in functions),
            ]
            for package, entry in component.packages.items()
        ]
        title = f"{name} ({manifest.precision}, {manifest.target}); against PyTorch: largest error "
        title += "over largest value, cosine"
        print_table(title, ["chunk", "weights ", "conversion", *functions], rows)
        for function, drift in (accepted.functions if accepted else {}).items():
            if function.startswith(f"{name}."):
                print(f"whole {function} against PyTorch: {drift}")
    if accepted is not None and accepted.host is not None:
        print(f"whole {manifest.name} against PyTorch: {accepted.host}")
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out} ({size_text(total)})")


def _chunk_drift(accepted: AcceptanceReport | None, package: str, function: str) -> str:
    if accepted is None:
        return "not executed"
    drift = accepted.chunks.get((package, function))
    if drift is None:
        return "weights read back"
    return "bit-equal" if drift.bit_equal else f"{drift.maximum:.1e}, {drift.cosine:.6f}"


def main() -> None:
    """Entry point of `odsora-compile`."""
    app(prog_name="odsora-compile")


if __name__ == "__main__":
    main()
