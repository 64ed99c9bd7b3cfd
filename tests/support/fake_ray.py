"""The calls of Ray that RayActors makes, in this process: what they give and raise, without actors of their own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class GetTimeoutError(Exception):
    """As in ray.exceptions."""


class RayActorError(Exception):
    """As in ray.exceptions."""


class FakeRay:
    """Stands for the module. `state` says what happens to calls that are waited for."""

    exceptions = SimpleNamespace(GetTimeoutError=GetTimeoutError, RayActorError=RayActorError)
    util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    def __init__(self) -> None:
        self.state = "well"
        self.started = False
        self.options: dict[str, Any] = {}
        self.killed: list[object] = []

    def is_initialized(self) -> bool:
        return self.started

    def init(self) -> None:
        self.started = True

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.options = options
        return lambda kind: SimpleNamespace(options=lambda **more: SimpleNamespace(remote=lambda *a: _Handle(kind(*a))))

    def get(self, reference: Any, timeout: float) -> Any:
        if self.state == "slow":
            raise GetTimeoutError
        if self.state == "dead":
            raise RayActorError("The actor died unexpectedly.")
        return reference

    def kill(self, handle: object) -> None:
        self.killed.append(handle)


class _Handle:
    def __init__(self, held: Any) -> None:
        self.call = SimpleNamespace(remote=held.call)
