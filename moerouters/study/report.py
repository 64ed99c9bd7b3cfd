"""report.html of a study: one file with everything in it, which opens without a network and begins with the answer."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from moerouters.lab.report import render_report, require_report_extra
from moerouters.study.answer import answer, seeds_told
from moerouters.study.pictures import draw_all
from moerouters.study.results import PARTS, StudyResults
from moerouters.study.table import COLUMNS, DETAILS, cells, communication, interval


def write_report(results: StudyResults, folder: Path) -> Path:
    """Draw the pictures into folder/pictures and write folder/report.html; returns its path."""
    require_report_extra()
    pictures = draw_all(results, folder)
    return render_report("moerouters.study", _content(results, pictures), folder)


def _content(results: StudyResults, pictures: dict[str, Path]) -> dict[str, Any]:
    return {
        "results": results,
        "answer": answer(results),
        "seeds": seeds_told(results.plan.seeds),
        "tables": [_table(results, "Models", COLUMNS), _table(results, "Equal shape and inference", DETAILS)],
        "parts": [part for part in PARTS if any(part in m.anatomy.parts_ms for m in results.models if m.anatomy)],
        "interval": interval,
        "communication": communication,
        "problems": [
            *((f"{run.model}, seed {run.seed}", run.error) for run in results.runs if run.error),
            *((model.name, model.match.why) for model in results.models if model.match and model.match.why),
            *((f"{model.name}: no anatomy", model.anatomy_failed) for model in results.models if model.anatomy_failed),
        ],
        "pictures": {title: base64.b64encode(path.read_bytes()).decode() for title, path in pictures.items()},
        "environment": results.environment.model_dump(),
    }


def _table(results: StudyResults, title: str, columns: Any) -> dict[str, Any]:
    return {"title": title, "columns": columns, "rows": [cells(results, model, columns) for model in results.models]}
