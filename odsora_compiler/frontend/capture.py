"""The capture stage: a model file, a `ModelSpec` or a saved program becomes a `Program`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from odsora_compiler.errors import CaptureError, UsageError, nearest
from odsora_compiler.frontend.export import input_names, refuse_repeated, trace_module
from odsora_compiler.frontend.model_file import call_build, load_build, parse_options
from odsora_compiler.frontend.spec import ModelSpec
from odsora_compiler.frontend.weightless import (
    empty_names,
    fill_with_fakes,
    saved_specs,
    tied_names,
    weightless,
)
from odsora_compiler.ir.axis_names import parse_axes
from odsora_compiler.ir.host import single_call_host
from odsora_compiler.ir.program import Component, Program
from odsora_compiler.ir.serialize import load_program
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.ir.weights import CastWeights, FileWeights, LayeredWeights, TensorWeights


def capture(
    model: str | Path | ModelSpec,
    options: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
) -> Program:
    """Capture `model`: the path of a model file or of a saved program, or a `ModelSpec`.

    `options` are keyword arguments of the file's `build`. `weights`: a safetensors file or a folder
    of shards; the module is then built without its own, and tensors are read when they are used.
    Raises `UsageError`, `CaptureError` or `WeightsError`.
    """
    if isinstance(model, ModelSpec):
        return _capture_spec(model, "model", weights)
    return _capture_path(Path(model), options or {}, lambda build: options or {}, weights)


def capture_file(path: Path, settings: Mapping[str, str], weights: Path | None = None) -> Program:
    """`capture` with options as texts (`--set name=value`), typed by the signature of `build`."""
    return _capture_path(path, settings, lambda build: parse_options(build, settings), weights)


def _capture_path(
    path: Path,
    given: Mapping[str, Any],
    options: Callable[[Callable[..., Any]], Mapping[str, Any]],
    weights: str | Path | None,
) -> Program:
    if path.is_dir():
        if given or weights:
            raise UsageError(
                f"{path} is a saved program: it has its options and weights in it",
                "Leave out --set and --weights, or compile the model file.",
            )
        return load_program(path)
    if weights is not None and not Path(weights).exists():
        raise UsageError(f"{weights}: no such weights file or folder")
    build = load_build(path)
    chosen = options(build)
    with weightless() if weights is not None else nullcontext():
        spec = call_build(build, chosen, path)
    try:
        return _capture_spec(spec, path.stem, weights)
    except (CaptureError, UsageError) as error:
        raise type(error)(f"{path}: {error.message}", error.hint) from error


def _capture_spec(spec: ModelSpec, name: str, weights: str | Path | None) -> Program:
    module = spec.module
    examples = _examples(spec)
    axes = _checked_axes(spec, examples)
    state_specs, tied = saved_specs(module), tied_names(module)
    empty = empty_names(module)
    if empty and weights is None:
        raise CaptureError(
            f"'{empty[0]}' of the model is on the meta device and holds no data",
            "Give the weights with --weights.",
        )
    unsaved = [name for name in empty if name not in state_specs]
    if unsaved:
        raise CaptureError(
            f"the buffer '{unsaved[0]}' is on the meta device and in no weights file (it is not "
            "persistent), so its values are not known",
            "Compute it on the CPU in the constructor, from the configuration alone.",
        )
    mode = None
    if weights is not None:
        files = FileWeights(weights)
        checkpoint = CastWeights(files, state_specs, tied, origin=str(weights))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fill_with_fakes(module, mode)
    function, constants = trace_module(module, spec.inputs, mode)
    for placeholder in function.placeholders:
        if placeholder.target in axes:
            placeholder.meta["axes"] = axes[str(placeholder.target)]
    store = LayeredWeights(
        checkpoint if weights is not None else TensorWeights(module.state_dict()),
        TensorWeights(constants),
    )
    component = Component(name, {"base": function}, store)
    program = Program(name, {name: component}, single_call_host(component), examples)
    if axes:
        program.facts |= {
            f"axis {axis}"
            for key, text in axes.items()
            for parts in parse_axes(text, tuple(examples[key].shape), key)
            for axis in parts
        }
    verify_program(program)
    return program


def _examples(spec: ModelSpec) -> dict[str, torch.Tensor]:
    if not isinstance(spec.module, nn.Module):
        raise CaptureError(
            f"ModelSpec.module is a {type(spec.module).__name__}, not a torch.nn.Module",
            "Wrap the function in a module's forward().",
        )
    if not isinstance(spec.inputs, Mapping):
        raise CaptureError(
            f"ModelSpec.inputs is a {type(spec.inputs).__name__}, not a mapping",
            "Give the keyword arguments of forward(): inputs={'x': x}.",
        )
    tensors = [
        leaf.detach()
        for leaf in pytree.tree_leaves(dict(spec.inputs))
        if isinstance(leaf, torch.Tensor)
    ]
    names = input_names(spec.inputs)
    refuse_repeated(names, "input")
    return dict(zip(names, tensors, strict=True))


def _checked_axes(spec: ModelSpec, examples: Mapping[str, torch.Tensor]) -> dict[str, str]:
    for name, text in spec.axes.items():
        if name not in examples:
            raise UsageError(f"axes name an input '{name}'", nearest(name, examples))
        parse_axes(text, tuple(examples[name].shape), name)
    return dict(spec.axes)
