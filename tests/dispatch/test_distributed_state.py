"""Checkpoints of experts, routers and optimizer that some ranks saved load over others, and training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moerouters.dispatch.placement import LayerPlacement
from moerouters.dispatch.places import Places
from moerouters.distributed_state import DistributedState
from moerouters.errors import ConfigError
from moerouters_conformance.pool import rank_pool

from . import state_jobs as jobs
from .state_jobs import Layout

ALONE = Layout()
LAYOUTS = [
    Layout("all_to_all", (2, 2)),
    Layout("local", (4, 1)),
    Layout("all_to_all", (1, 4)),
    Layout("hierarchical", (1, 4), placed=True),
    Layout("mesh3d", (1, 2, 2)),
    Layout("mesh3d", (2, 1, 2)),
    Layout("mesh3d", (2, 2, 1)),
]


def run(layout: Layout, steps: int, load: Path | None = None, save: Path | None = None, **more: str) -> list[float]:
    folders = (None if load is None else str(load), None if save is None else str(save))
    if layout == ALONE:
        return jobs.train(0, layout, steps, *folders, **more)
    losses, *others = rank_pool().run(jobs.train, layout, steps, *folders)
    assert all(each == pytest.approx(losses, rel=1e-6) for each in others)
    return losses


def test_training_goes_on_elsewhere_with_the_same_losses(tmp_path: Path) -> None:
    first = run(ALONE, 2, save=tmp_path / "alone")
    expected = run(ALONE, 3, load=tmp_path / "alone")
    assert expected == run(ALONE, 5)[2:] and expected[2] < 0.9 * first[0]
    for layout in LAYOUTS:
        assert run(layout, 3, load=tmp_path / "alone") == pytest.approx(expected, rel=1e-6), layout


@pytest.mark.parametrize("index", [0, *(pytest.param(index, marks=pytest.mark.slow) for index in (3, 4))])
def test_so_it_does_from_ranks(tmp_path: Path, index: int) -> None:
    """From two by two ranks, from a placement, and from cut experts, to all others and back to one process."""
    saved = LAYOUTS[index]
    run(saved, 2, save=tmp_path)
    expected = run(saved, 3, load=tmp_path)
    for layout in (ALONE, *LAYOUTS):
        assert run(layout, 3, load=tmp_path) == pytest.approx(expected, rel=1e-6), layout


def test_every_expert_has_entries_of_its_own() -> None:
    by_rank = rank_pool().run(jobs.entries, Layout("mesh3d", (1, 2, 2)))
    for rank, shapes in enumerate(by_rank):
        first = rank // 2 * 4
        weights = {name: shape for name, shape in shapes.items() if name.startswith("model/")}
        assert weights == {
            f"model/moe.experts.{name}.{expert}": shape
            for expert in range(first, first + 4)
            for name, shape in (("up_eFD", [2, 4, 8]), ("down_eDF", [8, 4]))
        }
        moments = [name for name in shapes if name.startswith("optimizer/state/moe.experts.up_eFD/exp_avg.")]
        assert len(moments) == 4
    assert jobs.entries(0, ALONE, "gelu")["model/moe.experts.up_eFD.7"] == [1, 4, 8]


def test_names_are_those_of_the_model_and_not_of_its_wrappers() -> None:
    torch.manual_seed(0)
    source, target = (torch.nn.ModuleDict({"module": jobs.Model("swiglu")}) for _ in range(2))
    compiled = torch.compile(source)
    state = DistributedState(compiled).state_dict()
    assert "module.moe.experts.up_eFD.0" in state["model"]
    DistributedState(target).load_state_dict(state)
    for mine, right in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(mine, right)


def test_what_cannot_be_told_by_expert_is_refused() -> None:
    model = jobs.Model("swiglu")
    factored = torch.optim.Adafactor(model.parameters())
    with pytest.raises(ConfigError, match="the optimizer keeps 'row_var' of shape"):
        DistributedState(model, factored).state_dict()
    model.moe.places = Places(LayerPlacement(experts=((*range(8), 0),)))
    with pytest.raises(ConfigError, match="this rank has replicas of one of its experts"):
        DistributedState(model).state_dict()


def test_a_dispatcher_that_hides_its_rank_is_refused() -> None:
    model = jobs.Model("swiglu")
    model.moe.dispatcher = jobs.Hidden()
    with pytest.raises(ConfigError, match="Hidden does not say which rank this is"):
        DistributedState(model).state_dict()
