"""Products, convolutions, pooling, attention and normalisations against torch in fp64."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from mil_programs import Case, case, conformance_test, mb, numbers

X = numbers(2, 3, 8)
W, B = numbers(5, 8, seed=1), numbers(5, seed=2)
IMAGE = numbers(2, 4, 7, 9)
VIDEO = numbers(1, 4, 5, 6, 7)
KERNEL = numbers(6, 4, 3, 3, seed=1)
BIAS = numbers(6, seed=2)
Q, K, V = (numbers(2, 3, 6, 8, seed=s) for s in (1, 2, 3))
K, V = K[:, :, :5], numbers(2, 3, 5, 4, seed=3)
SEEN = torch.tensor([[True, False, True, True, False], [True] * 5]).reshape(2, 1, 1, 5)
GAMMA, BETA = numbers(8, seed=4), numbers(8, seed=5)
CHANNEL = [numbers(4, seed=s) for s in (6, 7, 8)] + [numbers(4, seed=9).abs() + 0.5]


def same_padding(
    sizes: tuple[int, ...], kernel: tuple[int, ...], strides, lower: bool
) -> list[int]:
    """torch's padding list (last axis first) for the padding TensorFlow calls SAME."""
    out: list[int] = []
    for size, k, s in zip(reversed(sizes), reversed(kernel), reversed(strides), strict=True):
        total = max(0, (math.ceil(size / s) - 1) * s + k - size)
        half, rest = total // 2, total - total // 2
        out += [rest, half] if lower else [half, rest]
    return out


def matrices(name: str, x: tuple[int, ...], y: tuple[int, ...], tx: bool, ty: bool) -> Case:
    return case(
        name,
        lambda f, x, y: mb.matmul(x=x, y=y, transpose_x=tx, transpose_y=ty),
        lambda x, y: (x.mT if tx else x) @ (y.mT if ty else y),
        x=x,
        y=numbers(*y, seed=7),
    )


def transposed_conv(name: str, reference: dict, shape=(4, 6, 3, 3), **parameters) -> Case:
    weight = numbers(*shape, seed=3)
    bias = numbers(shape[1] * parameters.get("groups", 1), seed=4)
    crop = reference.pop("crop", None)

    def expect(x: torch.Tensor) -> torch.Tensor:
        out = F.conv_transpose2d(x, weight, None, **reference)
        out = out if crop is None else F.pad(out, [-c for c in crop])
        return out + bias[:, None, None]

    return case(
        name,
        lambda f, x: mb.conv_transpose(x=x, weight=f(weight), bias=f(bias), **parameters),
        expect,
        x=IMAGE,
    )


