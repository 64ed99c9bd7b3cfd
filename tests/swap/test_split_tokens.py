"""Layers that split their tokens between routers (Ernie 4.5 VL: text, images): each router knows which are its own.

Which tokens a router has got is told by their hidden states, so nothing here relies on how the Batch finds out.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moerouters import RouteContext, attach, record, replay, swap, unswap
from moerouters.errors import TraceError
from moerouters.swapping.batch import Batch

from .life import (
    CHECKPOINTING,
    LOUD,
    Padding,
    batch,
    expect_close,
    expect_same_bits,
    gradients,
    logits,
    prepared,
    routers,
    sgd,
)
from .zoo import TEXT_TOKENS, RouterClass, tiny_model
from .zoo_configs import CHOSEN

ERNIE = RouterClass("Ernie4_5_VLMoeMoeTopKRouter", "ernie4_5_vl_moe")
MIXED = [
    [0, 1, 1, 0, 0, 0, 2, 2, 2, 1, 0, 0],
    [0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 2],
]
"""Not as many images in one sequence as in the other, at its start and end too: 6 + 8 text tokens."""
SEQUENCE = {"alpha": 0.1, "sequence_alpha": 0.1}
"""loss-controlled with a loss per sequence, which needs to know them."""

each_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING)


def swapped(router: str, *, config: Mapping[str, Any] | None = None, checkpointing: str = "none") -> PreTrainedModel:
    """In training mode; both sparse layers have a router for text and one for images."""
    model = prepared(tiny_model(ERNIE), checkpointing=checkpointing)
    swap(model, router, config=LOUD[router] if config is None else config)
    return model


def mixed(padding: Padding = "", *, kinds: object = MIXED) -> dict[str, Tensor]:
    """No token stands twice, not even in padding, so that every one has hidden states of its own."""
    kinds_BS = torch.tensor(kinds, dtype=torch.int32)
    input_ids = torch.arange(TEXT_TOKENS[0], TEXT_TOKENS[0] + kinds_BS.numel()).reshape(kinds_BS.shape)
    return batch(padding=padding) | {"input_ids": input_ids, "moe_mm_token_type_ids": kinds_BS}


def all_of(kind: int) -> dict[str, Tensor]:
    return mixed("right", kinds=[[kind] * 12] * 2)


def own(router: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """bool [B * S]: the tokens that a router has to get; without token types all are text."""
    kinds_BS = inputs.get("moe_mm_token_type_ids", torch.zeros_like(inputs["input_ids"]))
    return ((kinds_BS != 0) == ("vision_moe" in router)).reshape(-1)


class Seen(NamedTuple):
    """One pass of one router."""

    router: str
    ctx: RouteContext
    places_T: Tensor
    """Where among the B * S tokens of its block those of the router stand."""


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Seen]]:
    """Every pass of every swapped router inside the block, as the router plug-in is told of it."""
    seen: list[Seen] = []
    blocks: dict[str, Tensor] = {}

    def enter(name: str, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        blocks[name] = args[0].detach().flatten(0, 1)

    def note(name: str, router: nn.Module, args: tuple[Tensor, RouteContext]) -> None:
        ctx = args[1]
        assert ctx.hidden_TD is not None
        of_block_ND = blocks[name.partition(".mlp.")[0]]
        same_TN = (ctx.hidden_TD.detach().unsqueeze(1) == of_block_ND).all(dim=-1)
        assert (same_TN.sum(dim=1) == 1).all(), "a token must be known by its hidden states"
        seen.append(Seen(name, ctx, same_TN.int().argmax(dim=1)))

    hooks = []
    for name, each in routers(model).items():
        layer = name.partition(".mlp.")[0]
        hooks += [
            model.get_submodule(f"{layer}.mlp").register_forward_pre_hook(partial(enter, layer)),
            each.router.register_forward_pre_hook(partial(note, name)),
        ]
    yield seen
    for hook in hooks:
        hook.remove()


def expect_told(each: Seen, inputs: Mapping[str, Tensor], *, sequences: bool = True) -> None:
    """The context is that of the router's own tokens, token by token, in the order in which it got them."""
    mask = inputs["attention_mask"]
    B, S = mask.shape
    places_T = own(each.router, inputs).nonzero().squeeze(1)
    assert each.places_T.tolist() == places_T.tolist()
    assert each.ctx.valid_T is not None
    assert each.ctx.valid_T.tolist() == mask.bool().reshape(-1)[places_T].tolist()
    if sequences:
        assert each.ctx.sequence_ids_T is not None and each.ctx.num_sequences == B
        assert each.ctx.sequence_ids_T.tolist() == (places_T // S).tolist()


def expected_loads(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    valid_N = inputs["attention_mask"].bool().reshape(-1)
    return {name: CHOSEN * int((own(name, inputs) & valid_N).sum()) for name in routers(model)}


def counted(model: nn.Module) -> dict[str, int]:
    return {name: int(each.running.sums["load_E"].sum()) for name, each in routers(model).items()}


@each_checkpointing
@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_router_is_told_of_its_own_tokens(padding: Padding, checkpointing: str) -> None:
    """In the recomputation of activation checkpointing too."""
    model, inputs = swapped("loss-free", checkpointing=checkpointing), mixed(padding)
    with watched(model) as seen:
        model(**inputs).loss.backward()
    assert len(seen) == 4 * (1 if checkpointing == "none" else 2)
    assert {each.router for each in seen} == set(routers(model)) and len(routers(model)) == 4
    for each in seen:
        expect_told(each, inputs)
    assert {bool(each.ctx.valid_T.all()) for each in seen if each.ctx.valid_T is not None} == {False}


@each_checkpointing
@pytest.mark.parametrize("router", ["topk", "loss-free", "loss-controlled", "bip"])
def test_padding_is_never_counted(router: str, checkpointing: str) -> None:
    config = SEQUENCE if router == "loss-controlled" else LOUD[router]
    model = swapped(router, config=config, checkpointing=checkpointing)
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    for inputs in (mixed("left"), mixed("right"), mixed()):
        model(**inputs).loss.backward()
        expected = expected_loads(model, inputs)
        optimizer.step()
        optimizer.zero_grad()
        assert {name: int(load_E.sum()) for name, load_E in handle.loads.items()} == expected
    assert {*expected.values()} == {28, 20}  # nothing was padded at last


@each_checkpointing
@pytest.mark.parametrize("router", ["loss-free", "loss-controlled", "bip"])
def test_nothing_depends_on_what_padding_holds(router: str, checkpointing: str) -> None:
    """Neither on its token nor on whether it passes for text or for an image."""
    found = []
    for token, kind in ((0, 0), (41, 1)):
        inputs = mixed("right")
        padded_BS = inputs["attention_mask"] == 0
        inputs["input_ids"] = inputs["input_ids"].masked_fill(padded_BS, token)
        inputs["moe_mm_token_type_ids"] = inputs["moe_mm_token_type_ids"].masked_fill(padded_BS, kind)
        model = swapped(router, checkpointing=checkpointing)
        model(**inputs).loss.backward()
        loads = {name: each.running.sums["load_E"].clone() for name, each in routers(model).items()}
        found.append(({name: grad for name, grad in gradients(model).items() if "gate." in name}, loads))
    (first_grads, first_loads), (second_grads, second_loads) = found
    expect_same_bits(second_loads, first_loads)
    assert len(first_grads) == 4
    expect_close(second_grads, first_grads, 1e-5)


def without_types() -> dict[str, Tensor]:
    return batch(padding="right")


@pytest.mark.parametrize(
    ("inputs", "loads"),
    [(all_of(0), (40, 0)), (all_of(1), (0, 40)), (all_of(2), (0, 40)), (without_types(), (40, 0))],
    ids=["text", "images", "videos", "no types"],
)
@pytest.mark.parametrize("router", ["loss-free", "loss-controlled", "bip"])
def test_a_batch_of_one_kind(router: str, inputs: dict[str, Tensor], loads: tuple[int, int]) -> None:
    """The router of the other kind is not called, or with no tokens; nothing that it has becomes NaN, and it learns
    nothing."""
    model = swapped(router, config=SEQUENCE if router == "loss-controlled" else None)
    start = {name: each.router.state_dict() for name, each in copy.deepcopy(routers(model)).items()}
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    with watched(model) as seen:
        model(**inputs).loss.backward()
    for each in seen:
        expect_told(each, inputs)
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    assert counted(model) == expected_loads(model, inputs)
    optimizer.step()
    text, vision = loads
    totals = {name: int(load_E.sum()) for name, load_E in handle.loads.items()}
    assert totals == {name: vision if "vision_moe" in name else text for name in routers(model)}
    for name, each in routers(model).items():
        if totals[name] == 0:
            expect_same_bits(each.router.state_dict(), start[name])


@pytest.mark.parametrize("keyword", [True, False])
def test_token_ids_are_those_of_the_router(keyword: bool) -> None:
    """The text model alone, which gets ids and not embeddings; arguments may be positional."""
    inputs = mixed("right")
    model: Any = swapped("loss-free").model.language_model
    unswap(model)
    swap(model, "loss-free")
    with watched(model) as seen:
        if keyword:
            model(**{name: value for name, value in inputs.items() if name != "labels"})
        else:
            model(inputs["input_ids"], inputs["attention_mask"], None, inputs["moe_mm_token_type_ids"])
    assert len(seen) == 4
    for each in seen:
        expect_told(each, inputs)
        assert each.ctx.token_ids_T is not None
        assert each.ctx.token_ids_T.tolist() == inputs["input_ids"].reshape(-1)[each.places_T].tolist()


def prompt() -> dict[str, Tensor]:
    inputs = mixed("left")
    del inputs["labels"]
    return inputs


def generated(model: Any) -> Any:
    length = {"min_new_tokens": 3, "max_new_tokens": 3}
    return model.generate(**prompt(), **length, do_sample=False, use_cache=True, pad_token_id=0)


def test_generation_with_a_cache() -> None:
    """Token types come with the prompt only; what is decoded is text."""
    stock, model = tiny_model(ERNIE), swapped("topk").train(False)
    with watched(model) as seen, record(model):  # recorded, since else a router in eval mode is told nothing
        tokens = generated(model)
    assert torch.equal(tokens, generated(stock))
    first, decoded = seen[:4], seen[4:]
    assert {each.router for each in first} == set(routers(model))
    for each in first:
        expect_told(each, prompt(), sequences=False)
    assert len(decoded) == 2 * 2 and all("text_moe" in each.router for each in decoded)
    one = {"input_ids": tokens[:, -1:], "attention_mask": torch.ones(2, 1)}
    for each in decoded:
        expect_told(each, one)


def test_a_tape_takes_no_part_for_whole_sequences() -> None:
    """6 and 8 text tokens are not two rows of 7: joined with what was decoded later, they would go to other tokens."""
    model, inputs = swapped("loss-free"), mixed("right")
    with record(model) as tape:
        recorded = model(**inputs)
    texts = {name: passes for name, passes in tape.expert_ids.items() if "text_moe" in name}
    assert [[list(ids.shape) for ids in passes] for passes in texts.values()] == [[[14, CHOSEN]]] * 2
    with pytest.raises(TraceError, match="cannot be joined"):
        tape.joined()
    for each in routers(model).values():
        each.router.get_buffer("expert_bias_E").normal_()
    assert not torch.equal(logits(model, inputs, **types(inputs)), recorded.logits)
    with replay(model, tape):
        replayed = model(**inputs)
    assert torch.equal(replayed.logits, recorded.logits)


def types(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"moe_mm_token_type_ids": inputs["moe_mm_token_type_ids"]}


def test_copies_split_their_own_batches() -> None:
    model, inputs = swapped("loss-free"), mixed("right")
    model(**inputs)  # a Batch is in every router
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for router in routers(each).values():
            router.running.clear()
        each(**inputs).loss.backward()
        assert counted(each) == expected_loads(each, inputs)
        unswap(each)
        assert torch.equal(
            logits(each, inputs, **types(inputs)), logits(tiny_model(ERNIE).train(), inputs, **types(inputs))
        )


@pytest.mark.parametrize("part", ["text_moe", "vision_moe"])
def test_one_part_may_stay_stock(part: str) -> None:
    model, inputs = prepared(tiny_model(ERNIE)), mixed("right")
    swap(model, "bip", layers=[f"*.{part}.gate"])
    assert len(routers(model)) == 2
    with watched(model) as seen:
        model(**inputs).loss.backward()
    for each in seen:
        expect_told(each, inputs)
    assert len(seen) == 2 and counted(model) == expected_loads(model, inputs)


def test_token_types_of_another_shape_are_the_models_own_error() -> None:
    stock, model = tiny_model(ERNIE), swapped("loss-free")
    wrong = mixed() | {"moe_mm_token_type_ids": torch.ones(2, 11, dtype=torch.int32)}
    with pytest.raises(IndexError) as expected:
        stock(**wrong)
    with pytest.raises(IndexError) as found:
        model(**wrong)
    assert str(found.value) == str(expected.value)


def test_a_router_that_sees_other_tokens_is_told_nothing() -> None:
    whole = Batch(torch.ones(2, 3, dtype=torch.bool), torch.arange(6).reshape(2, 3), 2, 3, None)
    part = whole._replace(index_T=torch.tensor([1, 3, 4]))
    split = whole._replace(parts={"some": part})
    assert split.of("some") is part and split.of("other") is split and split.of(None) is split
    told = part.context(3, None)
    assert told.token_ids_T is not None and told.token_ids_T.tolist() == [1, 3, 4]
    assert told.sequence_ids_T is not None and told.sequence_ids_T.tolist() == [0, 1, 1]
    for each, num_tokens in ((part, 6), (part, 2), (whole, 3)):
        assert each.context(num_tokens, None) == RouteContext()


def test_gradients_of_topk_are_those_of_the_stock_model() -> None:
    stock, model, inputs = prepared(tiny_model(ERNIE)), swapped("topk"), mixed("right")
    for each in (stock, model):
        each(**inputs).loss.backward()
    assert len(gradients(stock)) > 20
    expect_same_bits(gradients(model), gradients(stock))
