"""One legalized function to a Core ML ML program: a specification and a weights file.

coremltools' torch front end, MIL passes and protobuf writer are called stage by stage, because what
lies around them in `ct.convert` (validation after each of 112 passes, a slow overflow check, copies
of the weights, a model object) takes most of its time; the result is the same to the byte.

Inside coremltools every value has a made-up name. `Names` turns them into real ones afterwards, so
that one conversion can serve for several functions of equal structure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from odsora_compiler.errors import LoweringError
from odsora_compiler.ir.function import Function, TensorSpec
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.weights import WeightStore
from odsora_compiler.lowering.legalize import describe
from odsora_compiler.lowering.precision import exact_nodes
from odsora_compiler.lowering.quiet import quiet_coremltools

aten = torch.ops.aten

Precision = Literal["fp16", "fp32"]

# Generated protobuf classes carry no types.
Message = Any

WEIGHTS_FILE = "weight.bin"


@dataclass(frozen=True)
class Feature:
    """An input or output of a package's function: Core ML has float16, float32 and int32."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a package's function, in the order of the function's signature."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]


def interface_of(
    function: Function, precision: Precision, half_io: Collection[str] = ()
) -> Interface:
    """The features `function` is given: integers and booleans as int32, numbers as float32.

    In a "fp16" package numbers named in `half_io` are float16.
    """

    def feature(spec: TensorSpec) -> Feature:
        dtype = torch.int32
        if spec.dtype.is_floating_point:
            half = precision == "fp16" and spec.name in half_io
            dtype = torch.float16 if half else torch.float32
        # Core ML has no features of rank 0.
        return Feature(spec.name, dtype, spec.shape or (1,))

    return Interface(
        tuple(map(feature, function.inputs)), tuple(map(feature, function.outputs))
    )


class Names:
    """The real names of a function's values: inputs, outputs and weights.

    In a conversion they are called by kind and number; other values are named by number and
    operator (`op12_linear`).
    """

    def __init__(self, function: Function) -> None:
        self._names = {
            "in": [spec.name for spec in function.inputs],
            "out": [spec.name for spec in function.outputs],
            "w": _distinct(re.sub(r"\W", "_", name) for name in function.weight_names()),
        }

    @staticmethod
    def made_up(kind: Literal["in", "out", "w"], index: int) -> str:
        """The name inside coremltools of the input, output or weight of that number."""
        return f"odsora_{kind}{index}_x"

    def restore(self, specification: Message) -> None:
        """Write the real names into a specification."""
        (program,) = specification.mlProgram.functions.values()
        for feature in (*specification.description.input, *specification.description.output):
            feature.name = self._real(feature.name)
        for value in program.inputs:
            value.name = self._real(value.name)
        for block in program.block_specializations.values():
            self._restore_block(block)

    def _restore_block(self, block: Message) -> None:
        block.outputs[:] = [self._real(name) for name in block.outputs]
        for operation in block.operations:
            for value in operation.outputs:
                value.name = self._real(value.name)
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name":
                        binding.name = self._real(binding.name)
            own = operation.attributes["name"].immediateValue.tensor.strings.values
            own[:] = [self._real(name) for name in own]
            for nested in operation.blocks:
                for value in nested.inputs:
                    value.name = self._real(value.name)
                self._restore_block(nested)

    def _real(self, name: str) -> str:
        if "odsora_" not in name:
            return name
        return _MADE_UP.sub(lambda found: self._names[found[1]][int(found[2])], name)


@dataclass(frozen=True)
class Conversion:
    """What coremltools made of a function: made-up names, one function "main"."""

    specification: Message
    weights: Path


