"""The rules, a module or two per group, in the order of the data flow."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from moerouters_conformance.rule import Group, Rule, RuleBook

_FURTHER = {Group.CONTRACT: ("edges",), Group.STATE: ("learning",)}
"""Modules that enter rules into the book of a group, beside the one of its name."""


@cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule, group by group, by id."""
    found: list[Rule] = []
    for group in Group:
        book: RuleBook = import_module(f"{__name__}.{group.value}").book
        for module in _FURTHER.get(group, ()):
            import_module(f"{__name__}.{module}")
        found += sorted(book.rules, key=lambda rule: rule.id)
    return tuple(found)


def find_rule(key: str) -> Rule | None:
    """The rule with this id or name."""
    return next((rule for rule in all_rules() if key in (rule.id, rule.name)), None)
