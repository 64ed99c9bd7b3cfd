"""The command `moerouters inspect` behind its options: everything is checked, then read, then reported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text as Line

from moerouters.errors import ConfigError
from moerouters.inspecting.expert_loads import loads_on
from moerouters.inspecting.inspect_console import print_loads, print_routers
from moerouters.inspecting.inspection import Inspection, inspect_routers
from moerouters.inspecting.sources import OpenModel, quietly, require_transformers, source
from moerouters.inspecting.text import TOKENS, Text, read_text
from moerouters.lab.files import write_text
from moerouters.lab.job import choose_device
from moerouters.lab.report import require_report_extra


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What the user typed."""

    model: str
    text: Path | None = None
    tokens: int | None = None
    config_only: bool = False
    device: str = "auto"
    json: Path | None = None
    html: Path | None = None
    picture: Path | None = None


def run_inspect(options: InspectOptions) -> Inspection:
    """Do it, print it and write the files that were asked for."""
    _check(options)
    console = make_console()
    with quietly():
        opened, text = _open(options)
        inspection = Inspection(
            model=opened.source.name,
            architecture=type(opened.model).__name__,
            transformers=require_transformers().__version__,
            weights=opened.weights,
            missing=opened.missing,
            routers=inspect_routers(opened.model, opened.alike),
        )
        print_routers(console, inspection)
        if text is not None:
            inspection = inspection.model_copy(update={"loads": loads_on(opened, text)})
    if inspection.loads is not None:
        print_loads(console, inspection.loads, show_map=options.html is None and options.picture is None)
    _write(options, inspection, console)
    return inspection


def make_console() -> Console:
    """Standard output; wide enough for a table where no terminal says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _check(options: InspectOptions) -> None:
    needing = {"--picture": options.picture, "--tokens": options.tokens}
    for option, given in needing.items():
        if given is not None and options.text is None:
            raise ConfigError(f"{option} needs --text.", why="without a text there are no loads", fix="add --text FILE")
    if options.text is not None and options.config_only:
        raise ConfigError(
            "--text and --config-only exclude each other.", why="random weights route at random", fix="drop one"
        )
    if options.html is not None or options.picture is not None:
        require_report_extra()


def _open(options: InspectOptions) -> tuple[OpenModel, Text | None]:
    found = source(options.model)
    if options.text is not None:
        text = read_text(options.text, found, options.tokens or TOKENS)
        return found.open(choose_device(options.device)), text
    # A hub name would download every weight for what a config says almost as well.
    local = Path(options.model).exists()
    return (found.open() if found.has_weights and local and not options.config_only else found.outline()), None


def _write(options: InspectOptions, inspection: Inspection, console: Console) -> None:
    from moerouters.lab.inspect_report import write_page, write_picture

    written: list[tuple[str, Path]] = []
    if options.json is not None:
        write_text(options.json, inspection.model_dump_json(indent=2) + "\n")
        written.append(("JSON", options.json))
    if options.picture is not None and inspection.loads is not None and inspection.loads.layers:
        write_picture(inspection.loads, options.picture)
        written.append(("picture", options.picture))
    if options.html is not None:
        beside = write_page(inspection, options.html)
        written.append(("page", options.html))
        if beside is not None:
            written.append(("picture", beside))
    for kind, path in written:
        console.print(Line(f"{kind}: {path}"), soft_wrap=True)
