"""One rule at length: what it says, why, where it comes from, and a router that breaks it."""

from __future__ import annotations

from textwrap import indent

from moerouters_conformance.mutants import mutants_of
from moerouters_conformance.rule import STANDS_ON, Rule


def explanation(rule: Rule) -> str:
    """The text behind `--explain`."""
    lines = [f"{rule.id} {rule.name}   (group {rule.group})", "", f"  {rule.text}", ""]
    facts = {
        "why": rule.why,
        "from": rule.bug or "the contract of moerouters.Router",
        "needs": "; ".join(requirement.text for requirement in rule.requires) or "nothing: it holds for every router",
        "since": f"plugin API {rule.since}",
        "costs": rule.cost.value,
        "after": ", ".join(STANDS_ON[rule.group]) or "nothing",
    }
    lines += [f"  {label:<6} {text}" for label, text in facts.items()]
    for mutant in mutants_of(rule.id):
        lines += ["", "A router that breaks it:", "", indent(mutant.source.rstrip(), "    ")]
    return "\n".join(lines) + "\n"
