"""Loading functions: equal to reading when used, exact in memory, and complete or not at all."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import types
from coremltools.proto import Model_pb2
from mil_programs import OPSET, mb, save
from test_buffers import anonymous_bytes
from test_compression import METHODS, dense

from odsora_compiler.errors import PackageError
from odsora_compiler.mil.blobs import BlobFile, BlobType, BlobWriter
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.loading import Blocks, Loading
from odsora_compiler.mil.memory import Buffers
from odsora_compiler.mil.package import Package

__all__ = ["dense"]  # a fixture

COLUMNS = 96


def never() -> bool:
    return False


def reader(step: int) -> Blocks:
    """Gives a file in blocks of `step` bytes, in one buffer that is overwritten every time."""

    def blocks(path: Path) -> Iterator[tuple[int, memoryview]]:
        data = path.read_bytes()
        buffer = bytearray(step)
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            buffer[: len(piece)] = piece
            yield start, memoryview(buffer)[: len(piece)]
            buffer[:] = b"\xff" * step

    return blocks


def loading_of(package: Package, *interpreters: Interpreter) -> Loading:
    loading = Loading(package, [each for one in interpreters for each in one.requests])
    package.unmap()
    return loading


def pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def random_half(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def half(*shape: int) -> Any:
    return mb.TensorSpec(shape=shape, dtype=types.fp16)


TABLE, SQUARE, SHIFT = (
    random_half(*shape) for shape in ((64, COLUMNS), (COLUMNS, COLUMNS), (1, COLUMNS))
)
SMALL_INTS = np.arange(-8, 8).repeat(3)
X = {
    "x": torch.linspace(-1, 1, 4 * COLUMNS).view(4, COLUMNS).half(),
    "ids": torch.tensor([3, 0, 63, 5], dtype=torch.int32),
}


def program(x: Any, ids: Any) -> Any:
    """Reads the table in both types, the matrix in fp32, the vector and the indices as stored."""
    table = mb.const(val=TABLE)
    found = mb.gather(x=table, indices=ids, axis=0)
    mixed = mb.linear(x=mb.add(x=found, y=x), weight=mb.const(val=SQUARE))
    scored = mb.linear(x=mixed, weight=table)
    ints = mb.cast(x=mb.const(val=SMALL_INTS.astype(np.int8)), dtype="int32", name="ints")
    shifted = mb.add(x=mixed, y=mb.const(val=SHIFT), name="shifted")
    return shifted, mb.mul(x=scored, y=np.float16(0.5), name="scored"), ints


def double(x: Any, ids: Any) -> Any:
    """Another function with the same weights, as small a part of them as the matrix."""
    taken = mb.gather(x=x, indices=mb.mod(x=ids, y=np.int32(4)), axis=0)
    return mb.linear(x=taken, weight=mb.const(val=SQUARE), name="out")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the functions `main` and `double`."""
    folder = tmp_path_factory.mktemp("loading")
    specs = [half(4, COLUMNS), mb.TensorSpec(shape=(4,), dtype=types.int32)]
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, body in (("main", program), ("double", double)):
        made = mb.program(input_specs=specs, opset_version=OPSET)(body)
        save(made, folder / f"{name}.mlpackage", pass_pipeline=ct.PassPipeline.EMPTY)
        descriptor.add_function(str(folder / f"{name}.mlpackage"), "main", name)
    descriptor.default_function_name = "main"
    ct.utils.save_multifunction(descriptor, str(folder / "both.mlpackage"))
    return folder / "both.mlpackage"


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy.mlpackage"))


