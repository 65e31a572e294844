"""Films by odsora-run: from a prompt to the file, and every way to ask for what cannot be."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import film_pipeline
import numpy as np
import pytest
import torch
from conftest import CommandResult, InFolder
from PIL import Image
from safetensors.torch import load_file, save_file

import odsora_compiler as odsora
from odsora_compiler.runtime.prompt import encode_prompt, noise

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that makes films of 5 frames of 32x24."""
    program = odsora.capture(film_pipeline.__file__)
    return odsora.lower(program, tmp_path_factory.mktemp("film") / "film.odsora")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without guidance and aesthetic score."""
    program = odsora.capture(film_pipeline.__file__, options={"bare": True})
    return odsora.lower(program, tmp_path_factory.mktemp("bare") / "bare.odsora")


@pytest.fixture(scope="module")
def leaping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose sampler leaves out calls as soon as it may: after three of six."""
    program = odsora.capture(film_pipeline.__file__)
    program = odsora.run_passes(program, "lpl{min_steps=2 patience=1 tolerance=1}")
    return odsora.lower(program, tmp_path_factory.mktemp("leaping") / "leaping.odsora")


def made(result: CommandResult) -> str:
    """What was printed by a command that did its work."""
    assert result.exit_code == 0, result.stderr
    return result.stdout


def eager(prompt: str = PROMPT, seed: int = 7, guidance: float = 3.0) -> torch.Tensor:
    """The video of the same networks and sampler in PyTorch."""
    spec = film_pipeline.build()
    assert spec.text_to_video is not None
    text = encode_prompt(spec.text_to_video, prompt, 48)
    networks: Any = SimpleNamespace(
        **{
            name: lambda module=part.module, **given: next(iter(module(**given).values()))
            for name, part in spec.components.items()
        }
    )
    z = noise(spec.inputs["z"].shape, seed)
    with torch.no_grad():
        return film_pipeline.sample(networks, text.tokens, text.mask, z, torch.tensor(guidance))[
            "video"
        ]


def levels(video: torch.Tensor) -> np.ndarray:
    return ((video[0] + 1) * 127.5).permute(1, 2, 3, 0).numpy()


def test_the_film_is_that_of_the_prompt(pipeline: Path, odsora_run: InFolder) -> None:
    options = ("--prompt", PROMPT, "--seed", 7)
    said = made(odsora_run(pipeline, *options, "-o", "film.mp4"))
    assert "wrote film.mp4: 5 frames of 32x24, shown 192x144, 0.42 s at 12 frames a second" in said
    assert "text_encoder 1 of 1 calls, denoiser 6 of 6 calls" in said and "peak memory" in said
    expected = levels(eager()).repeat(6, 1).repeat(6, 2)
    with av.open("film.mp4") as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.abs(np.stack(found) - expected).mean() < 4
    # Without compression in between, half precision is all that is left.
    made(odsora_run(pipeline, *options, "-o", "film.png", "--scale", 1))
    with Image.open("film.png") as image:
        sheet = np.asarray(image).astype(float)
    assert np.abs(sheet[:32, :24] - levels(eager())[0]).max() < 2
    assert np.abs(sheet[34:66, 26:50] - levels(eager())[4]).max() < 2
    made(odsora_run(pipeline, *options, "-o", "film.gif"))
    with Image.open("film.gif") as image:
        assert image.size == (144, 192) and image.n_frames == 5  # type: ignore[attr-defined]


def test_the_same_seed_gives_the_same_bytes(pipeline: Path, odsora_run: InFolder) -> None:
    def content(*options: object) -> bytes:
        made(odsora_run(pipeline, "-o", "film.mp4", "--force", *options))
        return Path("film.mp4").read_bytes()

    first = content("--prompt", PROMPT, "--seed", 7)
    assert content("--prompt", f" {PROMPT} ", "--seed", 7, "--memory-budget", "227kB") == first
    for other in (
        ("--prompt", PROMPT),
        ("--prompt", "a blue square", "--seed", 7),
        ("--prompt", PROMPT, "--seed", 7, "--guidance", 7.5),
        ("--prompt", PROMPT, "--seed", 7, "--aesthetic-score", 1),
        ("--prompt", PROMPT, "--seed", 7, "--fps", 24),
        ("--prompt", PROMPT, "--seed", 7, "--scale", 2),
        ("--prompt", PROMPT, "--seed", 7, "--frames", 4),
    ):
        assert content(*other) != first, other
    assert content("--prompt", PROMPT) == content("--prompt", PROMPT, "--seed", 0)


