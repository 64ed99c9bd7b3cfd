"""Every probe router passes every test here: the contract carries the field, not three routers."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moerouters import Assignment, AssignmentKind, MoELayer, RouteContext, Router, attach
from moerouters.capabilities import StateAlgebra
from moerouters.errors import ContextError, NonFiniteLogits
from moerouters.metrics import max_violation
from support.assignments import assert_same_bits, tensors_of, weights_by_pair

from .probes import HIDDEN_SIZE, NUM_EXPERTS, PROBES

T = 23
"""Odd on purpose: T * K / E is no integer."""

Make = Callable[..., Router]


def promising(**promises: object) -> list[str]:
    """Names of the probes that declare these capabilities."""
    declared = {name: make().capabilities for name, make in PROBES.items()}
    return [name for name, caps in declared.items() if all(getattr(caps, k) == v for k, v in promises.items())]


@pytest.fixture(params=PROBES.values(), ids=PROBES.keys())
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def router(make: Make) -> Router:
    return trained(make())


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_logits(tokens: int = T, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[tokens, E] with a favourite expert, so that balancers have something to do."""
    noise_TE = torch.randn(tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    return (noise_TE + torch.linspace(1, -1, NUM_EXPERTS)).to(dtype)


def full_context(tokens: int = T, *, seed: int = 1) -> RouteContext:
    """Everything that any probe may ask for."""
    random = torch.Generator().manual_seed(seed)
    return RouteContext(
        token_ids_T=torch.randint(0, 1000, (tokens,), generator=random),
        hidden_TD=torch.randn(tokens, HIDDEN_SIZE, generator=random),
        noise_key=torch.tensor([7, 0, 0, 3]),
    )


def trained(router: Router) -> Router:
    """A router whose state and parameters are not the initial ones."""
    with torch.no_grad():
        for number, parameter in enumerate(router.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
        if router.capabilities.state is not StateAlgebra.STATELESS:
            router.update(dict(router(random_logits(40, seed=9), full_context(40)).stats))
    return router


def cut(ctx: RouteContext, rows: slice | Tensor) -> RouteContext:
    """The context of some of the tokens."""
    per_token = ("valid_T", "token_ids_T", "hidden_TD")
    return replace(ctx, **{name: getattr(ctx, name)[rows] for name in per_token if getattr(ctx, name) is not None})


def state_of(router: Router) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in router.state_dict().items()}


def test_a_probe_fits_on_40_lines() -> None:
    files = sorted((Path(__file__).parent / "probes").glob("*.py"))
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lengths) == len(PROBES) + 1
    assert {name: length for name, length in lengths.items() if length > 40} == {}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tokens", [0, 1, T])
def test_assignments_are_valid(router: Router, tokens: int, training: bool) -> None:
    assignment = router.train(training)(random_logits(tokens), full_context(tokens)).validate()
    assert assignment.kind is router.capabilities.assignment
    assert int(assignment.tokens) == tokens
    assert all(bool(torch.isfinite(loss)) for loss in assignment.losses.values())


def test_every_expert_may_be_chosen(make: Make) -> None:
    """K = E leaves no cutoff and nothing to balance."""
    router = make(top_k=NUM_EXPERTS)
    assignment = router(random_logits(), full_context()).validate()
    before = state_of(router)
    router.update(dict(assignment.stats))
    assert all(bool(torch.isfinite(value).all()) for value in router.state_dict().values())
    if router.state_names() != ("l1_scale",):  # ReMoE steers sparsity, not balance
        assert_same_bits(router.state_dict(), before)


def test_forward_is_pure(router: Router) -> None:
    logits_TE, ctx, before = random_logits(), full_context(), state_of(router)
    first, second = router(logits_TE, ctx), router(logits_TE, ctx)
    assert_same_bits(tensors_of(second), tensors_of(first))
    assert_same_bits(router.state_dict(), before)


