"""The template: what every router gets, and what it may not do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters import Capabilities, Gating, RouteContext, Router, Routing, Selection
from moerouters.errors import ShapeError, UnsupportedError
from support.assignments import assert_same_bits, tensors_of
from support.balanced import Balanced, balanced
from support.oracles import top_ids

T, E, K = 9, 6, 2


def logits_of(tokens: int = T) -> Tensor:
    return torch.randn(tokens, E, generator=torch.Generator().manual_seed(0))


class Noting(Router):
    """Keeps what the stages were given."""

    def __init__(self, gating: Gating) -> None:
        super().__init__(gating)
        self.calls: list[tuple[str, Any]] = []

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        self.calls.append(("bias_E", (scores_TE, ctx, torch.is_grad_enabled())))
        return torch.linspace(0, 1, E)

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        self.calls.append(("adjust", (scores_TE, ctx)))
        return scores_TE * 2

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        self.calls.append(("losses", (routing, ctx)))
        return {"zero": routing.weights.sum() * 0}

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        self.calls.append(("observe", (routing, ctx)))
        return {"score": routing.scores_TE.sum()}

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def given(self, name: str) -> Any:
        return dict(self.calls)[name]


def test_the_stages_in_order_and_what_they_get() -> None:
    router = Noting(Gating.sigmoid(E, K))
    logits_TE = logits_of().requires_grad_()
    assignment = router(logits_TE)
    assert router.names == ["bias_E", "adjust", "losses", "observe"]
    scores_TE, ctx, with_gradient = router.given("bias_E")
    assert not with_gradient
    assert not scores_TE.requires_grad
    assert ctx.valid_T.tolist() == [True] * T
    assert ctx.logits_TE is router.given("losses")[0].logits_TE
    torch.testing.assert_close(router.given("adjust")[0], logits_TE.detach().sigmoid() + torch.linspace(0, 1, E))
    routing = router.given("losses")[0]
    assert routing is router.given("observe")[0]
    torch.testing.assert_close(routing.adjusted_TE, 2 * (routing.scores_TE + torch.linspace(0, 1, E)))
    assert torch.equal(routing.logits_TE, logits_TE)
    assert routing.logits_TE.requires_grad
    assert torch.equal(routing.expert_ids_TK, assignment.expert_ids)
    assert torch.equal(routing.load_E, assignment.load_E)
    assert routing.weights is not None
    order = [top_ids(row, K + 1) for row in routing.adjusted_TE.tolist()]
    assert assignment.expert_ids.tolist() == [row[:K] for row in order]
    last = [routing.adjusted_TE[t, row[K]].item() for t, row in enumerate(order)]
    assert routing.cutoff_T.tolist() == last
    assert assignment.losses["zero"].requires_grad
    assert not assignment.stats["score"].requires_grad


def test_eval_and_forced_ids_leave_stages_out() -> None:
    router = Noting(Gating.sigmoid(E, K)).eval()
    assignment = router(logits_of())
    assert router.names == ["bias_E", "adjust"]
    assert not assignment.losses
    router.train().calls.clear()
    forced = router(logits_of(), RouteContext(forced_ids_TK=assignment.expert_ids))
    assert router.names == ["losses"]
    routing = router.given("losses")[0]
    assert routing.adjusted_TE is routing.bias_E is routing.cutoff_T is None
    assert not forced.stats
    assert torch.equal(forced.load_E, assignment.load_E)


def test_forced_ids_may_be_empty_and_of_another_width() -> None:
    ids_TK = torch.tensor([[0, E, 3], [E, E, E], [5, 4, 1]])
    assignment = Router(Gating.softmax(E, K))(logits_of(3), RouteContext(forced_ids_TK=ids_TK)).validate()
    assert torch.equal(assignment.expert_ids, ids_TK)
    assert assignment.weights[1].tolist() == [0, 0, 0]
    torch.testing.assert_close(assignment.weights[[0, 2]].sum(dim=1), torch.ones(2))
    assert assignment.load_E.tolist() == [1, 1, 0, 1, 1, 1]


def test_what_is_not_read_is_not_computed() -> None:
    class Reading(Noting):
        reads = frozenset()

    router = Reading(Gating.sigmoid(E, K))
    router(logits_of())
    routing = router.given("losses")[0]
    assert routing.adjusted_TE is None
    assert routing.cutoff_T is None


@pytest.mark.parametrize(
    "gating", [Gating.sigmoid(E, E), Gating.sigmoid(E, K, num_groups=3, kept_groups=1)], ids=["K = E", "one group"]
)
def test_no_further_candidate_means_no_cutoff(gating: Gating) -> None:
    router = Noting(gating)
    router(logits_of())
    assert router.given("losses")[0].cutoff_T.tolist() == [-torch.inf] * T


def test_minus_infinity_is_never_chosen() -> None:
    class Closing(Router):
        def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
            closed_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
            closed_TE[0, 1:] = True
            closed_TE[1] = True
            return scores_TE.masked_fill(closed_TE, -float("inf"))

    assignment = Closing(Gating.softmax(E, K))(logits_of()).validate()
    assert assignment.expert_ids[:2].tolist() == [[0, E], [E, E]]
    assert assignment.weights[:2].tolist() == [[1, 0], [0, 0]]


def test_padding_is_empty_and_counts_nowhere() -> None:
    valid_T = torch.arange(T) % 3 != 0
    assignment = Router(Gating.softmax(E, K))(logits_of(), RouteContext(valid_T=valid_T)).validate()
    assert assignment.expert_ids[~valid_T].unique().tolist() == [E]
    assert not assignment.weights[~valid_T].any()
    assert int(assignment.tokens) == 6
    assert int(assignment.load_E.sum()) == 6 * K


@pytest.mark.parametrize("make", [Gating.softmax, Gating.sigmoid, Gating.sqrtsoftplus, Gating.softmax_after_topk])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("settings", [{}, {"soft_cap": 5.0}, {"num_groups": 3, "kept_groups": 2}], ids=str)
def test_broken_rows_are_counted_and_not_hidden(make: Any, bad: float, settings: dict[str, Any]) -> None:
    logits_TE = logits_of()
    logits_TE[2, 4] = bad
    logits_TE[3] = bad
    logits_TE[5, 0] = bad
    assignment = Router(make(E, K, **settings))(logits_TE, RouteContext(valid_T=torch.arange(T) != 5))
    assert int(assignment.nonfinite) == 2
    assert int(assignment.tokens) == T - 3
    ids_TK, weights_TK = assignment.expert_ids, assignment.weights
    assert bool(((ids_TK >= 0) & (ids_TK <= E)).all())
    taken_TK = ids_TK < E
    broken_T1 = torch.tensor([t in (2, 3) for t in range(T)]).unsqueeze(1)
    assert torch.equal(weights_TK.isnan(), taken_TK & broken_T1)
    healthy = Router(make(E, K, **settings))(logits_of())
    rest = [0, 1, 4, 6, 7, 8]
    assert torch.equal(ids_TK[rest], healthy.expert_ids[rest])
    assert torch.equal(weights_TK[rest], healthy.weights[rest])


def test_autocast_does_not_reach_the_stages() -> None:
    """A matrix product in a plugin's loss would round loads to 8 bits."""

    class Product(Router):
        def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
            return {"product": routing.load_E.float() @ routing.scores_TE.sum(dim=0)}

    router = Product(Gating.softmax(E, K))
    outside = router(logits_of(501))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(logits_of(501))
    assert_same_bits(tensors_of(inside), tensors_of(outside))


