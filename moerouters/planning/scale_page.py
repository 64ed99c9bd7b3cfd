"""docs/scale.md, its JSON and its pictures.

    python -m moerouters.planning.scale_page measure docs   # this machine, and real layers: benchmarks/simulate.json
    python -m moerouters.planning.scale_page project docs   # up to 65,536 ranks: benchmarks/scale.json; a minute
    python -m moerouters.planning.scale_page render docs    # the page and its pictures, from both files

`make docs` renders; a test fails when the page is stale.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moerouters.bench.rows import Stamp, stamp
from moerouters.bench.shapes import SHAPES, Shape
from moerouters.lab.files import write_text
from moerouters.lab.pages import markdown_table, with_part
from moerouters.lab.pictures import STYLE
from moerouters.lab.showcase import fingerprint
from moerouters.planning.calibrate import RANKS, Measured, best_of, fitted, measure_here
from moerouters.planning.cluster import PRESETS, Cluster
from moerouters.planning.load_models import load_models
from moerouters.planning.ranks import on_ranks
from moerouters.planning.simulate_pictures import draw
from moerouters.planning.simulation import Estimate, Scenario, Simulation, simulate, winners
from moerouters.planning.validation import Compared, Timed, compare, time_layers

_H100, _V100 = PRESETS["h100-nvl8-ib400"], PRESETS["v100-nvl8-ib100"]
_MEASURED = "benchmarks/compare-tiny.json"
"""Whose MaxVio stands for the balancers."""
_MEDIUM = Shape(name="gpt3-medium-64", T=2048, D=1024, E=64, K=1, F=4096, layers=1)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Projections(_Record):
    """docs/benchmarks/scale.json."""

    schema_version: Literal[1] = 1
    simulations: dict[str, Simulation]


class Held(_Record):
    """docs/benchmarks/simulate.json: this machine, and the formulas held against real layers on it."""

    schema_version: Literal[1] = 1
    run: Stamp
    passes: int
    """Of which the best of each number is kept."""
    measured: tuple[Measured, ...]
    cluster: Cluster
    compared: tuple[Compared, ...]


def scenarios(docs: Path) -> dict[str, Scenario]:
    """What the page shows, by name of its section."""
    even_and_not = tuple(load_models("uniform,lognormal:max_vio=0.5"))
    wide = Scenario(
        cluster=_H100,
        shape=SHAPES["deepseek-v3"],
        worlds=(8, 64, 512, 4096, 65536),
        loads=tuple(load_models(f"uniform,{docs / _MEASURED}")),
        most_nodes=4,
        layers=58,
    )
    return {
        "experts-fixed": wide,
        "experts-grow": replace(wide, grow=True, loads=even_and_not, most_nodes=None, worlds=(256, 2048, 16384, 65536)),
        "chance": replace(wide, group=64, worlds=(4096,), loads=tuple(load_models(_VIOS)), backends=("all_to_all",)),
        "placed": replace(
            wide, group=64, worlds=(4096,), loads=tuple(load_models(_VIOS)), backends=("all_to_all",), placed=True
        ),
        "ppmoe": Scenario(
            cluster=_V100,
            shape=_MEDIUM,
            worlds=(8, 32, 64, 512, 4096),
            loads=even_and_not,
            backends=("all_to_all", "hierarchical", "padded", "tensor_sliced"),
            layers=12,
        ),
    }


_VIOS = ",".join(f"lognormal:max_vio={vio:g}" for vio in (0.1, 0.2, 0.5, 1, 2, 4))


def measure(docs: Path, note: str, passes: int) -> None:
    """Write benchmarks/simulate.json: the best of so many passes, since others may be at work on the machine."""
    worlds: dict[int, Measured] = {}
    layers: dict[tuple[str, int, str], Timed] = {}
    for _ in range(passes):
        for ranks in RANKS:
            found = on_ranks(measure_here, ranks, "cpu")[0]
            worlds[ranks] = best_of(worlds.get(ranks, found), found)
        for each in time_layers():
            key = each.shape.name, each.ranks, each.backend
            before = layers.get(key, each)
            layers[key] = replace(
                each, forward_s=min(each.forward_s, before.forward_s), both_s=min(each.both_s, before.both_s)
            )
    cluster = fitted(list(worlds.values()), device="cpu", name="gloo-here")
    held = Held(
        run=stamp(kind="cpu", threads=1, note=note),
        passes=passes,
        measured=tuple(worlds.values()),
        cluster=cluster,
        compared=tuple(compare(cluster, list(layers.values()), number_bytes=4)),
    )
    write_text(docs / "benchmarks" / "simulate.json", _rounded(held))


def project(docs: Path) -> None:
    """Write benchmarks/scale.json."""
    found = Projections(simulations={name: simulate(each) for name, each in scenarios(docs).items()})
    write_text(docs / "benchmarks" / "scale.json", _rounded(found))


def render(docs: Path) -> None:
    """Write the generated parts of scale.md, and its pictures."""
    import matplotlib

    source = (docs / "benchmarks" / "scale.json").read_bytes()
    found = Projections.model_validate_json(source)
    for name in PICTURED:
        path = docs / "images" / f"scale-{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": "moerouters"}):
            metadata = {"Date": None, "Description": fingerprint(source)}
            draw(found.simulations[name]).savefig(path, format="svg", bbox_inches="tight", metadata=metadata)
    page = docs / "scale.md"
    write_text(page, rendered(page.read_text(encoding="utf-8"), docs))


PICTURED = ("experts-fixed", "experts-grow", "ppmoe")


def rendered(page: str, docs: Path) -> str:
    """The page with what the committed JSON says between its marks."""
    found = Projections.model_validate_json((docs / "benchmarks" / "scale.json").read_bytes())
    held = Held.model_validate_json((docs / "benchmarks" / "simulate.json").read_bytes())
    parts = {name: _section(name, found.simulations[name]) for name in PICTURED}
    parts["placed"] = _placed(found.simulations["chance"], found.simulations["placed"])
    parts["held"] = _held(held)
    parts["clusters"] = markdown_table(
        ("cluster", "where its numbers are from"), [(f"`{c.name}`", c.source) for c in PRESETS.values()]
    )
    for mark, content in parts.items():
        page = with_part(page, f"scale:{mark}", content)
    return page


def _section(name: str, found: Simulation) -> str:
    shape = found.shape
    sizes = f"T {shape.T} tokens a rank, D {shape.D}, E {shape.E}, K {shape.K}, F {shape.F}"
    most = f", a token on at most {found.most_nodes} nodes" if found.most_nodes else ""
    kind = f"`{found.cluster.name}`, {8 * found.number_bytes} bits"
    head = f"{kind}; {sizes}{most}; {found.layers} layers; seed {found.seed}."
    worlds = sorted({each.ranks for each in found.estimates})
    best = winners(found)
    rows = [
        (f"`{load}`", *(_best(best.get((load, world))) for world in worlds))
        for load in dict.fromkeys(each.load for each in found.estimates)
    ]
    table = markdown_table(("load", *(f"{world:,} ranks" for world in worlds)), rows)
    picture = f"![Projected time of a layer, the fastest back-end, and idle time](images/scale-{name}.svg)"
    told = "The fastest back-end that fits and drops at most 1% of the pairs, its ms both ways, and idle in it:"
    return f"{head}\n\n{picture}\n\n{told}\n\n{table}"


def _best(each: Estimate | None) -> str:
    if each is None:
        return "none"
    ms = f"{each.total_ms:.3g}" if each.total_ms < 1000 else f"{each.total_ms:,.0f}"
    return f"{each.backend} {ms}, {each.stage_ms('idle') / each.total_ms:.0%}"


def _placed(chance: Simulation, placed: Simulation) -> str:
    """What placing experts takes from the idle time, by MaxVio."""
    rows = []
    for before, after in zip(chance.estimates, placed.estimates, strict=True):
        rows.append(
            (
                before.load.partition("=")[2],
                f"{before.imbalance:.2f}",
                f"{before.stage_ms('idle') / before.total_ms:.0%}",
                f"{after.imbalance:.2f}",
                f"{after.stage_ms('idle') / after.total_ms:.0%}",
                f"{before.total_ms / after.total_ms:.2f}",
            )
        )
    titles = ("MaxVio of experts", "rank load, by chance", "idle", "rank load, placed", "idle", "faster by")
    return markdown_table(titles, rows)


def _held(held: Held) -> str:
    run, cluster = held.run, held.cluster
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if name in ("python", "torch"))
    note = f" **{run.note}**" if run.note else ""
    machine = f"{run.device}, which does the work of {cluster.processors:.2g} ranks at a time"
    head = f"{run.date}, {machine}; {versions}. Best of {held.passes} passes.{note}"
    errors = [abs(each.error) for each in held.compared]
    within = sum(error <= 0.3 for error in errors)
    middle = sorted(errors)[len(errors) // 2]
    told = f"{within} of {len(errors)} are within 30%; the middle one is {middle:.0%} off, the worst {max(errors):.0%}."
    backends = list(dict.fromkeys(each.backend for each in held.compared))
    rows = []
    for shape in dict.fromkeys(each.shape for each in held.compared):
        for ranks in sorted({each.ranks for each in held.compared}):
            cells = {e.backend: e for e in held.compared if (e.shape, e.ranks) == (shape, ranks)}
            rows.append((shape, str(ranks), *(_error(cells.get(name)) for name in backends)))
    sizes = "; ".join(
        f"{name}: T {s['T']}, D {s['D']}, E {s['E']}, K {s['K']}, F {s['F']}"
        for name, s in {each.shape: each.sizes for each in held.compared}.items()
    )
    table = markdown_table(("layer", "ranks", *(f"`{name}`" for name in backends)), rows)
    return f"{head}\n\n{told}\n\n{table}\n\nms measured, and the simulated time's error. {sizes}; float32."


def _error(each: Compared | None) -> str:
    return "" if each is None else f"{each.measured_ms[1]:.3g}, {each.error:+.0%}"


def _rounded(record: BaseModel) -> str:
    """JSON with four digits of every number: more say nothing."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value] if isinstance(value, list) else value

    return json.dumps(short(record.model_dump(mode="json", by_alias=True)), indent=None) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The commands of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m moerouters.planning.scale_page")
    parser.add_argument("command", choices=("measure", "project", "render"))
    parser.add_argument("docs", type=Path)
    parser.add_argument("--note", default="", help="a remark that is kept with what was measured")
    parser.add_argument("--passes", type=int, default=3, help="to measure, the best of them counts")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        measure(options.docs, options.note, options.passes)
    elif options.command == "project":
        project(options.docs)
    else:
        render(options.docs)


if __name__ == "__main__":
    main()
