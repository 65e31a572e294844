"""The part of Core ML's protobuf schema that saved packages of ML programs are read with.

coremltools has the whole schema, but its classes cannot be imported without all of coremltools,
which takes seconds and logs what it misses; running a bundle needs nothing else of it. Fields that
are not listed here are kept, unread, when a message is parsed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

# One message a line: `field number type`, where `type*` repeats, `type{}` is a map from strings,
# and `?group` puts the field into a group of which one is set at most (a oneof).
_MESSAGES = """
Model: specificationVersion 1 int32, description 2 ModelDescription, mlProgram 502 Program ?Type
ModelDescription: defaultFunctionName 21 string
Program: functions 2 Function{}
Function: inputs 1 NamedValueType*, opset 2 string, block_specializations 3 Block{}
Block: inputs 1 NamedValueType*, outputs 2 string*, operations 3 Operation*
Operation: type 1 string, inputs 2 Argument{}, outputs 3 NamedValueType*, blocks 4 Block*, \
attributes 5 Value{}
Argument: arguments 1 Binding*
Binding: name 1 string ?binding, value 2 Value ?binding
NamedValueType: name 1 string, type 2 ValueType
ValueType: tensorType 1 TensorType ?type, listType 2 ListType ?type, tupleType 3 TupleType ?type, \
stateType 5 StateType ?type
TensorType: dataType 1 int32, dimensions 3 Dimension*
ListType: type 1 ValueType, length 2 Dimension
TupleType: types 1 ValueType*
StateType: wrappedType 1 ValueType
Dimension: constant 1 ConstantDimension ?dimension
ConstantDimension: size 1 uint64
Value: type 2 ValueType, immediateValue 3 ImmediateValue ?value, \
blobFileValue 5 BlobFileValue ?value
ImmediateValue: tensor 1 TensorValue ?value, tuple 2 TupleValue ?value, list 3 ListValue ?value
BlobFileValue: fileName 1 string, offset 2 uint64
TupleValue: values 1 Value*
ListValue: values 1 Value*
TensorValue: floats 1 Floats ?value, ints 2 Ints ?value, bools 3 Bools ?value, \
strings 4 Strings ?value, longInts 5 LongInts ?value, doubles 6 Doubles ?value, bytes 7 Bytes ?value
Floats: values 1 float*
Doubles: values 1 double*
Ints: values 1 int32*
LongInts: values 1 int64*
Bools: values 1 bool*
Strings: values 1 string*
Bytes: values 1 bytes
"""

_PACKAGE = "odsora.mil"
_SCALARS = ("int32", "int64", "uint64", "float", "double", "bool", "string", "bytes")


def parse_model(data: bytes) -> Any:
    """A parsed `Model`. Raises ValueError where the bytes are no message."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = _model_class()()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return model


@cache
def _model_class() -> Any:
    from google.protobuf import (  # type: ignore[import-untyped]
        descriptor_pb2,
        descriptor_pool,
        message_factory,
    )

    file = descriptor_pb2.FileDescriptorProto(name="mil", package=_PACKAGE, syntax="proto3")
    for line in _MESSAGES.strip().splitlines():
        name, fields = line.split(": ")
        message = file.message_type.add(name=name)
        for field in fields.split(", "):
            _add_field(message, *field.split())
    # A pool of its own, so that coremltools' classes may be loaded beside it.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


def _add_field(message: Any, name: str, number: str, kind: str, group: str = "") -> None:
    field = message.field.add(name=name, number=int(number), label=1)
    if kind.endswith("{}"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, "key", "1", "string")
        _add_field(entry, "value", "2", kind[:-2])
        kind = f"{message.name}.{entry.name}*"
    if kind.endswith("*"):
        field.label = 3
    _set_type(field, kind.removesuffix("*"))
    if group:
        groups = [oneof.name for oneof in message.oneof_decl]
        if group[1:] not in groups:
            message.oneof_decl.add(name=group[1:])
            groups.append(group[1:])
        field.oneof_index = groups.index(group[1:])


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = field.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type = field.Type.Value("TYPE_MESSAGE")
        field.type_name = f".{_PACKAGE}.{kind}"
