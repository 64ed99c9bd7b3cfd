"""The zoo: every router class of the installed transformers is found, and all but the unbuildable ones run."""

import pytest
import torch
from torch import Tensor, nn

from .zoo import (
    NO_ROUTERS,
    TEXT_TOKENS,
    UNBUILDABLE,
    RouterClass,
    router_classes,
    supports_loss,
    tiny_inputs,
    tiny_model,
)
from .zoo_configs import OVERRIDES

each_router = pytest.mark.parametrize(
    "router", [router for router in router_classes() if router.name not in UNBUILDABLE], ids=str
)


def first_tensor(output: object) -> Tensor:
    """Logits, or what a model without a head returns first."""
    found = output[0]  # type: ignore[index]
    assert isinstance(found, Tensor)
    return found


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    return all(
        name == other_name and torch.equal(tensor, other_tensor)
        for (name, tensor), (other_name, other_tensor) in zip(
            [*one.named_parameters(), *one.named_buffers()],
            [*other.named_parameters(), *other.named_buffers()],
            strict=True,
        )
    )


def test_finds_the_routers_of_the_installed_release() -> None:
    found = router_classes()
    assert len(found) >= 75
    assert len({router.name for router in found}) == len(found)
    # Recorded; recorded with a bare name; beside decorated experts only; recorded in a list.
    assert {"Qwen3MoeTopKRouter", "Llama4Router", "DeepseekV4HashRouter", "JetMoeTopKGating"} <= {
        router.name for router in found
    }


def test_exceptions_are_about_classes_that_exist() -> None:
    names = {router.name for router in router_classes()}
    assert names >= UNBUILDABLE.keys()
    assert not names & NO_ROUTERS.keys()
    assert OVERRIDES.keys() <= names | {router.architecture for router in router_classes()}


@pytest.mark.parametrize("router", [router for router in router_classes() if router.name in UNBUILDABLE], ids=str)
def test_unbuildable_routers_are_modules_all_the_same(router: RouterClass) -> None:
    assert issubclass(router.load(), nn.Module)


@each_router
def test_the_router_runs(router: RouterClass) -> None:
    model = tiny_model(router)
    seen = []
    for module in model.modules():
        if isinstance(module, router.load()):
            module.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0])))
    for padding in (False, True):
        with torch.no_grad():
            assert first_tensor(model(**tiny_inputs(model, padding=padding))).isfinite().all()
    assert seen
    assert all(hidden.shape[:-1].numel() > 1 for _, hidden in seen)
    for module, _ in seen:
        gates = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        assert gates and all(gate.std() > 0.01 for gate in gates)


@each_router
def test_a_model_is_a_function_of_its_seed(router: RouterClass) -> None:
    state = torch.random.get_rng_state()
    model = tiny_model(router)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    assert same_bits(model, tiny_model(router))


@each_router
def test_a_loss_reaches_the_router(router: RouterClass) -> None:
    model = tiny_model(router)
    if not supports_loss(model):
        assert router.name in {"DiffusionGemmaTextRouter", "Dots3NoteVisionTopKRouter"}
        return
    inputs = tiny_inputs(model)
    shape = inputs["attention_mask"].shape
    labels = torch.randint(*TEXT_TOKENS, shape, generator=torch.Generator().manual_seed(2))
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    grads = [
        parameter.grad
        for module in model.modules()
        if isinstance(module, router.load())
        for parameter in module.parameters()
        if parameter.grad is not None
    ]
    assert grads and all(grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)


@pytest.mark.parametrize("router", [RouterClass("HunYuanMoEV1Gate", "hunyuan_v1_moe")], ids=str)
def test_bfloat16_keeps_what_the_class_makes_in_float32(router: RouterClass) -> None:
    model = tiny_model(router, dtype=torch.bfloat16)
    dtypes = {name.rpartition(".mlp.")[2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert (dtypes["gate.wg.weight"], dtypes["experts.down_proj"]) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        assert first_tensor(model(**tiny_inputs(model))).isfinite().all()
