"""Configuration, state and what the contract of a router asks for."""

import pytest
import torch
from torch import Tensor

import moerouters
from moerouters import Gating, RouteContext
from moerouters.errors import ConfigError, ContextError
from moerouters_loss_controlled.config import LossControlledConfig
from moerouters_loss_controlled.router import LossControlledRouter, capabilities_of

ALL = {"alpha": 0.1, "sequence_alpha": 0.1, "global_alpha": 0.1, "z_alpha": 0.001}


def make(E: int = 4, K: int = 2, **config: object) -> LossControlledRouter:
    return LossControlledRouter(Gating.softmax(E, K), LossControlledConfig.model_validate(config))


def sequences(T: int, num_sequences: int = 2) -> RouteContext:
    return RouteContext(sequence_ids_T=torch.arange(T) % num_sequences, num_sequences=num_sequences)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, ["switch"]),
        ({"form": "gshard"}, ["switch"]),
        ({"alpha": 0, "z_alpha": 0.1}, ["z"]),
        ({"alpha": 0, "sequence_alpha": 0.1}, ["sequence"]),
        ({"global_alpha": 0.1}, ["switch", "global"]),
        (ALL, ["switch", "sequence", "global", "z"]),
        ({"alpha": 0}, []),
    ],
)
def test_each_coefficient_brings_its_loss(config: dict[str, object], names: list[str]) -> None:
    router, logits_TE = make(**config), torch.randn(6, 4)
    assert list(router(logits_TE, sequences(6)).losses) == names
    assert not router.eval()(logits_TE).losses
    topk = moerouters.build("topk", Gating.softmax(4, 2))
    assert torch.equal(router(logits_TE).expert_ids_TK, topk(logits_TE).expert_ids_TK)
    assert torch.equal(router(logits_TE).weights_TK, topk(logits_TE).weights_TK)


def test_coefficients_scale_and_do_not_mix() -> None:
    torch.manual_seed(0)
    logits_TE = torch.randn(8, 4)
    one, other = make(**ALL), make(**{name: 3 * value for name, value in ALL.items()})
    first, second = one(logits_TE, sequences(8)).losses, other(logits_TE, sequences(8)).losses
    for name, loss in first.items():
        torch.testing.assert_close(second[name], 3 * loss)


@pytest.mark.parametrize(
    ("config", "state", "load_scope", "collective"),
    [
        ({}, "stateless", "local", False),
        ({"alpha": 0, "z_alpha": 0.1}, "stateless", "none", False),
        ({"sequence_alpha": 0.1}, "stateless", "local", False),
        ({"global_alpha": 0.1}, "additive", "global", False),
        ({"global_alpha": 0.1, "global_load": "all_reduce"}, "stateless", "global", True),
        ({"global_load": "all_reduce"}, "stateless", "local", False),
    ],
)
def test_capabilities_follow_the_config(
    config: dict[str, object], state: str, load_scope: str, collective: bool
) -> None:
    router = make(**config)
    promised = router.capabilities
    assert (promised.state, promised.load_scope, promised.forward_collective) == (state, load_scope, collective)
    assert promised == capabilities_of(router.config)
    assert bool(router.state_names()) == (state == "additive")
    assert bool(router(torch.randn(3, 4), sequences(3)).stats) == (state == "additive")


