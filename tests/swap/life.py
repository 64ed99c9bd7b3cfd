"""Tiny models with swapped routers, the batches they see, and the steps of training them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moerouters import Handle
from moerouters.swapping.module import SwappedRouter

from .zoo import TEXT_TOKENS, RouterClass, tiny_model
from .zoo_configs import CHOSEN

MODELS = {
    "ernie": RouterClass("Ernie4_5_MoeTopKRouter", "ernie4_5_moe"),
    "deepseek": RouterClass("DeepseekV3TopkRouter", "deepseek_v3"),
    "gpt-oss": RouterClass("GptOssTopKRouter", "gpt_oss"),
    "minimax": RouterClass("MiniMaxM2TopKRouter", "minimax_m2"),
    "mixtral": RouterClass("MixtralTopKRouter", "mixtral"),
    "olmoe": RouterClass("OlmoeTopKRouter", "olmoe"),
    "qwen": RouterClass("Qwen3MoeTopKRouter", "qwen3_moe"),
}
Padding = Literal["left", "right", ""]
CHECKPOINTING = ("none", "non-reentrant", "reentrant")
LOUD: dict[str, Mapping[str, Any]] = {
    "topk": {},
    "loss-free": {"rate": 0.05},
    "loss-controlled": {"alpha": 0.1},
    "bip": {},
}
"""Configs under which three steps of training change what a tiny model chooses."""


def tiny(name: str, *, seed: int = 0, train: bool = False, checkpointing: str = "none") -> PreTrainedModel:
    """A random model of MODELS in float32."""
    model = tiny_model(MODELS[name], seed=seed)
    return prepared(model, train=train, checkpointing=checkpointing)


def prepared(model: PreTrainedModel, *, train: bool = True, checkpointing: str = "none") -> PreTrainedModel:
    model.train(train)
    if checkpointing != "none":
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model


def batch(seed: int = 1, *, padding: Padding = "", size: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Token ids, mask and labels; a third of the last row is padding, which no label counts."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(*TEXT_TOKENS, (size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padding:
        places = slice(None, length // 3) if padding == "left" else slice(length - length // 3, None)
        attention_mask[-1, places] = 0
        input_ids[-1, places] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def routed_pairs(*batches: Mapping[str, Tensor]) -> int:
    """(token, expert) pairs of one layer: every valid token has its experts once."""
    return CHOSEN * sum(int(each["attention_mask"].sum()) for each in batches)


def routers(model: nn.Module) -> dict[str, SwappedRouter]:
    """Swapped routers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SwappedRouter)}


def gates(model: nn.Module, name: str = "qwen") -> dict[str, nn.Module]:
    """Router modules by name, swapped or not."""
    kind = MODELS[name].load()
    return {where: module for where, module in model.named_modules() if isinstance(module, kind)}


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model after a cast of all that follows casts."""
    nn.Module.to(model, dtype)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that there are; the routers of a model without a gradient are missing."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that a checkpoint holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def expect_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


def expect_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of the largest value in its counterpart."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value.double(),
            other[name].double(),
            rtol=0,
            atol=tolerance * max(float(other[name].abs().max()), 1e-3),
            msg=partial("{}: {}".format, name),
        )


def logits(model: nn.Module, inputs: Mapping[str, Tensor], **more: Any) -> Tensor:
    """Logits of the model as it is, without labels."""
    with torch.no_grad():
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **more).logits
    assert isinstance(found, Tensor)
    return found


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    handle: Handle | None = None,
    accumulation_steps: int = 1,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """An optimizer step for every `accumulation_steps` batches; the losses."""
    losses: list[float] = []
    for number, each in enumerate(batches, start=1):
        if handle is not None:
            handle.scale_losses(accumulation_steps=accumulation_steps)
        loss = model(**each).loss
        losses.append(loss.item())
        (loss / accumulation_steps).backward()
        if number % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
            after_step()
    return losses


def hooks(model: nn.Module) -> dict[str, Sequence[int]]:
    """How many hooks of each kind every module has."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_backward_hooks")
    return {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}


def learned(model: nn.Module) -> dict[str, Tensor]:
    """What ranks must agree on beside the weights: state of routers, and correction biases."""
    found = {
        f"{name}.{key}": each.router.get_buffer(key).clone()
        for name, each in routers(model).items()
        for key in each.router.state_names()
    }
    return found | {name: buffer.clone() for name, buffer in model.named_buffers() if "correction_bias" in name}
