"""The capture stage: a model file, a spec or a saved program becomes a `Program`."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from odsora_compiler.errors import CaptureError, OdsoraError, UsageError, nearest
from odsora_compiler.frontend.checkpoints import find_checkpoints
from odsora_compiler.frontend.export import input_names, refuse_repeated, trace_module
from odsora_compiler.frontend.host import trace_host
from odsora_compiler.frontend.model_file import call_build, load_build, parse_options
from odsora_compiler.frontend.spec import ModelSpec, PipelineSpec
from odsora_compiler.frontend.weightless import (
    empty_names,
    fill_with_fakes,
    saved_specs,
    tied_names,
    weightless,
)
from odsora_compiler.ir.axis_names import parse_axes
from odsora_compiler.ir.component_names import NAME_HINT, is_component_name
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.host import single_call_host
from odsora_compiler.ir.program import Component, ComputeUnits, Program
from odsora_compiler.ir.serialize import load_program
from odsora_compiler.ir.text_to_video import TextToVideo
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.ir.weights import (
    CastWeights,
    FileWeights,
    LayeredWeights,
    TensorWeights,
    WeightSpec,
    WeightStore,
)


def capture(
    model: str | Path | ModelSpec | PipelineSpec,
    options: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
) -> Program:
    """Capture `model`: the path of a model file or of a saved program, or a spec.

    `options` are keyword arguments of the file's `build`. `weights`: a safetensors file or a folder
    of shards, for a pipeline a folder with one of these for each component; modules are then built
    without their own, and tensors are read when they are used. Raises `UsageError`, `CaptureError`
    or `WeightsError`.
    """
    if isinstance(model, ModelSpec | PipelineSpec):
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


def _capture_spec(spec: ModelSpec | PipelineSpec, name: str, weights: str | Path | None) -> Program:
    if isinstance(spec, ModelSpec):
        _check_component_name(name)
        sources = {} if weights is None else {name: Path(weights)}
        components = _capture_components({name: _examined(spec)}, sources, in_pipeline=False)
        component = components[name]
        host = single_call_host(name, component.function("base"))
        program = Program(name, components, host, component.examples)
    else:
        program = _capture_pipeline(spec, name, weights)
    program.facts |= {
        f"axis {axis}"
        for component in program.components.values()
        for placeholder in component.function("base").placeholders
        if "axes" in placeholder.meta
        for parts in parse_axes(
            placeholder.meta["axes"],
            tuple(placeholder.meta["val"].shape),
            str(placeholder.target),
        )
        for axis in parts
    }
    verify_program(program)
    return program


def _check_component_name(name: object) -> None:
    if not is_component_name(name):
        raise CaptureError(f"a component cannot be called {name!r}", NAME_HINT)


def _check_text_to_video(roles: TextToVideo) -> None:
    """Before the long work, what a run would only find after it."""
    if not isinstance(roles, TextToVideo):
        raise CaptureError(
            f"PipelineSpec.text_to_video is a {type(roles).__name__}, not a TextToVideo",
            "Give odsora_compiler.TextToVideo(tokenizer, …).",
        )
    for problem in roles.problems():
        what, _, remedy = problem.rpartition("; ")
        raise CaptureError(what, remedy[:1].upper() + remedy[1:] + ".")
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(roles.tokenizer)
    except Exception as error:  # The library raises Exception itself.
        raise CaptureError(
            f"text_to_video: the tokenizer cannot be read: {error}",
            "Give the text of a tokenizer.json: Path('tokenizer.json').read_text().",
        ) from error


def _capture_pipeline(spec: PipelineSpec, name: str, weights: str | Path | None) -> Program:
    if not isinstance(spec.components, Mapping) or not spec.components:
        raise CaptureError(
            "PipelineSpec.components names no component",
            "Give a mapping of names to ModelSpec: components={'denoiser': ModelSpec(…)}.",
        )
    for key in spec.components:
        _check_component_name(key)
    if not callable(spec.host):
        raise CaptureError(
            f"PipelineSpec.host is a {type(spec.host).__name__}, not a function",
            "Give a function that is called as host(c, **inputs).",
        )
    if spec.text_to_video is not None:
        _check_text_to_video(spec.text_to_video)
    examples = _examples(spec.inputs, "PipelineSpec", "keyword arguments of the host")
    axes = _checked_axes(spec.axes, examples)
    examined = {key: _named(key, _examined, part) for key, part in spec.components.items()}
    sources: dict[str, Path] = {}
    if weights is not None:
        checkpoints = {key: part.checkpoint or key for key, part in spec.components.items()}
        complete = [key for key, part in examined.items() if not part.empty]
        sources = find_checkpoints(Path(weights), checkpoints, complete)
    components = _capture_components(examined, sources, in_pipeline=True)
    host, constants = trace_host(spec.host, spec.inputs, components)
    _name_axes(host, axes)
    return Program(
        name,
        components,
        host,
        examples,
        constants=constants,
        text_to_video=spec.text_to_video,
    )


@dataclass(frozen=True)
class _Examined:
    """A module's spec, checked, and what was known of the module before fakes took its place."""

    spec: ModelSpec
    examples: dict[str, torch.Tensor]
    axes: dict[str, str]
    saved: dict[str, WeightSpec]
    tied: dict[str, list[str]]
    empty: list[str]


