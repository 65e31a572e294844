"""Memory for weights that are held as long as a chunk is loaded, and given back when it is not."""

from __future__ import annotations

import mmap

import torch

# Below this many bytes a mapping of its own is not worth its pages.
_LARGE = 1 << 20


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in another type whose memory returns to the system as soon as it is let go.

    A large copy gets an anonymous mapping: malloc keeps freed blocks of up to 32 MB for itself,
    which for a chunk's weights would add up to all of them.
    """
    size = tensor.numel() * dtype.itemsize
    if size < _LARGE:
        return tensor.to(dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(tensor.shape).copy_(tensor)