CASES = [
    case(
        "linear",
        lambda f, x: mb.linear(x=x, weight=f(W), bias=f(B)),
        lambda x: F.linear(x, W, B),
        x=X,
    ),
    case("linear_no_bias", lambda f, x: mb.linear(x=x, weight=f(W)), lambda x: x @ W.T, x=X),
    matrices("matmul", (2, 3, 4), (2, 4, 5), False, False),
    matrices("matmul_transpose_x", (2, 4, 3), (2, 4, 5), True, False),
    matrices("matmul_transpose_y", (2, 3, 4), (1, 5, 4), False, True),
    matrices("matmul_both", (4, 3), (2, 5, 4), True, True),
    case(
        "matmul_const",
        lambda f, x: mb.matmul(x=x, y=f(W), transpose_y=True),
        lambda x: x @ W.T,
        x=X,
    ),
    case(
        "matmul_int",
        lambda f, x: mb.matmul(x=x, y=np.arange(6, dtype=np.int32).reshape(3, 2)),
        lambda x: x @ torch.arange(6, dtype=torch.int32).reshape(3, 2),
        x=torch.arange(12, dtype=torch.int32).reshape(4, 3),
    ),
    case(
        "einsum_rank_four",
        lambda f, x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        lambda x, y: torch.einsum("abcd,adce->abce", x, y),
        x=(2, 3, 4, 5),
        y=(2, 5, 4, 6),
    ),
    case(
        "einsum_rank_three",
        lambda f, x, y: mb.einsum(values=(x, y), equation="chw,whr->chr"),
        lambda x, y: torch.einsum("abc,cbd->abd", x, y),
        x=(3, 4, 5),
        y=(5, 4, 6),
    ),
    # A sum that fp16 cannot count: 4096 products of one.
    case(
        "linear_of_many",
        lambda f, x: mb.linear(x=x, weight=f(np.ones((2, 4096)))),
        lambda x: x.sum(-1, keepdim=True).expand(1, 2),
        x=torch.ones(1, 4096),
    ),
    case(
        "attention",
        lambda f, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        lambda q, k, v: torch.softmax(q @ k.mT / math.sqrt(8), -1) @ v,
        q=Q,
        k=K,
        v=V,
    ),
    case(
        "attention_rank_three",
        lambda f, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        lambda q, k, v: torch.softmax(q @ k.mT / math.sqrt(8), -1) @ v,
        q=Q[0],
        k=K[0],
        v=V[0],
    ),
    case(
        "attention_mask",
        lambda f, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
        lambda q, k, v, m: torch.softmax(q @ k.mT / math.sqrt(8) + m, -1) @ v,
        q=Q,
        k=K,
        v=V,
        m=numbers(6, 5, seed=8) * 3,
    ),
    case(
        "attention_bool_mask",
        lambda f, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
        lambda q, k, v, m: (
            torch.softmax((q @ k.mT / math.sqrt(8)).masked_fill(~m, -torch.inf), -1) @ v
        ),
        q=Q,
        k=K,
        v=V,
        m=SEEN,
    ),
    case(
        "attention_to_nothing",
        lambda f, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
        lambda q, k, v, m: (
            torch.softmax((q @ k.mT / math.sqrt(8)).masked_fill(~m, -torch.inf), -1) @ v
        ),
        q=Q,
        k=K,
        v=V,
        m=SEEN & torch.tensor([True, False]).reshape(2, 1, 1, 1),
    ),
    case(
        "conv1d",
        lambda f, x: mb.conv(x=x, weight=f(KERNEL[..., 0]), bias=f(BIAS)),
        lambda x: F.conv1d(x, KERNEL[..., 0], BIAS),
        x=(2, 4, 9),
    ),
    case(
        "conv2d_custom",
        lambda f, x: mb.conv(
            x=x,
            weight=f(KERNEL),
            bias=f(BIAS),
            strides=[2, 1],
            pad_type="custom",
            pad=[1, 1, 2, 2],
            dilations=[1, 2],
        ),
        lambda x: F.conv2d(x, KERNEL, BIAS, (2, 1), (1, 2), (1, 2)),
        x=IMAGE,
    ),
    case(
        "conv2d_uneven",
        lambda f, x: mb.conv(x=x, weight=f(KERNEL), pad_type="custom", pad=[0, 1, 2, 1]),
        lambda x: F.conv2d(F.pad(x, [2, 1, 0, 1]), KERNEL),
        x=IMAGE,
    ),
    *(
        case(
            f"conv2d_{pad_type}",
            lambda f, x, pad_type=pad_type: mb.conv(
                x=x, weight=f(KERNEL[..., :2]), strides=[2, 3], pad_type=pad_type
            ),
            lambda x, pad_type=pad_type: F.conv2d(
                F.pad(x, same_padding((7, 9), (3, 2), (2, 3), pad_type == "same_lower")),
                KERNEL[..., :2],
                stride=(2, 3),
            ),
            x=IMAGE,
        )
        for pad_type in ("same", "same_lower")
    ),
    case(
        "conv2d_groups",
        lambda f, x: mb.conv(x=x, weight=f(KERNEL[:, :2]), groups=2, pad_type="valid"),
        lambda x: F.conv2d(x, KERNEL[:, :2], groups=2),
        x=IMAGE,
    ),
    case(
        "conv2d_depthwise",
        lambda f, x: mb.conv(x=x, weight=f(KERNEL[:4, :1]), groups=4),
        lambda x: F.conv2d(x, KERNEL[:4, :1], groups=4),
        x=IMAGE,
    ),
    case(
        "conv3d",
        lambda f, x: mb.conv(
            x=x,
            weight=f(KERNEL.unsqueeze(2).repeat(1, 1, 2, 1, 1)),
            bias=f(BIAS),
            strides=[1, 2, 2],
            pad_type="custom",
            pad=[1, 0, 1, 1, 1, 1],
        ),
        lambda x: F.conv3d(
            F.pad(x, [1, 1, 1, 1, 1, 0]),
            KERNEL.unsqueeze(2).repeat(1, 1, 2, 1, 1),
            BIAS,
            (1, 2, 2),
        ),
        x=VIDEO,
    ),
    transposed_conv("transposed", {"stride": (2, 1)}, strides=[2, 1]),
    transposed_conv(
        "transposed_custom",
        {"stride": 2, "padding": (1, 2), "dilation": (2, 1)},
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 2, 2],
        dilations=[2, 1],
    ),
    transposed_conv(
        "transposed_uneven",
        {"stride": 2, "crop": [0, 2, 1, 0]},
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 0, 0, 2],
    ),
    transposed_conv(
        "transposed_groups", {"groups": 2, "stride": 2}, (4, 3, 2, 2), groups=2, strides=[2, 2]
    ),
    transposed_conv(
        "transposed_output_shape",
        {"stride": 2, "padding": 1, "output_padding": 1},
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        output_shape=[2, 6, 14, 18],
    ),
    transposed_conv(
        "transposed_same", {"stride": 2, "crop": [0, 1, 0, 1]}, strides=[2, 2], pad_type="same"
    ),
    case(
        "max_pool",
        lambda f, x: mb.max_pool(
            x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]
        ),
        lambda x: F.max_pool2d(x, (3, 2), 2, 1),
        x=IMAGE,
    ),
    case(
        "max_pool_same",
        lambda f, x: mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="same"),
        lambda x: F.max_pool2d(F.pad(x, [0, 1, 0, 1], value=-torch.inf), 2),
        x=IMAGE,
    ),
    case(
        "max_pool_ceil",
        lambda f, x: mb.max_pool(
            x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True
        ),
        lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
        x=IMAGE,
    ),
    case(
        "max_pool3d",
        lambda f, x: mb.max_pool(x=x, kernel_sizes=[2, 2, 2], strides=[1, 2, 2], pad_type="valid"),
        lambda x: F.max_pool3d(x, 2, (1, 2, 2)),
        x=VIDEO,
    ),
    *(
        case(
            f"avg_pool_{'excluding' if exclude else 'including'}",
            lambda f, x, exclude=exclude: mb.avg_pool(
                x=x,
                kernel_sizes=[3, 2],
                strides=[2, 1],
                pad_type="custom",
                pad=[1, 1, 1, 1],
                exclude_padding_from_average=exclude,
            ),
            lambda x, exclude=exclude: F.avg_pool2d(
                x, (3, 2), (2, 1), 1, count_include_pad=not exclude
            ),
            x=IMAGE,
        )
        for exclude in (False, True)
    ),
    case(
        "avg_pool_ceil",
        lambda f, x: mb.avg_pool(
            x=x,
            kernel_sizes=[2, 4],
            strides=[2, 3],
            pad_type="custom",
            pad=[0, 0, 1, 1],
            exclude_padding_from_average=True,
            ceil_mode=True,
        ),
        lambda x: F.avg_pool2d(x, (2, 4), (2, 3), (0, 1), ceil_mode=True, count_include_pad=False),
        x=IMAGE,
    ),
    case(
        "avg_pool1d",
        lambda f, x: mb.avg_pool(x=x, kernel_sizes=[3], pad_type="valid"),
        lambda x: F.avg_pool1d(x, 3, 1),
        x=(2, 3, 8),
    ),
    case(
        "l2_pool",
        lambda f, x: mb.l2_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="valid"),
        lambda x: F.lp_pool2d(x, 2.0, (3, 2), 2),
        x=IMAGE,
    ),
    case(
        "layer_norm",
        lambda f, x: mb.layer_norm(x=x, axes=[-1], gamma=f(GAMMA), beta=f(BETA), epsilon=f(2**-10)),
        lambda x: F.layer_norm(x, (8,), GAMMA, BETA, 2**-10),
        x=X,
    ),
    case(
        "layer_norm_all",
        lambda f, x: mb.layer_norm(x=x, axes=[0, 1, 2]),
        lambda x: F.layer_norm(x, (2, 3, 8)),
        x=X,
    ),
    case(
        "layer_norm_middle",
        lambda f, x: mb.layer_norm(
            x=x, axes=[1], gamma=f(CHANNEL[0]), beta=f(CHANNEL[1]), epsilon=f(2**-10)
        ),
        lambda x: F.layer_norm(x.movedim(1, -1), (4,), CHANNEL[0], CHANNEL[1], 2**-10).movedim(
            -1, 1
        ),
        x=IMAGE,
    ),
    case(
        "batch_norm",
        lambda f, x: mb.batch_norm(
            x=x,
            mean=f(CHANNEL[2]),
            variance=f(CHANNEL[3]),
            gamma=f(CHANNEL[0]),
            beta=f(CHANNEL[1]),
            epsilon=f(2**-8),
        ),
        lambda x: F.batch_norm(
            x, CHANNEL[2], CHANNEL[3], CHANNEL[0], CHANNEL[1], training=False, eps=2**-8
        ),
        x=IMAGE,
    ),
    case(
        "instance_norm",
        lambda f, x: mb.instance_norm(
            x=x, gamma=f(CHANNEL[0]), beta=f(CHANNEL[1]), epsilon=f(2**-8)
        ),
        lambda x: F.instance_norm(x, weight=CHANNEL[0], bias=CHANNEL[1], eps=2**-8),
        x=IMAGE,
    ),
    case(
        "l2_norm",
        lambda f, x: mb.l2_norm(x=x, epsilon=f(0.5)),
        lambda x: x / (x.flatten(1).square().sum(1) + 0.5).sqrt()[:, None, None, None],
        x=IMAGE,
    ),
    case(
        "local_response_norm",
        lambda f, x: mb.local_response_norm(x=x, size=3, alpha=f(0.5), beta=f(0.75), k=f(2.0)),
        lambda x: F.local_response_norm(x, 3, 0.5, 0.75, 2.0),
        x=IMAGE,
    ),
]

test_operation = conformance_test(CASES)
