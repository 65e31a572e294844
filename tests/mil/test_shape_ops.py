"""Operations that move elements, against torch and numpy."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from mil_programs import Case, case, conformance_test, mb, numbers

X = numbers(2, 3, 4, 5)
INTS = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
IMAGE = numbers(2, 8, 4, 6)
BOOLS = torch.tensor([[True, False, True], [False, True, True]])
SHUFFLED = torch.randperm(60, generator=torch.Generator().manual_seed(1)).reshape(3, 4, 5).double()


def pads(name: str, pad: list[int], mode: str, torch_mode: str, shape: tuple[int, ...]) -> Case:
    numpy_pad = np.zeros((len(shape), 2), dtype=int)
    numpy_pad[len(shape) - len(pad) // 2 :] = np.array(pad).reshape(-1, 2)
    return case(
        name,
        lambda f, x: mb.pad(x=x, pad=pad, mode=mode),
        lambda x: torch.tensor(np.pad(x.numpy(), numpy_pad, torch_mode)),
        x=shape,
    )


def slicing(name: str, reference: object, **parameters: object) -> Case:
    return case(
        name,
        lambda f, x: mb.slice_by_index(x=x, **parameters),
        lambda x: torch.tensor(np.ascontiguousarray(x.numpy()[reference])),
        x=(4, 5, 6),
    )


def updating(name: str, reference: object, **parameters: object) -> Case:
    target = np.zeros((4, 5, 6))[reference]

    def expect(x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        out = x.numpy().copy()
        out[reference] = update.numpy()
        return torch.tensor(out)

    return case(
        name,
        lambda f, x, update: mb.slice_update(x=x, update=update, **parameters),
        expect,
        x=(4, 5, 6),
        update=numbers(*target.shape, seed=3),
    )


def depth_to_space(x: torch.Tensor, b: int) -> torch.Tensor:
    n, c, h, w = x.shape
    out = torch.empty(n, c // b**2, h * b, w * b, dtype=x.dtype)
    for i in range(b):
        for j in range(b):
            first = (i * b + j) * (c // b**2)
            out[:, :, i::b, j::b] = x[:, first : first + c // b**2]
    return out


def space_to_batch(x: torch.Tensor, blocks: list[int], paddings: list[list[int]]) -> torch.Tensor:
    padded = F.pad(x, [*paddings[1], *paddings[0]])
    parts = [
        padded[:, :, i :: blocks[0], j :: blocks[1]]
        for i in range(blocks[0])
        for j in range(blocks[1])
    ]
    return torch.cat(parts, 0)


def one_hot(indices: torch.Tensor) -> torch.Tensor:
    return F.one_hot(indices.long(), 5).movedim(-1, 1) * 2.5 - 0.5


CASES = [
    case("reshape", lambda f, x: mb.reshape(x=x, shape=[6, -1]), lambda x: x.reshape(6, 20), x=X),
    case(
        "reshape_zeros",
        lambda f, x: mb.reshape(x=x, shape=[6, 0, 0]),
        lambda x: x.reshape(6, 4, 5),
        x=X,
    ),
    case(
        "reshape_more_zeros",
        lambda f, x: mb.reshape(x=x, shape=[1, 0, -1, 0]),
        lambda x: x.reshape(1, 1, 2, 50),
        x=(2, 50),
    ),
    case(
        "reshape_of_computed_shape",
        lambda f, x, y: mb.reshape(x=x, shape=mb.concat(values=(mb.shape(x=y), [10]), axis=0)),
        lambda x, y: x.reshape(3, 4, 10),
        x=X,
        y=(3, 4),
    ),
    case(
        "reshape_like",
        lambda f, x, a, b: mb.reshape_like(
            x=x, ref_tensors=(a, b), begins=(0, 1), ends=(2, 0), end_masks=(False, True)
        ),
        lambda x, a, b: x.reshape(2, 3, 5, 4),
        x=X,
        a=(2, 3, 4),
        b=(1, 5, 4),
    ),
    case(
        "expand_dims",
        lambda f, x: mb.expand_dims(x=x, axes=[-1, 0]),
        lambda x: x[None, ..., None],
        x=(2, 3),
    ),
    case(
        "squeeze",
        lambda f, x: mb.squeeze(x=x, axes=[-2]),
        lambda x: x.squeeze(-2),
        x=(1, 2, 1, 3),
    ),
    case("squeeze_all", lambda f, x: mb.squeeze(x=x), lambda x: x.squeeze(), x=(1, 2, 1, 3)),
    case(
        "transpose",
        lambda f, x: mb.transpose(x=x, perm=[0, -1, 1, -2]),
        lambda x: x.permute(0, 3, 1, 2),
        x=X,
    ),
    case(
        "transpose_bool",
        lambda f, x: mb.transpose(x=x, perm=[1, 0]),
        lambda x: x.T,
        x=BOOLS,
    ),
    slicing("slice", np.s_[1:3, :4, 2:], begin=[1, 0, 2], end=[3, 4, 6]),
    slicing("slice_negative", np.s_[-3:-1, 0:-2, -4:], begin=[-3, 0, -4], end=[-1, -2, 6]),
    slicing(
        "slice_masks",
        np.s_[:3, 2:, ::2],
        begin=[1, 2, 3],
        end=[3, 1, 4],
        stride=[1, 1, 2],
        begin_mask=[True, False, True],
        end_mask=[False, True, True],
    ),
    slicing(
        "slice_backwards",
        np.s_[::-1, 4:0:-2, 5:2:-1],
        begin=[0, 4, 5],
        end=[0, 0, 2],
        stride=[-1, -2, -1],
        begin_mask=[True, False, False],
        end_mask=[True, False, False],
    ),
    slicing(
        "slice_squeeze",
        np.s_[2, ::-1, -1],
        begin=[2, 0, -1],
        end=[0, 0, 0],
        stride=[1, -1, 1],
        begin_mask=[False, True, False],
        end_mask=[False, True, False],
        squeeze_mask=[True, False, True],
    ),
    slicing("slice_empty", np.s_[1:1, :, :], begin=[1, 0, 0], end=[1, 5, 6]),
    case(
        "slice_of_computed_begin",
        lambda f, x, begin: mb.slice_by_size(x=x, begin=begin, size=[2, 3]),
        lambda x, begin: x[1:3, 2:5],
        x=(4, 5),
        begin=torch.tensor([1, 2]),
    ),
    case(
        "slice_by_size",
        lambda f, x: mb.slice_by_size(x=x, begin=[1, -3, 0], size=[2, 2, -1]),
        lambda x: x[1:3, 2:4],
        x=(4, 5, 6),
    ),
    updating("update", np.s_[1:3, :4, 2:], begin=[1, 0, 2], end=[3, 4, 6]),
    updating(
        "update_strided",
        np.s_[:, 4:0:-2, ::3],
        begin=[0, 4, 0],
        end=[0, 0, 0],
        stride=[1, -2, 3],
        begin_mask=[True, False, True],
        end_mask=[True, False, True],
    ),
    updating(
        "update_squeeze",
        np.s_[-1, 1:3, :],
        begin=[-1, 1, 0],
        end=[0, 3, 6],
        squeeze_mask=[True, False, False],
    ),
    case(
        "concat",
        lambda f, x, y: mb.concat(values=(x, y, x), axis=-2),
        lambda x, y: torch.cat([x, y, x], -2),
        x=(2, 3, 4),
        y=(2, 5, 4),
    ),
    case(
        "concat_interleaved",
        lambda f, x, y: mb.concat(values=(x, y), axis=1, interleave=True),
        lambda x, y: torch.stack([x, y], 2).reshape(2, 6, 4),
        x=(2, 3, 4),
        y=numbers(2, 3, 4, seed=9),
    ),
    case(
        "split_even",
        lambda f, x: mb.split(x=x, num_splits=2, axis=-2),
        lambda x: x.split(2, -2),
        x=X,
    ),
    case(
        "split_sizes",
        lambda f, x: mb.split(x=x, split_sizes=[1, 3, 1], axis=3),
        lambda x: x.split([1, 3, 1], 3),
        x=X,
    ),
    case(
        "split_both",
        lambda f, x: mb.split(x=x, num_splits=2, split_sizes=[4, 1], axis=3),
        lambda x: x.split([4, 1], 3),
        x=X,
    ),
    case(
        "stack",
        lambda f, x, y: mb.stack(values=(x, y, x), axis=-1),
        lambda x, y: torch.stack([x, y, x], -1),
        x=(2, 3),
        y=numbers(2, 3, seed=9),
    ),
    case(
        "tile", lambda f, x: mb.tile(x=x, reps=[2, 1, 3]), lambda x: x.repeat(2, 1, 3), x=(2, 3, 4)
    ),
    case(
        "tile_int", lambda f, x: mb.tile(x=x, reps=[1, 2, 1]), lambda x: x.repeat(1, 2, 1), x=INTS
    ),
    case("reverse", lambda f, x: mb.reverse(x=x, axes=[-1, 0]), lambda x: x.flip(0, 3), x=X),
    case("reverse_all", lambda f, x: mb.reverse(x=x), lambda x: x.flip(0, 1, 2, 3), x=X),
    case(
        "reverse_sequence",
        lambda f, x: mb.reverse_sequence(x=x, lengths=[2, 0, 4], seq_axis=1, batch_axis=0),
        lambda x: torch.stack(
            [torch.cat([x[i, :k].flip(0), x[i, k:]]) for i, k in enumerate((2, 0, 4))]
        ),
        x=(3, 4, 2),
    ),
    pads("pad_zeros", [1, 2, 0, 3], "constant", "constant", (2, 3, 4)),
    pads("pad_reflect", [1, 2, 3, 0], "reflect", "reflect", (2, 4, 5)),
    pads("pad_reflect_three_axes", [1, 0, 2, 1, 0, 3], "reflect", "reflect", (2, 3, 4, 5)),
    pads("pad_replicate", [1, 2, 2, 0, 3, 1], "replicate", "edge", (2, 2, 4, 3)),
    pads("pad_every_axis", [1, 0, 2, 1, 0, 1], "constant", "constant", (2, 3, 4)),
    case(
        "pad_value",
        lambda f, x: mb.pad(x=x, pad=[2, 1], mode="constant", constant_val=f(-1.5)),
        lambda x: F.pad(x, [2, 1], value=-1.5),
        x=(2, 3),
    ),
    case(
        "crop",
        lambda f, x: mb.crop(x=x, crop_height=[1, 0], crop_width=[2, 1]),
        lambda x: x[:, :, 1:, 2:-1],
        x=IMAGE,
    ),
    case(
        "flatten2d",
        lambda f, x: mb.flatten2d(x=x, axis=-2),
        lambda x: x.reshape(6, 20),
        x=X,
    ),
    case(
        "sliding_windows",
        lambda f, x: mb.sliding_windows(x=x, axis=-2, size=3, stride=2),
        lambda x: torch.stack([x[:, 0:3], x[:, 2:5]], 1),
        x=(2, 6, 4),
    ),
    case(
        "pixel_shuffle",
        lambda f, x: mb.pixel_shuffle(x=x, upscale_factor=2),
        lambda x: F.pixel_shuffle(x, 2),
        x=IMAGE,
    ),
    case(
        "pixel_unshuffle",
        lambda f, x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
        lambda x: F.pixel_unshuffle(x, 2),
        x=IMAGE,
    ),
    case(
        "depth_to_space",
        lambda f, x: mb.depth_to_space(x=x, block_size=2),
        lambda x: depth_to_space(x, 2),
        x=IMAGE,
    ),
    case(
        "space_to_depth",
        lambda f, x: mb.space_to_depth(x=depth_to_space_op(x), block_size=2),
        lambda x: x,
        x=IMAGE,
    ),
    case(
        "space_to_batch",
        lambda f, x: mb.space_to_batch(x=x, block_shape=[2, 3], paddings=[[1, 1], [0, 3]]),
        lambda x: space_to_batch(x, [2, 3], [[1, 1], [0, 3]]),
        x=IMAGE,
    ),
    case(
        "batch_to_space",
        lambda f, x: mb.batch_to_space(x=x, block_shape=[2, 3], crops=[[1, 0], [0, 2]]),
        lambda x: uncut_batches(x)[:, :, 1:, :-2],
        x=(12, 2, 3, 4),
    ),
    case(
        "band_lower",
        lambda f, x: mb.band_part(x=x, lower=-1, upper=0),
        lambda x: x.tril(),
        x=(2, 4, 5),
    ),
    case(
        "band_upper",
        lambda f, x: mb.band_part(x=x, lower=0, upper=-1),
        lambda x: x.triu(),
        x=(2, 4, 5),
    ),
    case(
        "band",
        lambda f, x: mb.band_part(x=x, lower=2, upper=1),
        lambda x: x.triu(-2).tril(1),
        x=(6, 5),
    ),
    case("cumsum", lambda f, x: mb.cumsum(x=x, axis=-1), lambda x: x.cumsum(-1), x=X),
    case("cumsum_default", lambda f, x: mb.cumsum(x=x), lambda x: x.cumsum(0), x=X),
    case("cumsum_int", lambda f, x: mb.cumsum(x=x, axis=1), lambda x: x.cumsum(1), x=INTS),
    case(
        "cumsum_reverse_exclusive",
        lambda f, x: mb.cumsum(x=x, axis=1, reverse=True, exclusive=True),
        lambda x: x.sum(1, keepdim=True) - x.cumsum(1),
        x=torch.arange(24.0).reshape(2, 6, 2),
    ),
    case("argsort", lambda f, x: mb.argsort(x=x), lambda x: x.argsort(-1).flip(-1), x=SHUFFLED),
    case(
        "argsort_up",
        lambda f, x: mb.argsort(x=x, axis=1, ascending=True),
        lambda x: x.argsort(1),
        x=SHUFFLED,
    ),
    case(
        "topk",
        lambda f, x: mb.topk(x=x, k=3, axis=-2),
        lambda x: tuple(x.topk(3, -2)),
        x=SHUFFLED,
    ),
    case(
        "topk_smallest",
        lambda f, x: mb.topk(x=x, k=2, ascending=True, output_indices_dtype="uint16"),
        lambda x: tuple(x.topk(2, largest=False)),
        x=SHUFFLED,
    ),
    case(
        "topk_values",
        lambda f, x: mb.topk(x=x, k=2, axis=0, return_indices=False),
        lambda x: x.topk(2, 0).values,
        x=SHUFFLED,
    ),
    case(
        "one_hot",
        lambda f, x: mb.one_hot(
            indices=x, one_hot_vector_size=5, axis=1, on_value=f(2.0), off_value=f(-0.5)
        ),
        lambda x: one_hot(x),
        x=torch.tensor([[4, 0, 2], [1, 1, 3]]),
    ),
    case(
        "one_hot_default",
        lambda f, x: mb.one_hot(indices=x, one_hot_vector_size=4),
        lambda x: F.one_hot(x.long(), 4),
        x=torch.tensor([3, 0, 1]),
    ),
    case(
        "range_1d",
        lambda f, x: mb.range_1d(start=2, end=mb.squeeze(x=x), step=3),
        lambda x: torch.arange(2, 12, 3),
        x=torch.tensor([12]),
    ),
    case(
        "fill",
        lambda f, x: mb.fill(shape=mb.shape(x=x), value=f(1.5)),
        lambda x: torch.full((2, 3), 1.5, dtype=torch.float64),
        x=(2, 3),
    ),
    case(
        "fill_like",
        lambda f, x: mb.fill_like(ref_tensor=x, value=7),
        lambda x: torch.full((2, 3), 7),
        x=(2, 3),
    ),
    case(
        "non_zero",
        lambda f, x: mb.non_zero(x=x),
        lambda x: x.nonzero(),
        x=BOOLS,
    ),
    case("shape", lambda f, x: mb.shape(x=x), lambda x: torch.tensor([2, 3, 4, 5]), x=X),
]


def depth_to_space_op(x: object) -> object:
    return mb.depth_to_space(x=x, block_size=2)


def uncut_batches(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(2, 2, 6, 12, dtype=x.dtype)
    for i in range(2):
        for j in range(3):
            first = (i * 3 + j) * 2
            out[:, :, i::2, j::3] = x[first : first + 2]
    return out


test_operation = conformance_test(CASES)
