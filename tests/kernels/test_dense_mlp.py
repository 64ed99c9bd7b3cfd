"""All experts as one wide network against one expert at a time; what it computes, keeps and borrows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moerouters.experts import GroupedExperts
from moerouters.kernels import dense_mlp as module
from moerouters.kernels import workspace
from moerouters.kernels.dense_mlp import dense_mlp, dense_mlp_torch
from moerouters.kernels.routes import AllExperts

from .mlp_checks import expect_equal, gradients, products, slopes

E, D, F = 4, 3, 5
NAMES = ("x", "weights", "up", "down")


def inputs(
    tokens: int, activation: str = "swiglu", *, num_experts: int = E, dtype: Any = torch.float64
) -> list[Tensor]:
    """x_TD, weights_TE, up_eFD, down_eDF; they require gradients. Every third weight is that of an empty slot."""
    random = torch.Generator().manual_seed(tokens)
    width = 2 * F if activation == "swiglu" else F
    shapes = [(tokens, D), (num_experts, width, D), (num_experts, D, F)]
    x_TD, up_eFD, down_eDF = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes)
    weights_TE = torch.rand(tokens, num_experts, generator=random, dtype=torch.float64)
    if num_experts > 1:
        weights_TE.view(-1)[::3] = 0
    weights_TE = weights_TE.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return [each.requires_grad_() for each in (x_TD, weights_TE, up_eFD, down_eDF)]


@pytest.mark.parametrize("num_experts", [1, E])
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_equals_the_loop_over_experts_with_gradients(activation: Any, tokens: int, num_experts: int) -> None:
    given = inputs(tokens, activation, num_experts=num_experts)
    expect_equal(dense_mlp(*given, activation), dense_mlp_torch(*given, activation), given)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_many_tiles(activation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE_BYTES", 0)  # the smallest tiles, of 64 tokens
    given = inputs(150, activation)
    with products(module, monkeypatch) as made:
        found = dense_mlp(*given, activation)
    assert [rows for rows, _ in made] == [50] * 6
    expect_equal(found, dense_mlp_torch(*given, activation), given)


def test_gradients_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda *given: dense_mlp(*given, "swiglu"), tuple(inputs(3)))


def test_a_second_derivative_is_refused() -> None:
    given = inputs(3)
    (of_x,) = torch.autograd.grad(dense_mlp(*given, "swiglu").sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"dense_mlp_gradients.*no autograd"):
        of_x.sum().backward()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_padding_may_hold_anything(poison: float) -> None:
    """Also where the gradient of its result is not finite."""
    given = inputs(9)
    padding_T1 = (torch.arange(9) % 4 == 1).unsqueeze(1)
    x_TD, weights_TE = given[0].detach(), given[1].detach().masked_fill(padding_T1, 0)
    clean = [x_TD.masked_fill(padding_T1, 0), weights_TE, *given[2:]]
    dirty = [x_TD.masked_fill(padding_T1, poison), weights_TE, *given[2:]]
    results = []
    for tensors in (clean, dirty):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y_TD = dense_mlp(*leaves, "swiglu")
        slope_TD = slopes(y_TD).masked_fill(padding_T1, 0 if tensors is clean else poison)
        results.append([y_TD, *torch.autograd.grad(y_TD, leaves, slope_TD)])
    assert all(torch.equal(mine, right) for mine, right in zip(*results, strict=True))
    assert not results[1][0][padding_T1.squeeze(1)].any()


def test_a_broken_token_is_seen_and_disturbs_no_other() -> None:
    given = inputs(5)
    with torch.no_grad():
        given[0][2] = torch.nan
    y_TD = dense_mlp(*given, "swiglu")
    assert bool(y_TD[2].isnan().all())
    assert bool(y_TD[torch.arange(5) != 2].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_other_dtypes(activation: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in float32 where a CPU has no units for the half, and in the half itself."""
    given = inputs(30, activation, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    y = dense_mlp(*exact, activation)
    expected = [y.detach(), *gradients(y, exact)]
    for own in (False, True):
        monkeypatch.setattr(module, "compute_dtype", lambda dtype, own=own: dtype if own else torch.float32)
        limit = (16 if own else 4) * torch.finfo(dtype).eps
        y_TD = dense_mlp(*given, activation)
        assert y_TD.dtype == torch.float32
        found = gradients(y_TD, given)
        assert [gradient.dtype for gradient in found] == [dtype, torch.float32, dtype, dtype]
        for mine, right in zip((y_TD.detach(), *found), expected, strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=limit, atol=limit * float(right.abs().max()))


def test_under_autocast() -> None:
    """The experts cast; the weights of the sum stay in float32, and so does the result."""
    torch.manual_seed(0)
    experts = GroupedExperts(E, hidden_size=D, expert_size=F)
    x_TD, weights_TE, _, _ = inputs(9, dtype=torch.float32)
    load_e = torch.full((E,), 9)
    outside = experts(x_TD, load_e, AllExperts(weights_TE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = experts(x_TD, load_e, AllExperts(weights_TE))
    assert inside.dtype == outside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=2e-2, atol=2e-2)
    assert not torch.equal(inside, outside)
    inside.sum().backward()
    assert experts.up_eFD.grad.dtype == torch.float32


H, A = (9, E * 2 * F), (9, E * F)
PRODUCTS: dict[str, list[tuple[int, int]]] = {
    "x": [A, (9, D)],
    "weights": [A],
    "up": [A, (E * 2 * F, D)],
    "down": [(E * F, D)],
    "x weights up down": [A, (E * F, D), (E * 2 * F, D), (9, D)],
}


@pytest.mark.parametrize("part", PRODUCTS)
def test_a_pass_computes_what_it_wants(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(9)
    y_TD = dense_mlp(*given, "swiglu")
    everything = dict(zip(NAMES, torch.autograd.grad(y_TD.sum(), given, retain_graph=True), strict=True))
    with products(module, monkeypatch) as made:
        found = torch.autograd.grad(y_TD.sum(), [given[NAMES.index(name)] for name in part.split()], retain_graph=True)
    assert sorted(made) == sorted(PRODUCTS[part])
    for name, mine in zip(part.split(), found, strict=True):
        assert torch.equal(mine, everything[name])


@pytest.mark.parametrize("part", PRODUCTS)
def test_tensors_without_gradient_cost_no_products(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(9)
    for name, tensor in zip(NAMES, given, strict=True):
        tensor.requires_grad_(name in part.split())
    with products(module, monkeypatch) as made:
        y_TD = dense_mlp(*given, "swiglu")
    assert made == [H, (9, D)]
    with products(module, monkeypatch) as made:
        y_TD.sum().backward()
    assert sorted(made) == sorted(PRODUCTS[part])


def test_a_graph_keeps_the_input_and_one_product() -> None:
    given = inputs(8, dtype=torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dense_mlp(*given, "swiglu")
    assert sum(kept.values()) == 8 * E * 2 * F * 4 + sum(each.untyped_storage().nbytes() for each in given)
    with torch.no_grad():
        assert torch.ops.moerouters.dense_mlp(*given, "swiglu", False)[1].numel() == 0


def test_results_of_experts_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is borrowed does not grow with the tokens: [T, E, D] does."""
    monkeypatch.setattr(module, "_TILE_BYTES", 0)

    def borrowed_for(tokens: int) -> int:
        workspace.release()
        given = inputs(tokens, dtype=torch.float32)
        gradients(dense_mlp(*given, "swiglu"), given)
        return workspace.kept_bytes()

    assert borrowed_for(64) == borrowed_for(6400) < 6400 * E * D * 4


def test_any_strides() -> None:
    given = inputs(8)
    strided = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in given]
    assert not any(tensor.is_contiguous() for tensor in strided)
    found, expected = dense_mlp(*strided, "swiglu"), dense_mlp(*given, "swiglu")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    of_a_sum = torch.autograd.grad(found.sum(), strided)  # the gradient of a sum has strides 0
    for mine, right in zip(of_a_sum, torch.autograd.grad(expected.sum(), given), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_with_the_same_bits(use_reentrant: bool) -> None:
    given = inputs(20, dtype=torch.float32)
    expected = gradients(dense_mlp(*given, "swiglu"), given)
    run: Callable[..., Tensor] = lambda *tensors: dense_mlp(*tensors, "swiglu")  # noqa: E731
    recomputed = checkpoint(run, *given, use_reentrant=use_reentrant)
    (recomputed * slopes(recomputed)).sum().backward()
    for tensor, right in zip(given, expected, strict=True):
        assert torch.equal(tensor.grad, right)


def test_compiles_whole_with_the_same_bits() -> None:
    given = inputs(20, dtype=torch.float32)
    expected = dense_mlp(*given, "swiglu")
    compiled = torch.compile(dense_mlp, fullgraph=True, backend="aot_eager")(*given, "swiglu")
    assert torch.equal(compiled, expected)
    for mine, right in zip(gradients(compiled, given), gradients(expected, given), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_is_a_well_formed_operator(activation: str) -> None:
    given = inputs(5, activation, dtype=torch.float32)
    torch.library.opcheck(torch.ops.moerouters.dense_mlp.default, (*given, activation, True))
    without_a_graph = [tensor.detach() for tensor in given]
    torch.library.opcheck(torch.ops.moerouters.dense_mlp.default, (*without_a_graph, activation, False))
