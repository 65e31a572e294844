"""Programs as files and as text: JSON graphs that name ATen operators, weights in safetensors.

Loading reads data only. Operators are looked up by name among PyTorch's own; no code is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx

from odsora_compiler.errors import PackageError, UsageError, WeightsError
from odsora_compiler.ir.component_names import NAME_HINT, is_component_name
from odsora_compiler.ir.encoding import (
    decode_argument,
    encode_argument,
    resolve_target,
    target_name,
)
from odsora_compiler.ir.function import Function, Provenance, dtype_name
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.program import Chunk, Component, Plan, Program
from odsora_compiler.ir.text_to_video import TextToVideo
from odsora_compiler.ir.weights import FileWeights, LookupTable, WeightSpec, WeightStore

SCHEMA_VERSION = 2
_SHARD_BYTES = 1 << 30


def save_program(program: Program, folder: str | Path) -> Path:
    """Write `program` as a folder: `program.json`, tensors of the host, weights per component.

    Weights that functions use are copied shard by shard (1 GiB), so a program larger than memory
    can be saved. The folder must not exist; raises `UsageError` when it does, or when a component's
    name cannot be that of a file. It is written beside its place, so a failure leaves no part.
    """
    folder = Path(folder)
    for name in program.components:
        if not is_component_name(name):
            raise UsageError(f"a component cannot be called {name!r}", NAME_HINT)
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder}: a program cannot be saved there (it exists)")
    partial = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{folder}: a program cannot be saved there ({error.strerror})") from error
    try:
        _write_program(program, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_program(folder: str | Path) -> Program:
    """Read a folder that `save_program` wrote. Raises `PackageError` when it is not one."""
    folder = Path(folder)
    path = folder / "program.json"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise PackageError(f"{folder}: not a saved program ({error.strerror})") from error
    except ValueError as error:
        raise PackageError(f"{path}: not valid JSON ({error})") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA_VERSION:
        raise PackageError(
            f"{path}: schema version {schema}, this release reads {SCHEMA_VERSION}",
            "Save the program again with this release, or use the release that wrote it.",
        )
    try:
        return _read_program(data, folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PackageError(f"{path}: damaged program ({error!r})") from error
    except WeightsError as error:
        raise PackageError(error.message, error.hint) from error


def _write_program(program: Program, folder: Path) -> None:
    for component in program.components.values():
        _save_weights(component, folder / "weights" / component.name)
    _save_tensors(program.examples, folder / "examples.safetensors")
    _save_tensors(program.constants, folder / "constants.safetensors")
    (folder / "examples").mkdir()
    for name, component in program.components.items():
        _save_tensors(component.examples, folder / "examples" / f"{name}.safetensors")
    text = json.dumps({"schema": SCHEMA_VERSION, **program_to_data(program)}, indent=1)
    (folder / "program.json").write_text(text)


def _read_program(data: dict[str, Any], folder: Path) -> Program:
    components = {}
    for name, entry in data["components"].items():
        if not is_component_name(name):
            raise PackageError(
                f"{folder}: a component of the saved program cannot be called {name!r}",
                "Save the program again.",
            )
        components[name] = Component(
            name,
            {key: function_from_data(value) for key, value in entry["functions"].items()},
            _load_weights(folder / "weights" / name),
            _plan_from_data(entry["plan"]),
            _load_tensors(folder / "examples" / f"{name}.safetensors"),
            entry["compute_units"],
        )
    film = data["text_to_video"]
    return Program(
        data["name"],
        components,
        function_from_data(data["host"]),
        _load_tensors(folder / "examples.safetensors"),
        set(data["facts"]),
        list(data["history"]),
        _load_tensors(folder / "constants.safetensors"),
        None if film is None else TextToVideo(**film),
    )


def program_to_data(program: Program) -> dict[str, Any]:
    """Everything but weights and examples, as JSON data."""
    return {
        "name": program.name,
        "components": {
            name: {
                "functions": {
                    key: function_to_data(function) for key, function in component.functions.items()
                },
                "plan": asdict(component.plan) if component.plan else None,
                "compute_units": component.compute_units,
            }
            for name, component in program.components.items()
        },
        "host": function_to_data(program.host),
        "facts": sorted(program.facts),
        "history": program.history,
        "text_to_video": asdict(program.text_to_video) if program.text_to_video else None,
    }


def fingerprint(program: Program) -> str:
    """A digest of graphs, plans and weight encodings: equal when a pass changed nothing."""
    digest = hashlib.sha256()
    data = program_to_data(program)
    del data["facts"], data["history"]
    digest.update(json.dumps(data, sort_keys=True).encode())
    for name, tensor in program.constants.items():
        digest.update(f"{name}/{dtype_name(tensor.dtype)}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for component in program.components.values():
        for name in component.weights.names():
            table = component.weights.encoding(name)
            if table is not None:
                shape = list(table.table.shape)
                digest.update(f"{component.name}/{name}/{table.bits}/{table.axis}{shape}".encode())
                digest.update(table.table.float().contiguous().numpy().tobytes())
                digest.update(table.indices.contiguous().numpy().tobytes())
    return digest.hexdigest()


def function_fingerprint(function: Function) -> str:
    """A digest of one function's graph, name aside."""
    data = function_to_data(function)
    del data["name"], data["base"]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def function_to_data(function: Function) -> dict[str, Any]:
    """One function as JSON data."""
    nodes = []
    for node in function.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "call_function":
            entry["target"] = target_name(node.target)
        elif node.op != "output":
            entry["target"] = node.target
        if node.args:
            entry["args"] = [encode_argument(arg) for arg in node.args]
        if node.kwargs:
            entry["kwargs"] = {key: encode_argument(value) for key, value in node.kwargs.items()}
        if "val" in node.meta:
            entry["val"] = _encode_value(node.meta["val"])
        if "provenance" in node.meta:
            origin = node.meta["provenance"]
            entry["from"] = [origin.module, origin.source, *origin.passes]
        for key in ("axes", "chunk"):
            if node.meta.get(key) is not None:
                entry[key] = node.meta[key]
        if node.op == "output":
            entry["names"] = list(node.meta["names"])
        nodes.append(entry)
    return {"name": function.name, "base": function.base, "nodes": nodes}


