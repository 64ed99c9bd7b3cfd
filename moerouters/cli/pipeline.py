"""`moerouters pipeline`: pipeline schedules as tables, drawn, checked, simulated, and searched for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

pipeline = typer.Typer(name="pipeline", no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@pipeline.callback()
def options() -> None:
    """Draw, check, simulate and search pipeline schedules."""


Costs = Annotated[
    str,
    typer.Option(
        metavar="F,I,W|F,B",
        help="Time of a forward and of both halves of a backward (input, weight), or of a forward and a backward that "
        "cannot be split. The same in every stage, or a group for each with ; between them. 0.5 and 1/2 are exact.",
    ),
]
Links = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LATENCY[,BANDWIDTH]",
        help="A transfer between ranks takes LATENCY + size / BANDWIDTH. A-B=LATENCY,BANDWIDTH: from rank A to rank B. "
        "May be repeated. Default: 0.",
    ),
]
Size = Annotated[str, typer.Option(help="Of what one microbatch sends.")]
Svg = Annotated[Path | None, typer.Option(help="Write the chart as SVG. Needs matplotlib.")]
Png = Annotated[Path | None, typer.Option(help="Write the chart as PNG. Needs matplotlib.")]
Json = Annotated[
    Path | None,
    typer.Option(metavar="FILE|-", help="Write numbers and tasks as JSON; - prints them, and nothing else."),
]
Csv = Annotated[Path | None, typer.Option(help="Write the table.")]
CsvFormat = Annotated[str, typer.Option("--format", help="Of --csv: moerouters or torch.")]


@pipeline.command()
def show(
    schedule: Annotated[
        str,
        typer.Argument(
            metavar="SCHEDULE",
            help="gpipe, 1f1b, eager-1f1b, zero-bubble-h1, interleaved-gpipe, interleaved-1f1b, kimi-k2, dualpipev, "
            "dualpipev-filled, or a CSV file.",
        ),
    ],
    stages: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="P",
            help="Pipeline ranks. A plain schedule has one stage on each; an interleaved one has --chunks on each, "
            "dualpipev two: the model then has P * chunks stages.",
        ),
    ] = None,
    microbatches: Annotated[int | None, typer.Option(min=1, metavar="M", help="Microbatches of a step.")] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, metavar="V", help="Stages on each rank, in interleaved schedules. Default: 2.")
    ] = None,
    costs: Costs = "1,1,1",
    link: Links = None,
    size: Size = "1",
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Fused tasks run forward beside backward, not one after the other.")
    ] = False,
    svg: Svg = None,
    png: Png = None,
    json: Json = None,
    csv: Csv = None,
    csv_format: CsvFormat = "moerouters",
) -> None:
    """Draw a schedule, with its bubble and its memory."""
    from moerouters.pipeline import simulate
    from moerouters.pipeline.command import Output, costs_of, network_of, schedule_of

    output = Output(svg=svg, png=png, json=json, csv=csv, csv_format=csv_format)
    output.check()
    table = schedule_of(schedule, num_ranks=stages, num_microbatches=microbatches, chunks=chunks)
    output.give(simulate(table, costs_of(costs), network_of(link or [], size), overlap=overlap))


@pipeline.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CSV of ours, or of torch.distributed.pipelining.")],
    memory: Annotated[
        int | None, typer.Option(min=1, metavar="L", help="Activations that a rank may hold, counted in its stages.")
    ] = None,
) -> None:
    """Say whether a schedule can run.

    Exit status 0 if it can; 1 if not, with the task at fault, where it stands, and the circle of tasks that wait.
    """
    from moerouters.pipeline import check_file

    schedule = check_file(file, max_live=memory)
    live = max(live for rank in range(schedule.num_ranks) for _, _, live in schedule.live(rank))
    typer.echo(
        f"{file} can run: {schedule.num_ranks} ranks, {schedule.num_stages} stages, {schedule.num_microbatches} "
        f"microbatches, at most {live} live activations on a rank."
    )


@pipeline.command()
def search(
    stages: Annotated[
        int, typer.Option(min=1, metavar="P", help="Pipeline ranks, and stages that costs are given for.")
    ],
    microbatches: Annotated[int, typer.Option(min=1, metavar="M", help="Microbatches of a step.")],
    memory: Annotated[
        str, typer.Option(metavar="L", help="Activations that a rank may hold, each of one of the P stages.")
    ],
    costs: Costs = "1,1,1",
    link: Links = None,
    size: Size = "1",
    chunks: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="V",
            help="Try schedules of up to V chunks a rank as well: each of the P stages is then cut into as many, of "
            "the same time and memory.",
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same schedule.")] = 0,
    iterations: Annotated[int, typer.Option(min=0, help="Steps of the local search.")] = 20_000,
    seconds: Annotated[float, typer.Option(min=0, help="End after so long, with the best found by then.")] = 60.0,
    svg: Svg = None,
    png: Png = None,
    json: Json = None,
    csv: Csv = None,
    csv_format: CsvFormat = "moerouters",
) -> None:
    """Find the fastest schedule that fits in memory."""
    from moerouters.cli.output import print_table
    from moerouters.pipeline import search as search_schedules
    from moerouters.pipeline.command import Output, costs_of, exact, found_lines, found_rows, network_of

    output = Output(svg=svg, png=png, json=json, csv=csv, csv_format=csv_format)
    output.check()
    found = search_schedules(
        stages,
        microbatches,
        max_live=exact(memory, "--memory"),
        costs=costs_of(costs),
        network=network_of(link or [], size),
        max_chunks=chunks,
        seed=seed,
        iterations=iterations,
        seconds=seconds,
    )
    if not output.quiet:
        print_table(("schedule", "makespan", "bubble", "most live", "fits"), found_rows(found))
        for line in found_lines(found):
            typer.echo(line)
    output.give(found.best.simulation)
