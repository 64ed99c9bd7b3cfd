"""`moerouters simulate`: its options, its table, its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moerouters.cli import app
from moerouters.planning.cluster import PRESETS
from moerouters.planning.simulation import Simulation

SMALL = ("--shape", "T256-D64-E16-K2-F32", "--ranks", "8,64", "--layers", 2)


def command(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["simulate", *map(str, arguments)])


def test_a_row_for_each_back_end_load_and_world(tmp_path: Path) -> None:
    done = command(*SMALL, "--load", "uniform,zipf:max_vio=2", "--most-nodes", 2, "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    found = Simulation.model_validate_json((tmp_path / "a.json").read_bytes())
    rows = [line for line in done.output.splitlines() if line.startswith(("8 ", "64 "))]
    assert len(rows) == len(found.estimates) == 5 * 2 * 2
    assert found.most_nodes == 2 and sum(" * " in row for row in rows) == 4


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    small_memory = PRESETS["h100-nvl8-ib400"].model_copy(update={"memory_bytes": 1e4})
    small_memory.save(tmp_path / "small.json")
    done = command(*SMALL, "--cluster", tmp_path / "small.json", "--picture", tmp_path / "a.png")
    assert done.exit_code == 0, done.output
    assert "exceed the memory" in done.output
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert command(*SMALL, "--backends", "padded", "--picture", tmp_path / "b.svg").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--backends", "fastest"), "no back-end 'fastest'"),
        (("--ranks", "8,many"), "cannot read the numbers of ranks"),
        (("--ranks", ""), "cannot read the numbers of ranks"),
        (("--shape", "mixtral,olmoe"), "one shape at a time"),
        (("--shape", "huge"), "there is no shape 'huge'"),
        (("--cluster", "moon"), "there is no cluster 'moon'"),
        (("--load", "heavy"), "cannot read the load"),
        (("--calibrate",), "--calibrate needs --output"),
        (("--output", "x.json"), "belong to --calibrate"),
    ],
)
def test_what_cannot_be_is_told(arguments: tuple[str, ...], said: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2 and said in done.stderr, done.stderr
