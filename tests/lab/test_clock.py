from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters import Gating, MoELayer
from moerouters.builtin import TopKRouter
from moerouters.lab.clock import RouterClock
from support.clock import Seconds


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    clock = Seconds()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


@pytest.fixture
def layer(seconds: Seconds) -> MoELayer:
    class Slow(TopKRouter):
        def adjust(self, scores_TE: Tensor, ctx: Any) -> Tensor:
            seconds.pass_by(2)
            return scores_TE

        def update(self, stats: Mapping[str, Tensor]) -> None:
            seconds.pass_by(1)

    return MoELayer(Slow(Gating.softmax(4, 2)), hidden_size=8, expert_size=8)


def test_forward_and_update_are_counted_and_the_experts_are_not(layer: MoELayer, seconds: Seconds) -> None:
    layer.experts.register_forward_pre_hook(lambda *_: seconds.pass_by(100))
    clock = RouterClock([layer], torch.device("cpu"))
    layer(torch.zeros(3, 8))
    layer(torch.zeros(3, 8))
    assert clock.take_ms() == 4000
    layer.router.update({})
    assert clock.take_ms() == 1000
    assert clock.take_ms() == 0


def test_a_router_outside_of_its_layer_is_not_counted(layer: MoELayer) -> None:
    clock = RouterClock([layer], torch.device("cpu"))
    layer.router(torch.zeros(3, 4))
    assert clock.take_ms() == 0


@pytest.mark.gpu
def test_on_a_gpu_the_device_is_asked() -> None:
    layer = MoELayer(TopKRouter(Gating.softmax(4, 2)), hidden_size=8, expert_size=8).cuda()
    clock = RouterClock([layer], torch.device("cuda"))
    layer(torch.zeros(3, 8, device="cuda"))
    assert clock.take_ms() > 0
    assert clock.take_ms() == 0
