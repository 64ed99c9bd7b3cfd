"""What one rank does in a step, as a straight line: run a task, send, receive, delete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moerouters.pipeline.schedule import Kind, Task


@dataclass(frozen=True, slots=True)
class Buffer:
    """A value that one stage gives to others, or its gradient, of one microbatch. A rank has at most one of each."""

    value: str
    microbatch: int
    summed_on: int | None = None
    """None: the value. Else its gradient, as far as the stages of this rank contribute to it."""

    @property
    def is_gradient(self) -> bool:
        return self.summed_on is not None

    def __str__(self) -> str:
        name = f"{self.value}[{self.microbatch}]"
        return name if self.summed_on is None else f"d {name} of rank {self.summed_on}"


@dataclass(frozen=True, slots=True)
class Run:
    task: Task

    def __str__(self) -> str:
        return f"run {self.task}"


@dataclass(frozen=True, slots=True)
class Send:
    """Begin to send; the sender may delete its own copy at once."""

    buffer: Buffer
    peer: int

    def __str__(self) -> str:
        return f"send {self.buffer} to rank {self.peer}"


@dataclass(frozen=True, slots=True)
class Receive:
    """Begin to receive; the task that uses the buffer waits for it."""

    buffer: Buffer
    peer: int

    def __str__(self) -> str:
        return f"receive {self.buffer} from rank {self.peer}"


@dataclass(frozen=True, slots=True)
class Delete:
    """Nothing after it on this rank uses the buffer."""

    buffer: Buffer

    def __str__(self) -> str:
        return f"delete {self.buffer}"


Transfer = Send | Receive
Op = Run | Send | Receive | Delete


@dataclass(frozen=True)
class Use:
    """What a task does with buffers."""

    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    """Gradients are added to where they are there already."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """The most that a rank holds at once."""

    activations: int
    """Forwards whose backward, or the second half of it, has not ended; one for each stage and microbatch."""
    buffers: int
    """Values and gradients on their way from a stage to another, what is being sent not counted."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A rank's ops in order, and what its tasks do with buffers."""

    rank: int
    ops: tuple[Op, ...]
    uses: dict[Task, Use]

    def held(self) -> Iterator[tuple[Op, Held]]:
        """After each op what the rank holds; at a task with what it takes and makes."""
        buffers: set[Buffer] = set()
        activations = 0
        for op in self.ops:
            ended = False
            if isinstance(op, Run):
                buffers.update(self.uses[op.task].writes)
                activations += op.task.kind is Kind.FORWARD
                ended = op.task.kind in (Kind.BACKWARD, Kind.WEIGHT_BACKWARD)
            elif isinstance(op, Receive):
                buffers.add(op.buffer)
            elif isinstance(op, Delete):
                buffers.remove(op.buffer)
            yield op, Held(activations=activations, buffers=len(buffers))
            activations -= ended

    def forwards(self, num_microbatches: int) -> Program:
        """What of it evaluates the first so many microbatches: a part of the same order, so ranks still match."""
        return replace(self, ops=tuple(op for op in self.ops if _evaluates(op, num_microbatches)))

    def peak(self) -> Held:
        """The largest of each over the step."""
        found = [held for _, held in self.held()]
        return Held(
            activations=max((held.activations for held in found), default=0),
            buffers=max((held.buffers for held in found), default=0),
        )

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))


def _evaluates(op: Op, num_microbatches: int) -> bool:
    if isinstance(op, Run):
        return op.task.kind is Kind.FORWARD and op.task.microbatch < num_microbatches
    return not op.buffer.is_gradient and op.buffer.microbatch < num_microbatches
