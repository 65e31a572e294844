"""A small pipeline of three networks in several chunks, compiled once."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_pipeline import small_program

import odsora_compiler as odsora
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.runner import Runner

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def program() -> odsora.Program:
    """Leaves its sampler early on its examples."""
    return small_program()


@pytest.fixture(scope="session")
def bundle(program: odsora.Program, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("bundle") / "small.odsora"
    return Bundle(odsora.lower(program, out, precision="fp16"))


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the bundle that a test may damage."""
    return Bundle(shutil.copytree(bundle.path, tmp_path / "copy.odsora"))


@pytest.fixture(scope="session")
def expected(program: odsora.Program, bundle: Bundle) -> Tensors:
    """What the bundle makes of its examples with all the memory it wants."""
    return Runner(bundle).run(program.examples)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("odsora")]
    assert not left
