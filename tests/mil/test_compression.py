"""Compressed weights: coremltools' own decompression and worked examples are the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil.mil import types
from mil_programs import case, conformance_test, convert_module, mb, numbers

from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import Package


def dtype(name: str) -> np.dtype:
    """numpy's stand-in for one of MIL's sub-byte types."""
    return types.nptype_from_builtin(getattr(types, name))


def ints(low: int, high: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(high + sum(shape))
    return torch.randint(low, high + 1, shape, generator=generator)


SIGNED, UNSIGNED = ints(-8, 7, 6, 8), ints(0, 15, 6, 8)
BYTES = ints(-128, 127, 6, 8)
SCALES = numbers(3, 2).abs() * 0.125 + 0.0625
SCALES = SCALES.half().double()
OFFSETS = ints(0, 15, 3, 2)
ROW_SCALES = torch.tensor([0.25, 0.5, 0.125, 1.0, 2.0, 0.75]).double()
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]])
NONZERO = torch.tensor([10, 11, 3, 4, 5, 6, 7, 8, 9])
PALETTE = torch.tensor([1.0, 5.0, 9.0, 13.0, 2.0, 10.0, 18.0, 26.0]).double().reshape(2, 1, 4, 1)
VECTORS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).double()
INDICES = ints(0, 1, 2, 2, 2)
PRUNED = numbers(5, 7) * (ints(0, 1, 5, 7) > 0)


def blocks(values: torch.Tensor) -> torch.Tensor:
    """Scales of 3 by 2 blocks, spread over a weight of 6 by 8."""
    return torch.tensor(np.kron(values.numpy(), np.ones((2, 4))))


def plus(weight: Any) -> Any:
    """A reference that adds a weight to the input."""
    return lambda x: x + weight


ZEROS_6_8 = torch.zeros(6, 8)

CASES = [
    case(
        "blocks_of_int4",
        lambda f, x: mb.add(
            x=x,
            y=mb.constexpr_blockwise_shift_scale(
                data=SIGNED.numpy().astype(dtype("int4")), scale=f(SCALES)
            ),
        ),
        plus(SIGNED * blocks(SCALES)),
        x=ZEROS_6_8,
    ),
    case(
        "blocks_of_uint4_with_offset",
        lambda f, x: mb.add(
            x=x,
            y=mb.constexpr_blockwise_shift_scale(
                data=UNSIGNED.numpy().astype(dtype("uint4")),
                scale=f(SCALES),
                offset=OFFSETS.numpy().astype(dtype("uint4")),
            ),
        ),
        plus((UNSIGNED - blocks(OFFSETS)) * blocks(SCALES)),
        x=ZEROS_6_8,
    ),
    case(
        "rows_of_int8",
        lambda f, x: mb.add(
            x=x,
            y=mb.constexpr_blockwise_shift_scale(
                data=BYTES.numpy().astype(np.int8), scale=f(ROW_SCALES[:, None])
            ),
        ),
        plus(BYTES * ROW_SCALES[:, None]),
        x=ZEROS_6_8,
    ),
    # The worked examples of MIL's documentation.
    case(
        "look_up_in_two_groups",
        lambda f, x: mb.add(
            x=x,
            y=mb.constexpr_lut_to_dense(
                indices=np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3])
                .reshape(6, 2)
                .astype(dtype("uint2")),
                lut=f(PALETTE),
            ),
        ),
        plus(torch.tensor([[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]])),
        x=torch.zeros(6, 2),
    ),
    *(
        case(
            f"look_up_vectors_along_axis_{axis % 3}",
            lambda f, x, axis=axis: mb.add(
                x=x,
                y=mb.constexpr_lut_to_dense(
                    indices=INDICES.numpy().astype(dtype("uint1")),
                    lut=f(VECTORS.reshape(1, 1, 1, 2, 3)),
                    vector_axis=axis,
                ),
            ),
            plus(VECTORS[INDICES].movedim(-1, axis % 3 + 1).flatten(axis % 3, axis % 3 + 1)),
            x=torch.zeros([6 if k == axis % 3 else 2 for k in range(3)]),
        )
        for axis in (1, -1)
    ),
    case(
        "sparse",
        lambda f, x: mb.add(
            x=x,
            y=mb.constexpr_sparse_to_dense(
                nonzero_data=f(PRUNED[PRUNED != 0]),
                mask=(PRUNED != 0).numpy().astype(dtype("uint1")),
            ),
        ),
        plus(PRUNED),
        x=torch.zeros(5, 7),
    ),
    case(
        "sparse_of_scaled",
        lambda f, x: mb.add(x=x, y=sparse_of_scaled(f)),
        plus(
            torch.zeros(4, 4)
            .double()
            .masked_scatter(
                MASK.bool(),
                (NONZERO - MASK.mul(torch.arange(1, 5))[MASK.bool()])
                * MASK.mul(torch.tensor([0.25, 0.5, 0.75, 1.0]).double())[MASK.bool()],
            )
        ),
        x=torch.zeros(4, 4),
    ),
    case(
        "sparse_of_looked_up",
        lambda f, x: mb.add(x=x, y=sparse_of_looked_up(f)),
        plus(
            torch.tensor(
                [
                    [2, 3, 0, 0, 0, 0],
                    [2, 3, 0, 0, 0, 0],
                    [3, 2, 0, 0, 0, 3],
                    [3, 2, 0, 0, 0, 3],
                    [0, 3, 2, 0, 2, 0],
                    [0, 3, 2, 0, 2, 0],
                    [0, 0, 0, 3, 0, 0],
                    [0, 0, 0, 3, 0, 0],
                ]
            )
        ),
        x=torch.zeros(8, 6),
    ),
    case(
        "quantize",
        lambda f, x: mb.quantize(
            input=x,
            scale=f([0.25, 0.5, 1.0]),
            zero_point=np.int8([1, -2, 3]),
            axis=-1,
            output_dtype="int8",
        ),
        lambda x: (
            ((x / torch.tensor([0.25, 0.5, 1.0])).round() + torch.tensor([1, -2, 3]))
            .clamp(-128, 127)
            .int()
        ),
        x=numbers(4, 3) * 64,
    ),
    case(
        "quantize_unsigned",
        lambda f, x: mb.quantize(input=x, scale=f(0.25), output_dtype="uint8"),
        lambda x: (x / 0.25).round().clamp(0, 255).int(),
        x=numbers(4, 3) * 64,
    ),
    case(
        "dequantize",
        lambda f, x: mb.dequantize(
            input=mb.cast(x=x, dtype="int8"),
            scale=f([0.25, 0.5, 1.0]),
            zero_point=np.int8([1, -2, 3]),
            axis=1,
        ),
        lambda x: (x - torch.tensor([1, -2, 3])) * torch.tensor([0.25, 0.5, 1.0]).double(),
        x=ints(-128, 127, 4, 3),
    ),
]


def sparse_of_scaled(f: Any) -> Any:
    mask, data = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=MASK.numpy().astype(dtype("uint1")),
        nonzero_data=NONZERO.numpy().astype(np.int8),
        scale=f([[0.25, 0.5, 0.75, 1.0]]),
        offset=np.array([[1, 2, 3, 4]], np.int8),
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)


def sparse_of_looked_up(f: Any) -> Any:
    mask, data = mb.constexpr_lut_to_sparse(
        indices_mask=np.array(
            [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]]
        ).astype(dtype("uint1")),
        indices_nonzero_data=np.array([0, 1, 1, 0, 1, 1, 0, 0, 1]).astype(dtype("uint1")),
        lut=f([[[[2.0, 2.0], [3.0, 3.0]]]]),
        vector_axis=0,
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)


test_operation = conformance_test(CASES)


def packed(values: torch.Tensor, bits: int) -> np.ndarray:
    """Bits from the least significant one on, by numpy."""
    unpacked = np.unpackbits(values.numpy().astype(np.uint8)[..., None], axis=-1, bitorder="little")
    return np.packbits(unpacked[..., :bits].reshape(-1), bitorder="little")


SIXTY_FOUR = numbers(64, seed=11)
LOOKED_UP = ints(0, 63, 5, 7)

IOS16_CASES = [
    case(
        "affine",
        lambda f, x: mb.add(
            x=x,
            y=mb.constexpr_affine_dequantize(
                quantized_data=BYTES.numpy().astype(np.int8),
                zero_point=np.int8([1, 2, 3, -4, 5, 6]),
                scale=f(ROW_SCALES),
                axis=0,
            ),
        ),
        plus((BYTES - torch.tensor([1, 2, 3, -4, 5, 6])[:, None]) * ROW_SCALES[:, None]),
        x=ZEROS_6_8,
    ),
    case(
        "look_up",
        lambda f, x: mb.add(
            x=x,
            y=mb.constexpr_lut_to_dense(
                indices=packed(LOOKED_UP, 6), lut=f(SIXTY_FOUR), shape=np.uint32([5, 7])
            ),
        ),
        plus(SIXTY_FOUR[LOOKED_UP]),
        x=torch.zeros(5, 7),
    ),
    case(
        "sparse",
        lambda f, x: mb.add(
            x=x,
            y=mb.constexpr_sparse_to_dense(
                nonzero_data=f(PRUNED[PRUNED != 0]),
                mask=packed(PRUNED != 0, 1),
                shape=np.uint32([5, 7]),
            ),
        ),
        plus(PRUNED),
        x=torch.zeros(5, 7),
    ),
    case(
        "cast",
        lambda f, x: mb.add(
            x=x,
            y=mb.cast(
                x=mb.constexpr_cast(source_val=np.float16(PRUNED), output_dtype="fp32"),
                dtype="fp16" if f(0).dtype == np.float16 else "fp32",
            ),
        ),
        plus(PRUNED),
        x=torch.zeros(5, 7),
    ),
]

test_operation_of_ios16 = conformance_test(IOS16_CASES, ct.target.iOS16)


class Small(torch.nn.Module):
    """A linear layer and a convolution, large enough to be compressed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(64, 96)
        self.conv = torch.nn.Conv1d(32, 32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.relu(self.linear(x)))


