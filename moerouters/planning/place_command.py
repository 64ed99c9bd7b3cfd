"""The command `moerouters place` behind its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text as Line

from moerouters.errors import ConfigError
from moerouters.inspecting.inspect_command import make_console
from moerouters.inspecting.inspect_console import table
from moerouters.lab.files import atomic_path, write_text
from moerouters.planning.loads import LoadHistory, read_loads
from moerouters.planning.packing import Room
from moerouters.planning.place_report import Balance, PlacementReport, report, split
from moerouters.planning.placing import ALGORITHMS, CHOICE, choose, place, place_all, placement_map


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """What the user typed."""

    loads: Path
    ranks: int
    nodes: int = 1
    replicas: int = 0
    groups: int = 1
    algorithm: str = CHOICE
    steps: int | None = None
    held_out: float = 0.5
    output: Path | None = None
    json: Path | None = None
    picture: Path | None = None


def run_place(options: PlaceOptions) -> PlacementReport:
    """Judge all algorithms, print the table and write what was asked for: the map is made from all steps."""
    _check(options)
    history = read_loads(options.loads, steps=options.steps)
    room = room_of(options, history)
    seen, later = split(history, options.held_out)
    made = place_all(seen, room)
    chosen = choose(seen, room) if options.algorithm == CHOICE else options.algorithm
    judged = report(seen, later, room, made, chosen=chosen)
    console = make_console()
    print_report(console, judged)
    written: list[tuple[str, Path]] = []
    if options.output is not None:
        note = f"{chosen}, from {history.steps} steps of {history.source}"
        final = placement_map(place(history, room, chosen), room, note=note)
        with atomic_path(options.output) as partial:
            final.save(partial)
        written.append(("map", options.output))
    if options.json is not None:
        write_text(options.json, judged.model_dump_json(indent=2) + "\n")
        written.append(("JSON", options.json))
    if options.picture is not None:
        from moerouters.planning.place_picture import write_picture

        write_picture(later or seen, made, judged, options.picture)
        written.append(("picture", options.picture))
    for kind, path in written:
        console.print(Line(f"{kind}: {path}"), soft_wrap=True)
    return judged


def room_of(options: PlaceOptions, history: LoadHistory) -> Room:
    """Every layer gets the places of the widest. Raises ConfigError where layers differ and there would be unequal
    numbers of replicas."""
    sizes = {loads_SE.shape[1] for loads_SE in history.layers.values()}
    if len(sizes) > 1:
        raise ConfigError(
            f"layers have different numbers of experts: {sorted(sizes)}.",
            where=history.source,
            why="one number of places is laid out for all of them",
            fix="place the layers of each kind apart",
        )
    places = sizes.pop() + options.replicas
    return Room(ranks=options.ranks, nodes=options.nodes, places=places, groups=options.groups)


def print_report(console: Console, judged: PlacementReport) -> None:
    """The table, and what it says of the history."""
    over = f"{judged.ranks} ranks" + (f" on {judged.nodes} nodes" if judged.nodes > 1 else "")
    size = f"{judged.layers} layers, {judged.places} places on {over}, {judged.replicas} replicas a layer"
    console.print(Line(f"{judged.source}: {size}"))
    held_out = judged.steps_held_out > 0
    columns = ["placement", "seen mean", "p99"]
    columns += ["held-out mean", "p99", "worst", "captured"] if held_out else []
    columns += ["nodes mean"] if held_out and judged.nodes > 1 else []
    shown = table(columns)
    for each in judged.algorithms:
        cells = [*_cells(each.seen)[:2]]
        if each.held_out is not None:
            cells += [*_cells(each.held_out), "" if each.captured is None else f"{each.captured:.0%}"]
        if each.nodes_held_out is not None:
            cells.append(f"{each.nodes_held_out.mean:.3f}")
        mark = " *" if each.algorithm == judged.chosen else ""
        shown.add_row(Line(each.algorithm + mark), *cells)
    console.print(shown)
    told = (
        "Largest rank load over the mean, over layers and steps: by how much experts make a step longer. "
        f"{judged.steps_seen} steps seen, {judged.steps_held_out} held out. * is chosen."
    )
    console.print(Line(told), style="dim")
    if judged.trust is not None:
        console.print(Line(_trusted(judged)))
    if judged.replicas:
        console.print(Line("Replicas serve; to train with them, gradients of replicas would have to be added up."))


def _trusted(judged: PlacementReport) -> str:
    moved = f"{judged.drift:.1%} of the load is at other experts in the held-out steps"
    if judged.drift_within is not None:
        moved += f", {judged.drift_within:.1%} by chance alone"
    says = {
        "yes": "The history predicts the later steps",
        "in part": "The history predicts the later steps in part",
        "no": "The history does not predict the later steps: place anew often, or not at all",
        "nothing to gain": "Contiguous experts are balanced already: no placement gains 1%",
        None: "",
    }[judged.trust]
    return f"{says}. {moved}."


def _cells(balance: Balance) -> tuple[str, str, str]:
    return f"{balance.mean:.3f}", f"{balance.p99:.3f}", f"{balance.worst:.3f}"


def _check(options: PlaceOptions) -> None:
    if options.algorithm not in (*ALGORITHMS, CHOICE):
        raise ConfigError(
            f"there is no placement '{options.algorithm}'.",
            where="--algorithm",
            why=f"there is: {', '.join((CHOICE, *ALGORITHMS))}",
            fix=f"--algorithm {CHOICE}",
        )
    if options.picture is not None:
        from moerouters.lab.report import require_report_extra

        require_report_extra()
