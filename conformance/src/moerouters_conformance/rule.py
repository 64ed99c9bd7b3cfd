"""Rule: one thing that must hold for every router, as data beside the function that checks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from moerouters_conformance.profile import Cost, Profile

if TYPE_CHECKING:
    from moerouters_conformance.subject import Subject


class Group(StrEnum):
    """Groups in the order of the data flow, which is the order they run in."""

    CONTRACT = "contract"
    WEIGHTS = "weights"
    SYMMETRY = "symmetry"
    PURITY = "purity"
    CAUSALITY = "causality"
    PADDING = "padding"
    GRADIENT = "gradient"
    BALANCE = "balance"
    STATE = "state"
    DISTRIBUTED = "distributed"
    HYGIENE = "hygiene"


STANDS_ON: dict[Group, tuple[Group, ...]] = {
    Group.CONTRACT: (),
    Group.WEIGHTS: (Group.CONTRACT,),
    Group.SYMMETRY: (Group.CONTRACT,),
    Group.PURITY: (Group.CONTRACT,),
    Group.CAUSALITY: (Group.CONTRACT, Group.PURITY),
    Group.PADDING: (Group.CONTRACT, Group.PURITY),
    Group.GRADIENT: (Group.CONTRACT, Group.WEIGHTS, Group.PURITY),
    Group.BALANCE: (Group.CONTRACT, Group.PURITY),
    Group.STATE: (Group.CONTRACT, Group.PURITY),
    Group.DISTRIBUTED: (Group.CONTRACT, Group.PURITY, Group.STATE),
    Group.HYGIENE: (),
}
"""A group is not run when one that it stands on has an unexpected failure: one bug would be reported many times."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """What a router must declare, or be measured to do, for a rule to apply."""

    text: str
    """As a clause after "needs": `a declared balance bound`."""
    holds: Callable[[Subject], bool]


CheckFunction = Callable[["Subject", Profile], None]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule; `check` raises Violation or NotApplicable, or returns."""

    id: str
    name: str
    group: Group
    text: str
    """The rule in one line."""
    why: str
    """What goes wrong in training or serving where it does not hold."""
    bug: str
    """The bug of the field that it comes from, with its thread; empty where it is our own contract."""
    requires: tuple[Requirement, ...]
    since: str
    """The plugin API that introduced it; routers written for an older one are not held to it."""
    cost: Cost
    check: CheckFunction


_PREFIX = {
    Group.CONTRACT: "C", Group.WEIGHTS: "W", Group.SYMMETRY: "Y", Group.PURITY: "U", Group.CAUSALITY: "A",
    Group.PADDING: "P", Group.GRADIENT: "G", Group.BALANCE: "B", Group.STATE: "S", Group.DISTRIBUTED: "D",
    Group.HYGIENE: "H",
}  # fmt: skip


class RuleBook:
    """The rules of one group, collected by the decorator that `rule` is."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rules: list[Rule] = []

    def rule(
        self,
        id: str,
        text: str,
        *,
        why: str,
        bug: str = "",
        requires: Sequence[Requirement] = (),
        since: str = "0.1",
        cost: Cost = Cost.CHEAP,
    ) -> Callable[[CheckFunction], CheckFunction]:
        """Enter the decorated check in the book. Its name is the function's."""
        assert re.fullmatch(rf"{_PREFIX[self.group]}\d\d", id), f"{id} is no id of the group {self.group}"
        assert all(known.id != id for known in self.rules), f"{id} is taken"

        def enter(check: CheckFunction) -> CheckFunction:
            self.rules.append(
                Rule(
                    id=id, name=check.__name__, group=self.group, text=text, why=why, bug=bug,
                    requires=tuple(requires), since=since, cost=cost, check=check,
                )
            )  # fmt: skip
            return check

        return enter
