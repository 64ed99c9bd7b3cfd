"""The example of the README runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    exec(compile(example, str(README), "exec"), {})
    used, balance = (line.partition(":")[2] for line in capsys.readouterr().out.splitlines())
    before, after = map(float, used.split("->"))
    assert before == 4.0
    assert after == pytest.approx(3.0, abs=0.2)
    before, after = map(float, balance.split("->"))
    assert before > 1
    assert after < 0.4
