"""Activation functions against torch in fp64."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from mil_programs import case, conformance_test, mb, numbers

X = numbers(2, 3, 4, 5) * 3
PER_CHANNEL = torch.tensor([0.25, 0.5, -0.75], dtype=torch.float64)
OTHER = torch.tensor([1.5, 0.5, 2.0], dtype=torch.float64)


def channels(vector: torch.Tensor) -> torch.Tensor:
    return vector[:, None, None]


CASES = [
    case("gelu_default", lambda f, x: mb.gelu(x=x), lambda x: F.gelu(x), x=X),
    case("gelu_exact", lambda f, x: mb.gelu(x=x, mode="EXACT"), lambda x: F.gelu(x), x=X),
    case(
        "gelu_tanh",
        lambda f, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x: F.gelu(x, approximate="tanh"),
        x=X,
    ),
    case(
        "gelu_sigmoid",
        lambda f, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x: x / (1 + torch.exp(-1.702 * x)),
        x=X,
    ),
    case("relu", lambda f, x: mb.relu(x=x), lambda x: F.relu(x), x=X),
    case("relu6", lambda f, x: mb.relu6(x=x), lambda x: F.relu6(x), x=X),
    case("sigmoid", lambda f, x: mb.sigmoid(x=x), lambda x: torch.sigmoid(x), x=X),
    case("silu", lambda f, x: mb.silu(x=x), lambda x: F.silu(x), x=X),
    case("softmax_default", lambda f, x: mb.softmax(x=x), lambda x: torch.softmax(x, -1), x=X),
    case("softmax_axis", lambda f, x: mb.softmax(x=x, axis=-3), lambda x: torch.softmax(x, 1), x=X),
    case(
        "softmax_of_masked",
        lambda f, x: mb.softmax(x=mb.add(x=x, y=f([0, -np.inf, 0, 0, -np.inf]))),
        lambda x: torch.softmax(x.index_fill(-1, torch.tensor([1, 4]), -torch.inf), -1),
        x=X,
    ),
    case(
        "clamped_relu",
        lambda f, x: mb.clamped_relu(x=x, alpha=f(0.5), beta=f(1.25)),
        lambda x: torch.minimum(F.leaky_relu(x, 0.5), torch.tensor(1.25)),
        x=X,
    ),
    case("elu", lambda f, x: mb.elu(x=x, alpha=f(0.75)), lambda x: F.elu(x, 0.75), x=X),
    case(
        "leaky_relu",
        lambda f, x: mb.leaky_relu(x=x, alpha=f(0.125)),
        lambda x: F.leaky_relu(x, 0.125),
        x=X,
    ),
    case(
        "linear_activation",
        lambda f, x: mb.linear_activation(x=x, alpha=f(0.75), beta=f(-2.5)),
        lambda x: 0.75 * x - 2.5,
        x=X,
    ),
    case(
        "prelu",
        lambda f, x: mb.prelu(x=x, alpha=f(PER_CHANNEL)),
        lambda x: F.prelu(x, PER_CHANNEL),
        x=X,
    ),
    case(
        "scaled_tanh",
        lambda f, x: mb.scaled_tanh(x=x, alpha=f(1.5), beta=f(0.5)),
        lambda x: 1.5 * torch.tanh(0.5 * x),
        x=X,
    ),
    case(
        "sigmoid_hard",
        lambda f, x: mb.sigmoid_hard(x=x, alpha=f(0.25), beta=f(0.625)),
        lambda x: (0.25 * x + 0.625).clamp(0, 1),
        x=X,
    ),
    case(
        "softplus", lambda f, x: mb.softplus(x=x), lambda x: F.softplus(x, threshold=100), x=X * 8
    ),
    case(
        "softplus_parametric",
        lambda f, x: mb.softplus_parametric(x=x, alpha=f(PER_CHANNEL), beta=f(OTHER)),
        lambda x: channels(PER_CHANNEL) * torch.log1p(torch.exp(channels(OTHER) * x)),
        x=X,
    ),
    case("softsign", lambda f, x: mb.softsign(x=x), lambda x: F.softsign(x), x=X),
    case(
        "thresholded_relu",
        lambda f, x: mb.thresholded_relu(x=x, alpha=f(0.75)),
        lambda x: torch.where(x >= 0.75, x, 0),
        x=X,
    ),
]

test_operation = conformance_test(CASES)
