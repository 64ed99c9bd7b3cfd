"""A report as text for a terminal. Every line is plain: it goes into logs and issue trackers as it is."""

from __future__ import annotations

from collections import Counter, defaultdict

from moerouters_conformance.report import Report, Result, Status

DOCS = "docs/conformance.md"


def report_text(report: Report) -> str:
    """Header, a line per group, the failures, the totals."""
    blocks = [
        "\n".join(header_lines(report)),
        "\n".join(group_lines(report)),
        *(failure_text(result) for result in report.failures),
        "\n".join(summary_lines(report)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def header_lines(report: Report) -> list[str]:
    """Suite, profile, provenance, promises."""
    v = report.versions
    lines = [
        f"moerouters-conformance {v.suite}   plugin API {v.api}   profile {report.profile} "
        f"({report.examples} examples)   torch {v.torch}   hypothesis {v.hypothesis}",
        f"router    {report.router}   from {report.provenance or 'a factory that was handed in'}",
    ]
    if report.config:
        lines.append("config    " + " ".join(f"{name}={value!r}" for name, value in report.config.items()))
    if report.capabilities is not None:
        declared = report.capabilities.model_dump(mode="json", exclude={"dtypes"})
        lines.append("declares  " + " ".join(f"{name}={_plain(value)}" for name, value in declared.items()))
    return lines


def group_lines(report: Report) -> list[str]:
    """One line per group: how many of what."""
    lines = []
    for group, results in report.groups():
        counts = Counter(result.status for result in results)
        parts = [f"{counts[status]} {_word(status)}" for status in Status if counts[status]]
        line = f"  {group:<12} {'   '.join(parts)}"
        reasons = {result.reason for result in results if result.status is Status.BLOCKED}
        lines.append(line + (f"   ({reasons.pop()})" if len(reasons) == 1 else ""))
    return lines


def failure_text(result: Result) -> str:
    """One failure: the rule, what was seen, the smallest input, and how to see it without the suite."""
    verdict = "FAIL" if result.status is Status.FAILED else "ERROR"
    lines = [f"{verdict} {result.id} {result.name}   ({DOCS}, rule {result.id})"]
    for label, text in (
        ("rule", result.rule),
        ("saw", result.reason),
        ("input", result.example),
        ("likely", result.likely),
        ("repro", _script(result.repro)),
    ):
        if text:
            lines.append(f"  {label:<7} " + text.replace("\n", "\n          "))
    return "\n".join(lines)


def summary_lines(report: Report) -> list[str]:
    """Totals; everything that did not run is counted, with its reason."""
    totals = report.totals
    number = len(report.checks)
    lines = [
        f"{number} check{'' if number == 1 else 's'} in {report.seconds:.1f} s: {report.ran} ran "
        f"({totals['passed']} passed, {totals['failed']} failed, {totals['expected_failure']} expected failures), "
        f"{totals['error']} errors, {totals['blocked']} blocked, {totals['not_applicable']} not applicable"
    ]
    for status in (Status.EXPECTED_FAILURE, Status.BLOCKED, Status.NOT_APPLICABLE):
        ids = defaultdict(list)
        for result in report.checks:
            if result.status is status:
                ids[result.reason.splitlines()[0] if result.reason else ""].append(result.id)
        lines += [f"  {_word(status)}: {' '.join(found)} - {reason}" for reason, found in ids.items()]
    return lines


def _word(status: Status) -> str:
    return "FAILED" if status is Status.FAILED else status.value.replace("_", " ")


def _plain(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case dict():
            return "(" + " ".join(f"{key}={item}" for key, item in value.items()) + ")"
    return str(value)


def _script(repro: str) -> str:
    return f"python - <<'PY'\n{repro}\nPY" if repro else ""
