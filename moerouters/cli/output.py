"""How commands print: tables for people, one JSON document for programs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print text cells as they are: brackets in an error message are no markup. Only the last column wraps."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def plugin_output_to_stderr() -> contextlib.AbstractContextManager[object]:
    """Keep what plugins print while they are imported out of a JSON document on standard output."""
    return contextlib.redirect_stdout(sys.stderr)