def function_from_data(data: dict[str, Any]) -> Function:
    """The inverse of `function_to_data`. Raises `PackageError` on what is not such data."""
    try:
        return _read_function(data)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise PackageError(f"damaged graph in a saved program: {error!r}") from error


def program_text(program: Program, only: set[str] | None = None) -> str:
    """The program as readable text; `only` limits it to functions of these names."""
    lines = [f"program {program.name}  [{', '.join(program.history) or 'captured'}]"]
    for component in program.components.values():
        for function in component.functions.values():
            if only is None or function.name in only:
                lines.append(function_text(function, f"{component.name}."))
    lines.append(function_text(program.host))
    return "\n".join(lines)


def function_text(function: Function, prefix: str = "") -> str:
    """One function as readable text: a line a node with operator, arguments, shape and origin."""
    lines = [
        f"function {prefix}{function.name}" + (f" from {function.base}" if function.base else "")
    ]
    for node in function.graph.nodes:
        chunk = f"|{node.meta['chunk']}" if "chunk" in node.meta else "|"
        origin = node.meta.get("provenance")
        lines.append(
            f"  {chunk:<3} {_node_text(node):<100} # {origin}"
            if origin
            else f"  {chunk:<3} {_node_text(node)}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------ nodes and their arguments


def _read_function(data: dict[str, Any]) -> Function:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        op = entry["op"]
        target: Any = "output" if op == "output" else entry["target"]
        if op == "call_function":
            target = resolve_target(target)
        node = graph.create_node(
            op,
            target,
            tuple(decode_argument(arg, nodes) for arg in entry.get("args", [])),
            {key: decode_argument(value, nodes) for key, value in entry.get("kwargs", {}).items()},
            name=entry["name"],
        )
        nodes[entry["name"]] = node
        if "val" in entry:
            node.meta["val"] = _decode_value(entry["val"])
        if "from" in entry:
            module, source, *passes = entry["from"]
            node.meta["provenance"] = Provenance(module, source, tuple(passes))
        for key in ("axes", "chunk"):
            if key in entry:
                node.meta[key] = entry[key]
        if op == "output":
            node.meta["names"] = tuple(entry["names"])
    return Function(data["name"], graph, data["base"])


def _encode_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [dtype_name(value.dtype), *value.shape]
    if isinstance(value, dict):
        return {key: _encode_value(item) for key, item in value.items()}
    return {"": [_encode_value(item) for item in value]}


def _decode_value(value: Any) -> Any:
    if isinstance(value, list):
        return fake_tensor(tuple(value[1:]), getattr(torch, value[0]))
    if list(value) == [""]:
        return tuple(_decode_value(item) for item in value[""])
    return {key: _decode_value(item) for key, item in value.items()}


def _node_text(node: fx.Node) -> str:
    if node.op == "placeholder":
        axes = f' "{node.meta["axes"]}"' if node.meta.get("axes") else ""
        return f"{node.name} = input {node.target}: {_value_text(node.meta.get('val'))}{axes}"
    if node.op == "get_attr":
        return f"{node.name} = weight {node.target}: {_value_text(node.meta.get('val'))}"
    if node.op == "output":
        pairs = zip(node.meta["names"], _nodes_of(node.args[0]), strict=True)
        return "return " + ", ".join(f"{name}={value.name}" for name, value in pairs)
    parts = [_argument_text(arg) for arg in node.args]
    parts += [f"{key}={_argument_text(value)}" for key, value in node.kwargs.items()]
    called = f"{target_name(node.target)}({', '.join(parts)})"
    return f"{node.name} = {called}: {_value_text(node.meta.get('val'))}"


def _nodes_of(value: Any) -> Iterator[fx.Node]:
    return iter(value)


def _argument_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument_text(item) for item in value) + "]"
    return str(value)


