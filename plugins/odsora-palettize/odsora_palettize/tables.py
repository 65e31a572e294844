"""Look-up tables from coremltools.optimize.

coremltools compresses models, not tensors; so the weight is put into a model of one linear layer,
that model is compressed, and the table is read out of the saved package.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from odsora_compiler.ir.weights import LookupTable
from odsora_compiler.lowering.quiet import quiet_coremltools
from odsora_compiler.mil.package import BlobReference, Literal, Package

# From so many half-precision numbers on, coremltools finds the best table there is (k-means in one
# dimension has an exact solution); below, or in single precision, it asks scikit-learn to guess.
_EXACT_FROM = 10_000


def find_table(weight: torch.Tensor, bits: int, group: int | None) -> LookupTable:
    """The k-means tables of `2**bits` values for `weight`, float32 of any rank of at least 1.

    `group`: so many consecutive channels (dimension 0, a multiple of it) share a table; None: all.
    """
    flat = weight.reshape(weight.shape[0], -1)
    # Half precision serves the search alone; scaled, so that no weight is too large for it.
    peak = float(flat.abs().max()) or 1.0
    # Every number repeated as often leaves the best table what it is.
    repeats = -(-_EXACT_FROM // ((group or flat.shape[0]) * flat.shape[1]))
    scaled = (flat / peak).half().repeat(1, repeats)
    with (
        quiet_coremltools() as ct,
        redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory() as folder,
    ):
        path = Path(folder) / "one-layer.mlpackage"
        _compressed_layer(ct, scaled, bits, group).save(str(path))
        indices, table = _read_table(Package.open(path))
        # Copied out of the file, which goes with the folder.
        indices, table = indices[:, : flat.shape[1]].clone(), table * peak
    return LookupTable(bits, indices.reshape(weight.shape), table, axis=0)


def _compressed_layer(ct: Any, weight: torch.Tensor, bits: int, group: int | None) -> Any:
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    grouping: dict[str, Any] = {"granularity": "per_tensor"}
    if group is not None:
        grouping = {"granularity": "per_grouped_channel", "group_size": group}
    config = cto.OptimizationConfig(
        global_config=cto.OpPalettizerConfig(
            mode="kmeans", nbits=bits, weight_threshold=0, **grouping
        )
    )
    shape = (1, weight.shape[1])

    @Builder.program(
        input_specs=[Builder.TensorSpec(shape=shape, dtype=types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x):  # type: ignore[no-untyped-def]  # the builder reads its parameter names
        return Builder.linear(x=x, weight=Builder.const(val=weight.numpy(), name="weight"))

    model = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    return cto.palettize_weights(model, config)


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
        # Tables of fewer than 10 values stand in the model itself, not in its file of weights.
        assert isinstance(value, (Literal, BlobReference)), f"{name} is computed"
        found.append(value.tensor() if isinstance(value, Literal) else package.tensor(value))
    indices, lut = found
    return indices.to(torch.uint8), lut.reshape(lut.shape[0], lut.shape[-2]).float()
