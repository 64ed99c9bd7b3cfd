"""What each of the two ranks of test_ranks.py does: it raises unless every assertion holds."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moerouters import Gating, MoELayer, attach
from moerouters_ds_moe.config import DsMoeConfig
from moerouters_ds_moe.router import DsMoeRouter

E, D = 6, 5
CONFIG = DsMoeConfig(alpha=1.0)


def router_of(config: DsMoeConfig = CONFIG) -> DsMoeRouter:
    return DsMoeRouter(Gating.softmax(E, 2, renormalize=False), config)


def check_loss(rank: int, logits_TE: torch.Tensor, *, compiled: bool) -> None:
    """Uneven shares, one of them empty."""
    router, alone = router_of(), router_of(DsMoeConfig(alpha=1.0, marginal="local"))
    route = torch.compile(router, backend="aot_eager", fullgraph=True) if compiled else router
    whole_TE = logits_TE.clone().requires_grad_()
    expected = alone(whole_TE).losses["mutual_information"]
    (expected_TE,) = torch.autograd.grad(expected, whole_TE)
    for cut in (10, 20, 3):
        leaf_TE = logits_TE.clone().requires_grad_()
        loss = route(leaf_TE.tensor_split([cut])[rank]).losses["mutual_information"]
        torch.testing.assert_close(loss, expected)
        (found_TE,) = torch.autograd.grad(loss, leaf_TE)
        dist.all_reduce(found_TE)
        torch.testing.assert_close(found_TE / 2, expected_TE)

    # A group of its own: what this rank alone sees.
    groups = [dist.new_group([member]) for member in range(2)]
    router.token_group = groups[rank]
    own_TE = logits_TE.tensor_split([7])[rank]
    torch.testing.assert_close(router(own_TE).losses, alone(own_TE).losses)


def trained(x_TD: torch.Tensor, config: DsMoeConfig, *, checkpointed: bool) -> dict[str, torch.Tensor]:
    """Mean of the gradients over ranks, and the state, after one step."""
    torch.manual_seed(0)
    layer = MoELayer(router_of(config), hidden_size=D, expert_size=2, loss_mode="inject").double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach(optimizer, layer)
    y_TD = checkpoint(lambda x: layer(x).hidden, x_TD, use_reentrant=False) if checkpointed else layer(x_TD).hidden
    (y_TD.square().sum() / 10).backward()
    optimizer.step()
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    if dist.is_initialized():
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= 2
    return found | {"state": layer.router.passing_share.clone()}


def main(rank: int, store: str, compiled: bool) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(20, E, generator=generator, dtype=torch.float64)
    x_TD = torch.randn(20, D, generator=generator, dtype=torch.float64)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    if rank == 0:  # building a layer is no collective: the other rank does not build this one
        MoELayer(router_of(), hidden_size=D, expert_size=2)
    check_loss(rank, logits_TE, compiled=compiled)
    both = [trained(x_TD.tensor_split([8])[rank], CONFIG, checkpointed=checkpointed) for checkpointed in (False, True)]
    dist.destroy_process_group()
    alone = trained(x_TD, CONFIG, checkpointed=False)
    for found in both:
        # The language loss is a sum over all tokens, so the mean over ranks has half of it.
        for name in ("experts.up_eFD", "experts.down_eDF"):
            torch.testing.assert_close(2 * found[name], alone[name])
        assert torch.equal(found["state"], alone["state"]), f"{found['state']}, one process: {alone['state']}"
    assert all(torch.equal(both[0][name], both[1][name]) for name in alone)
