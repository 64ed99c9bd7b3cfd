"""What `moerouters inspect` writes beside its table: the load of every expert as a picture, and a page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moerouters.inspecting.inspection import Inspection, TextLoads, folded, pattern, ranges
from moerouters.lab.files import atomic_path, write_text
from moerouters.lab.pictures import STYLE
from moerouters.lab.report import require_report_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_picture(loads: TextLoads, path: Path) -> None:
    """The heat map of the loads as a PNG."""
    require_report_extra()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = draw_load_map(loads)
        with atomic_path(path) as partial:
            figure.savefig(partial, format="png", bbox_inches="tight", metadata={"Software": None})


def draw_load_map(loads: TextLoads) -> Figure:
    """A row per layer, a column per expert: load over the mean, on a log scale."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    experts = max(len(layer.load) for layer in loads.layers)
    relative_LE = np.full((len(loads.layers), experts), np.nan)
    for row, layer in enumerate(loads.layers):
        load_E = np.asarray(layer.load, dtype=np.float64)
        relative_LE[row, : len(load_E)] = load_E / max(load_E.mean(), 1e-9)
    figure = Figure(figsize=(9.5, 1.6 + min(0.22 * len(loads.layers), 9.0)))
    axes = figure.subplots()
    image = axes.imshow(
        np.log2(np.clip(relative_LE, 2.0**-4, 2.0**4)),
        aspect="auto",
        interpolation="nearest",
        cmap="PuOr_r",
        norm=Normalize(-2, 2),
    )
    axes.grid(False)
    shown = range(0, len(loads.layers), -(-len(loads.layers) // 30))
    names = [layer.name if layer.layer is None else str(layer.layer) for layer in loads.layers]
    axes.set_yticks(list(shown), [names[row] for row in shown])
    axes.set(xlabel="expert", ylabel="layer", title=f"{loads.text}, {loads.tokens} tokens")
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], extend="both", fraction=0.04, pad=0.02)
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("load / mean load")
    return figure


def write_page(inspection: Inspection, path: Path) -> Path | None:
    """One HTML file that opens without a network; returns the picture that lies beside it, if there are loads."""
    require_report_extra()
    import jinja2

    picture: Path | None = None
    if inspection.loads is not None and inspection.loads.layers:
        picture = path.with_suffix(".png")
        write_picture(inspection.loads, picture)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moerouters.lab", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = [
        {
            "layers": ranges([row.layer for row in rows if row.layer is not None]) or "-",
            "name": rows[0].name if len(rows) == 1 else pattern(rows[0].name),
            "first": rows[0],
        }
        for rows in folded(inspection.routers)
    ]
    content = environment.get_template("inspect.html.j2").render(
        inspection=inspection,
        rows=rows,
        picture=None if picture is None else base64.b64encode(picture.read_bytes()).decode(),
    )
    write_text(path, content)
    return picture
