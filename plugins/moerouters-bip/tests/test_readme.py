"""The README's examples run as they stand, and its picture is what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import steps_picture
import torch

from moerouters.lab.showcase import fingerprint

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(first, str(README), "exec"), names)
    load = list(map(int, re.findall(r"\d+", capsys.readouterr().out)))
    assert len(load) == 16 and all(246 <= count <= 266 for count in load)
    exec(compile(second, str(README), "exec"), names)
    assert float(capsys.readouterr().out) < 1.4


def test_the_picture_was_drawn_from_the_committed_numbers() -> None:
    source = steps_picture.SOURCE.read_bytes()
    assert fingerprint(source) in steps_picture.PICTURE.read_text(encoding="utf-8"), "stale: steps_picture.py render"


def test_the_committed_numbers_are_what_the_code_finds() -> None:
    kept = json.loads(steps_picture.SOURCE.read_text(encoding="utf-8"))
    for name, points in steps_picture.paths().items():
        torch.testing.assert_close(torch.tensor(points), torch.tensor(kept["paths"][name]), rtol=0, atol=2e-4)
    assert max(kept["max_vio"]["bip"]) < 0.02 and max(kept["max_vio"]["quantile"][2:]) < 0.15
    assert min(kept["max_vio"]["sign"][:10]) > 0.5
