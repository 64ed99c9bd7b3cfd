"""Algorithm 1 against a loop over experts in exact arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moerouters import Gating
from moerouters_loss_free.config import LossFreeConfig, Rule
from moerouters_loss_free.router import LossFreeRouter
from moerouters_loss_free.update import centred, error_step, sign_step, violation

RULES: tuple[Rule, ...] = ("sign", "error", "multiplicative")
loads = st.lists(st.integers(0, 2**40), min_size=1, max_size=9)


def step_by_the_paper(load: list[int], rule: Rule, centre: bool) -> list[Fraction]:
    """The direction of every bias, without the rate: e_i = mean - c_i, then its sign, or e_i over the mean."""
    mean = Fraction(sum(load), len(load))
    step = []
    for count in load:
        e = mean - count
        if rule == "error":
            step.append(e / mean if mean else Fraction(0))
        else:
            step.append(Fraction((e > 0) - (e < 0)))
    if centre:
        middle = sum(step) / len(step)
        step = [s - middle for s in step]
    return step


def router(num_experts: int, **config: object) -> LossFreeRouter:
    return LossFreeRouter(Gating.sigmoid(num_experts, 1), LossFreeConfig.model_validate(config))


@given(load=loads)
@example(load=[2**24 + 1, 2**24, 2**24, 2**24])
@example(load=[0, 0, 0])
@example(load=[7])
def test_steps_follow_the_paper(load: list[int]) -> None:
    load_E = torch.tensor(load)
    assert sign_step(load_E).tolist() == step_by_the_paper(load, "sign", False)
    exact = torch.tensor([float(e) for e in step_by_the_paper(load, "error", False)], dtype=torch.float64)
    torch.testing.assert_close(error_step(load_E).double(), exact, rtol=1e-6, atol=1e-6)
    assert violation(load_E).dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 5).flatmap(
        lambda E: st.lists(st.lists(st.integers(0, 50), min_size=E, max_size=E), min_size=1, max_size=6)
    ),
    rule=st.sampled_from(RULES),
    centre=st.booleans(),
    rate=st.sampled_from([0.001, 0.01, 0.3]),
)
def test_a_run_of_updates_follows_the_paper(steps: list[list[int]], rule: Rule, centre: bool, rate: float) -> None:
    E = len(steps[0])
    own = router(E, rule=rule, rate=rate, centre=centre)
    (name,) = own.state_names()
    expected = [1.0 if rule == "multiplicative" else 0.0] * E
    for load in steps:
        own.update({"load_E": torch.tensor(load)})
        for i, direction in enumerate(step_by_the_paper(load, rule, centre)):
            expected[i] += rate * float(direction)
            if rule == "multiplicative":
                expected[i] = max(expected[i], 0.0)
    state_E = own.get_buffer(name)
    assert state_E.dtype == torch.float32
    torch.testing.assert_close(state_E.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_a_sign_rests_on_exact_counts_where_floats_do_not() -> None:
    load_E = torch.tensor([2**24 + 1, 2**24])
    assert sign_step(load_E).tolist() == [-1, 1]
    assert load_E.float().unique().numel() == 1  # what a float32 counter would have seen: balance
    # Counts that bfloat16 rounds to the other side of their mean.
    load_E = torch.tensor([40_840, 40_830, 40_820, 40_830])
    assert sign_step(load_E).tolist() == [-1, 0, 1, 0]
    rounded_E = load_E.bfloat16()
    assert (rounded_E.mean() - rounded_E).sign().tolist() != [-1, 0, 1, 0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("centre", [False, True])
def test_no_tokens_change_nothing(rule: Rule, centre: bool) -> None:
    own = router(3, rule=rule, centre=centre)
    (name,) = own.state_names()
    own.update({"load_E": torch.tensor([5, 1, 0])})
    before_E = own.get_buffer(name).clone()
    assert not torch.equal(before_E, torch.full((3,), before_E[0].item()))
    own.update({"load_E": torch.zeros(3, dtype=torch.int64)})
    assert torch.equal(own.get_buffer(name), before_E)


def test_centring_keeps_the_mean_of_the_bias() -> None:
    load_E = torch.tensor([100, 0, 0, 0])  # three signs up, one down: the plain rule drifts by +0.5 a step
    plain, centre = router(4, rate=0.1), router(4, rate=0.1, centre=True)
    for _ in range(10):
        plain.update({"load_E": load_E})
        centre.update({"load_E": load_E})
    assert plain.get_buffer("expert_bias_E").mean().item() == pytest.approx(0.5)
    assert centre.get_buffer("expert_bias_E").mean().item() == pytest.approx(0, abs=1e-6)
    assert centred(sign_step(load_E)).tolist() == [-1.5, 0.5, 0.5, 0.5]


def test_a_factor_never_turns_negative() -> None:
    own = router(2, rule="multiplicative", rate=0.4)
    for _ in range(5):
        own.update({"load_E": torch.tensor([9, 1])})
    assert own.get_buffer("expert_scale_E").tolist() == pytest.approx([0, 3])


def test_the_default_dtype_of_torch_does_not_matter() -> None:
    load_E = torch.tensor([1000, 1001, 1003])
    expected_E = error_step(load_E)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(error_step(load_E), expected_E)
        assert sign_step(load_E).dtype == torch.float32
    finally:
        torch.set_default_dtype(default)
