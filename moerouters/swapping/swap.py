"""swap and unswap: another router for a model, in one call, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from moerouters.autocast import no_autocast
from moerouters.errors import ConfigError, UnsupportedError
from moerouters.gating import Gating
from moerouters.registry import RouterConfig, build
from moerouters.swapping.adapters import adapter_for, refusal
from moerouters.swapping.find import Found, find
from moerouters.swapping.gating import settings_of
from moerouters.swapping.guards import expect_supported_transformers, obstacle
from moerouters.swapping.module import SwappedRouter, install, uninstall
from moerouters.swapping.prove import prove
from moerouters.swapping.read import hidden_size
from moerouters.swapping.reading import Reading
from moerouters.swapping.surroundings import Surroundings
from moerouters.swapping.understand import NotUnderstood

Status = Literal["swapped", "swappable", "skipped", "refused"]


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What was found, read, proven and done at one router."""

    name: str
    """Of the router module."""
    stock_class: str
    status: Status
    reading: Reading | None = None
    """The gating, proven bit for bit unless the layer was refused."""
    router: str | None = None
    """Name of the router that chooses now; None for the stock one."""
    reason: str | None = None
    """Why it was skipped or refused."""

    def __str__(self) -> str:
        told = self.reason if self.reason is not None else str(self.reading)
        return f"{self.name}: {self.router or self.stock_class} ({self.status}): {told}"


@dataclass(frozen=True, kw_only=True)
class SwapRecord:
    """What `swap` did, layer by layer."""

    layers: tuple[LayerRecord, ...]

    @property
    def swapped(self) -> tuple[LayerRecord, ...]:
        """Layers in which another router chooses now."""
        return tuple(layer for layer in self.layers if layer.status == "swapped")

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))


def swap(
    model: nn.Module,
    name: str,
    *,
    config: RouterConfig | Mapping[str, Any] | None = None,
    layers: Iterable[int | str] | None = None,
    keep_stock_aux: bool = False,
) -> SwapRecord:
    """Let the router plug-in `name` choose in a Hugging Face model, at every layer or at some.

    Each router's gating is read from what it computes, and proven: rebuilt with `topk` it has to give the stock
    router's bits, in float32 and in the model's dtype. Nothing is changed unless all selected layers pass. `layers`
    holds numbers of decoder layers, or patterns for names of router modules; the default is all. A layer that was
    swapped before gets the new router.

    Losses of routers are injected into the backward pass, so no trainer has to add them; `attach` the optimizer for
    routers that learn after each step. The model's own pooled aux loss counts nothing for swapped layers, in value and
    gradient, unless keep_stock_aux.

    Raises UnsupportedError if a router cannot be reproduced, with the first differing value, or if there is none; and
    ConfigError for `layers` that match nothing. Layers that are refused by their kind (hash routing) are skipped.
    """
    expect_supported_transformers()
    found = find(model)
    chosen = _select(found, layers)
    records = {each.name: examine(model, each) for each in chosen}
    _refuse(model, records)
    _expect_buildable(name, records.values(), config)
    for each in chosen:
        if records[each.name].status == "swappable":
            records[each.name] = _install(each, records[each.name], name, config)
    Surroundings.of(model).renew(model, keep_stock_aux=keep_stock_aux)
    return SwapRecord(layers=tuple(records.values()))


def unswap(model: nn.Module) -> None:
    """Give every swapped router of the model its class back, and take out all hooks.

    Weights stay as they are, and so does a correction bias that a balancer has learned.
    """
    for module in list(model.modules()):
        if isinstance(module, SwappedRouter):
            uninstall(module)
    Surroundings.of(model).renew(model, keep_stock_aux=True)


def examine(model: nn.Module, found: Found) -> LayerRecord:
    """Read and prove one router, without changing it."""
    module = found.module
    stock_class = module.stock_class if isinstance(module, SwappedRouter) else type(module)
    about: dict[str, Any] = {"name": found.name, "stock_class": stock_class.__name__}
    if isinstance(module, SwappedRouter):
        return LayerRecord(**about, status="swappable", reading=module.gating.reading, router=module.router_name)
    reason = refusal(module)
    if reason is not None:
        return LayerRecord(**about, status="skipped", reason=reason)
    reason = obstacle(model, found.stock)
    if reason is not None:
        return LayerRecord(**about, status="refused", reason=reason)
    adapter = adapter_for(module)
    try:
        with no_autocast(next(module.parameters()).device):  # under it the stock router computes something else
            reading = adapter.read(found.stock)
            prove(found.stock, reading, adapter)
    except NotUnderstood as problem:
        return LayerRecord(**about, status="refused", reason=str(problem))
    return LayerRecord(**about, status="swappable", reading=reading)


def _select(found: list[Found], layers: Iterable[int | str] | None) -> list[Found]:
    if layers is None:
        return found
    wanted = list(layers)
    for each in wanted:
        if not any(_matches(router, each) for router in found):
            raise ConfigError(
                f"layers={each!r} matches no router of the model.",
                where="\n".join(router.name for router in found),
                why="numbers are those of decoder layers, strings patterns for the names above",
                fix="choose among them",
            )
    return [router for router in found if any(_matches(router, each) for each in wanted)]


def _matches(found: Found, wanted: int | str) -> bool:
    return found.layer == wanted if isinstance(wanted, int) else fnmatchcase(found.name, wanted)


def _refuse(model: nn.Module, records: Mapping[str, LayerRecord]) -> None:
    """Raise for the first layer that was refused, or if nothing is left to swap."""
    for record in records.values():
        if record.status == "refused":
            raise UnsupportedError(
                f"the router of layer '{record.name}' cannot be swapped: {record.reason}.",
                where=f"{record.stock_class} in {type(model).__name__}",
                why="a router is swapped only if its gating was understood and reproduced bit for bit",
                fix="leave the layer out by layers=..., or report the architecture",
            )
    if all(record.status == "skipped" for record in records.values()):
        raise UnsupportedError(
            f"no router of {type(model).__name__} can be swapped.",
            where="\n".join(map(str, records.values())),
            why="routers are modules beside experts that return (logits, weights, expert ids)",
            fix="`moerouters inspect` lists what was found",
        )


def _expect_buildable(name: str, records: Iterable[LayerRecord], config: Any) -> None:
    """A plug-in that refuses a gating must do so before the first layer has changed."""
    readings = {record.reading for record in records if record.reading is not None}
    for reading in readings:
        build(name, Gating(settings_of(reading)), config=config)


def _install(
    found: Found, record: LayerRecord, name: str, config: RouterConfig | Mapping[str, Any] | None
) -> LayerRecord:
    module, reading = found.module, record.reading
    assert reading is not None
    adapter = adapter_for(module)
    gating = adapter.gating(reading, found.stock)
    if isinstance(module, SwappedRouter):
        # What the earlier router learned stays in the model's correction bias, as after `unswap`.
        uninstall(module)
    router = build(name, gating, config=config).to(found.stock(reading.projection.weight).device)
    adapter.enter(install(module, router, adapter, name=name, hidden_size=hidden_size(found.stock)))
    return replace(record, status="swapped", router=name)
