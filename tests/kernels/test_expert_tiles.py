"""Every row of an expert is in one tile, no expert is in two threads' hands, and no thread waits long in the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Barrier
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moerouters.kernels import expert_mlp_cpu, expert_tiles, threads
from moerouters.kernels.expert_tiles import Plan, Tile, plan_tiles
from support.routed import LOADS, Routed, routed
from support.threads import torch_threads

from .mlp_checks import expect_equal, gradients, products

loads = st.lists(st.one_of(st.just(0), st.integers(1, 40), st.integers(60, 700)), max_size=12)


def planned(load: list[int], count: int, *, row_bytes: int = 1 << 14, least: int = 0) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_tiles, "alone_at_once", lambda: count)
        patch.setattr(expert_tiles, "_LEAST_PRODUCT", least)
        return plan_tiles(load, row_bytes, 1)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Which share out whatever there is."""
    if threads._openmp() is None:
        pytest.skip("does not apply: torch comes without the entry points of GCC's OpenMP")
    monkeypatch.setattr(expert_tiles, "_LEAST_PRODUCT", 0)
    with torch_threads(2):
        yield


@given(load=loads, count=st.sampled_from([1, 2, 3, 16]), row_bytes=st.sampled_from([1, 1 << 14, 1 << 30]))
def test_every_row_is_in_one_tile(load: list[int], count: int, row_bytes: int) -> None:
    plan = planned(load, count, row_bytes=row_bytes)
    tiles = plan.together + [tile for chain in plan.apart for tile in chain]
    experts = [expert for expert, rows in enumerate(load) for _ in range(rows)]
    found = [-1] * sum(load)
    ends: dict[int, list[tuple[bool, bool]]] = {}
    for tile in tiles:
        for expert, rows, first, last in tile.pieces:
            assert 0 <= rows.start < rows.stop <= tile.end - tile.begin
            for row in range(tile.begin + rows.start, tile.begin + rows.stop):
                assert found[row] == -1
                found[row] = expert
            ends.setdefault(expert, []).append((first, last))
    assert found == experts
    assert plan.end == sum(load)
    for each in ends.values():  # in order, so that the first piece writes and the last one has the sum
        assert [first for first, _ in each] == [True] + [False] * (len(each) - 1)
        assert [last for _, last in each] == [False] * (len(each) - 1) + [True]


@given(load=loads, count=st.sampled_from([2, 3, 16]))
def test_no_expert_is_in_two_threads_hands(load: list[int], count: int) -> None:
    plan = planned(load, count)
    owners: dict[int, int] = {}
    for owner, tiles in enumerate([plan.together, *plan.apart]):
        for tile in tiles:
            for piece in tile.pieces:
                assert owners.setdefault(piece.expert, owner) == owner


@given(load=loads, count=st.sampled_from([1, 2, 3, 16]), row_bytes=st.sampled_from([1, 1 << 14, 1 << 30]))
def test_buffers_hold_what_is_worked_on_at_a_time(load: list[int], count: int, row_bytes: int) -> None:
    plan = planned(load, count, row_bytes=row_bytes)
    assert all(tile.end - tile.begin <= plan.rows_alone for chain in plan.apart for tile in chain)
    assert max([plan.threads * plan.rows_alone, *(tile.end - tile.begin for tile in plan.together)]) == plan.buffer_rows
    assert plan.threads * plan.rows_alone <= min(320 * count, (64 << 20) // row_bytes)
    assert plan.buffer_rows <= max(320 * count, 1024)
    if row_bytes == 1 << 30:
        assert plan.buffer_rows <= 64


@pytest.mark.parametrize(
    ("load", "together"),
    [
        ([100] * 8, []),  # four each
        ([100] * 5, [0]),  # two each, and one that both work on
        ([800, 100, 100, 100, 100], [0]),  # else one thread has 800, and the other 400
        ([300, 100, 100, 100], []),  # one thread has the one, the other has three
        ([900], [0]),
        ([0, 0], []),
    ],
    ids=str,
)
def test_two_threads_end_together(load: list[int], together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_tiles, "_ROWS_ALONE", 64)  # experts do not share tiles
    plan = planned(load, 2)
    assert sorted({piece.expert for tile in plan.together for piece in tile.pieces}) == together


def test_small_products_are_not_shared_out() -> None:
    assert planned([100] * 8, 2, least=301).apart == []
    assert planned([300] * 8, 2, least=300).together == []


def test_what_threads_need_for_themselves_has_a_bound() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_tiles, "_LEAST_PRODUCT", 0)
        assert plan_tiles([300] * 8, 1 << 14, 1, threads=2, thread_bytes=31 << 20).together == []
        assert plan_tiles([300] * 8, 1 << 14, 1, threads=2, thread_bytes=(31 << 20) + 1).apart == []


