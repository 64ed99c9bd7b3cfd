"""report.html: one file with everything in it, which opens without a network."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moerouters.errors import MoeroutersError
from moerouters.lab.files import write_text
from moerouters.lab.pictures import colour_of, draw_all
from moerouters.lab.results import Results
from moerouters.lab.settings import Settings
from moerouters.lab.summary import COLUMNS, summarize


def require_report_extra() -> None:
    """Raise MoeroutersError unless matplotlib and jinja2 are installed: better now than after the training."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise MoeroutersError(
            f"the report needs {' and '.join(missing)}, which is not installed.",
            why="pictures and reports come with an extra, so that a plain install stays light",
            fix='pip install "moerouters[lab]"',
        )


def write_report(results: Results, folder: Path) -> Path:
    """Draw the pictures into folder/pictures and write folder/report.html; returns its path."""
    require_report_extra()
    pictures = draw_all(results, folder)
    return render_report("moerouters.lab", _content(results, pictures), folder)


def render_report(package: str, content: Mapping[str, Any], folder: Path) -> Path:
    """Fill in the package's report.html.j2 and write folder/report.html; returns its path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = folder / "report.html"
    write_text(path, environment.get_template("report.html.j2").render(content))
    return path


def _content(results: Results, pictures: dict[str, Path]) -> dict[str, Any]:
    summaries = summarize(results)
    return {
        "results": results,
        "columns": COLUMNS,
        "rows": [
            {
                "label": summary.label,
                "colour": colour_of(summaries, summary.label)[0],
                "status": summary.status,
                "cells": [" ".join(summary.parts(column)) for column in COLUMNS],
            }
            for summary in summaries
        ],
        "summaries": summaries,
        "problems": [run for run in results.runs if run.error],
        "pictures": {title: base64.b64encode(path.read_bytes()).decode() for title, path in pictures.items()},
        "settings": {
            name: (value, Settings.model_fields[name].description or "")
            for name, value in results.settings.model_dump().items()
        },
        "environment": results.environment.model_dump(),
        "corpus": results.corpus,
    }
