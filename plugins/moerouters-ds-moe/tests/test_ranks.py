"""Ranks make one loss of their tokens: in value, and in the mean of their gradients."""

from pathlib import Path

import pytest
import torch.multiprocessing as mp
from ds_moe_two_ranks import main

from moerouters.processes import quick_processes


@pytest.mark.dist
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_two_ranks_have_the_loss_of_one_process(compiled: bool, tmp_path: Path) -> None:
    method = quick_processes().get_start_method()
    mp.start_processes(main, (str(tmp_path / "store"), compiled), nprocs=2, start_method=method)
