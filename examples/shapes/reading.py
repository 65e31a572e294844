"""What a film shows, read from its pixels: colour, shape, direction; and how alike two films are.

No network is involved. A film is [frames, 3, H, W], numpy or torch, either uint8 (0..255) or
floating point (0..1).
"""

from __future__ import annotations

from dataclasses import dataclass

import clips
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Film = NDArray[np.generic] | Tensor

SMALLEST_CONTRAST = 0.25  # between shape and background, the length of a difference of colours
SMALLEST_COSINE = 0.93  # between the colour seen and the colour named
SMALLEST_OVERLAP = 0.72  # of the shape seen with the shape named
SMALLEST_TRAVEL = 4.0  # pixels
SMALLEST_SHARE = 0.8  # of the frames are to show something of the right size
AREA = (0.03, 0.30)  # of the picture that a shape may cover


@dataclass(frozen=True)
class Reading:
    """What a film was read to show; None: that cannot be told."""

    colour: str | None
    shape: str | None
    direction: str | None

    def agrees(self, subject: clips.Subject) -> dict[str, bool]:
        """Whether `colour`, `shape` and `direction`, and `all` three of them, are the subject's.

        The share of films of which `all` is true is the prompt adherence.
        """
        right = {name: getattr(self, name) == wanted for name, wanted in vars(subject).items()}
        return {**right, "all": all(right.values())}


UNREADABLE = Reading(None, None, None)


def read(film: Film) -> Reading:
    """The subject of a film of one shape before an even background.

    The background is the film's median colour. Pixels that differ from it at least half as much as
    the most different ones do are the shape: their mean gives the colour. How far each pixel is
    from background to that colour gives the shape's mask in each frame: direction is that of the
    mask's centroid, fitted by a line over time; the shape is that whose outline, drawn at the same
    centroid with the same area, overlaps the masks best.
    """
    pixels = _unit_range(film).numpy()
    difference = pixels - np.median(pixels, axis=(0, 2, 3))[:, None, None]
    distance = np.sqrt((difference**2).sum(axis=1))  # [frames, H, W]
    # The 99th percentile: a shape covers more than 1 % of the film, a stray pixel less.
    contrast = np.percentile(distance, 99)
    if contrast < SMALLEST_CONTRAST:
        return UNREADABLE
    seen = difference.transpose(0, 2, 3, 1)[distance > contrast / 2].mean(axis=0)

    mask = np.tensordot(difference, seen, axes=(1, 0)) / (seen @ seen)
    mask = np.where(mask < 0.25, 0, np.clip(mask, 0, 1))  # what is fainter is the background's
    areas = mask.mean(axis=(1, 2))
    usable = (areas > AREA[0]) & (areas < AREA[1])
    if usable.mean() < SMALLEST_SHARE:
        return UNREADABLE
    centroids = _centroids(mask[usable])
    shape, overlap = _shape(mask[usable], centroids)
    if overlap < SMALLEST_OVERLAP:
        return UNREADABLE
    times = np.flatnonzero(usable) / max(len(pixels) - 1, 1)
    return Reading(_colour(seen, pixels), shape, _direction(times, centroids))


def motion_energy(film: Film) -> float:
    """The mean absolute difference between neighbouring frames, in levels of 0..255.

    The mean is over all pairs of neighbours, colours and pixels: 0 for a still.
    """
    pixels = 255 * _unit_range(film)
    return float((pixels[1:] - pixels[:-1]).abs().mean())


def psnr(film: Film, reference: Film) -> float:
    """Peak signal-to-noise ratio in dB over all of the film: 10·log10(1 / mean square error).

    The peak is full white; infinite for equal films. Raises ValueError where shapes differ.
    """
    a, b = _pair(film, reference)
    return float(-10 * torch.log10((a - b).square().mean()))