def test_tensors_instead_of_a_film(pipeline: Path, odsora_run: InFolder) -> None:
    made(odsora_run(pipeline, "--prompt", PROMPT, "--seed", 7, "-o", "out.safetensors"))
    video = load_file("out.safetensors")["video"]
    assert (video - eager()).abs().max() < 1e-2
    made(
        odsora_run(
            pipeline, "--prompt", PROMPT, "--guidance", 0, "--seed", 7, "-o", "a.safetensors"
        )
    )
    assert (load_file("a.safetensors")["video"] - eager(guidance=0.0)).abs().max() < 1e-2


def test_a_film_from_tensors(pipeline: Path, odsora_run: InFolder) -> None:
    made(odsora_run(pipeline, "--example", "-o", "example.gif", "--frames", 2, "--scale", 1))
    with Image.open("example.gif") as image:
        assert image.size == (24, 32) and image.n_frames == 2  # type: ignore[attr-defined]


def test_without_a_place_the_film_is_named_after_the_bundle(
    pipeline: Path, odsora_run: InFolder
) -> None:
    made(odsora_run(pipeline, "--prompt", PROMPT, "--seed", 12))
    assert os.listdir() == ["film-12.mp4"]
    refused = odsora_run(pipeline, "--prompt", PROMPT, "--seed", 12)
    assert refused.exit_code == 2 and "film-12.mp4 exists" in refused.stderr


def test_frames_rate_and_scale(pipeline: Path, odsora_run: InFolder) -> None:
    wishes = ("--frames", 3, "--fps", 23.976, "--scale", 3, "--size", "32x24")
    said = made(odsora_run(pipeline, "--prompt", PROMPT, *wishes, "-o", "film.mp4"))
    assert "3 frames of 32x24, shown 96x72, 0.13 s at 23.976 frames a second" in said
    with av.open("film.mp4") as container:
        assert len(list(container.decode(video=0))) == 3


def test_the_signature_says_that_there_are_films(pipeline: Path, odsora_run: InFolder) -> None:
    said = made(odsora_run(pipeline))
    assert "It makes films" in said and "denoiser.base" in said and "guidance: float32[]" in said


@pytest.mark.parametrize(
    "prompt", ["красный 🔴", "אדום \u202eأ", "a\0red\x1b[31m\ncircle", "\U0001fadf", "-x"]
)
def test_prompts_of_other_scripts(pipeline: Path, odsora_run: InFolder, prompt: str) -> None:
    result = odsora_run(pipeline, "--prompt", prompt, "-o", "film.mp4")
    assert made(result) and "warning" not in result.stderr


def test_a_long_prompt_is_cut_and_it_is_said_where(pipeline: Path, odsora_run: InFolder) -> None:
    result = odsora_run(pipeline, "--prompt", (PROMPT + " " * 76) * 100, "-q", "-o", "film.mp4")
    assert made(result)
    # 48 tokens: 22 are the suffix, one ends the text.
    assert result.stderr.splitlines() == [
        f"warning: the prompt was cut after 25 of 9924 tokens: '{PROMPT} '"
    ]


