"""What attention keeps of earlier tokens, so that decoding computes one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys (with their rotation) and values of one attention layer, each head once. Room is made at the first use."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """Tokens of a sequence that it can hold."""
        self.length = 0
        """Those that it holds."""
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def extended(self, key_BHSd: Tensor, value_BHSd: Tensor) -> tuple[Tensor, Tensor]:
        """Add S tokens; returns keys and values of all, views of the cache. No gradient goes through them."""
        if self._key is None or self._value is None:
            shape = (*key_BHSd.shape[:2], self.capacity, key_BHSd.shape[3])
            self._key, self._value = key_BHSd.new_empty(shape), value_BHSd.new_empty(shape)
        added = slice(self.length, self.length + key_BHSd.shape[2])
        self._key[:, :, added], self._value[:, :, added] = key_BHSd, value_BHSd
        self.length = added.stop
        return self._key[:, :, : self.length], self._value[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Of the room that was made."""
        return sum(0 if room is None else room.nbytes for room in (self._key, self._value))

    def visible(self, count: int, device: torch.device) -> Tensor | None:
        """bool [count, length + count]: what `count` further tokens may look at; None where that is the usual triangle
        (of an empty cache), or everything (of one token)."""
        if self.length == 0 or count == 1:
            return None
        return torch.ones(count, self.length + count, dtype=torch.bool, device=device).tril(self.length)
