"""Counting outside of a backward pass and only there."""

import pytest
import torch
from torch import Tensor

from moerouters.kernels.accumulate import accumulate_, inside_backward


def test_adds_in_place() -> None:
    sums = [torch.tensor([1, 2]), torch.tensor(0.5)]
    accumulate_(sums, [torch.tensor([3, 4]), torch.tensor(0.25, requires_grad=True)])
    assert sums[0].tolist() == [4, 6]
    assert sums[1].item() == 0.75
    assert not sums[1].requires_grad


def test_adds_nothing_inside_a_backward_pass() -> None:
    total, seen = torch.zeros((), dtype=torch.int64), []

    def inside(gradient: Tensor) -> None:
        seen.append(inside_backward())
        accumulate_([total], [torch.ones_like(total)])

    x = torch.ones(1, requires_grad=True)
    x.register_hook(inside)
    assert not inside_backward()
    (x * 2).sum().backward()
    assert seen == [True]
    assert total.item() == 0
    accumulate_([total], [torch.ones_like(total)])
    assert total.item() == 1


@pytest.mark.parametrize("values", [[torch.ones(2)], [torch.ones(2), torch.ones(3)]])
def test_mismatches_are_errors(values: list[Tensor]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        accumulate_([torch.zeros(2), torch.zeros(2)], values)


def test_is_a_well_formed_operator() -> None:
    torch.library.opcheck(accumulate_, ([torch.zeros(3), torch.zeros(())], [torch.ones(3), torch.ones(())]))
