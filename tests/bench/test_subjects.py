"""`moerouters bench router`, `dispatch` and `balance`: what they run, and what they refuse to time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import moerouters
from moerouters import available
from moerouters.bench import balance
from moerouters.bench.balance import DualCase, StepCase, balance_cases, plain_dual
from moerouters.bench.case import Request, Unavailable
from moerouters.bench.dispatch import BOTH, PLAN, dispatch_cases
from moerouters.bench.measure import measure
from moerouters.bench.router import router_cases
from moerouters.bench.shapes import Shape
from support.threads import torch_threads

SHAPE = Shape(name="s", T=48, D=8, E=4, K=2, F=8)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with torch_threads():
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def request_of(subject: str, **options: object) -> Request:
    return Request.model_validate({"subject": subject, "shapes": (SHAPE,), "threads": 1, "rounds": 2, **options})


def test_every_installed_router_is_timed() -> None:
    for case in router_cases(request_of("router")):
        assert set(case.builds()) == {"softmax_topk", "copy", *available()}
    rows, skipped = measure(request_of("router"), allocator="default", tell=lambda text: None)
    assert not skipped
    assert {row.impl for row in rows} == {"softmax_topk", "copy", *available()}
    assert all(row.over["copy"].value > 0 for row in rows if row.impl == "topk")


def test_every_backend_brings_rows_there_and_back() -> None:
    """Experts do nothing, so the result is x times the sum of a token's weights, and the copy moves what it says."""
    from moerouters.bench.dispatch import DispatchCase

    rows, skipped = measure(request_of("dispatch"), allocator="default", tell=lambda text: None)
    assert {each.impl for each in skipped} == {"deepep"}  # which needs GPUs
    there_and_back = {row.impl for row in rows if row.passes == BOTH}
    assert there_and_back == {"copy", "local", "all_gather", "all_to_all", "hierarchical", "padded", "tensor_sliced"}
    assert {row.impl for row in rows if row.passes == PLAN} == {"copy", "moerouters", "argsort"}
    case = DispatchCase(request_of("dispatch"), SHAPE, "combine")
    for name, build in case.builds().items():
        if name not in ("copy", "deepep"):
            y_TD = build()()
            assert isinstance(y_TD, torch.Tensor)
            x_TD = torch.randn(SHAPE.T, SHAPE.D, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(y_TD, x_TD)  # weights are renormalised
    assert case.values("copy", 1.0) == {"tb_per_s": 4 * (SHAPE.T + SHAPE.N) * SHAPE.D / 1e12}


def test_one_case_for_each_part() -> None:
    passes = [case.passes for case in dispatch_cases(request_of("dispatch"))]
    assert passes == ["plan", "dispatch", "combine", "forward+backward"]


def test_the_share_of_a_balancer() -> None:
    """What it takes longer than topk in a small layer, over the real layer's step, round by round."""
    case = StepCase(request_of("balance"), SHAPE)
    samples = {"layer": [1.0, 2.0], "topk": [0.1, 0.2], "bip": [0.15, 0.3]}
    assert case.over("bip", samples)["layer_step"].value == pytest.approx(0.05)
    assert case.over("topk", samples) == {}
    rows, skipped = measure(request_of("balance"), allocator="default", tell=lambda text: None)
    assert not skipped
    step = {row.impl for row in rows if row.passes == "step"}
    assert step == {"layer", *available()}
    assert {row.impl for row in rows if row.passes == "dual"} == {"topk_kthvalue", "dual_update"}


def test_routers_learn_in_the_step_that_is_timed() -> None:
    run = StepCase(request_of("balance"), SHAPE).builds()["loss-free"]
    state = []
    real = moerouters.attach

    def watching(optimizer: torch.optim.Optimizer, layer: torch.nn.Module) -> object:
        state.append(layer)
        return real(optimizer, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moerouters.attach", watching)
        step = run()
    before = {name: value.clone() for name, value in state[0].router.state_dict().items()}
    step()
    assert any(not torch.equal(value, before[name]) for name, value in state[0].router.state_dict().items())


def test_gate_only_shapes_have_no_layers() -> None:
    shape = SHAPE.model_copy(update={"gate_only": True})
    cases = list(balance_cases(request_of("balance", shapes=(shape,))))
    assert [type(case) for case in cases] == [DualCase]


@pytest.mark.parametrize(("T", "E", "K"), [(48, 4, 2), (50, 7, 3), (9, 8, 1), (33, 6, 5)])
def test_the_dual_has_the_bits_of_the_plain_one(T: int, E: int, K: int) -> None:
    case = DualCase(request_of("balance"), Shape(name="s", T=T, E=E, K=K))
    q_E = case.builds()["dual_update"]()()
    assert isinstance(q_E, torch.Tensor)
    assert torch.equal(q_E, plain_dual(case._scores(), top_k=K, iterations=4))


def test_a_dual_with_other_bits_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        return torch.zeros(SHAPE.E)

    monkeypatch.setattr(balance, "dual_update", wrong)
    with pytest.raises(Unavailable, match="other bits"):
        DualCase(request_of("balance"), SHAPE).builds()["dual_update"]()


@pytest.mark.parametrize("shape", [Shape(name="s", T=4, E=2, K=2), Shape(name="s", T=4, E=8, K=7)])
def test_where_there_is_nothing_to_solve(shape: Shape) -> None:
    request = request_of("balance", shapes=(shape.model_copy(update={"gate_only": True}),))
    rows, skipped = measure(request, allocator="default", tell=lambda text: None)
    assert not rows
    assert {entry.impl for entry in skipped} == {"topk_kthvalue", "dual_update"}
    assert all("nothing to solve" in entry.why for entry in skipped)


def test_dispatch_in_bf16_sums_in_float32() -> None:
    request = request_of("dispatch", dtype="bfloat16")
    cases = {case.passes: case for case in dispatch_cases(request)}
    y_TD = cases["combine"].builds()["local"]()()
    assert isinstance(y_TD, torch.Tensor)
    assert y_TD.dtype == torch.float32
    assert cases["combine"].values("copy", 1.0) == {"tb_per_s": (2 * SHAPE.N + 4 * SHAPE.T) * SHAPE.D / 1e12}
    cases[BOTH].builds()["local"]()()
