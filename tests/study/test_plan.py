"""What a study is made of, and what of it can be changed."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from moerouters.errors import ConfigError
from moerouters.study.contender import Contender
from moerouters.study.plan import Budget, ModelSpec, Plan
from moerouters.study.presets import PRESETS, preset
from support.study import DENSE, PLAN, SHARED, TOPK


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("20", 20, "tokens_per_parameter"), ("1.5", 1.5, "tokens_per_parameter"), (" 90s ", 90, "seconds")],
)
def test_budgets(text: str, amount: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(amount=amount, unit=unit)


@pytest.mark.parametrize("text", ["", "20x", "-3", "0", "s"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the budget"):
        Budget.parse(text)


def test_budgets_in_steps() -> None:
    size = {"active_parameters": 1000, "batch_tokens": 100, "step_s": 0.5}
    assert Budget(amount=20).steps(**size) == 200
    assert Budget(amount=60, unit="seconds").steps(**size) == 120
    assert Budget(amount=0.001).steps(**size) == 1


def test_presets_are_whole() -> None:
    """Every model can be built, starts with the active width of its partner, and has a partner of its own width."""
    for name, plan in PRESETS.items():
        assert plan.preset == name
        for spec in plan.models:
            contender = Contender.of(plan, spec)
            s = contender.settings
            if spec.partner is None:
                assert s.dense_size > 0 and contender.entrant is None
                continue
            theirs = plan.settings_of(plan.model(spec.partner))
            assert (s.dense_size, s.hidden_size, s.num_layers) == (0, theirs.hidden_size, theirs.num_layers)
            active = (contender.active_experts + spec.shared_experts) * s.expert_size
            assert abs(active - theirs.dense_size) <= plan.multiple * (contender.active_experts + spec.shared_experts)
            assert s.shared_size == spec.shared_experts * s.expert_size


def test_the_small_study_has_what_it_promises() -> None:
    plan = PRESETS["small"]
    assert len(plan.seeds) == 3 and sum(spec.router is None for spec in plan.models) == 3
    routers = {spec.router for spec in plan.models}
    assert routers >= {"topk", "loss-free", "bip", "ds-moe"}
    assert any(spec.shared_experts for spec in plan.models)
    assert len({plan.settings_of(spec).num_experts for spec in plan.models if spec.router}) > 1


def test_an_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        preset("tny")


def test_models_bring_their_partners() -> None:
    plan = PRESETS["tiny"].selected("topk-m")
    assert [spec.name for spec in plan.models] == ["dense-m", "topk-m"]
    assert PRESETS["tiny"].selected(None) is PRESETS["tiny"]
    for names in ("topk-x", ","):
        with pytest.raises(ConfigError, match="--models"):
            PRESETS["tiny"].selected(names)


def test_changes_of_all_models_and_of_one() -> None:
    plan = PRESETS["tiny"].changed(("hidden_size=32", "dense-s.dense_size=40", "topk-m.num_experts=4"))
    sizes = {spec.name: plan.settings_of(spec) for spec in plan.models}
    assert {s.hidden_size for s in sizes.values()} == {32}
    assert [sizes[name].dense_size for name in ("dense-s", "dense-m", "topk-m")] == [40, 512, 0]
    assert (sizes["topk-m"].num_experts, sizes["loss-free-m"].num_experts) == (4, 8)
    everyone = PRESETS["tiny"].changed(("dense_size=24",))
    assert [everyone.settings_of(spec).dense_size for spec in everyone.models] == [24, 24, 0, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps_=3", "unknown"),
        ("topk-x.top_k=1", "no model 'topk-x'"),
        ("topk-m.top_k=99", "top_k"),
        ("topk-m.topk=1", "top_k"),
        ("topk-m.knob=width", "knob.*'expert_size' or 'num_layers'"),
        ("topk-m.shared_experts=-1", "shared_experts"),
        ("dense-m.router=bip", "both a router and a partner"),
    ],
)
def test_changes_that_cannot_be(change: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PRESETS["tiny"].changed((change,))


def test_the_row_itself_can_be_changed() -> None:
    changes = ("topk-m.router=bip:iterations=8", "topk-m.shared_experts=1", "topk-m.knob=num_layers", "topk-m.top_k=1")
    spec = PRESETS["tiny"].changed(changes).model("topk-m")
    assert (spec.router, spec.shared_experts, spec.knob) == ("bip:iterations=8", 1, "num_layers")
    assert spec.settings == {"top_k": 1}


def test_a_search_over_depth_keeps_the_width_of_the_partner() -> None:
    plan = PRESETS["tiny"].changed(("topk-m.knob=num_layers", "num_layers=3"))
    start = Contender.of(plan, plan.model("topk-m"))
    assert start.settings.expert_size == 256  # half of the dense model's 512
    deeper = start.sized(4).settings
    assert (deeper.num_layers, deeper.expert_size) == (4, 256)


def test_what_is_no_plan() -> None:
    with pytest.raises(ValidationError, match="a router and a partner"):
        ModelSpec(name="a", router="topk")
    with pytest.raises(ValidationError, match="one name"):
        Plan.model_validate(PLAN.model_dump() | {"models": [DENSE.model_dump()] * 2})
    with pytest.raises(ValidationError, match="is no dense model"):
        Plan.model_validate(PLAN.model_dump() | {"models": [TOPK.model_dump()]})


def test_a_size_takes_its_shared_expert_along() -> None:
    plan = PLAN.model_copy(update={"models": (DENSE, SHARED)})
    start = Contender.of(plan, SHARED)
    assert (start.settings.expert_size, start.settings.shared_size) == (4, 4)  # 16 wide, 2 + 1 experts
    assert start.sized(12).settings.shared_size == 12