def convert(
    function: Function,
    weights: WeightStore,
    folder: Path,
    precision: Precision,
    half_io: Collection[str] = (),
    exact_outputs: Collection[str] = (),
) -> Conversion:
    """Convert the legalized `function` for iOS 18; its weights go to `folder`/weight.bin.

    `half_io`: see `interface_of`. `exact_outputs`: outputs to be computed in single precision in a
    "fp16" package. Raises `LoweringError` naming the node that coremltools cannot convert.
    """
    exported = _exported(function, weights)
    interface = interface_of(function, precision, half_io)
    exact = _numbers(function, exact_nodes(function, exact_outputs))
    current: list[Any] = []

    def watch(node: Any) -> None:
        current[:] = [node]

    with quiet_coremltools(watch) as coremltools:
        _check_supported(function)
        try:
            return _run(coremltools, exported, interface, folder, precision, exact)
        except LoweringError:
            raise
        except Exception as error:
            raise _failure(function, current, error) from error
        finally:
            coremltools.converters.mil.converter._reset_conversion_state()


# ------------------------------------------------------------------ graph → ExportedProgram

# Types of Core ML's arithmetic; the last MIL pass brings float32 to float16.
_COMPUTED_AS = {
    torch.float64: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def _exported(function: Function, weights: WeightStore) -> ExportedProgram:
    """`function` as torch.export would hold it, without tracing anything again."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    inputs, state = [], {}
    for index, name in enumerate(function.weight_names()):
        tensor = weights.load(name)
        tensor = tensor.to(_STORED_AS.get(tensor.dtype, tensor.dtype))
        node = _placeholder(graph, Names.made_up("w", index), tensor.shape, tensor.dtype)
        for user in function.graph.find_nodes(op="get_attr", target=name):
            made[user] = node
        inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, True))
        state[name] = tensor
    for index, node in enumerate(function.placeholders):
        value = node.meta["val"]
        dtype = _COMPUTED_AS.get(value.dtype, value.dtype)
        made[node] = _placeholder(graph, Names.made_up("in", index), value.shape, dtype)
        inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(made[node].name), None))
    for index, node in enumerate(function.operators()):
        made[node] = _operator(graph, index, node, made)
    outputs = [_output(graph, made[node]) for node in function.results.values()]
    graph.output(tuple(outputs))
    signature = ExportGraphSignature(
        inputs,
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
    )
    names = {spec.name: 0 for spec in function.inputs}
    call = ModuleCallSignature(
        [],
        [],
        pytree.tree_structure(((), names)),
        pytree.tree_structure(tuple(0 for _ in outputs)),
    )
    return ExportedProgram(
        nn.Module(), graph, signature, state, {}, [ModuleCallEntry("", call)], constants={}
    )


_STORED_AS = {**_COMPUTED_AS, torch.int64: torch.int32}


def _placeholder(
    graph: fx.Graph, name: str, shape: Collection[int], dtype: torch.dtype
) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = fake_tensor(tuple(shape), dtype)
    return node


def _operator(
    graph: fx.Graph, index: int, node: fx.Node, made: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    def argument(value: Any) -> Any:
        return _COMPUTED_AS.get(value, value) if isinstance(value, torch.dtype) else value

    args, kwargs = pytree.tree_map(argument, (node.args, dict(node.kwargs)))
    target: Any = node.target
    copy = graph.create_node(
        "call_function",
        target,
        fx.node.map_arg(args, made.__getitem__),
        fx.node.map_arg(kwargs, made.__getitem__),
        name=f"op{index}_{getattr(target, 'overloadpacket', target).__name__}",
    )
    copy.meta["val"] = node.meta["val"]
    return copy


def _output(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What leaves the function for `node`: booleans as integers."""
    if node.meta["val"].dtype != torch.bool:
        return node
    cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.int32})
    cast.meta["val"] = fake_tensor(tuple(node.meta["val"].shape), torch.int32)
    return cast


def _numbers(function: Function, nodes: Collection[fx.Node]) -> set[int]:
    return {index for index, node in enumerate(function.operators()) if node in nodes}


# ------------------------------------------------------------------ coremltools, stage by stage

_OPERATOR = re.compile(r"op(\d+)_")
_MADE_UP = re.compile(r"odsora_(in|out|w)(\d+)_x")


