"""The experts of a layer against one token at a time."""

import pytest
import torch

from moerouters.experts import GroupedExperts
from support.oracles import expert_output


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("load", [[2, 0, 3], [0, 0, 0], [0, 4, 0]], ids=str)
def test_rows_meet_their_expert(activation: str, load: list[int]) -> None:
    torch.manual_seed(0)
    experts = GroupedExperts(3, hidden_size=4, expert_size=5, activation=activation).double()
    x_RD = torch.randn(sum(load) + 2, 4, dtype=torch.float64, requires_grad=True)
    found = experts(x_RD, torch.tensor(load))
    owners = [e for e, rows in enumerate(load) for _ in range(rows)]
    expected = [
        expert_output(x_RD[r], experts.up_eFD[e], experts.down_eDF[e], activation) for r, e in enumerate(owners)
    ]
    expected = torch.stack([*expected, *torch.zeros(2, 4, dtype=torch.float64)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    wanted = [x_RD, *experts.parameters()]
    nothing = 0 * sum(tensor.sum() for tensor in wanted)
    mine = torch.autograd.grad(found.square().sum(), wanted)
    theirs = torch.autograd.grad(expected.square().sum() + nothing, wanted)
    for gradient, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-12)


def test_experts_start_like_linear_layers() -> None:
    torch.manual_seed(0)
    experts = GroupedExperts(8, hidden_size=16, expert_size=64)
    assert experts.up_eFD.shape == (8, 128, 16)
    assert experts.down_eDF.shape == (8, 16, 64)
    for weight, bound in ((experts.up_eFD.detach(), 1 / 4), (experts.down_eDF.detach(), 1 / 8)):
        assert float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    before = experts.up_eFD.detach().clone()
    torch.manual_seed(0)
    experts.reset_parameters()
    assert torch.equal(experts.up_eFD, before)


def test_autocast_runs_the_experts_in_its_dtype() -> None:
    experts = GroupedExperts(2, hidden_size=4, expert_size=3)
    x_RD, load_e = torch.randn(3, 4), torch.tensor([1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = experts(x_RD, load_e)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, experts.bfloat16()(x_RD.bfloat16(), load_e))
