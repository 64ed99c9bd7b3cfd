"""What a user types as `key=value`, and lists of routers such as `topk,bip:iterations=8;variant=published`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from moerouters.errors import ConfigError

_OPENING, _CLOSING = "[{(", "]})"


def parse_value(text: str) -> Any:
    """A JSON value (8, 0.1, true, null, [1, 2]); what is no JSON is the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_changes(items: Iterable[str], *, where: str) -> dict[str, Any]:
    """{'steps': 100} of ['steps=100']. Raises ConfigError for an item without '=' and for a name given twice."""
    changes: dict[str, Any] = {}
    for item in items:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name:
            raise ConfigError(f"cannot read {item!r}.", where=where, why="it is not name=value", fix="write name=value")
        if name in changes:
            raise ConfigError(f"{name!r} is given twice.", where=where, why="one of them would be lost", fix="drop one")
        changes[name] = parse_value(value)
    return changes


def parse_routers(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, name, config overrides) of every item; the label is the item as typed."""
    parsed = []
    for item in _split(text, ","):
        name, _, changes = item.partition(":")
        parsed.append((item, name.strip(), parse_changes(_split(changes, ";"), where=f"--routers {item}")))
    if not parsed:
        raise ConfigError("--routers names no router.", why="the list is empty", fix="write --routers topk,bip")
    return parsed


def label(name: str, config: dict[str, Any]) -> str:
    """The item that `parse_routers` would read as this name and config."""
    changes = ";".join(f"{key}={_written(value)}" for key, value in config.items())
    return f"{name}:{changes}" if changes else name


def _written(value: Any) -> str:
    return value if isinstance(value, str) and parse_value(value) == value else json.dumps(value)


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators, none of which stands inside brackets or quotes; empty parts are left out."""
    parts, depth, quoted = [""], 0, False
    for position, letter in enumerate(text):
        if letter == '"' and text[position - 1 : position] != "\\":
            quoted = not quoted
        depth += 0 if quoted else (letter in _OPENING) - (letter in _CLOSING)
        if letter == separator and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