def _run(
    coremltools: Any,
    exported: ExportedProgram,
    interface: Interface,
    folder: Path,
    precision: Precision,
    exact: set[int],
) -> Conversion:
    from coremltools.converters.mil.backend.mil.load import load as write
    from coremltools.converters.mil.frontend.torch.load import load as read
    from coremltools.converters.mil.mil.passes.pass_pipeline import PASS_REGISTRY, PassPipeline

    version = coremltools.target.iOS18.value
    program = read(
        exported,
        inputs=[
            coremltools.TensorType(
                name=Names.made_up("in", index), shape=item.shape, dtype=_NUMPY[item.dtype]
            )
            for index, item in enumerate(interface.inputs)
        ],
        outputs=[
            coremltools.TensorType(name=Names.made_up("out", index), dtype=_NUMPY[item.dtype])
            for index, item in enumerate(interface.outputs)
        ],
        specification_version=version,
    )
    special = {"common::add_fp16_cast": _half_precision_pass(exact)}
    for pipeline in ("frontend_pytorch", "default", "backend_mlprogram"):
        for name in PassPipeline.get_pipeline(pipeline).passes:
            if precision == "fp16" or name not in _HALF_PASSES:
                special.get(name, PASS_REGISTRY[name])(program)
    program._check_early_error_out_for_invalid_program()
    folder.mkdir(parents=True, exist_ok=True)
    specification = write(program, weights_dir=str(folder), specification_version=version)
    weights = folder / WEIGHTS_FILE
    return Conversion(specification, weights)


_HALF_PASSES = {"common::add_fp16_cast", "common::add_int16_cast"}


def _half_precision_pass(exact: set[int]) -> Any:
    """coremltools' pass with a faster check for overflow, leaving operators in `exact` alone."""
    from coremltools.converters.mil.mil.passes.defs.quantization import add_fp16_cast

    def is_rounded(operation: Any) -> bool:
        found = _OPERATOR.match(operation.name)
        return found is None or int(found[1]) not in exact

    class HalfPrecision(add_fp16_cast):
        def __str__(self) -> str:
            return add_fp16_cast.__name__

        @staticmethod
        def fp16_overflow(op: Any) -> bool:
            if all(_fits_half(value) for value in _constants(op)):
                return False
            return bool(add_fp16_cast.fp16_overflow(op))

    return HalfPrecision(op_selector=is_rounded)


def _constants(operation: Any) -> Iterator[Any]:
    for inputs in operation.inputs.values():
        for var in inputs if isinstance(inputs, (list, tuple)) else [inputs]:
            if (
                var.op is not None
                and var.op.op_type == "const"
                and var.is_tensor_or_scalar_of(dtype="fp32")
            ):
                yield var.op.val.val


def _fits_half(value: Any) -> bool:
    """Whether all of a numpy array lies in half precision's range (no for NaN)."""
    if value.size == 0:
        return True
    low, high = torch.aminmax(torch.as_tensor(value))
    return bool(low >= -65504 and high <= 65504)


def _check_supported(function: Function) -> None:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    for node in function.operators():
        target: Any = node.target
        kind = target.name() if isinstance(target, torch._ops.OpOverload) else target.__name__
        if _TORCH_OPS_REGISTRY.get_func(kind) is None:
            raise LoweringError(
                f"function '{function.name}': coremltools cannot convert {describe(node)}",
                "Write it with other operators, or add a legalization rule for it.",
            )


def _failure(function: Function, current: list[Any], error: Exception) -> LoweringError:
    text = str(error).strip().splitlines() or [type(error).__name__]
    found = _OPERATOR.match(current[0].name) if current else None
    place = "the whole function"
    if found:
        place = describe(list(function.operators())[int(found[1])])
    return LoweringError(
        f"function '{function.name}': coremltools fails at or after {place}: {text[0]}",
        "Write this part of the model with other operators, or add a legalization rule for it.",
    )


class _NumpyTypes(dict[torch.dtype, Any]):
    def __missing__(self, dtype: torch.dtype) -> Any:
        return torch.empty(0, dtype=dtype).numpy().dtype.type


_NUMPY = _NumpyTypes()


def _distinct(names: Iterator[str]) -> list[str]:
    taken: set[str] = set()
    result = []
    for name in names:
        while name in taken:
            name += "_"
        taken.add(name)
        result.append(name)
    return result
