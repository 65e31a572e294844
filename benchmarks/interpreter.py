"""Computing a chunk in the interpreter of packages against eager PyTorch, weights in memory.

    python benchmarks/interpreter.py                     XL sizes: some minutes
    python benchmarks/interpreter.py --chunks spatial --runs 3

Chunks: a spatial and a temporal block of STDiT3-XL on a latent of 20×24×24, and a layer of T5-XXL
on 300 tokens, all with random weights. Baseline: the PyTorch module in fp32. Ours: its compiled
package run by the `mil` executor, once as fp16 (weights widened when they are loaded, values
rounded to fp16 after every operation) and once as fp32. Calls alternate in one process; prints a
Markdown table of medians, and how close the outputs are.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import odsora_compiler as odsora
from odsora_compiler.mil.memory import Buffers
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.executors import MilExecutor, OpenPackage
from odsora_compiler.runtime.runner import as_feature
from odsora_compiler.runtime.storage import Storage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "open_sora"))

FRAMES, POSITIONS, TOKENS = 20, 144, 300
PRECISIONS = ("fp16", "fp32")
FUNCTION = "base"


class Block(nn.Module):
    """A block of STDiT3-XL, with what the denoiser hands to all of its blocks computed outside."""

    def __init__(self, temporal: bool) -> None:
        super().__init__()
        stdit3 = importlib.import_module("stdit3")
        config = stdit3.STDiT3Config()
        self.block = stdit3.STDiT3Block(config, temporal)
        rope = stdit3.RotaryEmbedding(config.hidden_size // config.num_heads)
        self.rotation = nn.ParameterList(rope(FRAMES)) if temporal else None

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        rotation = None if self.rotation is None else tuple(self.rotation)
        return self.block(x, y, t, FRAMES, (mask > 0)[:, None, None, :], rotation)


def block(temporal: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module and its inputs: two samples, of which one has half of the text."""
    module = Block(temporal)
    width = 1152
    mask = torch.ones(2, TOKENS)
    mask[1, TOKENS // 2 :] = 0
    return module, {
        "x": torch.randn(2, FRAMES * POSITIONS, width),
        "y": torch.randn(2, TOKENS, width),
        "t": torch.randn(2, 6 * width),
        "mask": mask,
    }


class TextLayer(nn.Module):
    """T5-XXL of one layer, from embedded tokens on."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        config = T5Config(
            vocab_size=32,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=1,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
        self.encoder = T5EncoderModel(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(inputs_embeds=x, attention_mask=mask)[0]


def text_layer() -> tuple[nn.Module, dict[str, Tensor]]:
    """The module and its inputs: one text that fills two thirds of the tokens."""
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[:, 2 * TOKENS // 3 :] = 0
    return TextLayer(), {"x": torch.randn(1, TOKENS, 4096), "mask": mask}


CHUNKS: dict[str, tuple[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]]] = {
    "spatial": ("STDiT3-XL spatial block", lambda: block(temporal=False)),
    "temporal": ("STDiT3-XL temporal block", lambda: block(temporal=True)),
    "text": ("T5-XXL layer", text_layer),
}


@dataclass
class Packaged:
    """A loaded package and its inputs in its dtypes."""

    package: OpenPackage
    inputs: dict[str, Tensor]

    def run(self) -> Tensor:
        """Its only output."""
        (output,) = self.package.run(FUNCTION, self.inputs).values()
        return output


def main() -> None:
    """Parse arguments, measure chunk by chunk and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", default=",".join(CHUNKS), help="names, separated by commas")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores; "
        f"{arguments.runs} runs each, in turn; medians, seconds\n"
    )
    print("| chunk | eager fp32 | package fp16 | ratio | package fp32 | ratio | cosine of fp16 |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.chunks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(measure(name, arguments.runs, Path(folder)), flush=True)


def measure(name: str, runs: int, folder: Path) -> str:
    """The row of a chunk."""
    title, make = CHUNKS[name]
    torch.manual_seed(0)
    module, inputs = make()
    module.eval()
    program = odsora.capture(odsora.ModelSpec(module, inputs))
    packaged = {
        precision: load(
            Bundle(
                odsora.lower(
                    program, folder / f"{precision}.odsora", precision=precision, verify="structure"
                )
            ),
            inputs,
        )
        for precision in PRECISIONS
    }
    calls: dict[str, Callable[[], Tensor]] = {"eager": lambda: module(**inputs)}
    calls |= {precision: packaged[precision].run for precision in PRECISIONS}
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    with torch.no_grad():
        outputs = {kind: call().flatten().double() for kind, call in calls.items()}
        for _ in range(runs):
            for kind, call in calls.items():
                begin = time.perf_counter()
                call()
                seconds[kind].append(time.perf_counter() - begin)
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    cosine = F.cosine_similarity(outputs["fp16"], outputs["eager"], 0)
    cells = [f"{median['eager']:.3f}"]
    for precision in PRECISIONS:
        cells += [f"{median[precision]:.3f}", f"{median[precision] / median['eager']:.2f}"]
    return f"| {title} | {' | '.join(cells)} | {cosine:.6f} |"


def load(bundle: Bundle, inputs: dict[str, Tensor]) -> Packaged:
    """The bundle's only package, loaded."""
    ((component, entry),) = bundle.manifest.components.items()
    (chunk,) = entry.functions[FUNCTION].chunks
    package = MilExecutor().open(bundle.package_path(component, chunk.package))
    package.load([FUNCTION], Storage(), Buffers(), lambda: False)
    return Packaged(
        package, {item.name: as_feature(inputs[item.name], item) for item in chunk.inputs}
    )


if __name__ == "__main__":
    main()
