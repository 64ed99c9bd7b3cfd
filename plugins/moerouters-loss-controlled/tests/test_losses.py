"""The losses against loops over tokens and experts, and their gradients against formulas and finite differences."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moerouters import Gating, RouteContext
from moerouters_loss_controlled.config import LossControlledConfig
from moerouters_loss_controlled.router import LossControlledRouter

NAMES = ("switch", "sequence", "global", "z")
EVERY = {"alpha": 0.5, "sequence_alpha": 0.25, "global_alpha": 2.0, "z_alpha": 0.125}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A micro-batch as plain lists."""

    score: str
    K: int
    E: int
    logits: list[list[float]]
    valid: list[bool]
    sequences: list[int]
    num_sequences: int
    committed: list[int] | None  # the load of the last step


def probabilities(row: list[float], score: str) -> list[float]:
    if score == "softmax":
        parts = [math.exp(value - max(row)) for value in row]
    else:
        parts = [1 / (1 + math.exp(-value)) for value in row]
    return [part / sum(parts) for part in parts]


def balance(tokens: list[tuple[list[float], list[int]]], num_experts: int, counts: list[int] | None = None) -> float:
    """Eq. 2 of arXiv:2408.15664 over (probabilities, counted experts) of each token; counts: another load for f."""
    if not tokens:
        return 0.0
    if counts is None:
        counts = [sum(experts.count(i) for _, experts in tokens) for i in range(num_experts)]
    total = 0.0
    for i in range(num_experts):
        f = num_experts * counts[i] / sum(counts)
        P = sum(p[i] for p, _ in tokens) / len(tokens)
        total += f * P
    return total


def losses_by_the_papers(case: Case, form: str) -> dict[str, float]:
    tokens, of_sequence, squares = [], {}, []
    for row, real, sequence in zip(case.logits, case.valid, case.sequences, strict=True):
        if not real:
            continue
        ranked = sorted(range(case.E), key=lambda e, row=row: (-row[e], e))
        token = (probabilities(row, case.score), ranked[: case.K] if form == "switch" else ranked[:1])
        tokens.append(token)
        of_sequence.setdefault(sequence, []).append(token)
        squares.append(math.log(sum(math.exp(value) for value in row)) ** 2)
    per_sequence = [balance(members, case.E) for members in of_sequence.values()]
    return {
        "switch": EVERY["alpha"] * balance(tokens, case.E),
        "sequence": EVERY["sequence_alpha"] * sum(per_sequence) / max(len(per_sequence), 1),
        "global": EVERY["global_alpha"] * balance(tokens, case.E, case.committed),
        "z": EVERY["z_alpha"] * sum(squares) / max(len(squares), 1),
    }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    E, T = draw(st.integers(1, 5)), draw(st.integers(0, 7))
    num_sequences = draw(st.integers(1, 3))
    # Quarters, so that the order by logits is the order by scores; up to 6, where experts collapse.
    value = st.integers(-24, 24).map(lambda quarters: quarters / 4)
    load = st.lists(st.integers(0, 9), min_size=E, max_size=E).filter(any)
    return Case(
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        K=draw(st.integers(1, E)),
        E=E,
        logits=draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=T, max_size=T)),
        valid=draw(st.lists(st.booleans(), min_size=T, max_size=T)),
        sequences=draw(st.lists(st.integers(0, num_sequences - 1), min_size=T, max_size=T)),
        num_sequences=num_sequences,
        committed=draw(st.none() | load),
    )


COLLAPSED = Case(
    score="softmax", K=1, E=4, logits=[[6.0, -6.0, -6.0, -6.0]] * 5, valid=[True] * 5, sequences=[0, 0, 1, 1, 1],
    num_sequences=2, committed=[0, 0, 0, 9],
)  # fmt: skip
NO_TOKEN = Case(
    score="sigmoid", K=2, E=3, logits=[[1.0, 2.0, 3.0]], valid=[False], sequences=[1], num_sequences=3, committed=None
)


