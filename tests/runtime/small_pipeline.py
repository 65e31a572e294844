"""A pipeline small enough for many tests, and storages that go wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import odsora_compiler as odsora
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.storage import Storage

STEPS, LAYERS, WIDTH = 6, 8, 32


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, text: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": torch.tanh(self.out(torch.tanh(self.inner(text))))}


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            z = torch.tanh(layer(z) + y * t[:, None])
        return z


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 48)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.out(z)


def sample(c: Any, text: torch.Tensor, z: torch.Tensor) -> dict[str, torch.Tensor]:
    y = c.encoder(text=text)
    for step in range(STEPS):
        t = torch.full((2,), 1 - step / STEPS)
        z = z + c.denoiser(z=z, t=t, y=y) * (1 / STEPS)
    return {"decoded": c.decoder(z=z)}


PASSES = "lpl{min_steps=1 patience=1 scope=tensor},cidl{budget=4300}"


def small_program(passes: str = PASSES) -> odsora.Program:
    """Encoder of 2 chunks, denoiser of 4 that is called up to `STEPS` times, decoder of one."""
    torch.manual_seed(0)
    z, y, text = torch.randn(2, WIDTH), torch.randn(2, WIDTH), torch.randn(2, 64)
    spec = odsora.PipelineSpec(
        {
            "encoder": odsora.ModelSpec(Encoder(), {"text": text}),
            "denoiser": odsora.ModelSpec(Denoiser(), {"z": z, "t": torch.rand(2), "y": y}),
            "decoder": odsora.ModelSpec(Decoder(), {"z": z}),
        },
        host=sample,
        inputs={"text": text, "z": z},
    )
    return odsora.run_passes(odsora.capture(spec), passes)


def weights_file(bundle: Bundle, package: str) -> Path:
    """The file with the weights of a package, such as `denoiser-02`."""
    component, _, _ = package.rpartition("-")
    (found,) = bundle.package_path(component, package).rglob("weight.bin")
    return found


class WatchedStorage(Storage):
    """Calls `before` with a file's package before it is read; keeps in mind what was read."""

    def __init__(self, before: Callable[[str], object] = lambda package: None) -> None:
        super().__init__()
        self.before = before
        self.read: list[str] = []

    def blocks(self, path: Path) -> Iterator[tuple[int, memoryview]]:
        (package,) = [part for part in path.parts if part.endswith(".mlpackage")]
        self.read.append(package.removesuffix(".mlpackage"))
        self.before(self.read[-1])
        yield from super().blocks(path)


class Gate:
    """Holds back reads of `package` until it is opened."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, package: str) -> None:
        if package == self.package:
            self.reached.set()
            assert self.opened.wait(20)