def test_the_run_is_traced(pipeline: Path, odsora_run: InFolder) -> None:
    made(odsora_run(pipeline, "--prompt", PROMPT, "-o", "film.gif", "--trace", "trace.json"))
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    computed = [event["name"] for event in events if event.get("cat") == "compute"]
    assert computed.count("denoiser-00") == 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \t"], "the prompt is empty"),
        (["--prompt", "\n\u3000\u200b\ufeff\u202e\0"], "the prompt is empty"),
        (["--prompt", os.fsdecode(b"a red \xff circle")], "the prompt is not valid UTF-8"),
        (["--prompt", PROMPT, "-o", "f" * 300 + ".mp4"], "File name too long"),
        (["--prompt", PROMPT, "-o", "tokenizer.json/film.mp4"], "no such folder"),
        (["--prompt", PROMPT, "--inputs", "in.safetensors"], "exclude each other"),
        (["--prompt", PROMPT, "--example"], "exclude each other"),
        (["-o", "film.mp4"], "nothing to compute for film.mp4"),
        (
            ["--prompt", PROMPT, "-o", "film.avi"],
            "Known extensions: .mp4, .gif, .png, .safetensors",
        ),
        (["--prompt", PROMPT, "-o", "film"], "nothing can be written as ''"),
        (["--example", "-o", "film.avi"], "Known extensions"),
        (["--prompt", PROMPT, "-o", "no/film.mp4"], "no such folder"),
        (["--prompt", PROMPT, "-o", "/proc/film.mp4"], "/proc/film.mp4 cannot be written"),
        (["--prompt", PROMPT, "-o", "."], "is a folder"),
        (["--prompt", PROMPT, "--trace", "."], "is a folder"),
        (
            ["--prompt", PROMPT, "-o", "a.mp4", "--trace", "./a.mp4"],
            "-o and --trace both name a.mp4",
        ),
        (["--prompt", PROMPT, "-o", "a.mp4", "--trace", "a.mp4", "--force"], "both name a.mp4"),
        (["--prompt", PROMPT, "--seed", "-1"], "the seed -1"),
        (["--prompt", PROMPT, "--seed", "99999999999"], "the seed 99999999999"),
        (["--example", "--seed", "-1"], "the seed -1"),
        (["--prompt", PROMPT, "--seed", "9" * 400], "the seed 999"),
        (["--prompt", PROMPT, "--seed", "seven"], "Invalid value for '--seed'"),
        (["--prompt", PROMPT, "--guidance", "nan"], "a guidance of nan"),
        (["--prompt", PROMPT, "--guidance", "1e40"], "a guidance of 1e+40"),
        (["--prompt", PROMPT, "--guidance", "1e38"], "from -1000 to 1000"),
        (["--prompt", PROMPT, "--aesthetic-score", "11"], "an aesthetic score of 11"),
        (["--prompt", PROMPT, "--aesthetic-score", "nan"], "an aesthetic score of nan"),
        (["--prompt", PROMPT, "--aesthetic-score", "abc"], "Invalid value for"),
        (["--prompt", PROMPT, "--frames", "-1"], "at least one frame"),
        (["--prompt", PROMPT, "--frames", "6"], "makes 5\n  Compile one with --set frames=6"),
        (["--prompt", PROMPT, "--frames", "0"], "at least one frame"),
        (
            ["--prompt", PROMPT, "--size", "64x48"],
            "makes 32x24\n  Compile one with --set height=64",
        ),
        (["--prompt", PROMPT, "--size", "24x32"], "--set height=24 --set width=32"),
        (["--prompt", PROMPT, "--size", "720p"], "expected HEIGHTxWIDTH"),
        (["--prompt", PROMPT, "--size", "0x0"], "--size 0x0: a film has at least one pixel"),
        (["--prompt", PROMPT, "--size", "32x0"], "--size 32x0: a film has at least one pixel"),
        (["--prompt", PROMPT, "--size", "-32x24"], "expected HEIGHTxWIDTH"),
        (["--prompt", PROMPT, "--size", "9" * 5000 + "x4"], "expected HEIGHTxWIDTH"),
        (["--prompt", PROMPT, "--fps", "0"], "0 frames a second"),
        (["--prompt", PROMPT, "--fps", "nan"], "nan frames a second"),
        (["--prompt", PROMPT, "--scale", "0"], "a scale of 0"),
        (["--prompt", PROMPT, "-o", "out.safetensors", "--fps", "3"], "--fps is for films"),
        (["--example", "--frames", "3"], "--frames is for films"),
        (["--example", "--guidance", "3"], "--guidance is for prompts"),
        (["--aesthetic-score", "3"], "--aesthetic-score is for prompts"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_written(
    pipeline: Path, odsora_run: InFolder, arguments: list[str], expected: str
) -> None:
    result = odsora_run(pipeline, *arguments)
    assert result.exit_code == 2, result.output
    assert expected in result.stderr and result.stdout == ""
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--guidance", "3"], "no guidance"), (["--aesthetic-score", "5"], "no aesthetic score")],
)
def test_options_that_the_bundle_does_not_have(
    bare: Path, odsora_run: InFolder, arguments: list[str], expected: str
) -> None:
    made(odsora_run(bare, "--prompt", PROMPT))
    result = odsora_run(bare, "--prompt", PROMPT, "--seed", 1, *arguments)
    assert result.exit_code == 2 and expected in result.stderr
    assert os.listdir() == ["bare-0.mp4"]