def weights_file(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/weights/weight.bin"


@pytest.mark.parametrize("compute", ["storage", "fp32"])
@pytest.mark.parametrize("step", [64, 192, 1 << 20])
def test_a_loaded_function_computes_what_one_that_reads_does(
    path: Path, compute: Any, step: int
) -> None:
    expected = Interpreter(Package.open(path), "main", compute).run(X)
    package = Package.open(path)
    interpreter = Interpreter(package, "main", compute)
    loading = loading_of(package, interpreter)
    buffers = Buffers()
    assert loading.load(reader(step), buffers, never)
    found = interpreter.run(X)
    assert expected.keys() == found.keys() == {"shifted", "scored", "ints"}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found["ints"].tolist() == SMALL_INTS.tolist()
    # Whoever is not loaded reads again.
    loading.release()
    assert buffers.mapped_bytes == 0
    assert torch.equal(interpreter.run(X)["scored"], expected["scored"])


def test_memory_is_as_told_and_shared_by_functions(path: Path) -> None:
    package = Package.open(path)
    main, other = Interpreter(package, "main"), Interpreter(package, "double")
    table, square, shift = (2 * array.size for array in (TABLE, SQUARE, SHIFT))
    # Linear operations have a bias, here of zeros, in fp32.
    of_other = 2 * square + 4 * COLUMNS
    of_main = of_other + 3 * table + 4 * len(TABLE) + shift + 64
    assert loading_of(package, main).resident_bytes == pages(of_main)
    assert loading_of(package, other).resident_bytes == pages(of_other)
    both = loading_of(package, main, other)
    assert both.resident_bytes == pages(of_main)
    buffers = Buffers()
    assert both.load(reader(1 << 20), buffers, never)
    assert buffers.mapped_bytes == both.resident_bytes
    assert {tensor.data_ptr() for tensor in square_weights(main)} == {
        tensor.data_ptr() for tensor in square_weights(other)
    }


def square_weights(interpreter: Interpreter) -> list[torch.Tensor]:
    return [
        constant.tensor(kind)
        for constant, kind in interpreter.requests
        if constant.shape == SQUARE.shape
    ]


def test_running_what_is_loaded_needs_no_file(copy: Path) -> None:
    package = Package.open(copy)
    interpreter = Interpreter(package, "main")
    loading = loading_of(package, interpreter)
    expected = interpreter.run(X)
    interpreter.release()
    package.unmap()
    loading.load(reader(1 << 20), Buffers(), never)
    weights_file(copy).unlink()
    if sys.platform == "linux":
        assert str(copy) not in Path("/proc/self/maps").read_text()
    found = interpreter.run(X)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if sys.platform == "linux":
        assert str(copy) not in Path("/proc/self/maps").read_text()


def test_a_load_reads_its_file_once(path: Path) -> None:
    package = Package.open(path)
    loading = loading_of(package, Interpreter(package, "main"), Interpreter(package, "double"))
    read: list[Path] = []

    def blocks(file: Path) -> Iterator[tuple[int, memoryview]]:
        read.append(file)
        return reader(1 << 20)(file)

    loading.load(blocks, Buffers(), never)
    assert read == [weights_file(path).resolve()]


def test_outputs_are_no_views_of_weights(tmp_path: Path) -> None:
    def constants(x: Any) -> Any:
        weight = mb.const(val=TABLE, name="whole")
        row = mb.reshape(x=mb.slice_by_size(x=weight, begin=[5, 0], size=[1, -1]), shape=[-1])
        return mb.add(x=x, y=x, name="sum"), weight, mb.identity(x=row, name="row")

    made = mb.program(input_specs=[half(3)], opset_version=OPSET)(constants)
    save(made, tmp_path / "a.mlpackage", pass_pipeline=ct.PassPipeline.EMPTY)
    package = Package.open(tmp_path / "a.mlpackage")
    interpreter = Interpreter(package)
    inputs = {"x": torch.ones(3)}
    loading = loading_of(package, interpreter)
    buffers = Buffers()
    for load in (False, True):
        if load:
            loading.load(reader(1 << 20), buffers, never)
        found = interpreter.run(inputs)
        found["row"].fill_(100)
        found["whole"].fill_(100)
        found = interpreter.run(inputs)
        assert torch.equal(found["row"], torch.tensor(TABLE[5]))
        interpreter.release()
        loading.release()
        assert buffers.mapped_bytes == 0
        assert torch.equal(found["whole"], torch.tensor(TABLE))


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_load_that_is_cancelled_or_fails_leaves_nothing(path: Path, after: int) -> None:
    package = Package.open(path)
    interpreter = Interpreter(package, "main")
    expected = interpreter.run(X)["scored"]
    interpreter.release()
    loading = loading_of(package, interpreter)
    buffers = Buffers()
    threads = torch.get_num_threads()
    seen = 0

    def cancelled() -> bool:
        nonlocal seen
        seen += 1
        return seen > after

    assert not loading.load(reader(4096), buffers, cancelled)
    assert seen == after + 1
    assert buffers.mapped_bytes == 0

    def failing(path: Path) -> Iterator[tuple[int, memoryview]]:
        for index, block in enumerate(reader(4096)(path)):
            if index == after:
                raise KeyboardInterrupt
            yield block

    with pytest.raises(KeyboardInterrupt):
        loading.load(failing, buffers, never)
    assert buffers.mapped_bytes == 0
    assert torch.get_num_threads() == threads
    loading.release()
    assert loading.load(reader(4096), buffers, never)
    assert torch.equal(interpreter.run(X)["scored"], expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_error_that_is_kept_keeps_no_memory(tmp_path: Path) -> None:
    def large(x: Any) -> Any:
        return mb.linear(x=x, weight=random_half(2048, 4096), name="out")

    made = mb.program(input_specs=[half(4, 4096)], opset_version=OPSET)(large)
    save(made, tmp_path / "a.mlpackage", pass_pipeline=ct.PassPipeline.EMPTY)
    package = Package.open(tmp_path / "a.mlpackage")
    loading = loading_of(package, Interpreter(package))
    before = anonymous_bytes()
    held: list[int] = []

    def failing(path: Path) -> Iterator[tuple[int, memoryview]]:
        yield from reader(1 << 20)(path)
        held.append(anonymous_bytes() - before)
        raise PackageError("too late")

    with pytest.raises(PackageError, match="too late") as caught:
        loading.load(failing, Buffers(), never)
    assert caught.tb
    assert held[0] > 32 << 20
    # The reader above has the file in its frame.
    assert anonymous_bytes() - before < held[0] - (30 << 20)


@pytest.mark.parametrize("change", [-64, 64])
def test_a_file_of_another_size_is_refused(copy: Path, change: int) -> None:
    package = Package.open(copy)
    loading = loading_of(package, Interpreter(package, "main"))
    file = weights_file(copy)
    size = file.stat().st_size
    os.truncate(file, size + change)
    buffers = Buffers()
    with pytest.raises(
        PackageError, match=rf"weight\.bin has {size + change} bytes, and had {size} when"
    ):
        loading.load(reader(1 << 20), buffers, never)
    assert buffers.mapped_bytes == 0


def refer(package: Path, shape: tuple[int, ...], offset: int, code: int) -> int:
    """Make the weight of a shape that at `offset`, of the type with this code; its old offset."""
    file = package / "Data/com.apple.CoreML/model.mlmodel"
    model = Model_pb2.Model()
    model.ParseFromString(file.read_bytes())
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    values = [op.attributes["val"] for op in block.operations if op.type == "const"]
    (found,) = [
        value
        for value in values
        if value.HasField("blobFileValue")
        and shape == tuple(each.constant.size for each in value.type.tensorType.dimensions)
        and value.type.tensorType.dataType in (10, 21)
    ]
    was, found.blobFileValue.offset = found.blobFileValue.offset, offset
    found.type.tensorType.dataType = code
    file.write_bytes(model.SerializeToString())
    return int(was)


def test_weights_that_overlap_are_refused(copy: Path, tmp_path: Path) -> None:
    start = refer(copy, SQUARE.shape, 64, 10)
    refer(copy, SQUARE.shape, start, 10)
    with BlobWriter(tmp_path / "inner.bin") as writer:
        writer.append(BlobType.FLOAT16, torch.tensor(SHIFT))
    inner = bytearray((tmp_path / "inner.bin").read_bytes()[64:])
    # Its own place, inside of the matrix, stands in its metadata.
    place = start + 128
    inner[16:24] = (place + 64).to_bytes(8, "little")
    data = bytearray(weights_file(copy).read_bytes())
    data[place : place + len(inner)] = inner
    weights_file(copy).write_bytes(data)
    refer(copy, SHIFT.shape, place, 10)
    package = Package.open(copy)
    with pytest.raises(PackageError, match=r"weight\.bin has weights that overlap"):
        loading_of(package, Interpreter(package, "main"))


def test_weights_of_half_a_byte_are_unpacked(copy: Path) -> None:
    file = BlobFile(weights_file(copy))
    with BlobWriter(copy.parent / "new.bin") as writer:
        for entry in file.entries():
            assert writer.append(entry.dtype, file.raw(entry.metadata_offset))
        offset = writer.append(BlobType.INT4, torch.tensor(SMALL_INTS.astype(np.int8)))
    (copy.parent / "new.bin").replace(weights_file(copy))
    refer(copy, SMALL_INTS.shape, offset, 25)
    package = Package.open(copy)
    interpreter = Interpreter(package, "main")
    assert loading_of(package, interpreter).load(reader(64), Buffers(), never)
    weights_file(copy).unlink()
    assert interpreter.run(X)["ints"].tolist() == SMALL_INTS.tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [64, 1 << 20])
def test_compressed_weights_are_spelled_out(
    dense: Any, method: str, step: int, tmp_path: Path
) -> None:
    METHODS[method](dense).save(str(tmp_path / "a.mlpackage"))
    x = {"x": torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))}
    package = Package.open(tmp_path / "a.mlpackage")
    (expected,) = Interpreter(package).run(x).values()
    # Two functions of equal weights, each with operations of its own.
    interpreters = [Interpreter(package), Interpreter(package)]
    loading = loading_of(package, *interpreters)
    buffers = Buffers()
    assert loading.load(reader(step), buffers, never)
    weights_file(tmp_path / "a.mlpackage").unlink()
    for interpreter in interpreters:
        (found,) = interpreter.run(x).values()
        assert torch.equal(found, expected)
    one, two = (
        {held.data_ptr() for held in map_requests(interpreter) if held.numel() > 1000}
        for interpreter in interpreters
    )
    assert one == two
    assert len(one) == 2
    loading.release()
    assert buffers.mapped_bytes == 0


