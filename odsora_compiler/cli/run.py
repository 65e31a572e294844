"""odsora-run: run a bundle on named tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from odsora_compiler.cli.reporting import Reporter, guarded, print_table, size_text

if TYPE_CHECKING:
    import torch

    from odsora_compiler.runtime.bundle import Bundle
    from odsora_compiler.runtime.runner import Runner
    from odsora_compiler.runtime.trace import Trace

HELP = """Run a bundle that odsora-compile wrote.

Inputs and outputs are safetensors files with one tensor a name. Without inputs, the names, types
and shapes that the bundle takes and gives are printed. Loading a bundle runs no code of it.

Examples:

    odsora-run model.odsora

    odsora-run model.odsora --inputs in.safetensors -o out.safetensors

    odsora-run model.odsora --example

    odsora-run model.odsora --inputs in.safetensors -o out.safetensors --function base

    odsora-run model.odsora --inputs in.safetensors --memory-budget 1GB --trace trace.json
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=HELP)
def run_command(
    bundle: Annotated[Path, typer.Argument(help="Bundle, a folder NAME.odsora.")],
    inputs: Annotated[Path | None, typer.Option(help="Input tensors, safetensors.")] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Run on the example inputs the bundle carries.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where to write the outputs, safetensors.")
    ] = None,
    function: Annotated[
        str, typer.Option(help="Function of the component to call (default: what the host calls).")
    ] = "",
    memory_budget: Annotated[
        str, typer.Option(help="Most bytes of weights in memory, such as 1GB (default: no limit).")
    ] = "",
    executor: Annotated[
        str, typer.Option(help="mil interprets the packages anywhere; coreml needs macOS.")
    ] = "mil",
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace (opens in Perfetto).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Parse the command line; see HELP."""

    def work() -> None:
        from odsora_compiler.errors import UsageError
        from odsora_compiler.pipeline.options import ByteSize
        from odsora_compiler.runtime.bundle import Bundle
        from odsora_compiler.runtime.executors import make_executor
        from odsora_compiler.runtime.runner import Runner
        from odsora_compiler.runtime.trace import Trace

        try:
            budget = ByteSize.parse(memory_budget) if memory_budget else None
        except ValueError as error:
            raise UsageError(
                f"--memory-budget: {error}", "For example --memory-budget 1GB"
            ) from error
        if inputs is not None and example:
            raise UsageError("--inputs and --example exclude each other", "Give one of them.")
        if out is not None and out.exists() and not force:
            raise UsageError(f"{out} exists", "Give --force to replace it, or another -o.")
        for file in (out, trace):
            if file is not None and not file.absolute().parent.is_dir():
                raise UsageError(f"{file.absolute().parent}: no such folder", "Create it first.")
        if out is not None and out.is_dir():
            raise UsageError(f"{out} is a folder", "Name a file, such as -o out.safetensors.")
        opened, chosen = Bundle(bundle), make_executor(executor)
        record = Trace()
        with Reporter(quiet) as reporter:
            runner = Runner(opened, chosen, budget, record, lambda _, text: reporter.step(text))
            if inputs is None and not example:
                _print_signature(runner, opened)
                return
            expected: dict[str, torch.Tensor] = {}
            if inputs is not None:
                tensors = _read(inputs)
            else:
                tensors, expected = opened.examples()
            with reporter.stage("run"):
                results = runner.run(tensors, function or None)
        if out is not None:
            _write(results, out)
        if trace is not None:
            _save_trace(record, trace)
        rows = [
            [name, str(list(value.shape)), f"{float(value.float().std(correction=0)):.5g}"]
            for name, value in results.items()
        ]
        print_table("outputs", ["output", "shape", "standard deviation "], rows)
        if expected and not function:
            from odsora_compiler.ir.drift import measure_drift

            print(f"against PyTorch: {measure_drift(results, expected)}")
        print(
            f"compute {record.seconds('compute'):.2f} s, load {record.seconds('load'):.2f} s, "
            f"peak weights {size_text(runner.peak_weight_bytes)}"
            + (f"; wrote {out}" if out is not None else "")
        )

    guarded(work)


def _print_signature(runner: Runner, bundle: Bundle) -> None:
    rows = [["input", str(spec)] for spec in runner.inputs]
    rows += [["output", str(spec)] for spec in runner.outputs]
    for name, component in bundle.manifest.components.items():
        rows += [["function", f"{name}.{function}"] for function in component.functions]
    print_table(f"{bundle.manifest.name} [{bundle.manifest.pipeline}]", ["", ""], rows)


def _read(path: Path) -> dict[str, torch.Tensor]:
    from odsora_compiler.ir.weights import FileWeights

    files = FileWeights(path)
    return {name: files.load(name) for name in files.names()}


def _write(results: dict[str, torch.Tensor], out: Path) -> None:
    from safetensors.torch import save_file

    from odsora_compiler.errors import RunError

    partial = out.with_name(f".{out.name}.partial")
    try:
        # Copied, because two outputs may be one tensor, which the format does not hold.
        save_file({name: value.clone().contiguous() for name, value in results.items()}, partial)
        partial.replace(out)
    except Exception as error:
        raise RunError(f"{out} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _save_trace(record: Trace, path: Path) -> None:
    from odsora_compiler.errors import RunError

    try:
        record.save(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror})") from error


def main() -> None:
    """Entry point of `odsora-run`."""
    app(prog_name="odsora-run")


if __name__ == "__main__":
    main()