def prepare(case: Case, **config: object) -> tuple[LossControlledRouter, Tensor, RouteContext]:
    gating = getattr(Gating, case.score)(case.E, case.K)
    router = LossControlledRouter(gating, LossControlledConfig.model_validate(config))
    if case.committed is not None and router.config.remembers:
        router.update({"load_E": torch.tensor(case.committed)})
    ctx = RouteContext(
        valid_T=torch.tensor(case.valid, dtype=torch.bool),
        sequence_ids_T=torch.tensor(case.sequences, dtype=torch.int64),
        num_sequences=case.num_sequences,
    )
    logits_TE = torch.tensor(case.logits, dtype=torch.float64).reshape(-1, case.E).requires_grad_()
    return router, logits_TE, ctx


@settings(max_examples=120, deadline=None)
@given(case=cases(), form=st.sampled_from(["switch", "gshard"]))
@example(case=COLLAPSED, form="switch")
@example(case=COLLAPSED, form="gshard")
@example(case=NO_TOKEN, form="switch")
def test_losses_follow_the_papers(case: Case, form: str) -> None:
    router, logits_TE, ctx = prepare(case, form=form, **EVERY)
    found = router(logits_TE, ctx).validate().losses
    expected = losses_by_the_papers(case, form)
    assert list(found) == list(expected)
    # The committed fraction is float32 state; everything else is float64 here.
    tolerance = {name: 1e-6 if name == "global" and case.committed else 1e-12 for name in expected}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=tolerance[name], abs=tolerance[name]), name


@settings(max_examples=20, deadline=None)
@given(case=cases(), form=st.sampled_from(["switch", "gshard"]))
@example(case=COLLAPSED, form="switch")
@example(case=NO_TOKEN, form="switch")
def test_gradients_are_those_of_the_losses(case: Case, form: str) -> None:
    """Finite differences with the choice held fixed: f is a constant, the gradient flows through P alone."""
    router, logits_TE, ctx = prepare(case, form=form, **EVERY)
    forced_TK = router(logits_TE, ctx).expert_ids_TK
    fixed = RouteContext(
        valid_T=ctx.valid_T,
        sequence_ids_T=ctx.sequence_ids_T,
        num_sequences=ctx.num_sequences,
        forced_ids_TK=forced_TK,
    )
    assert torch.autograd.gradcheck(lambda x: tuple(router(x, fixed).losses.values()), (logits_TE,))


@pytest.mark.parametrize("E", [3, 8])
def test_the_gradient_of_softmax_is_the_formula(E: int) -> None:
    """d loss / d logit_tj = alpha / T * p_tj * (f_j - sum_i f_i p_ti)."""
    torch.manual_seed(0)
    logits_TE = torch.randn(10, E, dtype=torch.float64, requires_grad=True)
    router = LossControlledRouter(Gating.softmax(E, 2), LossControlledConfig(alpha=0.3))
    assignment = router(logits_TE)
    assignment.losses["switch"].backward()
    p_TE = logits_TE.detach().softmax(dim=-1)
    f_E = assignment.load_E.double() * E / 20
    expected_TE = 0.3 / 10 * p_TE * (f_E - (f_E * p_TE).sum(dim=1, keepdim=True))
    torch.testing.assert_close(logits_TE.grad, expected_TE)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "relu", "softmax_after_topk"])
