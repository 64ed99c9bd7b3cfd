"""Sinkhorn's potentials against loops that normalise a matrix, and against what a balanced plan has to satisfy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moerouters_sinkhorn.plan import OPINION, sinkhorn_potential

Table = list[list[float]]


def sinkhorn_loops(
    logits: Table, potential: list[float], valid: list[bool], *, iterations: int, tau: float
) -> list[float]:
    """The plan as a matrix of positive numbers whose rows and columns are divided by their sums in turn. What columns
    were divided by is the potential. Only for logits that exp can take."""
    E = len(potential)
    tokens = [t for t, real in enumerate(valid) if real]
    if not tokens:
        return potential
    plan = {t: [math.exp((logits[t][e] - potential[e]) / tau) for e in range(E)] for t in tokens}
    log_of_column = [value / tau for value in potential]
    for _ in range(iterations):
        for t in tokens:
            total = sum(plan[t])
            plan[t] = [value / total for value in plan[t]]
        for e in range(E):
            total = sum(plan[t][e] for t in tokens)
            log_of_column[e] += math.log(total)
            for t in tokens:
                plan[t][e] /= total
    mean = sum(log_of_column) / E
    return [OPINION * tau * (value - mean) for value in log_of_column]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, list[float], list[bool]]:
    T, E = draw(st.integers(0, 6), label="T"), draw(st.integers(1, 5), label="E")
    value = st.integers(-24, 24).map(lambda n: n / 8)
    logits = draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=T, max_size=T), label="logits")
    potential = draw(st.lists(value, min_size=E, max_size=E), label="potential")
    valid = draw(st.lists(st.booleans(), min_size=T, max_size=T), label="valid")
    return logits, potential, valid


@settings(deadline=None, max_examples=60)
@given(problem=problems(), iterations=st.integers(1, 5), tau=st.sampled_from([0.5, 1.0, 2.0]))
def test_potentials_equal_the_loops(
    problem: tuple[Table, list[float], list[bool]], iterations: int, tau: float
) -> None:
    logits, potential, valid = problem
    logits_TE = torch.tensor(logits, dtype=torch.float64).reshape(len(logits), len(potential))
    valid_T = torch.tensor(valid, dtype=torch.bool)
    logits_TE[~valid_T] = float("nan")  # never read
    found_E = sinkhorn_potential(
        logits_TE,
        torch.tensor(potential, dtype=torch.float64),
        iterations=iterations,
        temperature=tau,
        valid_T=valid_T,
    )
    expected = sinkhorn_loops(logits, potential, valid, iterations=iterations, tau=tau)
    torch.testing.assert_close(found_E, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_plan_has_balanced_columns(temperature: float, generator: torch.Generator) -> None:
    """Rows of softmax((l - b) / temperature) sum to 1, and its columns to n / E, once converged."""
    T, E = 96, 8
    logits_TE = torch.randn(T, E, generator=generator, dtype=torch.float64) + torch.linspace(2, -2, E)
    b_E = sinkhorn_potential(logits_TE, torch.zeros(E), iterations=500, temperature=temperature) / OPINION
    mass_E = ((logits_TE - b_E) / temperature).softmax(dim=1).sum(dim=0)
    torch.testing.assert_close(mass_E, torch.full((E,), T / E, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert float(b_E.mean()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_logit_is_too_large(dtype: torch.dtype, generator: torch.Generator) -> None:
    """exp(1e4) is infinite in either dtype, and the multiplicative form makes NaN of it."""
    logits_TE = 1e4 * torch.randn(32, 4, generator=generator, dtype=dtype)
    for temperature in (1e-3, 1.0, 1e3):
        b_E = sinkhorn_potential(logits_TE, torch.zeros(4), iterations=8, temperature=temperature)
        assert bool(torch.isfinite(b_E).all()) and b_E.dtype == dtype


def test_what_a_token_adds_to_all_experts_changes_nothing(generator: torch.Generator) -> None:
    logits_TE = torch.randn(32, 4, generator=generator, dtype=torch.float64)
    plain_E, shifted_E = (
        sinkhorn_potential(given_TE, torch.zeros(4), iterations=8, temperature=1.0)
        for given_TE in (logits_TE, logits_TE + 7 * torch.arange(32).unsqueeze(1))
    )
    torch.testing.assert_close(shifted_E, plain_E, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 50])
def test_where_the_plan_is_uniform_the_logits_decide(tokens: int, generator: torch.Generator) -> None:
    logits_1E = torch.randn(1, 8, generator=generator)
    b_E = sinkhorn_potential(logits_1E.expand(tokens, 8), torch.zeros(8), iterations=8, temperature=1.0)
    assert (logits_1E - b_E).argsort(dim=1).tolist() == logits_1E.argsort(dim=1).tolist()


def test_without_tokens_the_potential_comes_back() -> None:
    potential_E = torch.tensor([0.3, -0.1, 0.2])
    nobody_T = torch.zeros(4, dtype=torch.bool)
    given: list[tuple[Tensor, Tensor | None]] = [(torch.zeros(0, 3), None), (torch.zeros(4, 3), nobody_T)]
    for logits_TE, valid_T in given:
        found_E = sinkhorn_potential(logits_TE, potential_E, iterations=3, temperature=1.0, valid_T=valid_T)
        assert torch.equal(found_E, potential_E)
