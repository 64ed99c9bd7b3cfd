"""What each of the two ranks of test_ranks.py does: it raises unless every assertion holds."""

from datetime import timedelta

import torch
import torch.distributed as dist

from moerouters import Gating, MoELayer, attach
from moerouters_loss_controlled.config import LossControlledConfig
from moerouters_loss_controlled.router import LossControlledRouter

E, K, D = 6, 2, 5
LAST_STEP = LossControlledConfig(alpha=0, global_alpha=1.0)
ALL_REDUCE = LossControlledConfig(alpha=0, global_alpha=1.0, global_load="all_reduce")


def train(batches: list[torch.Tensor]) -> torch.Tensor:
    """The committed fraction after a step per batch."""
    torch.manual_seed(0)
    layer = MoELayer(LossControlledRouter(Gating.softmax(E, K), LAST_STEP), hidden_size=D, expert_size=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach(optimizer, layer, loss_mode="inject")
    for x_TD in batches:
        layer(x_TD).hidden.sum().backward()
        optimizer.step()
    return layer.router.get_buffer("last_fraction_E")


def check_last_step(rank: int, whole: list[torch.Tensor]) -> torch.Tensor:
    # Uneven shares; in the last step the second rank has no token at all.
    own_E = train([x_TD.tensor_split([cut])[rank] for x_TD, cut in zip(whole, (10, 3, 20), strict=True)])
    seen = [torch.empty_like(own_E) for _ in range(2)]
    dist.all_gather(seen, own_E)
    assert torch.equal(seen[0], seen[1]), f"the ranks differ: {seen}"
    return own_E


def check_all_reduce(rank: int, logits_TE: torch.Tensor) -> None:
    router = LossControlledRouter(Gating.softmax(E, K), ALL_REDUCE)
    alone = LossControlledRouter(Gating.softmax(E, K), LossControlledConfig(alpha=1.0))
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    f_E = alone(logits_TE).load_E.double() * E / (len(logits_TE) * K)
    for route, cut in ((router, 10), (router, 20), (compiled, 3)):
        own_TE = logits_TE.tensor_split([cut])[rank]
        loss = route(own_TE).losses["global"]
        expected = (f_E * own_TE.softmax(dim=-1).sum(dim=0)).sum() / max(len(own_TE), 1)
        torch.testing.assert_close(loss, expected)

    # With equal shares the mean over ranks is the loss, and the gradient, of the whole batch.
    whole_TE = logits_TE.clone().requires_grad_()
    loss, own_loss = alone(whole_TE).losses["switch"], router(whole_TE.chunk(2)[rank]).losses["global"]
    (expected_TE,) = torch.autograd.grad(loss, whole_TE)
    (found_TE,) = torch.autograd.grad(own_loss, whole_TE)
    mean = own_loss.detach().clone()
    dist.all_reduce(mean)
    dist.all_reduce(found_TE)
    torch.testing.assert_close(mean / 2, loss.detach())
    torch.testing.assert_close(found_TE / 2, expected_TE)

    # A group of its own: what this rank alone sees.
    groups = [dist.new_group([member]) for member in range(2)]
    router.token_group = groups[rank]
    own_TE = logits_TE.chunk(2)[rank]
    torch.testing.assert_close(router(own_TE).losses["global"], alone(own_TE).losses["switch"])


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(20, D, generator=generator) for _ in range(3)]
    logits_TE = torch.randn(20, E, generator=generator, dtype=torch.float64)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    if rank == 0:  # building a layer is no collective: the other rank does not build this one
        MoELayer(LossControlledRouter(Gating.softmax(E, K), ALL_REDUCE), hidden_size=D, expert_size=2)
    own_E = check_last_step(rank, whole)
    check_all_reduce(rank, logits_TE)
    dist.destroy_process_group()
    alone_E = train(whole)
    assert alone_E.unique().numel() > 1
    assert torch.equal(own_E, alone_E), f"two ranks: {own_E}, one process: {alone_E}"
