"""Clips of moving shapes, and reading them back from their pixels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/shapes"))
import clips
import reading


def films(seed: int, each: int) -> list[tuple[clips.Subject, NDArray[np.float32]]]:
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    return [(s, clips.render(s, random)) for _ in range(each) for s in clips.SUBJECTS]


def test_there_are_48_prompts_and_they_say_what_a_clip_shows() -> None:
    assert len(set(clips.PROMPTS)) == 48
    assert "a red circle moving left" in clips.PROMPTS
    random = np.random.default_rng(0)
    for subject in clips.SUBJECTS:
        words = {clips.caption(subject, random).lower() for _ in range(60)}
        assert len(words) > 5
        assert all(
            subject.colour in w and subject.shape in w and subject.direction in w for w in words
        )
        assert max(map(len, words)) < 48  # bytes that fit before the token that ends a prompt


def test_rendering_is_seeded_and_varied() -> None:
    one, same, other = (films(seed, 1)[0][1] for seed in (7, 7, 8))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.2


def test_shapes_stay_in_the_picture() -> None:
    for _, film in films(3, 4):
        sides = (film[:, :, 0], film[:, :, -1], film[:, :, :, 0], film[:, :, :, -1])
        difference = np.concatenate(sides, axis=2) - np.median(film, axis=(0, 2, 3))[:, None]
        # A tip that ends in the last pixel but one may tint the last: a tenth of it at most.
        assert np.abs(difference).max() < 0.1


def test_reading_is_right_on_fresh_clips() -> None:
    right = [
        reading.read((255 * film).round().astype(np.uint8)).agrees(subject)["all"]
        for subject, film in films(20, 12)
    ]
    assert np.mean(right) >= 0.995


def test_reading_bears_noise_and_short_films() -> None:
    random = np.random.default_rng(1)
    for subject, film in films(21, 1):
        noisy = np.clip(film + random.normal(0, 0.05, film.shape), 0, 1)
        assert reading.read(noisy).agrees(subject)["all"]
        assert reading.read(torch.from_numpy(film[::2])).agrees(subject)["all"]


@pytest.mark.parametrize("kind", ["black", "grey", "uniform noise", "normal noise", "faint shape"])
def test_what_shows_nothing_is_not_read(kind: str) -> None:
    random = np.random.default_rng(2)
    size = (34, 3, 32, 32)
    film = {
        "black": np.zeros(size),
        "grey": np.full(size, 0.5),
        "uniform noise": random.random(size),
        "normal noise": np.clip(random.normal(0.5, 0.1, size), 0, 1),
        "faint shape": 0.2 * clips.render(clips.SUBJECTS[0], random),
    }[kind]
    assert reading.read(film) == reading.UNREADABLE


def test_a_still_has_no_direction_and_a_film_backwards_the_opposite_one() -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for subject, film in films(22, 1):
        still = reading.read(np.repeat(film[:1], 34, axis=0))
        assert (still.colour, still.shape) == (subject.colour, subject.shape)
        assert still.direction is None
        assert reading.read(film[::-1].copy()).direction == opposite[subject.direction]


def test_motion_energy_is_the_mean_step_between_frames() -> None:
    film = np.zeros((3, 3, 4, 4), np.uint8)
    film[1] = 30
    film[2] = 20
    assert reading.motion_energy(film) == pytest.approx((30 + 10) / 2)
    assert reading.motion_energy(film[1:2].repeat(3, axis=0)) == 0


def test_psnr_and_ssim() -> None:
    film = films(23, 1)[0][1]
    assert reading.psnr(film, film) == float("inf")
    assert reading.ssim(film, film) == pytest.approx(1)
    flat = np.full_like(film, 0.5)
    assert reading.psnr(flat, flat + 0.1) == pytest.approx(20, abs=1e-4)
    # Flat pictures have no variance: what is left of equation 13 is the comparison of the means.
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert reading.ssim(flat, flat + 0.1) == pytest.approx(expected, rel=1e-6)
    noisy = np.clip(film + np.random.default_rng(0).normal(0, 0.1, film.shape), 0, 1)
    assert reading.ssim(film, noisy) < 0.9


def test_films_of_different_shapes_are_refused() -> None:
    film = films(24, 1)[0][1]
    with pytest.raises(ValueError, match="different shapes"):
        reading.psnr(film, film[1:])
    with pytest.raises(ValueError, match="a film is"):
        reading.read(film[0])
