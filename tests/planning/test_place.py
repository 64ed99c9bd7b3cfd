"""`moerouters place`: what it judges, prints and writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moerouters.cli import app
from moerouters.dispatch.placement import PlacementMap
from moerouters.planning.loads import LoadHistory, dump_loads
from moerouters.planning.packing import Room
from moerouters.planning.place_report import Balance, PlacementReport, drift, report, split
from moerouters.planning.placing import ALGORITHMS, imbalance, place, place_all

from .histories import steady, topics


def command(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["place", *map(str, arguments)])


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "loads.json"
    path.write_text(dump_loads(topics(steps=40)))
    return path


def test_the_map_is_made_from_all_steps_and_judged_on_the_last(recorded: Path, tmp_path: Path) -> None:
    done = command(
        recorded,
        "--ranks",
        4,
        "--held-out",
        0.25,
        "--output",
        tmp_path / "map.json",
        "--json",
        tmp_path / "report.json",
    )
    assert done.exit_code == 0, done.output
    told = PlacementReport.model_validate_json((tmp_path / "report.json").read_bytes())
    assert (told.steps_seen, told.steps_held_out, told.replicas) == (30, 10, 0)
    assert told.chosen == "stepwise" and told.trust == "yes"
    assert "stepwise *" in done.output and "The history predicts the later steps." in done.output

    history, room = topics(steps=40), Room(ranks=4, places=16)
    made = PlacementMap.load(tmp_path / "map.json")
    assert dict(made.layers) == place(history, room, "stepwise")
    assert made.note == "stepwise, from 40 steps of loads.json"
    for name in ALGORITHMS:
        placed = place(history.part(slice(30)), room, name)
        assert told.of(name).seen == Balance.of(imbalance(history.part(slice(30)), placed))
        assert told.of(name).held_out == Balance.of(imbalance(history.part(slice(30, None)), placed))
    assert told.of("contiguous").captured == 0
    better = [told.of(name).held_out for name in ("contiguous", "eplb", "stepwise")]
    assert all(each is not None for each in better)
    means = [each.mean for each in better if each is not None]
    assert means == sorted(means, reverse=True)


def test_nodes_replicas_and_groups(recorded: Path, tmp_path: Path) -> None:
    done = command(
        recorded, "--ranks", 4, "--nodes", 2, "--replicas", 8, "--groups", 4, "--algorithm", "greedy",
        "--output", tmp_path / "map.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "24 places on 4 ranks on 2 nodes, 8 replicas a layer" in done.output
    assert "nodes mean" in done.output and "Replicas serve" in done.output and "greedy *" in done.output
    made = PlacementMap.load(tmp_path / "map.json")
    assert made.nodes == 2 and made.replicated and all(layer.num_places == 24 for layer in made.layers.values())


def test_a_picture_is_drawn(recorded: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.svg"):
        assert command(recorded, "--ranks", 4, "--picture", tmp_path / name).exit_code == 0
        assert (tmp_path / name).stat().st_size > 10_000
    assert command(recorded, "--ranks", 4, "--held-out", 0, "--picture", tmp_path / "c.png").exit_code == 0


def test_without_held_out_steps_there_is_no_verdict(recorded: Path) -> None:
    done = command(recorded, "--ranks", 4, "--held-out", 0)
    assert done.exit_code == 0 and "held-out" not in done.output and "predict" not in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", 5), "16 places are no multiple of 5 ranks"),
        (("--ranks", 4, "--algorithm", "best"), "there is no placement 'best'"),
        (("--ranks", 4, "--steps", 3), "has steps of its own"),
    ],
)
def test_what_cannot_be_is_told(recorded: Path, arguments: tuple[object, ...], said: str) -> None:
    done = command(recorded, *arguments)
    assert done.exit_code == 2 and said in done.stderr


def test_layers_of_different_size_are_placed_apart(tmp_path: Path) -> None:
    layers = {"a": np.ones((2, 4), dtype=np.int64), "b": np.ones((2, 8), dtype=np.int64)}
    (tmp_path / "loads.json").write_text(dump_loads(LoadHistory(layers=layers)))
    done = command(tmp_path / "loads.json", "--ranks", 2)
    assert done.exit_code == 2 and "different numbers of experts: [4, 8]" in done.stderr


def judged(history: LoadHistory, *, chosen: str = "refined") -> PlacementReport:
    """Of two ranks, on the second half."""
    room, (seen, later) = Room(ranks=2, places=4), split(history, 0.5)
    return report(seen, later, room, place_all(seen, room), chosen=chosen)


def test_trust_follows_from_what_was_captured() -> None:
    steadily = judged(steady([9, 9, 1, 1]))
    assert steadily.trust == "yes" and steadily.of("refined").captured == 1
    assert steadily.drift == steadily.drift_within == 0
    even = judged(steady([5, 5, 5, 5]))
    assert even.trust == "nothing to gain" and even.of("refined").captured is None
    # What was cold is hot later: experts that were split meet, and those that met are split.
    turned = LoadHistory(layers={"a": np.array([[9, 1, 9, 1]] * 4 + [[9, 9, 1, 1]] * 4)})
    assert judged(turned, chosen="contiguous").trust == "no"
    once = judged(steady([9, 9, 1, 1], steps=1))
    assert once.trust is None and once.drift is None and once.drift_within is None


def test_drift_is_the_part_of_the_load_that_moved() -> None:
    before = LoadHistory(layers={"a": np.array([[4, 4, 0, 0]]), "b": np.array([[1, 1, 1, 1]])})
    after = LoadHistory(layers={"a": np.array([[0, 2, 2, 0]]), "b": np.array([[2, 2, 2, 2]])})
    assert drift(before, after) == pytest.approx(0.25)  # half of a, nothing of b
    assert drift(before, before) == 0


def test_splits_keep_a_step_to_see() -> None:
    history = steady([1, 2], steps=10)
    for held_out, kept in ((0.0, 10), (0.25, 8), (0.9, 1)):
        seen, later = split(history, held_out)
        assert seen.steps == kept and (0 if later is None else later.steps) == 10 - kept
