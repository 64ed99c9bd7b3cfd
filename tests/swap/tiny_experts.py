"""Experts modules of transformers, one of each form, and what they are fed."""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .zoo_configs import EXPERTS, shrunk

WIDTH = 32


class Family(NamedTuple):
    architecture: str
    experts: str
    config: str


FAMILIES = {
    "plain": Family("mixtral", "MixtralExperts", "MixtralConfig"),
    "clamped gate": Family("deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config"),
    "transposed": Family("aria", "AriaExperts", "AriaTextConfig"),
    "biases": Family("openai_privacy_filter", "OpenAIPrivacyFilterExperts", "OpenAIPrivacyFilterConfig"),
    "interleaved": Family("gpt_oss", "GptOssExperts", "GptOssConfig"),
    "no gate": Family("nemotron_h", "NemotronHExperts", "NemotronHConfig"),
    "norm after": Family("muse_spark", "MuseSparkExperts", "MuseSparkTextConfig"),
}


def experts_of(family: str, implementation: str, dtype: torch.dtype = torch.float64) -> Any:
    """All experts of a tiny model, with the same weights whenever it is called."""
    architecture, experts, config = FAMILIES[family]
    module = import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    configs = import_module(f"transformers.models.{architecture}.configuration_{architecture}")
    sizes = {"moe_hidden_size": WIDTH} if family == "norm after" else {}
    settings = shrunk(getattr(configs, config), sizes)
    settings._experts_implementation = implementation
    made = getattr(module, experts)(settings).to(dtype)
    assert made.num_experts == EXPERTS
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return made


def fed(num_tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """[T, D], ids [T, 3] of which every fifth is of no expert, weights [T, 3]; the first and the last are leaves."""
    random = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, WIDTH, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    ids_TK = torch.rand(num_tokens, EXPERTS, generator=random).topk(3, dim=-1).indices
    ids_TK = ids_TK.reshape(-1).index_fill(0, torch.arange(0, 3 * num_tokens, 5), EXPERTS).reshape(num_tokens, 3)
    weights_TK = torch.rand(num_tokens, 3, generator=random, dtype=torch.float64).to(dtype)
    return x_TD, ids_TK, weights_TK.masked_fill(ids_TK == EXPERTS, 0).requires_grad_()


def by_transformers(experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Its own loop over experts, which in some classes knows no empty slots."""
    empty_TK = ids_TK == EXPERTS
    y_TD: Tensor = experts(x_TD, ids_TK.masked_fill(empty_TK, 0), weights_TK.masked_fill(empty_TK, 0))
    return y_TD


def pull_of(y_TD: Tensor) -> Tensor:
    """What the output is multiplied with to give a loss."""
    return torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).reshape(y_TD.shape)
