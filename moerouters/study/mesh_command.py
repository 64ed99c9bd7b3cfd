"""`moerouters study --mesh` behind its options: one MoE model over the ranks of a torchrun job, and projected."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moerouters.errors import ConfigError
from moerouters.lab import corpus as corpora
from moerouters.lab.compare import environment
from moerouters.lab.job import choose_device, make_console
from moerouters.lab.ranks import joined_ranks
from moerouters.lab.report import require_report_extra
from moerouters.study.command import StudyOptions, plan_of, set_threads
from moerouters.study.contender import Contender
from moerouters.study.mesh import measure_mesh
from moerouters.study.plan import Plan
from moerouters.study.projection import project
from moerouters.study.report import write_report
from moerouters.study.results import StudyResults
from moerouters.study.table import interval


def run_mesh(options: StudyOptions) -> int:
    """Measure, project, and add both to results.json and report.html of the output folder; returns the exit status.

    The model is the first MoE model of the plan, at the size that a study in that folder found, else where its search
    would start.
    """
    require_report_extra()
    plan = plan_of(options)
    device = choose_device(options.device)
    set_threads(options.threads)
    corpus = corpora.standard_library() if options.text is None else corpora.from_path(options.text)
    with joined_ranks(device) as ranks:
        console = make_console(ranks)
        earlier = StudyResults.load(options.output)
        contender = _contender(plan, earlier)
        name = contender.spec.name
        console.print(Text(f"{name} over {ranks.size} ranks"))
        rows = measure_mesh(
            contender, seed=plan.seeds[0], corpus=corpus, device=device, ranks=ranks, rounds=plan.rounds
        )
        if ranks.first:
            results = earlier or StudyResults(
                status="completed",
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                plan=plan,
                corpus=corpus.info,
                environment=environment(device, plan.settings, ranks),
            )
            runs = results.runs_of(name)
            max_vio = next((run.avg_max_vio for run in runs.values()), None)
            projections = project(name, contender.settings, avg_max_vio=max_vio)
            results = results.model_copy(update={"mesh": tuple(rows), "projections": tuple(projections)})
            results.save(options.output)
            print_mesh(console, results)
            console.print(Text(f"report: {write_report(results, options.output)}"), soft_wrap=True)
        ranks.wait()
    return 0


def print_mesh(console: Console, results: StudyResults) -> None:
    """What was measured; projections stand in the report."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("data", "expert", "cut", "dispatcher", "step ms", "over the first", "tokens/s", "idle"):
        table.add_column(title, justify="left" if title == "dispatcher" else "right")
    for row in results.mesh:
        table.add_row(
            str(row.data),
            str(row.expert),
            str(row.cut),
            row.dispatcher,
            interval(row.ms, 1),
            interval(row.over_first, 2),
            f"{row.tokens_per_s:,.0f}",
            f"{row.idle:.0%}",
        )
    console.print(table)


def _contender(plan: Plan, earlier: StudyResults | None) -> Contender:
    specs = [spec for spec in plan.models if spec.router is not None]
    if not specs:
        raise ConfigError("there is no MoE model to spread.", where="--models", fix="name one of the preset")
    contender = Contender.of(plan, specs[0])
    known = None if earlier is None else earlier.model(contender.spec.name)
    return contender if known is None else contender.resolved(known.settings)
