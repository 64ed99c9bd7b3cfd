"""Parts shared out over torch's threads and over kept ones: all are done, and errors come back."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moerouters.kernels import dual, gating, selection_network, threads
from moerouters.kernels.gating_rule import Rule
from moerouters.kernels.threads import share_out
from moerouters.kernels.topk import topk_lowest_id
from support.threads import torch_threads

TASKS = Path("/proc/self/task")


@pytest.fixture(autouse=True, params=["torch's", "kept"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two threads, of each kind."""
    if request.param == "kept":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("does not apply: torch comes without the entry points of GCC's OpenMP")
    with torch_threads(2):
        yield request.param


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_part_is_done_once(count: int) -> None:
    done: list[int] = []
    share_out(done.extend, range(count))
    assert sorted(done) == list(range(count))


def test_several_threads_do_it() -> None:
    both = threading.Barrier(2, timeout=30)
    share_out(lambda some: both.wait(), [0, 1])  # would time out in one


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_comes_back_after_all_have_ended(bad: int) -> None:
    ended: list[int] = []

    def run(some: Iterable[int]) -> None:
        for part in some:
            if part == bad:
                raise ValueError("no")
            ended.append(part)

    with pytest.raises(ValueError, match="no"):
        share_out(run, [0, 1])
    assert ended == [1 - bad]


@pytest.mark.parametrize("centred", [True, False])
def test_a_dual_step_has_the_same_bits_in_several_threads(centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_network, "SHARED_BLOCK", 16 * 200)
    monkeypatch.setattr(dual, "AT_ONCE", 3 * 1000)
    scores_TE = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    scores_TE[::7] = -torch.inf  # tokens that stay away
    options: Any = {"top_k": 3, "iterations": 4, "centred": centred}
    found_E = dual.dual_update(scores_TE, torch.zeros(16), **options)
    assert torch.equal(found_E, dual.dual_update_torch(scores_TE, torch.zeros(16), **options))


def _topk(values_TE: torch.Tensor) -> tuple[list[int], int]:
    torch.set_num_threads(2)
    return topk_lowest_id(values_TE, 2)[:3].flatten().tolist(), threads.alone_at_once()


def test_a_fork_has_threads_of_its_own(team: str) -> None:
    values_TE = torch.randn(3 * 4096, 64, generator=torch.Generator().manual_seed(0))
    expected, here = _topk(values_TE)
    assert here == (2 if team == "torch's" else 1)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_topk, [values_TE]).get(timeout=60) == (expected, 1)


def test_more_threads_than_parts_do_each_once() -> None:
    with torch_threads(8):
        for _ in range(20):
            done: list[int] = []
            share_out(done.extend, range(3))
            assert sorted(done) == [0, 1, 2]


def test_an_interrupt_that_no_share_has_seen_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a signal arrives in the caller's thread before its share begins, and ctypes prints the exception."""
    if threads._team() is None:
        pytest.skip("does not apply: kept threads take no part in signals")
    lost = threads.Team(lambda *arguments: None, lambda: 0)
    monkeypatch.setattr(threads, "_openmp", lambda: lost)
    with pytest.raises(KeyboardInterrupt):
        share_out(list, [0, 1])


def test_an_error_is_let_go() -> None:
    class Held:
        pass

    def run(some: Iterable[int]) -> None:
        held = Held()
        kept.append(weakref.ref(held))
        raise ValueError("no")

    kept: list[weakref.ref[Held]] = []
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"):
            share_out(run, [0, 1])
        assert len(kept) == 2
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


def test_torch_works_without_gradients_in_the_mode_of_the_caller() -> None:
    seen: list[tuple[bool, bool]] = []
    both = threading.Barrier(2, timeout=30)

    def run(some: Iterable[int]) -> None:
        both.wait()
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    share_out(run, [0, 1])
    with torch.inference_mode():
        share_out(run, [0, 1])
    assert seen == [(False, False)] * 2 + [(False, True)] * 2
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.skipif(not TASKS.exists(), reason="does not apply: this system does not list a process's threads")
def test_torch_works_alone() -> None:
    both = threading.Barrier(2, timeout=30)
    many_N = torch.zeros(1 << 20)

    def run(some: Iterable[torch.Tensor]) -> None:
        both.wait()
        for each_N in some:  # by no function of MKL, which counts its own threads
            each_N.neg()

    share_out(run, [torch.zeros(1)] * 2)
    before = len(list(TASKS.iterdir()))
    share_out(run, [many_N] * 2)
    assert len(list(TASKS.iterdir())) == before
    assert torch.get_num_threads() == 2


def test_sharing_within_a_share_does_not_wait_for_itself() -> None:
    done: list[int] = []
    share_out(lambda some: [share_out(done.extend, range(n, n + 2)) for n in some], range(0, 40, 2))
    assert sorted(done) == list(range(40))


def test_gating_has_the_same_bits_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gating, "CHUNK", 100 * 16)
    logits_TE = torch.randn(1050, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    valid_T = torch.arange(1050) % 5 > 0
    rule = Rule("softmax", 3)
    cases: list[dict[str, Any]] = [{}, {"bias_E": torch.linspace(-1, 1, 16), "valid_T": valid_T, "cutoff": True}]
    for options in cases:
        found = gating.fused_gating(logits_TE, rule, **options)
        expected = gating.fused_gating_torch(logits_TE, rule, **options)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        grads = [torch.autograd.grad(each.weights_TK.square().sum(), logits_TE)[0] for each in (found, expected)]
        assert torch.equal(*grads)
        with torch.inference_mode():
            assert torch.equal(gating.fused_gating(logits_TE, rule, **options).weights_TK, expected.weights_TK)
