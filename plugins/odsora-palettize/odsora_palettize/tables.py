"""Look-up tables from coremltools.optimize.

coremltools compresses models, not tensors; so the weight is put into a model of one linear layer,
that model is compressed, and the table is read out of the saved package.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import coremltools as ct
import coremltools.optimize.coreml as cto
import torch
from coremltools.converters.mil import Builder

from odsora_compiler.ir.weights import LookupTable
from odsora_compiler.lowering.quiet import quiet_coremltools
from odsora_compiler.mil.package import BlobReference, Package


def find_table(weight: torch.Tensor, bits: int, group: int | None) -> LookupTable:
    """k-means tables of `2**bits` values for `weight`, float32 of any rank of at least 1.

    `group`: so many consecutive channels (dimension 0, a multiple of it) share a table; None: all.
    """
    flat = weight.reshape(weight.shape[0], -1).contiguous()
    grouping = (
        {"granularity": "per_tensor"}
        if group is None
        else {"granularity": "per_grouped_channel", "group_size": group}
    )
    config = cto.OptimizationConfig(
        global_config=cto.OpPalettizerConfig(
            mode="kmeans", nbits=bits, weight_threshold=0, **grouping
        )
    )
    with quiet_coremltools(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one-layer.mlpackage"
        cto.palettize_weights(_linear_model(flat), config).save(str(path))
        indices, table = _read_table(Package.open(path))
        # Copied out of the file, which goes with the folder.
        indices, table = indices.clone(), table.clone()
    return LookupTable(bits, indices.reshape(weight.shape), table, axis=0)


def _linear_model(flat: torch.Tensor) -> ct.models.MLModel:
    @Builder.program(
        input_specs=[Builder.TensorSpec(shape=(1, flat.shape[1]))], opset_version=ct.target.iOS18
    )
    def program(x):  # type: ignore[no-untyped-def]  # the builder reads its parameter names
        return Builder.linear(x=x, weight=Builder.const(val=flat.numpy(), name="weight"))

    return ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )


def _read_table(package: Package) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [O, I] uint8 and table [groups, 2**bits] float32 of the one compressed weight."""
    (operation,) = (
        item
        for item in package.function().block.operations
        if item.type == "constexpr_lut_to_dense"
    )
    found = []
    for name in ("indices", "lut"):
        (value,) = operation.inputs[name]
        assert isinstance(value, BlobReference), f"{name} of a package this release cannot read"
        found.append(package.tensor(value))
    indices, lut = found
    return indices.to(torch.uint8), lut.reshape(lut.shape[0], lut.shape[-2]).float()
