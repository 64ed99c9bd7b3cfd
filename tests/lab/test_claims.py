"""Comparisons made by hand, whose answers are known."""

from __future__ import annotations

import pytest

from moerouters.lab.claims import CLAIMS, Claim, balanced_at_once, change_percent, lower, no_worse
from moerouters.lab.compare import environment
from moerouters.lab.corpus import Corpus
from moerouters.lab.measure import measure
from moerouters.lab.protocols import PROTOCOLS
from moerouters.lab.ranks import Ranks
from moerouters.lab.results import Results, RunResult
from moerouters.lab.showcase import Showcase
from support.lab import CPU, SMALL, entrant, history_of


def run(label: str, seed: int, perplexity: float | None, sup_max_vio: float = 1.0) -> RunResult:
    made = measure(entrant(), history_of(3), seed=seed, status="completed", parameters=1)
    return made.model_copy(update={"label": label, "perplexity": perplexity, "sup_max_vio": sup_max_vio})


@pytest.fixture
def showcase(corpus: Corpus) -> Showcase:
    runs = [
        run("a", 0, 4.0, 0.1),
        run("a", 1, 5.0, 0.3),
        run("b:x=1", 0, 4.4, 1.0),
        run("b:x=1", 1, 5.5, 1.4),
        run("b:x=2", 0, 4.0, 3.0),
        run("c", 0, 4.4),
        run("c", 1, 4.5),
        run("late", 0, None),
    ]
    results = Results(
        status="completed",
        started="2026-01-01",
        preset="tiny",
        settings=SMALL,
        corpus=corpus.info,
        environment=environment(CPU, SMALL, Ranks()),
        runs=tuple(runs),
    )
    curves = {"a": [[0.2, 1.0], [0.4, 1.0]]}
    return Showcase(machine="none", minutes=1, results=results, max_vio=curves)


def test_perplexities_are_compared_seed_by_seed(showcase: Showcase) -> None:
    runs = {label: [r for r in showcase.results.runs if r.label == label] for label in ("a", "b:x=1", "b:x=2", "late")}
    change = change_percent(runs["b:x=1"], runs["a"])
    assert change is not None
    assert change.mean == pytest.approx(10)  # of both seeds, though they differ by a quarter
    assert change.half_width == pytest.approx(0, abs=1e-9)
    alone = change_percent(runs["b:x=2"], runs["a"])
    assert alone is not None
    assert alone.half_width is None
    assert change_percent(runs["late"], runs["a"]) is None


@pytest.mark.parametrize(
    ("claim", "found", "verdict"),
    [
        (
            lower("sup_max_vio", "Sup", ("a",), ("b",), 5.9),
            "`a` 0.2, the best rival `b:x=1` 1.2: 6.0",
            "reproduced",
        ),
        (lower("sup_max_vio", "Sup", ("a",), ("b",), 6.1), "6.0 times", "not reproduced"),
        (no_worse("a", "b:x=1"), "-9.1 +- 0.0%", "reproduced"),
        (no_worse("b:x=1", "a"), "+10.0 +- 0.0%", "not reproduced"),
        (no_worse("a", "c"), "%", "open"),  # -9% and +11%
        (no_worse("a", "b:x=2"), "one seed", "open"),
        (no_worse("a", "late"), "no seed of both", "open"),
        (balanced_at_once("a", 0.4), "at most 0.40", "reproduced"),
        (balanced_at_once("a", 0.39), "at most 0.40", "not reproduced"),
    ],
)
def test_verdicts(showcase: Showcase, claim: Claim, found: str, verdict: str) -> None:
    told, judged = claim.check(showcase)
    assert found in told
    assert judged == verdict


def test_claims_speak_of_what_the_protocol_trains() -> None:
    for name, claims in CLAIMS.items():
        routers = PROTOCOLS[name].routers
        named = [part for claim in claims for part in claim.text.split("`")[1::2]]
        assert named
        assert set(named) <= set(routers)
