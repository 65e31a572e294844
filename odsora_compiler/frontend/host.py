"""From a sampler, ordinary Python over tensors, to the host graph of a program.

The sampler is run once, with traced tensors for its inputs (`frontend.tracer`). Here is what it
sees of the components it calls.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from odsora_compiler.errors import CaptureError, OdsoraError, nearest
from odsora_compiler.frontend.escapes import Escapes
from odsora_compiler.frontend.export import (
    input_names,
    named_leaves,
    named_tensors,
    quiet_torch,
    refuse_repeated,
)
from odsora_compiler.frontend.operators import drop_dead
from odsora_compiler.frontend.source import failing_line, running_place
from odsora_compiler.frontend.tracer import Tracer
from odsora_compiler.ir.function import Function, dtype_name
from odsora_compiler.ir.host import call_component
from odsora_compiler.ir.program import Component


def trace_host(
    host: Callable[..., Any], inputs: Mapping[str, Any], components: Mapping[str, Component]
) -> tuple[Function, dict[str, torch.Tensor]]:
    """Trace `host(c, **inputs)` into the function `host`; returns it and the constants it names.

    Tensors in `inputs` become inputs of the graph, everything else is bound to its value. For `c`
    see `Components`. What needs no input just runs: schedules, numpy, `.item()`, branches on real
    numbers. What the host returns, tensors only, names the outputs: a dict by its keys, a tensor
    alone `output`. Random numbers are drawn when the graph runs, each draw with a seed of its own
    (0, 1, …); those of a `torch.Generator` are drawn here and are constants. PyTorch's random state
    is left alone. Raises `CaptureError` naming the line of the host.
    """
    tracer = Tracer()
    names = input_names(inputs)
    refuse_repeated(names, "input")
    following = iter(names)

    def placeholder(tensor: torch.Tensor) -> torch.Tensor:
        return tracer.add_input(next(following), tensor)

    arguments = pytree.tree_map_only(torch.Tensor, placeholder, dict(inputs))
    try:
        with _untouched_state(), Escapes(tracer.is_traced), tracer:
            returned = host(Components(tracer, components), **arguments)
    except OdsoraError:
        raise
    except Exception as error:
        raise _host_error(error) from error
    _refuse_others(returned)
    results = named_tensors(returned, names)
    if not results:
        raise CaptureError("the host returns no tensor", "Return tensors, or a dict of them.")
    nodes = tuple(tracer.node_of(tensor) for tensor in results.values())
    tracer.graph.output(nodes).meta["names"] = tuple(results)
    drop_dead(tracer.graph)
    function = Function("host", tracer.graph)
    called = {node.args[0] for node in function.operators() if node.target is call_component}
    for name in components:
        if name not in called:
            raise CaptureError(
                f"component '{name}' is never called by the host, or nothing uses what it gives",
                f"Call it in the host, c.{name}(…), or leave it out of PipelineSpec.components.",
            )
    return function, {name: tracer.constants[name] for name in function.weight_names()}


class Components:
    """The first argument of a host: `c.name(**tensors)` or `c["name"](**tensors)`.

    A call takes every input of the component by its name and gives its output, or, where it has
    several, all of them as `Outputs`.
    """

    def __init__(self, tracer: Tracer, components: Mapping[str, Component]) -> None:
        self._tracer = tracer
        self._components = components

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._components:
            raise CaptureError(
                f"{running_place()}: there is no component '{name}'",
                nearest(name, self._components),
            )

        def call(*positional: Any, **given: Any) -> Any:
            if positional:
                raise CaptureError(
                    f"{running_place()}: inputs of component '{name}' are given by name",
                    f"For example c.{name}({next(iter(self._specs(name)), 'x')}=…).",
                )
            with _disable_current_modes():
                return self._call(name, given)

        return call

    def _specs(self, name: str) -> dict[str, Any]:
        return {spec.name: spec for spec in self._components[name].function("base").inputs}

    def _call(self, name: str, given: Mapping[str, Any]) -> torch.Tensor | Outputs:
        place, specs = running_place(), self._specs(name)
        for key, value in given.items():
            leaves = pytree.tree_leaves(value)
            if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
                raise CaptureError(
                    f"{place}: input '{key}' of component '{name}' is given {value!r}, "
                    "which is no tensor",
                    "What is no tensor in ModelSpec.inputs is bound when the component is captured "
                    "and not given again; for an input, give torch.tensor(…).",
                )
        tensors = dict(zip(input_names(given), pytree.tree_leaves(dict(given)), strict=True))
        for key in tensors:
            if key not in specs:
                raise CaptureError(
                    f"{place}: component '{name}' has no input '{key}'", nearest(key, specs)
                )
        missing = [key for key in specs if key not in tensors]
        if missing:
            raise CaptureError(
                f"{place}: the call of component '{name}' lacks its input {', '.join(missing)}",
                "It takes " + "; ".join(map(str, specs.values())) + ".",
            )
        for key, spec in specs.items():
            tensor = tensors[key]
            if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
                raise CaptureError(
                    f"{place}: input '{key}' of component '{name}' is given "
                    f"{dtype_name(tensor.dtype)}{list(tensor.shape)}, expected {spec}",
                    "Reshape or cast it, or change the example in the component's ModelSpec.",
                )
        nodes = {key: self._tracer.node_of(tensors[key]) for key in specs}
        outputs = self._tracer.add_call(
            name, nodes, self._components[name].function("base").outputs
        )
        return next(iter(outputs.values())) if len(outputs) == 1 else Outputs(outputs)


class Outputs(dict[str, torch.Tensor]):
    """Outputs of a component that has several: `outputs["mean"]` or `outputs.mean`."""

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise AttributeError(f"there is no output '{name}'. {nearest(name, self)}")
        return self[name]


def _refuse_others(returned: Any) -> None:
    """Raise `CaptureError` naming the first result of a host that is no tensor."""
    for name, value in named_leaves(returned):
        if name and not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"the host's result '{name}' is no tensor but {reprlib.repr(value)}, of type "
                f"{type(value).__name__}",
                "A host returns tensors: give torch.tensor(…), or leave it out.",
            )


@contextmanager
def _untouched_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_torch():
        yield


def _host_error(error: Exception) -> CaptureError:
    text = str(error).strip().splitlines()
    return CaptureError(
        f"{failing_line(error) or 'the host'}: tracing stops here: "
        f"{type(error).__name__}: {text[0] if text else ''}",
        "The host is called as host(c, **PipelineSpec.inputs); it must run on these by itself.",
    )
