"""`moerouters bench layer`: implementations compute the same, pass gradients on, and are told from others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moerouters.bench import peers
from moerouters.bench.case import Request, Unavailable
from moerouters.bench.dense import DenseMLP, gemm_run
from moerouters.bench.gpu_peers import GPU_PEERS
from moerouters.bench.layer import BOTH, FORWARD, MAKERS, LayerCase, expect_agreement, layer_cases
from moerouters.bench.shapes import Shape, growing
from moerouters.bench.weights import Weights, make_weights, normal, plain_layer

SHAPE = Shape(name="s", T=40, D=16, E=4, K=2, F=8, layers=2)
HERE = [name for name in MAKERS if name not in GPU_PEERS]
CPU = torch.device("cpu")


def request_of(**options: object) -> Request:
    return Request.model_validate({"subject": "layer", "shapes": (SHAPE,), "threads": 1, **options})


@pytest.fixture
def weights() -> Iterator[Weights]:
    yield make_weights(SHAPE, device=CPU, dtype=torch.float32)[0]


@pytest.mark.parametrize("name", HERE)
def test_outputs_and_gradients_agree(name: str, weights: Weights) -> None:
    x_TD = normal(SHAPE.T, SHAPE.D, device=CPU)
    grads = []
    for layer in (lambda x: plain_layer(weights, x, top_k=SHAPE.K), MAKERS[name](SHAPE, weights)):
        leaf_TD = x_TD.clone().requires_grad_()
        y_TD = layer(leaf_TD)
        y_TD.square().sum().backward()
        found: list[Tensor | None] = [y_TD.detach(), leaf_TD.grad, *(p.grad for p in weights.parameters())]
        grads.append(found)
        for parameter in weights.parameters():
            parameter.grad = None
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_implementation_that_computes_something_else_is_no_peer(weights: Weights) -> None:
    right = peers.grouped_mm_layer(SHAPE, weights)
    expect_agreement(right, weights, SHAPE)
    with pytest.raises(Unavailable, match="32 of 32 tokens differ"):
        expect_agreement(lambda x_TD: 1.001 * right(x_TD), weights, SHAPE)
    with pytest.raises(Unavailable, match="32 of 32"):
        expect_agreement(lambda x_TD: right(x_TD) * float("nan"), weights, SHAPE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cases_run_and_leave_no_gradients(dtype: str) -> None:
    for case in layer_cases(request_of(dtype=dtype)):
        for name in ("gemm", "dense_rows", "dense_wide", "moerouters"):
            run = case.builds()[name]()
            run()
            run()
        assert isinstance(case, LayerCase)
        assert all(p.grad is None for weights in case._weights for p in weights.parameters())


def test_stacked_layers_are_all_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is called once in forward, before any backward reaches the last."""
    calls: list[str] = []

    def counting(shape: Shape, weights: Weights) -> peers.Layer:
        def layer(x_TD: Tensor) -> Tensor:
            calls.append("forward")
            y_TD = plain_layer(weights, x_TD, top_k=shape.K)
            if y_TD.requires_grad:
                y_TD.register_hook(lambda grad: calls.append("backward"))
            return y_TD

        return layer

    monkeypatch.setitem(MAKERS, "grouped_mm", counting)
    run = LayerCase(request_of(), SHAPE, BOTH).builds()["grouped_mm"]()
    calls.clear()
    run()
    assert calls == ["forward"] * 2 + ["backward"] * 2


def test_baselines_have_the_flops_of_the_experts() -> None:
    """Counted by torch: GEMMs alone, both dense MLPs, and our layer less its gate."""
    from torch.utils.flop_counter import FlopCounterMode

    expected = 6 * SHAPE.N * SHAPE.D * SHAPE.F * SHAPE.layers * 3
    case = LayerCase(request_of(), SHAPE, BOTH)
    for name in ("gemm", "dense_rows", "dense_wide"):
        run = case.builds()[name]()
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == expected
    assert case.values("gemm", 1.0) == {"tflops": expected / 1e12}
    assert LayerCase(request_of(), SHAPE, FORWARD).values("gemm", 1.0) == {"tflops": expected / 3e12}


def test_the_dense_mlp_is_the_faster_of_two() -> None:
    case = LayerCase(request_of(), SHAPE, BOTH)
    samples = {"gemm": [1.0], "dense_rows": [3.0], "dense_wide": [2.0], "moerouters": [4.0]}
    over = case.over("moerouters", samples)
    assert over["dense_mlp"].value == 2.0
    assert over["gemm"].value == 4.0


def test_a_library_that_breaks_is_skipped_and_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(shape: Shape, weights: Weights) -> peers.Layer:
        raise RuntimeError("no kernel image\nand more")

    case = LayerCase(request_of(), SHAPE, BOTH)
    monkeypatch.setitem(MAKERS, "scattermoe", broken)
    with pytest.raises(Unavailable, match=r"RuntimeError: no kernel image$"):
        case.builds()["scattermoe"]()
    monkeypatch.setitem(MAKERS, "moerouters", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        case.builds()["moerouters"]()


def test_growing_series_time_the_step_alone() -> None:
    shapes = growing("E", device="cpu", most=16)
    assert [(shape.E, shape.grows) for shape in shapes] == [(8, "E"), (16, "E")]
    assert [case.passes for case in layer_cases(request_of(shapes=shapes))] == [BOTH, BOTH]


def test_what_is_not_installed_says_so(weights: Weights) -> None:
    for make in GPU_PEERS.values():
        with pytest.raises(Unavailable, match="not installed"):
            make(SHAPE, weights)


def test_a_weight_per_pair_is_too_much(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MOST_COPIES_GIB", 1e-6)
    with pytest.raises(Unavailable, match="GiB of weights"):
        peers.transformers_layer("batched_mm", SHAPE, weights)


def test_dense_baselines_on_their_own() -> None:
    mlp = DenseMLP(4, 8, device=CPU, dtype=torch.float32)
    x = normal(3, 4, device=CPU)
    gate, up, down = mlp.gate.weight, mlp.up.weight, mlp.down.weight
    torch.testing.assert_close(mlp(x), torch.nn.functional.silu(x @ gate.t()) * (x @ up.t()) @ down.t())
    gemm_run(SHAPE, device=CPU, dtype=torch.float32, backward=False)()
