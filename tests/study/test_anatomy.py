"""Events to parts, on events made by hand and on a real step; and a sum that does not hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moerouters.dispatch.exchange import Exchange
from moerouters.study import anatomy
from moerouters.study.anatomy import AnatomyError, attribute, dissect, summed
from moerouters.study.contender import Contender
from moerouters.study.ranges import PREFIX, STEP, named_parts
from support.lab import small_corpus
from support.study import CPU, DENSE, PLAN, TOPK

BACKWARD = "autograd::engine::evaluate_function: "


@dataclass
class Event:
    """As much of torch's FunctionEvent as is looked at. Times in microseconds."""

    name: str
    start: float
    end: float
    sequence_nr: int = -1
    device: str = "CPU"
    self_device_time_total: float = 0.0
    cpu_parent: Event | None = None
    children: list[Event] = field(default_factory=list)

    @property
    def time_range(self) -> Any:
        return SimpleNamespace(start=self.start, end=self.end)

    @property
    def device_type(self) -> Any:
        return SimpleNamespace(name=self.device)

    @property
    def self_cpu_time_total(self) -> float:
        return self.end - self.start - sum(child.end - child.start for child in self.children)


def tree(*events: Event) -> Any:
    """With parents by nesting, in an order that is not that of time."""
    for event in events:
        around = [e for e in events if e is not event and e.start <= event.start and event.end <= e.end]
        if around and event.device == "CPU":
            event.cpu_parent = min(around, key=lambda e: e.end - e.start)
            event.cpu_parent.children.append(event)
    return list(reversed(events))


def test_own_times_go_to_the_innermost_part_and_backward_to_its_maker() -> None:
    events = tree(
        Event("before the step", 0, 100),
        Event(STEP, 1000, 11000),
        Event(PREFIX + "attention", 2000, 4000),
        Event("aten::mm", 2500, 3500, sequence_nr=7),
        Event(PREFIX + "dispatch", 4000, 7000),
        Event(PREFIX + "experts", 5000, 6500),
        Event("moerouters::expert_mlp", 5000, 6400, sequence_nr=8),
        Event("aten::index_select", 5100, 5300),
        Event("aten::embedding_bag", 6000, 6100),
        Event(BACKWARD + "ExpertsBackward", 8000, 9000, sequence_nr=8),
        Event("moerouters::expert_mlp_gradients", 8100, 8900),
        Event("aten::index_select", 8200, 8400),
        Event(BACKWARD + "torch::autograd::AccumulateGrad", 9000, 9200, sequence_nr=2**64 - 1),
        Event(BACKWARD + "MmBackward0", 9500, 10500, sequence_nr=7),
        Event("aten::mm", 9600, 10400, sequence_nr=7),
        Event(BACKWARD + "Unknown", 10500, 10600, sequence_nr=99),
    )
    parts = attribute(events)
    assert parts == pytest.approx(
        {
            "other": 0.001 * (10000 - 2000 - 3000 - 1000 - 200 - 1000),
            "attention": 2.0 + 1.0,
            "dispatch": 1.5 + 0.2 + 0.2,
            "experts": 1.5 - 0.3 + 1.0 - 0.2 + 0.2,
            "combine": 0.1,
        }
    )
    assert sum(parts.values()) == pytest.approx(10.0)


def test_on_a_gpu_kernels_count_and_what_is_left_between_them() -> None:
    events = tree(
        Event(STEP, 0, 1000),
        Event(PREFIX + "mlp", 0, 100),
        Event("aten::mm", 10, 90, self_device_time_total=300.0),
        Event("gemm", 200, 500, device="CUDA"),
        Event("overlapping", 450, 600, device="CUDA"),
        Event("another step's", 2000, 2600, device="CUDA"),
    )
    assert attribute(events, on_gpu=True) == pytest.approx({"mlp": 0.3, "host": 0.2 + 0.4})


def test_parts_that_do_not_sum_to_the_step_are_refused() -> None:
    fine = summed({"other": 30.0, "attention": 71.0}, step_ms=100.0, alone_ms=80.0)
    assert (fine.error, fine.slowdown) == (pytest.approx(0.01), 1.25)
    assert list(fine.parts_ms) == ["attention", "other"]
    for parts in ({"attention": 94.0}, {"attention": 71.0, "other": 35.0}):
        with pytest.raises(AnatomyError, match="and the step takes 100 ms"):
            summed(parts, step_ms=100.0, alone_ms=80.0)


@pytest.mark.parametrize("spec", [DENSE, TOPK], ids=lambda spec: spec.name)
def test_a_real_step_is_taken_apart(spec: Any, tmp_path: Path) -> None:
    trainer = Contender.of(PLAN, spec).trainer(seed=0, corpus=small_corpus(tmp_path), device=CPU)
    begin = Exchange.begin
    found = dissect(trainer, steps=2)
    expected = {"attention", "optimizer", "other"}
    expected |= {"mlp"} if spec is DENSE else {"gate", "balance", "dispatch", "experts", "combine"}
    assert expected <= found.parts_ms.keys()
    assert abs(found.error) <= anatomy.TOLERANCE
    assert Exchange.begin is begin and "step" not in vars(trainer.optimizer)
    assert not any("forward" in vars(module) for module in trainer.model.modules())


def test_a_part_that_is_missed_fails_the_anatomy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Contender.of(PLAN, DENSE).trainer(seed=0, corpus=small_corpus(tmp_path), device=CPU)

    def lossy(events: Any, *, on_gpu: bool) -> dict[str, float]:
        return {part: ms for part, ms in attribute(events, on_gpu=on_gpu).items() if part != "attention"}

    monkeypatch.setattr(anatomy, "attribute", lossy)
    with pytest.raises(AnatomyError, match="the parts of a step sum to"):
        dissect(trainer, steps=2)


def test_names_leave_results_as_they_are(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    plain, named = (Contender.of(PLAN, TOPK).trainer(seed=0, corpus=corpus, device=CPU) for _ in range(2))
    with named_parts(named):
        assert named.work(0)[0] == plain.work(0)[0]
    assert named.work(1)[0] == plain.work(1)[0]