def test_the_plugin_offers_it_by_name() -> None:
    router = moerouters.build("loss-controlled", Gating.sigmoid(4, 1), config={"alpha": 0.1})
    assert isinstance(router, LossControlledRouter)
    spec = moerouters.info("loss-controlled").spec
    assert spec.config is LossControlledConfig
    assert spec.capabilities == moerouters.build("loss-controlled", Gating.softmax(4, 1)).capabilities
    assert [spec.config.model_validate(dict(settings)).alpha for settings in spec.baselines] == [0.1]
    assert LossControlledConfig().alpha == 0.01
    assert all(field.description for field in LossControlledConfig.model_fields.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"alpha": -1}, "alpha"),
        ({"z_alpha": float("inf")}, "z_alpha"),
        ({"form": "top1"}, "'switch' or 'gshard'"),
        ({"global_load": "everything"}, "'last_step' or 'all_reduce'"),
        ({"seq_alpha": 0.1}, "did you mean 'sequence_alpha'"),
    ],
)
def test_a_bad_config_is_named(config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        moerouters.build("loss-controlled", Gating.softmax(4, 1), config=config)


@pytest.mark.parametrize(
    ("ctx", "words"),
    [
        (RouteContext(), "needs sequence_ids_T"),
        (RouteContext(sequence_ids_T=torch.zeros(3, dtype=torch.int64)), "needs num_sequences"),
    ],
)
def test_sequences_are_never_guessed(ctx: RouteContext, words: str) -> None:
    with pytest.raises(ContextError, match=words):
        make(sequence_alpha=0.1)(torch.randn(3, 4), ctx)
    make()(torch.randn(3, 4), ctx)  # a router that does not need them does not ask


def test_the_first_step_uses_its_own_load_and_later_ones_the_last() -> None:
    torch.manual_seed(1)
    logits_TE = torch.randn(8, 4)
    router = make(alpha=0.5, global_alpha=0.5)
    first = router(logits_TE)
    assert torch.equal(first.losses["global"], first.losses["switch"])
    router.update({"load_E": torch.tensor([0, 0, 6, 2])})
    expected = (torch.tensor([0.0, 0.0, 3.0, 1.0]) * logits_TE.softmax(dim=-1).mean(dim=0)).sum() / 2
    torch.testing.assert_close(router(logits_TE).losses["global"], expected)
    router.update({"load_E": torch.zeros(4, dtype=torch.int64)})  # a step without tokens
    torch.testing.assert_close(router(logits_TE).losses["global"], expected)


@pytest.mark.parametrize("form", ["switch", "gshard"])
def test_micro_batches_add_up(form: str) -> None:
    torch.manual_seed(2)
    logits_TE = torch.randn(24, 5)
    whole, split = make(5, global_alpha=1, form=form), make(5, global_alpha=1, form=form)
    whole.update(whole(logits_TE).stats)
    parts = [split(part).stats["load_E"] for part in logits_TE.split([7, 0, 17])]
    split.update({"load_E": torch.stack(parts).sum(dim=0)})
    assert torch.equal(whole.get_buffer("last_fraction_E"), split.get_buffer("last_fraction_E"))
    assert whole.get_buffer("last_fraction_E").mean() == 1


def test_loads_are_exact_where_a_float32_counter_stops() -> None:
    router = make(2, 1, global_alpha=1)
    counter = torch.tensor(2.0**24)
    assert counter + 1 == counter
    load_E = torch.tensor([2**24, 2**24])
    for _ in range(2**4):
        load_E = load_E + torch.tensor([1, -1])  # what int64 sums over micro-batches do
    router.update({"load_E": load_E * 2**20})
    share = (2**24 + 16) / 2**24
    assert router.get_buffer("last_fraction_E").tolist() == pytest.approx([share, 2 - share], abs=1.2e-7)
    assert router.get_buffer("last_fraction_E")[0] > 1


def test_state_stays_float32_and_travels() -> None:
    router = make(3, 1, global_alpha=1)
    router.update({"load_E": torch.tensor([1000, 1001, 999])})
    kept_E = router.get_buffer("last_fraction_E").clone()
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        router.to(cast)
        assert router.get_buffer("last_fraction_E").dtype == torch.float32
        assert torch.equal(router.get_buffer("last_fraction_E"), kept_E)
    twin = make(3, 1, global_alpha=1)
    twin.load_state_dict(router.state_dict())
    assert torch.equal(twin.get_buffer("last_fraction_E"), kept_E)
    twin.reset_state()
    assert not twin.get_buffer("last_fraction_E").any()


@pytest.mark.parametrize("form", ["switch", "gshard"])
def test_forced_ids_carry_losses_and_are_not_observed(form: str) -> None:
    torch.manual_seed(3)
    logits_TE = torch.randn(6, 4)
    router = make(form=form, **ALL)
    free = router(logits_TE, sequences(6))
    ctx = sequences(6)
    forced = router(
        logits_TE,
        RouteContext(
            sequence_ids_T=ctx.sequence_ids_T, num_sequences=ctx.num_sequences, forced_ids_TK=free.expert_ids_TK
        ),
    )
    assert not forced.stats
    for name, loss in free.losses.items():
        assert torch.equal(forced.losses[name], loss)


def test_empty_slots_of_a_forced_assignment_count_nowhere() -> None:
    logits_TE = torch.zeros(2, 4)
    ctx = RouteContext(forced_ids_TK=torch.tensor([[1, 4], [2, 3]]))
    loss = make(alpha=1.0)(logits_TE, ctx).losses["switch"]
    assert loss.item() == pytest.approx(1.0)  # f = 4/3 * [0, 1, 1, 1], P = 1/4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_computed_in_float32_or_better(dtype: torch.dtype) -> None:
    logits_TE = torch.randn(6, 4).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make(**ALL)(logits_TE, sequences(6)).losses
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {loss.dtype for loss in found.values()} == {wanted}
    torch.stack(list(found.values())).sum().backward()
    assert logits_TE.grad is not None and logits_TE.grad.dtype == dtype and logits_TE.grad.abs().sum() > 0


@pytest.mark.parametrize("form", ["switch", "gshard"])
def test_compiles_whole_and_gives_the_same_numbers(form: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(4)
    router = make(form=form, **ALL)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    ctx = RouteContext(valid_T=torch.arange(9) != 3, sequence_ids_T=torch.arange(9) % 2, num_sequences=2)

    def run(route: torch.nn.Module, logits_TE: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        logits_TE = logits_TE.clone().requires_grad_()
        assignment = route(logits_TE, ctx)
        total = torch.stack(list(assignment.losses.values())).sum()
        (gradient_TE,) = torch.autograd.grad(total, logits_TE)
        return list(assignment.losses.values()), gradient_TE, assignment.stats["load_E"]

    for load in ([0, 0, 0, 0], [1, 5, 2, 8]):  # before and after a commit: not baked into the graph
        router.update({"load_E": torch.tensor(load)})
        logits_TE = torch.randn(9, 4)
        eager, traced = run(router, logits_TE), run(compiled, logits_TE)
        torch.testing.assert_close(traced, eager)
