"""Weight stores: safetensors files and folders, laziness, damage, look-up tables, layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from odsora_compiler.errors import WeightsError
from odsora_compiler.ir.weights import (
    CastWeights,
    EncodedWeights,
    FileWeights,
    LayeredWeights,
    LookupTable,
    TensorWeights,
    WeightSpec,
)

A, B = torch.arange(6.0).view(2, 3), torch.tensor([1, -2], dtype=torch.int64)


def shards(folder: Path, index: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B}, folder / "model-00002-of-00002.safetensors")
    if index:
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        text = json.dumps({"metadata": {}, "weight_map": names})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def one_file(folder: Path) -> Path:
    save_file({"a": A, "b": B}, folder / "w.safetensors")
    return folder / "w.safetensors"


@pytest.mark.parametrize(
    "make",
    [one_file, lambda p: shards(p / "s"), lambda p: shards(p / "s", index=False)],
    ids=["one file", "index", "folder"],
)
def test_every_layout_reads_the_same(tmp_path: Path, make: object) -> None:
    store = FileWeights(make(tmp_path))  # type: ignore[operator]
    assert sorted(store.names()) == ["a", "b"]
    assert store.spec("a") == WeightSpec((2, 3), torch.float32)
    assert (store.spec("b").elements, store.spec("b").bytes) == (2, 16)
    assert torch.equal(store.load("a"), A)
    assert torch.equal(store.load("b"), B)
    assert store.encoding("a") is None


def test_an_index_leaves_other_files_of_the_folder_out(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s")
    save_file({"a": A, "old": A + 1}, folder / "backup.safetensors")
    assert sorted(FileWeights(folder).names()) == ["a", "b"]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool],
)
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.tensor([0.0, 1.0]).to(dtype)}, tmp_path / "w.safetensors")
    store = FileWeights(tmp_path / "w.safetensors")
    assert store.spec("w").dtype == dtype
    assert store.load("w").float().tolist() == [0.0, 1.0]


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    save_file({"block.weight": A}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"Did you mean 'block\.weight'"):
        FileWeights(tmp_path / "w.safetensors").load("blok.weight")


# ------------------------------------------------------------------ laziness


def sparse(path: Path, count: int, small: torch.Tensor) -> Path:
    """A file of `count` weights of 4 GiB of zeros, which take no disk, and a tiny one."""
    size = 4 << 30
    entries = {
        f"large.{i}": {
            "dtype": "F32",
            "shape": [size // 4],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(count)
    }
    end = count * size
    entries["small"] = {"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]}
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(8 + len(header) + end)
        file.write(small.numpy().tobytes())
    return path


def test_a_file_larger_than_memory_is_read_weight_by_weight(tmp_path: Path) -> None:
    path = sparse(tmp_path / "w.safetensors", 64, torch.tensor([3.0, 4.0]))
    script = f"""
import resource
from odsora_compiler.ir.weights import FileWeights
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
store = FileWeights({str(path)!r})
assert sum(store.spec(name).bytes for name in store.names()) == (256 << 30) + 8
assert store.load("small").tolist() == [3.0, 4.0]
for index in range(64):
    assert store.load(f"large.{{index}}")[1 << 29].item() == 0.0  # touches one page of it
