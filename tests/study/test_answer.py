"""One sentence, and its uncertainty."""

from __future__ import annotations

import math
import statistics

import pytest

from moerouters.study.answer import answer, gain_of, has_drifted, is_matched, perplexity_of, seeds_told
from moerouters.study.results import Step
from support.study import around, model, results, run, three_seeds


def test_with_seeds_there_is_an_interval() -> None:
    found = three_seeds()
    gain = gain_of(found, found.models[1])
    assert gain is not None and gain.low is not None and gain.high is not None
    logs = [math.log(factor) for factor in (0.965, 0.97, 0.975)]
    half = 4.303 * statistics.stdev(logs) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert gain.change == pytest.approx(math.expm1(statistics.fmean(logs)))
    assert gain.low == pytest.approx(math.expm1(statistics.fmean(logs) - half))
    assert gain.sure
    assert answer(found) == (
        "At 40 ms a step, the MoE model topk has a perplexity 3.0% lower than the dense model's (1.8 to 4.2%, 3 seeds)."
    )
    assert seeds_told(found.plan.seeds) == "3 seeds, 95% intervals by Student's t"


def test_one_seed_has_none() -> None:
    found = results(models=(model("dense"), model("topk", ratio=1.0)), runs=(run("dense", 0, 6.0), run("topk", 0, 6.3)))
    assert answer(found) == (
        "At 40 ms a step, the MoE model topk has a perplexity 5.0% higher than the dense model's "
        "(one seed: no interval)."
    )
    assert seeds_told((0,)) == "one seed: no interval"
    spread = perplexity_of(found, "topk")
    assert spread is not None and spread.low == spread.value == spread.high == 6.3


def test_what_cannot_be_told_apart_is_said_so() -> None:
    runs = [run("dense", seed, 6.0) for seed in range(3)] + [run("topk", s, p) for s, p in enumerate((5.5, 6.0, 6.3))]
    found = results(models=(model("dense"), model("topk", ratio=1.0)), runs=tuple(runs), seeds=3)
    assert "cannot be told from the dense model" in answer(found)


def test_the_best_of_several_at_the_largest_dense_model() -> None:
    small, other = model("small", step_s=0.01), model("best", ratio=1.0)
    below = model("below", ratio=1.0).model_copy(update={"partner": "small"})
    prices = {"dense": 6.0, "topk": 5.9, "best": 5.4, "small": 8.0, "below": 4.0}
    found = results(
        models=(model("dense"), model("topk", ratio=1.0), other, small, below),
        runs=tuple(run(name, 0, price) for name, price in prices.items()),
    )
    assert answer(found).startswith("At 40 ms a step, the best of 2 MoE models, best, has a perplexity 10.0% lower")


def test_a_match_that_did_not_hold_is_no_answer() -> None:
    again = Step(ms=around(46.0), over_partner=around(1.15, 0.04))
    drifted = model("topk", ratio=1.0).model_copy(update={"step": again})
    runs = (run("dense", 0, 6.0), run("topk", 0, 5.0), run("other", 0, 5.9))
    found = results(models=(model("dense"), drifted), runs=runs)
    assert has_drifted(found, drifted) and not has_drifted(found, found.models[0])
    assert answer(found) == (
        "There is no answer at equal step time: steps that were matched took another time over the dense partner's "
        "when measured again (topk 1.15)."
    )
    beside = results(models=(model("dense"), drifted, model("other", ratio=1.0)), runs=runs)
    assert "the MoE model other has a perplexity 1.7% lower" in answer(beside)
    wide = drifted.model_copy(update={"step": Step(ms=around(42.0), over_partner=around(1.07, 0.03))})
    assert not has_drifted(found, wide)


def test_no_match_is_no_answer() -> None:
    unmatched = model("topk", ratio=1.4, matched=False)
    found = results(models=(model("dense"), unmatched), runs=(run("dense", 0, 6.0), run("topk", 0, 5.0)))
    assert not is_matched(unmatched)
    assert answer(found) == (
        "There is no answer at equal step time: none of 1 MoE model reached the step time of its dense partner."
    )
    early = results(models=(model("dense"), model("topk", ratio=1.0)), runs=(run("dense", 0, 6.0),))
    assert answer(early).startswith("There is no answer yet")
