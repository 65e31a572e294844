"""From a program to a verified bundle at a path, which appears there complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import fx

from odsora_compiler.driver.acceptance import AcceptanceReport, accept, compare_host
from odsora_compiler.driver.output import check_settings, output_folder
from odsora_compiler.errors import UsageError
from odsora_compiler.ir.function import Function, dtype_name
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.lowering.bundle import write_bundle, write_examples
from odsora_compiler.lowering.chunks import LoweringSettings
from odsora_compiler.lowering.interface import Precision
from odsora_compiler.pipeline.instruments import program_flops
from odsora_compiler.pipeline.manager import NUMERIC_LIMIT_FLOPS
from odsora_compiler.runtime.bundle import Bundle


def lower(
    program: Program,
    out: str | Path,
    *,
    precision: str = "fp16",
    target: str = "iOS18",
    verify: str = "numeric",
    force: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    on_accepted: Callable[[AcceptanceReport], None] = lambda report: None,
) -> Path:
    """Lower `program` to a bundle at `out`; returns the bundle's path.

    `precision`: `"fp16"` or `"fp32"`. `verify`: `"structure"` writes without executing; `"numeric"`
    executes every distinct chunk, and whole functions where they are affordable; `"full"` all.
    `force` replaces an existing bundle. `on_accepted` is given what was compared. Raises
    `UsageError`, `LoweringError` or `VerificationError`; nothing is left at `out` then.
    """
    check_settings(precision, target, verify)
    verify_program(program)
    _check_precision(program, precision)
    settings = LoweringSettings(cast(Precision, precision))
    with output_folder(Path(out), force) as folder:
        lowered = write_bundle(program, folder, settings, target, progress)
        outputs: Mapping[str, torch.Tensor] = {}
        if verify != "structure":
            limit = None if verify == "full" else NUMERIC_LIMIT_FLOPS
            report = accept(Bundle(folder), lowered, limit, progress)
            if limit is None or program_flops(program) <= limit:
                progress("running the whole program in PyTorch")
                outputs = evaluate_program(program, program.examples)
                if len(program.calls()) > 1:
                    bundle = Bundle(folder)
                    report.host = compare_host(bundle, program.examples, outputs, progress)
            on_accepted(report)
        write_examples(folder, program.examples, outputs)
    return Path(out)


def _check_precision(program: Program, precision: str) -> None:
    """Refuse a plan made for another precision, and a half-precision model in fp32."""
    for component in program.components.values():
        if component.plan is not None and component.plan.precision != precision:
            raise UsageError(
                f"component '{component.name}' was cut for {component.plan.precision}, where its "
                f"chunks keep their budget; in {precision} they have other sizes",
                f"Run the passes for it: --precision {precision} in the command that runs cidl, or "
                f"run_passes(…, precision='{precision}').",
            )
        for function in component.functions.values():
            half = _half_node(function) if precision == "fp32" else None
            if half is not None:
                raise UsageError(
                    f"component '{component.name}' computes in {dtype_name(half.meta['val'].dtype)}"
                    f" ({half.name}, {half.meta['provenance']}); fp32 would give other numbers",
                    "Use --precision fp16, or build the model in float32 (module.float()).",
                )


def _half_node(function: Function) -> fx.Node | None:
    """The first operator that computes in half precision, if there is one (a cast does not)."""
    for node in function.operators():
        if getattr(node.meta.get("val"), "dtype", None) in (torch.float16, torch.bfloat16):
            return node
    return None
