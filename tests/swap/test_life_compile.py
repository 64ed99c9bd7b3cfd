"""torch.compile takes a swapped model whole, and the compiled one computes, counts and learns what it does eagerly."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from moerouters import attach, swap

from .life import (
    LOUD,
    batch,
    expect_close,
    expect_same_bits,
    gradients,
    logits,
    routed_pairs,
    routers,
    sgd,
    tiny,
    train,
)


def slow(*case: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """A test's graphs end with it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def swapped(router: str, name: str, *, training: bool) -> PreTrainedModel:
    """One decoder layer: compiling takes its time for each."""
    model = tiny(name, train=training)
    model.model.layers = model.model.layers[-1:]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1
    model.config.use_cache = False
    swap(model, router, config=LOUD[router])
    return model


def compiled(model: nn.Module, backend: str, *, dynamic: bool | None = None) -> nn.Module:
    """Without a graph break, as the stock model compiles."""
    found: Any = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    assert isinstance(found, nn.Module)
    return found


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": each.router.get_buffer(key).clone()
        for name, each in routers(model).items()
        for key in each.router.state_names()
    }


@pytest.mark.parametrize(
    ("name", "router", "backend"),
    [
        ("qwen", "loss-free", "aot_eager"),
        slow("qwen", "topk", "aot_eager"),
        slow("qwen", "loss-controlled", "aot_eager"),
        slow("minimax", "loss-free", "aot_eager"),
        slow("deepseek", "bip", "inductor"),
        slow("qwen", "loss-free", "inductor"),
    ],
)
def test_a_compiled_model_trains_like_the_eager_one(name: str, router: str, backend: str) -> None:
    eager, other = (swapped(router, name, training=True) for _ in range(2))
    graph = compiled(other, backend)
    optimizers = [sgd(eager), sgd(other)]
    handles = [attach(optimizers[0], eager), attach(optimizers[1], graph)]
    first, second = batch(0, padding="right"), batch(1, padding="left")
    for model in (eager, graph):
        model(**first).loss.backward()
    expect_close(gradients(other), gradients(eager), 1e-4)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    for model, optimizer, handle in zip((eager, graph), optimizers, handles, strict=True):
        train(model, optimizer, [second])
        assert handle.steps == 2
        # Once each: neither when it was traced nor when its backward pass ran.
        assert {int(load_E.sum()) for load_E in handle.loads.values()} == {routed_pairs(second)}
    assert list(handles[0].loads) == list(handles[1].loads)
    expect_same_bits(handles[1].loads, handles[0].loads)
    expect_close(state(other), state(eager), 1e-5)


@pytest.mark.parametrize(
    ("name", "router", "backend"),
    [
        slow("qwen", "bip", "aot_eager"),
        slow("gpt-oss", "topk", "aot_eager"),
        slow("deepseek", "loss-free", "inductor"),
    ],
)
def test_a_compiled_model_evaluates_like_the_eager_one(name: str, router: str, backend: str) -> None:
    model = swapped(router, name, training=False)
    for each in routers(model).values():
        for key in each.router.state_names():
            each.router.get_buffer(key).copy_(torch.linspace(-0.3, 0.3, 8))
    graph = compiled(model, backend)
    inputs = batch(padding="right")
    torch.testing.assert_close(logits(graph, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)
    # What a router learns later is no constant of the graph.
    for each in routers(model).values():
        for key in each.router.state_names():
            each.router.get_buffer(key).neg_()
    later = logits(model, inputs)
    torch.testing.assert_close(logits(graph, inputs), later, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["loss-free", "loss-controlled"])
def test_compiled_layers_under_checkpointing_count_once(router: str) -> None:
    model = swapped(router, "qwen", training=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    graph = compiled(model, "aot_eager")
    optimizer = sgd(model)
    handle = attach(optimizer, graph)
    inputs = batch(padding="right")
    train(graph, optimizer, [inputs], handle=handle)
    assert {int(load_E.sum()) for load_E in handle.loads.values()} == {routed_pairs(inputs)}


@pytest.mark.slow
def test_batches_of_other_sizes_compile_to_the_same_graph() -> None:
    """A length of its own for every batch would otherwise recompile the model for each."""
    model = swapped("loss-free", "qwen", training=True)
    graph = compiled(model, "aot_eager", dynamic=True)
    optimizer = sgd(model)
    handle = attach(optimizer, graph)
    sizes = [(2, 12), (3, 9), (4, 15), (2, 7)]
    for number, (size, length) in enumerate(sizes):
        inputs = batch(number, padding="right", size=size, length=length)
        if number == 1:
            torch._dynamo.config.error_on_recompile = True
        try:
            train(graph, optimizer, [inputs])
        finally:
            torch._dynamo.config.error_on_recompile = False
        assert {int(load_E.sum()) for load_E in handle.loads.values()} == {routed_pairs(inputs)}
