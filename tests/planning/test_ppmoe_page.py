"""PPMoE against all-to-all and dense: docs/pipeline.md shows the committed JSON, which the formulas still give."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerouters.planning import ppmoe_steps as steps
from moerouters.planning.cluster import PRESETS
from moerouters.planning.ppmoe import bubble
from moerouters.planning.ppmoe_page import WAYS, load, project, rendered
from moerouters_conformance.pool import rank_pool

from . import page_jobs as jobs

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_shows_what_is_committed() -> None:
    text = (DOCS / "pipeline.md").read_text(encoding="utf-8")
    assert rendered(text, load(DOCS)) == text, "stale: run `python -m moerouters.planning.ppmoe_page render docs`"


def test_committed_projections_are_those_of_the_formulas() -> None:
    assert load(DOCS).projected == project()


def test_the_two_ways_trained_the_same_model() -> None:
    """Until a choice between two experts falls the other way by a rounding."""
    found = load(DOCS)
    assert found.losses["ppmoe"][:5] == pytest.approx(found.losses["all_to_all"][:5], abs=1e-3)
    assert {len(found.step_ms[way]) for way in WAYS} == {len(found.step_ms["dense"])}


def test_a_slowed_cluster_gives_the_backbone_of_the_paper() -> None:
    for shared_port in (False, True):
        way = steps.dense(steps.cluster(shared_port=shared_port, slowed=True))
        assert way.tokens_per_s == pytest.approx(steps.BACKBONE_TOKENS_PER_S)
    machine = steps.cluster(shared_port=True, slowed=False)
    v100 = PRESETS["v100-nvl8-ib100"]
    assert machine.inter is not None and v100.inter is not None
    assert 8 * machine.inter.bytes_per_s == v100.inter.bytes_per_s
    assert machine.flops_per_s == v100.flops_per_s


def test_what_a_step_of_ppmoe_waits_is_the_bubble_and_the_sends() -> None:
    """The bubble of 4 stages and 32 microbatches; each send of 1F1B is waited for about once a microbatch."""
    machine = steps.cluster(shared_port=False, slowed=True)
    parts = steps.ppmoe(machine).parts_ms
    idle = parts.pop("bubble and sends")
    assert machine.inter is not None
    free = machine.inter.model_copy(update={"latency_s": 0.0, "bytes_per_s": 1e18})
    without = steps.ppmoe(machine.model_copy(update={"inter": free})).parts_ms["bubble and sends"]
    share = bubble(steps.STAGES, steps.MICROBATCHES)
    assert without == pytest.approx(share / (1 - share) * sum(parts.values()), rel=1e-6)
    sends = idle - without
    sent_ms = 1e3 * (machine.inter.latency_s + steps.SEQUENCE * steps.WIDTH * 2 / machine.inter.bytes_per_s)
    assert steps.STAGES < sends / sent_ms <= 2 * (steps.MICROBATCHES + steps.STAGES)


@pytest.mark.dist
@pytest.mark.slow
def test_the_ways_run() -> None:
    for took, losses in rank_pool().run(jobs.ppmoe, 2):
        assert took.keys() == losses.keys() == WAYS.keys()
        assert losses["ppmoe"] == pytest.approx(losses["all_to_all"], abs=1e-3)
