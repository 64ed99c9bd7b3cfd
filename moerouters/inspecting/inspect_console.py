"""How `moerouters inspect` shows what it found in a terminal: tables, and the load of every expert as a map."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moerouters.inspecting.inspection import Inspection, LayerLoad, RouterRow, TextLoads, folded, pattern, ranges
from moerouters.inspecting.text import BYTES

_TOLD = "module; gating as read, or reason"
_TEXTS = ("layers", "router", "state", _TOLD)
_LEVELS = (0.0, 0.25, 0.5, 0.8, 1.25, 2.0)
"""Bounds of load / mean load between the shades of the map."""
_BLOCKS = (" ", "\u2581", "\u2582", "\u2584", "\u2585", "\u2586", "\u2588")
_ASCII = (" ", ".", ":", "-", "=", "*", "#")


def print_routers(console: Console, inspection: Inspection) -> None:
    """One line for the routers that differ in the number of their layer only."""
    given = "its own weights" if inspection.weights == "loaded" else "random weights: only the config was read"
    console.print(Text(f"{inspection.model}: {inspection.architecture}, {given}"))
    if inspection.missing:
        first, others = inspection.missing[0], len(inspection.missing) - 1
        also = f" and {others} others" if others else ""
        console.print(Text(f"missing in the checkpoint, so random: {first}{also}"), style="yellow")
    if not inspection.routers:
        console.print(Text("It has no routers: no module beside experts that returns what routers return."))
        return
    shown = table(("layers", "router", "E", "K", "state", _TOLD))
    for rows in folded(inspection.routers):
        shown.add_row(*(Text(cell) for cell in _cells(rows)))
    console.print(shown)
    console.print(Text(f"{inspection.swappable} of {len(inspection.routers)} routers can be swapped."))


def _cells(rows: Sequence[RouterRow]) -> tuple[str, ...]:
    first = rows[0]
    layers = ranges([row.layer for row in rows if row.layer is not None]) or "-"
    name = first.name if len(rows) == 1 else pattern(first.name)
    told = first.reason if first.gating is None else first.gating
    return (
        layers,
        first.stock_class + (f"\nnow: {first.router}" if first.router else ""),
        "-" if first.num_experts is None else str(first.num_experts),
        "-" if first.top_k is None else str(first.top_k),
        first.status,
        f"{name}\n{told}",
    )


def print_loads(console: Console, loads: TextLoads, *, show_map: bool) -> None:
    """Balance per layer, and the map unless a picture was drawn."""
    console.print(Text(f"load on {loads.text}: {loads.tokens} tokens, tokenizer {loads.tokenizer}"))
    if loads.tokenizer == BYTES:
        console.print(
            Text("The model has no tokenizer, so these are loads on ids that it was not trained on."), style="yellow"
        )
    for name, reason in loads.left_out.items():
        console.print(Text(f"{name} is not counted: {reason}"), style="yellow")
    if not loads.layers:
        return
    shown = table(("layer", "MaxVio", "MinVio", "dead", "CV"))
    for layer in loads.layers:
        numbers = (f"{layer.max_vio:.3f}", f"{layer.min_vio:.3f}", str(layer.dead_experts), f"{layer.cv:.3f}")
        shown.add_row(Text(_called(layer)), *numbers)
    console.print(shown)
    if show_map:
        _print_map(console, loads)


def _print_map(console: Console, loads: TextLoads) -> None:
    shades = _BLOCKS if "utf" in console.encoding.lower() else _ASCII
    wide = max(len(_called(layer)) for layer in loads.layers)
    room = max(16, console.width - wide - 4)
    for layer in loads.layers:
        cells = "".join(shades[_level(value)] for value in _squeezed(layer.load, room))
        console.print(Text(f"{_called(layer):>{wide}} |{cells}|"), soft_wrap=True)
    bounds = ", ".join(
        f"'{shade}' {'0' if i == 0 else f'up to {_LEVELS[i]:g}' if i < len(_LEVELS) else 'more'}"
        for i, shade in enumerate(shades)
    )
    most = max(len(layer.load) for layer in loads.layers)
    joined = "" if most <= room else f"; the largest of every {-(-most // room)} experts"
    console.print(Text(f"experts from left to right{joined}; load / mean load: {bounds}"), style="dim")


def _level(relative: float) -> int:
    return sum(relative > bound for bound in _LEVELS)


def _squeezed(load: Sequence[int], room: int) -> list[float]:
    """load / mean load of each expert, or the largest of neighbours where there are more experts than places."""
    mean = sum(load) / len(load) or 1.0
    width = -(-len(load) // room)
    return [max(load[start : start + width]) / mean for start in range(0, len(load), width)]


def _called(layer: LayerLoad) -> str:
    return layer.name if layer.layer is None else str(layer.layer)


def table(columns: Sequence[str]) -> Table:
    """A table for the terminal; columns of numbers stand right."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold", justify="left" if column in _TEXTS else "right")
    return shown
