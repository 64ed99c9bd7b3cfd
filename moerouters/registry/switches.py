"""Which plugins a run may use: an allowlist and a denylist, from the environment or from the run's own config.

| variable | meaning |
|---|---|
| `MOEROUTERS_PLUGINS` | allowlist, comma separated; unset: all that are installed; empty: none |
| `MOEROUTERS_DISABLE` | denylist, comma separated |
| `MOEROUTERS_STRICT_PLUGINS` | 1: a conflict or a failed import raises at once, also in listings |

An item is a router name, or `name@distribution` where two distributions claim one name. What the config says wins over
the environment, list by list. Built-in routers are not subject to either list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from moerouters.errors import ConfigError
from moerouters.registry.discovery import PluginEntry, canonical

ALLOW_VARIABLE = "MOEROUTERS_PLUGINS"
DENY_VARIABLE = "MOEROUTERS_DISABLE"
STRICT_VARIABLE = "MOEROUTERS_STRICT_PLUGINS"


@dataclass(frozen=True, kw_only=True, slots=True)
class NameList:
    """One list of the user, and where it was set: messages have to say which list to correct."""

    items: tuple[str, ...]
    source: str

    def selects(self, entry: PluginEntry) -> bool:
        """True if an item names this claim."""
        return any(_matches(item, entry) for item in self.items)


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    """What the user allows. `allow` is None when every installed plugin may be used."""

    allow: NameList | None = None
    deny: NameList | None = None
    strict: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Switches:
        """Read the three variables. Raises ConfigError if the strict one is neither 0 nor 1."""
        strict = environ.get(STRICT_VARIABLE, "")
        if strict not in ("", "0", "1"):
            raise ConfigError(
                f"{STRICT_VARIABLE} is {strict!r}.",
                why="it is a switch: 1 is on, 0 or unset is off",
                fix="set it to 1, or unset it",
            )
        return cls(
            allow=_from_variable(environ, ALLOW_VARIABLE),
            deny=_from_variable(environ, DENY_VARIABLE),
            strict=strict == "1",
        )

    @classmethod
    def from_config(cls, *, plugins: Sequence[str] | None, disable: Sequence[str] | None) -> Switches:
        """Take the two lists as a run's config gives them; None is a list that it does not set."""
        return cls(
            allow=_from_config(plugins, "configure(plugins=...)"),
            deny=_from_config(disable, "configure(disable=...)"),
        )

    def under(self, config: Switches) -> Switches:
        """Return these switches with every list that `config` sets put in the place of theirs."""
        return replace(self, allow=config.allow or self.allow, deny=config.deny or self.deny)

    def check(self, entries: Sequence[PluginEntry]) -> None:
        """Raise ConfigError for an item that names nothing installed, or denies a built-in router: typing errors."""
        for names in filter(None, (self.allow, self.deny)):
            for item in names.items:
                if not any(_matches(item, entry) for entry in entries):
                    raise ConfigError(
                        f"{names.source} names {item!r}, which no installed plugin offers.",
                        why=_hint(item, entries),
                        fix="install the distribution that offers it, or correct the list",
                    )
        for entry in entries:
            if self.deny and entry.builtin and self.deny.selects(entry):
                raise ConfigError(
                    f"{self.deny.source} names {entry.name!r}, which is built in.",
                    why="a built-in router cannot be switched off",
                    fix="take it off the list",
                )


def _from_variable(environ: Mapping[str, str], variable: str) -> NameList | None:
    text = environ.get(variable)
    if text is None:
        return None
    return NameList(items=tuple(item for part in text.split(",") if (item := part.strip())), source=variable)


def _from_config(items: Sequence[str] | None, source: str) -> NameList | None:
    if items is None:
        return None
    if isinstance(items, str):  # a lone string is a sequence of letters
        raise ConfigError(f"{source} got the string {items!r}.", why="it takes a list of names", fix=f"[{items!r}]")
    return NameList(items=tuple(items), source=source)


def _matches(item: str, entry: PluginEntry) -> bool:
    name, at, distribution = item.partition("@")
    return name == entry.name and (not at or canonical(distribution) == canonical(entry.provenance.distribution))


def _hint(item: str, entries: Sequence[PluginEntry]) -> str:
    known = sorted({entry.name for entry in entries})
    claims = [f"{entry.name}@{entry.provenance.distribution}" for entry in entries]
    close = get_close_matches(item, claims if "@" in item else known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"installed: {', '.join(known)}"
