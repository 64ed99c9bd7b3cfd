"""Balancer state on disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moerouters import Gating, MoELayer, Router, load_router_state, save_router_state
from moerouters.errors import TraceError
from support.balanced import balanced


def model_of(*num_experts: int) -> nn.Module:
    return nn.ModuleList(MoELayer(balanced(E), hidden_size=4, expert_size=3) for E in num_experts)


def test_round_trip(tmp_path: Path) -> None:
    model, twin = model_of(4, 6), model_of(4, 6)
    for layer in model:
        layer.router.b_E.normal_()
    pointer = twin[0].router.b_E.data_ptr()
    save_router_state(model, tmp_path / "state")
    load_router_state(twin, tmp_path / "state")
    for mine, theirs in zip(model, twin, strict=True):
        assert torch.equal(mine.router.b_E, theirs.router.b_E)
        assert not torch.equal(mine.gate.weight, theirs.gate.weight)
    assert twin[0].router.b_E.data_ptr() == pointer


def test_a_router_alone(tmp_path: Path) -> None:
    router, twin = balanced(), balanced()
    router.b_E.normal_()
    save_router_state(router, tmp_path / "state")
    load_router_state(twin, tmp_path / "state")
    assert torch.equal(twin.b_E, router.b_E)


def test_routers_without_state(tmp_path: Path) -> None:
    router = Router(Gating.softmax(4, 2))
    save_router_state(router, tmp_path / "state")
    load_router_state(router, tmp_path / "state")


@pytest.mark.parametrize(
    ("other", "named"),
    [((4, 5), r"1\.router\.b_E"), ((4,), r"1\.router\.b_E"), ((4, 6, 4), r"2\.router\.b_E")],
)
def test_a_model_that_does_not_fit_is_left_alone(other: tuple[int, ...], named: str, tmp_path: Path) -> None:
    model, different = model_of(4, 6), model_of(*other)
    for layer in model:
        layer.router.b_E.fill_(1.0)
    save_router_state(model, tmp_path / "state")
    with pytest.raises(TraceError, match=rf"does not fit this model(.|\n)*differ in name or shape: {named}\n"):
        load_router_state(different, tmp_path / "state")
    assert all(not layer.router.b_E.any() for layer in different)


def test_files_that_hold_no_router_state(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read the router state"):
        load_router_state(balanced(), tmp_path / "missing")
    save_file({"b_E": torch.zeros(4)}, tmp_path / "other")
    with pytest.raises(TraceError, match="is no router state"):
        load_router_state(balanced(), tmp_path / "other")
