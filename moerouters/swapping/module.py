"""SwappedRouter: the class that a stock router is given while another router chooses in its place.

The module stays the object that it was, with its parameters, names, hooks and place; only its class changes, to a
subclass of its own. So recorders, weight loading, `isinstance` and whoever holds a reference notice nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moerouters.errors import ConfigError, ContextError
from moerouters.losses import LossMode
from moerouters.routed import RoutedModule
from moerouters.router import Router
from moerouters.swapping.adapters.base import Adapter
from moerouters.swapping.batch import Batch
from moerouters.swapping.gating import ModelGating, cast
from moerouters.types import RouteContext

_ANY = RouteContext(valid_T=torch.ones(0, dtype=torch.bool))
"""For a bias that does not depend on the batch."""

_ADDED = (
    *("router", "router_name", "gating", "adapter", "batch", "tape", "running", "loss_mode"),
    *("_num_losses", "_lean", "_state_bias", "_straight"),
)
"""Attributes that a swapped router has beside the stock one's."""


class SwappedRouter(RoutedModule):
    """A stock router in which `router` chooses. Its losses are injected: nobody has to add them."""

    loss_modes: ClassVar[frozenset[LossMode]] = frozenset({"inject"})
    stock_class: ClassVar[type[nn.Module]]
    router_name: str
    gating: ModelGating
    """The router's; a plain attribute, since looking a submodule up takes 1 us, and a forward needs it five times."""
    adapter: Adapter
    _lean: bool
    """Whether it selects as the template does."""
    _state_bias: bool
    """Whether all it adds to scores in eval, if anything, is the same bias for every batch."""
    _straight: bool
    """Whether the gating's `serve` gives all that the stock router hands out in eval."""
    batch: Batch | None
    """What BatchHooks says of this forward."""

    kernel_condition = staticmethod(lambda module: False)
    """Keeps `kernelize` from replacing forward: the stock class may name a kernel, and subclasses inherit that."""

    def forward(self, hidden_states: Tensor, *handed_in: Any, **named: Any) -> Any:
        if self._straight and not self.training and self.tape is None:
            gating = self.gating
            bias_E_of = None if gating.exact else self._bias_E_of
            hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
            logits_TE, weights_TK, ids_TK = gating.serve(hidden_TD, bias_E_of)
            dtype = self.adapter.weights_dtype(gating, hidden_TD, logits_TE)
            return logits_TE, cast(weights_TK, dtype), ids_TK
        return self.adapter.forward(self, hidden_states, *handed_in, **named)

    def route(self, logits_TE: Tensor, hidden_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """([T, K] weights, [T, K] ids): the router's choice, counted in training; padding goes as in stock."""
        if self._lean and not self.training and self.tape is None:
            return self._choose(logits_TE, hidden_TD)
        ctx = self._context(logits_TE.shape[0], hidden_TD)
        assignment = self._account(self._assign(logits_TE, ctx))
        if self._lean and ctx.valid_T is None:
            # Only a row of infinities has an empty slot then; its weight is 0.
            return assignment.weights, assignment.expert_ids.clamp(max=self.gating.num_experts - 1)
        ids_TK, weights_TK = assignment.to_slots()
        if ctx.valid_T is not None and ids_TK.shape[1] == self.gating.top_k:
            padded_TK, padded_ids_TK = self.gating.choose_as_stock(logits_TE)
            real_T1 = ctx.valid_T.unsqueeze(1)
            weights_TK = torch.where(real_T1, weights_TK, padded_TK)
            ids_TK = torch.where(real_T1, ids_TK, padded_ids_TK)
        return weights_TK, ids_TK

    def _choose(self, logits_TE: Tensor, hidden_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the router's template computes, without counts that nobody reads."""
        gating = self.gating
        if gating.exact:
            return gating.choose_as_stock(logits_TE)
        scores_TE = gating.score(logits_TE)
        if self._state_bias:
            bias_E = self.router.bias_E(scores_TE, _ANY)
            assert bias_E is not None
            return gating.choose(scores_TE, gating.corrected(scores_TE) + bias_E)
        ctx = replace(self._context(logits_TE.shape[0], hidden_TD), logits_TE=gating.prepare(logits_TE))
        if ctx.valid_T is None:
            ctx = replace(ctx, valid_T=logits_TE.new_ones(logits_TE.shape[0], dtype=torch.bool))
        _, adjusted_TE = self.router._adjusted(scores_TE, ctx)
        return gating.choose(scores_TE, adjusted_TE)

    def _bias_E_of(self, scores_TE: Tensor) -> Tensor | None:
        router: Any = self._modules["router"]  # by attribute it takes 1 us, see `gating`
        bias_E: Tensor | None = router.bias_E(scores_TE, _ANY)
        return bias_E

    def _context(self, num_tokens: int, hidden_TD: Tensor | None) -> RouteContext:
        if self.batch is None:
            return RouteContext(hidden_TD=hidden_TD)
        return self.batch.context(num_tokens, hidden_TD)

    def _router_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.parameters()

    # The checkpoint stays that of the stock model: the router's own state travels by `save_router_state`.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in [name for name in found if name.startswith(f"{prefix}router.")]:
            del found[name]
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The router's tensors are not in the checkpoint and not missing: each is loaded with itself.
        state_dict.update({f"{prefix}router.{name}": value for name, value in self.router.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._take_correction()

    # The correction bias of the model: `gating.correction_bias_E` is the model's own part of it, and what the stock
    # tensor holds is the sum with the bias that the router has learned. So stock engines serve the balanced model.

    @torch.no_grad()
    def learned(self) -> None:
        served_E = self._served_bias()
        if served_E is not None:
            stock_E = self._stock_correction()
            _fill(stock_E, (self.gating.correction_bias_E + served_E).reshape(stock_E.shape))

    @torch.no_grad()
    def _take_correction(self) -> None:
        """After a checkpoint was loaded: the model's own part is what it holds, less what the router has learned."""
        if self.gating.reading.correction_bias is None:
            return
        own_E, served_E = self.gating.correction_bias_E, self._served_bias()
        stock_E = _whole(self._stock_correction()).reshape(own_E.shape)
        if served_E is None:
            own_E.copy_(stock_E)
        elif not torch.equal((own_E + served_E).to(stock_E.dtype), stock_E):
            own_E.copy_(stock_E - served_E)

    def _stock_correction(self) -> Tensor:
        name = self.gating.reading.correction_bias
        assert name is not None
        return self.gating.tensors(name).detach()

    def _served_bias(self) -> Tensor | None:
        """float32 [E]: what the router adds to scores in eval, if it is a bias alone and has a place."""
        return served_bias(self.router) if self.gating.reading.correction_bias is not None else None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles: a class made at run time has no name that pickle could import."""
        return _blank, (self.stock_class,), self.__dict__ | {"batch": None}


# Some models keep their correction bias as a frozen parameter (Ernie 4.5, Laguna), which FSDP2 shards with the others.


def _whole(tensor: Tensor) -> Tensor:
    sharded: Any = tensor
    return sharded.full_tensor() if hasattr(sharded, "full_tensor") else tensor


def _fill(target: Tensor, values: Tensor) -> None:
    """target.copy_(values), the same values on every rank."""
    sharded: Any = target
    if hasattr(sharded, "placements"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(target.dtype), sharded.device_mesh, sharded.placements)
    target.copy_(values)


def served_bias(router: Router) -> Tensor | None:
    """The bias that `router` adds to every token's scores in eval mode; None if it does anything else to them."""
    if type(router).select is not Router.select:
        return None
    E = router.gating.num_experts
    device = next((buffer.device for buffer in router.buffers()), torch.device("cpu"))
    rising_TE = torch.linspace(0, 1, 2 * E, device=device).reshape(2, E)
    ctx = RouteContext(valid_T=torch.ones(2, dtype=torch.bool, device=device), logits_TE=rising_TE)
    was_training = router.training
    router.eval()
    try:
        biases = [router.bias_E(scores_TE, ctx) for scores_TE in (rising_TE, 1 - rising_TE)]
        moves = router.adjust(rising_TE, ctx) is not rising_TE
    except ContextError:  # it needs to know more of the batch, so it is no bias alone
        return None
    finally:
        router.train(was_training)
    first, second = biases
    if moves or first is None or second is None or not torch.equal(first, second):
        return None
    return first


_CLASSES: dict[type[nn.Module], type[SwappedRouter]] = {}


def swapped_class(stock_class: type[nn.Module]) -> type[SwappedRouter]:
    """The subclass of `stock_class` in which a router of ours chooses; one per stock class and process."""
    if stock_class not in _CLASSES:
        made: Any = type(f"Swapped{stock_class.__name__}", (SwappedRouter, stock_class), {"stock_class": stock_class})
        _CLASSES[stock_class] = made
    return _CLASSES[stock_class]


def _blank(stock_class: type[nn.Module]) -> SwappedRouter:
    cls = swapped_class(stock_class)
    return cls.__new__(cls)


def install(module: nn.Module, router: Router, adapter: Adapter, *, name: str, hidden_size: int) -> SwappedRouter:
    """Give a stock router module to `router`, whose gating is a ModelGating of that module."""
    taken = [name for name in _ADDED if hasattr(module, name)]
    if taken:
        raise ConfigError(
            f"{type(module).__name__} has attributes of its own where a swapped router keeps its: {', '.join(taken)}.",
            why="the module would lose them",
            fix="report the architecture; it needs an adapter",
        )
    module.__class__ = swapped_class(type(module))
    assert isinstance(module, SwappedRouter)
    module.router_name = name
    module.adapter = adapter
    module.batch = None
    module._set_router(router.train(module.training), hidden_size=hidden_size, loss_mode="inject")
    assert isinstance(router.gating, ModelGating)
    module.__dict__["gating"] = router.gating
    module._lean = type(router).select is Router.select
    leaves_scores = all(getattr(type(router), stage) is getattr(Router, stage) for stage in ("bias_E", "adjust"))
    module._state_bias = served_bias(router) is not None
    module.gating.exact = module._lean and leaves_scores
    served = module.gating.exact or (module._lean and module._state_bias)
    plain = all(getattr(type(adapter), each) is getattr(Adapter, each) for each in Adapter.ON_THE_WAY)
    module._straight = plain and module.gating.straight and served
    if module.gating.reading.correction_bias is not None:
        module._take_correction()
    return module


def uninstall(module: SwappedRouter) -> None:
    """Give the module its class back. What the model learned meanwhile stays, the correction bias too."""
    module.adapter.leave(module)
    del module.router
    for name in _ADDED:
        module.__dict__.pop(name, None)
    module.__class__ = module.stock_class  # type: ignore[assignment]  # back to the class it was derived from
