"""What the simulator says of schedules over slow links is what their steps take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moerouters.pipeline import build
from moerouters_conformance.pool import rank_pool
from support import pipeline_latency_jobs as jobs

RECORD = Path(__file__).with_name("latency.json")
LATENCY = 0.25
NAMES = ("gpipe", "1f1b", "eager-1f1b", "interleaved-1f1b")


@pytest.mark.dist
@pytest.mark.slow
def test_ratios_of_step_times_are_those_of_the_simulator() -> None:
    schedules = {name: build(name, 4, 8) for name in NAMES}
    took = {name: max(rank_pool().run(jobs.step_s, schedule, LATENCY)) for name, schedule in schedules.items()}
    said = {name: jobs.predicted_s(schedule, LATENCY) for name, schedule in schedules.items()}
    expect_ratios(took, said)


def test_the_record_holds_the_same() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert (record["unit_s"], record["latency"]) == (jobs.UNIT_S, LATENCY)
    said = {name: jobs.predicted_s(build(name, 4, 8), LATENCY) for name in NAMES}
    assert record["predicted_s"] == pytest.approx(said)
    expect_ratios(record["measured_s"], said)


def expect_ratios(took: dict[str, float], said: dict[str, float]) -> None:
    for name in NAMES[1:]:
        assert took["gpipe"] / took[name] == pytest.approx(said["gpipe"] / said[name], rel=0.1), (took, said)
    assert took["interleaved-1f1b"] < took["gpipe"]
