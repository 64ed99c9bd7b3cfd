"""experts_implementation="moerouters" against transformers' loop over experts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moerouters.hf  # noqa: F401  (registers it)
from moerouters.errors import UnsupportedError
from moerouters.hf_experts import expert_rows

from .life import MODELS, batch
from .tiny_experts import FAMILIES, WIDTH, by_transformers, experts_of, fed, pull_of
from .zoo import tiny_model

IN_FLOAT32 = ("biases", "norm after")
"""Families whose own loop, or norm, casts to float32."""
each_family = pytest.mark.parametrize("family", FAMILIES)


def stepped(experts: Any, forward: Any, num_tokens: int) -> dict[str, Tensor]:
    """Output and all gradients."""
    x_TD, ids_TK, weights_TK = fed(num_tokens, seed=1)
    y_TD = forward(x_TD, ids_TK, weights_TK)
    (y_TD * pull_of(y_TD)).sum().backward()
    assert x_TD.grad is not None and weights_TK.grad is not None
    gradients = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    return {"y": y_TD.detach(), "x": x_TD.grad, "weights": weights_TK.grad, **gradients}


@each_family
def test_output_and_gradients_are_those_of_transformers(family: str) -> None:
    ours, theirs = experts_of(family, "moerouters"), experts_of(family, "eager")
    found = stepped(ours, ours, 9)
    expected = stepped(theirs, lambda *given: by_transformers(theirs, *given), 9)
    assert found.keys() == expected.keys() and len(found) >= 5
    limit = 1e-5 if family in IN_FLOAT32 else 1e-10
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=limit, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )


@each_family
def test_no_tokens(family: str) -> None:
    experts = experts_of(family, "moerouters")
    found = stepped(experts, experts, 0)
    assert found["y"].shape == (0, WIDTH)
    assert not found["down_proj"].any()


@each_family
def test_rows_of_no_expert_give_zeros_whatever_they_hold(family: str) -> None:
    experts = experts_of(family, "moerouters")
    x_RD = torch.full((6, WIDTH), torch.nan, dtype=torch.float64)
    x_RD[:4] = 1
    load_e = torch.tensor([1, 0, 3, 0, 0, 0, 0, 0])
    y_RD = expert_rows(experts, x_RD.requires_grad_(), load_e)
    assert y_RD[:4].isfinite().all() and y_RD[:4].any()
    assert torch.equal(y_RD[4:], torch.zeros(2, WIDTH, dtype=torch.float64))
    y_RD.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in experts.parameters())
    assert x_RD.grad is not None and not x_RD.grad[4:].any()


@pytest.mark.parametrize("name", ["qwen", "deepseek", "gpt-oss"])
def test_a_model_computes_the_same(name: str) -> None:
    model = tiny_model(MODELS[name])
    inputs = batch()
    losses = []
    for implementation in ("eager", "moerouters"):
        model.set_experts_implementation(implementation)
        losses.append(model(**inputs).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)


def test_autocast_computes_in_its_dtype() -> None:
    experts = experts_of("interleaved", "moerouters", torch.float32)
    x_TD, ids_TK, weights_TK = fed(9, seed=1, dtype=torch.float32)
    exact = experts(x_TD, ids_TK, weights_TK)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = experts(x_TD, ids_TK, weights_TK)
    assert y_TD.dtype == torch.float32
    assert not torch.equal(y_TD, exact)
    torch.testing.assert_close(y_TD, exact, rtol=0.05, atol=0.05 * float(exact.detach().abs().max()))


def test_weights_that_are_no_plain_stacks_are_refused() -> None:
    experts = experts_of("plain", "moerouters", torch.float32)
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.int8), requires_grad=False)
    with pytest.raises(
        UnsupportedError, match=r"`down_proj` is torch.int8 of shape \[8, 32, \d+\](.|\n)*MixtralExperts"
    ):
        experts(*fed(4, seed=1, dtype=torch.float32))
