"""Memory that operators borrow for the length of a call, and fresh memory that costs few page faults.

A fresh tensor of 32 MiB or more is mapped, zeroed and faulted in by the kernel each time: 0.8 ms per MiB, ten times
what it takes to write it.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_MOST_KEPT = 4
"""Buffers: one for each thread that usually runs an operator at a time."""
_MOST_KEPT_BYTES = 128 * 2**20
"""Of all buffers. What is more is given back to the allocator."""
_ALIGNMENT = 64
_HUGE_PAGE = 2 * 2**20
_SMALLEST_HUGE = 32 * 2**20
"""What is smaller, glibc takes from memory that was faulted in before, once it has seen such sizes."""
_MADV_HUGEPAGE = 14

_free: list[Tensor] = []
"""Whole buffers of bytes. Each goes to one borrower only (append and pop of a list are atomic), of any thread."""


@contextmanager
def borrowed(what: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> Iterator[list[Tensor]]:
    """Tensors on the CPU of these shapes and dtypes, of undefined content, in one buffer that the next borrower gets.

    Nothing that outlives the block may be a view of them. Nested and concurrent borrowers get buffers of their own.
    """
    sizes = [-(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in what]
    buffer = _take(sum(sizes))
    try:
        parts = torch.split_with_sizes(buffer[: sum(sizes)], sizes)
        yield [
            part[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for part, (shape, dtype) in zip(parts, what, strict=True)
        ]
    finally:
        if len(_free) < _MOST_KEPT and kept_bytes() + buffer.numel() <= _MOST_KEPT_BYTES:
            _free.append(buffer)


def kept_bytes() -> int:
    """What is kept for the next borrower, at most 128 MiB; part of any statement of peak memory."""
    return sum(buffer.numel() for buffer in list(_free))


def release() -> None:
    """Give what is kept back to the allocator."""
    _free.clear()


def fresh(*shape: int, dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU; where it is large and the system allows it, on huge pages.

    Filling 64 MiB took 8.5 ms on huge pages, 52 ms without, and 4.5 ms where memory was faulted in before.
    """
    tensor = torch.empty(shape, dtype=dtype)
    size = tensor.numel() * dtype.itemsize
    if size >= _SMALLEST_HUGE and (madvise := _madvise()) is not None:
        first = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        # Advice: where it is not taken, as on a system without huge pages, nothing changes.
        madvise(first, (tensor.data_ptr() + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    return tensor


def _take(size: int) -> Tensor:
    try:
        buffer = _free.pop()
    except IndexError:
        buffer = None
    if buffer is not None and buffer.numel() >= size:
        return buffer
    del buffer  # before a larger one takes its place
    # What inference mode makes could not be written to outside of it.
    with torch.inference_mode(False):
        return fresh(size, dtype=torch.uint8)


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
