"""The estimate against routers whose leak is known."""

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import moerouters
from moerouters import AssignmentKind, Capabilities, RouteContext, Router, Routing, Selection, StateAlgebra
from moerouters.leaking.estimate import measure
from moerouters.leaking.report import Experiment, RouterLeak

SMALL = Experiment(num_experts=4, top_k=1, tokens=16, samples=64, positions=2, repeats=2, updates=2)


class NextToken(Router):
    """Token t goes to the expert that the last `bits` bits of the next token's id name; the last token to expert 0."""

    capabilities = Capabilities(causal=False)
    reads: ClassVar[frozenset[str]] = frozenset()
    bits = 1

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_T = ctx.need("token_ids_T", router="next-token")
        coming_T = torch.cat([ids_T[1:], ids_T.new_zeros(1)])
        return Selection.slots((coming_T % 2**self.bits).unsqueeze(1))


class TwoBits(NextToken):
    bits = 2


class Rarely(NextToken):
    """One next token in eight sends the token elsewhere: the entropy of a coin that falls so once in eight times."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_T = ctx.need("token_ids_T", router="rarely")
        coming_T = torch.cat([ids_T[1:], ids_T.new_zeros(1)])
        return Selection.slots((coming_T % 8 == 0).long().unsqueeze(1))


class Paired(NextToken):
    """The same as pairs, in falling order of tokens, with an empty pair."""

    capabilities = Capabilities(causal=False, assignment=AssignmentKind.PAIRS)

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_T1 = super().select(adjusted_TE, ctx).expert_ids
        T, E = adjusted_TE.shape
        tokens_N = torch.cat([torch.arange(T), torch.zeros(1, dtype=torch.int64)]).flip(0)
        return Selection.pairs(tokens_N, torch.cat([ids_T1[:, 0], torch.tensor([E])]).flip(0))


class Previous(NextToken):
    """Looks back, which every decoder may."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_T = ctx.need("token_ids_T", router="previous")
        return Selection.slots((ids_T.cumsum(0) % 4).unsqueeze(1))


class LearnsToLeak(NextToken):
    """Leaks once it has learned from anything."""

    capabilities = Capabilities(causal=False, state=StateAlgebra.ADDITIVE)
    updates: Tensor

    def __init__(self, gating: moerouters.Gating) -> None:
        super().__init__(gating)
        self.register_state("updates", 1)

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_T1 = super().select(adjusted_TE, ctx).expert_ids
        return Selection.slots(torch.where(self.updates > 0, ids_T1, 0))

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"passes": torch.ones((), dtype=torch.int64)}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.updates.add_(stats["passes"])


def leak_of(make: type[Router], experiment: Experiment = SMALL) -> RouterLeak:
    return measure(make(experiment.gating()), experiment, label=make.__name__)


@pytest.mark.parametrize(
    ("make", "bits", "tolerance"),
    # The mean of 4 entropies of 64 draws each: a fair choice's errs by 0.01, that of the rare one by 0.05.
    [(NextToken, 1.0, 0.03), (Paired, 1.0, 0.03), (TwoBits, 2.0, 0.04), (Rarely, 0.5436, 0.12)],
)
def test_a_known_leak_is_measured(make: type[Router], bits: float, tolerance: float) -> None:
    found = leak_of(make)
    assert found.bits == pytest.approx(bits, abs=tolerance)
    assert found.low <= found.bits <= found.high
    assert found.distinct == round(2**bits) or make is Rarely
    assert found.causal is False


def test_looking_back_is_no_leak() -> None:
    found = leak_of(Previous)
    assert (found.bits, found.low, found.high, found.distinct) == (0.0, 0.0, 0.0, 1)


def test_the_router_has_learned_before_it_is_looked_at() -> None:
    assert leak_of(LearnsToLeak).bits == pytest.approx(1.0, abs=0.03)
    assert leak_of(LearnsToLeak, SMALL.model_copy(update={"updates": 0})).bits == 0.0


def test_it_learns_nothing_meanwhile() -> None:
    router = LearnsToLeak(SMALL.gating())
    measure(router, SMALL, label="")
    assert router.updates.item() == SMALL.updates


@pytest.mark.parametrize("name", ["topk", "loss-free"])
def test_causal_routers_tell_exactly_nothing(name: str) -> None:
    experiment = Experiment(tokens=32, samples=8, positions=2, repeats=2, updates=4)
    found = measure(moerouters.build(name, experiment.gating()), experiment, label=name)
    assert (found.bits, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.causal and found.distinct == 1 and found.expert_choice_bits is None


def test_a_solver_over_the_batch_tells_something_and_less_in_larger_batches() -> None:
    bits = {}
    for tokens in (16, 256):
        experiment = Experiment(num_experts=8, tokens=tokens, samples=16, positions=2, repeats=4, updates=8)
        found = measure(moerouters.build("bip", experiment.gating()), experiment, label="bip")
        assert found.distinct > 1 and not found.causal
        bits[tokens] = found.bits
    assert 0 < bits[256] < bits[16]


def test_the_same_seed_gives_the_same_numbers_and_another_one_others() -> None:
    experiment = Experiment(num_experts=8, tokens=16, samples=16, positions=2, repeats=2, updates=2)

    def run(seed: int) -> RouterLeak:
        changed = experiment.model_copy(update={"seed": seed})
        return measure(moerouters.build("bip", changed.gating()), changed, label="bip")

    torch.manual_seed(7)
    first = run(0)
    torch.manual_seed(8)
    assert run(0) == first
    assert run(1) != first


def test_the_figure_stands_beside_routers_that_hand_out_pairs() -> None:
    tiny = SMALL.model_copy(update={"samples": 2})
    assert leak_of(NextToken, tiny).expert_choice_bits is None
    assert leak_of(Paired, tiny).expert_choice_bits == pytest.approx(1.585, abs=1e-3)  # log2(3)


def test_positions_stand_in_the_middle_of_their_parts() -> None:
    assert Experiment(tokens=257, positions=4).at == (32, 96, 160, 224)
    assert Experiment(tokens=2, positions=1).at == (0,)
    assert max(Experiment(tokens=5, positions=4).at) < 4  # after the last token nothing comes