def ssim(film: Film, reference: Film) -> float:
    """Structural similarity, -1..1, the mean over pixels, colours and frames.

    Equation 13 of Wang et al., "Image quality assessment: from error visibility to structural
    similarity", IEEE Transactions on Image Processing 13(4), 2004, with that paper's window (11 x
    11, Gaussian of standard deviation 1.5) and constants (0.01, 0.03), where the window fits into
    the picture. Raises ValueError where shapes differ.
    """
    a, b = (pixels.flatten(0, 1)[:, None] for pixels in _pair(film, reference))
    bell = torch.exp(-((torch.arange(11.0, dtype=a.dtype) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    mean_a, mean_b = F.conv2d(a, window), F.conv2d(b, window)
    variance_a = F.conv2d(a * a, window) - mean_a**2
    variance_b = F.conv2d(b * b, window) - mean_b**2
    covariance = F.conv2d(a * b, window) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )
    return float(similarity.mean())


def _unit_range(film: Film) -> Tensor:
    """The film as float64 in 0..1, [frames, 3, H, W]."""
    pixels = torch.as_tensor(film)
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"a film is [frames, 3, height, width], not {list(pixels.shape)}")
    whole = pixels.dtype == torch.uint8
    return (pixels.double() / 255 if whole else pixels.double()).clamp(0, 1)


def _pair(film: Film, reference: Film) -> tuple[Tensor, Tensor]:
    a, b = _unit_range(film), _unit_range(reference)
    if a.shape != b.shape:
        raise ValueError(f"films of different shapes: {list(a.shape)} and {list(b.shape)}")
    return a, b


def _colour(seen: NDArray[np.float64], pixels: NDArray[np.float64]) -> str | None:
    """The named colour whose difference from the background points the same way."""
    background = np.median(pixels, axis=(0, 2, 3))
    cosines = {}
    for name, colour in clips.COLOURS.items():
        wanted = np.array(colour) - background
        cosines[name] = seen @ wanted / (np.linalg.norm(seen) * np.linalg.norm(wanted) + 1e-9)
    best = max(cosines, key=lambda name: cosines[name])
    return best if cosines[best] >= SMALLEST_COSINE else None


def _centroids(mask: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean x and y of each mask [frames, H, W], in pixels from the top left corner: [frames, 2]."""
    weight = mask.sum(axis=(1, 2))
    x = (mask.sum(axis=1) * (np.arange(mask.shape[2]) + 0.5)).sum(axis=1) / weight
    y = (mask.sum(axis=2) * (np.arange(mask.shape[1]) + 0.5)).sum(axis=1) / weight
    return np.stack([x, y], axis=1)


def _shape(mask: NDArray[np.float64], centroids: NDArray[np.float64]) -> tuple[str, float]:
    """The best of the shapes and its overlap: intersection over union, 1 where it fits exactly."""
    size = np.sqrt(mask.sum(axis=(1, 2)).mean())
    overlaps = {}
    for shape, half, below in (
        ("circle", size / np.sqrt(np.pi), 0),
        ("square", size / 2, 0),
        # A triangle has its centroid a third of its height above its base, below the middle.
        ("triangle", size / np.sqrt(2), 1 / 3),
    ):
        outline = clips.coverage(shape, centroids - np.array([0, below * half]), half)
        union = np.maximum(mask, outline).sum(axis=(1, 2))
        overlaps[shape] = float((np.minimum(mask, outline).sum(axis=(1, 2)) / union).mean())
    best = max(overlaps, key=lambda name: overlaps[name])
    return best, overlaps[best]


def _direction(times: NDArray[np.float64], centroids: NDArray[np.float64]) -> str | None:
    """Where the centroid goes from time 0 to 1: None for too little, aslant, or to and fro."""
    slope = np.polyfit(times, centroids, 1)[0]
    main, other = (0, 1) if abs(slope[0]) > abs(slope[1]) else (1, 0)
    if abs(slope[main]) < SMALLEST_TRAVEL or abs(slope[other]) > abs(slope[main]) / 2:
        return None
    if np.corrcoef(times, centroids[:, main])[0, 1] ** 2 < 0.8:
        return None
    forwards, backwards = (("right", "left"), ("down", "up"))[main]
    return forwards if slope[main] > 0 else backwards
