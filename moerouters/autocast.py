"""Leaving autocast for the length of a block."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast on this kind of device; meta tensors know none, and torch.autocast refuses them."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
