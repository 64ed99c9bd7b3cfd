"""Controller: one driver that runs a pipeline in actors, one a rank, with one call to each actor in a step.

JaxPP's single controller (arXiv:2412.14374, Sec. 4): a rank knows beforehand what it does in a step, so the driver
sends it data and waits. Actors talk to each other over a process group, as they do under torchrun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Protocol

import torch.distributed as dist
from torch import Tensor

from moerouters.errors import PipelineError
from moerouters.pipeline.actors import Backend, Failure, Processes, outcomes
from moerouters.pipeline.check import check
from moerouters.pipeline.graph import StageGraph
from moerouters.pipeline.runtime import Pipeline
from moerouters.pipeline.schedule import Schedule, Task
from moerouters.pipeline.stages import Shared, Stages

PATIENCE_S = 5.0
"""After one actor failed: the others notice within the time in which a rank looks for word from others."""


class Worker(Protocol):
    """What an actor holds; its other methods can be called by `Controller.call`."""

    def step(self, **batch: Tensor) -> Any:
        """A training step on those parts of the batch that this rank takes."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where an actor sits; given to what makes its Worker."""

    rank: int
    schedule: Schedule
    graph: StageGraph
    loss_takes: tuple[str, ...]
    store: Any
    """The driver's, of torch.distributed."""

    def pipeline(self, stages: Stages, loss: Callable[..., Tensor], *, shared: Shared | None = None) -> Pipeline:
        """The Pipeline of this rank, over all actors."""
        return Pipeline(
            self.schedule,
            stages,
            loss,
            graph=self.graph,
            loss_takes=self.loss_takes,
            shared=shared,
            on_task=self._report,
        )

    def _report(self, task: Task) -> None:
        self.store.set(_key(self.rank), str(task))


class Controller:
    """The driver. setup: makes a rank's Worker in its actor, from the Seat there; it has to be importable.

    backend: where actors live; default: processes of this machine. communication: what they talk over, as
    `init_process_group` has it. graph and loss_takes: as of `Pipeline`. timeout_s: for a message between actors. Use it
    as a context, or call `close`.
    """

    def __init__(
        self,
        schedule: Schedule,
        setup: Callable[[Seat], Worker],
        *,
        backend: Backend | None = None,
        communication: str = "gloo",
        graph: StageGraph | None = None,
        loss_takes: str | Sequence[str] = ("target",),
        timeout_s: float = 300.0,
    ) -> None:
        check(schedule)
        self.schedule = schedule
        self._graph = StageGraph.chain(schedule.num_stages) if graph is None else graph
        self._loss_takes = (loss_takes,) if isinstance(loss_takes, str) else tuple(loss_takes)
        backend = Processes() if backend is None else backend
        # Served by the driver, so that what an actor said last outlives it.
        self._store: Any = _tcp_store(backend.host, 0, is_master=True, wait_for_workers=False)
        self._calls, self._failed = 0, ""
        join = partial(
            _join,
            setup,
            backend.host,
            self._store.port,
            communication,
            timeout_s,
            schedule,
            self._graph,
            self._loss_takes,
        )
        self._actors = [backend.start(_name(rank), partial(join, rank)) for rank in range(schedule.num_ranks)]

    def step(self, **batch: Tensor) -> list[Any]:
        """Every Worker's step on its parts of the batch, one call each; what they gave, by rank.

        Raises PipelineError if an actor dies or raises: it names the actor, and the last task that it has done. The
        controller is closed then.
        """
        parts = [
            {name: batch[name] for name in self._names(rank) if name in batch} for rank in range(len(self._actors))
        ]
        return self._all("step", parts)

    def call(self, method: str, **arguments: Any) -> list[Any]:
        """A method of every Worker with the same arguments; what they gave, by rank. Raises as `step`."""
        return self._all(method, [arguments] * len(self._actors))

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            actor.kill()
        self._actors = []
        self._failed = self._failed or "it was closed"

    def __enter__(self) -> Controller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _names(self, rank: int) -> list[str]:
        stages = self.schedule.stages_of(rank)
        names = [name for stage in stages for name in self._graph.batch_names(stage)]
        return names + (list(self._loss_takes) if self.schedule.num_stages - 1 in stages else [])

    def _all(self, method: str, arguments: Sequence[dict[str, Any]]) -> list[Any]:
        if self._failed:
            raise PipelineError(
                f"the controller of schedule '{self.schedule.name}' has no actors any more.",
                why=self._failed,
                fix="make a new one, and load a checkpoint",
            )
        self._calls += 1
        calls = [actor.call(method, **each) for actor, each in zip(self._actors, arguments, strict=True)]
        found = outcomes(calls, patience_s=PATIENCE_S)
        failures = {rank: each[1] for rank, each in enumerate(found) if each is not None and each[1] is not None}
        if failures or None in found:
            self._raise(method, failures)
        return [each[0] for each in found if each is not None]

    def _raise(self, method: str, failures: dict[int, Failure]) -> NoReturn:
        """Of several failures show the cause: a death, else an error that is not about waiting for somebody else."""
        rank = min(failures, key=lambda r: (not failures[r].died, "PipelineError" in failures[r].said, r))
        failure = failures[rank]
        what = "died" if failure.died else "raised"
        others = [f"{_name(r)}: {self._last_task(r)}" for r in range(self.schedule.num_ranks) if r != rank]
        self._failed = f"{_name(rank)} {what} in call {self._calls}, '{method}'"
        error = PipelineError(
            f"{self._failed}, {self._last_task(rank)}.",
            where="\n".join(others),
            why=failure.said,
            fix="look at that actor's machine and output; start again from a checkpoint",
        )
        self.close()
        raise error

    def _last_task(self, rank: int) -> str:
        key = _key(rank)
        return f"last task done: {self._store.get(key).decode()}" if self._store.check([key]) else "no task done"


def _join(
    setup: Callable[[Seat], Worker],
    host: str,
    port: int,
    communication: str,
    timeout_s: float,
    schedule: Schedule,
    graph: StageGraph,
    loss_takes: tuple[str, ...],
    rank: int,
) -> Worker:
    """In the actor: meet the others, and make the Worker."""
    store = _tcp_store(host, port, is_master=False)
    dist.init_process_group(
        communication,
        store=store,
        rank=rank,
        world_size=schedule.num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    return setup(Seat(rank=rank, schedule=schedule, graph=graph, loss_takes=loss_takes, store=store))


def _tcp_store(*args: Any, **kwargs: Any) -> Any:
    return dist.TCPStore(*args, **kwargs)  # type: ignore[attr-defined]  # torch's stubs do not export it


def _key(rank: int) -> str:
    return f"last-task/{rank}"


def _name(rank: int) -> str:
    return f"actor {rank}"
