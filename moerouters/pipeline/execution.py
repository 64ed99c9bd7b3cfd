"""One step of one rank: its program, op by op, on tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moerouters.autocast import no_autocast
from moerouters.errors import PipelineError, ShapeError
from moerouters.pipeline.backward import WeightHalf, input_half, whole_backward
from moerouters.pipeline.graph import StageGraph
from moerouters.pipeline.program import Buffer, Delete, Held, Program, Receive, Run, Send, Transfer
from moerouters.pipeline.schedule import Kind, Task
from moerouters.pipeline.site import Site
from moerouters.pipeline.transport import MAX_DIMS, Form, Transport, Work

IN_FLIGHT = 16
"""Sends to a peer that may be under way; before one more begins, the oldest is waited for. gloo does not say when a
send is done, so everything sent would live until the end of the step. The receive of the oldest stands before all that
follows here in the one order of all ranks, so nobody waits in a circle."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The part of a model that lies on this rank, and how its parts are called."""

    graph: StageGraph
    stages: nn.ModuleDict
    loss: Callable[..., Tensor]
    loss_takes: tuple[str, ...]
    device: torch.device

    def expect_outputs(self, given: object, task: Task) -> tuple[Tensor, ...]:
        """What a stage returned, as a tuple. Raises ShapeError if it is not what the graph says."""
        names = self.graph.stages[task.stage].gives
        outputs = given if isinstance(given, tuple) else (given,)
        if len(outputs) != len(names) or not all(isinstance(output, Tensor) for output in outputs):
            raise ShapeError(
                f"stage {task.stage} gave {', '.join(type(output).__name__ for output in outputs)}.",
                where=f"task {task}",
                why=f"it gives {', '.join(names)}, each a tensor",
                fix="let its forward return one tensor for each name, or name what it gives",
            )
        return outputs


@dataclass(frozen=True)
class _Forward:
    """What a forward leaves for its backward."""

    inputs: dict[str, Tensor]
    """Leaves; their gradients go to other stages."""
    outputs: tuple[Tensor, ...]
    """What was handed on, or the loss."""


