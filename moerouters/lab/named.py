"""Things that a user asks for by name."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from moerouters.errors import ConfigError

T = TypeVar("T")


def named(name: str, table: Mapping[str, T], *, what: str, fix: str, where: str = "") -> T:
    """The one of that name. Raises ConfigError with the nearest one, and all there are."""
    if name not in table:
        close = get_close_matches(name, table, n=1)
        raise ConfigError(
            f"no {what} named {name!r}.",
            where=where,
            why=(f"did you mean {close[0]!r}? " if close else "") + f"there are: {', '.join(table)}",
            fix=fix,
        )
    return table[name]
