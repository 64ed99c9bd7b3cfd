"""The experts' operator against one pair at a time; what it computes, keeps and writes."""

from collections.abc import Callable
from threading import Thread

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moerouters.errors import ShapeError
from moerouters.kernels import expert_mlp_cpu, expert_tiles, workspace
from moerouters.kernels.expert_mlp import expert_mlp, expert_mlp_torch
from support.routed import LOADS, Routed, routed

from .mlp_checks import expect_equal, gradients, products, slopes


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_tokens_equal_the_loop_with_gradients(activation: str, load: str, tokens: int) -> None:
    case = routed(load, tokens=tokens, activation=activation)
    expect_equal(case.run(), case.run_torch(), case.wanted)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("load", [[2, 2, 2], [0, 5, 0], [6, 0, 0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_given_rows_equal_the_loop_with_gradients(activation: str, load: list[int], padding: int) -> None:
    case = routed(num_experts=3, tokens=sum(load) + padding, activation=activation)
    rows = (case.x_TD, case.up_eFD, case.down_eDF, torch.tensor(load), activation)
    found = expert_mlp(*rows)
    expect_equal(found, expert_mlp_torch(*rows), case.wanted[:3])
    assert not found[sum(load) :].any()


def test_an_expert_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_tiles, "_BYTES", 0)  # the smallest tiles, of 64 rows
    case = routed("one hot expert", tokens=150)
    with products(expert_mlp_cpu, monkeypatch) as made:
        found = case.run()
    assert len(made) == 2 * sum(-(-rows // 64) for rows in case.load_e.tolist())
    assert max(rows for rows, _ in made) <= 64
    assert bool((case.load_e > 64).any())
    assert bool((case.load_e < 32).any())  # neighbours that share a tile
    expect_equal(found, case.run_torch(), case.wanted)


def test_a_load_of_more_rows_than_there_are() -> None:
    case = routed(num_experts=3, tokens=4)
    with pytest.raises(ShapeError, match="5 rows, and there are 4"):
        expert_mlp(case.x_TD, case.up_eFD, case.down_eDF, torch.tensor([2, 0, 3]), "swiglu")


def test_gradients_by_finite_differences() -> None:
    case = routed("holes", tokens=4)

    def run(x_TD: Tensor, up_eFD: Tensor, down_eDF: Tensor, weights_TK: Tensor) -> Tensor:
        return Routed(x_TD, weights_TK, case.order_N, up_eFD, down_eDF, case.load_e, "swiglu").run()

    assert torch.autograd.gradcheck(run, tuple(case.wanted))


def test_a_second_derivative_is_refused() -> None:
    case = routed()
    (of_x,) = torch.autograd.grad(case.run().sum(), case.x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match=r"expert_mlp_gradients.*no autograd"):
        of_x.sum().backward()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, -0.0])
def test_a_token_disturbs_no_other(poison: float) -> None:
    """In values and in gradients of inputs; what the loop makes of the token itself, nan or not, comes out too."""
    case = routed()
    with torch.no_grad():
        case.x_TD[4] = poison
    found, expected = case.run(), case.run_torch()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    mine, right = ([torch.autograd.grad(y.sum(), case.x_TD)[0]] for y in (found, expected))
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert bool(torch.isfinite(found[torch.arange(9) != 4]).all())


def test_what_no_expert_sees_reaches_nothing() -> None:
    """Tokens in no slot, and rows past the load, may hold anything."""
    case = routed("nothing")
    with torch.no_grad():
        case.x_TD.fill_(torch.nan)
    for y in (case.run(), expert_mlp(case.x_TD, case.up_eFD, case.down_eDF, case.load_e, "swiglu")):
        assert not y.any()
        for gradient in torch.autograd.grad(y.sum(), case.wanted[:3]):
            assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_other_dtypes(activation: str, dtype: torch.dtype) -> None:
    case = routed(tokens=30, dtype=dtype, activation=activation)
    exact = Routed(
        *(tensor.detach().double().requires_grad_() for tensor in (case.x_TD, case.weights_TK)),
        case.order_N,
        *(tensor.detach().double().requires_grad_() for tensor in (case.up_eFD, case.down_eDF)),
        case.load_e,
        activation,
    )
    limit = 4 * torch.finfo(dtype).eps
    y_TD = case.run()
    assert y_TD.dtype == torch.float32
    given = expert_mlp(case.x_TD, case.up_eFD, case.down_eDF, torch.tensor([9, 0, 16, 3]), activation)
    assert given.dtype == dtype
    pairs = [(y_TD.detach(), exact.run().detach())]
    pairs += zip(gradients(y_TD, case.wanted), gradients(exact.run(), exact.wanted), strict=True)
    for mine, right in pairs:
        torch.testing.assert_close(mine.double(), right, rtol=limit, atol=limit * float(right.abs().max()))
    assert [gradient.dtype for gradient in gradients(given, case.wanted[:3])] == [dtype] * 3


def test_halves_with_units_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other path: what is computed in bfloat16 itself."""
    case = routed(tokens=30, dtype=torch.bfloat16)
    found = case.run()
    of_found = gradients(found, case.wanted)
    monkeypatch.setattr(expert_mlp_cpu, "compute_dtype", lambda dtype: dtype)
    other = case.run()
    results = ((other.detach(), *gradients(other, case.wanted)), (found.detach(), *of_found))
    for mine, right in zip(*results, strict=True):
        assert mine.dtype == right.dtype
        torch.testing.assert_close(mine, right, rtol=0.05, atol=0.05 * float(right.abs().max()))


DH, DX, DW_UP, DW_DOWN = (2, 5), (2, 3), (10, 3), (3, 5)
"""Shapes of the products of a backward: with 2 rows in each of 2 experts, twice each."""
PARTS: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "x": ([0], [DH, DX]),
    "weights of experts": ([1, 2], [DH, DW_DOWN, DW_UP]),
    "up": ([1], [DH, DW_UP]),
    "down": ([2], [DW_DOWN]),
    "combine weights": ([3], [DH]),
    "x and combine weights": ([0, 3], [DH, DX]),
    "all": ([0, 1, 2, 3], [DH, DW_DOWN, DW_UP, DX]),
}


def two_experts() -> Routed:
    return routed("every expert", tokens=2, num_experts=2)


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "not leaves"])
@pytest.mark.parametrize("part", PARTS)
def test_a_pass_computes_what_it_wants(part: str, leaves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autograd.grad of some inputs runs the products these need and no others, with the same bits."""
    case = two_experts()
    wanted = case.wanted
    if not leaves:
        wanted = [tensor * 1 for tensor in wanted]
        x_TD, up_eFD, down_eDF, weights_TK = wanted
        case = Routed(x_TD, weights_TK, case.order_N, up_eFD, down_eDF, case.load_e, "swiglu")
    y_TD = case.run()
    everything = torch.autograd.grad(y_TD.sum(), wanted, retain_graph=True)
    indices, expected = PARTS[part]
    with products(expert_mlp_cpu, monkeypatch) as made:
        found = torch.autograd.grad(y_TD.sum(), [wanted[index] for index in indices], retain_graph=True)
    assert sorted(made) == sorted(2 * expected)
    for mine, index in zip(found, indices, strict=True):
        assert torch.equal(mine, everything[index])


@pytest.mark.parametrize("part", PARTS)
def test_tensors_without_gradient_cost_no_products(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = two_experts()
    indices, expected = PARTS[part]
    for index, tensor in enumerate(case.wanted):
        tensor.requires_grad_(index in indices)
    y_TD = case.run()
    with products(expert_mlp_cpu, monkeypatch) as made:
        y_TD.sum().backward()
    assert sorted(made) == sorted(2 * expected)
    assert [tensor.grad is not None for tensor in case.wanted] == [index in indices for index in range(4)]


def test_a_pipeline_runs_input_and_weight_gradients_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = pytest.importorskip("torch.distributed.pipelining._backward")
    case = two_experts()
    case.weights_TK.requires_grad_(False)
    y_TD = case.run()
    expected = torch.autograd.grad(y_TD.sum(), case.wanted[:3], retain_graph=True)
    weights = [torch.nn.Parameter(case.up_eFD.detach()), torch.nn.Parameter(case.down_eDF.detach())]
    y_TD = Routed(case.x_TD, case.weights_TK, case.order_N, *weights, case.load_e, "swiglu").run()
    with products(expert_mlp_cpu, monkeypatch) as made:
        of_x, groups = backward.stage_backward_input([y_TD], [torch.ones_like(y_TD)], [case.x_TD], iter(weights))
    assert sorted(made) == sorted(2 * [DH, DX])
    with products(expert_mlp_cpu, monkeypatch) as made:
        backward.stage_backward_weight(iter(weights), groups)
    assert sorted(made) == sorted(2 * [DW_DOWN, DW_UP])  # what both halves need was made once
    for mine, right in zip((of_x[0], *(weight.grad for weight in weights)), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-14)


def test_a_graph_keeps_the_input_and_one_product() -> None:
    case = routed(tokens=8, dtype=torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    routes = case.routes
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Routed.run(case)
    del routes
    inputs = [*case.wanted, case.order_N, case.order_N, case.load_e]
    hidden = 16 * 10 * 4
    assert sum(kept.values()) == hidden + sum(tensor.untyped_storage().nbytes() for tensor in inputs)


def test_without_a_graph_nothing_is_kept() -> None:
    case = routed()
    arguments = (case.x_TD, case.up_eFD, case.down_eDF, *vars(case.routes).values(), case.load_e, "swiglu")
    with torch.no_grad():
        assert torch.equal(case.run(), torch.ops.moerouters.expert_mlp(*arguments, False)[0])
    assert torch.ops.moerouters.expert_mlp(*arguments, False)[1].numel() == 0


def test_empty_slots_take_no_room() -> None:
    """Routers that give a token any number of experts have a slot for each."""
    workspace.release()
    case = routed("nothing", tokens=300, num_experts=8, top_k=8)
    assert not case.run().any()
    gradients(case.run(), case.wanted)
    assert workspace.kept_bytes() < 300 * 8 * case.x_TD.shape[1]


def test_any_strides() -> None:
    case = routed(tokens=8)
    strided = Routed(
        case.x_TD.t().contiguous().t(),
        case.weights_TK.t().contiguous().t(),
        case.order_N,
        case.up_eFD.transpose(1, 2).contiguous().transpose(1, 2),
        case.down_eDF.transpose(1, 2).contiguous().transpose(1, 2),
        case.load_e,
        "swiglu",
    )
    assert not strided.x_TD.is_contiguous()
    expect_equal(strided.run(), case.run(), case.wanted)
    expected = case.run()
    once = torch.autograd.grad(expected.sum(), case.wanted, retain_graph=True)  # the gradient of a sum has strides 0
    again = torch.autograd.grad(expected, case.wanted, torch.ones_like(expected), retain_graph=True)
    for mine, right in zip(once, again, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_with_the_same_bits(use_reentrant: bool) -> None:
    case = routed(tokens=20, dtype=torch.float32)
    expected = gradients(case.run(), case.wanted)
    recomputed = checkpoint(lambda *_: case.run(), *case.wanted, use_reentrant=use_reentrant)
    (recomputed * slopes(recomputed)).sum().backward()
    for tensor, right in zip(case.wanted, expected, strict=True):
        assert torch.equal(tensor.grad, right)


def test_compiles_whole_with_the_same_bits() -> None:
    case = routed("holes", tokens=20, dtype=torch.float32)
    expected = case.run()
    compiled = torch.compile(Routed.run, fullgraph=True, backend="aot_eager")(case)
    assert torch.equal(compiled, expected)
    for mine, right in zip(gradients(compiled, case.wanted), gradients(expected, case.wanted), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("load", ["random", "nothing"])
def test_is_a_well_formed_operator(load: str) -> None:
    case = routed(load, tokens=5, dtype=torch.float32)
    weights = (case.x_TD, case.up_eFD, case.down_eDF)
    routes = vars(case.routes).values()
    torch.library.opcheck(torch.ops.moerouters.expert_mlp.default, (*weights, *routes, case.load_e, "swiglu", True))
    given = (case.x_TD, case.up_eFD[:, :5], case.down_eDF, None, None, None, case.load_e.clamp(max=1), "gelu", True)
    torch.library.opcheck(torch.ops.moerouters.expert_mlp.default, given)


def test_deterministic_mode_and_threads_change_no_bit() -> None:
    """Eight threads at once, each with forwards and backwards of its own; deterministic mode fills fresh memory."""
    cases = [routed(tokens=10 + index, dtype=torch.float32) for index in range(8)]
    expected = [[each.clone() for each in (case.run(), *gradients(case.run(), case.wanted))] for case in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            y_TD = cases[index].run()
            for mine, right in zip((y_TD, *gradients(y_TD, cases[index].wanted)), expected[index], strict=True):
                if not torch.equal(mine, right):
                    wrong.append(index)

    torch.use_deterministic_algorithms(True)
    try:
        run_together([lambda index=index: work(index) for index in range(8)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not wrong


def test_buffers_of_inference_serve_training() -> None:
    workspace.release()
    case = routed(dtype=torch.float32)
    with torch.inference_mode():
        inside = case.run()
    assert workspace.kept_bytes() > 0
    outside = case.run()
    assert torch.equal(inside, outside)
    gradients(outside, case.wanted)


def run_together(jobs: list[Callable[[], None]]) -> None:
    threads = [Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
