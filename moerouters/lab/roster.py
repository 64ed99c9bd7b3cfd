"""Who takes part in a comparison: from `--routers` or from what is installed to routers that can be built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moerouters import registry
from moerouters.errors import ConfigError, MoeroutersError, RouterUnavailable
from moerouters.lab.overrides import label as make_label
from moerouters.lab.overrides import parse_routers
from moerouters.lab.results import SkippedRouter
from moerouters.lab.settings import Settings
from moerouters.registry import Provenance
from moerouters.router import Router


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One router with one config. The label is what tables, pictures and files call it."""

    label: str
    name: str
    overrides: dict[str, Any]
    provenance: Provenance

    def build(self, settings: Settings) -> Router:
        """A fresh router for one layer."""
        gating = settings.gating(registry.info(self.name).spec.gating)
        return registry.build(self.name, gating, config=self.overrides)

    def build_for_attention(self, settings: Settings) -> Router:
        """A fresh router for the attention experts of one layer."""
        gating = settings.attention_gating(registry.info(self.name).spec.gating)
        return registry.build(self.name, gating, config=self.overrides)


def named_roster(text: str, settings: Settings) -> list[Entrant]:
    """The routers of `--routers`. Any that cannot be built raises, with its cause, before anything is trained."""
    entrants = [_entrant(label, name, overrides, settings) for label, name, overrides in parse_routers(text)]
    labels = [entrant.label for entrant in entrants]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"{twice[0]!r} is named twice.", where="--routers", why="its runs would be the same")
    return entrants


def default_roster(settings: Settings) -> tuple[list[Entrant], list[SkippedRouter]]:
    """Every installed router with its defaults, then with each further config that its spec offers for comparisons."""
    entrants: list[Entrant] = []
    skipped: list[SkippedRouter] = []
    for name in registry.available():
        for overrides in _configs(name, skipped):
            label = make_label(name, overrides)
            try:
                entrants.append(_entrant(label, name, overrides, settings))
            except MoeroutersError as error:
                skipped.append(SkippedRouter(label=label, reason=str(error)))
    return entrants, skipped


def _configs(name: str, skipped: list[SkippedRouter]) -> Sequence[dict[str, Any]]:
    try:
        spec = registry.info(name).spec
    except MoeroutersError as error:
        skipped.append(SkippedRouter(label=name, reason=str(error)))
        return ()
    return ({}, *(dict(overrides) for overrides in _distinct(spec.baselines)))


def _distinct(baselines: Iterable[Any]) -> list[Any]:
    distinct: list[Any] = []
    for overrides in baselines:
        if overrides and overrides not in distinct:
            distinct.append(overrides)
    return distinct


def _entrant(label: str, name: str, overrides: dict[str, Any], settings: Settings) -> Entrant:
    entrant = Entrant(label=label, name=name, overrides=overrides, provenance=registry.info(name).provenance)
    try:
        if settings.attention_experts > 1:
            entrant.build_for_attention(settings)
        entrant.build(settings)  # a bad config, or a gating it cannot serve, shows now and not after an hour
    except MoeroutersError:
        raise
    except Exception as error:
        raise RouterUnavailable(
            f"router {label!r} cannot be built.",
            where=str(entrant.provenance),
            why=f"{type(error).__name__}: {error}",
            fix="this is a bug of the plugin: report it to its authors, and leave the router out until then",
        ) from error
    return entrant
