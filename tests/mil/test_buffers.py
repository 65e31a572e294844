"""Buffers: which stay mapped, which are used again, and that the others are gone."""

from __future__ import annotations

import mmap
import random
import sys
import threading
from pathlib import Path

import pytest
import torch

from odsora_compiler.mil.memory import Buffer, Buffers, converted

SIZE = 3 << 20


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def test_tensors_lie_in_the_buffer() -> None:
    buffer = Buffer(256)
    buffer.tensor(64, torch.int32, (2, 3)).copy_(torch.arange(6).view(2, 3))
    assert buffer.tensor(68, torch.int32, (2,)).tolist() == [1, 2]
    assert buffer.tensor(0, torch.int32, (16,)).tolist() == [0] * 16
    assert buffer.tensor(256, torch.float16, (0, 3)).shape == (0, 3)
    assert Buffer(0).tensor(0, torch.float32, (4, 0)).shape == (4, 0)


def test_only_what_is_kept_is_used_again_in_its_exact_size() -> None:
    buffers = Buffers()
    buffers.keep([SIZE])
    first = buffers.take(SIZE)
    first.tensor(0, torch.uint8, (SIZE,)).fill_(7)
    buffers.give_back(first)
    other = buffers.take(SIZE + 4096)
    assert buffers.mapped_bytes == 2 * SIZE + 4096
    again = buffers.take(SIZE)
    assert again is first
    buffers.keep([])
    buffers.give_back(again)
    buffers.give_back(other)
    del first, again, other
    assert buffers.mapped_bytes == 0
    assert buffers.take(SIZE).tensor(0, torch.uint8, (SIZE,)).count_nonzero() == 0


def test_as_many_stay_as_their_size_is_kept_for() -> None:
    buffers = Buffers()
    for buffer in [buffers.take(SIZE) for _ in range(4)]:
        buffers.give_back(buffer)
    del buffer
    assert buffers.mapped_bytes == 0
    taken = [buffers.take(SIZE) for _ in range(4)]
    buffers.keep([SIZE, 2 * SIZE, SIZE, SIZE])
    while taken:
        buffers.give_back(taken.pop())
    assert buffers.mapped_bytes == 3 * SIZE
    buffers.keep([SIZE, SIZE])
    assert buffers.mapped_bytes == 2 * SIZE
    buffers.clear()
    assert buffers.mapped_bytes == 0


def test_memory_that_a_tensor_still_uses_is_counted_and_stays_valid() -> None:
    buffers = Buffers()
    buffer = buffers.take(SIZE)
    tensor = buffer.tensor(4096, torch.float32, (5,)).fill_(3.0)
    buffers.give_back(buffer)
    del buffer
    assert buffers.mapped_bytes == SIZE
    assert tensor.tolist() == [3.0] * 5
    del tensor
    assert buffers.mapped_bytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_given_back_memory_leaves_the_process() -> None:
    size = 96 << 20
    buffers = Buffers()
    before = anonymous_bytes()
    buffer = buffers.take(size)
    assert anonymous_bytes() - before < size // 8
    buffer.tensor(0, torch.uint8, (size,)).fill_(1)
    assert anonymous_bytes() - before > size * 7 // 8
    buffers.give_back(buffer)
    del buffer
    assert anonymous_bytes() - before < size // 8


def test_threads_never_share_a_buffer() -> None:
    seed = 0
    print(f"seed {seed}")
    buffers = Buffers()
    sizes = [4096, 8192]
    errors: list[str] = []

    def work(number: int) -> None:
        chance = random.Random(seed + number)
        for turn in range(300):
            buffer = buffers.take(chance.choice(sizes))
            buffers.keep(sizes[: chance.randrange(3)])
            tensor = buffer.tensor(0, torch.int32, (buffer.size // 4,)).fill_(number * 1000 + turn)
            if not (tensor == number * 1000 + turn).all():
                errors.append(f"thread {number}, turn {turn}")
            del tensor
            buffers.give_back(buffer)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    buffers.clear()
    assert not errors
    assert buffers.mapped_bytes == 0


@pytest.mark.parametrize("elements", [10, 1 << 20])
def test_converted_copies(elements: int) -> None:
    tensor = torch.arange(elements).remainder(1000).half().view(2, -1)
    wide = converted(tensor, torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, tensor.float())


def test_buffers_start_on_a_page() -> None:
    assert Buffer(100).tensor(0, torch.uint8, (100,)).data_ptr() % mmap.PAGESIZE == 0
