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
    fresh, training, evaluation = (float(line) for line in capsys.readouterr().out.splitlines())
    assert fresh > 1 and training < 0.2 and evaluation < 0.3
