"""Compiling Open-Sora 1.2 in its released size, network by network and as a whole.

    python benchmarks/release.py                     all four; needs 40 GB of disk
    python benchmarks/release.py --models vae        a quick look
    python benchmarks/release.py --verify numeric    also execute every distinct chunk

Weights are random, in the released names, shapes and layouts (sharded safetensors, fp16): nothing
can be downloaded here. Film: 68 frames of 192 x 192. Prints a Markdown table. `by hand` is how many
conversions the published app of On-device Sora made by hand for that network (arXiv 2502.04363).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import folder_bytes, timed
from safetensors.torch import save_file

from odsora_compiler.ir.manifest import ComponentEntry, Manifest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "open_sora"
sys.path.insert(0, str(EXAMPLES))
import t5  # noqa: E402
from pipeline import RELEASE  # noqa: E402
from stdit3 import STDiT3  # noqa: E402
from vae import VideoVAE  # noqa: E402

SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Model:
    """A model file, its options in the released size, and the passes."""

    file: str
    weights: str  # below the folder of checkpoints; "" is the folder itself
    passes: str
    options: dict[str, object]
    by_hand: str


FRAMES, HEIGHT, WIDTH = 20, 24, 24  # of a latent
MODELS = {
    "t5": Model("t5.py", "text_encoder", "cidl", {**RELEASE.text_encoder, "length": 300}, "24 + 2"),
    "stdit3": Model(
        "stdit3.py",
        "denoiser",
        "tdtm,cidl",
        {
            **{
                name: getattr(RELEASE.denoiser, name)
                for name in (
                    "depth",
                    "hidden_size",
                    "num_heads",
                    "caption_channels",
                    "model_max_length",
                )
            },
            "latent_frames": FRAMES,
            "latent_height": HEIGHT,
            "latent_width": WIDTH,
        },
        "28 + 2, and 28 merged",
    ),
    "vae": Model(
        "vae.py",
        "vae",
        "cidl",
        {
            "filters": RELEASE.temporal.filters,
            "num_res_blocks": RELEASE.temporal.num_res_blocks,
            "block_out_channels": ",".join(map(str, RELEASE.spatial.block_out_channels)),
            "layers_per_block": RELEASE.spatial.layers_per_block,
            "num_groups": RELEASE.temporal.num_groups,
            "latent_height": HEIGHT,
            "latent_width": WIDTH,
        },
        "9 + 9",
    ),
    "pipeline": Model("pipeline.py", "", "tdtm,lpl,cidl", {"size": "release"}, "93 and notebooks"),
}


def main() -> None:
    """Write the checkpoints, compile each model, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--verify", choices=["structure", "numeric"], default="structure")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        needed = {MODELS[name].weights for name in chosen.models}
        write_checkpoints(folder / "checkpoints", needed)
        print(
            "| | fp16 weights, GB | chunks | conversions | by hand | largest chunk, MB | time, s "
            "| peak memory, GB |\n|---|---|---|---|---|---|---|---|"
        )
        for name in chosen.models:
            print(row(name, MODELS[name], folder, chosen.verify), flush=True)


def row(name: str, model: Model, folder: Path, verify: str) -> str:
    """Compile one model; its row of the table. The bundle is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / f"{name}.odsora"
        command = [str(Path(sys.executable).parent / "odsora-compile"), str(EXAMPLES / model.file)]
        command += ["--passes", model.passes, "--verify", verify, "--quiet", "-o", str(out)]
        command += ["--weights", str(folder / "checkpoints" / model.weights)]
        for key, value in model.options.items():
            command += ["--set", f"{key}={value}"]
        seconds, peak = timed(command)
        components = Manifest.load(out).components.values()
        written = folder_bytes(out)
    packages = [package for entry in components for package in entry.packages.values()]
    cells = [
        f"{written / 1e9:.2f}",
        str(len(packages)),
        str(sum(_conversions(entry) for entry in components)),
        model.by_hand,
        f"{max(package.weight_bytes for package in packages) / 1e6:.0f}",
        f"{seconds:.0f}",
        f"{peak / 1e9:.2f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _conversions(entry: ComponentEntry) -> int:
    """Distinct structures, times the functions each was converted for."""
    structures = {package.structure: package for package in entry.packages.values()}
    return sum(len(package.functions) for package in structures.values())


def write_checkpoints(folder: Path, needed: set[str]) -> None:
    """Random fp16 weights of the networks in `needed` ("": all), in shards of about 1 GiB."""
    for name, shapes in _released():
        if ("" not in needed and name not in needed) or (folder / name).is_dir():
            continue
        (folder / name).mkdir(parents=True)
        pool = torch.randn(1 << 28, generator=torch.Generator().manual_seed(0)).half()
        shard: dict[str, torch.Tensor] = {}
        count = 0
        for index, (key, shape) in enumerate(shapes.items()):
            elements, inputs = shape.numel(), shape[1:].numel()
            start = 7919 * index % (len(pool) - elements)
            values = pool[start : start + elements].view(shape)
            # Of a scale that keeps the sizes of activations; gains of norms near 1.
            shard[key] = values / inputs**0.5 if len(shape) > 1 else 1 + 0.01 * values
            if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
                save_file(shard, folder / name / f"model-{count:05d}.safetensors")
                shard, count = {}, count + 1
        save_file(shard, folder / name / f"model-{count:05d}.safetensors")
        print(f"wrote random weights of {name}", file=sys.stderr)


def _released() -> Iterator[tuple[str, dict[str, torch.Size]]]:
    """Checkpoint → names and shapes of the release's parameters; nothing is allocated."""
    with torch.device("meta"):
        networks = {
            "text_encoder": t5.build(**RELEASE.text_encoder).module,
            "denoiser": STDiT3(RELEASE.denoiser),
            "vae": VideoVAE(RELEASE.temporal, RELEASE.spatial),
        }
    for name, module in networks.items():
        state = {key: tensor.shape for key, tensor in module.state_dict().items()}
        # One tensor under two names; checkpoints have the first.
        state.pop("encoder.embed_tokens.weight", None)
        yield name, state


if __name__ == "__main__":
    main()