print((peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50, f"{done.stdout} MB for a few numbers of a file of 256 GiB"


def test_large_weights_are_mapped_wherever_they_lie(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "large": torch.randn(513, 1031, generator=torch.Generator().manual_seed(0)),
        "half": torch.randn(1100, 1001, generator=torch.Generator().manual_seed(1)).half(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    store = FileWeights(tmp_path / "w.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(store.load(name), tensor)
        assert store.load(name).shape == tensor.shape


def test_unaligned_weights_are_read(tmp_path: Path) -> None:
    large = torch.arange(300_000, dtype=torch.float32)
    entries = {
        "one": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "large": {"dtype": "F32", "shape": [300_000], "data_offsets": [1, 1_200_001]},
    }
    header = json.dumps(entries).encode()
    data = b"\x07" + large.numpy().tobytes()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    store = FileWeights(path)
    assert torch.equal(store.load("large"), large)
    assert store.load("one").tolist() == [7]


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0]},
        3,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        FileWeights(path)


def test_writing_to_a_loaded_weight_does_not_reach_the_file(tmp_path: Path) -> None:
    path = one_file(tmp_path)
    FileWeights(path).load("a").fill_(9.0)
    assert torch.equal(FileWeights(path).load("a"), A)


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("kept", [0, 4, 20, -1], ids=["empty", "no length", "no header", "no end"])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = one_file(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"w\.safetensors: not a complete safetensors file") as c:
        FileWeights(path)
    assert "truncated" in c.value.hint


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        FileWeights(tmp_path / "w.safetensors")


def test_a_type_pytorch_lacks_is_named(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(WeightsError, match="weight 'w' is of type F8_E8M0"):
        FileWeights(path)


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt"])
def test_pickled_weights_are_refused_with_the_way_to_convert(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"model.{ending}"
    path.write_bytes(b"\x80\x02")
    with pytest.raises(WeightsError, match="would run code stored in it") as caught:
        FileWeights(path)
    assert "save_file" in caught.value.hint


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
            "shards missing: model-00002",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not a safetensors index"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("[]"),
            "not a safetensors index",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'),
            "names no files",
        ),
        (
            lambda f: (f / "other.safetensors.index.json").write_text("{}"),
            "several indexes: model.safetensors.index.json, other",
        ),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, spoil: object, message: str) -> None:
    folder = shards(tmp_path / "s")
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(WeightsError, match=message):
        FileWeights(folder)


def test_a_weight_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s", index=False)
    save_file({"a": A}, folder / "model.fp16.safetensors")
    with pytest.raises(WeightsError, match="weight 'a' is also in model-00001"):
        FileWeights(folder)


def test_paths_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no \.safetensors file"):
        FileWeights(tmp_path)
    with pytest.raises(WeightsError, match="no such file or folder"):
        FileWeights(tmp_path / "none")


def test_a_file_that_changes_in_use_is_refused(tmp_path: Path) -> None:
    path = one_file(tmp_path)
    store = FileWeights(path)
    save_file({"a": A + 1, "b": B, "c": A}, path)
    with pytest.raises(WeightsError, match="changed while it was in use"):
        store.load("a")
    path.unlink()
    with pytest.raises(WeightsError, match="weight 'a' cannot be read any more"):
        store.load("a")


# ------------------------------------------------------------------ layers, casts and tables


def test_the_first_layer_that_has_a_name_gives_it() -> None:
    store = LayeredWeights(TensorWeights({"a": A}), TensorWeights({"a": B, "b": B}))
    assert list(store.names()) == ["a", "b"]
    assert torch.equal(store.load("a"), A)
    with pytest.raises(WeightsError, match="there is no weight 'c'"):
        store.spec("c")


def test_any_of_several_tied_names_may_be_stored() -> None:
    names = ["first", "second", "third"]
    specs = dict.fromkeys(names, WeightSpec.of(A))
    for stored in names:
        store = CastWeights(TensorWeights({stored: A.half()}), specs, dict.fromkeys(names, names))
        for name in names:
            assert torch.equal(store.load(name), A)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_table_decodes_group_by_group(axis: int) -> None:
    indices = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0]], dtype=torch.uint8)
    table = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    if axis == 0:
        expected = [[1.0, 2.0], [2.0, 1.0], [20.0, 20.0], [10.0, 10.0]]
    else:
        expected = [[1.0, 20.0], [2.0, 10.0], [2.0, 20.0], [1.0, 10.0]]
    assert LookupTable(1, indices, table, axis).decode().tolist() == expected


def test_encoded_weights_load_what_their_table_gives() -> None:
    table = LookupTable(1, torch.tensor([[0, 1, 1], [0, 0, 0]], dtype=torch.uint8), A[:1, :2])
    store = EncodedWeights(TensorWeights({"a": A.half(), "b": B}), {"a": table})
    assert store.load("a").tolist() == [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    assert store.load("a").dtype == torch.float16
    assert store.encoding("a") is table
    assert store.encoding("b") is None
    assert torch.equal(store.load("b"), B)
    twice = EncodedWeights(store, {})
    assert twice.encoding("a") is table


# ------------------------------------------------------------------ writing


def test_a_weight_that_was_written_to_is_refused() -> None:
    mine = {"a": A.clone(), "b": B.clone()}
    store = LayeredWeights(TensorWeights(mine))
    assert torch.equal(store.load("a"), A)

    store.load("a").mul_(2)
    with pytest.raises(WeightsError, match="weight 'a' was written to in place"):
        store.load("a")
    assert torch.equal(store.load("b"), B)


def test_weights_made_in_inference_mode_are_weights() -> None:
    with torch.inference_mode():
        store = TensorWeights({"a": A * 1})
    assert torch.equal(store.load("a"), A)