@pytest.mark.parametrize(("E", "K"), [(6, 1), (6, 2), (6, 6), (1, 1)])
@pytest.mark.parametrize("form", ["switch", "gshard"])
def test_balance_costs_exactly_the_coefficient(score: str, E: int, K: int, form: str) -> None:
    """Token t prefers expert t, then t + 1, ...: every expert gets K tokens, and one as first choice."""
    gating = getattr(Gating, score)(E, K)
    falling_E = torch.linspace(4.0, 1.0, E, dtype=torch.float64)
    logits_TE = torch.stack([falling_E.roll(t) for t in range(E)])
    config = LossControlledConfig(alpha=0.02, sequence_alpha=0.03, global_alpha=0.04, form=form)
    router = LossControlledRouter(gating, config)
    router.update({"load_E": torch.full((E,), 10**9)})
    ctx = RouteContext(sequence_ids_T=torch.zeros(E, dtype=torch.int64), num_sequences=1)
    found = router(logits_TE, ctx).losses
    values = {name: loss.item() for name, loss in found.items()}
    assert values == pytest.approx({"switch": 0.02, "sequence": 0.03, "global": 0.04}, rel=1e-6)


def test_a_collapsed_layer_costs_the_number_of_experts() -> None:
    logits_TE = torch.full((9, 4), -30.0, dtype=torch.float64)
    logits_TE[:, 2] = 30.0
    router = LossControlledRouter(Gating.softmax(4, 1), LossControlledConfig(alpha=1.0))
    assert router(logits_TE).losses["switch"].item() == pytest.approx(4.0)


@pytest.mark.parametrize("form", ["switch", "gshard"])
def test_padding_leaves_every_loss_and_gradient(form: str) -> None:
    torch.manual_seed(1)
    real_TE = torch.randn(7, 4, dtype=torch.float64)
    config = LossControlledConfig(form=form, **EVERY)
    sequence_ids_T = torch.tensor([0, 0, 0, 1, 1, 1, 1])

    def run(logits_TE: Tensor, ctx: RouteContext) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        router = LossControlledRouter(Gating.softmax(4, 2), config)
        logits_TE = logits_TE.clone().requires_grad_()
        assignment = router(logits_TE, ctx)
        (gradient_TE,) = torch.autograd.grad(torch.stack(list(assignment.losses.values())).sum(), logits_TE)
        return dict(assignment.losses), gradient_TE, dict(assignment.stats)

    plain, plain_gradient, plain_stats = run(real_TE, RouteContext(sequence_ids_T=sequence_ids_T, num_sequences=2))
    junk_TE = torch.tensor([[1e30, 0, 0, 0], [float("nan")] * 4, [float("inf"), 0, 0, -float("inf")]])
    padded, padded_gradient, padded_stats = run(
        torch.cat([real_TE, junk_TE.double()]),
        RouteContext(
            valid_T=torch.arange(10) < 7,
            # Padding carries ids that no sequence has.
            sequence_ids_T=torch.cat([sequence_ids_T, torch.tensor([-1, 2, 99])]),
            num_sequences=2,
        ),
    )
    for name in NAMES:
        torch.testing.assert_close(padded[name], plain[name])
    torch.testing.assert_close(padded_gradient[:7], plain_gradient)
    assert (padded_gradient[7:] == 0).all()
    assert torch.equal(padded_stats["load_E"], plain_stats["load_E"])


def test_no_tokens_give_zeros_with_a_graph() -> None:
    router = LossControlledRouter(Gating.sigmoid(4, 2), LossControlledConfig(**EVERY))
    logits_TE = torch.zeros(0, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    found = router(logits_TE, RouteContext(sequence_ids_T=none, num_sequences=0)).losses
    assert [found[name].item() for name in NAMES] == [0.0] * 4
    total = torch.stack(list(found.values())).sum()
    (gradient_TE,) = torch.autograd.grad(total, logits_TE)
    assert gradient_TE.shape == (0, 4)


def test_sigmoid_scores_are_normalised_before_they_are_averaged() -> None:
    """Raw sigmoids let a gate lower the loss by lowering every score; their shares do not."""
    torch.manual_seed(2)
    logits_TE = torch.randn(64, 4, dtype=torch.float64) - 20
    router = LossControlledRouter(Gating.sigmoid(4, 1), LossControlledConfig(alpha=1.0))
    assert router(logits_TE).losses["switch"].item() > 1.0