def test_forward_draws_from_no_global_generator(router: Router) -> None:
    before = torch.get_rng_state()
    router(random_logits(), full_context())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("training", "backend"),
    [
        pytest.param(True, "aot_eager", id="train"),
        pytest.param(False, "aot_eager", id="eval", marks=pytest.mark.slow),
        pytest.param(True, "inductor", id="train-inductor", marks=pytest.mark.slow),
        pytest.param(False, "inductor", id="eval-inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(router: Router, training: bool, backend: str) -> None:
    torch._dynamo.reset()
    router.train(training)
    compiled = torch.compile(router, fullgraph=True, backend=backend)
    ctx = replace(full_context(), valid_T=torch.arange(T) != 5)

    def run(route: Callable[..., Assignment]) -> dict[str, Tensor]:
        logits_TE = random_logits().requires_grad_()
        assignment = route(logits_TE, ctx)
        (gradient_TE,) = torch.autograd.grad(readout(assignment), logits_TE, allow_unused=True)
        return tensors_of(assignment) | ({} if gradient_TE is None else {"gradient": gradient_TE})

    actual, expected = run(compiled), run(router)
    if backend == "aot_eager":
        assert_same_bits(actual, expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


def readout(assignment: Assignment) -> Tensor:
    """A scalar that depends on all weights, unevenly, and on all losses."""
    weights_N = assignment.pairs()[2]
    slopes_N = torch.linspace(-1, 1, weights_N.numel(), dtype=weights_N.dtype)
    return (weights_N * slopes_N).sum() + sum(assignment.losses.values())


def test_what_padding_holds_changes_nothing(router: Router) -> None:
    valid_T = torch.rand(T, generator=torch.Generator().manual_seed(5)) < 0.6
    logits_TE, ctx = random_logits(), replace(full_context(), valid_T=valid_T)
    other = full_context(seed=77)
    garbage_TE = torch.where(valid_T.unsqueeze(1), logits_TE, random_logits(seed=78) * 50)
    garbage_ctx = replace(
        ctx,
        token_ids_T=torch.where(valid_T, ctx.token_ids_T, other.token_ids_T),
        hidden_TD=torch.where(valid_T.unsqueeze(1), ctx.hidden_TD, other.hidden_TD),
    )
    assignment = router(logits_TE, ctx).validate()
    garbage = router(garbage_TE, garbage_ctx).validate()
    # Which token an empty pair names is nobody's business.
    assert_same_bits(tensors_of(garbage), tensors_of(assignment), but={"token_ids_N"})
    assert weights_by_pair(garbage) == weights_by_pair(assignment)
    assert {token for token, _ in weights_by_pair(assignment)} <= set(valid_T.nonzero().flatten().tolist())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_padding_counts_nowhere(router: Router, training: bool) -> None:
    """Trailing padding (noise is drawn by position) leaves what the real tokens alone would get."""
    router.train(training)
    real = 17
    logits_TE, ctx = random_logits(), replace(full_context(), valid_T=torch.arange(T) < real)
    padded = router(logits_TE, ctx)
    alone = router(logits_TE[:real], cut(full_context(), slice(real)))
    assert weights_by_pair(padded) == pytest.approx(weights_by_pair(alone), rel=1e-6)
    assert torch.equal(padded.load_E, alone.load_E)
    assert int(padded.tokens) == real
    for mine, theirs in ((padded.losses, alone.losses), (padded.stats, alone.stats)):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_padding_only(router: Router) -> None:
    assignment = router(random_logits(), replace(full_context(), valid_T=torch.zeros(T, dtype=torch.bool))).validate()
    before = state_of(router)
    assert int(assignment.load_E.sum()) == 0
    assert all(bool(torch.isfinite(loss)) for loss in assignment.losses.values())
    router.update(dict(assignment.stats))
    assert_same_bits(router.state_dict(), before)


@pytest.mark.usefixtures("deterministic")
def test_runs_on_deterministic_algorithms(router: Router) -> None:
    logits_TE = random_logits().requires_grad_()
    gradients = [
        torch.autograd.grad(readout(router(logits_TE, full_context())), logits_TE, allow_unused=True) for _ in "ab"
    ]
    assert gradients[0][0] is not None
    assert torch.equal(gradients[0][0], gradients[1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_dtype_of_logits(router: Router, dtype: torch.dtype) -> None:
    logits_TE = random_logits(dtype=dtype)
    assignment = router(logits_TE, full_context()).validate()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert assignment.weights.dtype == wide
    # Every narrow number is a float32 number: widening before the router changes nothing.
    assert_same_bits(tensors_of(assignment), tensors_of(router(logits_TE.to(wide), full_context())))


def test_gradients_reach_what_they_should(router: Router) -> None:
    logits_TE = random_logits(dtype=torch.float64).requires_grad_()
    assignment = router(logits_TE, full_context())
    gradient_TE, *of_parameters = torch.autograd.grad(readout(assignment), [logits_TE, *router.parameters()])
    assert bool(torch.isfinite(gradient_TE).all())
    assert bool((gradient_TE != 0).any())
    assert bool(of_parameters) == router.capabilities.parameters
    assert all(bool((gradient != 0).any()) for gradient in of_parameters)
    assert not any(stat.requires_grad for stat in assignment.stats.values())


@pytest.mark.parametrize("name", promising(state=StateAlgebra.ADDITIVE))
def test_additive_stats_add_up(name: str) -> None:
    """Splitting a batch over micro-batches changes nothing; ranks are the same thing."""
    router = trained(PROBES[name]())
    logits_TE, ctx = random_logits(), full_context()
    whole = router(logits_TE, ctx)
    parts = [router(logits_TE[rows], cut(ctx, rows)) for rows in (slice(0, 9), slice(9, T))]
    assert whole.stats
    for key, stat in whole.stats.items():
        assert torch.equal(parts[0].stats[key] + parts[1].stats[key], stat)


@pytest.mark.parametrize("name", promising(state=StateAlgebra.MEAN_OF_SOLVES))
def test_solves_are_averaged_by_their_tokens(name: str) -> None:
    router = trained(PROBES[name]())
    parts = [router(random_logits(tokens, seed=tokens), full_context(tokens)) for tokens in (8, 24)]
    alone = [copy.deepcopy(router) for _ in parts]
    for each, part in zip(alone, parts, strict=True):
        each.update(dict(part.stats))
    router.update({key: parts[0].stats[key] + parts[1].stats[key] for key in parts[0].stats})
    for key in router.state_names():
        few, many = (each.get_buffer(key) for each in alone)
        assert not torch.equal(few, many)
        torch.testing.assert_close(router.get_buffer(key), 0.25 * few + 0.75 * many)


def test_eval_is_frozen_and_keeps_its_promise(router: Router) -> None:
    router.eval()
    logits_TE, ctx = random_logits(), full_context()
    assignment = router(logits_TE, ctx)
    assert not assignment.losses
    assert not assignment.stats
    rows = torch.tensor([3, 4, 11])
    alone = router(logits_TE[rows], cut(ctx, rows))
    together = {pair: weight for pair, weight in weights_by_pair(assignment).items() if pair[0] in rows.tolist()}
    same = {(rows.tolist().index(t), e): w for (t, e), w in together.items()} == weights_by_pair(alone)
    assert same == router.capabilities.eval_batch_invariant


def test_causal_means_that_later_tokens_do_not_matter(router: Router) -> None:
    logits_TE, ctx = random_logits(), full_context()
    half = 12
    assignment = router(logits_TE, ctx)
    early = router(logits_TE[:half], cut(ctx, slice(half)))
    together = {pair: weight for pair, weight in weights_by_pair(assignment).items() if pair[0] < half}
    assert (together == weights_by_pair(early)) == router.capabilities.causal


@pytest.mark.parametrize("name", promising(state=StateAlgebra.STATELESS))
def test_a_stateless_router_has_no_state(name: str) -> None:
    assert not PROBES[name]().state_names()
    assert not PROBES[name]()(random_logits(), full_context()).stats


@pytest.mark.parametrize("name", sorted(PROBES.keys() - promising(state=StateAlgebra.STATELESS)))
def test_state_changes_in_update_and_survives_a_round_trip(name: str) -> None:
    make = PROBES[name]
    router = trained(make())
    before = state_of(router)
    router.update(dict(router(random_logits(seed=3), full_context()).stats))
    assert any(not torch.equal(value, before[key]) for key, value in router.state_dict().items())
    other = make()
    other.load_state_dict(router.state_dict())
    logits_TE, ctx = random_logits(seed=4), full_context()
    assert_same_bits(tensors_of(other(logits_TE, ctx)), tensors_of(router(logits_TE, ctx)))
    other.reset_state()
    assert_same_bits(other.state_dict(), make().state_dict())


def test_non_finite_logits_are_counted_and_kept_in_range(router: Router) -> None:
    logits_TE = random_logits()
    logits_TE[2, :] = torch.nan
    logits_TE[5, 1] = torch.inf
    logits_TE[6, 0] = -torch.inf
    assignment = router(logits_TE, replace(full_context(), valid_T=torch.arange(T) != 6))
    assert int(assignment.nonfinite) == 2
    assert int(assignment.tokens) == T - 3
    assert bool(((assignment.expert_ids >= 0) & (assignment.expert_ids <= NUM_EXPERTS)).all())
    for stat in assignment.stats.values():
        assert bool(torch.isfinite(stat).all())


@pytest.mark.parametrize("loss_mode", ["collect", "inject"])
def test_two_steps_inside_a_layer(make: Make, loss_mode: str) -> None:
    torch.manual_seed(0)
    layer = MoELayer(make(), hidden_size=HIDDEN_SIZE, expert_size=4, loss_mode=loss_mode)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = attach(optimizer, layer)
    before = state_of(layer.router)
    ctx = replace(full_context(), hidden_TD=None, valid_T=torch.arange(T) != 4)
    for step in range(2):
        x_TD = torch.randn(T, HIDDEN_SIZE, generator=torch.Generator().manual_seed(step))
        hidden, assignment = layer(x_TD, ctx)
        aux = sum(assignment.losses.values()) if loss_mode == "collect" else 0.0
        (hidden.square().mean() + aux).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(handle.loads[""], assignment.load_E)
    assert handle.steps == 2
    changed = {name for name, value in layer.router.state_dict().items() if not torch.equal(value, before[name])}
    expected = set(layer.router.state_names()) | {name for name, _ in layer.router.named_parameters()}
    assert changed == expected


def test_a_layer_without_tokens(make: Make) -> None:
    layer = MoELayer(make(), hidden_size=HIDDEN_SIZE, expert_size=4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = attach(optimizer, layer)
    before = state_of(layer.router)
    x = torch.zeros(0, 5, HIDDEN_SIZE, requires_grad=True)
    hidden, assignment = layer(x, replace(full_context(0), hidden_TD=None))
    assert hidden.shape == x.shape
    (hidden.sum() + sum(assignment.losses.values())).backward()
    optimizer.step()
    assert handle.loads[""].tolist() == [0] * NUM_EXPERTS
    assert_same_bits(layer.router.state_dict(), before)


def test_a_layer_names_itself_when_its_logits_are_not_finite(make: Make) -> None:
    layer = MoELayer(make(), hidden_size=HIDDEN_SIZE, expert_size=4)
    model = torch.nn.ModuleDict({"moe": layer})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    before = state_of(layer.router)
    x_TD = torch.randn(T, HIDDEN_SIZE)
    x_TD[3] = torch.nan
    assignment = layer(x_TD, replace(full_context(), hidden_TD=None)).assignment
    if assignment.losses:
        sum(assignment.losses.values()).backward()
    layer.zero_grad()
    with pytest.raises(NonFiniteLogits, match="layer 'moe' gave NaN or infinite logits for 1 token"):
        optimizer.step()
    for name in layer.router.state_names():
        assert torch.equal(layer.router.get_buffer(name), before[name])


@pytest.mark.parametrize(
    ("name", "share"), [("bip", 0.1), ("expert-choice", 0.0), ("lagged-quantile", 0.1), ("sinkhorn", 0.2)]
)
def test_balancers_balance(name: str, share: float) -> None:
    """The probes are the real thing: on skewed logits they leave at most this share of plain top-k's MaxVio."""
    router = PROBES[name]()
    for step in range(10):
        assignment = router(random_logits(512, seed=step), full_context(512))
        router.update(dict(assignment.stats))
    plain = Router(router.gating)(random_logits(512, seed=9))
    assert float(max_violation(assignment.load_E)) <= share * float(max_violation(plain.load_E))


def test_a_router_says_what_it_misses() -> None:
    with pytest.raises(ContextError, match="router 'hash' needs token_ids_T, and the RouteContext has none"):
        PROBES["hash"]()(random_logits())
    with pytest.raises(ContextError, match="router 'noisy-topk' needs hidden_TD"):
        PROBES["noisy-topk"]()(random_logits(), RouteContext(noise_key=torch.tensor([1])))


def test_kinds_cover_slots_pairs_and_dense() -> None:
    assert {make().capabilities.assignment for make in PROBES.values()} == set(AssignmentKind)
