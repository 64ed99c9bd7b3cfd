"""Exhibits: routers that nobody here wrote, seen by the suite - the stock router classes of Hugging Face transformers.

    python -m moerouters_conformance.exhibits docs/benchmarks/exhibits.json

A thin adapter makes each a `moerouters.Router`. It adds nothing: no padding mask, no load but the count of the ids that
the class returned. What a router does not know of, it fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.func import functional_call

from moerouters import Assignment, AssignmentKind, Capabilities, Gating, RouteContext, Router, RouterConfig, RouterSpec
from moerouters.errors import ConfigError, UnsupportedError
from moerouters.kernels.counts import count_experts
from moerouters.registry import API_VERSION
from moerouters_conformance.profile import Profile
from moerouters_conformance.report import Report
from moerouters_conformance.runner import check_router


@dataclass(frozen=True, kw_only=True)
class Stock:
    """One class of transformers, and how its config is made from our gating."""

    label: str
    module: str
    router: str
    config: str
    gating: Mapping[str, Any]
    """The settings that a gating has to have for this class; others are refused."""
    sizes: tuple[str, str]
    """Names of the config's fields for E and K."""
    extra: Callable[[Gating], Mapping[str, Any]] = lambda gating: {}

    def fits(self, gating: Gating) -> bool:
        """Whether the class computes just this gating."""
        settings = gating.settings.model_dump()
        free = {"num_experts", "top_k", "ties", "eps", *self.extra(gating)}
        wanted = Gating.softmax(1, 1).settings.model_dump() | dict(self.gating)
        groups = {"num_groups", "kept_groups", "group_score"} if "n_group" in self.extra(gating) else set()
        scale = {"scale"} if "routed_scaling_factor" in self.extra(gating) else set()
        if groups and gating.num_experts // gating.settings.num_groups < 2:
            return False  # DeepSeek-V3 scores a group by its best two
        if groups and gating.settings.num_groups > 1 and gating.settings.group_score == "max":
            return False
        return all(settings[name] == wanted[name] for name in settings if name not in free | groups | scale)

    def make(self, gating: Gating) -> nn.Module:
        """The stock router with the identity as its gate, so that hidden states are logits."""
        E, K = gating.num_experts, gating.top_k
        config_class = getattr(import_module(f"transformers.models.{self.module}"), self.config)
        router_class = getattr(import_module(f"transformers.models.{self.module}.modeling_{self.module}"), self.router)
        config = config_class(hidden_size=E, **dict(zip(self.sizes, (E, K), strict=True)), **self.extra(gating))
        made: nn.Module = router_class(config)
        # Buffers and not parameters: the gate belongs to the model, and a balancer trains nothing of it.
        for name, parameter in list(made.named_parameters()):
            delattr(made, name)
            fixed = torch.eye(E) if parameter.dim() == 2 else torch.zeros(E)
            made.register_buffer(name, fixed, persistent=False)
        return made


def _deepseek(gating: Gating) -> dict[str, Any]:
    s = gating.settings
    return {
        "n_group": s.num_groups,
        "topk_group": s.kept_groups,
        "norm_topk_prob": s.renormalize,
        "routed_scaling_factor": s.scale,
    }


_SOFTMAX = {"score": "softmax", "renormalize": True}
_AFTER = {"score": "identity", "softmax_after_topk": True, "renormalize": False}
_EXPERTS = ("num_experts", "num_experts_per_tok")
_LOCAL = ("num_local_experts", "num_experts_per_tok")

STOCK = (
    Stock(
        label="Mixtral", module="mixtral", router="MixtralTopKRouter", config="MixtralConfig", gating=_SOFTMAX,
        sizes=_LOCAL,
    ),
    Stock(
        label="Qwen3-MoE", module="qwen3_moe", router="Qwen3MoeTopKRouter", config="Qwen3MoeConfig", gating=_SOFTMAX,
        sizes=_EXPERTS, extra=lambda gating: {"norm_topk_prob": True},
    ),
    Stock(
        label="OLMoE", module="olmoe", router="OlmoeTopKRouter", config="OlmoeConfig",
        gating={"score": "softmax", "renormalize": False}, sizes=_EXPERTS,
    ),
    Stock(
        label="DeepSeek-V3", module="deepseek_v3", router="DeepseekV3TopkRouter", config="DeepseekV3Config",
        gating={"score": "sigmoid", "correction_bias": True}, sizes=_LOCAL, extra=_deepseek,
    ),
    Stock(
        label="GPT-OSS", module="gpt_oss", router="GptOssTopKRouter", config="GptOssConfig", gating=_AFTER,
        sizes=_LOCAL,
    ),
    Stock(
        label="Granite-MoE", module="granitemoe", router="GraniteMoeTopKRouter", config="GraniteMoeConfig",
        gating=_AFTER, sizes=_LOCAL,
    ),
)  # fmt: skip


