"""`moerouters pipeline` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moerouters.cli import app
from moerouters.pipeline import BUILDERS, build, check_file, write

SIZES = ("--stages", "4", "--microbatches", "8")


def run(*arguments: str, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["pipeline", *arguments])


def document(*arguments: str) -> dict[str, object]:
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_without_a_command_there_is_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert all(name in result.output for name in ("show", "check", "search"))


def test_it_is_imported_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("moerouters.pipeline")]:
        monkeypatch.delitem(sys.modules, name)
    assert CliRunner().invoke(app, ["pipeline", "--help"]).exit_code == 0
    assert "moerouters.pipeline" not in sys.modules


def test_show_draws_a_schedule() -> None:
    result = run("show", "1f1b", *SIZES)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[:2] == [
        "1f1b: 4 ranks, 4 stages, 8 microbatches",
        "makespan 33, bubble 27.27%, peak live activations 4, 3, 2, 1",
    ]
    assert lines[3] == "0 F0F1F2F3............B0--F4B1--F5B2--F6B3--F7B4--..B5--..B6--..B7--"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("name", "makespan", "peaks"),
    [
        ("gpipe", 33, [8, 8, 8, 8]),
        ("1f1b", 33, [4, 3, 2, 1]),
        ("eager-1f1b", 33, [7, 5, 3, 1]),
        ("zero-bubble-h1", 27, [4, 4, 4, 4]),
        ("interleaved-1f1b", 57, [11, 9, 7, 5]),
        ("interleaved-gpipe", 57, [16, 16, 16, 16]),
        ("kimi-k2", 57, [12, 10, 8, 6]),
        ("dualpipev", 53, [9, 9, 9, 9]),
        ("dualpipev-filled", 51, [9, 9, 9, 9]),
    ],
)
def test_json_is_all_that_is_printed(name: str, makespan: int, peaks: list[int]) -> None:
    found = document("show", name, *SIZES)
    chunks = BUILDERS[name].chunks or 2
    tasks = found.pop("tasks")
    bubble = found.pop("bubble")
    assert found == {
        "schedule": name,
        "ranks": 4,
        "stages": 4 * chunks,
        "microbatches": 8,
        "makespan": makespan,
        "peak_live": peaks,
    }
    assert isinstance(tasks, list) and isinstance(bubble, float)
    busy = sum(task["end"] - task["start"] for task in tasks)
    assert bubble == pytest.approx(1 - busy / (4 * makespan))
    assert tasks[0] == {"rank": 0, "stage": 0, "microbatch": 0, "kind": "forward", "start": 0, "end": 1}
    assert {task["kind"] for task in tasks} <= {"forward", "backward", "input-backward", "weight-backward"}


def test_the_help_names_every_schedule() -> None:
    text = " ".join(run("show", "--help").output.split()).replace("- ", "-")
    assert all(name in text for name in BUILDERS)


def test_chunks_costs_and_links() -> None:
    assert document("show", "interleaved-1f1b", *SIZES, "--chunks", "3")["stages"] == 12
    plain = ("show", "gpipe", "--stages", "2", "--microbatches", "1")
    assert document(*plain, "--costs", "1/2,1,0.25")["makespan"] == 3.5
    assert document(*plain, "--costs", "1,3;2,5")["makespan"] == 11
    assert document(*plain, "--costs", "1,2,2,3")["makespan"] == 8
    assert document(*plain, "--link", "1")["makespan"] == 8
    assert document(*plain, "--link", "1,4", "--size", "2", "--link", "1-0=0.25")["makespan"] == 6 + 1.5 + 0.25
    fused = ("show", "dualpipev", "--stages", "2", "--microbatches", "4")
    apart, together = (document(*fused, *more)["makespan"] for more in ((), ("--overlap",)))
    assert isinstance(apart, int) and isinstance(together, int) and together < apart


def test_files(tmp_path: Path) -> None:
    svg, png, table, numbers = (tmp_path / f"x.{suffix}" for suffix in ("svg", "png", "csv", "json"))
    result = run(
        "show", "1f1b", *SIZES, "--svg", str(svg), "--png", str(png), "--csv", str(table), "--json", str(numbers)
    )
    assert result.exit_code == 0 and result.stdout.startswith("1f1b: 4 ranks")
    assert svg.read_text().startswith("<?xml") and png.read_bytes().startswith(b"\x89PNG")
    assert json.loads(numbers.read_text()) == document("show", "1f1b", *SIZES)
    assert check_file(table).ranks == build("1f1b", 4, 8).ranks
    assert document("show", str(table)) == {**document("show", "1f1b", *SIZES), "schedule": "x"}
    assert run("show", "1f1b", *SIZES, "--csv", str(table), "--format", "torch").exit_code == 0
    assert table.read_text().splitlines()[3].startswith("3F0,3B0,3F1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["1f1b"], "how large is 1f1b?"),
        (["f1b1", *SIZES], "there is no schedule 'f1b1'"),
        (["f1b1"], "there is no schedule 'f1b1'"),
        (["1f1b", *SIZES, "--chunks", "2"], "1f1b cannot have 2 chunks"),
        (["missing.csv"], "cannot read 'missing.csv'"),
        (["1f1b", *SIZES, "--costs", "1"], "--costs '1' has 1 numbers"),
        (["1f1b", *SIZES, "--costs", "1,x"], "--costs: 'x' is no number"),
        (["1f1b", *SIZES, "--costs", "1,1/0"], "--costs: '1/0' is no number"),
        (["1f1b", *SIZES, "--costs", "1,2;1,2"], "there are costs of 2 stages"),
        (["1f1b", *SIZES, "--costs", "-1,2"], "a forward takes -1"),
        (["zero-bubble-h1", *SIZES, "--costs", "1,2"], "have no input-backward"),
        (["1f1b", *SIZES, "--link", "a-b=1"], "--link 'a-b=1' is no link"),
        (["1f1b", *SIZES, "--link", "1,2,3"], "--link '1,2,3' is no link"),
        (["1f1b", *SIZES, "--link", "1,0"], "a bandwidth is 0"),
        (["1f1b", *SIZES, "--csv", "no/where.csv"], "there is no folder 'no'"),
        (["1f1b", *SIZES, "--csv", "x.csv", "--format", "yaml"], "there is no format 'yaml'"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("show", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("ConfigError: ") and said in result.stderr


def test_sizes_that_a_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    write(build("1f1b", 2, 3), path)
    assert run("show", str(path), "--stages", "2", "--microbatches", "3").exit_code == 0
    result = run("show", str(path), "--stages", "4")
    assert result.exit_code == 2 and "--stages is 4." in result.stderr


@pytest.mark.parametrize("format", ["moerouters", "torch"])
def test_check_says_what_is_wrong(format: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    write(build("dualpipev", 2, 4), path, format=format)
    result = run("check", str(path), columns=200)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "can run: 2 ranks, 4 stages, 4 microbatches, at most 5 live activations on a rank." in result.stdout

    result = run("check", str(path), "--memory", "4")
    assert result.exit_code == 1 and "ScheduleError: with task" in result.stderr and result.stdout == ""

    text = path.read_text()
    path.write_text(text.replace("0F0,", "", 1) if format == "torch" else text.replace("0,0,0,0,forward\n", ""))
    result = run("check", str(path))
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("ScheduleError: task 0F0 is missing.")


def test_check_shows_the_circle(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n")
    result = run("check", str(path))
    assert result.exit_code == 1
    assert "rank 0, position 1: 0B0 waits for 1B0 at rank 1, position 2" in result.stderr
    assert "rank 1, position 0: 1F1 waits for 0F1 at rank 0, position 2" in result.stderr


def test_search_prints_what_it_found_beside_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "best.csv"
    result = run("search", "--stages", "2", "--microbatches", "3", "--memory", "2", "--csv", str(path), columns=120)
    assert result.exit_code == 0
    assert "zero-bubble-h1   10" in result.stdout and "1f1b             12" in result.stdout
    assert "No schedule of these stages takes less than 10, and that is reached." in result.stdout
    assert "makespan 10, bubble 10.00%" in result.stdout
    assert max(len(items) for items in check_file(path, max_live=2).ranks) == 9


def test_search_within_less_memory() -> None:
    arguments = ("search", "--stages", "3", "--microbatches", "3", "--memory", "1", "--iterations", "200")
    text = run(*arguments, "--chunks", "2", "--costs", "1,2", columns=120).stdout
    assert "search" in text.splitlines()[3] and "interleaved-1f1b, 2 chunks" in text and "whatever its memory" in text
    found = document(*arguments, "--costs", "1,2,1")
    assert (found["schedule"], found["peak_live"]) == ("search", [1, 1, 1])
    assert "ran out of time" in run(*arguments, "--costs", "1,2,1", "--seconds", "0").stdout
    result = run(*arguments[:-2], "--memory", "1/2")
    assert result.exit_code == 1 and "no schedule fits in 1/2 live activations" in result.stderr
