"""From the video tensor of a decoder to a file that plays (.mp4, .gif) or a sheet of frames (.png).

The same video gives the same bytes. Pixels are repeated by whole numbers, never interpolated, so
what is seen is what the model made.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from odsora_compiler.errors import RunError, UsageError
from odsora_compiler.runtime.output_file import check_output_file, output_file

EXTENSIONS = (".mp4", ".gif", ".png")

# Without another wish, a film's shorter side gets at least so many pixels.
SMALLEST_SIDE = 128
LARGEST_SCALE = 64
LARGEST_FPS = 240.0
# Frames of a contact sheet: more are chosen from evenly.
SHEET_FRAMES = 24

_SHEET_GAP = 2  # pixels between frames
# x264: 0 is lossless, 23 its default; at 12 no block of a flat colour is seen.
_QUALITY = 12
_BT709 = 1  # number of that standard for primaries, transfer and matrix


@dataclass(frozen=True)
class FilmFile:
    """What was written: frames of height × width pixels, `seconds` long when it is played."""

    frames: int
    height: int
    width: int
    seconds: float


def is_film(path: Path) -> bool:
    """Whether the extension of `path` is one of a film."""
    return path.suffix.lower() in EXTENSIONS


def check_film_path(path: Path, force: bool = False) -> None:
    """Raise `UsageError` when no film can be written at `path`; to be asked before the work."""
    if not is_film(path):
        raise UsageError(
            f"{path}: no film can be written as '{path.suffix}'",
            f"Known extensions: {', '.join(EXTENSIONS)} (.png: a sheet of frames).",
        )
    check_output_file(path, force)


def check_scale(scale: int) -> None:
    """Raise `UsageError` unless pixels can be repeated `scale` times."""
    if not 1 <= scale <= LARGEST_SCALE:
        raise UsageError(f"a scale of {scale}", f"Pixels are repeated 1 to {LARGEST_SCALE} times.")


def check_fps(fps: float) -> None:
    """Raise `UsageError` unless a film can have so many frames a second."""
    # Also false for nan.
    if not 0.1 <= fps <= LARGEST_FPS:
        raise UsageError(
            f"{fps:g} frames a second", f"A film has 0.1 to {LARGEST_FPS:g}: choose with --fps."
        )


def write_film(video: torch.Tensor, path: Path, fps: float, scale: int | None = None) -> FilmFile:
    """Write `video` [1, 3, T, H, W], -1..1, to `path`; values outside are cut off.

    `scale`: how often a pixel is repeated; None takes the smallest number that gives the shorter
    side 128 pixels. An .mp4 of an odd size gets one more row or column, the last one again. A .gif
    counts hundredths of a second and shows a frame for at least two of them. Of a long film, a .png
    has 24 frames, evenly chosen. Raises `RunError` when the video is not one, has values that are
    not finite, or cannot be written; then nothing is left at `path`.
    """
    pixels = _pixels(video)
    if scale is None:
        scale = max(1, math.ceil(SMALLEST_SIDE / min(pixels.shape[1:3])))
    check_film_path(path, force=True)
    check_scale(scale)
    check_fps(fps)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_sheet}[path.suffix.lower()]
    with output_file(path) as partial:
        height, width = write(pixels, partial, fps)
    return FilmFile(len(pixels), height, width, len(pixels) / fps)


def _pixels(video: torch.Tensor) -> np.ndarray:
    """Bytes [T, H, W, 3] of a video [1, 3, T, H, W]."""
    if video.ndim != 5 or video.shape[:2] != (1, 3) or 0 in video.shape:
        raise RunError(
            f"the video has the shape {list(video.shape)}",
            "A film is written from [1, 3, frames, height, width].",
        )
    wrong = int((~video.isfinite()).sum())
    if wrong:
        raise RunError(
            f"the video has {wrong} values of {video.numel()} that are not finite",
            "No film was written. Compile with --precision fp32, or --verify full to find where "
            "they come from.",
        )
    levels = ((video[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().numpy()


def _write_mp4(pixels: np.ndarray, path: Path, fps: float) -> tuple[int, int]:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _, height, width, _ = pixels.shape
    # Colour is kept for every second pixel, so sides are even.
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", _rate(fps))
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {
                "crf": str(_QUALITY),
                "preset": "medium",
                # One thread: with several, what x264 decides depends on how many there are. And
                # its macroblock tree depends on what was in memory before, on some processors.
                "threads": "1",
                "x264-params": "mbtree=0",
            }
            # A player that is not told the matrix guesses it from the size.
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = ColorRange.MPEG
            for picture in pixels:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame = frame.reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror) from error
        raise RunError(f"{path.name}: the film cannot be encoded ({error})") from error
    return pixels.shape[1], pixels.shape[2]


def _rate(fps: float) -> Fraction:
    """`fps` as the fraction a container has: 23.976 is 24000/1001."""
    broadcast = Fraction(round(fps * 1.001) * 1000, 1001)
    if abs(float(broadcast) - fps) < 1e-3:
        return broadcast
    return Fraction(fps).limit_denominator(1000)


def _write_gif(pixels: np.ndarray, path: Path, fps: float) -> tuple[int, int]:
    from PIL import Image

    frames, height, width, _ = pixels.shape
    # One palette for the whole film: with one each, still parts would flicker.
    palette = Image.fromarray(pixels.reshape(frames * height, width, 3)).quantize(
        256, dither=Image.Dither.NONE
    )
    pictures = [
        Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE)
        for picture in pixels
    ]
    ends = [round(100 * index / fps) for index in range(frames + 1)]
    durations = [10 * max(2, end - begin) for begin, end in itertools.pairwise(ends)]
    pictures[0].save(
        path, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    return height, width


def _write_sheet(pixels: np.ndarray, path: Path, fps: float) -> tuple[int, int]:
    from PIL import Image

    total, height, width, _ = pixels.shape
    count = min(total, SHEET_FRAMES)
    chosen = pixels[np.linspace(0, total - 1, count).round().astype(int)]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    down, across = height + _SHEET_GAP, width + _SHEET_GAP
    sheet = np.full((rows * down - _SHEET_GAP, columns * across - _SHEET_GAP, 3), 255, np.uint8)
    for index, picture in enumerate(chosen):
        top, left = index // columns * down, index % columns * across
        sheet[top : top + height, left : left + width] = picture
    Image.fromarray(sheet).save(path, "PNG")
    return height, width