@pytest.mark.parametrize(
    ("context", "named"),
    [
        ({"valid_T": torch.ones(1, dtype=torch.bool)}, r"valid_T is torch\.bool of shape \[1\]"),
        ({"valid_T": torch.ones(3, 3, dtype=torch.bool)}, "valid_T"),
        ({"valid_T": torch.ones(T)}, r"valid_T is torch\.float32"),
        ({"token_ids_T": torch.zeros(8, dtype=torch.int64)}, "token_ids_T"),
        ({"sequence_ids_T": torch.zeros(T, dtype=torch.int32)}, "sequence_ids_T"),
        ({"hidden_TD": torch.zeros(1, 4)}, "hidden_TD"),
        ({"forced_ids_TK": torch.zeros(1, K, dtype=torch.int64)}, "forced_ids_TK"),
        ({"forced_ids_TK": torch.zeros(T, K, dtype=torch.int32)}, "forced_ids_TK"),
    ],
)
def test_a_context_of_another_shape(context: dict[str, Tensor], named: str) -> None:
    with pytest.raises(ShapeError, match=f"RouteContext.{named}"):
        Router(Gating.softmax(E, K))(logits_of(), RouteContext(**context))


def test_dtypes_that_are_not_declared_are_refused() -> None:
    class Narrow(Router):
        capabilities = Capabilities(dtypes=frozenset({"float32", "bfloat16"}))

    with pytest.raises(UnsupportedError, match=r"Narrow was given float64 logits\.\n.*declares bfloat16, float32\n"):
        Narrow(Gating.softmax(E, K))(logits_of().double())


