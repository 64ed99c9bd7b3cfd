"""Search for the logits that a router balances worst, until stopped."""

from __future__ import annotations

import time
from dataclasses import replace

from hypothesis import HealthCheck, Phase, given, seed, settings, target

from moerouters.metrics import max_violation
from moerouters_conformance.case import Case
from moerouters_conformance.strategies import distinct_cases, gatings
from moerouters_conformance.subject import Subject

ROUND = 200
"""Examples per round; between rounds the seed changes, and Ctrl-C always finds the best so far."""


def hunt(router: str, *, hidden_size: int = 8, seconds: float | None = None) -> int:
    """Hill-climb on MaxVio with `hypothesis.target`, print every new worst batch and, at the end, how to run it.

    Ties are left out: identical tokens cannot be told apart by any router that looks at scores, and would win at once.
    """
    subject = Subject.of(router, hidden_size=hidden_size)
    worst: list[tuple[float, Case]] = []
    cases = distinct_cases(
        subject,
        min_tokens=16,
        max_tokens=24,
        training=True,
        max_warm_up=4,
        settings=gatings(subject, min_experts=4, max_experts=6, min_k=2, max_k=2, spare=2),
    )

    def one_round(number: int) -> None:
        @seed(number)
        @settings(
            max_examples=ROUND,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.target),
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(case=cases)
        def look(case: Case) -> None:
            violation = float(max_violation(subject.run(case).load_E))
            target(violation, label="MaxVio")
            if not worst or violation > worst[-1][0]:
                worst.append((violation, case))
                print(f"MaxVio {violation:.3f}   {case.describe().splitlines()[0]}", flush=True)

        look()

    print(f"hunting for the worst balance of {subject.label}; Ctrl-C ends it", flush=True)
    end = None if seconds is None else time.monotonic() + seconds
    number = 0
    try:
        while end is None or time.monotonic() < end:
            one_round(number)
            number += 1
    except KeyboardInterrupt:
        print()
    if not worst:
        return 4
    violation, case = worst[-1]
    shown = replace(case, logits=tuple(tuple(round(x, 6) for x in row) for row in case.logits))
    print(f"\nworst MaxVio {violation:.3f}, after {number} rounds of {ROUND} examples\n{shown.describe()}\n")
    print(f"python - <<'PY'\n{shown.repro(subject)}\nPY")
    return 0
