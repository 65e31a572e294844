"""Films of coloured shapes that move, and what they are called: the data the small model learns.

A clip shows one shape of one colour that moves at a steady speed from about the middle of the
picture to one of its edges, before a dark background that brightens a little like the sky at dawn.
Size, place, speed and brightness vary, so there are many clips for one prompt.

Place and background both tell an early frame from a late one, because the denoiser's rotary
attention knows how far frames are apart but not which is the first: in trials without it colours
and shapes came right long before directions. Reading a film back is in reading.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

FRAMES = 34
PIXELS = 32  # height and width

COLOURS: dict[str, tuple[float, float, float]] = {  # red, green, blue in 0..1
    "red": (0.95, 0.12, 0.12),
    "green": (0.10, 0.85, 0.20),
    "blue": (0.15, 0.25, 0.98),
    "yellow": (0.95, 0.88, 0.10),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {  # right and down are positive
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}

_PHRASES = (  # the first is the plain one
    "a {colour} {shape} moving {direction}",
    "{colour} {shape} moving {direction}",
    "a {colour} {shape} moves {direction}",
    "the {colour} {shape} moves {direction}",
    "a {colour} {shape} going {direction}",
    "a {shape}, {colour}, moving {direction}",
)
_LONG_PHRASES = {
    "left": ("a {colour} {shape} moves to the left", "a {colour} {shape} moving to the left"),
    "right": ("a {colour} {shape} moves to the right", "a {colour} {shape} moving to the right"),
    "up": ("a {colour} {shape} moves upwards", "a {colour} {shape} moving upwards"),
    "down": ("a {colour} {shape} moves downwards", "a {colour} {shape} moving downwards"),
}


@dataclass(frozen=True)
class Subject:
    """What a clip shows, in the words of `COLOURS`, `SHAPES` and `DIRECTIONS`."""

    colour: str
    shape: str
    direction: str

    @property
    def prompt(self) -> str:
        return _PHRASES[0].format(**vars(self))


SUBJECTS = tuple(Subject(*words) for words in product(COLOURS, SHAPES, DIRECTIONS))
PROMPTS = tuple(subject.prompt for subject in SUBJECTS)  # the 48 plain prompts


def caption(subject: Subject, random: np.random.Generator) -> str:
    """One of the ways to say it, the plain prompt half of the time; some end in a full stop."""
    if random.random() < 0.5:
        text = subject.prompt
    else:
        phrases = _PHRASES[1:] + _LONG_PHRASES[subject.direction]
        text = phrases[random.integers(len(phrases))].format(**vars(subject))
    capital = random.random()
    if capital < 0.2:
        text = text.capitalize()
    elif capital < 0.25:
        text = text.upper()
    return text + "." if random.random() < 0.1 else text


def render(
    subject: Subject, random: np.random.Generator, frames: int = FRAMES
) -> NDArray[np.float32]:
    """A clip of `subject`, [frames, 3, 32, 32] in 0..1.

    The shape moves 10 to 13 pixels in all, whatever the number of frames.
    """
    size = random.uniform(4.5, 5.5)
    middle = PIXELS / 2
    along = np.linspace(middle + random.uniform(1.0, 3.0), size + 1.5, frames)
    across = middle + random.uniform(-2.0, 2.0)
    dx, dy = DIRECTIONS[subject.direction]
    if dx + dy > 0:
        along = PIXELS - along
    centres = np.stack(np.broadcast_arrays(*((along, across) if dx else (across, along))), axis=1)

    tint = random.uniform(-0.015, 0.015, size=3)
    night, dawn = random.uniform(0.02, 0.05), random.uniform(0.11, 0.14)
    background = (np.linspace(night, dawn, frames)[:, None] + tint)[:, :, None, None]
    colour = np.array(COLOURS[subject.colour]) * random.uniform(0.85, 1.0)
    cover = coverage(subject.shape, centres, size)[:, None]
    film = background * (1 - cover) + colour[:, None, None] * cover
    return film.astype(np.float32)


def coverage(shape: str, centres: NDArray[np.float64], size: float) -> NDArray[np.float64]:
    """How much of each pixel a shape covers, 0..1: [len(centres), 32, 32].

    centres [n, 2] are the x and y of the middle of the shape's bounding box, in pixels from the top
    left corner of the picture; `size` is half the height of that box. A triangle points up.
    """
    middle = np.arange(PIXELS) + 0.5
    x = middle[None, None, :] - centres[:, 0, None, None]
    y = middle[None, :, None] - centres[:, 1, None, None]
    if shape == "circle":
        outside = np.hypot(x, y) - size
    elif shape == "square":
        outside = np.maximum(np.abs(x), np.abs(y)) - size
    else:
        # Sides from the top corner fall 2 for each 1 they go out: base and height are both 2·size.
        sides = (2 * np.abs(x) - (y + size)) / np.sqrt(5)
        outside = np.maximum(sides, y - size)
    # A signed distance in pixels is a good measure of coverage within half a pixel of an edge.
    return np.clip(0.5 - outside, 0, 1)
