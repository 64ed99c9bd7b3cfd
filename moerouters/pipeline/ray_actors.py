"""Actors of a Ray cluster: `pip install "moerouters[ray]"`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moerouters.errors import ConfigError
from moerouters.pipeline.actors import Actor, Call, Failure, described


class RayActors:
    """One Ray actor for each rank. options: as of `ray.remote`, for instance {"num_gpus": 1}; default: one CPU.

    Connects to the cluster that RAY_ADDRESS names, or starts one here, unless `ray.init` has been called.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "Ray is not installed.", why=str(error), fix='pip install "moerouters[ray]", or take Processes()'
            ) from error
        if not ray.is_initialized():
            ray.init()
        self._ray = ray
        self._host_class = ray.remote(**(options or {"num_cpus": 1}))(_Host)
        self.host: str = ray.util.get_node_ip_address()

    def start(self, name: str, build: Callable[[], object]) -> Actor:
        return _RayActor(self._ray, self._host_class.options(max_restarts=0).remote(build))


class _Host:
    """What an actor is: it makes its object with the first call, so that a failure there is told like others."""

    def __init__(self, build: Callable[[], object]) -> None:
        self._build, self._held = build, None

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
        try:
            if self._held is None:
                self._held = self._build()  # type: ignore[assignment]
            return getattr(self._held, method)(*args, **kwargs), None
        except Exception as error:
            return None, described(error)


class _RayActor:
    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle

    def call(self, method: str, *args: Any, **kwargs: Any) -> Call:
        return _RayCall(self._ray, self._handle.call.remote(method, args, kwargs))

    def kill(self) -> None:
        self._ray.kill(self._handle)


class _RayCall:
    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def outcome(self, timeout_s: float) -> tuple[Any, Failure | None] | None:
        try:
            gave, said = self._ray.get(self._reference, timeout=timeout_s)
        except self._ray.exceptions.GetTimeoutError:
            return None
        except self._ray.exceptions.RayActorError as error:
            return None, Failure(str(error).strip(), died=True)
        return gave, None if said is None else Failure(said, died=False)
