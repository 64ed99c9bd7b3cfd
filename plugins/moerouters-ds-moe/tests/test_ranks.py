"""Ranks make one loss of their tokens: in value, and in the mean of their gradients."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.dist
@pytest.mark.parametrize("how", [[], pytest.param(["compiled"], marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_two_ranks_have_the_loss_of_one_process(how: list[str], tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store"), *how],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
