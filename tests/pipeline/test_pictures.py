"""Charts, in the terminal to the letter, and in files as far as a test can see."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from moerouters.errors import MoeroutersError
from moerouters.pipeline import BUILDERS, Simulation, StageCost, Task, build, from_table, simulate
from moerouters.pipeline.console import print_gantt, summary
from moerouters.pipeline.gantt import draw, gantt
from moerouters.pipeline.look import colour


def printed(simulation: Simulation, width: int = 80, colours: Literal["truecolor"] | None = None) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=colours, force_terminal=colours is not None)
    print_gantt(console, simulation)
    return text.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_chart_without_colours_has_letters_and_dots() -> None:
    assert printed(simulate(build("1f1b", 2, 3))) == (
        "  0         5         10  \n"
        "0 F0F1....B0--F2B1--..B2--\n"
        "1 ..F0B0--F1B1--F2B2--....\n"
        " F  forward   B  backward  .  idle\n"
    )


def test_the_ruler_stands_above_the_columns() -> None:
    ruler, first, *_ = printed(simulate(build("1f1b", 2, 3))).splitlines()
    assert ruler.split() == ["0", "5", "10"]
    assert [ruler.index(mark) - 2 for mark in ("0", "5", "10")] == [0, 10, 20]  # two columns a unit of time
    assert first[2 + 2 * 4 :].startswith("B0")


def test_colours_tell_kinds_and_chunks_apart() -> None:
    schedule = build("interleaved-1f1b", 2, 4)
    text = printed(simulate(schedule), colours="truecolor")
    first, later = schedule.ranks[0][0], schedule.ranks[0][2]
    assert isinstance(first, Task) and isinstance(later, Task)
    dark, pale = colour(schedule, first), colour(schedule, later)
    assert dark != pale
    for fill, _ in (dark, pale):
        red, green, blue = (int(fill[at : at + 2], 16) for at in (1, 3, 5))
        assert f"48;2;{red};{green};{blue}m" in text
    assert "later chunk" in text
    assert "." not in plain(text).splitlines()[1]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("colours", [None, "truecolor"])
@pytest.mark.parametrize("name", BUILDERS)
def test_charts_fit_the_terminal_and_show_every_task(
    name: str, colours: Literal["truecolor"] | None, width: int
) -> None:
    simulation = simulate(build(name, 4, 8))
    lines = plain(printed(simulation, width, colours)).splitlines()
    assert max(map(len, lines)) <= width
    rows = ["".join(line[2:] for line in lines if line.startswith(f"{rank} ")) for rank in range(4)]
    for rank, row in enumerate(rows):
        texts = re.findall(r"[FBIW]\d+", row)
        assert texts == [str(e.task.kind.letter) + str(e.task.microbatch) for e in simulation.tasks if e.rank == rank]


def test_long_charts_are_cut_into_bands_and_longer_ones_squeezed() -> None:
    long = printed(simulate(build("1f1b", 4, 40)), 80, "truecolor")
    assert 2 <= sum(line.startswith("3 ") for line in plain(long).splitlines()) <= 6
    uneven = StageCost(forward=1, backward=1000)
    squeezed = plain(printed(simulate(build("1f1b", 2, 40), uneven), 80, "truecolor")).splitlines()
    assert sum(line.startswith("1 ") for line in squeezed) == 6
    assert max(map(len, squeezed)) <= 80


def test_overlapped_tasks_have_lanes() -> None:
    table = from_table([["0F0", "(0F1;0B0)", "0B1"]])
    lines = printed(simulate(table, overlap=True)).splitlines()
    assert lines[1:3] == ["0 F F0F1......", "0 B ..B0--B1--"]
    assert printed(simulate(table)).splitlines()[1] == "0 F0F1B0--B1--"


def test_nothing_to_draw() -> None:
    free = StageCost(forward=0, backward=0)
    assert "forward" in printed(simulate(build("1f1b", 2, 2), free))


def test_summary() -> None:
    assert summary(simulate(build("1f1b", 2, 3), StageCost(forward=0.5))) == (
        "1f1b: 2 ranks, 2 stages, 3 microbatches\nmakespan 10, bubble 25.00%, peak live activations 2, 1"
    )


@pytest.mark.parametrize("format", ["svg", "png"])
def test_equal_simulations_give_equal_files(format: Literal["svg", "png"], tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.{format}" for n in range(2)]
    for file in files:
        draw(simulate(build("dualpipev", 2, 4)), file, format=format)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().startswith(b"\x89PNG" if format == "png" else b"<?xml")


def test_a_figure_has_a_number_for_every_task_and_none_leaves_its_box() -> None:
    for name in ("1f1b", "interleaved-1f1b", "zero-bubble-h1", "dualpipev"):
        simulation = simulate(build(name, 4, 8))
        figure = gantt(simulation)
        figure.canvas.draw()
        axes = figure.axes[0]
        assert [text.get_text() for text in axes.texts] == [str(entry.task.microbatch) for entry in simulation.tasks]
        for text, entry in zip(axes.texts, simulation.tasks, strict=True):
            box = text.get_window_extent().transformed(axes.transData.inverted())
            assert float(entry.start) <= box.x0 and box.x1 <= float(entry.end), (name, entry)
        assert simulation.schedule.name in axes.get_title(loc="left")
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels[0] == "forward" and labels[-1] == "idle"


def test_lanes_of_overlapped_tasks_do_not_cover_each_other() -> None:
    simulation = simulate(build("dualpipev", 2, 4), overlap=True)
    axes = gantt(simulation).axes[0]
    boxes = [path.get_extents() for bars in axes.collections for path in bars.get_paths()]
    assert len(boxes) == len(simulation.tasks)
    for at, one in enumerate(boxes):
        for two in boxes[at + 1 :]:
            apart_x = one.x1 <= two.x0 + 1e-9 or two.x1 <= one.x0 + 1e-9
            assert apart_x or one.y1 <= two.y0 + 1e-9 or two.y1 <= one.y0 + 1e-9


def test_without_matplotlib_there_is_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MoeroutersError, match=r"a chart needs matplotlib(.|\n)*moerouters\[lab\]"):
        draw(simulate(build("1f1b", 2, 2)), tmp_path / "x.svg", format="svg")
