"""What sampler rewrites and token merging cost and give: films scored from their pixels.

    python benchmarks/quality.py --plot docs/quality.png    both tables: tens of minutes
    python benchmarks/quality.py --films 4 --table rows --only lpl     a quick look

The model is examples/shapes. Prompts (all 48 in turn) and seeds are the same for every row, rows
alternate film by film. `rows`: each row is the program after the row's passes, run by PyTorch in
fp32. `bundles`: the compiled packages (fp16) without passes and with both passes at their defaults,
run by the interpreter. Both print a Markdown table:

    calls      denoiser calls a film        GFLOP   of the denoiser a film
    time       seconds a film               of full that time over the full sampler's
    adherence  % of films in which colour, shape and direction are read as the prompt says
    motion     mean absolute difference of neighbouring frames, levels of 255
    PSNR, SSIM against the full sampler's film of the same prompt and seed, mean and standard error

Measures are those of examples/shapes/reading.py.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import odsora_compiler as odsora
from odsora_compiler.analysis.cost import function_flops
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.runtime.prompt import host_inputs

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "shapes" / "pipeline.py"
sys.path.insert(0, str(MODEL.parent))

import clips  # noqa: E402
import reading  # noqa: E402

DENOISER = "denoiser"
STEPS = 30
PUBLISHED = "sites=spatial,temporal,cross"

# A row's name → its passes and the sampler's steps; the first is what the others are compared with.
Row = tuple[str, int]
ROWS: dict[str, Row] = {
    "full sampler": ("", STEPS),
    "plain, 2/3 of the steps": ("", 20),
    "plain, 1/2 of the steps": ("", 15),
    "plain, 12 steps": ("", 12),
    "plain, 10 steps": ("", 10),
    "plain, 6 steps": ("", 6),
    "plain, 4 steps": ("", 4),
    "lpl at 19": ("lpl{at=19}", STEPS),
    "lpl at 14": ("lpl{at=14}", STEPS),
    "lpl at 11": ("lpl{at=11}", STEPS),
    "lpl at 9": ("lpl{at=9}", STEPS),
    "lpl at 5": ("lpl{at=5}", STEPS),
    "lpl at 3": ("lpl{at=3}", STEPS),
    "lpl adaptive from step 14, slice": ("lpl{min_steps=14 scope=slice}", STEPS),
    "lpl adaptive from step 14, tensor": ("lpl{min_steps=14 scope=tensor}", STEPS),
    "lpl adaptive from step 8, slice (the default)": ("lpl", STEPS),
    "lpl adaptive from step 8, tensor": ("lpl{scope=tensor}", STEPS),
    "lpl adaptive from step 5, slice": ("lpl{min_steps=5 scope=slice}", STEPS),
    "lpl adaptive from step 5, tensor": ("lpl{min_steps=5 scope=tensor}", STEPS),
    "tdtm (the default: spatial, cross)": ("tdtm", STEPS),
    "tdtm first half": ("tdtm{steps=15}", STEPS),
    "tdtm spatial": ("tdtm{sites=spatial}", STEPS),
    "tdtm cross": ("tdtm{sites=cross}", STEPS),
    "tdtm temporal": ("tdtm{sites=temporal}", STEPS),
    "tdtm temporal, compact": ("tdtm{sites=temporal positions=compact}", STEPS),
    "tdtm three sites": (f"tdtm{{{PUBLISHED}}}", STEPS),
    "tdtm three sites, compact": (f"tdtm{{{PUBLISHED} positions=compact}}", STEPS),
    "tdtm three sites, first half": (f"tdtm{{{PUBLISHED} steps=15}}", STEPS),
    "tdtm three sites, first half, compact": (
        f"tdtm{{{PUBLISHED} steps=15 positions=compact}}",
        STEPS,
    ),
    "tdtm,lpl (the defaults)": ("tdtm,lpl", STEPS),
    "tdtm, lpl at 14": ("tdtm,lpl{at=14}", STEPS),
    "tdtm first 7 steps, lpl at 14": ("tdtm{steps=7},lpl{at=14}", STEPS),
    "tdtm, lpl at 9": ("tdtm,lpl{at=9}", STEPS),
    "tdtm three sites, lpl": (f"tdtm{{{PUBLISHED}}},lpl", STEPS),
    "tdtm, plain 15 steps": ("tdtm", 15),
    "tdtm, plain 12 steps": ("tdtm", 12),
    "tdtm three sites, plain 12 steps": (f"tdtm{{{PUBLISHED}}}", 12),
}
BUNDLES: dict[str, Row] = {"no passes": ("", STEPS), "tdtm,lpl": ("tdtm,lpl", STEPS)}


@dataclass
class Scores:
    """What was measured of one row, a value for each film."""

    calls: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    right: list[Mapping[str, bool]] = field(default_factory=list)
    motion: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)

    def adherence(self, what: str = "all") -> float:
        """% of films right in `what`: colour, shape, direction or all."""
        return 100 * statistics.fmean(right[what] for right in self.right)


@functools.cache
def _captured(steps: int) -> Program:
    return odsora.capture(MODEL, {"steps": steps})


class Maker:
    """Makes films with one row's program, in PyTorch or from its bundle."""

    def __init__(self, row: Row, folder: Path | None = None) -> None:
        passes, steps = row
        program = _captured(steps)
        if passes:
            program = odsora.run_passes(program, passes, verify="structure")
        assert program.text_to_video is not None
        self.program: Program = program
        self.flops = {
            name: function_flops(function)
            for name, function in program.component(DENOISER).functions.items()
        }
        self._run: Callable[..., Mapping[str, torch.Tensor]] = self._in_pytorch
        self._called: list[str] = []
        if folder is not None:
            bundle = odsora.lower(program, folder, verify="structure")
            self._runner = odsora.load(bundle)
            self._run = self._from_bundle

    def film(self, prompt: str, seed: int, scores: Scores) -> torch.Tensor:
        """[frames, 3, H, W] in 0..1; adds calls, FLOP and seconds to `scores`."""
        program, roles = self.program, self.program.text_to_video
        assert roles is not None
        inputs, _ = host_inputs(roles, program.inputs, program.examples, prompt, seed)
        self._called = []
        start = time.perf_counter()
        video = self._run(inputs, seed)[roles.video]
        scores.seconds.append(time.perf_counter() - start)
        scores.calls.append(len(self._called))
        scores.flops.append(sum(self.flops[name] for name in self._called))
        return (video[0].transpose(0, 1) / 2 + 0.5).clamp(0, 1)

    def _in_pytorch(self, inputs: Any, seed: int) -> Mapping[str, torch.Tensor]:
        def on_call(component: str, function: str, *_: Any) -> None:
            if component == DENOISER:
                self._called.append(function)

        return evaluate_program(self.program, inputs, on_call, seed)

    def _from_bundle(self, inputs: Any, seed: int) -> Mapping[str, torch.Tensor]:
        def on_chunk(done: Any) -> None:
            if done.component == DENOISER and done.chunk == done.chunks:
                self._called.append(done.function)

        self._runner.progress = on_chunk
        return self._runner.run(inputs, seed=seed)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--films", type=int, default=48, help="films a row of `rows`")
    parser.add_argument("--bundle-films", type=int, default=96, help="films a row of `bundles`")
    parser.add_argument("--seed", type=int, default=1000, help="of the first film")
    parser.add_argument("--table", choices=["rows", "bundles", "both"], default="both")
    parser.add_argument(
        "--only", nargs="+", default=[], help="rows whose names hold one of these, and the first"
    )
    parser.add_argument("--plot", type=Path, help="write the Pareto plot of `rows` there (PNG)")
    parser.add_argument("--draw", type=Path, help="only plot a table that was printed before")
    chosen = parser.parse_args()
    if chosen.draw:
        plot(chosen.draw.read_text(), chosen.plot or parser.error("--draw needs --plot"))
        return
    if chosen.table != "bundles":
        first = next(iter(ROWS))
        chosen_rows = [
            name
            for name in ROWS
            if name == first or not chosen.only or any(text in name for text in chosen.only)
        ]
        makers = {name: Maker(ROWS[name]) for name in chosen_rows}
        scores = measure(makers, chosen.films, chosen.seed)
        print(f"{chosen.films} films a row, PyTorch, fp32, {torch.get_num_threads()} threads\n")
        table = table_text(scores)
        print(table)
        if chosen.plot:
            plot(table, chosen.plot)
            print(f"\nwrote {chosen.plot}")
    if chosen.table != "rows":
        with tempfile.TemporaryDirectory() as folder:
            makers = {
                name: Maker(row, Path(folder) / f"{index}.odsora")
                for index, (name, row) in enumerate(BUNDLES.items())
            }
            scores = measure(makers, chosen.bundle_films, chosen.seed)
        print(f"\n{chosen.bundle_films} films a row, compiled bundles, fp16, interpreter\n")
        print(table_text(scores))
        plain, ours = scores.values()
        faster = statistics.median(plain.seconds) / statistics.median(ours.seconds)
        print(
            f"\n{faster:.2f} times faster a film (medians), "
            f"adherence {ours.adherence() - plain.adherence():+.1f} points"
        )


