"""collect and inject at the level of single tensors."""

import pytest
import torch

from moerouters.losses import collect_loss, inject_losses


def probe_of() -> torch.Tensor:
    return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_collect_is_the_identity_and_leaves_a_mark(dtype: torch.dtype) -> None:
    probe, loss = probe_of(), torch.tensor(3.0, dtype=dtype, requires_grad=True)
    out = collect_loss(loss, probe)
    assert out.item() == 3.0
    (out * 5).backward()
    assert loss.grad.item() == 5
    assert probe.grad.item() == 1
    (collect_loss(loss, probe) * 0.25).backward()
    assert loss.grad.item() == 5.25
    assert probe.grad.item() == 2


def test_a_collected_loss_without_a_gradient_leaves_no_mark() -> None:
    """Reentrant checkpointing and compiled graphs hand zeros to results that nobody used."""
    probe = probe_of()
    loss = torch.tensor(3.0, requires_grad=True)
    (collect_loss(loss, probe) * 0 + loss).backward()
    assert probe.grad is None or probe.grad.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, 65536.0])
def test_inject_is_the_identity_and_differentiates_the_losses(dtype: torch.dtype, scale: float) -> None:
    probe = probe_of()
    weights = torch.tensor([[0.25, 0.75]], dtype=dtype, requires_grad=True)
    losses = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (2.0, 3.0)]
    out = inject_losses(weights, losses, scale=torch.tensor(scale), probe=probe)
    assert torch.equal(out, weights)
    (out * torch.tensor([[1.0, -2.0]])).sum().backward()
    assert weights.grad.tolist() == [[1.0, -2.0]]
    assert [loss.grad.item() for loss in losses] == [scale, scale]
    assert probe.grad.item() == 1


def test_the_scale_is_that_of_the_forward_pass() -> None:
    """Changed in between, autograd refuses rather than using either."""
    probe, scale = probe_of(), torch.tensor(1.0)
    weights, loss = torch.ones(1, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = inject_losses(weights, [loss], scale=scale, probe=probe)
    scale.fill_(8.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
