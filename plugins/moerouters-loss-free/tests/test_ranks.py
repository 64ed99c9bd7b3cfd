"""Data parallel ranks end with the same state, and with that of one process that saw every token."""

from pathlib import Path

import pytest
import torch.multiprocessing as mp
from loss_free_two_ranks import main

from moerouters.processes import quick_processes


@pytest.mark.dist
def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    method = quick_processes().get_start_method()
    mp.start_processes(main, (str(tmp_path / "store"),), nprocs=2, start_method=method)
