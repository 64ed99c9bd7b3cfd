"""How long a step spends in routing, measured from outside: the library itself carries no timers.

Counted is the forward pass from the start of a MoE layer to the end of its router (gate projection and routing), and
`Router.update` after the step. Not counted is what cannot be told apart from outside: the backward pass of the gate
and of an aux loss. On a GPU the times are those of the device, from CUDA events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from moerouters.routed import RoutedModule


class RouterClock:
    """Sums the time that the given layers spend in routing. One per model, for as long as the model lives."""

    def __init__(self, layers: Iterable[RoutedModule], device: torch.device) -> None:
        self._now: Callable[[], Any] = _event if device.type == "cuda" else time.perf_counter
        self._spans: list[tuple[Any, Any]] = []
        self._entered: Any = None
        for layer in layers:
            layer.register_forward_pre_hook(self._enter)
            layer.router.register_forward_hook(self._leave)
            layer.router.update = self._timed(layer.router.update)  # type: ignore[method-assign]

    def take_ms(self) -> float:
        """Milliseconds since the last call. On a GPU it waits for the device."""
        spans, self._spans = self._spans, []
        if spans and isinstance(spans[0][0], torch.cuda.Event):
            torch.cuda.synchronize()
            return float(sum(start.elapsed_time(end) for start, end in spans))
        return 1e3 * float(sum(end - start for start, end in spans))

    def _enter(self, *_: Any) -> None:
        self._entered = self._now()

    def _leave(self, *_: Any) -> None:
        if self._entered is not None:  # a router that is called outside of its layer is not timed
            self._spans.append((self._entered, self._now()))
            self._entered = None

    def _timed(self, update: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            start = self._now()
            update(*args, **kwargs)
            self._spans.append((start, self._now()))

        return timed


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
