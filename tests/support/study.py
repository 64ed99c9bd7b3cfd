"""Studies small enough for tests, and made-up results."""

from __future__ import annotations

from pathlib import Path

import torch

from moerouters.bench.timing import Ratio
from moerouters.lab.corpus import CorpusInfo
from moerouters.lab.results import Environment
from moerouters.study.matching import Match, Try
from moerouters.study.plan import Budget, ModelSpec, Plan
from moerouters.study.results import Anatomy, Inference, ModelResult, Step, StudyResults, TrainingRun
from support.lab import SMALL

DENSE = ModelSpec(name="dense", settings={"dense_size": 16})
TOPK = ModelSpec(name="topk", router="topk", partner="dense")
SHARED = ModelSpec(name="shared", router="topk", partner="dense", shared_experts=1)

PLAN = Plan(
    preset="test",
    settings=SMALL.override({"shared_size": 0, "steps": 1}),
    models=(DENSE, TOPK),
    budget=Budget(amount=0.05),
    seeds=(0,),
    rounds=5,
    tries=2,
)
"""A dense and a MoE model that train for a few steps."""

CPU = torch.device("cpu")


def around(value: float, half: float = 0.01) -> Ratio:
    """With an interval of that half width."""
    return Ratio(value=value, low=value - half, high=value + half)


def model(name: str, *, ratio: float | None = None, matched: bool = True, step_s: float = 0.04) -> ModelResult:
    """A row; with a ratio that of a MoE model, whose partner is `dense`."""
    settings = PLAN.settings.override({"steps": 10, "dense_size": 0 if ratio else 16})
    match = None
    if ratio is not None:
        tries = (Try(value=12, rounds=5, ratio=around(1.15)), Try(value=8, rounds=5, ratio=around(ratio)))
        why = None if matched else "it is too slow"
        match = Match(knob="expert_size", value=8, ratio=around(ratio), matched=matched, tries=tries, why=why)
    return ModelResult(
        name=name,
        router=None if ratio is None else "topk",
        partner=None if ratio is None else "dense",
        settings=settings,
        parameters=3000,
        active_parameters=3000 if ratio is None else 2000,
        match=match,
        step_s=step_s,
        step=Step(ms=around(1e3 * step_s, 0.5), over_partner=None if ratio is None else around(ratio)),
        anatomy=Anatomy(parts_ms={"attention": 10.0, "other": 30.5}, step_ms=40.0, error=0.0125, slowdown=1.2),
        inference=Inference(
            prompt=8, decoded=4, sequences=2, prefill_tokens_per_s=2000.0, decode_tokens_per_s=100.0,
            parameters_mib=0.5, cache_mib=0.1, prefill_peak_mib=0.3, decode_peak_mib=0.2,
            peer=None if ratio is None else "dense",
            prefill_over_peer=None if ratio is None else around(1.2),
            decode_over_peer=None if ratio is None else around(1.4),
        ),
    )  # fmt: skip


def run(name: str, seed: int, perplexity: float) -> TrainingRun:
    """That is completed."""
    return TrainingRun(model=name, seed=seed, status="completed", steps=10, perplexity=perplexity, seconds=4.0)


def results(*, models: tuple[ModelResult, ...], runs: tuple[TrainingRun, ...], seeds: int = 1) -> StudyResults:
    """A completed study of these."""
    info = CorpusInfo(
        name="text", sha256="0" * 64, files=1, train_bytes=1000, validation_bytes=100, validation_files=("a",)
    )
    where = Environment(
        moerouters="0.1.0", torch="2.13.0", python="3.11.7", platform="Linux x86_64", device="cpu", threads=1, ranks=1,
        autocast=None,
    )  # fmt: skip
    plan = PLAN.model_copy(
        update={
            "models": tuple(ModelSpec(name=each.name, router=each.router, partner=each.partner) for each in models),
            "seeds": tuple(range(seeds)),
        }
    )
    return StudyResults(
        status="completed", started="2026-01-01T00:00:00+00:00", plan=plan, corpus=info, environment=where,
        models=models, runs=runs,
    )  # fmt: skip


def three_seeds() -> StudyResults:
    """A MoE model that is sure to be better."""
    runs = [run("dense", seed, 6.0 + 0.1 * seed) for seed in range(3)]
    runs += [run("topk", seed, (6.0 + 0.1 * seed) * factor) for seed, factor in enumerate((0.965, 0.97, 0.975))]
    return results(models=(model("dense"), model("topk", ratio=1.01)), runs=tuple(runs), seeds=3)


def written(folder: Path, found: StudyResults) -> StudyResults:
    """What reading gives back of what is written."""
    found.save(folder)
    again = StudyResults.load(folder)
    assert again is not None
    return again