def _examined(spec: ModelSpec) -> _Examined:
    if not isinstance(spec, ModelSpec):
        raise CaptureError(
            f"it is a {type(spec).__name__}, not a ModelSpec",
            "Give odsora_compiler.ModelSpec(module, inputs, axes).",
        )
    if not isinstance(spec.module, nn.Module):
        raise CaptureError(
            f"ModelSpec.module is a {type(spec.module).__name__}, not a torch.nn.Module",
            "Wrap the function in a module's forward().",
        )
    if spec.compute_units not in typing.get_args(ComputeUnits):
        raise UsageError(
            f"there are no compute units '{spec.compute_units}'",
            nearest(spec.compute_units, typing.get_args(ComputeUnits)),
        )
    examples = _examples(spec.inputs, "ModelSpec", "keyword arguments of forward()")
    return _Examined(
        spec,
        examples,
        _checked_axes(spec.axes, examples),
        saved_specs(spec.module),
        tied_names(spec.module),
        empty_names(spec.module),
    )


def _capture_components(
    parts: Mapping[str, _Examined], sources: Mapping[str, Path], in_pipeline: bool
) -> dict[str, Component]:
    """Trace all modules, then name `sources`, where their weights are read from, if anywhere.

    Modules may share submodules: fakes take the place of weights in all before any is traced.
    """
    stores: dict[str, WeightStore] = {}
    for name, part in parts.items():
        stores[name] = _named(name if in_pipeline else "", _store, part, sources.get(name))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for name in sources:
        fill_with_fakes(parts[name].spec.module, mode)
    components = {}
    for name, part in parts.items():
        function, constants = _named(
            name if in_pipeline else "",
            trace_module,
            part.spec.module,
            part.spec.inputs,
            mode if name in sources else None,
        )
        _name_axes(function, part.axes)
        store = LayeredWeights(stores[name], TensorWeights(constants))
        components[name] = Component(
            name,
            {"base": function},
            store,
            examples=part.examples,
            compute_units=part.spec.compute_units,
        )
    return components


def _store(part: _Examined, source: Path | None) -> WeightStore:
    """What the module's weights are read from; raises where one would hold no data."""
    if part.empty and source is None:
        raise CaptureError(
            f"'{part.empty[0]}' of the model is on the meta device and holds no data",
            "Give the weights with --weights.",
        )
    unsaved = [name for name in part.empty if name not in part.saved]
    if unsaved:
        raise CaptureError(
            f"the buffer '{unsaved[0]}' is on the meta device and in no weights file (it is not "
            "persistent), so its values are not known",
            "Compute it on the CPU in the constructor, from the configuration alone.",
        )
    if source is None:
        return TensorWeights(part.spec.module.state_dict())
    files = FileWeights(source)
    return CastWeights(files, part.saved, part.tied, str(source), part.spec.unused)


def _named(component: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` gives; its errors say which component of a pipeline they are about."""
    try:
        return function(*arguments)
    except OdsoraError as error:
        if not component:
            raise
        raise type(error)(f"component '{component}': {error.message}", error.hint) from error


def _name_axes(function: Function, axes: Mapping[str, str]) -> None:
    for placeholder in function.placeholders:
        if placeholder.target in axes:
            placeholder.meta["axes"] = axes[str(placeholder.target)]


def _examples(inputs: Any, owner: str, what: str) -> dict[str, torch.Tensor]:
    if not isinstance(inputs, Mapping):
        raise CaptureError(
            f"{owner}.inputs is a {type(inputs).__name__}, not a mapping",
            f"Give the {what}: inputs={{'x': x}}.",
        )
    tensors = [
        leaf.detach() for leaf in pytree.tree_leaves(dict(inputs)) if isinstance(leaf, torch.Tensor)
    ]
    names = input_names(inputs)
    refuse_repeated(names, "input")
    return dict(zip(names, tensors, strict=True))


def _checked_axes(axes: Mapping[str, str], examples: Mapping[str, torch.Tensor]) -> dict[str, str]:
    for name, text in axes.items():
        if name not in examples:
            raise UsageError(f"axes name an input '{name}'", nearest(name, examples))
        parse_axes(text, tuple(examples[name].shape), name)
    return dict(axes)
