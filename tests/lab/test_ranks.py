import pytest
import torch

from moerouters.errors import ConfigError
from moerouters.lab.ranks import Ranks, joined_ranks


def test_parts_are_disjoint_and_complete() -> None:
    rows = torch.arange(6)
    parts = [Ranks(rank, 3).part(rows) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == rows.tolist()
    assert {len(part) for part in parts} == {2}
    assert Ranks(2, 3).part(rows[:2]).numel() == 0


def test_uneven_batches_are_refused() -> None:
    Ranks(0, 3).require_divides(6)
    with pytest.raises(ConfigError, match="--set micro_batch_size=9"):
        Ranks(0, 3).require_divides(8)


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with joined_ranks(torch.device("cpu")) as ranks:
        assert ranks == Ranks(0, 1)
        assert ranks.first
        value = torch.ones(2)
        assert ranks.sum(value) is value
