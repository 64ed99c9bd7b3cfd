"""Series of tensors in one piece of memory."""

from __future__ import annotations

import torch

from moerouters.lab.history import History, Series


def test_a_series_is_what_was_appended() -> None:
    values = torch.arange(2 * 200, dtype=torch.int64).reshape(200, 2)
    series = Series()
    assert len(series) == 0 and list(series) == []
    for value in values:
        series.append(value)
    assert len(series) == 200 and torch.equal(series.stacked(), values) and series.stacked().dtype == torch.int64
    assert torch.equal(series[-1], values[-1]) and torch.equal(torch.stack(list(series)), values)


def test_a_series_goes_on_without_writing_to_what_it_began_with() -> None:
    given = torch.zeros(3, 2)
    series = Series(given[:2])
    series.append(torch.ones(2))
    assert given.sum() == 0 and series.stacked().tolist() == [[0, 0], [0, 0], [1, 1]]


def test_entries_stay_as_they_were_when_handed_out() -> None:
    series = Series()
    series.append(torch.tensor(1.0))
    before = History.of({"train_loss": series.stacked()}).train_loss
    series.append(torch.tensor(2.0))
    assert before.stacked().tolist() == [1.0]
