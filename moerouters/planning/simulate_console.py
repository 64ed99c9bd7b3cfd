"""How `moerouters simulate` shows a Simulation in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text as Line

from moerouters.bench.tables import aligned
from moerouters.inspecting.inspect_console import table
from moerouters.planning.simulation import MOST_DROPPED, STAGES, Estimate, Simulation, winners
from moerouters.planning.validation import Compared


def print_simulation(console: Console, found: Simulation) -> None:
    """A row per number of ranks, load and back-end, the fastest marked."""
    shape, cluster = found.shape, found.cluster
    sizes = f"T {shape.T} a rank, D {shape.D}, E {shape.E}, K {shape.K}, F {shape.F}, {8 * found.number_bytes} bits"
    console.print(Line(f"{cluster.name}: {sizes}; {found.layers} layers between steps of the optimizer"))
    console.print(Line(cluster.source), style="dim")
    best = winners(found)
    stages = [name for name in STAGES if any(each.stage_ms(name) for each in found.estimates)]
    columns = ("ranks", "group", "load", "back-end", "forward", "backward", *stages, "imbalance", "dropped", "GB")
    rows = []
    for each in found.estimates:
        mark = " *" if best.get((each.load, each.ranks)) == each else "" if each.fits else " !"
        rows.append(_cells(each, mark, stages))
    # Wider than a terminal may be: lines may break, numbers may not.
    console.print(Line(aligned(columns, rows)), soft_wrap=True)
    told = (
        "Milliseconds of one layer; stages are those of forward and backward together. idle: what uneven loads add. "
        "imbalance: rows of the slowest rank over the mean. GB: weights of a layer's experts on a rank. "
        f"* is the fastest that fits and drops no more than {MOST_DROPPED:.0%}."
    )
    console.print(Line(told), style="dim")
    if not all(each.fits for each in found.estimates):
        console.print(Line("! the weights of all layers' experts alone exceed the memory of a rank."), style="yellow")
    for what, why in found.left_out.items():
        console.print(Line(f"left out, {what}: {why}"), style="yellow")


def print_compared(console: Console, rows: Sequence[Compared]) -> None:
    """Measured layers beside simulated ones."""
    shown = table(("layer", "ranks", "back-end", "measured ms", "simulated", "error"))
    for each in rows:
        shown.add_row(
            Line(each.shape),
            str(each.ranks),
            each.backend,
            f"{each.measured_ms[1]:.2f}",
            f"{each.simulated_ms[1]:.2f}",
            f"{each.error:+.0%}",
        )
    console.print(shown)
    console.print(Line("Forward and backward of one layer, with the rows that its slowest rank had."), style="dim")


def _cells(each: Estimate, mark: str, stages: Sequence[str]) -> list[str]:
    return [
        f"{each.ranks}",
        f"{each.group}",
        each.load,
        each.backend + mark,
        *(f"{value:.3g}" for value in (each.forward.total, each.backward.total, *map(each.stage_ms, stages))),
        f"{each.imbalance:.2f}",
        f"{each.dropped:.1%}" if each.backend == "padded" else "",
        f"{each.weights_bytes / 1e9:.2f}",
    ]
