"""Tensors that share memory, as values without memory: what a write through a view changes.

A host graph is functional, the sampler's Python is not. A `Memory` follows one storage: it knows
the node whose value the storage holds, reads any view of it as slices, permutations and reshapes of
that value, and turns a write through a view into a new value of the whole. `Memories` are those of
all traced tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from odsora_compiler.errors import CaptureError
from odsora_compiler.frontend.source import running_place
from odsora_compiler.ir.inference import FAKE_MODE

aten = torch.ops.aten

Emit = Callable[..., fx.Node]


@dataclass(frozen=True)
class Geometry:
    """Where the elements of a tensor lie in its storage. Strides of sizes 0 and 1 are 0."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Geometry:
        """The geometry of a strided tensor, real or fake."""
        size = tuple(tensor.shape)
        stride = tuple(w if n > 1 else 0 for n, w in zip(size, tensor.stride(), strict=True))
        return cls(size, stride, int(tensor.storage_offset()))

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.size)

    def by_memory(self) -> list[int]:
        """Dimensions in the order of memory, those of one element first."""
        return sorted(range(len(self.size)), key=lambda d: (self.size[d] > 1, -self.stride[d]))

    def fills(self, elements: int) -> bool:
        """Whether this is each of the first `elements` of the storage, once."""
        expected = 1
        for d in reversed(self.by_memory()):
            if self.size[d] > 1 and self.stride[d] != expected:
                return False
            expected *= self.size[d]
        return self.offset == 0 and self.elements == elements


class Memory:
    """One storage and the node whose value it holds.

    `whole`: a geometry that fills the storage; `node`: its value. `emit(target, *args)` adds an
    operator to the graph, `constant(tensor)` a tensor.
    """

    def __init__(
        self,
        whole: Geometry,
        node: fx.Node,
        emit: Emit,
        constant: Callable[[torch.Tensor], fx.Node],
    ) -> None:
        self.dtype: torch.dtype = node.meta["val"].dtype
        self._whole = whole
        self._emit = emit
        self._constant = constant
        self._values = {whole: node}

    def read(self, view: Geometry) -> fx.Node:
        """The value of a view of the storage."""
        if view not in self._values:
            self._values[view] = self._path_values(self._path(view))[-1]
        return self._values[view]

    def note(self, view: Geometry, node: fx.Node) -> None:
        """`node` is the value of `view`, until the next write."""
        self._values.setdefault(view, node)

    def write(self, view: Geometry, node: fx.Node) -> None:
        """Put the value of `node` where `view` is."""
        if self._values.get(view) is node:
            return
        whole = node
        if view != self._whole:
            path = self._path(view)
            values = self._path_values(path)
            for (target, args), before in zip(reversed(path), reversed(values[:-1]), strict=True):
                whole = self._put_back(target, args, before, whole)
        self._values = {self._whole: whole, view: node}

    def _path_values(self, path: list[tuple[Any, tuple[Any, ...]]]) -> list[fx.Node]:
        """The whole value, then the value after each step of the path."""
        values = [self._values[self._whole]]
        for target, args in path:
            values.append(self._emit(target, values[-1], *args))
        return values

    def _put_back(
        self, target: Any, args: tuple[Any, ...], before: fx.Node, value: fx.Node
    ) -> fx.Node:
        """`before` with `value` where `target(before, *args)` takes it from."""
        if target in _SCATTERS:
            return self._emit(_SCATTERS[target], before, value, *args)
        if target is aten.view.default:
            return self._emit(target, value, list(before.meta["val"].shape))
        if target is aten.permute.default:
            return self._emit(target, value, [args[0].index(d) for d in range(len(args[0]))])
        return self._emit(aten.index_put.default, before, args[0], value)

    def _path(self, view: Geometry) -> list[tuple[Any, tuple[Any, ...]]]:
        """Operators, with their further arguments, that lead from the whole to the view."""
        cut = _cut(self._whole, view)
        if cut is not None:
            return cut
        elements = self._whole.elements
        places = torch.arange(elements).as_strided(view.size, view.stride, view.offset)
        path: list[tuple[Any, tuple[Any, ...]]] = []
        if len(self._whole.size) > 1:
            path.append((aten.permute.default, (self._whole.by_memory(),)))
        if len(self._whole.size) != 1:
            path.append((aten.view.default, ([elements],)))
        return [*path, (aten.index.Tensor, ([self._constant(places)],))]


