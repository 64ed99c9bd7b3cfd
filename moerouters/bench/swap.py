"""What a swapped router costs: alone and within its block, against the stock one, on a Qwen3-MoE layer."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from moerouters.bench.timing import Timing, interleaved
from moerouters.swapping import swap
from moerouters.swapping.guards import need_transformers

STOCK = "stock"


class Setting(BaseModel):
    """One row of the table: what runs, on how many tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    """`router` or `block`."""
    mode: str
    """`eval`: forward without gradients. `train`: forward that counts loads and keeps what a backward needs."""
    tokens: int
    limit: float | None
    """What the ratio should not pass, in eval."""


SETTINGS = (
    Setting(part="router", mode="eval", tokens=4096, limit=1.1),
    Setting(part="router", mode="eval", tokens=1, limit=1.5),
    Setting(part="block", mode="eval", tokens=4096, limit=1.02),
    Setting(part="router", mode="train", tokens=4096, limit=None),
    Setting(part="block", mode="train", tokens=4096, limit=None),
)


class SwapBench(BaseModel):
    """What `moerouters bench swap` writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["moerouters.bench.swap/1"] = Field(alias="schema")
    machine: str
    torch: str
    transformers: str
    sizes: dict[str, int]
    rows: list[tuple[Setting, dict[str, Timing]]]


def bench_swap(
    routers: Sequence[str],
    *,
    device: torch.device,
    rounds: int = 31,
    sizes: dict[str, int] | None = None,
    threads: int | None = 1,
) -> SwapBench:
    """Time the stock router and each of `routers`; sizes: D, E, K, F (width of an expert)."""
    with need_transformers():
        import transformers

    if threads is not None:
        torch.set_num_threads(threads)
    sizes = {"D": 512, "E": 64, "K": 8, "F": 256} | (sizes or {})
    layers = {STOCK: _layer(sizes, device)}
    for name in routers:
        layers[name] = _layer(sizes, device)
        swap(layers[name], name)
    rows = []
    for setting in SETTINGS:
        generator = torch.Generator().manual_seed(0)
        x_BSD = torch.randn(1, setting.tokens, sizes["D"], generator=generator).to(device)
        candidates = {name: _call(layer, setting, x_BSD) for name, layer in layers.items()}
        rows.append((setting, interleaved(candidates, peer=STOCK, device=device, rounds=rounds)))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return SwapBench(
        schema="moerouters.bench.swap/1",
        machine=where,
        torch=torch.__version__,
        transformers=transformers.__version__,
        sizes=sizes,
        rows=rows,
    )


def _layer(sizes: dict[str, int], device: torch.device) -> nn.Module:
    """A Qwen3-MoE model of one layer with random weights, the same each time."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": sizes["D"], "num_experts": sizes["E"], "num_experts_per_tok": sizes["K"],
        "moe_intermediate_size": sizes["F"], "num_hidden_layers": 1, "num_attention_heads": 8, "norm_topk_prob": True,
        "num_key_value_heads": 8, "head_dim": max(sizes["D"] // 8, 1),
    }  # fmt: skip
    model: nn.Module = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    return model.to(device)


def _call(model: Any, setting: Setting, x_BSD: Tensor) -> Callable[[], object]:
    model.train(setting.mode == "train")
    block = model.model.layers[0].mlp
    part = block.gate if setting.part == "router" else block

    def run() -> object:
        # The mode is set anew: another setting of the same layer may have changed it.
        with torch.set_grad_enabled(setting.mode == "train"):
            return part(x_BSD)

    return run
