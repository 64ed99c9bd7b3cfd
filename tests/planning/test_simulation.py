"""Worlds of ranks: loads that are drawn, groups that wait, and what is left out."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from moerouters.bench.shapes import Shape
from moerouters.errors import ConfigError
from moerouters.planning import simulation as module
from moerouters.planning.cluster import PRESETS
from moerouters.planning.load_models import LoadModel, load_models
from moerouters.planning.packing import Floats
from moerouters.planning.simulation import STAGES, Scenario, Simulation, simulate, winners
from moerouters.planning.stages import BACKENDS

H100 = PRESETS["h100-nvl8-ib400"]
SHAPE = Shape(name="small", T=512, D=256, E=64, K=4, F=128, layers=1)
SKEWED = tuple(load_models("lognormal:max_vio=1"))


def scenario(**changes: object) -> Scenario:
    plain = Scenario(cluster=H100, shape=SHAPE, worlds=(8, 64), loads=tuple(load_models("uniform")), layers=4)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_stages_add_up_and_agree_with_the_formulas() -> None:
    found = simulate(scenario(worlds=(8,)))
    assert {each.backend for each in found.estimates} == set(BACKENDS)
    for each in found.estimates:
        for part in (each.forward, each.backward):
            assert part.total == pytest.approx(sum(getattr(part, name) for name in STAGES))
        assert each.tokens_per_s == pytest.approx(8 * 512 / (each.total_ms / 1e3))
        assert each.stage_ms("gate") == each.forward.gate + each.backward.gate
    assert Simulation.model_validate_json(found.model_dump_json(by_alias=True)) == found


def test_every_pair_is_drawn_once() -> None:
    """The slowest rank of many draws has no less than its part, and of one rank just all."""
    alone = simulate(scenario(worlds=(1,), loads=SKEWED, backends=("all_to_all",)))
    assert alone.estimates[0].imbalance == 1 and alone.estimates[0].stage_ms("idle") == 0

    drawn: list[Floats] = []

    class Counting(LoadModel):
        def shares(self, num_experts: int, num_layers: int, random: np.random.Generator) -> Floats:
            shares_LE = super().shares(num_experts, num_layers, random)
            drawn.append(shares_LE)
            return shares_LE

    found = simulate(scenario(worlds=(8,), loads=(Counting("x", "zipf", 3.0),), backends=("all_to_all", "padded")))
    (shares_LE,) = drawn  # once for all back-ends of a group
    expected = shares_LE.reshape(4, 8, 8).sum(axis=2).max(axis=1).mean() * 8
    assert found.estimates[0].imbalance == pytest.approx(expected, rel=0.03)


def test_idle_time_grows_with_unevenness_and_waits_for_the_slowest_group() -> None:
    loads = tuple(load_models("uniform,lognormal:max_vio=0.5,lognormal:max_vio=2"))
    found = simulate(scenario(loads=loads, backends=("all_to_all", "padded")))
    for world in (8, 64):
        idle = [
            each.stage_ms("idle") for each in found.estimates if (each.ranks, each.backend) == (world, "all_to_all")
        ]
        assert idle == sorted(idle) and idle[0] < idle[-1]
        assert all(each.stage_ms("idle") == 0 for each in found.estimates if each.backend == "padded")
    few, many = (
        simulate(scenario(worlds=(world,), group=8, backends=("all_to_all",))).estimates[0] for world in (8, 512)
    )
    assert few.group == many.group == 8 and many.stage_ms("idle") > few.stage_ms("idle")
    assert few.stage_ms("experts") == many.stage_ms("experts")


def test_placed_experts_wait_less() -> None:
    chance, placed = (
        simulate(scenario(worlds=(64,), group=8, loads=SKEWED, backends=("all_to_all",), placed=placed)).estimates[0]
        for placed in (False, True)
    )
    assert placed.imbalance < chance.imbalance and placed.stage_ms("idle") < 0.7 * chance.stage_ms("idle")


def test_padded_drops_what_finds_no_room() -> None:
    tight, loose = (
        simulate(scenario(worlds=(8,), loads=SKEWED, backends=("padded",), capacity_factor=factor)).estimates[0]
        for factor in (1.0, 3.0)
    )
    assert tight.dropped > 0.05 and loose.dropped < 0.001
    assert tight.total_ms < loose.total_ms
    # By hand: with all pairs at one expert, all but its room are dropped.
    batch = module.Batch(T=10, D=1, E=4, K=1, F=1, capacity=4)
    shares_LE = np.array([[1.0, 0, 0, 0]])
    assert module._dropped(batch, shares_LE, np.random.default_rng(0)) == pytest.approx(0.6)


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert simulate(scenario(loads=SKEWED)) == simulate(scenario(loads=SKEWED))
    assert simulate(scenario(loads=SKEWED)) != simulate(scenario(loads=SKEWED, seed=1))


def test_experts_may_grow_with_the_world() -> None:
    fixed, grown = (
        simulate(scenario(worlds=(512,), grow=grow, backends=("all_to_all",))).estimates[0] for grow in (False, True)
    )
    assert (fixed.group, grown.group) == (64, 512)
    assert grown.stage_ms("gate") > fixed.stage_ms("gate")


def test_what_does_not_divide_is_left_out_or_told() -> None:
    found = simulate(scenario(worlds=(8, 24)))
    assert {each.ranks for each in found.estimates} == {8, 24}
    assert {each.backend for each in found.estimates if each.ranks == 24} == {"tensor_sliced"}
    assert "all_to_all on 24 ranks" in found.left_out
    with pytest.raises(ConfigError, match=r"(?s)none of this.*64 experts and 24 ranks do not divide into groups of 24"):
        simulate(scenario(worlds=(24,), backends=("all_to_all",)))
    with pytest.raises(ConfigError, match="12 ranks cannot be laid on nodes of 8"):
        simulate(scenario(worlds=(12,), group=4))


def test_the_fastest_fits_and_drops_little() -> None:
    found = simulate(scenario(worlds=(64,), loads=SKEWED, capacity_factor=1.0))
    best = winners(found)[(SKEWED[0].label, 64)]
    others = [each for each in found.estimates if each.fits and each.dropped <= 0.01]
    assert best.total_ms == min(each.total_ms for each in others)
    small = H100.model_copy(update={"memory_bytes": 1.0})
    assert not winners(simulate(scenario(cluster=small, worlds=(64,))))


def test_processors_that_are_shared_slow_everything() -> None:
    shared = H100.model_copy(update={"processors": 2, "forward_s": 1e-3})
    alone = H100.model_copy(update={"forward_s": 1e-3})
    slow, fast = (
        simulate(scenario(cluster=each, worlds=(8,))).of("all_to_all", "uniform", 8) for each in (shared, alone)
    )
    assert slow is not None and fast is not None
    assert slow.forward.host == pytest.approx(4 * fast.forward.host)
    assert slow.forward.experts == pytest.approx(4 * fast.forward.experts)
    assert simulate(scenario(worlds=(8,))).of("all_to_all", "uniform", 9) is None


def test_65536_ranks_take_seconds() -> None:
    began = time.process_time()
    loads = tuple(load_models("uniform,lognormal:max_vio=1"))
    found = simulate(scenario(worlds=(65536,), loads=loads, layers=32, backends=("all_to_all", "tensor_sliced")))
    assert len(found.estimates) == 4
    assert time.process_time() - began < 20