def measure(makers: Mapping[str, Maker], films: int, seed: int) -> dict[str, Scores]:
    """Scores of every maker on the same prompts and seeds; the first one's films are the reference.

    Each makes one film first that does not count.
    """
    scores = {name: Scores() for name in makers}
    for maker in makers.values():
        maker.film(clips.PROMPTS[0], seed, Scores())
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("films", total=films * len(makers))
        for number in range(films):
            # 7 has no factor in common with 48: neighbours differ in all they show.
            subject = clips.SUBJECTS[7 * number % len(clips.SUBJECTS)]
            reference: torch.Tensor | None = None
            for name, maker in makers.items():
                film = maker.film(subject.prompt, seed + number, scores[name])
                reference = film if reference is None else reference
                _score(scores[name], film, reference, subject)
                progress.advance(task)
    return scores


def _score(
    scores: Scores, film: torch.Tensor, reference: torch.Tensor, subject: clips.Subject
) -> None:
    scores.right.append(reading.read(film).agrees(subject))
    scores.motion.append(reading.motion_energy(film))
    if film is not reference:
        scores.psnr.append(reading.psnr(film, reference))
        scores.ssim.append(reading.ssim(film, reference))


def table_text(scores: Mapping[str, Scores]) -> str:
    """A Markdown table, one row a maker."""
    full = statistics.median(next(iter(scores.values())).seconds)
    lines = [
        "| | calls | GFLOP | time, s | of full | adherence, % | colour | shape | direction "
        "| motion | PSNR, dB | SSIM |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in scores.items():
        seconds = statistics.median(row.seconds)
        cells = [
            f"{statistics.fmean(row.calls):.1f}",
            f"{statistics.fmean(row.flops) / 1e9:.1f}",
            f"{seconds:.2f}",
            f"{seconds / full:.2f}",
            *(f"{row.adherence(what):.1f}" for what in ("all", "colour", "shape", "direction")),
            f"{statistics.fmean(row.motion):.2f}",
            _with_error(row.psnr, ".1f"),
            _with_error(row.ssim, ".3f"),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_error(values: Sequence[float], form: str) -> str:
    """Mean and its standard error."""
    if len(values) < 2:
        return "" if not values else f"{values[0]:{form}}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):{form}} ± {error:{form}}"


def plot(table: str, path: Path) -> None:
    """Quality over the denoiser's FLOP, of a printed table: likeness to the full sampler's film,
    with the line that no row is above, and adherence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = dict(_points(table))
    full, complete = rows.pop(next(iter(ROWS)))[::2]
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 7.5), width_ratios=(3, 2))
    families = {
        "plain, fewer steps": "plain",
        "lpl at a step": "lpl at",
        "lpl adaptive": "lpl adaptive",
        "tdtm": "tdtm",
    }
    for label, start in families.items():
        both = [name for name in rows if name.startswith(start)]
        # Rows of both passes are a family of their own.
        for marker, names, text in (
            ("o", [name for name in both if not _combined(name)], label),
            ("s", [name for name in both if _combined(name)], f"{label} and fewer steps"),
        ):
            if names:
                cost = [rows[name][0] / full for name in names]
                axes[0].scatter(cost, [rows[name][1] for name in names], marker=marker, label=text)
                axes[1].scatter(cost, [rows[name][2] for name in names], marker=marker)
    best, front = 0.0, []
    for cost, likeness, _ in sorted(rows.values(), key=lambda row: (row[0], -row[1])):
        if likeness > best:
            best = likeness
            front.append((cost / full, likeness))
    axes[0].plot(*zip(*front, strict=True), linewidth=0.8, linestyle=":", color="gray", zorder=0)
    axes[0].set_xlim(0.05, 1.15)
    axes[0].set_ylabel("PSNR against the full sampler, dB")
    axes[0].legend(fontsize=9)
    axes[1].axhline(complete, linewidth=0.8, linestyle=":")
    axes[1].set_ylabel("prompt adherence, %")
    for each in axes:
        each.set_xlabel("FLOP of the denoiser, of the full sampler's")
        each.grid(alpha=0.3)
    figure.tight_layout()
    _annotate(axes[0], {name: (row[0] / full, row[1]) for name, row in rows.items()})
    figure.savefig(path, dpi=100)


def _points(table: str) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Row → GFLOP, PSNR in dB (0 where there is none), adherence in %."""
    for line in table.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name in ROWS:
            likeness = float(cells[9].split(" ")[0] or 0)
            yield name, (float(cells[1]), likeness, float(cells[4]))


def _annotate(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """A label for each point, where it is in the way of none before it."""
    places = [(x, y, side) for y in (-3, 6, -12, 15, -21, 24, -30) for x, side in _SIDES]
    taken: list[Any] = []
    for name, point in points.items():
        for x, y, side in places:
            label = axes.annotate(
                name, point, (x, y), textcoords="offset points", fontsize=7, ha=side
            )
            box = label.get_window_extent(axes.figure.canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


_SIDES = ((6, "left"), (-6, "right"))


def _combined(name: str) -> bool:
    return name.startswith("tdtm") and ("lpl" in name or "plain" in name)


if __name__ == "__main__":
    main()
