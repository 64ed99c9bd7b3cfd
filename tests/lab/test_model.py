import math

import pytest
import torch

from moerouters import RouteContext
from moerouters.builtin import TopKRouter
from moerouters.lab.attention import rotary_table, rotate
from moerouters.lab.model import LanguageModel
from moerouters.lab.settings import Settings
from support.balanced import Balanced
from support.lab import SMALL


def model(settings: Settings = SMALL, router: type = TopKRouter) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(settings, [router(settings.gating()) for _ in range(settings.num_layers)])


def tokens(batch: int = 2, length: int = 8) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))


def test_a_token_sees_no_later_one() -> None:
    net, before = model().eval(), tokens()
    after = before.clone()
    after[:, 5] = (after[:, 5] + 1) % 256
    first, second = net(before).logits_BSV, net(after).logits_BSV
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])


def test_every_layer_routes_every_token() -> None:
    output = model()(tokens())
    assert output.logits_BSV.shape == (2, 8, 256)
    assert [int(a.load_E.sum()) for a in output.assignments] == [2 * 8 * SMALL.top_k] * SMALL.num_layers


def test_aux_loss_is_the_sum_over_layers() -> None:
    assert float(model()(tokens()).aux_loss()) == 0
    output = model(router=Balanced)(tokens())
    expected = sum(a.losses["switch"].item() for a in output.assignments)
    assert output.aux_loss().item() == pytest.approx(expected)
    assert expected > 0


@pytest.mark.parametrize("tied", [True, False])
def test_head_may_be_tied(tied: bool) -> None:
    net = model(SMALL.override({"tied_head": tied}))
    assert (net.head.weight is net.embedding.weight) is tied


def test_first_loss_is_that_of_a_guess() -> None:
    text = tokens(8, length=33)
    logits = model()(text[:, :-1]).logits_BSV
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256) + 0.1, abs=0.1)  # logits of variance 0.2 cost half of it


def test_routers_get_what_they_may_need() -> None:
    seen: list[RouteContext] = []

    class Curious(TopKRouter):
        def adjust(self, scores_TE: torch.Tensor, ctx: RouteContext) -> torch.Tensor:
            seen.append(ctx)
            return scores_TE

    net = model(router=Curious)
    seen.clear()  # the layers have routed nothing once, to learn the shapes of the stats
    net(tokens(), torch.tensor([7, 1, 0]))
    first, second = seen
    assert torch.equal(first.token_ids_T, tokens().flatten())
    assert first.sequence_ids_T.tolist() == [0] * 8 + [1] * 8
    assert (first.num_sequences, first.hidden_TD.shape) == (2, (16, SMALL.hidden_size))
    assert (first.noise_key.tolist(), second.noise_key.tolist()) == ([7, 1, 0, 0], [7, 1, 0, 1])


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)
    rotary = rotary_table(10, 8, torch.device("cpu"))
    queries, keys = (rotate(x.expand(1, 1, 10, 8), rotary)[0, 0] for x in (query, key))
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(10))
    products = queries @ keys.t()
    for distance in range(-9, 10):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert float(products[9, 0]) != pytest.approx(float(products[0, 0]))


@pytest.mark.parametrize("changes", [{"top_k": 4}, {"num_experts": 1, "top_k": 1}, {"num_groups": 2, "kept_groups": 1}])
def test_limits_of_k(changes: dict[str, int]) -> None:
    settings = SMALL.override(changes)
    output = model(settings)(tokens())
    output.logits_BSV.sum().backward()
    assert all(int(a.load_E.sum()) == 16 * settings.top_k for a in output.assignments)
