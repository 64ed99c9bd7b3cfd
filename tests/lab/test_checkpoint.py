from pathlib import Path

import pytest
import torch

from moerouters.errors import ConfigError
from moerouters.lab.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
IDENTITY = {"router": "topk", "seed": 0, "settings": {"steps": 5}}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoint.pt"
    save_checkpoint(path, {"model": {"w": torch.ones(2)}, "step": 3}, identity=IDENTITY)
    state = load_checkpoint(path, identity=IDENTITY, device=CPU)
    assert state["step"] == 3
    assert torch.equal(state["model"]["w"], torch.ones(2))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {}, identity=IDENTITY)
    with pytest.raises(ConfigError, match=r"settings: \{'steps': 5\} there, \{'steps': 6\} here"):
        load_checkpoint(path, identity=IDENTITY | {"settings": {"steps": 6}}, device=CPU)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "code", "other"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"w": torch.ones(1000)}, identity=IDENTITY)
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:2000])
        case "text":
            path.write_text("not a checkpoint", encoding="utf-8")
        case "empty":
            path.write_bytes(b"")
        case "code":
            torch.save({"identity": "{}", "state": Evil()}, path)
        case "other":
            torch.save([1, 2], path)
    with pytest.raises(ConfigError, match="cannot resume from"):
        load_checkpoint(path, identity=IDENTITY, device=CPU)
    assert "unpickled" not in capsys.readouterr().out
