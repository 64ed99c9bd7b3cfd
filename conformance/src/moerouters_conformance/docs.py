"""The generated parts of docs/conformance.md and docs/capabilities.md: rules, exhibits, promises.

    python -m moerouters_conformance.docs docs

Everything between two marks of one name is replaced; the text around them is written by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moerouters import Capabilities, available, info
from moerouters.capabilities import MaxViolation
from moerouters_conformance.checks import all_rules
from moerouters_conformance.exhibits import EXPLANATIONS, Exhibition
from moerouters_conformance.mutants import all_mutants
from moerouters_conformance.profile import PROFILES
from moerouters_conformance.report import Status
from moerouters_conformance.rule import STANDS_ON, Group, Rule

MARKS = {Status.PASSED: "yes", Status.FAILED: "**no**", Status.ERROR: "**no**", Status.NOT_APPLICABLE: "-"}


def rules_section() -> str:
    """A table per group: id, rule, what it needs, where it comes from."""
    rules = all_rules()
    lines = [f"{len(rules)} rules in {len(Group)} groups, {len(all_mutants())} mutants."]
    for group in Group:
        after = ", ".join(STANDS_ON[group])
        lines += ["", f"### {group.capitalize()}" + (f" (after {after})" if after else ""), ""]
        lines += table(
            ("rule", "what must hold", "needs", "comes from"),
            [_rule_row(rule) for rule in rules if rule.group is group],
        )
    return "\n".join(lines)


def _rule_row(rule: Rule) -> tuple[str, ...]:
    needs = "; ".join(requirement.text for requirement in rule.requires)
    if rule.cost.value != "cheap":
        needs = f"{needs}; {rule.cost}" if needs else rule.cost.value
    return (f"<a id='{rule.id.lower()}'></a>{rule.id} `{rule.name}`", rule.text, needs, rule.bug)


def profiles_section() -> str:
    """What each profile runs."""
    rows = [
        (
            f"`{profile.name}`",
            str(profile.examples),
            str(profile.histories),
            "random" if profile.random else "the same in every run",
            ", ".join(cost.value for cost in type(next(iter(profile.costs))) if cost not in profile.costs) or "nothing",
        )
        for profile in PROFILES.values()
    ]
    head = ("profile", "examples per rule", "histories per balance rule", "examples are", "leaves out what needs")
    return "\n".join(table(head, rows))


def exhibits_section(exhibition: Exhibition) -> str:
    """Per stock class how much of each group holds, then every rule that fails somewhere, with the reason."""
    reports = exhibition.reports
    lines = [f"transformers {exhibition.transformers}, profile `{next(iter(reports.values())).profile}`.", ""]
    rows = []
    for label, report in reports.items():
        totals = report.totals
        counts = (report.ran, totals["passed"], totals["failed"], totals["not_applicable"])
        rows.append((label, *(str(count) for count in counts)))
    lines += table(("router", "ran", "passed", "failed", "not applicable"), rows)
    failing = sorted({r.id for report in reports.values() for r in report.failures}, key=_order)
    lines += ["", "What fails somewhere:", ""]
    by_router = {label: {r.id: r for r in report.checks} for label, report in reports.items()}
    texts = {rule.id: rule.text for rule in all_rules()}
    lines += table(
        ("rule", *reports, "why"),
        [
            (
                f"{key}: {texts[key]}",
                *(MARKS[by_router[label][key].status] for label in reports),
                EXPLANATIONS[key],
            )
            for key in failing
        ],
    )
    return "\n".join(lines)


def capabilities_section(promises: Mapping[str, Capabilities]) -> str:
    """A row per field, a column per router."""
    fields = Capabilities.model_fields
    rows = [(f"`{name}`", *(_plain(getattr(caps, name)) for caps in promises.values())) for name in fields]
    return "\n".join(table(("promise", *(f"`{name}`" for name in promises)), rows))


def installed_promises() -> dict[str, Capabilities]:
    """What every installed router declares for its default config."""
    return {name: info(name).spec.capabilities for name in available()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def with_sections(text: str, sections: Mapping[str, str]) -> str:
    """The text with each section between its marks; ValueError if a pair of marks is missing."""
    for name, section in sections.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        block = f"{begin}\n{section}\n{end}"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page needs the marks {begin} and {end} once")
        text = text[: text.index(begin)] + block + text[text.index(end) + len(end) :]
    return text


def pages(folder: Path) -> dict[Path, str]:
    """Both pages as they should be."""
    exhibition = Exhibition.model_validate_json((folder / "benchmarks" / "exhibits.json").read_bytes())
    sections = {
        "conformance.md": {
            "profiles": profiles_section(),
            "rules": rules_section(),
            "exhibits": exhibits_section(exhibition),
        },
        "capabilities.md": {"capabilities": capabilities_section(installed_promises())},
    }
    return {
        folder / page: with_sections((folder / page).read_text(encoding="utf-8"), parts)
        for page, parts in sections.items()
    }


def _order(rule_id: str) -> int:
    return [rule.id for rule in all_rules()].index(rule_id)


def _plain(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case frozenset():
            return ", ".join(sorted(value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item:g}" for key, item in value.items()) or "-"
    if isinstance(value, MaxViolation):
        return f"MaxVio at most {value.at_most:g} after {value.after_steps} steps"
    return str(value)


def main() -> None:
    """Write both pages."""
    parser = argparse.ArgumentParser(prog="python -m moerouters_conformance.docs")
    parser.add_argument("folder", type=Path)
    for path, text in pages(parser.parse_args().folder).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