@pytest.mark.parametrize("arguments", [["--prompt", PROMPT], ["--example", "-o", "film.mp4"]])
def test_a_bundle_that_makes_no_films(
    bundle: Path, odsora_run: InFolder, arguments: list[str]
) -> None:
    result = odsora_run(bundle, *arguments)
    assert result.exit_code == 2
    assert "makes no film of a prompt: it gives y: float32[2, 6, 32]" in result.stderr
    assert "a text encoder and a video decoder" in result.stderr
    assert os.listdir() == []


def test_a_video_that_is_not_finite(pipeline: Path, odsora_run: InFolder) -> None:
    spec = film_pipeline.build()
    given = dict(spec.inputs)
    given["z"] = torch.full_like(given["z"], float("nan"))
    save_file(given, "in.safetensors")
    result = odsora_run(pipeline, "--inputs", "in.safetensors", "-o", "film.mp4")
    assert result.exit_code == 1 and "that are not finite" in result.stderr
    assert os.listdir() == ["in.safetensors"]


def test_a_rate_that_no_film_has_is_found_before_it_is_made(
    pipeline: Path, odsora_run: InFolder, tmp_path: Path
) -> None:
    copy = shutil.copytree(pipeline, tmp_path / "copy.odsora")
    data = json.loads((copy / "manifest.json").read_text())
    data["text_to_video"]["fps"] = 500.0
    (copy / "manifest.json").write_text(json.dumps(data))
    for source in (["--prompt", PROMPT], ["--example"]):
        result = odsora_run(copy, *source, "-o", "film.mp4")
        assert result.exit_code == 2
        assert result.stderr == (
            "error: 500 frames a second\n  A film has 0.1 to 240: choose with --fps.\n"
        )
    assert os.listdir() == ["copy.odsora"]
    made(odsora_run(copy, "--prompt", PROMPT, "--fps", 24, "-o", "film.mp4"))
    made(odsora_run(copy, "--prompt", PROMPT, "-o", "film.safetensors"))


@pytest.mark.parametrize("damage", ["missing", "broken", "role"])
def test_damaged_parts_of_films_are_named(
    pipeline: Path, odsora_run: InFolder, tmp_path: Path, damage: str
) -> None:
    copy = shutil.copytree(pipeline, tmp_path / "copy.odsora")
    if damage == "missing":
        (copy / "tokenizer.json").unlink()
    elif damage == "broken":
        (copy / "tokenizer.json").write_text("{}")
    else:
        data = json.loads((copy / "manifest.json").read_text())
        data["text_to_video"]["noise"] = "nosie"
        (copy / "manifest.json").write_text(json.dumps(data))
    result = odsora_run(copy, "--prompt", PROMPT)
    assert result.exit_code == 1
    assert {"missing": "tokenizer.json", "broken": "tokenizer", "role": "'nosie'"}[
        damage
    ] in result.stderr
    assert os.listdir() == ["copy.odsora"]


def test_calls_that_an_exit_left_out_are_not_counted(leaping: Path, odsora_run: InFolder) -> None:
    said = made(odsora_run(leaping, "--prompt", PROMPT))
    assert "denoiser 3 of 6 calls, decoder 1 of 1 calls" in said


def on_a_terminal(*arguments: object, cwd: Path) -> Iterator[str]:
    """What the command writes to a terminal that is its stderr, in pieces; asserts success."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "odsora_compiler.cli.run", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        while piece := os.read(ours, 4096):
            yield piece.decode()
    except OSError:
        pass  # Linux: the other side was closed.
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 0


def test_a_terminal_shows_bars_and_is_left_as_it_was(leaping: Path, tmp_path: Path) -> None:
    text = "".join(on_a_terminal(leaping, "--prompt", PROMPT, cwd=tmp_path))
    assert "denoiser" in text and "━" in text
    # The denoiser's bar is not left at half when the decoder's begins.
    assert "3 done" in text and "1 of 1, 0 s left" in text
    # The cursor that was hidden is shown again.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
