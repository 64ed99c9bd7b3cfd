"""Borrowed memory."""

import pytest
import torch

from moerouters.kernels import workspace
from moerouters.kernels.workspace import borrowed, fresh, kept_bytes, release


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    release()


def test_parts_do_not_overlap() -> None:
    what = [((3, 5), torch.float32), ((0, 4), torch.float64), ((7,), torch.bfloat16), ((2, 2), torch.float64)]
    with borrowed(what) as parts, borrowed(what) as others:
        for value, part in enumerate([*parts, *others]):
            part.fill_(value)
        for value, (part, (shape, dtype)) in enumerate(zip([*parts, *others], what + what, strict=True)):
            assert part.shape == shape
            assert part.dtype == dtype
            assert part.data_ptr() % 16 == 0
            assert bool((part == value).all())


def test_the_next_borrower_gets_the_same_memory() -> None:
    with borrowed([((100,), torch.float32)]) as (first,):
        place = first.data_ptr()
        assert kept_bytes() == 0
    with borrowed([((50,), torch.float64)]) as (second,):
        assert second.data_ptr() == place
    assert 400 <= kept_bytes() <= 500
    with borrowed([((1000,), torch.float64)]):
        pass
    assert 8000 <= kept_bytes() <= 8100  # one buffer takes the place of a smaller one


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_MOST_KEPT_BYTES", 1000)
    with borrowed([((200,), torch.uint8)]), borrowed([((900,), torch.uint8)]), borrowed([((600,), torch.uint8)]):
        pass
    assert kept_bytes() <= 1000
    release()
    assert kept_bytes() == 0


def test_a_failure_gives_the_memory_back() -> None:
    with pytest.raises(ZeroDivisionError), borrowed([((10,), torch.float32)]):
        raise ZeroDivisionError
    assert kept_bytes() > 0


@pytest.mark.parametrize("rows", [3, 2**20 + 1])
def test_fresh_memory_is_plain_memory(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for advice in (workspace._madvise, lambda: None):
        monkeypatch.setattr(workspace, "_madvise", advice)
        tensor = fresh(rows, 9, dtype=torch.float32)
        assert tensor.shape == (rows, 9)
        assert tensor.is_contiguous()
        tensor.fill_(1)
        assert float(tensor.sum(dtype=torch.float64)) == rows * 9
