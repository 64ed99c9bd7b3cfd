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
    before, after = capsys.readouterr().out.split("->")
    trained, served = (float(number) for number in re.findall(r"\d\.\d+", after))
    assert float(before) > 0.8
    assert trained < 0.3
    assert served < 0.5
