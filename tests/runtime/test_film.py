"""Films as a player meets them: decoded again and compared with the tensor they came from."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from odsora_compiler.errors import RunError, UsageError
from odsora_compiler.runtime.film import EXTENSIONS, FilmFile, check_film_path, write_film


def clip(frames: int = 10, height: int = 32, width: int = 32) -> torch.Tensor:
    """A red and a blue bar that grow on grey, each frame another."""
    video = torch.full((1, 3, frames, height, width), -0.5)
    for frame in range(frames):
        video[0, 0, frame, 4 : height // 2, : 4 + 2 * frame] = 1.0
        video[0, 2, frame, height // 2 : height - 4, : 4 + 2 * frame] = 1.0
    return video


def pixels(video: torch.Tensor, scale: int) -> np.ndarray:
    """The bytes [T, H, W, 3] that a film of `video` should show."""
    levels = ((video[0].double() + 1) / 2 * 255).round().clamp(0, 255)
    values = levels.permute(1, 2, 3, 0).numpy().astype(np.uint8)
    return values.repeat(scale, 1).repeat(scale, 2)


def decoded_mp4(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def decoded_gif(path: Path) -> tuple[np.ndarray, list[int]]:
    with Image.open(path) as image:
        frames = [
            (np.asarray(frame.convert("RGB")), frame.info["duration"])
            for frame in ImageSequence.Iterator(image)
        ]
    return np.stack([picture for picture, _ in frames]), [time for _, time in frames]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(int) - expected.astype(int)).mean())


# The limit is of the mean error in levels of 255. Where a colour begins inside a pair of pixels,
# as it does at odd scales, the format itself mixes.
@pytest.mark.parametrize(
    ("height", "width", "scale", "limit"),
    [(32, 32, 4, 1.0), (32, 48, 2, 1.0), (31, 33, 1, 4.0), (31, 32, 3, 2.0)],
)
def test_an_mp4_shows_the_frames(
    tmp_path: Path, height: int, width: int, scale: int, limit: float
) -> None:
    video = clip(height=height, width=width)
    written = write_film(video, tmp_path / "film.mp4", 12.0, scale)
    found = decoded_mp4(tmp_path / "film.mp4")
    high, wide = height * scale, width * scale
    assert written == FilmFile(10, high + high % 2, wide + wide % 2, 10 / 12)
    assert found.shape == (10, written.height, written.width, 3)
    expected = pixels(video, scale)
    found_error = error(found[:, :high, :wide], expected)
    assert found_error < limit
    # Each frame is itself and not the one before; the row or column added is the last again.
    assert found_error < 0.6 * error(found[1:, :high, :wide], expected[:-1])
    if high % 2:
        assert error(found[:, -1], found[:, -2]) < 2.0
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 12 and stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_flat_colours_keep_their_value_in_an_mp4(tmp_path: Path) -> None:
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [0.2, 0.5, -0.3]])
    video = colours.T[None, :, :, None, None].expand(1, 3, 5, 32, 32)
    write_film(video, tmp_path / "film.mp4", 12.0)
    assert np.abs(decoded_mp4(tmp_path / "film.mp4").astype(int) - pixels(video, 4)).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 33)])
def test_a_gif_shows_the_frames_in_their_time(tmp_path: Path, height: int, width: int) -> None:
    video = clip(frames=13, height=height, width=width)
    write_film(video, tmp_path / "film.gif", 12.0, 2)
    found, durations = decoded_gif(tmp_path / "film.gif")
    assert np.array_equal(found, pixels(video, 2))
    # 12 frames a second are no whole hundredths; the film as a whole keeps time.
    assert sum(durations) == 1080 and set(durations) == {80, 90}


def test_a_gif_of_many_colours_is_near(tmp_path: Path) -> None:
    height, width = torch.linspace(-1, 1, 64)[:, None], torch.linspace(-1, 1, 64)[None]
    picture = torch.stack([height.expand(64, 64), width.expand(64, 64), height * width])
    video = torch.stack([picture, -picture], dim=1)[None]
    write_film(video, tmp_path / "film.gif", 10.0, 1)
    assert error(decoded_gif(tmp_path / "film.gif")[0], pixels(video, 1)) < 8.0


@pytest.mark.parametrize(
    ("frames", "columns", "rows", "shown"),
    [
        (1, 1, 1, [0]),
        (10, 4, 3, list(range(10))),
        (24, 5, 5, list(range(24))),
        (70, 5, 5, [3 * index for index in range(24)]),
    ],
)
def test_a_sheet_has_the_frames_in_rows(
    tmp_path: Path, frames: int, columns: int, rows: int, shown: list[int]
) -> None:
    video = torch.linspace(-1, 1, frames)[None, None, :, None, None].expand(1, 3, -1, 8, 16)
    written = write_film(video, tmp_path / "film.png", 12.0, 1)
    assert written.frames == frames
    with Image.open(tmp_path / "film.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (rows * 10 - 2, columns * 18 - 2, 3)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        found = sheet[row * 10 : row * 10 + 8, column * 18 : column * 18 + 16]
        expected = pixels(video, 1)[shown[index]] if index < len(shown) else 255
        assert (found == expected).all()


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_the_same_video_gives_the_same_bytes(tmp_path: Path, extension: str) -> None:
    torch.manual_seed(3)
    video = torch.rand(1, 3, 6, 33, 40) * 2 - 1
    path, rng = tmp_path / f"film{extension}", np.random.default_rng(4)
    threads = torch.get_num_threads()
    found = set()
    for count in range(20):
        torch.set_num_threads(1 + count % 4)
        # What was in memory before must not matter.
        dirt = [rng.integers(0, 255, rng.integers(1_000, 90_000), np.uint8) for _ in range(8)]
        del dirt
        write_film(video, path, 12.0)
        found.add(path.read_bytes())
    torch.set_num_threads(threads)
    assert len(found) == 1
    write_film(-video, path, 12.0)
    assert path.read_bytes() not in found


@pytest.mark.parametrize(
    ("size", "scale"), [((32, 32), 4), ((128, 200), 1), ((127, 300), 2), ((240, 60), 3)]
)
def test_small_films_are_shown_larger(tmp_path: Path, size: tuple[int, int], scale: int) -> None:
    written = write_film(torch.zeros(1, 3, 2, *size), tmp_path / "film.gif", 12.0)
    assert (written.height, written.width) == (size[0] * scale, size[1] * scale)


def test_values_outside_are_cut_off_and_half_precision_is_taken(tmp_path: Path) -> None:
    video = torch.tensor([-7.0, -1.0, 1.0, 7.0], dtype=torch.float16).expand(1, 3, 1, 8, 4)
    write_film(video, tmp_path / "film.png", 12.0, 1)
    with Image.open(tmp_path / "film.png") as image:
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(("fps", "expected"), [(24, "24"), (23.976, "24000/1001"), (7.5, "15/2")])
def test_rates_are_exact(tmp_path: Path, fps: float, expected: str) -> None:
    write_film(clip(), tmp_path / "film.mp4", fps)
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert str(container.streams.video[0].average_rate) == expected


def test_upper_case_extensions_are_known(tmp_path: Path) -> None:
    write_film(clip(), tmp_path / "FILM.MP4", 12.0)
    assert len(decoded_mp4(tmp_path / "FILM.MP4")) == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_values_that_are_not_finite_make_no_film(
    tmp_path: Path, value: float, extension: str
) -> None:
    video = clip()
    video[0, 1, 3, 4:6, 7] = value
    with pytest.raises(RunError, match="2 values of 30720 that are not finite"):
        write_film(video, tmp_path / f"film{extension}", 12.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 4, 4, 8, 8), (2, 3, 4, 8, 8), (1, 3, 0, 8, 8)])
def test_other_tensors_are_no_film(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(RunError, match="the video has the shape"):
        write_film(torch.zeros(shape), tmp_path / "film.mp4", 12.0)


@pytest.mark.parametrize(
    ("fps", "scale", "expected"),
    [
        (0.0, 1, "0 frames a second"),
        (float("nan"), 1, "nan frames a second"),
        (1e6, 1, "1e\\+06 frames a second"),
        (12.0, 0, "a scale of 0"),
        (12.0, 65, "a scale of 65"),
    ],
)
def test_wrong_rates_and_scales(tmp_path: Path, fps: float, scale: int, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        write_film(clip(), tmp_path / "film.mp4", fps, scale)


def taken(folder: Path) -> Path:
    (folder / "film.mp4").write_text("precious")
    return folder / "film.mp4"


def a_folder(folder: Path) -> Path:
    (folder / "film.mp4").mkdir()
    return folder / "film.mp4"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (lambda folder: folder / "film.avi", "as '.avi'\n  Known extensions: .mp4, .gif, .png"),
        (lambda folder: folder / "film", "as ''"),
        (lambda folder: folder / "no" / "film.mp4", "no such folder"),
        (lambda folder: Path("/proc/film.mp4"), "/proc/film.mp4 cannot be written"),
        (taken, "--force"),
        (a_folder, "is a folder"),
    ],
)
def test_paths_are_checked_beforehand(
    tmp_path: Path, path: Callable[[Path], Path], expected: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_film_path(path(tmp_path))
    assert expected in str(caught.value)


def test_checking_leaves_nothing_and_force_allows(tmp_path: Path) -> None:
    check_film_path(tmp_path / "new.mp4")
    assert list(tmp_path.iterdir()) == []
    check_film_path(taken(tmp_path), force=True)
    assert (tmp_path / "film.mp4").read_text() == "precious"


WRITE = """
import sys, torch
from pathlib import Path
from odsora_compiler.errors import RunError
from odsora_compiler.runtime.film import write_film

