"""Memory on the CPU that an operator uses for the length of a call and a thread keeps for the next one.

A fresh buffer of some size is mapped, zeroed and faulted in page by page: about 0.5 ms per MiB, ten times what it takes
to write it.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST_KEPT = 32 << 20
"""Bytes per thread. What is larger is allocated anew each time."""

_kept = threading.local()


def scratch(dtype: npt.DTypeLike, *shapes: tuple[int, ...]) -> list[npt.NDArray[Any]]:
    """Arrays of undefined content that the next call on this thread hands out again."""
    kind = np.dtype(dtype)
    sizes = [-(-math.prod(shape) * kind.itemsize // 64) * 64 for shape in shapes]
    buffer: npt.NDArray[np.uint8] | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.size < sum(sizes):
        buffer = np.empty(sum(sizes), np.uint8)
        if buffer.size <= LARGEST_KEPT:
            _kept.buffer = buffer
    arrays, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        arrays.append(buffer[start : start + math.prod(shape) * kind.itemsize].view(kind).reshape(shape))
        start += size
    return arrays
