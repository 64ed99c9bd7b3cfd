"""What `moerouters pipeline` does with its arguments: numbers out of texts, files and the terminal for results."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console

from moerouters.errors import ConfigError
from moerouters.pipeline.builders import BUILDERS, build
from moerouters.pipeline.console import number, print_gantt, summary
from moerouters.pipeline.costs import Link, Network, Number, StageCost
from moerouters.pipeline.formats import read, write
from moerouters.pipeline.schedule import Schedule
from moerouters.pipeline.searching import Candidate, Found
from moerouters.pipeline.simulate import Simulation

STDOUT = Path("-")
_PAIR = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a simulated schedule goes, beside the terminal."""

    svg: Path | None = None
    png: Path | None = None
    json: Path | None = None
    """STDOUT: nothing else is printed."""
    csv: Path | None = None
    csv_format: str = "moerouters"

    @property
    def quiet(self) -> bool:
        """Whether standard output is for the JSON document alone."""
        return self.json == STDOUT

    def check(self) -> None:
        """Raise ConfigError now for a folder that is not there, before anything long is done."""
        for path in (self.svg, self.png, self.json, self.csv):
            if path is not None and not path.parent.is_dir():
                raise ConfigError(f"there is no folder '{path.parent}'.", where=str(path), fix="make it first")

    def give(self, simulation: Simulation) -> None:
        """Draw it in the terminal, and write the files that are wanted."""
        text = json.dumps(document(simulation), indent=1)
        if self.quiet:
            print(text)
        else:
            console = Console()
            console.print(summary(simulation), highlight=False, soft_wrap=True)
            print_gantt(console, simulation)
        if self.json is not None and not self.quiet:
            self.json.write_text(text + "\n", encoding="utf-8")
        if self.csv is not None:
            write(simulation.schedule, self.csv, format=self.csv_format)
        if self.svg is not None or self.png is not None:
            from moerouters.pipeline.gantt import draw

            if self.svg is not None:
                draw(simulation, self.svg, format="svg")
            if self.png is not None:
                draw(simulation, self.png, format="png")


def document(simulation: Simulation) -> dict[str, Any]:
    """What `--json` gives: integers where times are whole, floats where they are not."""
    schedule = simulation.schedule
    return {
        "schedule": schedule.name,
        "ranks": schedule.num_ranks,
        "stages": schedule.num_stages,
        "microbatches": schedule.num_microbatches,
        "makespan": _plain(simulation.makespan),
        "bubble": float(simulation.bubble),
        "peak_live": list(simulation.peak_live),
        "tasks": [
            {
                "rank": entry.rank,
                "stage": entry.task.stage,
                "microbatch": entry.task.microbatch,
                "kind": entry.task.kind.value,
                "start": _plain(entry.start),
                "end": _plain(entry.end),
            }
            for entry in simulation.tasks
        ],
    }


def schedule_of(text: str, *, num_ranks: int | None, num_microbatches: int | None, chunks: int | None) -> Schedule:
    """A known schedule of these sizes, or the one in a file. Raises ConfigError."""
    path = Path(text)
    if text not in BUILDERS and (path.suffix == ".csv" or path.is_file()):
        schedule = read(path)
        sizes = {
            "--stages": (num_ranks, schedule.num_ranks),
            "--microbatches": (num_microbatches, schedule.num_microbatches),
        }
        for option, (wanted, there) in sizes.items():
            if wanted not in (None, there):
                raise ConfigError(f"{option} is {wanted}.", why=f"'{text}' has {there}", fix="leave the option out")
        return schedule
    if text in BUILDERS and (num_ranks is None or num_microbatches is None):
        raise ConfigError(
            f"how large is {text}?", why="a schedule has ranks and microbatches", fix="--stages 4 --microbatches 8"
        )
    return build(text, num_ranks or 1, num_microbatches or 1, chunks)


def costs_of(text: str) -> StageCost | tuple[StageCost, ...]:
    """`F,I,W`, `F,B` or `F,I,W,B`: one for all stages, or one for each with `;` between them."""
    groups = [_stage_cost(group) for group in text.split(";")]
    return groups[0] if len(groups) == 1 else tuple(groups)


def network_of(links: list[str], size: str) -> Network:
    """`LATENCY[,BANDWIDTH]` between all ranks, `A-B=LATENCY[,BANDWIDTH]` from rank A to rank B."""
    everywhere, some = Link(), {}
    for text in links:
        pair, sign, told = text.rpartition("=")
        values = [exact(part, "--link") for part in told.split(",")]
        found = _PAIR.fullmatch(pair)
        if (sign and found is None) or len(values) > 2:
            raise ConfigError(
                f"--link {text!r} is no link.", why="it is [A-B=]LATENCY[,BANDWIDTH]", fix="for instance 0-1=0.5,100"
            )
        link = Link(latency=values[0], bandwidth=values[1] if len(values) == 2 else None)
        if found is None:
            everywhere = link
        else:
            some[int(found[1]), int(found[2])] = link
    return Network(link=everywhere, links=some, size=exact(size, "--size"))


def exact(text: str, option: str) -> int | Fraction:
    """A number as it is written, without rounding. Raises ConfigError."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{option}: {text!r} is no number.", why=str(error), fix="for instance 2, 0.5 or 1/3"
        ) from error
    return int(value) if value.denominator == 1 else value


def found_rows(found: Found) -> list[tuple[str, ...]]:
    """A row for what a search found, if it is none of the known schedules, and one for each of those."""
    entries = found.builders if found.best in found.builders else (found.best, *found.builders)
    return [_row(entry) for entry in entries]


def found_lines(found: Found) -> list[str]:
    """What else there is to say of a search."""
    lines = []
    if found.lower_bound is not None:
        reached = (
            "and that is reached" if found.best.simulation.makespan <= found.lower_bound else "whatever its memory"
        )
        lines.append(f"No schedule of these stages takes less than {number(found.lower_bound)}, {reached}.")
    if not found.ended:
        lines.append("The search ran out of time: another run may find another schedule.")
    return lines


def _row(entry: Candidate) -> tuple[str, ...]:
    chunks = f", {entry.num_chunks} chunks" if entry.num_chunks > 1 else ""
    return (
        entry.schedule.name + chunks,
        number(entry.simulation.makespan),
        f"{float(entry.simulation.bubble):.2%}",
        number(entry.peak),
        "yes" if entry.fits else "no",
    )


def _stage_cost(text: str) -> StageCost:
    values = [exact(part, "--costs") for part in text.split(",")]
    match values:
        case [forward, backward]:
            return StageCost(forward=forward, backward=backward, input_backward=None, weight_backward=None)
        case [forward, inputs, weights]:
            return StageCost(forward=forward, input_backward=inputs, weight_backward=weights)
        case [forward, inputs, weights, backward]:
            return StageCost(forward=forward, input_backward=inputs, weight_backward=weights, backward=backward)
    raise ConfigError(
        f"--costs {text!r} has {len(values)} numbers.", why="they are F,I,W or F,B", fix="for instance 1,1,1"
    )


def _plain(value: Number) -> int | float:
    return int(value) if value == int(value) else float(value)
