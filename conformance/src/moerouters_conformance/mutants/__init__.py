"""Mutants: routers with exactly one planted bug each, which prove that the rules can fail.

A mutant fails its own rule and no rule of an earlier group; a rule without a mutant is a rule that nobody has seen
fail. `--explain` shows them as examples of what a rule is about.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from textwrap import dedent
from typing import Any

from moerouters import RouterConfig, RouterSpec
from moerouters.registry import API_VERSION
from moerouters_conformance.rule import Group


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A router with one planted bug."""

    rule: str
    """Id of the rule that it breaks."""
    text: str
    """The bug in one line."""
    spec: RouterSpec
    source: str
    """Its own code, without what it inherits."""


_KNOWN: list[Mutant] = []


def mutant(
    rule: str, *, config: type[RouterConfig] = RouterConfig, **spec: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a Router class, or a factory, as the mutant of a rule. Its docstring says what is wrong with it."""

    def enter(factory: Callable[..., Any]) -> Callable[..., Any]:
        text = inspect.getdoc(factory) or ""
        declared = getattr(factory, "capabilities", None)
        if declared is not None and "capabilities" not in spec:
            spec["capabilities"] = declared
        name = f"mutant-{rule.lower()}-{len(_KNOWN)}"
        about = {"name": name, "api": API_VERSION, "summary": text or name} | spec
        made = RouterSpec(factory=factory, config=config, **about)
        source = dedent(inspect.getsource(factory))
        _KNOWN.append(Mutant(rule=rule, text=text, spec=made, source=source))
        return factory

    return enter


@cache
def all_mutants() -> tuple[Mutant, ...]:
    """Every mutant, in the order of the rules."""
    for group in Group:
        import_module(f"{__name__}.{group.value}")
    return tuple(sorted(_KNOWN, key=lambda m: m.rule))


def mutants_of(rule: str) -> tuple[Mutant, ...]:
    """The mutants that a rule catches."""
    return tuple(m for m in all_mutants() if m.rule == rule)
