"""The generated parts of docs/results.md: what protocols gave, and which claims of their papers it bears out.

`moerouters compare --protocol NAME --output DIR` trains, `python -m moerouters.lab.showcase record DIR
docs/benchmarks/results-NAME.json` keeps it, and `python -m moerouters.lab.results_page docs`, part of `make docs`,
writes the page. A test fails when it is stale.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moerouters.lab.claims import CLAIMS, change_percent, signed
from moerouters.lab.files import write_text
from moerouters.lab.pages import markdown_table, with_part
from moerouters.lab.showcase import Showcase, draw
from moerouters.lab.summary import COLUMNS, summarize

_SHOWN = ("perplexity", "avg_max_vio", "sup_max_vio", "max_vio_global", "min_vio")
_REFERENCES = {"bip-16": "loss-controlled:alpha=0.1", "bip-64": "loss-controlled:alpha=0.1"}
_DEFAULT_REFERENCE = "loss-controlled:alpha=0.001"


def source(docs: Path, name: str) -> Path:
    """What is kept of a protocol's comparison."""
    return docs / "benchmarks" / f"results-{name}.json"


def section(name: str, showcase: Showcase) -> str:
    """Table, picture and claims of one protocol."""
    results, settings = showcase.results, showcase.results.settings
    reference = _REFERENCES.get(name, _DEFAULT_REFERENCE)
    columns = [column for column in COLUMNS if column.metric in _SHOWN]
    summaries = summarize(results)
    by_label = {summary.label: summary.runs for summary in summaries}
    seeds = sorted({run.seed for run in results.runs})
    lines = [
        f"`moerouters compare --protocol {name}`: {settings.num_layers} layers of width {settings.hidden_size}, "
        f"E = {settings.num_experts}, K = {settings.top_k}, F = {settings.expert_size}, {settings.score} scores, "
        f"{settings.steps} steps of {settings.batch_tokens} bytes of {results.corpus.name} (sha256 "
        f"{results.corpus.sha256[:12]}), {len(seeds)} seed{'s' * (len(seeds) != 1)}; {showcase.machine}.",
        "",
    ]
    rows = []
    for summary in summaries:
        change = change_percent(summary.runs, by_label[reference])
        cells = [" ".join(summary.parts(column)) for column in columns]
        cells.insert(1, "-" if change is None or summary.label == reference else signed(change))
        rows.append([f"`{summary.label}`", *cells])
    titles = ["router", "perplexity", f"over `{reference}`, %", *(column.title for column in columns[1:])]
    lines += [markdown_table(titles, rows), "", f"![MaxVio of every training batch](images/results-{name}.svg)", ""]
    claims = [(claim.text, *claim.check(showcase)) for claim in CLAIMS[name]]
    return "\n".join([*lines, markdown_table(["the paper says", "here", ""], claims)])


def rendered(text: str, docs: Path) -> str:
    """The page with the sections of all comparisons that are kept, each between its marks."""
    for name in CLAIMS:
        path = source(docs, name)
        if not path.exists():
            body = f"Not run yet: `moerouters compare --protocol {name}`."
        else:
            body = section(name, Showcase.model_validate_json(path.read_bytes()))
        text = with_part(text, f"results: {name}", body)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Write page and pictures."""
    parser = argparse.ArgumentParser(prog="python -m moerouters.lab.results_page")
    parser.add_argument("docs", type=Path)
    docs: Path = parser.parse_args(arguments).docs
    page = docs / "results.md"
    write_text(page, rendered(page.read_text(encoding="utf-8"), docs))
    for name in CLAIMS:
        if (path := source(docs, name)).exists():
            data = path.read_bytes()
            draw(Showcase.model_validate_json(data), docs / "images" / f"results-{name}.svg", source=data)


if __name__ == "__main__":
    main()