class Memories:
    """The memories of traced tensors, found by storage.

    A traced tensor is a fake tensor, or a real one that a traced value was written into.
    """

    def __init__(self, emit: Emit, constant: Callable[[torch.Tensor], fx.Node]) -> None:
        self._emit = emit
        self._constant = constant
        self._by_storage: dict[int, Memory] = {}
        self._alive: list[torch.UntypedStorage] = []  # keys are those of living storages only
        self._flat_fakes: dict[int, torch.Tensor] = {}  # for real storages

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is traced. Raises `CaptureError` on one that is neither."""
        if tensor.layout is not torch.strided:
            return False
        if _storage(tensor) in self._by_storage:
            return True
        if isinstance(tensor, FakeTensor):
            raise CaptureError(
                f"{running_place()}: this tensor holds no data, because the weights of its module "
                "come from a file",
                "Make it an output of a component that holds it.",
            )
        return False

    def of(self, tensor: torch.Tensor) -> Memory:
        """The memory of a tensor. A real one is traced from here on, and so are all its views."""
        if _storage(tensor) not in self._by_storage:
            self._begin(tensor)
        memory = self._by_storage[_storage(tensor)]
        if memory.dtype != tensor.dtype or tensor.is_conj() or tensor.is_neg():
            raise CaptureError(
                f"{running_place()}: memory of {memory.dtype} is seen as another kind of number",
                "Cast with .to(dtype); parts and conjugates of complex numbers cannot be traced.",
            )
        return memory

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, node: fx.Node) -> torch.Tensor:
        """A fake tensor with memory of its own, whose value is that of `node`."""
        with _disable_current_modes(), FAKE_MODE:
            fake = torch.empty(shape, dtype=dtype)
        self._follow(fake, Geometry.of(fake), node)
        return fake

    def add(self, fakes: list[torch.Tensor], nodes: list[fx.Node]) -> list[torch.Tensor]:
        """What an operator gave, as traced tensors: views of known memory, or in their own."""
        views = [_storage(fake) in self._by_storage for fake in fakes]
        added = []
        for fake, node, view in zip(fakes, nodes, views, strict=True):
            if view:
                self.of(fake).note(Geometry.of(fake), node)
            elif _storage(fake) in self._by_storage or not Geometry.of(fake).fills(_size(fake)):
                fake = self.new(tuple(fake.shape), fake.dtype, node)
            else:
                self._follow(fake, Geometry.of(fake), node)
            added.append(fake)
        return added

    def stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake for a tensor where only shapes and memory matter."""
        if isinstance(tensor, FakeTensor):
            return tensor
        flat = self._flat_fakes.get(_storage(tensor))
        with FAKE_MODE:
            if flat is None:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _begin(self, tensor: torch.Tensor) -> None:
        base = tensor if tensor._base is None else tensor._base
        whole = Geometry.of(base)
        if base.dtype != tensor.dtype or not whole.fills(_size(tensor)):
            whole = Geometry((_size(tensor),), (1,), 0)
        present = tensor.detach().as_strided(whole.size, whole.stride, 0)
        memory = self._follow(tensor, whole, self._constant(present))
        with FAKE_MODE:
            flat = torch.empty(_size(tensor), dtype=tensor.dtype)
        self._flat_fakes[_storage(tensor)] = flat
        self._by_storage[_storage(flat)] = memory

    def _follow(self, tensor: torch.Tensor, whole: Geometry, node: fx.Node) -> Memory:
        memory = Memory(whole, node, self._emit, self._constant)
        self._by_storage[_storage(tensor)] = memory
        self._alive.append(tensor.untyped_storage())
        return memory


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: torch.Tensor) -> int:
    """How many elements the tensor's storage has."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def _cut(whole: Geometry, view: Geometry) -> list[tuple[Any, tuple[Any, ...]]] | None:
    """Slices, a permutation and new dimensions that make `view` of `whole`, or None.

    Each dimension of the view must walk along one dimension of the whole.
    """
    starts, rest = [0] * len(whole.size), view.offset - whole.offset
    for d in whole.by_memory():
        if whole.size[d] > 1:
            starts[d], rest = divmod(rest, whole.stride[d])
    if rest or not view.elements:
        return None
    walked: dict[int, tuple[int, int]] = {}  # dimension of the whole → size and step of the view's
    order = []
    for size, stride in zip(view.size, view.stride, strict=True):
        if stride == 0:
            continue
        along = [d for d, w in enumerate(whole.stride) if 0 < w <= stride]
        d = max(along, key=lambda d: whole.stride[d], default=-1)
        if d < 0 or d in walked or stride % whole.stride[d]:
            return None
        step = stride // whole.stride[d]
        if starts[d] + step * (size - 1) >= whole.size[d]:
            return None
        walked[d] = (size, step)
        order.append(d)

    path: list[tuple[Any, tuple[Any, ...]]] = []
    kept = list(range(len(whole.size)))
    for d in reversed(range(len(whole.size))):
        start = starts[d]
        size, step = walked.get(d, (1, 1))
        if d not in walked and whole.size[d] > 1:
            path.append((aten.select.int, (d, start)))
            kept.remove(d)
        elif size != whole.size[d]:
            path.append((aten.slice.Tensor, (d, start, start + step * (size - 1) + 1, step)))
    # Dimensions of one element may be anywhere; the others must be in the view's order.
    if order != [d for d in kept if d in walked]:
        order += [d for d in kept if d not in walked]
        path.append((aten.permute.default, ([kept.index(d) for d in order],)))
        kept = order
    narrow = [1 if w == 0 else n for n, w in zip(view.size, view.stride, strict=True)]
    if narrow != [walked[d][0] if d in walked else 1 for d in kept]:
        path.append((aten.view.default, (narrow,)))
    if narrow != list(view.size):
        path.append((aten.expand.default, (list(view.size),)))
    return path
