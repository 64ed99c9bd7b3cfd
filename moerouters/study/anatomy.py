"""Where a training step goes: parts by torch's profiler, which must add up to the step that a clock measured.

Every event's own time goes to the innermost named part that it lies in. A backward node has no such range: it belongs
to the part of the forward operation with its sequence number, which made it; accumulating a gradient belongs to the
node before. In the experts' operator, which does all of a layer at once, gathering rows is dispatch, and weighted sums
over a token's experts are combine, in both directions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile, record_function

from moerouters.bench.memory import quiet
from moerouters.bench.timing import waiting
from moerouters.errors import MoeroutersError
from moerouters.lab.train import Trainer
from moerouters.study.ranges import PREFIX, STEP, named_parts
from moerouters.study.results import PARTS, Anatomy
from moerouters.study.timing import steps_of

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

TOLERANCE = 0.05
"""Of the sum of parts to the step."""
_STEPS = 4
_BACKWARD = "autograd::engine::evaluate_function: "
_ACCUMULATE = _BACKWARD + "torch::autograd::AccumulateGrad"
_OPERATOR = "moerouters::expert_mlp"
_MOVES = {"aten::index_select": "dispatch", "aten::embedding_bag": "combine"}
"""What within that operator moves rows."""


class AnatomyError(MoeroutersError):
    """The parts do not add up to the step."""


def dissect(trainer: Trainer, *, steps: int = _STEPS) -> Anatomy:
    """The anatomy of a step of this trainer, which it trains for some steps. Raises AnatomyError, see `summed`."""
    run, wait = steps_of(trainer), waiting(trainer.device)
    on_gpu = trainer.device.type == "cuda"

    def timed(count: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(count):
            with record_function(STEP):
                run()
        wait()
        return 1e3 * (time.perf_counter() - began) / count

    timed(2)
    alone_ms = timed(steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with quiet(), named_parts(trainer):
        with profile(activities=activities):
            timed(1)  # the profiler's own first steps
        with profile(activities=activities) as watched:
            step_ms = timed(steps)
    found = attribute(watched.events() or [], on_gpu=on_gpu)
    return summed({part: ms / steps for part, ms in found.items()}, step_ms=step_ms, alone_ms=alone_ms)


def dissected(trainer: Trainer) -> tuple[Anatomy | None, str | None]:
    """The anatomy, or why there is none; a trained model that is trained on may also diverge."""
    try:
        return dissect(trainer), None
    except MoeroutersError as error:
        return None, str(error)


def summed(parts_ms: dict[str, float], *, step_ms: float, alone_ms: float) -> Anatomy:
    """The Anatomy of these parts. Raises AnatomyError where their sum misses the step by more than TOLERANCE."""
    total = sum(parts_ms.values())
    error = total / step_ms - 1
    if abs(error) > TOLERANCE:
        raise AnatomyError(
            f"the parts of a step sum to {total:.3g} ms, and the step takes {step_ms:.3g} ms.",
            where=", ".join(f"{part} {ms:.3g}" for part, ms in parts_ms.items()),
            why=f"they may differ by {TOLERANCE:.0%}; more means that work was missed, or counted twice",
            fix="run it again on an idle machine; if it stays, the profiler of this torch names its events otherwise",
        )
    ordered = {part: parts_ms[part] for part in PARTS if part in parts_ms}
    return Anatomy(parts_ms=ordered, step_ms=step_ms, error=error, slowdown=step_ms / alone_ms)


@dataclass(frozen=True)
class _Place:
    """What is known of the surroundings of an event."""

    part: str = "other"
    in_step: bool = False
    in_backward: bool = False
    in_operator: bool = False


def attribute(events: Sequence[FunctionEvent], *, on_gpu: bool = False) -> dict[str, float]:
    """Milliseconds of each part. On a GPU those of its kernels, and as `host` the time in which none of them ran."""
    parts: dict[str, float] = {}
    places: dict[int, _Place] = {}
    makers: dict[int, str] = {}
    before = "other"
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        place = places.get(id(event.cpu_parent), _Place())
        if event.name.startswith(_BACKWARD):
            if not event.name.startswith(_ACCUMULATE):
                before = makers.get(event.sequence_nr, "other")
            # Backward may run in a thread of its own, outside of the step's range.
            place = _Place(before, in_step=True, in_backward=True)
        elif event.name == STEP:
            place = _Place(in_step=True)
        elif event.name.startswith(PREFIX):
            place = replace(place, part=event.name.removeprefix(PREFIX))
        elif event.name.startswith(_OPERATOR):
            place = replace(place, in_operator=True)
        elif place.in_operator and event.name in _MOVES:
            place = replace(place, part=_MOVES[event.name])
        if event.sequence_nr >= 0 and not place.in_backward:
            makers[event.sequence_nr] = place.part  # the last operation to begin with a number makes the node
        places[id(event)] = place
        if place.in_step:
            cost = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            parts[place.part] = parts.get(place.part, 0.0) + 1e-3 * cost
    if on_gpu:
        parts["host"] = _without_kernels(events)
    return {part: ms for part, ms in parts.items() if ms > 0}


def _without_kernels(events: Sequence[FunctionEvent]) -> float:
    """Milliseconds within the steps in which no kernel ran."""
    kernels = sorted((e.time_range for e in events if e.device_type.name == "CUDA"), key=lambda span: span.start)
    steps = [event.time_range for event in events if event.name == STEP]
    idle = 0.0
    for step in steps:
        reached = step.start
        for kernel in kernels:
            if step.start <= kernel.start < step.end:
                idle += max(0.0, kernel.start - reached)
                reached = max(reached, kernel.end)
        idle += max(0.0, step.end - reached)
    return 1e-3 * idle
