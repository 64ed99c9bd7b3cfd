"""Experts over several ranks: the losses are those of one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moerouters.errors import ConfigError
from moerouters.lab.checkpoint import load_checkpoint
from moerouters.lab.corpus import Corpus, standard_library
from moerouters.lab.expert_ranks import ExpertRanks, expert_ranks
from moerouters.lab.presets import preset
from moerouters.lab.ranks import Ranks
from moerouters.lab.results import Results
from moerouters_conformance.pool import rank_pool
from support.expert_parallel import (
    CLEAR_SEED,
    GLOBAL_LOSS,
    Case,
    Course,
    alone,
    case_of,
    checkpointed,
    first_norm,
    gradient_norms,
    interrupted,
    refused,
    replayed,
    spread,
    strayed,
)
from support.lab import SMALL

pytestmark = pytest.mark.dist

LIMIT = 1e-4
"""Of any training or validation loss, in nats per byte, in float32."""
DISPATCHERS = ("all_to_all", "all_gather", "hierarchical", "mesh3d", "padded", "tensor_sliced")
ROUTERS = ("topk", "loss-free", "bip", GLOBAL_LOSS)
FOUR = SMALL.override({"micro_batch_size": 4, "validation_sequences": 8})


def course(corpus: Corpus, item: str = "topk", *, steps: int = 3, **changes: object) -> Course:
    return Course(item=item, settings=FOUR.override(changes), steps=steps, corpus=corpus)


@pytest.mark.parametrize(
    "item", [pytest.param(name, marks=pytest.mark.slow) if name in ("topk", "loss-free") else name for name in ROUTERS]
)
def test_replayed_routing_gives_the_losses_of_one_process(corpus: Corpus, item: str) -> None:
    one = course(corpus, item)
    expected, tape = alone(one)
    cases = [case_of(one, name, tape=tape) for name in DISPATCHERS]
    if item == "topk":  # two groups: replicas of the experts, and of the tokens where a group shares them
        cases += [Case(course=one, dispatcher=name, tape=tape, size=2) for name in ("all_to_all", "tensor_sliced")]
        cases.append(Case(course=one, dispatcher="mesh3d", tape=tape, size=2, model_parallel=2))
    for outcomes in rank_pool().run(spread, cases):
        apart = {f"{c.dispatcher} over {c.size}": expected.apart(o) for c, o in zip(cases, outcomes, strict=True)}
        assert max(apart.values()) <= LIMIT, apart


@pytest.mark.parametrize("item", ["topk", pytest.param(GLOBAL_LOSS, marks=pytest.mark.slow)])
def test_free_routing_gives_them_too(corpus: Corpus, item: str) -> None:
    one = course(corpus, item, steps=20)
    expected, _ = alone(one)
    (outcome,) = rank_pool().run(spread, [Case(course=one, dispatcher="all_to_all")])[0]
    assert expected.apart(outcome) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("item", ["bip", "loss-controlled"])
def test_what_looks_at_a_ranks_own_tokens_is_as_without_spread_experts(corpus: Corpus, item: str) -> None:
    """Such a router is another one on other slices of a batch: data-parallel ranks are the measure, not one process."""
    one = course(corpus, item)
    cases = [Case(course=one, dispatcher="all_to_all", size=size) for size in (1, 2, 4)]
    whole, two, four = rank_pool().run(spread, cases)[0]
    assert whole.apart(two) <= LIMIT
    assert whole.apart(four) <= LIMIT
    if item == "loss-controlled":
        assert whole.apart(alone(one)[0]) > LIMIT


@pytest.mark.slow
def test_ranks_that_hold_all_tokens_route_as_one_process(corpus: Corpus) -> None:
    """Also routers that look at their own tokens only: with tensor_sliced over all ranks these are the whole batch."""
    courses = [course(corpus, item) for item in ("bip", "loss-controlled")]
    cases = [Case(course=one, dispatcher="tensor_sliced") for one in courses]
    for one, outcome in zip(courses, rank_pool().run(spread, cases)[0], strict=True):
        assert alone(one)[0].apart(outcome) <= LIMIT


@pytest.mark.slow
def test_ranks_with_nothing_to_validate(corpus: Corpus) -> None:
    """Six windows in batches of four: two ranks have none in the second batch, and take part."""
    one = course(corpus, validation_sequences=6)
    expected, tape = alone(one)
    cases = [Case(course=one, dispatcher=name, tape=tape) for name in ("all_to_all", "all_gather", "tensor_sliced")]
    for outcome in rank_pool().run(spread, cases)[0]:
        assert expected.apart(outcome) <= LIMIT


@pytest.mark.slow
def test_ranks_whose_experts_get_nothing(corpus: Corpus) -> None:
    one = course(corpus)
    _, tape = alone(one)
    crowded = {name: [torch.tensor([0, 1]).expand_as(ids) for ids in each] for name, each in tape.expert_ids.items()}
    tape = replace(tape, expert_ids=crowded)
    expected = replayed(one, tape)
    cases = [case_of(one, name, tape=tape) for name in DISPATCHERS]
    for outcome in rank_pool().run(spread, cases)[0]:
        assert expected.apart(outcome) <= LIMIT


def test_gradients_are_clipped_by_the_norm_of_the_whole_model(corpus: Corpus) -> None:
    one = course(corpus)
    cases = [case_of(one, name, size=size) for name in DISPATCHERS for size in (2, 4)]
    norms = rank_pool().run(gradient_norms, cases)
    assert all(each == norms[0] for each in norms), "ranks clip by different bits"
    torch.testing.assert_close(norms[0], [first_norm(one.trainer())] * len(cases), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dispatcher", ["all_to_all", "mesh3d"])
def test_a_checkpoint_is_that_of_one_process(corpus: Corpus, dispatcher: str) -> None:
    one = course(corpus, "loss-free")
    found = rank_pool().run(checkpointed, case_of(one, dispatcher, size=2))
    for rank in found:
        whole, resumed = rank["outcomes"]
        assert whole == resumed
    trainer = one.trainer()
    for _ in range(2):
        trainer.train_step()
    state = trainer.state()
    assert found[0]["parameters"] == trainer.num_parameters == sum(p.numel() for p in trainer.model.parameters())
    there = found[0]["state"]
    for name, weight in state["model"].items():  # mesh3d has a dimension for gate and up
        torch.testing.assert_close(there["model"][name].reshape(weight.shape), weight, rtol=1e-4, atol=1e-5)
    if dispatcher == "mesh3d":  # and its optimizer a group for the weights that are cut
        return
    torch.testing.assert_close(there["optimizer"]["state"], state["optimizer"]["state"], rtol=1e-4, atol=1e-5)
    trainer.load_state(there)


def test_states_that_drift_apart_are_found(corpus: Corpus) -> None:
    case = Case(course=course(corpus, "loss-free"), dispatcher="all_to_all", size=2)
    assert rank_pool().run(strayed, case)[0] == [
        "after training, ranks [3] hold other weights than rank 0.",
        "after training, ranks [3] hold other experts than rank 1.",
        "after training, ranks [3] hold other balancer state than rank 0.",
    ]


def test_who_holds_which_tokens() -> None:
    rows = torch.arange(8)
    own = [Ranks(rank, 4, spread_over(2, replicated=False)).part(rows) for rank in range(4)]
    alike = [Ranks(rank, 4, spread_over(2, replicated=True)).part(rows) for rank in range(4)]
    assert [part.tolist() for part in own] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [part.tolist() for part in alike] == [[0, 2, 4, 6]] * 2 + [[1, 3, 5, 7]] * 2


def test_uneven_validation_is_refused_where_blocks_have_one_size() -> None:
    Ranks(0, 4).require_even_validation(6, capacity_factor=None)
    for dispatcher, capacity_factor in (("all_to_all", 2.0), ("auto", None)):
        ranks = Ranks(0, 4, spread_over(4, replicated=False, dispatcher=dispatcher))
        ranks.require_even_validation(6, capacity_factor=capacity_factor)
    for dispatcher, capacity_factor in (("padded", None), ("auto", 2.0)):
        ranks = Ranks(0, 4, spread_over(4, replicated=False, dispatcher=dispatcher))
        ranks.require_even_validation(8, capacity_factor=capacity_factor)
        with pytest.raises(ConfigError, match="--set validation_sequences=4"):
            ranks.require_even_validation(6, capacity_factor=capacity_factor)


def test_too_few_ranks_and_cuts_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="1 rank cannot form groups of 2"):
        expert_ranks(2, "all_to_all", num_experts=4)
    with pytest.raises(ConfigError, match="--model-parallel 2"):
        expert_ranks(1, "mesh3d", num_experts=4, model_parallel=2)
    said = rank_pool().run(refused, "all_to_all", 2)
    assert said == ["dispatcher 'all_to_all' cuts no experts."] * 4


def spread_over(size: int, *, replicated: bool, dispatcher: str = "all_to_all") -> ExpertRanks:
    return ExpertRanks(
        size=size,
        dispatcher=dispatcher,
        alike=size if replicated else 1,
        group=None,  # type: ignore[arg-type]
        peers=None,  # type: ignore[arg-type]
        distinct=None,
    )


@pytest.mark.slow
def test_an_interrupted_comparison_resumes_to_the_same_numbers(corpus: Corpus, tmp_path: Path) -> None:
    """One rank is asked to stop; the checkpoint holds the experts of all."""
    found = rank_pool().run(interrupted, Case(course=course(corpus, "loss-free"), dispatcher="all_gather"), tmp_path)
    assert found[0]["statuses"] == ["interrupted", "completed", "completed"]
    assert found[0]["resumed at"] == 3
    assert found[0]["resumed"] == found[0]["whole"]
    environment = Results.load(tmp_path / "whole")
    assert environment is not None
    assert (environment.environment.expert_parallel, environment.environment.dispatcher) == (4, "all_gather")
    with pytest.raises(ConfigError, match="experts: all_gather over 4 ranks there, None here"):
        load_checkpoint(tmp_path / "checkpoint.pt", identity={"experts": None}, device=torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize(
    ("item", "seed"), [*((item, 0) for item in ROUTERS), ("topk", CLEAR_SEED), (GLOBAL_LOSS, CLEAR_SEED)]
)
def test_the_tiny_preset(item: str, seed: int, dispatcher: str) -> None:
    """The first 20 steps: every router with replayed routing, and free where no choice is a tie up to rounding."""
    settings = preset("tiny").override({"validation_sequences": 32})
    tiny = Course(item=item, settings=settings, steps=20, corpus=standard_library(), seed=seed)
    expected, tape = alone(tiny)
    case = case_of(tiny, dispatcher, tape=None if seed == CLEAR_SEED else tape)
    assert expected.apart(rank_pool().run(spread, [case])[0][0]) <= LIMIT
