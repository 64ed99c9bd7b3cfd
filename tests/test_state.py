"""State buffers that stay float32."""

import copy

import pytest
import torch
from torch import nn

from moerouters.state import StatefulModule


class Balancer(StatefulModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_state("bias_E", 5)
        self.register_state("rate", fill=0.3)
        self.register_buffer("other", torch.ones(2))


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), Balancer())
    model[1].bias_E.copy_(torch.linspace(0, 1, 5) / 3)
    return model


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(device="cpu", dtype=torch.float16),
        lambda m: m.bfloat16().float(),
    ],
    ids=["half", "bfloat16", "double", "to dtype", "to device and dtype", "there and back"],
)
def test_casts_leave_state_alone(model: nn.Module, cast) -> None:  # type: ignore[no-untyped-def]
    before = {name: model[1].get_buffer(name).clone() for name in ("bias_E", "rate")}
    cast(model)
    for name, value in before.items():
        assert model[1].get_buffer(name).dtype == torch.float32
        assert torch.equal(model[1].get_buffer(name), value)
    assert model[1].other.dtype == model[0].weight.dtype


def test_reset(model: nn.Module) -> None:
    pointer = model[1].bias_E.data_ptr()
    model[1].rate.zero_()
    model[1].reset_state()
    assert model[1].bias_E.tolist() == [0.0] * 5
    assert model[1].rate.item() == pytest.approx(0.3)
    assert model[1].bias_E.data_ptr() == pointer
    assert model[1].state_names() == ("bias_E", "rate")


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Balancer()
    model.to(torch.bfloat16)
    assert model.bias_E.is_meta
    assert model.bias_E.dtype == torch.float32
    model.to_empty(device="cpu")
    assert model.bias_E.dtype == torch.float32
    model.reset_state()
    assert model.bias_E.tolist() == [0.0] * 5


def test_to_meta_and_a_cast_at_once(model: nn.Module) -> None:
    model.to(device="meta", dtype=torch.bfloat16)
    assert model[1].bias_E.is_meta
    assert model[1].bias_E.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_a_narrow_checkpoint_does_not_narrow_the_state(model: nn.Module, assign: bool) -> None:
    narrow = {name: value.bfloat16() for name, value in model.state_dict().items()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(narrow, assign=assign)
    assert twin[1].bias_E.dtype == torch.float32
    assert torch.equal(twin[1].bias_E, narrow["1.bias_E"].float())
    assert narrow["1.bias_E"].dtype == torch.bfloat16
