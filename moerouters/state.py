"""Balancer state: float32 buffers that survive `.half()` and `.to(bfloat16)`.

A bias kept in bfloat16 has 8 bits of mantissa: updates of 0.001 vanish, and hundreds of biases collapse onto a handful
of values. So dtype casts of the model leave state alone; moving it to another device works as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class StatefulModule(nn.Module):
    """A module whose `register_state` buffers stay float32 (or int64) whatever the model is cast to."""

    def __init__(self) -> None:
        super().__init__()
        self._state_fills: dict[str, float] = {}

    def register_state(self, name: str, *shape: int, fill: float = 0.0) -> None:
        """Add a persistent float32 buffer of `shape`, filled with `fill` now and at every `reset_state`."""
        self.register_buffer(name, torch.full(shape, fill, dtype=torch.float32))
        self._state_fills[name] = fill

    def reset_state(self) -> None:
        """Put every state buffer back to its initial value, in place; call it after meta-device initialisation."""
        with torch.no_grad():
            for name, fill in self._state_fills.items():
                self.get_buffer(name).fill_(fill)

    def state_names(self) -> tuple[str, ...]:
        """Names of the state buffers registered on this module (not on children)."""
        return tuple(self._state_fills)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # With assign=True the loaded tensor *becomes* the buffer, in whatever dtype the checkpoint was cast to.
        for name in self._state_fills:
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor):
                state_dict[prefix + name] = loaded.to(self.get_buffer(name).dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in self._state_fills}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            moved = self._buffers[name]
            assert kept is not None and moved is not None
            if moved.dtype != kept.dtype:
                # The original values, not the cast ones: a trip through bf16 would already have rounded them.
                self._buffers[name] = (
                    torch.empty_like(moved, dtype=kept.dtype) if kept.is_meta else kept.to(moved.device)
                )
        return self