def map_requests(interpreter: Interpreter) -> Iterator[torch.Tensor]:
    return (constant.tensor(kind) for constant, kind in interpreter.requests)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loading_thread_starts_no_threads_of_its_own(tmp_path: Path) -> None:
    def large(x: Any) -> Any:
        return mb.linear(x=x, weight=random_half(1024, COLUMNS), name="out")

    made = mb.program(input_specs=[half(4, COLUMNS)], opset_version=OPSET)(large)
    save(made, tmp_path / "a.mlpackage", pass_pipeline=ct.PassPipeline.EMPTY)
    package = Package.open(tmp_path / "a.mlpackage")
    loading = loading_of(package, Interpreter(package))
    counts: list[int] = []
    new_threads_have: list[int] = []

    def blocks(path: Path) -> Iterator[tuple[int, memoryview]]:
        for block in reader(1 << 20)(path):
            yield block
            # A thread that ended may be listed for a moment; one of a team stays.
            seen = []
            while len(seen) < 50 and (not seen or seen[-1] > before + 1):
                time.sleep(0.02 if seen else 0)
                seen.append(len(os.listdir("/proc/self/task")))
            counts.append(seen[-1])
            in_a_thread(lambda: new_threads_have.append(torch.get_num_threads())).join()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # This thread's own team of threads is there before anything is counted.
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)
        before = len(os.listdir("/proc/self/task"))
        thread = in_a_thread(lambda: loading.load(blocks, Buffers(), never))
        thread.join()
        assert counts == [before + 1]
        # Neither threads that use torch already nor new ones are kept from using all cores.
        assert torch.get_num_threads() == 2
        assert new_threads_have == [2]
    finally:
        torch.set_num_threads(threads)


def in_a_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread
