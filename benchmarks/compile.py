"""Compiling the reference denoiser: the whole command against plain export and conversion.

    python benchmarks/compile.py                      XL width, depth 8: minutes
    python benchmarks/compile.py --depth 2 --runs 1   a quick look

Baseline: torch.export, decomposition, `ct.convert` and save of the same model with the same weights
for ONE variant. Ours: `odsora-compile … --passes tdtm,cidl --verify structure`, which writes both
variants; what the default verification adds is a row of its own. Every row is a process of its own,
rows alternate, peak memory is the operating system's account of the finished process (and of its
largest child). Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from processes import folder_bytes, timed

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "open_sora" / "stdit3.py"


@dataclass(frozen=True)
class Setting:
    """Size of the model and folders of one benchmark."""

    depth: int
    hidden_size: int
    latent: tuple[int, int, int]
    budget: str
    folder: Path

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the example's `build`."""
        frames, height, width = self.latent
        return {
            "depth": self.depth,
            "hidden_size": self.hidden_size,
            "num_heads": 16,
            "caption_channels": 4096,
            "model_max_length": 300,
            "latent_frames": frames,
            "latent_height": height,
            "latent_width": width,
        }

    @property
    def weights(self) -> Path:
        """The safetensors file both sides read."""
        return self.folder / "weights.safetensors"


@dataclass
class Row:
    """Runs of one command: seconds and peak bytes of each."""

    name: str
    command: list[str]
    seconds: list[float]
    peaks: list[int]
    bytes: int = 0


def main() -> None:
    """Parse arguments, run the rows in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=1152)
    parser.add_argument("--latent", default="20,24,24", help="frames,height,width")
    parser.add_argument("--budget", default="100MB", help="bytes of weights a chunk")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-verified-row", action="store_true", help="skip the slow third row")
    parser.add_argument("--plain-worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--weights-worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    frames, height, width = (int(part) for part in arguments.latent.split(","))
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(
            arguments.depth,
            arguments.hidden_size,
            (frames, height, width),
            arguments.budget,
            arguments.folder or Path(temporary),
        )
        if arguments.weights_worker:
            write_weights(setting)
        elif arguments.plain_worker:
            plain(setting, arguments.plain_worker)
        else:
            measure(setting, arguments.runs, not arguments.no_verified_row)


def measure(setting: Setting, runs: int, verified: bool) -> None:
    """Run all rows `runs` times in turn and print medians."""
    again = [sys.executable, __file__, "--folder", str(setting.folder)]
    again += ["--depth", str(setting.depth), "--hidden-size", str(setting.hidden_size)]
    again += ["--latent", ",".join(map(str, setting.latent))]
    subprocess.run([*again, "--weights-worker"], check=True)
    plain_out, ours_out = setting.folder / "plain.mlpackage", setting.folder / "ours.odsora"
    ours = [str(Path(sys.executable).parent / "odsora-compile"), str(MODEL), "--force", "--quiet"]
    ours += ["--passes", f"tdtm,cidl{{budget={setting.budget}}}", "-o", str(ours_out)]
    ours += ["--weights", str(setting.weights)]
    ours += [text for key, value in setting.options.items() for text in ("--set", f"{key}={value}")]
    rows = [
        Row("plain, one variant", [*again, "--plain-worker", str(plain_out)], [], []),
        Row("ours, base + tdtm", [*ours, "--verify", "structure"], [], []),
    ]
    if verified:
        rows.append(Row("ours, default verification", ours, [], []))
    for run in range(runs):
        for row in rows:
            shutil.rmtree(ours_out if row is not rows[0] else plain_out, ignore_errors=True)
            seconds, peak = timed(row.command)
            row.seconds.append(seconds)
            row.peaks.append(peak)
            row.bytes = folder_bytes(ours_out if row is not rows[0] else plain_out)
            print(
                f"run {run + 1}: {row.name}: {seconds:.1f} s, {peak / 1e9:.2f} GB", file=sys.stderr
            )
    weights = plain_weight_bytes(setting)
    print(
        f"STDiT3 depth {setting.depth}, width {setting.hidden_size}, latents "
        f"{'×'.join(map(str, setting.latent))}, fp16; {runs} runs each, in turn; "
        f"{os.cpu_count()} cores; medians\n"
    )
    print("| | time, s | of plain | peak memory, GB | of plain | bytes / fp16 weights |")
    print("|---|---|---|---|---|---|")
    base_time, base_peak = statistics.median(rows[0].seconds), statistics.median(rows[0].peaks)
    for row in rows:
        seconds, peak = statistics.median(row.seconds), statistics.median(row.peaks)
        print(
            f"| {row.name} | {seconds:.1f} | {seconds / base_time:.2f} | {peak / 1e9:.2f} "
            f"| {peak / base_peak:.2f} | {row.bytes / weights:.3f} |"
        )


def write_weights(setting: Setting) -> None:
    """Random weights of the model, float32, one safetensors file."""
    from safetensors.torch import save_file

    save_file(build(setting).module.state_dict(), setting.weights)


def plain(setting: Setting, out: Path) -> None:
    """What one would do without this project: export, decompose, convert, save."""
    import coremltools as ct
    import torch
    from safetensors.torch import load_file

    spec = build(setting)
    # assign: the file's tensors take the place of the random ones, so no copy counts against it.
    spec.module.load_state_dict(load_file(setting.weights), assign=True)
    exported = torch.export.export(spec.module.eval(), (), dict(spec.inputs), strict=False)
    model = ct.convert(
        exported.run_decompositions({}),
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        skip_model_load=True,
    )
    model.save(str(out))


def build(setting: Setting):  # type: ignore[no-untyped-def]
    """The example's `ModelSpec` in this size."""
    from odsora_compiler.frontend.model_file import load_build

    return load_build(MODEL)(**setting.options)


def plain_weight_bytes(setting: Setting) -> int:
    """Bytes of the weights in fp16: two a number in the file."""
    from odsora_compiler.ir.weights import FileWeights

    files = FileWeights(setting.weights)
    return sum(2 * files.spec(name).elements for name in files.names())


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
