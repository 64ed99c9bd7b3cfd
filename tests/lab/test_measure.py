import math

import pytest
import torch

from moerouters.lab.history import History, Series
from moerouters.lab.measure import measure
from moerouters.lab.results import RunResult
from moerouters.lab.train import Validation
from support.lab import entrant, history_of


def measured(history: History, **more: object) -> RunResult:
    return measure(entrant(), history, seed=0, status="completed", parameters=7, **more)  # type: ignore[arg-type]


def history_with(loads_SLE: list[list[list[int]]]) -> History:
    """Of given loads; other fields are made up."""
    history = history_of(len(loads_SLE), layers=len(loads_SLE[0]), experts=len(loads_SLE[0][0]))
    history.loads = Series(torch.tensor(loads_SLE))
    return history


def test_balance_by_hand() -> None:
    """Two layers, two experts: MaxVio of step 0 is (1, 0), of step 1 (0.5, 1); mean load 2."""
    run = measured(history_with([[[4, 0], [2, 2]], [[3, 1], [0, 4]]]))
    assert run.layers is not None
    assert run.worst_layer is not None
    assert run.layers.avg_max_vio == (0.75, 0.5)
    assert run.layers.sup_max_vio == (1.0, 1.0)
    assert run.layers.min_vio == (-0.5, -1.0)
    assert run.layers.dead_experts == (0, 1)
    assert (run.avg_max_vio, run.sup_max_vio, run.min_vio, run.dead_experts) == (0.625, 1.0, -0.75, 1)
    assert run.worst_layer.avg_max_vio == 0.75
    assert run.worst_layer.min_vio == -1.0
    assert run.worst_layer.dead_experts == 1


def test_micro_batches_by_hand() -> None:
    history = history_of(2, layers=2)
    history.micro_max_vio = Series(torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 0.0]]]))
    run = measured(history)
    assert run.layers is not None
    assert run.layers.micro_avg_max_vio == (4.0, 3.0)
    assert run.layers.micro_sup_max_vio == (7.0, 6.0)
    assert (run.micro_avg_max_vio, run.micro_sup_max_vio) == (3.5, 6.5)


def test_perplexity_is_per_byte() -> None:
    run = measured(history_of(), validation=Validation(loss=math.log(4), max_vio=0.5))
    assert run.perplexity == pytest.approx(4)
    assert run.bits_per_byte == pytest.approx(2)
    assert run.max_vio_global == 0.5


def test_the_first_steps_are_not_timed() -> None:
    run = measured(history_of(20))  # 100 ms in the first three steps, 10 ms in the others; 2 ms in the router
    assert run.step_ms == pytest.approx(10)
    assert run.router_share == pytest.approx(0.2)
    assert measured(history_of(2)).step_ms == pytest.approx(100)


def test_training_loss_is_that_of_the_end() -> None:
    assert measured(history_of(20)).train_loss == pytest.approx((5 / 19 + 5 / 20) / 2)


def test_a_run_without_a_step() -> None:
    run = measured(History(), error="broken")
    assert (run.steps, run.error, run.perplexity, run.layers, run.avg_max_vio) == (0, "broken", None, None, None)


def test_config_is_complete_and_provenance_is_kept() -> None:
    run = measured(history_of())
    assert run.config == {}
    assert run.provenance.distribution == "moerouters"


def test_history_file_round_trip(tmp_path: object) -> None:
    path = tmp_path / "history.safetensors"  # type: ignore[operator]
    history = history_of(4)
    history.save(path)
    again = History.load(path)
    assert len(again) == 4
    assert all(torch.equal(value, again.tensors()[name]) for name, value in history.tensors().items())
    assert History.of(History().tensors()).tensors() == {}