class Execution:
    """The step. `forms` is filled if it is empty: then each value is preceded by a message about its form."""

    def __init__(
        self,
        program: Program,
        model: Model,
        parts: Mapping[str, tuple[Tensor, ...]],
        *,
        num_microbatches: int,
        forms: dict[Buffer, Form],
        transport: Transport,
        site: Site,
        on_task: Callable[[Task], None] | None = None,
    ) -> None:
        self.losses: dict[int, Tensor] = {}
        self.held = Held(activations=0, buffers=0)
        """The most that was held at once."""
        self.task: Task | None = None
        """That ran last."""
        self._program, self._model, self._parts = program, model, parts
        self._num_microbatches = num_microbatches
        self._forms, self._introduces = forms, not forms
        self._transport, self._site, self._on_task = transport, site, on_task
        self._tensors: dict[Buffer, Tensor | None] = {}
        self._forwards: dict[tuple[int, int], _Forward | WeightHalf] = {}
        self._coming: dict[Buffer, tuple[Work, Receive]] = {}
        self._leaving: dict[int, list[tuple[Work, Tensor, Send]]] = {}
        self._batch: list[tuple[Transfer, Tensor]] = []

    def run(self) -> None:
        """All ops. Raises PipelineError if a transfer fails; what a stage raises gets a note that names the task."""
        for op in self._program.ops:
            if isinstance(op, Run):
                self._start_batch()
                self.task = op.task
                self._run(op.task)
                if self._on_task is not None:
                    self._on_task(op.task)
            elif isinstance(op, Delete):
                del self._tensors[op.buffer]
                self._coming.pop(op.buffer, None)
            else:
                self._transfer(op)
        self._start_batch()
        for peer in self._leaving:
            self._let_go(peer, but=0)

    def _run(self, task: Task) -> None:
        key = (task.stage, task.microbatch)
        match task.kind:
            case Kind.FORWARD:
                self._forwards[key] = self._forward(task)
                self._note_held()
                if not torch.is_grad_enabled():
                    del self._forwards[key]
                return
            case Kind.WEIGHT_BACKWARD:
                half = self._forwards[key]
                assert isinstance(half, WeightHalf)
                with no_autocast(self._model.device):
                    half.run()
                del self._forwards[key]
            case _:
                self._backward(task, key)
        self._note_held()

    def _forward(self, task: Task) -> _Forward:
        graph, m = self._model.graph, task.microbatch
        inputs = {name: self._leaf(Buffer(name, m), task) for name in graph.passed(task.stage)}
        arguments = [inputs[n] if n in inputs else self._parts[n][m] for n in graph.stages[task.stage].takes]
        outputs = self._model.expect_outputs(self._model.stages[str(task.stage)](*arguments), task)
        if task.stage == len(graph.stages) - 1:
            loss = self._model.loss(*outputs, *(self._parts[name][m] for name in self._model.loss_takes))
            self.losses[m] = loss.detach()
            return _Forward(inputs, (loss / self._num_microbatches,))
        handed_on = []
        for name, output in zip(graph.stages[task.stage].gives, outputs, strict=True):
            buffer = Buffer(name, m)
            self._expect_form(buffer, Form.of(output), task)
            self._tensors[buffer] = output.detach()
            handed_on.append(output)
        return _Forward(inputs, tuple(handed_on))

    def _backward(self, task: Task, key: tuple[int, int]) -> None:
        forward = self._forwards[key]
        assert isinstance(forward, _Forward)
        names = self._model.graph.handed_on(task.stage)
        grads = [self._gradient(name, task) for name in names] if names else [None]
        with no_autocast(self._model.device):
            if task.kind is Kind.INPUT_BACKWARD:
                self._forwards[key] = input_half(forward.outputs, grads, list(forward.inputs.values()))
            else:
                whole_backward(forward.outputs, grads)
        for name, leaf in forward.inputs.items():
            buffer = Buffer(name, task.microbatch, summed_on=self._program.rank)
            grad = torch.zeros_like(leaf) if leaf.grad is None and leaf.requires_grad else leaf.grad
            earlier = self._tensors.get(buffer)
            self._tensors[buffer] = grad if earlier is None or grad is None else earlier + grad
            leaf.grad = None
        if task.kind is Kind.BACKWARD:
            self._note_held()
            del self._forwards[key]

    def _leaf(self, buffer: Buffer, task: Task) -> Tensor:
        tensor = self._arrived(buffer, task)
        assert tensor is not None
        return tensor.detach().requires_grad_(self._forms[buffer].requires_grad)

    def _gradient(self, name: str, task: Task) -> Tensor | None:
        """The sum of what the ranks with consumers made of it; None if it wants none."""
        wanted = [buffer for buffer in self._program.uses[task].reads if buffer.value == name]
        found = [self._arrived(buffer, task) for buffer in wanted]
        grads = [grad for grad in found if grad is not None]
        return sum(grads[1:], start=grads[0]) if grads else None

    def _arrived(self, buffer: Buffer, task: Task) -> Tensor | None:
        if buffer in self._coming:
            work, receive = self._coming.pop(buffer)
            self._wait(work, f"{named(task)} waits for {buffer} from rank {receive.peer}")
        return self._tensors[buffer]

    def _expect_form(self, buffer: Buffer, form: Form, task: Task) -> None:
        if self._introduces:
            self._forms[buffer] = form
        elif self._forms[buffer] != form:
            raise PipelineError(
                f"{named(task)} gave {buffer} as {form}; in earlier steps it was {self._forms[buffer]}.",
                where=str(self._site),
                why="receivers make room for what came before, unless the form of the batch changes",
                fix="let the form of what a stage gives follow from the form of the batch",
            )

    def _transfer(self, op: Transfer) -> None:
        value = Buffer(op.buffer.value, op.buffer.microbatch)
        if op.buffer.is_gradient and not self._forms[value].requires_grad:
            if isinstance(op, Receive):
                self._tensors[op.buffer] = None
            return
        if self._introduces and not op.buffer.is_gradient:
            self._introduce(op)
        if isinstance(op, Send):
            tensor = self._tensors[op.buffer]
            assert tensor is not None
            self._batch.append((op, tensor.contiguous()))
        else:
            tensor = self._tensors[op.buffer] = self._forms[value].empty(self._model.device)
            self._batch.append((op, tensor))
            self._note_held()

    def _introduce(self, op: Transfer) -> None:
        """Send the value's form ahead, or wait for it. Who waits has sent everything that stands before."""
        self._start_batch()
        device = self._model.device
        if isinstance(op, Send):
            header = self._forms[op.buffer].header(device)
            self._started(op, header, self._begin([(op, header)])[0])
        else:
            header = torch.empty(3 + MAX_DIMS, dtype=torch.int64, device=device)
            self._wait(self._begin([(op, header)])[0], f"{op}, {self._after()}")
            self._forms[op.buffer] = Form.parse(header)

    def _start_batch(self) -> None:
        batch, self._batch = self._batch, []
        sends = [(op, tensor) for op, tensor in batch if isinstance(op, Send)]
        receives = [(op, tensor) for op, tensor in batch if isinstance(op, Receive)]
        for peer in dict.fromkeys(op.peer for op, _ in sends):
            self._let_go(peer, but=IN_FLIGHT)
        works = self._begin([*sends, *receives])
        for (op, tensor), work in zip(sends, works, strict=False):
            self._started(op, tensor, work)
        for (receive, _), work in zip(receives, works[len(sends) :], strict=True):
            self._coming[receive.buffer] = (work, receive)

    def _begin(self, batch: Sequence[tuple[Transfer, Tensor]]) -> list[Work]:
        """One Work for each, sends first."""
        try:
            return self._transport.start(
                [(tensor, op.peer) for op, tensor in batch if isinstance(op, Send)],
                [(tensor, op.peer) for op, tensor in batch if isinstance(op, Receive)],
            )
        except RuntimeError as error:
            raise self._site.failed(f"{'; '.join(str(op) for op, _ in batch)}, {self._after()}", error) from error

    def _after(self) -> str:
        return "at the start" if self.task is None else f"after {named(self.task)}"

    def _started(self, op: Send, tensor: Tensor, work: Work) -> None:
        self._leaving.setdefault(op.peer, []).append((work, tensor, op))

    def _let_go(self, peer: int, *, but: int) -> None:
        leaving = self._leaving.get(peer, [])
        while len(leaving) > but:
            work, _, op = leaving.pop(0)
            self._wait(work, f"{op} earlier, {self._after()}")

    def _wait(self, work: Work, doing: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._site.failed(doing, error) from error

    def _note_held(self) -> None:
        self.held = Held(
            activations=max(self.held.activations, len(self._forwards)),
            buffers=max(self.held.buffers, len(self._tensors)),
        )


def named(task: Task) -> str:
    return f"task {task} of stage {task.stage}"
