"""Which text a step sees: a pure function of (seed, step, micro-batch), the same for every router and after resume."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def training_windows(text: Tensor, *, seed: int, step: int, micro_batch: int, count: int, length: int) -> Tensor:
    """int64 [count, length + 1]: windows of the uint8 text at random places; inputs and targets overlap but for one."""
    key = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
    starts = torch.randint(text.numel() - length, (count,), generator=generator)
    return _windows(text, starts, length)


def validation_windows(text: Tensor, *, count: int, length: int) -> Tensor:
    """int64 [at most count, length + 1]: windows evenly spread over the text, none of which overlap in a target."""
    count = validation_count(text, count=count, length=length)
    stride = (text.numel() - 1) / count
    starts = (torch.arange(count, dtype=torch.float64) * stride).long()
    return _windows(text, starts, length)


def validation_count(text: Tensor, *, count: int, length: int) -> int:
    """How many windows `validation_windows` gives: fewer than asked for where the text is short."""
    return min(count, (text.numel() - 1) // length)


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts.unsqueeze(1) + torch.arange(length + 1)].long()