def palettized(model: Any, **options: Any) -> Any:
    config = cto.OpPalettizerConfig(mode="uniform", weight_threshold=512, **options)
    return cto.palettize_weights(model, cto.OptimizationConfig(global_config=config))


def quantized(model: Any, **options: Any) -> Any:
    config = cto.OpLinearQuantizerConfig(weight_threshold=512, **options)
    return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config))


def pruned(model: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=512)
    return cto.prune_weights(model, cto.OptimizationConfig(global_config=config))


METHODS = {
    "palettize 4 bits": lambda m: palettized(m, nbits=4),
    "palettize 3 bits": lambda m: palettized(m, nbits=3),
    "palettize per group": lambda m: palettized(
        m, nbits=4, granularity="per_grouped_channel", group_size=8
    ),
    "palettize with scales": lambda m: palettized(m, nbits=6, enable_per_channel_scale=True),
    "int8 per channel": lambda m: quantized(m, mode="linear_symmetric", dtype="int8"),
    "uint8 per tensor": lambda m: quantized(
        m, mode="linear", dtype="uint8", granularity="per_tensor"
    ),
    "int4 per block": lambda m: quantized(
        m, mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=16
    ),
    "uint4 per block": lambda m: quantized(
        m, mode="linear", dtype="uint4", granularity="per_block", block_size=32
    ),
    "pruned": pruned,
    "pruned and palettized": lambda m: cto.palettize_weights(
        pruned(m),
        cto.OptimizationConfig(
            global_config=cto.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=512)
        ),
        joint_compression=True,
    ),
    "pruned and quantized": lambda m: cto.linear_quantize_weights(
        pruned(m),
        cto.OptimizationConfig(
            global_config=cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=512)
        ),
        joint_compression=True,
    ),
}


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("dense")
    inputs = {"x": numbers(1, 32, 64).float()}
    return convert_module(Small(), inputs, folder / "dense.mlpackage", request.param)


@pytest.mark.parametrize("method", METHODS)
def test_compressed_package_equals_its_decompressed_form(
    dense: Any, method: str, tmp_path: Path
) -> None:
    compressed = METHODS[method](dense)
    compressed.save(str(tmp_path / "compressed.mlpackage"))
    cto.decompress_weights(compressed).save(str(tmp_path / "decompressed.mlpackage"))
    package = Package.open(tmp_path / "compressed.mlpackage")
    assert any(op.type.startswith("constexpr_") for op in package.function().block.operations)
    x = {"x": numbers(1, 32, 64, seed=3).float()}
    for compute in ("storage", "fp32"):
        (got,) = Interpreter(package, compute=compute).run(x).values()
        plain = Interpreter(Package.open(tmp_path / "decompressed.mlpackage"), compute=compute)
        (want,) = plain.run(x).values()
        assert torch.equal(got, want), (got - want).abs().max()
