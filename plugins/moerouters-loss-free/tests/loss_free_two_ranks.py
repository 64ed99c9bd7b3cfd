"""What each of the two ranks of test_ranks.py does: it raises unless every assertion holds."""

from datetime import timedelta

import torch
import torch.distributed as dist

from moerouters import Gating, MoELayer, attach
from moerouters_loss_free.config import LossFreeConfig
from moerouters_loss_free.router import LossFreeRouter

STEPS, E, D = 4, 6, 5


def train(batches: list[torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    layer = MoELayer(LossFreeRouter(Gating.sigmoid(E, 2), LossFreeConfig(rule="error")), hidden_size=D, expert_size=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach(optimizer, layer)
    for x_TD in batches:
        layer(x_TD)
        optimizer.step()
    return layer.router.get_buffer("expert_bias_E")


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(20, D, generator=generator) for _ in range(STEPS)]
    # Uneven shares; in the last step the second rank has no token at all.
    shares = [x_TD.tensor_split([cut])[rank] for x_TD, cut in zip(whole, (10, 3, 17, 20), strict=True)]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    own_E = train(shares)
    seen = [torch.empty_like(own_E) for _ in range(2)]
    dist.all_gather(seen, own_E)
    dist.destroy_process_group()
    assert torch.equal(seen[0], seen[1]), f"the ranks differ: {seen}"
    alone_E = train(whole)
    assert alone_E.unique().numel() > 1
    assert torch.equal(own_E, alone_E), f"two ranks: {own_E}, one process: {alone_E}"