torch.manual_seed(0)
try:
    write_film(torch.rand(1, 3, 30, 64, 64) * 2 - 1, Path(sys.argv[1]), 12.0)
except RunError as error:
    print(error)
"""


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_film_that_does_not_fit_leaves_what_was_there(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"film{extension}"
    path.write_text("precious")
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert f"{path} cannot be written (File too large)" in done.stdout, done.stderr
    assert done.returncode == 0 and path.read_text() == "precious"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_interruption_leaves_what_was_there(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"film{extension}"
    path.write_text("precious")
    torch.manual_seed(5)
    video = torch.rand(1, 3, 40, 128, 128) * 2 - 1

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt_when_writing, args=(tmp_path,), daemon=True).start()
            write_film(video, path, 12.0, 4)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert path.read_text() == "precious" and os.listdir(tmp_path) == [path.name]


def interrupt_when_writing(folder: Path) -> None:
    """Interrupt as soon as there is a part of the film in `folder`."""
    while not any(file.name.endswith(".partial") and size(file) for file in folder.iterdir()):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGALRM)


def size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def test_an_encoder_that_refuses_is_an_error_of_ours(tmp_path: Path) -> None:
    # H.264 ends at 16384 pixels a side.
    with pytest.raises(RunError, match="cannot be"):
        write_film(torch.zeros(1, 3, 1, 4, 20_000), tmp_path / "film.mp4", 12.0, 1)
    assert list(tmp_path.iterdir()) == []
