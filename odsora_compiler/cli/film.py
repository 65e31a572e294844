"""Films in odsora-run: the options, whether the bundle can make such a one, what is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from odsora_compiler.errors import UsageError

if TYPE_CHECKING:
    import torch

    from odsora_compiler.ir.text_to_video import TextToVideo
    from odsora_compiler.runtime.bundle import Bundle
    from odsora_compiler.runtime.runner import Runner


@dataclass(frozen=True)
class FilmOptions:
    """Options of the command line; None: not given. `size` is text such as `240x424`."""

    prompt: str | None = None
    guidance: float | None = None
    aesthetic_score: float | None = None
    size: str | None = None
    frames: int | None = None
    fps: float | None = None
    scale: int | None = None

    def check(self, is_film: bool) -> None:
        """Raise `UsageError` on an option that is wrong, or is about something that is not done.

        `is_film`: whether a film is written, and not tensors.
        """
        from odsora_compiler.runtime.film import check_fps, check_scale

        for option in ("guidance", "aesthetic_score", "size"):
            if self.prompt is None and getattr(self, option) is not None:
                raise UsageError(f"{_flag(option)} is for prompts", "Give a --prompt as well.")
        for option in ("frames", "fps", "scale"):
            if not is_film and getattr(self, option) is not None:
                raise UsageError(f"{_flag(option)} is for films", "Write one: -o film.mp4.")
        if self.frames is not None and self.frames < 1:
            raise UsageError(f"--frames {self.frames}", "A film has at least one frame.")
        if self.size is not None:
            _height_and_width(self.size)
        if self.fps is not None:
            check_fps(self.fps)
        if self.scale is not None:
            check_scale(self.scale)


def film_roles(bundle: Bundle, runner: Runner) -> TextToVideo:
    """What of the bundle is prompt, noise and film; raises `UsageError` when it makes no film."""
    roles = bundle.text_to_video()
    if roles is None:
        gives = "; ".join(str(spec) for spec in runner.outputs)
        raise UsageError(
            f"{bundle.path} makes no film of a prompt: it gives {gives}",
            "Compile a pipeline with a text encoder and a video decoder: a PipelineSpec with "
            "text_to_video. This bundle takes --inputs in.safetensors -o out.safetensors.",
        )
    return roles


def check_fit(options: FilmOptions, roles: TextToVideo, runner: Runner) -> None:
    """Raise `UsageError` when the bundle's films have fewer frames or another size than asked."""
    frames, height, width = film_shape(roles, runner)
    if options.frames is not None and options.frames > frames:
        raise UsageError(
            f"--frames {options.frames}: this bundle makes {frames}",
            f"Compile one with --set frames={options.frames}, or ask for {frames} at most.",
        )
    if options.size is not None and _height_and_width(options.size) != (height, width):
        high, wide = _height_and_width(options.size)
        raise UsageError(
            f"--size {options.size}: this bundle makes {height}x{width}",
            f"Compile one with --set height={high} --set width={wide}.",
        )


def film_shape(roles: TextToVideo, runner: Runner) -> tuple[int, int, int]:
    """Frames, height and width of what the bundle makes."""
    from odsora_compiler.errors import PackageError

    for spec in runner.outputs:
        if spec.name == roles.video and len(spec.shape) == 5:
            return spec.shape[2], spec.shape[3], spec.shape[4]
    raise PackageError(
        f"the manifest names the film '{roles.video}', which is no output of 5 dimensions",
        "Copy the bundle again or recompile it.",
    )


def frame_rate(options: FilmOptions, roles: TextToVideo) -> float:
    """Frames a second of the film; raises `UsageError` when no film can have so many."""
    from odsora_compiler.runtime.film import check_fps

    fps = options.fps if options.fps is not None else roles.fps
    check_fps(fps)
    return fps


def prompt_inputs(
    options: FilmOptions,
    roles: TextToVideo,
    runner: Runner,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """What the host takes for the prompt; `say` hears the warnings."""
    from odsora_compiler.runtime.prompt import host_inputs

    examples, _ = runner.bundle.examples()
    tensors, warnings = host_inputs(
        roles,
        runner.inputs,
        examples,
        options.prompt or "",
        seed,
        options.guidance,
        options.aesthetic_score,
    )
    for warning in warnings:
        say(f"warning: {warning}")
    return tensors


def save_film(video: torch.Tensor, out: Path, options: FilmOptions, roles: TextToVideo) -> str:
    """Write the film and say in a line what was written. Raises like `runtime.film.write_film`."""
    from odsora_compiler.runtime.film import write_film

    fps = frame_rate(options, roles)
    height, width = video.shape[-2:]
    made = write_film(video[:, :, : options.frames], out, fps, options.scale)
    enlarged = (made.height, made.width) != (height, width)
    return (
        f"wrote {out}: {made.frames} frames of {height}x{width}"
        + (f", shown {made.height}x{made.width}" if enlarged else "")
        + f", {made.seconds:.2f} s at {fps:g} frames a second"
    )


def _height_and_width(size: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", size)
    if found is None:
        raise UsageError(f"--size '{size}': expected HEIGHTxWIDTH", "For example --size 240x424.")
    height, width = int(found[1]), int(found[2])
    if not height or not width:
        raise UsageError(
            f"--size {size}: a film has at least one pixel", "For example --size 240x424."
        )
    return height, width


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