def test_forward_is_final() -> None:
    with pytest.raises(TypeError, match=r"Mine overrides Router\.forward, which is final"):
        type("Mine", (Router,), {"forward": lambda self, logits_TE: None})


def test_a_router_shows_its_config() -> None:
    router = balanced()
    assert repr(router).startswith("Balanced(\n  (gating): Gating(")
    router.config = {"rate": 0.1}
    assert "Balanced(\n  config={'rate': 0.1}\n" in repr(router)


def test_pairs_have_no_slots_in_a_routing() -> None:
    class Pairs(Noting):
        def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
            return Selection.pairs(torch.tensor([0, 2]), torch.tensor([1, 3]))

    router = Pairs(Gating.softmax(E, K))
    router(logits_of()).validate()
    with pytest.raises(AssertionError, match="pairs have no"):
        _ = router.given("losses")[0].expert_ids_TK


def test_what_select_solved_reaches_observe() -> None:
    class Solving(Noting):
        def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
            return replace(super().select(adjusted_TE, ctx), solved=torch.arange(E))

    router = Solving(Gating.sigmoid(E, K))
    router(logits_of(), RouteContext(valid_T=torch.arange(T) != 1))  # padding rewrites the selection
    assert router.given("observe")[0].selection.solved.tolist() == list(range(E))


def test_update_of_a_router_without_one_does_nothing() -> None:
    router = Router(Gating.softmax(E, K))
    before = dict(router.state_dict())
    router.update({})
    assert router.state_dict() == before
    assert Balanced.update is not Router.update


class Stepwise(Router):
    """A stage of its own, so no operator does it all at once."""

    reads = frozenset()

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return super().adjust(scores_TE, ctx)


@pytest.mark.parametrize("settings", [{}, {"num_groups": 3, "kept_groups": 2, "scale": 2.0}], ids=str)
@pytest.mark.parametrize("make", [Gating.softmax, Gating.sigmoid, Gating.sqrtsoftplus, Gating.softmax_after_topk])
@pytest.mark.parametrize("odd", [False, True])
def test_one_operator_gives_the_bits_of_the_stages(make: Any, settings: dict[str, Any], odd: bool) -> None:
    """Many tokens, so that the operator is used; its gradient, too."""
    gating = make(E, K, **settings)
    logits_TE = logits_of(2000)
    ctx = RouteContext()
    if odd:
        logits_TE[torch.arange(2000) % 7 == 0] = 0.5
        logits_TE[5, 1], logits_TE[6, 2], logits_TE[7] = torch.nan, torch.inf, -torch.inf
        ctx = RouteContext(valid_T=torch.arange(2000) % 5 != 0)
    logits_TE.requires_grad_()
    results = []
    for router in (Router(gating), Stepwise(gating)):
        assignment = router(logits_TE, ctx)
        slopes_TK = torch.linspace(-1, 1, 2000 * K).reshape(2000, K)
        gradient_TE = torch.autograd.grad(assignment.weights, logits_TE, slopes_TK)[0]
        results.append(tensors_of(assignment) | {"gradient_TE": gradient_TE})
    assert Router(gating)._fuses(logits_TE, ctx)
    assert not Stepwise(gating)._fuses(logits_TE, ctx)
    assert_same_bits(*results)


def test_who_reads_scores_is_not_fused_on_a_cpu() -> None:
    logits_TE = logits_of(2000)
    assert not Noting(Gating.sigmoid(E, K))._fuses(logits_TE, RouteContext())
    assert not balanced()._fuses(logits_TE, RouteContext())
    plain = Router(Gating.softmax(E, K))
    assert not plain._fuses(logits_TE, RouteContext(forced_ids_TK=torch.zeros(2000, K, dtype=torch.int64)))
    assert not Router(Gating.softmax(E, K, soft_cap=5.0))._fuses(logits_TE, RouteContext())
    assert not Router(Gating.softmax(E, K, ties="torch"))._fuses(logits_TE, RouteContext())


def test_logits_of_another_number_of_experts_are_refused_by_the_operator_as_well() -> None:
    with pytest.raises(ShapeError, match="but the gating has 6 experts"):
        Router(Gating.softmax(E, K))(torch.randn(2000, E + 1))
