"""Swapped models under FSDP2 and DDP: loads of all ranks, one state, and what one process would have trained."""

from typing import Any

import pytest
import torch

from moerouters import attach
from support.ranks import on_ranks

from .life import expect_close, expect_same_bits, routed_pairs, sgd, train
from .life_ranks import CASES, STEPS, batch_of, everything, learned, swapped, weights

pytestmark = pytest.mark.dist
RUNS = [("-".join([kind, *case]), case) for kind in ("fsdp", "ddp") for case in CASES]
each_run = pytest.mark.parametrize(("run", "case"), RUNS, ids=[run for run, _ in RUNS])
Case = tuple[str, str, str]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(everything)


@each_run
def test_ranks_agree(ranks: list[dict[str, Any]], run: str, case: Case) -> None:
    first, second = (rank[run] for rank in ranks)
    assert first["loads"] == second["loads"]
    expect_same_bits(first["learned"], second["learned"])
    expect_same_bits(first["weights"], second["weights"])
    assert first["losses"] != second["losses"]  # their data differs


@each_run
def test_loads_are_those_of_both_ranks(ranks: list[dict[str, Any]], run: str, case: Case) -> None:
    for step, loads in enumerate(ranks[0][run]["loads"]):
        pairs = routed_pairs(batch_of(0, step), batch_of(1, step))
        assert loads and {sum(load) for load in loads.values()} == {pairs}
        assert all(name.endswith("mlp.gate") and not name.startswith("module.") for name in loads)


@each_run
def test_ranks_train_what_one_process_trains(ranks: list[dict[str, Any]], run: str, case: Case) -> None:
    """On the batches of both ranks in turn; every rank's aux loss is one of its own tokens, as every micro-batch's."""
    model = swapped(*case)
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    batches = [batch_of(rank, step) for step in range(STEPS) for rank in range(2)]
    losses = train(model, optimizer, batches, handle=handle, accumulation_steps=2)
    assert losses[0::2] == pytest.approx(ranks[0][run]["losses"], abs=1e-4)
    assert losses[1::2] == pytest.approx(ranks[1][run]["losses"], abs=1e-4)
    assert {layer: load_E.tolist() for layer, load_E in handle.loads.items()} == ranks[0][run]["loads"][-1]
    expect_close(ranks[0][run]["learned"], learned(model), 1e-6)
    expect_close(ranks[0][run]["weights"], weights(model), 1e-4)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_the_loss_is_that_of_the_joint_batch(ranks: list[dict[str, Any]], kind: str) -> None:
    """A balancer without a loss sees no micro-batches at all."""
    model = swapped("qwen", "loss-free", "none")
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    pairs = [[batch_of(rank, step) for rank in range(2)] for step in range(STEPS)]
    joint = [{name: torch.cat([one[name], two[name]]) for name in one} for one, two in pairs]
    losses = train(model, optimizer, joint, handle=handle)
    runs = [rank[f"{kind}-qwen-loss-free-none"]["losses"] for rank in ranks]
    assert losses == pytest.approx([(one + two) / 2 for one, two in zip(*runs, strict=True)], abs=1e-4)
