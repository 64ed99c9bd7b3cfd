"""Deterministic mode: the same inputs give the same bits, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_memory: Any = torch.utils.deterministic  # its one attribute is a property that type checkers do not see


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms only, for as long as the block lasts; the process's own choice is restored after."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling every fresh tensor with NaN finds bugs and changes no result; it would be measured as step time.
    _memory.fill_uninitialized_memory = False
    try:
        # Of the attention kernels these two have a deterministic backward on every device.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _memory.fill_uninitialized_memory = fill
