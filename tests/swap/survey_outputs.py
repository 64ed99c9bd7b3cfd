"""What the survey asks of a model, stock or swapped: forwards and generation, and how their outputs are compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .zoo import TEXT_TOKENS, supports_loss, tiny_inputs

Outputs = dict[str, Tensor]
"""All tensors of an output, by their place in it."""
Outcome = Outputs | Exception


class Wrong(Exception):
    """A promise that was not kept."""


class NotApplicable(Exception):
    """The stock model cannot do it either."""


def outcome(run: Callable[[PreTrainedModel], Outputs], model: PreTrainedModel) -> Outcome:
    """What a stock model gives, or how it fails without us."""
    try:
        return run(model)
    except NotApplicable as reason:
        return reason
    except Exception as error:
        return NotApplicable(f"the stock model fails: {type(error).__name__}: {error}")


def observe(model: PreTrainedModel, inputs: Mapping[str, Any], **asked: bool) -> Outputs:
    """One forward without gradients."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        asked["use_cache"] = False
    with torch.no_grad():
        return dict(tensors_in(model(**inputs, **asked)))


def everything(model: PreTrainedModel) -> Outputs:
    """One forward with all optional outputs that the model can be asked for, and with labels."""
    parameters = inspect.signature(model.forward).parameters
    recorded = {name for module in model.modules() for name in getattr(module, "_can_record_outputs", None) or ()}
    asked = {"output_hidden_states": "hidden_states", "output_router_logits": "router_logits"}
    chosen = {name: True for name, record in asked.items() if name in parameters or record in recorded}
    return observe(model, labelled(model), **chosen)


def in_training_mode(model: PreTrainedModel, *, seed: int = 0) -> Outputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        try:
            return observe(model, labelled(model))
        finally:
            model.eval()  # type: ignore[no-untyped-call]


def generate(model: PreTrainedModel) -> Outputs:
    """Four tokens, greedy and with a cache, after prompts of which one is padded on the left."""
    if not model.can_generate():
        raise NotApplicable(f"{type(model).__name__} has no generate")
    run: Any = model.generate
    inputs = {
        name: value.flip(1) if name in ("input_ids", "attention_mask") else value
        for name, value in tiny_inputs(model, padding=True).items()
    }
    length = {"min_new_tokens": 4, "max_new_tokens": 4}
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    made = run(**inputs, do_sample=False, use_cache=True, **length, **wanted)
    return dict(tensors_in({"tokens": made.sequences, "logits": made.logits}))


RUNS: dict[str, Callable[[PreTrainedModel], Outputs]] = {
    "plain": lambda model: observe(model, labelled(model)),
    "full": everything,
    "training": in_training_mode,
    "training again": lambda model: in_training_mode(model, seed=1),
    "tokens": generate,
}


def tensors_in(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, Mapping | list | tuple):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from tensors_in(each, f"{place}.{key}" if place else str(key))


def expect_stock(stock: Mapping[str, Outcome], name: str, run: Callable[[], Outputs]) -> None:
    expect_same_bits(given(stock[name]), run(), "swapped")


def given(expected: Outcome) -> Outputs:
    if isinstance(expected, Exception):
        raise expected
    return expected


def expect_same_bits(want: Outputs, have: Outputs, when: str) -> None:
    if list(want) != list(have):
        raise Wrong(f"{when}, outputs are {', '.join(have)}; stock: {', '.join(want)}")
    different = [name for name in want if not same_bits(want[name], have[name])]
    if different:
        raise Wrong(f"{when}, {len(different)} of {len(want)} outputs differ: {', '.join(different)}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Stricter than torch.equal, for which 0 is -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def reaching(router: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """bool [B, S]: the tokens that reach the router of that name. Ernie 4.5 VL has one for text and one for images."""
    kinds_BS = inputs.get("moe_mm_token_type_ids")
    if kinds_BS is None:
        return torch.ones_like(inputs["attention_mask"], dtype=torch.bool)
    return kinds_BS != 0 if "vision_moe" in router else kinds_BS == 0


def labelled(model: PreTrainedModel) -> dict[str, Tensor]:
    """A padded batch, with labels where the model makes a loss of them."""
    inputs = tiny_inputs(model, padding=True)
    if model.config.is_encoder_decoder:
        inputs["decoder_attention_mask"] = inputs["attention_mask"]
    if not supports_loss(model):
        return inputs
    mask = inputs["attention_mask"]
    labels = torch.randint(*TEXT_TOKENS, mask.shape, generator=torch.Generator().manual_seed(2))
    return {**inputs, "labels": labels.masked_fill(mask == 0, -100)}