@pytest.mark.usefixtures("two_threads")
def test_halves_that_are_multiplied_as_halves_are_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums are rounded after each tile."""
    monkeypatch.setattr(expert_mlp_cpu, "compute_dtype", lambda dtype: dtype)
    seen: list[Plan] = []
    run = Plan.run

    def noted(plan: Plan, work: Any) -> None:
        seen.append(plan)
        run(plan, work)

    monkeypatch.setattr(Plan, "run", noted)
    for dtype in (torch.bfloat16, torch.float32):
        case = routed(tokens=2000, num_experts=8, dtype=dtype)
        gradients(case.run(), case.wanted)
    assert [bool(plan.apart) for plan in seen] == [False, False, True, True]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_experts_of_two_threads_equal_the_loop(activation: Any, load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_tiles, "_BYTES_ALONE", 0)
    monkeypatch.setattr(expert_tiles, "_BYTES", 0)  # the smallest tiles
    case = routed(load, tokens=150, num_experts=6, activation=activation)
    expect_equal(case.run(), case.run_torch(), case.wanted)


@pytest.mark.usefixtures("two_threads")
def test_two_threads_take_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    both = Barrier(2, timeout=60)
    run = Plan.run

    def noted(plan: Plan, work: Any) -> None:
        seen.append(set())

        def work_noted(tiles: Iterable[Tile], thread: int) -> None:
            if tiles is not plan.together and thread not in seen[-1]:
                seen[-1].add(thread)
                both.wait()  # else one could have done it all before the other woke up
            work(tiles, thread)

        assert not plan.together
        run(plan, work_noted)

    monkeypatch.setattr(Plan, "run", noted)
    case = routed(tokens=2000, num_experts=8, dtype=torch.float32, width=64, expert_width=256)
    gradients(case.run(), case.wanted)
    assert seen == [{0, 1}, {0, 1}]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_each_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes which expert; in bfloat16 a thread's sums have a buffer of its own."""
    monkeypatch.setattr(expert_tiles, "_ROWS_ALONE", 64)
    monkeypatch.setattr(expert_mlp_cpu, "compute_dtype", lambda dtype: torch.float32)
    case = routed(tokens=2000, num_experts=9, dtype=dtype, width=130, expert_width=252)
    first = [case.run().detach(), *gradients(case.run(), case.wanted)]
    for _ in range(5):
        again = [case.run().detach(), *gradients(case.run(), case.wanted)]
        assert all(torch.equal(mine, right) for mine, right in zip(again, first, strict=True))
    with torch_threads(1):
        alone = [case.run().detach(), *gradients(case.run(), case.wanted)]
    limit = 4 * torch.finfo(dtype).eps
    for mine, right in zip(first, alone, strict=True):
        torch.testing.assert_close(mine, right, rtol=limit, atol=limit * float(right.abs().max()))


@pytest.mark.usefixtures("two_threads")
def test_a_hot_expert_is_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = routed("one hot expert", tokens=400, num_experts=5, top_k=1, dtype=torch.float32)
    load = case.load_e.tolist()
    assert load == [400, 0, 0, 0, 0]
    with products(expert_mlp_cpu, monkeypatch) as made:
        Routed.run(case)
    assert made == [(400, 10), (400, 3)]
