"""The survey: everything that `swap` promises, tried on every router class of the installed transformers.

    python -m tests.swap.survey docs        # writes docs/benchmarks/models.json and docs/models.md; 90 s

Whatever goes wrong becomes part of the row, so that one architecture cannot hide the others.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from moerouters import Handle, attach, swap, unswap
from moerouters.swapping import examine
from moerouters.swapping.find import find
from moerouters.swapping.module import SwappedRouter

from .survey_outputs import (
    RUNS,
    NotApplicable,
    Outcome,
    Wrong,
    everything,
    expect_same_bits,
    expect_stock,
    generate,
    given,
    in_training_mode,
    labelled,
    observe,
    outcome,
    reaching,
    same_bits,
)
from .survey_page import ROUTERS, Row, Survey, Verdict, write
from .zoo import UNBUILDABLE, RouterClass, router_classes, tiny_inputs, tiny_model

SETTINGS: dict[str, dict[str, Any]] = {"loss-free": {"rate": 0.1}}
"""A bias of 0.1 moves choices within two steps, which the default of 0.001 would not."""

STEPS = 2


def survey(router: RouterClass) -> Row:
    """Try everything on one class."""
    model, stock, about = swapped_model(router, RUNS)
    if model is None:
        return about
    exact = {
        **about.exact,
        "training mode": attempt(exactness_in_training, model, stock),
        "bfloat16": attempt(exactness_in_bfloat16, router),
    }
    generated = attempt(expect_stock, stock, "tokens", lambda: generate(model))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name: attempt(training, model, name, start) for name in ROUTERS}
    saved = attempt(checkpoint, model)  # of a model trained with the last of ROUTERS, loss-free
    update = {"exact": exact, "generated": generated, "trained": trained, "checkpoint": saved}
    return about.model_copy(update=update)


def golden(router: RouterClass) -> Row:
    """The core of it: float32, and one step with loss-free."""
    model, _, about = swapped_model(router, ("plain", "full"))
    if model is None:
        return about
    return about.model_copy(update={"trained": {"loss-free": attempt(training, model, "loss-free", steps=1)}})


def swapped_model(router: RouterClass, runs: Iterable[str]) -> tuple[PreTrainedModel | None, dict[str, Outcome], Row]:
    """A model with `topk` in it, what the stock model did, and the row so far; no model where it is refused."""
    names: dict[str, Any] = {"router": router.name, "architecture": router.architecture}
    if router.name in UNBUILDABLE:
        return None, {}, Row(**names, reason=UNBUILDABLE[router.name])
    model = tiny_model(router)
    found = [each for each in find(model) if isinstance(each.module, router.load())]
    modules = [module for module in model.modules() if isinstance(module, router.load())]
    row = Row(**names, model=type(model).__name__, found=len(found), modules=len(modules))
    # Before the first swap: to swap back and again would mean to prove again, which takes a while.
    stock = {name: outcome(RUNS[name], model) for name in runs}
    try:
        records = {record.name: record for record in swap(model, "topk", keep_stock_aux=True).layers}
    except Exception as error:
        reasons = [record.reason for record in (examine(model, each) for each in found) if record.reason]
        reason = reasons[0] if reasons else f"{type(error).__name__}: {error}"
        return None, stock, row.model_copy(update={"reason": line(reason)})
    for each in found:
        if records[each.name].status != "swapped":
            return None, stock, row.model_copy(update={"reason": line(str(records[each.name].reason))})
    if not found:
        return None, stock, row.model_copy(update={"reason": "none of its modules was found"})
    exact = {"float32": attempt(exactness, model, stock)}
    swapped = sum(isinstance(module, SwappedRouter) for module in modules)
    gating = str(records[found[0].name].reading)
    return model, stock, row.model_copy(update={"gating": gating, "swapped": swapped, "exact": exact})


def attempt(promise: Callable[..., object], *args: Any, **settings: Any) -> Verdict:
    """Any exception is a verdict."""
    try:
        promise(*args, **settings)
    except NotApplicable as reason:
        return Verdict(holds=None, why=line(str(reason)))
    except Exception as error:
        told = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
        return Verdict(holds=False, why=line(told))
    return Verdict(holds=True)


def line(text: str) -> str:
    """The first line, short, without a full stop."""
    first = " ".join(text.strip().splitlines()[:1])
    return (first if len(first) < 240 else f"{first[:237]}...").rstrip(".")


# Exactness


def exactness(model: PreTrainedModel, stock: Mapping[str, Outcome]) -> None:
    """All outputs for a padded batch; the stock aux loss kept first, then off. `model` comes swapped, aux loss kept."""
    full, plain = given(stock["full"]), given(stock["plain"])
    expect_same_bits(full, everything(model), "the stock aux loss kept")
    swap(model, "topk")
    found = everything(model)
    aux_loss = found.pop("aux_loss", None)
    # The pooled loss counts nothing now, so the loss is that of a model that was not asked for router logits.
    expected = {name: plain[name] if name == "loss" else value for name, value in full.items() if name != "aux_loss"}
    expect_same_bits(expected, found, "the stock aux loss off")
    if aux_loss is not None and aux_loss.any():
        raise Wrong("an aux loss is reported, although all routers are swapped")


def exactness_in_bfloat16(router: RouterClass) -> None:
    model = tiny_model(router, dtype=torch.bfloat16)
    full = outcome(everything, model)
    swap(model, "topk", keep_stock_aux=True)
    expect_same_bits(given(full), everything(model), "swapped")


def exactness_in_training(model: PreTrainedModel, stock: Mapping[str, Outcome]) -> None:
    once, again = given(stock["training"]), given(stock["training again"])
    if any(not same_bits(once[name], again[name]) for name in once):
        raise NotApplicable("the stock model draws random numbers in training")
    expect_same_bits(once, in_training_mode(model), "in training mode")


# Training


def training(
    model: PreTrainedModel, name: str, start: Mapping[str, Tensor] | None = None, *, steps: int = STEPS
) -> None:
    """Some optimizer steps; the model stays swapped, in eval mode, with what it learned.

    `start` is what it begins with. What an earlier router left in the correction bias may balance the batch already.
    """
    if start is not None:
        model.load_state_dict(start)
    swap(model, name, config=SETTINGS.get(name))
    routers = swapped_in(model)
    inputs, optimizer = labelled(model), torch.optim.SGD(model.parameters(), lr=0.02)
    before = {layer: gate_of(module) for layer, module in routers.items()}
    state = {layer: state_of(module) for layer, module in routers.items()}
    seen: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, __, layer=layer: seen.update({layer: args[0].shape[:-1].numel()}))
        for layer, module in routers.items()
    ]
    handle = attach(optimizer, model)
    model.train()
    try:
        for step in range(steps):
            loss = loss_of(model, inputs)
            if not loss.isfinite():
                raise Wrong(f"the loss is {loss.item()}")
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if step == 0 and name == "loss-free":  # the next step may take it back
                expect_moved(state, {layer: state_of(module) for layer, module in routers.items()}, "bias")
            expect_counted(handle, routers, seen, inputs)
    finally:
        model.eval()  # type: ignore[no-untyped-call]
        handle.remove()
        for hook in hooks:
            hook.remove()
    expect_moved(before, {layer: gate_of(module) for layer, module in routers.items()}, "gate")


def swapped_in(model: nn.Module) -> dict[str, SwappedRouter]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SwappedRouter)}


def gate_of(module: SwappedRouter) -> Tensor:
    return module.gating.tensors(module.gating.reading.projection.weight).detach().clone()


def state_of(module: SwappedRouter) -> Tensor:
    return torch.cat([torch.zeros(0), *(buffer.flatten().float() for buffer in module.router.state_dict().values())])


def expect_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], what: str) -> None:
    still = [layer for layer, tensor in before.items() if torch.equal(tensor, after[layer])]
    if still:
        raise Wrong(f"the {what} of {', '.join(still)} did not move")


def expect_counted(
    handle: Handle, routers: Mapping[str, SwappedRouter], seen: Mapping[str, int], inputs: Mapping[str, Tensor]
) -> None:
    """Each valid token that reaches a router K times."""
    mask = inputs.get("attention_mask")
    for layer, module in routers.items():
        valid = seen[layer]
        if mask is not None:
            reached_BS = reaching(layer, inputs)
            if seen[layer] != int(reached_BS.sum()):
                raise Wrong(f"{layer} sees {seen[layer]} of {int(reached_BS.sum())} tokens")
            valid = int((mask.bool() & reached_BS).sum())
        counted = int(handle.loads[layer].sum())
        if counted != valid * module.gating.top_k:
            raise Wrong(f"{layer} counted {counted} choices, not {valid} * {module.gating.top_k}")


def loss_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    output = model(**inputs)
    if "labels" in inputs:
        return output.loss  # type: ignore[no-any-return]
    # Not the mean square of the output alone: after an RMS norm that is a constant, without a gradient.
    hidden: Tensor = output[0]
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    return (hidden - target).square().mean()


# Checkpoints


def checkpoint(model: PreTrainedModel) -> None:
    """What a model writes that was trained with loss-free is a stock checkpoint. `model` goes unswapped."""
    inputs = tiny_inputs(model, padding=True)
    served = all(module.gating.reading.correction_bias for module in swapped_in(model).values())
    balanced = observe(model, inputs)
    stock, keys = loaded(model)
    if keys:
        unswap(model)
        if keys != loaded(model)[1]:
            raise Wrong(f"keys missing or left over: {', '.join(keys)}")
    if served:
        expect_same_bits(balanced, observe(stock, inputs), "the balanced checkpoint in the stock model")
    unswap(model)
    expect_same_bits(observe(model, inputs), observe(stock, inputs), "the checkpoint in the stock model")


def loaded(model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """The checkpoint in stock transformers, and names that were missing or left over."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        both: Any = type(model).from_pretrained(folder, output_loading_info=True)
    found, info = both
    for tensor in (*found.parameters(), *found.buffers()):
        # Loading maps the file, whose tensors lie at odd addresses; matrix products of those have other last bits.
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    found.eval()
    return found, sorted({*info["missing_keys"], *info["unexpected_keys"]})


def main() -> None:
    """Survey all classes and write both files."""
    parser = argparse.ArgumentParser(prog="python -m tests.swap.survey")
    parser.add_argument("folder", type=Path, help="docs")
    folder = parser.parse_args().folder
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    rows = []
    for router in router_classes():
        rows.append(survey(router))
        missing = ", ".join(name for name, verdict in rows[-1].verdicts() if not verdict.holds)
        print(f"{router}: {rows[-1].reason or missing or 'everything'}", flush=True)
    write(folder, Survey(transformers=transformers.__version__, torch=torch.__version__, rows=tuple(rows)))


if __name__ == "__main__":
    main()