def _value_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_value_text(item) for item in value) + ")"
    return "?"


# ------------------------------------------------------------------ plans and weights


def _plan_from_data(data: dict[str, Any] | None) -> Plan | None:
    if data is None:
        return None
    chunks = tuple(Chunk(**chunk) for chunk in data["chunks"])
    return Plan(data["budget"], data["precision"], data["cost"], chunks)


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # Cloned, because one tensor may be the example of two inputs.
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    files = FileWeights(path)
    return {name: files.load(name) for name in files.names()}


def _save_weights(component: Component, folder: Path) -> None:
    folder.mkdir(parents=True)
    weights = component.weights
    shard: dict[str, torch.Tensor] = {}
    count = 0
    encodings: dict[str, dict[str, int]] = {}

    def flush() -> None:
        nonlocal shard, count
        save_file(shard, folder / f"weights-{count:05d}.safetensors")
        shard, count = {}, count + 1

    for name in component.used_weights():
        table = weights.encoding(name)
        if table is None:
            shard[name] = weights.load(name).contiguous().clone()
        else:
            encodings[name] = {"bits": table.bits, "axis": table.axis}
            shard[name] = table.indices.contiguous()
            shard[f"{name}::table"] = table.table.contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES:
            flush()
    flush()
    dtypes = {name: dtype_name(weights.spec(name).dtype) for name in encodings}
    (folder / "encodings.json").write_text(json.dumps({"tables": encodings, "dtypes": dtypes}))


def _load_weights(folder: Path) -> WeightStore:
    files = FileWeights(folder)
    try:
        data = json.loads((folder / "encodings.json").read_text())
    except (OSError, ValueError) as error:
        raise PackageError(f"{folder}: damaged saved weights ({error})") from error
    if not data["tables"]:
        return files
    return _SavedWeights(files, data["tables"], data["dtypes"])


class _SavedWeights:
    """Weights of a saved program, some of them stored as look-up tables."""

    def __init__(
        self, files: FileWeights, tables: dict[str, dict[str, int]], dtypes: dict[str, str]
    ) -> None:
        self._files = files
        self._dtypes = dtypes
        self._tables = tables

    def names(self) -> list[str]:
        return [name for name in self._files.names() if not name.endswith("::table")]

    def spec(self, name: str) -> WeightSpec:
        spec = self._files.spec(name)
        if name not in self._tables:
            return spec
        return WeightSpec(spec.shape, getattr(torch, self._dtypes[name]))

    def load(self, name: str) -> torch.Tensor:
        table = self.encoding(name)
        if table is None:
            return self._files.load(name)
        return table.decode().to(self.spec(name).dtype)

    def encoding(self, name: str) -> LookupTable | None:
        if name not in self._tables:
            return None
        stored = self._tables[name]
        return LookupTable(
            stored["bits"],
            self._files.load(name),
            self._files.load(f"{name}::table"),
            stored["axis"],
        )
