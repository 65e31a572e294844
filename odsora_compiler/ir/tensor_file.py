"""Reading safetensors files tensor by tensor: a header, and a mapping of just the bytes asked for.

The safetensors library maps the whole file for each read, which systems refuse for files larger
than their memory, and reads the header anew each time. The format: 8 bytes little endian, the
length of a JSON header; name → dtype, shape, and begin and end in the bytes that follow it.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from odsora_compiler.errors import WeightsError

_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_SMALL = 1 << 20  # bytes


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a file: `start` is its first byte in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorPlace]:
    """Name → place of every tensor in `file`.

    Raises `WeightsError` when the file cannot be read, is no safetensors file or not all there.
    """
    try:
        with open(file, "rb") as opened:
            total = opened.seek(0, 2)
            opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            if total < 8 or not 2 <= length <= min(total - 8, _LONGEST_HEADER):
                raise ValueError("it ends before its header does, or has none")
            header = json.loads(opened.read(length))
        places = {
            name: _place(file, name, entry, 8 + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = max((place.start + place.size for place in places.values()), default=8 + length)
        if end > total:
            raise ValueError(f"it ends after {total} bytes of {end}")
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{file}: not a complete safetensors file ({error})",
            "The file may be truncated: copy or download it again.",
        ) from error
    return places


def map_tensor(file: Path, place: TensorPlace) -> torch.Tensor:
    """The tensor at `place`, mapped: its pages are read when touched and go when the tensor goes.

    Small ones are read at once, because every mapping holds a file descriptor. Writing to the
    tensor does not reach the file. Raises `OSError` or `ValueError` when it cannot be had.
    """
    page = place.start - place.start % mmap.ALLOCATIONGRANULARITY
    inside = place.start - page
    with open(file, "rb") as opened:
        if place.size < _SMALL or inside % place.dtype.itemsize:
            # Into memory of PyTorch's own: the last bit of a matrix product depends on how its
            # operands are aligned, which would otherwise be another way in each run.
            flat = torch.empty(place.size, dtype=torch.uint8)
            opened.seek(place.start)
            if opened.readinto(flat.numpy().data) != place.size:
                raise ValueError("the file ends before it")
        else:
            length = inside + place.size
            view = mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_COPY, offset=page)
            flat = torch.frombuffer(view, dtype=torch.uint8, count=place.size, offset=inside)
    return flat.view(place.dtype).view(place.shape)


def _place(file: Path, name: str, entry: dict[str, Any], data: int) -> TensorPlace:
    if entry["dtype"] not in _DTYPES:
        raise WeightsError(
            f"{file}: weight '{name}' is of type {entry['dtype']}, which is not supported",
            f"Store it as one of {', '.join(_DTYPES)}.",
        )
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    place = TensorPlace(shape, _DTYPES[entry["dtype"]], data + begin)
    if begin < 0 or min(shape, default=1) < 0 or end - begin != place.size:
        raise ValueError(f"'{name}' has {end - begin} bytes for {entry['dtype']}{list(shape)}")
    return place


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