EXPLANATIONS: dict[str, str] = {
    "C07": "The class returns no counts, so a row with NaN is a token like any other and nobody is told.",
    "C16": "Weights are handed out in the dtype of the logits: bfloat16 rounds them to 8 bits.",
    "C19": "There is no way to hand ids in: replay and recompute route anew.",
    "W09": "torch.topk orders equal scores as it likes, which depends on device and shape.",
    "P01": "No padding mask reaches the router; padding is routed, and its experts run.",
    "P02": "Padding takes part in everything that is counted, so what it holds matters.",
    "P03": "As P02: each row of padding is a token more.",
    "P04": "As P02, wherever padding stands.",
    "P06": "The weights of padding are differentiated like any others.",
    "P07": "NaN in padding comes back from the score function as NaN in the gate's gradient.",
    "P08": "As P02, where T equals E or K.",
}
"""Why a rule fails on stock routers, by its id; the page that shows the table needs one for each that does."""

LARGEST = 4096
"""Experts of a stock router here: its gate is a square matrix."""


class StockRouter(Router):
    """A stock router behind the interface of ours."""

    stock: ClassVar[Stock]
    capabilities = Capabilities(dtypes=frozenset({"float32", "bfloat16", "float16"}))

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        if not self.stock.fits(gating):
            raise ConfigError(
                f"{self.stock.label} computes another gating.",
                where=repr(gating.settings),
                why="a stock router has one gating, that of its model",
                fix=f"a gating with {dict(self.stock.gating)}",
            )
        if gating.num_experts > LARGEST:
            raise UnsupportedError(f"the identity as a gate of {gating.num_experts} experts does not fit in memory.")
        super().__init__(gating)
        self.config = config
        self.module = self.stock.make(gating)

    def reset_state(self) -> None:
        """Also puts the identity back, which is lost on the meta device."""
        super().reset_state()
        for name, value in self.stock.make(self.gating).named_buffers():
            self.module.get_buffer(name).copy_(value)

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        self._check_dtype(raw_TE)
        tensors = {name: value.to(raw_TE.dtype) for name, value in self.module.named_buffers()}
        if self.gating.settings.correction_bias:
            tensors["e_score_correction_bias"] = self.gating.correction_bias_E
        _, weights, expert_ids = functional_call(self.module, tensors, (raw_TE,))
        E = self.gating.num_experts
        return Assignment(
            kind=AssignmentKind.SLOTS,
            num_tokens=raw_TE.shape[0],
            num_experts=E,
            expert_ids=expert_ids,
            weights=weights,
            load_E=count_experts(expert_ids, E),
            tokens=torch.full((), raw_TE.shape[0], device=raw_TE.device),
            nonfinite=torch.zeros((), dtype=torch.int64, device=raw_TE.device),
        )


_ADAPTERS = {
    stock.label: type(f"{stock.router}Adapter", (StockRouter,), {"stock": stock, "__module__": __name__})
    for stock in STOCK
}
globals().update({adapter.__name__: adapter for adapter in _ADAPTERS.values()})  # pickle finds a class by its name


def spec_of(stock: Stock) -> RouterSpec:
    """A spec for the adapter around one class."""
    return RouterSpec(
        name=f"stock-{stock.module}".replace("_", "-"),
        api=API_VERSION,
        summary=f"{stock.router} of transformers.",
        factory=_ADAPTERS[stock.label],
        capabilities=StockRouter.capabilities,
    )


class Exhibition(BaseModel):
    """What is committed: one report per class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transformers: str
    reports: dict[str, Report]


def exhibit(profile: str | Profile = "default") -> Exhibition:
    """Run the suite on every stock class."""
    reports = {stock.label: check_router(spec_of(stock), profile=profile, keep_going=True) for stock in STOCK}
    return Exhibition(transformers=version("transformers"), reports=reports)


def main() -> None:
    """Write the reports to the file that is named."""
    parser = argparse.ArgumentParser(prog="python -m moerouters_conformance.exhibits")
    parser.add_argument("json", type=Path)
    options = parser.parse_args()
    options.json.write_text(exhibit().model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
