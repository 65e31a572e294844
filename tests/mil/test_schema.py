"""The schema kept here against the one coremltools brings along."""

from __future__ import annotations

from typing import Any

from coremltools.proto import MIL_pb2, Model_pb2

from odsora_compiler.mil.dtypes import mil_dtype
from odsora_compiler.mil.schema import parse_model


def test_fields_are_those_of_coremltools() -> None:
    seen: set[str] = set()

    def compare(ours: Any, theirs: Any) -> None:
        if ours.full_name in seen:
            return
        seen.add(ours.full_name)
        for field in ours.fields:
            original = theirs.fields_by_name[field.name]
            assert field.number == original.number, field.full_name
            assert field.is_repeated == original.is_repeated, field.full_name
            oneofs = [f.containing_oneof and f.containing_oneof.name for f in (field, original)]
            assert oneofs[0] == oneofs[1], field.full_name
            if original.enum_type is None:
                assert field.type == original.type, field.full_name
            if field.message_type:
                compare(field.message_type, original.message_type)

    compare(parse_model(b"").DESCRIPTOR, Model_pb2.Model.DESCRIPTOR)
    assert len(seen) > 25


def test_element_types_are_those_of_coremltools() -> None:
    renamed = {"FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64", "BFLOAT16": "bf16"}
    for name, number in MIL_pb2.DataType.items():
        if name != "UNUSED_TYPE" and not name.startswith("FLOAT8"):
            assert mil_dtype(number) == renamed.get(name, name.lower())


def test_fields_that_are_not_read_survive() -> None:
    model = Model_pb2.Model(specificationVersion=9)
    model.description.metadata.shortDescription = "kept"
    model.mlProgram.version = 1
    data = parse_model(model.SerializeToString()).SerializeToString()
    assert Model_pb2.Model.FromString(data) == model
