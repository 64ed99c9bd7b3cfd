"""docs/placement.md runs as it stands; docs/scale.md shows the committed JSON, and its pictures were drawn from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from moerouters.bench.shapes import Shape
from moerouters.dispatch.placement import LayerPlacement, PlacementMap
from moerouters.lab.showcase import fingerprint
from moerouters.planning import scale_page
from moerouters.planning.calibrate import Measured
from moerouters.planning.cluster import find_cluster
from moerouters.planning.placing import ALGORITHMS
from moerouters.planning.scale_page import PICTURED, Held, Projections, rendered, scenarios
from moerouters.planning.simulation import simulate
from moerouters.planning.validation import Timed
from moerouters_conformance.pool import rank_pool
from support.markdown import code_blocks

from . import page_jobs as jobs

DOCS = Path(__file__).resolve().parents[2] / "docs"
STALE = "stale: run `python -m moerouters.planning.scale_page render docs`"


def test_the_script_of_the_placement_page_runs(tmp_path: Path) -> None:
    placed = LayerPlacement.of_places((5, 2, 7, 0, 3, 6, 1, 4), 4)
    PlacementMap(ranks=4, layers={"0": placed}).save(tmp_path / "map.json")
    (script,) = [block.text for block in code_blocks(DOCS / "placement.md") if block.language == "python"]
    for found in rank_pool().run(jobs.run_page, script, str(tmp_path)):
        assert found == {"own": True, "shape": [16, 16]}


def test_the_placement_page_names_every_algorithm() -> None:
    text = (DOCS / "placement.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in (*ALGORITHMS, "auto"))


def test_the_cluster_of_the_page_is_one(tmp_path: Path) -> None:
    (block,) = [block for block in code_blocks(DOCS / "scale.md") if block.language == "toml"]
    (tmp_path / "ours.toml").write_text(block.text)
    assert find_cluster(str(tmp_path / "ours.toml")).name == "ours"


def test_the_scale_page_shows_what_is_committed() -> None:
    text = (DOCS / "scale.md").read_text(encoding="utf-8")
    assert rendered(text, DOCS) == text, STALE


def test_its_pictures_were_drawn_from_it() -> None:
    source = (DOCS / "benchmarks" / "scale.json").read_bytes()
    for name in PICTURED:
        picture = (DOCS / "images" / f"scale-{name}.svg").read_text(encoding="utf-8")
        assert fingerprint(source) in picture, f"{name}: {STALE}"


def test_committed_projections_are_those_of_the_scenarios() -> None:
    """Sizes and settings; the numbers depend on numpy's generator."""
    found = Projections.model_validate_json((DOCS / "benchmarks" / "scale.json").read_bytes())
    asked = scenarios(DOCS)
    assert found.simulations.keys() == asked.keys()
    for name, scenario in asked.items():
        shown = found.simulations[name]
        assert (shown.shape, shown.cluster.name) == (scenario.shape, scenario.cluster.name)
        assert {each.ranks for each in shown.estimates} == set(scenario.worlds)
        assert {each.load for each in shown.estimates} == {load.label for load in scenario.loads}
    small = simulate(scenarios(DOCS)["ppmoe"])
    for now, then in zip(small.estimates, found.simulations["ppmoe"].estimates, strict=True):
        assert now.forward.experts == pytest.approx(then.forward.experts, rel=1e-3)
        assert now.stage_ms("dispatch") == pytest.approx(then.stage_ms("dispatch"), rel=1e-3), "run `project`"


def test_measuring_and_projecting_write_what_rendering_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "docs"
    (docs / "benchmarks").mkdir(parents=True)
    (docs / "benchmarks" / "compare-tiny.json").write_bytes((DOCS / "benchmarks" / "compare-tiny.json").read_bytes())
    (docs / "scale.md").write_bytes((DOCS / "scale.md").read_bytes())
    each = dict.fromkeys(("all_to_all", "all_gather", "reduce_scatter", "all_reduce"), 1e-3)
    measured = Measured(
        ranks=1,
        flops_per_s=1e9,
        memory_bytes_per_s=1e9,
        forward_s=1e-3,
        backward_s=1e-3,
        latency_s=each,
        bytes_per_s=each,
    )
    rates, times = iter([1e9, 2e9, 1e9] * 2), iter([(2e-3, 9e-3), (3e-3, 8e-3)])
    shape = Shape(name="a", T=8, D=8, E=2, K=1, F=8)

    def found(job: object, ranks: int, device: str) -> list[Measured]:
        return [measured.model_copy(update={"ranks": ranks, "flops_per_s": ranks * next(rates)})]

    monkeypatch.setattr(scale_page, "on_ranks", found)
    monkeypatch.setattr(scale_page, "time_layers", lambda: [Timed(shape, 1, "local", *next(times), 8.0)])
    committed = Projections.model_validate_json((DOCS / "benchmarks" / "scale.json").read_bytes())
    monkeypatch.setattr(scale_page, "scenarios", lambda docs: {name: name for name in committed.simulations})
    monkeypatch.setattr(scale_page, "simulate", lambda name: committed.simulations[name])
    monkeypatch.setattr(scale_page, "draw", lambda found: Figure())  # drawn elsewhere, which takes seconds
    for command in (["measure", "--passes", "2"], ["project"], ["render"]):
        scale_page.main([*command, str(docs), "--note", "a remark"])
    held = Held.model_validate_json((docs / "benchmarks" / "simulate.json").read_bytes())
    assert held.run.note == "a remark" and held.compared[0].measured_ms == (2.0, 8.0)
    assert [world.flops_per_s for world in held.measured] == [1e9, 4e9, 4e9]
    text = (docs / "scale.md").read_text(encoding="utf-8")
    assert "Best of 2 passes. **a remark**" in text and "| a | 1 | 8, " in text
    assert rendered(text, docs) == text
    with pytest.raises(SystemExit, match="needs the marks"):
        rendered("nothing", docs)
    assert {path.name for path in (docs / "images").iterdir()} == {f"scale-{name}.svg" for name in PICTURED}
