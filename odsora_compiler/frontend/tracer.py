"""Recording a host's tensor operators as nodes while its Python runs.

What touches no traced tensor just runs; one that does becomes a node. A real tensor that meets a
traced one becomes a literal or a constant, as its value is then. What a write changes is kept by
`frontend.memory`, what gets around the operators by `frontend.escapes`; what the host sees of
components is `frontend.host`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from odsora_compiler.errors import CaptureError
from odsora_compiler.frontend.escapes import needs_value
from odsora_compiler.frontend.memory import Geometry, Memories
from odsora_compiler.frontend.operators import bound_arguments, draws, plain_form, refuse_foreign
from odsora_compiler.frontend.source import running_line, running_place
from odsora_compiler.ir.function import Provenance, TensorSpec
from odsora_compiler.ir.host import Draw, call_component, random_tensor
from odsora_compiler.ir.inference import FAKE_MODE, canonical, fake_tensor, infer

aten = torch.ops.aten


class Tracer(TorchDispatchMode):
    """Records operators on traced tensors into `graph`, lets all others run.

    A traced tensor is a fake tensor, or a real one that a traced value was written into; both are
    known by their storage. `constants`: what `get_attr` nodes of the graph name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self._memories = Memories(self._emit, self._constant)
        self._known_constants: dict[Any, fx.Node] = {}
        self._draws = 0

    def add_input(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A traced tensor that is the graph's next input."""
        node = self.graph.create_node("placeholder", name, name=name)
        node.meta["val"] = fake_tensor(tuple(like.shape), like.dtype)
        return self._memories.new(tuple(like.shape), like.dtype, node)

    def add_call(
        self, component: str, inputs: Mapping[str, fx.Node], outputs: tuple[TensorSpec, ...]
    ) -> dict[str, torch.Tensor]:
        """Add a call of the component's function `base`; returns its outputs, traced."""
        call = self.graph.call_function(call_component, (component, "base"), dict(inputs))
        call.meta["val"] = {spec.name: fake_tensor(spec.shape, spec.dtype) for spec in outputs}
        call.meta["provenance"] = Provenance(source=running_line())
        return {
            spec.name: self._memories.new(
                spec.shape, spec.dtype, self._emit(operator.getitem, call, spec.name)
            )
            for spec in outputs
        }

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node of a tensor's present value: a literal or a constant for one not traced."""
        with _disable_current_modes():
            if not self.is_traced(tensor):
                return self._constant(tensor)
            return self._memories.of(tensor).read(Geometry.of(tensor))

    def is_traced(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's value is known only when the graph runs."""
        return self._memories.has(tensor)

    # ------------------------------------------------------------------ operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question, such as which device a tensor is on
            with FAKE_MODE:
                return func(*args, **kwargs)
        traced = any(self.is_traced(tensor) for tensor in _tensors((args, kwargs)))
        if draws(func, args, kwargs) and (traced or kwargs.get("generator") is None):
            return self._random(func, bound_arguments(func, args, kwargs))
        if traced and func in _OF_SHAPE:
            args, kwargs = pytree.tree_map_only(torch.Tensor, _real_like, (args, kwargs))
            traced = False
        if not traced:
            result = func(*args, **kwargs)
            # A buffer whose parts are written later has the same first value in every capture.
            return result.zero_() if func in _UNFILLED else result
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        return self._record(func, args, kwargs)

    def _record(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Add the call of an operator that writes nothing; returns fakes that stand for it."""
        if func is aten.native_batch_norm.default and args[5] and args[3] is not None:
            # Its schema does not say that it writes.
            raise CaptureError(
                f"{running_place()}: a batch norm in training changes its statistics",
                "Call .eval() on its module.",
            )
        result = self._on_fakes(func, args, kwargs)
        fakes, structure = pytree.tree_flatten(result)
        if not fakes or not all(isinstance(fake, torch.Tensor) for fake in fakes):
            raise needs_value(str(func))
        if func is aten.as_strided.default:
            return result  # its value is what its geometry says
        if isinstance(result, torch.Tensor):
            nodes = [self._one_result(func, args, kwargs, result.dtype)]
        else:
            whole = self._call_node(func, args, kwargs)
            nodes = [self._emit(operator.getitem, whole, index) for index in range(len(fakes))]
        return pytree.tree_unflatten(self._memories.add(fakes, nodes), structure)

    def _call_node(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> fx.Node:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.node_of, (args, kwargs))
        return self._emit(func, *args, **kwargs)

    def _one_result(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> fx.Node:
        """The call's node, with a number in place of a real 0-dimensional tensor where it may be.

        A number promotes others less than a tensor, and a first argument is rounded to half
        precision where the result is.
        """
        if func in _TAKES_NUMBERS and kwargs.get("alpha", 1) == 1:
            left, right = args
            call: tuple[Any, ...] | None = None
            if self._is_number(right):
                call = (func, self.node_of(left), _item(right))
            elif (
                self._is_number(left)
                and func in _NUMBERS_FIRST
                and (left.dtype == dtype or dtype not in _HALF)
            ):
                call = (_NUMBERS_FIRST[func], self.node_of(right), _item(left))
            if call is not None and infer(call[0], call[1:], {}).dtype == dtype:
                return self._emit(*call)
        return self._call_node(func, args, kwargs)

    def _is_number(self, argument: Any) -> bool:
        return (
            isinstance(argument, torch.Tensor)
            and argument.dim() == 0
            and argument.dtype in _NUMBER_DTYPES
            and not self.is_traced(argument)
        )

    def _write(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """An operator that writes into its arguments: new values for their memories."""
        if func.overloadpacket in (aten.resize_, aten.set_):
            raise CaptureError(
                f"{running_place()}: {func} gives a traced tensor other memory",
                "Make a new tensor instead.",
            )
        if torch.Tag.inplace_view in func.tags:
            # The tensor becomes another view of its memory, in which nothing changes.
            if not isinstance(args[0], FakeTensor):
                return func(*args, **kwargs)
            with FAKE_MODE:
                return func(*args, **kwargs)
        given = bound_arguments(func, args, kwargs)
        names = [item.name for item in func._schema.arguments if _is_written(item)]
        written = pytree.tree_leaves([given[name] for name in names])
        for tensor in written:
            self._memories.of(tensor)
        self._on_fakes(func, args, kwargs)  # raises what PyTorch would raise
        if func is aten.copy_.default:
            values = [given["src"]]
        elif func is aten.zero_.default or func.overloadpacket is aten.fill_:
            values = [torch.as_tensor(given.get("value", 0))]
        else:
            form = _functional(func)
            if form is None:
                raise CaptureError(
                    f"{running_place()}: {func} writes into a tensor and has no other form",
                    "Use an operator that returns its result.",
                )
            if func._schema.arguments[-1].name in names:  # add.out and the like
                kwargs = {key: value for key, value in kwargs.items() if key not in names}
            values = pytree.tree_leaves(self._record(form, args, kwargs))
        for tensor, value in zip(written, values, strict=True):
            self._put(tensor, value)
        if not func._schema.returns:
            return None
        return written[0] if len(written) == 1 else tuple(written)

    def _put(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Write `value`, cast and expanded as in PyTorch, where `tensor` is."""
        if not _fits(value.shape, tensor.shape):
            raise CaptureError(
                f"{running_place()}: a result of shape {list(value.shape)} is written into a "
                f"tensor of shape {list(tensor.shape)}",
                "Give out= a tensor of the result's shape.",
            )
        if any(n > 1 and w == 0 for n, w in zip(tensor.shape, tensor.stride(), strict=True)):
            raise CaptureError(
                f"{running_place()}: elements of the tensor that is written share memory",
                "Write to a copy: tensor.clone().",
            )
        if self.is_traced(value):
            node = self._emit(aten.to.dtype, self.node_of(value), tensor.dtype)
            if value.shape != tensor.shape:
                node = self._emit(aten.expand.default, node, list(tensor.shape))
        else:
            node = self._constant(value.to(tensor.dtype).expand(tensor.shape))
        self._memories.of(tensor).write(Geometry.of(tensor), node)

    def _on_fakes(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._memories.stand_in, (args, kwargs))
        try:
            with FAKE_MODE:
                return func(*args, **kwargs)
        except DataDependentOutputException:
            raise needs_value(str(func)) from None
        except DynamicOutputShapeException:
            raise CaptureError(
                f"{running_place()}: the shape of a value depends on a traced tensor's values "
                f"({func})",
                "Keep the shape and select with torch.where or a product with the mask, instead of "
                "indexing by a mask or nonzero().",
            ) from None

    # ------------------------------------------------------------------ random numbers

    def _random(self, func: Any, given: dict[str, Any]) -> Any:
        """Record a draw with a seed of its own; with a generator, draw now."""
        name, generator = func._schema.name.removeprefix("aten::"), given.get("generator")
        target: Any = given.get("self")
        if name in ("randn", "rand", "randn_like", "rand_like") and "out" not in given:
            size = given["size"] if target is None else target.shape
            dtype = given.get("dtype") or (
                torch.get_default_dtype() if target is None else target.dtype
            )
            return self._draw("normal" if "randn" in name else "uniform", size, dtype, generator)
        if name == "uniform_":
            drawn = self._draw("uniform", target.shape, target.dtype, generator)
            low, spread = given["from"], given["to"] - given["from"]
        elif name == "normal_":
            drawn = self._draw("normal", target.shape, target.dtype, generator)
            low, spread = given["mean"], given["std"]
        elif name == "normal" and "out" not in given:
            low, spread = given["mean"], given["std"]
            whole = [tensor for tensor in (low, spread) if isinstance(tensor, torch.Tensor)]
            size = given.get("size") or torch.broadcast_shapes(*(item.shape for item in whole))
            dtype = given.get("dtype") or (whole[0].dtype if whole else torch.get_default_dtype())
            drawn = self._draw("normal", size, dtype, generator)
        else:
            raise CaptureError(
                f"{running_place()}: {func} draws random numbers in a way that graphs do not have",
                "Use torch.randn or torch.rand, or give it a torch.Generator: its numbers are then "
                "drawn once, when the program is captured.",
            )
        with self:
            drawn = drawn * spread if isinstance(spread, torch.Tensor) or spread != 1 else drawn
            drawn = drawn + low if isinstance(low, torch.Tensor) or low != 0 else drawn
        if target is None:
            return drawn
        self._put(target, drawn)
        return target

    def _draw(self, kind: Draw, size: Any, dtype: torch.dtype, generator: Any) -> torch.Tensor:
        if generator is not None:
            draw = torch.randn if kind == "normal" else torch.rand
            return draw(size, dtype=dtype, generator=generator)
        node = self._emit(random_tensor, kind, list(size), dtype, self._draws)
        self._draws += 1
        return self._memories.new(tuple(size), dtype, node)

    # ------------------------------------------------------------------ nodes

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        form = plain_form(target, args, kwargs)
        if isinstance(form, fx.Node):
            return form
        target, args, kwargs = form
        if target is not random_tensor:
            refuse_foreign(target, running_place())
        name = getattr(target, "overloadpacket", target).__name__
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["val"] = infer(target, args, kwargs)
        node.meta["provenance"] = Provenance(source=running_line())
        return node

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        """A literal where all elements are the same, else a tensor of `constants`."""
        if tensor.device.type == "meta":
            raise CaptureError(
                f"{running_place()}: this tensor is on the meta device and holds no data",
                "Where it is a weight, make it an output of a component that holds it.",
            )
        if tensor.dtype.is_complex:
            raise CaptureError(
                f"{running_place()}: a complex tensor meets a traced one",
                "Compute with real and imaginary parts: programs hold real numbers only.",
            )
        value = tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        content = value.view(-1).view(torch.uint8).numpy().tobytes()
        first = content[: value.element_size()]
        uniform = value.dtype in _NUMBER_DTYPES and content == first * value.numel()
        key = (tuple(value.shape), value.dtype, first if uniform else content)
        if key not in self._known_constants:
            if uniform:
                number = _item(value.view(-1)[0]) if value.numel() else 0
                node = self._emit(aten.full.default, list(value.shape), number, dtype=value.dtype)
            else:
                name = f"constant_{len(self.constants)}"
                self.constants[name] = value
                node = self.graph.create_node("get_attr", name)
                node.meta["val"] = canonical(value)
                node.meta["provenance"] = Provenance(source=running_line())
            self._known_constants[key] = node
        return self._known_constants[key]


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _fits(shape: torch.Size, room: torch.Size) -> bool:
    """Whether a value of this shape can be expanded to `room`."""
    spare = len(room) - len(shape)
    return spare >= 0 and all(
        size in (1, space) for size, space in zip(shape, room[spare:], strict=True)
    )


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _functional(func: Any) -> Any | None:
    """The operator that returns what `func` writes: `add.Tensor` of `add_.Tensor`, `add.out`."""
    name = func._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None)
    wanted = [
        (item.name, str(item.type))
        for item in func._schema.arguments
        if name.endswith("_") or not _is_written(item)
    ]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        arguments = [(item.name, str(item.type)) for item in found._schema.arguments]
        if arguments == wanted and not found._schema.is_mutable:
            return found
    return None


def _real_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _item(tensor: torch.Tensor) -> int | float | bool:
    number: int | float | bool = tensor.item()
    return number


_TAKES_NUMBERS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
# What does the same with the arguments the other way round.
_NUMBERS_FIRST = {
    aten.add.Tensor: aten.add.Tensor,
    aten.mul.Tensor: aten.mul.Tensor,
    aten.sub.Tensor: aten.rsub.Scalar,
}
_HALF = (torch.float16, torch.bfloat16)
_NUMBER_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}
_UNFILLED = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# Their results depend on no values of their arguments.
_OF_SHAPE = _UNFILLED | {
    aten.full_like.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones_like.default,
    aten.zeros_like.default,
}
