"""What a host's Python asks of a traced tensor around the operators that `frontend.tracer` records.

Where nothing would notice that no value is there, or that memory is no longer what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from odsora_compiler.errors import CaptureError
from odsora_compiler.frontend.source import running_place
from odsora_compiler.ir.function import dtype_name


class Escapes(TorchFunctionMode):
    """Refuses to hand a traced tensor's value or memory out of PyTorch, or to replace its memory.

    `is_traced` is that of the tracer. Copies and texts of traced tensors can be had: a text says
    type and shape. A device other than the CPU is refused for all tensors.
    """

    def __init__(self, is_traced: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self._is_traced = is_traced

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_device(_named_device(func, args, kwargs))
        if func in _FROM_LISTS:
            lists = [item for item in (*args, *kwargs.values()) if isinstance(item, list | tuple)]
            if self._any_traced(lists):
                raise CaptureError(
                    f"{running_place()}: {func.__name__}() takes numbers and gets a list with "
                    "traced tensors, whose values are known only when the program runs",
                    "Join tensors: torch.stack([a, b, torch.tensor(1.0)]).",
                )
        elif func == _SET_DATA and self._any_traced(args):
            raise CaptureError(
                f"{running_place()}: the assignment to .data gives a traced tensor other memory",
                "Give the new tensor a name, z = …, or write into the old one: z.copy_(…).",
            )
        elif func in _OF_ONE and self._is_traced(args[0]):
            return _answer(func, *args)
        return func(*args, **kwargs)

    def _any_traced(self, tree: Any) -> bool:
        return any(
            isinstance(leaf, torch.Tensor) and self._is_traced(leaf)
            for leaf in pytree.tree_leaves(tree)
        )


def needs_value(what: str, hint: str = "") -> CaptureError:
    """The error of Python that asks for a traced value by `what`."""
    return CaptureError(
        f"{running_place()}: Python asks for the value of a traced tensor ({what}), which is known "
        "only when the program runs",
        hint
        or "Compute with the tensor (torch.where instead of if), or let Python decide by what is "
        "known when the program is captured: options of build(), the schedule, shapes.",
    )


def _answer(func: Any, tensor: torch.Tensor, *args: Any) -> Any:
    """What a function of `_OF_ONE` gives for a traced tensor."""
    if func is torch.Tensor.__deepcopy__:
        return tensor.clone()
    if func is torch.Tensor.__reduce_ex__:
        # By this copy.copy makes a tensor of the same memory. Nothing else can take it along.
        return lambda: tensor.detach(), ()
    if func is torch.Tensor.__repr__ or (func is torch.Tensor.__format__ and not any(args)):
        return f"traced {dtype_name(tensor.dtype)}{list(tensor.shape)}"
    if func is torch.Tensor.__format__:
        raise needs_value("Tensor.__format__", "Print it without a format, or not at all.")
    raise needs_value(f"Tensor.{func.__name__}")


def _named_device(func: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.device | None:
    """The device that a call asks for."""
    named = kwargs.get("device")
    if func is torch.Tensor.cuda:
        named = "cuda"
    elif func is torch.Tensor.to and len(args) > 1:
        named = args[1] if isinstance(args[1], str | torch.device) else named
    return torch.device(named) if isinstance(named, str) else named


def _refuse_device(device: torch.device | None) -> None:
    if isinstance(device, torch.device) and device.type not in ("cpu", "meta"):
        raise CaptureError(
            f"{running_place()}: the host asks for the device '{device}'",
            "A host is traced on the CPU; leave it out or take a tensor's: device=z.device.",
        )


_FROM_LISTS = {
    torch.as_tensor,
    torch.asarray,
    torch.tensor,
    torch.Tensor.new,
    torch.Tensor.new_tensor,
}
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_OF_ONE = {
    torch.Tensor.__array__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.__dlpack__,
    torch.Tensor.__format__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.__repr__,
    torch.Tensor.data_ptr,
    torch.Tensor.numpy,
    torch.Tensor.tolist,
}
