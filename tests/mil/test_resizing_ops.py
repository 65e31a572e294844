"""Resizing against torch.nn.functional.interpolate and the sampling grids MIL documents."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from mil_programs import Case, case, conformance_test, mb, numbers

X = numbers(2, 3, 4, 6)
PAIR = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)


def sampled(mode: str, wanted: list[float]) -> Case:
    """Documented grid points for an input of two pixels, 0 and 1: the output is the grid itself."""
    return case(
        f"grid_{mode.lower()}_{len(wanted)}",
        lambda f, x: mb.resize_bilinear(
            x=x, target_size_height=1, target_size_width=len(wanted), sampling_mode=mode
        ),
        lambda x: torch.tensor(wanted, dtype=torch.float64).reshape(1, 1, 1, -1),
        x=PAIR,
    )


CASES = [
    case(
        "upsample_nearest",
        lambda f, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest"),
        x=X,
    ),
    case(
        "upsample_nearest_fraction",
        lambda f, x: mb.upsample_nearest_neighbor(
            x=x, scale_factor_height=1.5, scale_factor_width=0.5
        ),
        lambda x: F.interpolate(x, size=(6, 3), mode="nearest"),
        x=X,
    ),
    case(
        "resize_nearest",
        lambda f, x: mb.resize_nearest_neighbor(x=x, target_size_height=7, target_size_width=5),
        lambda x: F.interpolate(x, size=(7, 5), mode="nearest"),
        x=X,
    ),
    case(
        "upsample_bilinear_corners",
        lambda f, x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3),
        lambda x: F.interpolate(x, size=(8, 18), mode="bilinear", align_corners=True),
        x=X,
    ),
    case(
        "upsample_bilinear",
        lambda f, x: mb.upsample_bilinear(
            x=x, scale_factor_height=2.0, scale_factor_width=1.5, align_corners=False
        ),
        lambda x: F.interpolate(x, size=(8, 9), mode="bilinear", align_corners=False),
        x=X,
    ),
    case(
        "resize_linear",
        lambda f, x: mb.resize(
            x=x,
            shape=[9, 0],
            resized_dims=np.uint32(2),
            interpolation_mode="LINEAR",
            sampling_mode="UNALIGN_CORNERS",
        ),
        lambda x: F.interpolate(x, size=(9, 6), mode="bilinear", align_corners=False),
        x=X,
    ),
    case(
        "resize_nearest_exact",
        lambda f, x: mb.resize(
            x=x,
            shape=[9, 4],
            resized_dims=np.uint32(2),
            interpolation_mode="NEAREST_NEIGHBOR",
            sampling_mode="UNALIGN_CORNERS",
        ),
        lambda x: F.interpolate(x, size=(9, 4), mode="nearest-exact"),
        x=X,
    ),
    sampled("UNALIGN_CORNERS", [0.0, 0.1, 0.5, 0.9, 1.0]),
    sampled("STRICT_ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]),
    sampled("ALIGN_CORNERS", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    sampled("ALIGN_CORNERS", [0.5]),
    sampled("DEFAULT", [0.0, 0.4, 0.8, 1.0, 1.0]),
    sampled("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
]

test_operation = conformance_test(CASES)
