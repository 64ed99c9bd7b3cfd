"""What a rank does with the Python of docs/placement.md, and for the measurement of docs/pipeline.md."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import moerouters
from moerouters.planning import ppmoe_page


def run_page(rank: int, script: str, folder: str) -> dict[str, Any]:
    """Run the script on a pool whose process group is there already."""
    names: dict[str, Any] = {}
    before = os.getcwd()
    os.chdir(folder)
    try:
        with patch("torch.distributed.init_process_group"):
            exec(compile(script, "serve.py", "exec"), names)
    finally:
        os.chdir(before)
    torch.manual_seed(0)
    router = moerouters.build("topk", moerouters.Gating.softmax(num_experts=8, top_k=2))
    alone = moerouters.MoELayer(router, hidden_size=16, expert_size=32)
    here = list(names["placement"].layers["moe"].experts[dist.get_rank()])
    own = torch.equal(names["model"]["moe"].experts.up_eFD, alone.experts.up_eFD[here])
    return {"own": own, "shape": list(names["y"].shape)}


def ppmoe(rank: int, count: int) -> tuple[dict[str, list[float]], dict[str, tuple[float, ...]]]:
    """Some steps of each way."""
    world = dist.group.WORLD
    assert world is not None
    return ppmoe_page.train(world, count)
