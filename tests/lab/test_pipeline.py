"""A model in a pipeline: the losses are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moerouters import registry
from moerouters.errors import ConfigError
from moerouters.lab.corpus import Corpus, standard_library
from moerouters.lab.expert_ranks import ExpertRanks
from moerouters.lab.pipeline_ranks import PipelineRanks, pipeline_ranks, schedule_of
from moerouters.lab.presets import preset
from moerouters.lab.ranks import Ranks
from moerouters.pipeline import build, write
from moerouters_conformance.pool import rank_pool
from support import pipeline_lab as jobs
from support.expert_parallel import Course, alone, train
from support.lab import SMALL
from support.pipeline_lab import Case

pytestmark = pytest.mark.dist

LIMIT = 1e-4
"""Of any training or validation loss, in nats per byte, in float32."""
FOUR = SMALL.override({"num_layers": 4, "accumulation_steps": 4, "micro_batch_size": 4, "validation_sequences": 10})


def course(corpus: Corpus, item: str = "topk", *, steps: int = 3, **changes: object) -> Course:
    return Course(item=item, settings=FOUR.override(changes), steps=steps, corpus=corpus)


def expect_same(one: Course, *cases: Case, replayed: bool = True) -> None:
    expected, tape = alone(one)
    todo = [Case(**(case.__dict__ | {"tape": tape if replayed else None})) for case in cases]
    for outcomes in rank_pool().run(jobs.staged, todo):
        apart = {
            f"{c.schedule} {c.stages} x {c.tensor}": expected.apart(o) for c, o in zip(todo, outcomes, strict=True)
        }
        assert max(apart.values()) <= LIMIT, apart


def slow(item: str) -> Any:
    return pytest.param(item, marks=pytest.mark.slow)


@pytest.mark.parametrize("item", [slow("topk"), slow("loss-free"), "loss-controlled"])
def test_replayed_routing_gives_the_losses_of_one_process(corpus: Corpus, item: str) -> None:
    """Validation: ten windows are two batches of four, which are evaluated at once, and one of two."""
    one = course(corpus, item)
    expect_same(one, Case(course=one), Case(course=one, stages=4, tensor=1, schedule="zero-bubble-h1"))


def test_every_kind_of_rank_at_once_and_chunks(corpus: Corpus) -> None:
    """Two pipelines on other data; two stages a rank, the first and the last on one; untied weights; routed heads."""
    one = course(corpus)
    expect_same(
        one, *(Case(course=one, tensor=1, schedule=name) for name in ("dualpipev", "interleaved-1f1b", "eager-1f1b"))
    )
    other = course(corpus, tied_head=False, attention_experts=2, attention_loss=0.5)
    expect_same(other, Case(course=other))


@pytest.mark.slow
def test_free_routing_gives_them_too(corpus: Corpus) -> None:
    """Balancers see the same loads at the same steps; the aux loss has the same weight."""
    for item in ("loss-free", "loss-controlled:alpha=0.3", "noisy-topk"):
        one = course(corpus, item, steps=4)
        expect_same(one, Case(course=one), replayed=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.available())
def test_every_router(corpus: Corpus, name: str) -> None:
    one = course(corpus, name)
    expect_same(one, Case(course=one), Case(course=one, schedule="zero-bubble-h1"))


@pytest.mark.slow
@pytest.mark.parametrize("item", ["topk", "loss-controlled", "loss-free", "bip"])
def test_the_tiny_preset(item: str) -> None:
    """The first 20 steps of `compare --pipeline 2 --tensor 2 --preset tiny`."""
    settings = preset("tiny").override({"validation_sequences": 32})
    tiny = Course(item=item, settings=settings, steps=20, corpus=standard_library())
    expect_same(tiny, Case(course=tiny))


def test_what_a_run_keeps_is_of_the_whole_model(corpus: Corpus) -> None:
    """History, gradient norm, weights of a checkpoint; and a resumed run goes on with the same bits."""
    one = course(corpus, "loss-free")
    trainer = one.trainer()
    train(trainer, 2)
    history, state = trainer.history.tensors(), trainer.state()
    for found in rank_pool().run(jobs.looked_at, Case(course=one)):
        assert torch.equal(found["history"]["loads"], history["loads"])
        for name in ("micro_max_vio", "train_loss"):
            torch.testing.assert_close(found["history"][name], history[name], rtol=0, atol=1e-5)
        assert found["norm"] == pytest.approx(float(trainer.ranks.gradient_norm(trainer.model)), rel=1e-4)
        assert found["weights"].keys() == state["model"].keys()
        for name, weight in state["model"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4, msg=name)
        assert found["parameters"] == trainer.num_parameters
        whole, resumed = found["outcomes"]
        assert whole == resumed
    train(trainer, 2)
    assert found["max_vio"] == pytest.approx(trainer.validate().max_vio, abs=1e-6)


def test_all_ranks_raise_what_one_stage_finds(corpus: Corpus) -> None:
    said = rank_pool().run(jobs.broken, Case(course=course(corpus)))
    assert len(set(said)) == 1
    assert said[0].startswith("NonFiniteLogits: the gate of layer 'blocks.1.moe' gave NaN or infinite logits for")


@pytest.mark.slow
def test_a_comparison_is_resumed(corpus: Corpus, tmp_path: Path) -> None:
    one = course(corpus, "loss-free")
    found = rank_pool().run(jobs.compared, Case(course=one), tmp_path)
    assert found[0]["statuses"] == ["interrupted", "completed"]
    assert found[0]["environment"] == (2, "1f1b", 2)
    assert 0 < found[0]["share"] < 1
    trainer = one.trainer()
    train(trainer, FOUR.steps)
    assert found[0]["perplexity"] == pytest.approx(float(torch.tensor(trainer.validation_loss()).exp()), rel=1e-4)


def test_who_holds_what() -> None:
    """Two pipelines of two stages on two ranks each: neighbours share a stage, a pipeline its tokens."""
    rows = torch.arange(4)
    ranks = [Ranks(rank, 8, *spread_over(2, tensor=2)) for rank in range(8)]
    assert [each.part(rows).tolist() for each in ranks] == [[0, 2]] * 4 + [[1, 3]] * 4
    assert [ranks[0].pipeline.first_alike(rank) for rank in range(8)] == [0, 0, 2, 2] * 2  # type: ignore[union-attr]
    ranks[0].require_even_validation(6, capacity_factor=None)
    with pytest.raises(ConfigError, match="--set validation_sequences=6"):
        ranks[0].require_even_validation(7, capacity_factor=None)


def spread_over(stages: int, *, tensor: int) -> tuple[ExpertRanks, PipelineRanks]:
    nothing: Any = None
    experts = ExpertRanks(
        size=tensor, dispatcher="tensor_sliced", alike=tensor, group=nothing, peers=nothing, distinct=None
    )
    schedule = build("1f1b", stages, 2)
    pipeline = PipelineRanks(
        schedule=schedule, tensor=tensor, pipeline=nothing, replicas=nothing, data=nothing, column=nothing
    )
    return experts, pipeline


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    assert rank_pool().run(jobs.refused, 4, 2) == ["4 ranks cannot form pipelines of 4 x 2."] * 4
    with pytest.raises(ConfigError, match="1 rank cannot form pipelines of 2 x 1"):
        pipeline_ranks(build("1f1b", 2, 2))
    write(build("gpipe", 2, 4), tmp_path / "mine.csv")
    assert schedule_of(str(tmp_path / "mine.csv"), num_ranks=2, num_microbatches=4).name == "mine"
    with pytest.raises(ConfigError, match="--pipeline 2 --set accumulation_steps=4"):
        schedule_of(str(tmp_path / "mine.csv"), num_ranks=4, num_microbatches=4)
