"""attach: run `Router.update` once per optimizer step, on what every rank saw since the last one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moerouters.capabilities import StateAlgebra
from moerouters.errors import ConfigError, MoeroutersError, NonFiniteLogits, UnconsumedLoss
from moerouters.fingerprint import expect_same_on_all_ranks
from moerouters.losses import LossMode
from moerouters.reduce import Sums, reduce_sums
from moerouters.routed import RoutedModule


def attach(
    optimizers: Optimizer | Iterable[Optimizer],
    model: nn.Module,
    *,
    loss_mode: LossMode | None = None,
    token_group: dist.ProcessGroup | None = None,
) -> Handle:
    """After every optimizer step, reduce the routing stats over ranks and update every router in `model`.

    With several optimizers the update runs once all of them have stepped. A step that GradScaler skips updates nothing;
    its tokens count in the next. loss_mode, if given, is set on every layer. token_group holds the ranks with
    *distinct* tokens (data parallel), never tensor-parallel replicas; default: the whole world, if there is one (a
    ConfigError where a layer's dispatcher says that tokens are replicated).
    Calling it again with the same model and optimizers returns the same Handle. With several ranks it is a collective:
    it compares what routers they run, and raises ConfigError with the differences.

    At the step it raises NonFiniteLogits, naming the layer, if a gate gave NaN or infinity, and UnconsumedLoss if a
    router's loss was never differentiated. Both are raised before any router is updated, and clear the step's stats.
    """
    chosen = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    layers = {_plain_name(name): m for name, m in model.named_modules() if isinstance(m, RoutedModule)}
    if not chosen or not layers:
        missing = "optimizers" if not chosen else "layers with a router"
        raise ConfigError(
            f"attach found no {missing}.",
            where=type(model).__name__,
            why="it looks for MoELayer (or another RoutedModule) among model.modules()",
            fix="pass the model that holds the MoE layers, and the optimizers that train it",
        )
    if loss_mode is not None:
        for name, layer in layers.items():
            if loss_mode not in layer.loss_modes:
                raise ConfigError(
                    f"layer '{name}' cannot have loss_mode={loss_mode!r}.",
                    where=type(layer).__name__,
                    why="a swapped router returns what the stock one returns, and has no place to hand losses out",
                    fix="leave loss_mode out: its losses are injected into the backward pass",
                )
            layer.loss_mode = loss_mode
    modes = {layer.loss_mode for layer in layers.values()}
    if len(modes) > 1:
        raise ConfigError(
            "layers disagree on loss_mode.",
            where=", ".join(f"{name}: {layer.loss_mode}" for name, layer in layers.items()),
            why="losses meet the graph in exactly one way per run",
            fix="attach(..., loss_mode='collect') or 'inject' sets it on all of them",
        )
    earlier = _earlier(chosen, layers)
    if earlier is not None:
        return earlier
    if token_group is None:
        _expect_distinct_tokens(layers)
        _expect_no_tensor_parallel(model)
    expect_same_on_all_ranks({name: layer.router for name, layer in layers.items()}, token_group)
    return Handle(chosen, layers, token_group)


class Handle:
    """What `attach` returns: the loads of the last step, the scale of injected losses, and the way to detach."""

    def __init__(
        self, optimizers: list[Optimizer], layers: dict[str, RoutedModule], token_group: dist.ProcessGroup | None
    ) -> None:
        self.layers = layers
        self.steps = 0
        self.loads: dict[str, Tensor] = {}
        """Per layer the int64 [E] load of the last step, before dropping, over all ranks."""
        self.dropped: dict[str, Tensor] = {}
        """Per layer the int64 0-d count of pairs dropped in the last step, over all ranks."""
        self._token_group = token_group
        self._optimizers = optimizers
        self._waiting = set(range(len(optimizers)))
        self._hooks = [o.register_step_post_hook(partial(self._stepped, i)) for i, o in enumerate(optimizers)]
        for layer in layers.values():
            layer.running.handle = self
            if layer.router.capabilities.forward_collective:
                layer.router.token_group = token_group

    def scale_losses(self, *, accumulation_steps: int = 1, scaler: torch.amp.GradScaler | None = None) -> None:
        """Scale injected losses as the training loss is scaled: by 1 / accumulation_steps, times the GradScaler's.

        Call before the first forward pass of a step, and each step with a scaler, whose scale moves. In collect mode
        the training loss carries the scale, and this changes nothing.
        """
        scale = (1.0 if scaler is None else scaler.get_scale()) / accumulation_steps
        for layer in self.layers.values():
            layer.running.loss_scale.fill_(scale)

    def remove(self) -> None:
        """Stop updating. The routers keep their state."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self.layers.values():
            layer.running.handle = None
            layer.router.token_group = None

    def serves(self, optimizers: list[Optimizer], layers: dict[str, RoutedModule]) -> bool:
        """Whether this handle was made for just these optimizers and layers."""
        return _same(self._optimizers, optimizers) and _same(self.layers.values(), layers.values())

    def _stepped(self, index: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        # Fused optimizers are called by GradScaler with found_inf set and skip inside; the others are not called.
        if isinstance(found_inf, Tensor) and bool(found_inf):
            return
        self._waiting.discard(index)
        if self._waiting:
            return
        self._waiting = set(range(len(self._optimizers)))
        self._update()

    @torch.no_grad()
    def _update(self) -> None:
        sums = reduce_sums({name: layer.running.sums for name, layer in self.layers.items()}, self._token_group)
        marks = {
            name: 0.0 if layer.running.probe.grad is None else layer.running.probe.grad
            for name, layer in self.layers.items()
        }
        learning = self._check(sums, marks)
        self.steps += 1
        for name, layer in self.layers.items():
            observed = {key.removeprefix("stats."): v for key, v in sums[name].items() if key.startswith("stats.")}
            if layer.router.capabilities.state is not StateAlgebra.STATELESS and name in learning:
                layer.router.update(observed)
                layer.learned()
            self.loads[name] = sums[name]["load_E"]
            self.dropped[name] = sums[name]["dropped"]
            layer.running.clear()
        self._tell_plugins()

    def _check(self, sums: Sums, marks: Mapping[str, Tensor | float]) -> set[str]:
        """Raise for what must not be learned from; return the layers that observed anything."""
        # One transfer for all layers, the only wait for the device in a step.
        rows = []
        for name, layer in self.layers.items():
            passes, mark = layer.running.sums["passes"], torch.as_tensor(marks[name]).to(layer.running.probe.device)
            counts = (sums[name]["nonfinite"], sums[name]["observed"], passes, mark)
            rows.append(torch.stack([count.double() for count in counts]))
        table = dict(zip(self.layers, torch.stack(rows).tolist(), strict=True))
        try:
            for name, (nonfinite, _, passes, marked) in table.items():
                self._check_layer(name, nonfinite=int(nonfinite), passes=int(passes), marked=int(marked))
        except MoeroutersError:
            # A run that goes on after catching this starts the next step afresh, in every layer: NaN spreads upwards.
            for layer in self.layers.values():
                layer.running.clear()
            raise
        return {name for name, (_, observed, _, _) in table.items() if observed}

    def _check_layer(self, name: str, *, nonfinite: int, passes: int, marked: int) -> None:
        layer = self.layers[name]
        shown = name or type(layer).__name__  # the model may be the layer itself, which has no name
        if nonfinite:
            plural = "" if nonfinite == 1 else "s"
            raise NonFiniteLogits(
                f"the gate of layer '{shown}' gave NaN or infinite logits for {nonfinite} token{plural} in this step.",
                where=type(layer.router).__name__,
                why="experts cannot be chosen from them; the weights of these tokens are NaN",
                fix="look at the loss and the gradient norm of the steps before; lower the learning rate, clip "
                "gradients, or add a z-loss",
            )
        expected = passes * layer.losses_per_pass
        if marked < expected and layer.trains_router:
            raise UnconsumedLoss(
                f"layer '{shown}' computed its aux loss {expected} times in this step, but it was differentiated "
                f"{marked} times.",
                where=f"{type(layer.router).__name__}, loss_mode={layer.loss_mode!r}",
                why="without its loss this router never balances",
                fix="add the losses of the layer's assignment to the training loss, not times 0; or attach(..., "
                "loss_mode='inject'), which also survives reentrant checkpointing; evaluate under model.eval()",
            )

    def _tell_plugins(self) -> None:
        from moerouters.registry import step_metrics_hook

        hook = step_metrics_hook()
        if hook is not None:
            hook({"step": self.steps, "loads": dict(self.loads), "dropped": dict(self.dropped)})


def _earlier(optimizers: list[Optimizer], layers: dict[str, RoutedModule]) -> Handle | None:
    """The Handle that already serves these optimizers and layers; ConfigError if another one serves a layer."""
    for name, layer in layers.items():
        handle = layer.running.handle
        if handle is None:
            continue
        assert isinstance(handle, Handle)
        if handle.serves(optimizers, layers):
            return handle
        raise ConfigError(
            f"layer '{name}' is attached already, to other optimizers or as part of another model.",
            why="its router would be updated twice per step",
            fix="pass all optimizers in one call: attach([a, b], model); or call remove() on the earlier handle first",
        )
    return None


def _expect_distinct_tokens(layers: Mapping[str, RoutedModule]) -> None:
    """ConfigError where stats are to be summed over the world, and a layer's dispatcher has ranks with equal tokens."""
    for name, layer in layers.items():
        dispatcher = getattr(layer, "dispatcher", None)
        if dispatcher is None:
            continue
        copies = dispatcher.num_ranks if dispatcher.replicated else getattr(dispatcher, "slices", 1)
        if copies > 1:
            raise ConfigError(
                f"layer '{name or type(layer).__name__}' holds the same tokens on {copies} ranks, and attach was given "
                "no token_group.",
                where=type(dispatcher).__name__,
                why=f"over the whole world each of these tokens would count {copies} times",
                fix="pass the ranks with distinct tokens, for instance token_group=mesh['dp'].get_group()",
            )


def _expect_no_tensor_parallel(model: nn.Module) -> None:
    """ConfigError for a Hugging Face model whose ranks share batches; it says so in an attribute."""
    sharing = getattr(model, "_tp_size", None)
    if isinstance(sharing, int) and sharing > 1:
        raise ConfigError(
            f"the model holds each batch on {sharing} tensor-parallel ranks, and attach was given no token_group.",
            where=type(model).__name__,
            why=f"over the whole world each of its tokens would count {sharing} times",
            fix="pass token_group=moerouters.hf.token_group(model)",
        )


def _same(left: Iterable[object], right: Iterable[object]) -> bool:
    return [id(item) for item in left] == [id(item) for item in right]


def _plain_name(name: str) -> str:
    """Module name as the user wrote it, without what torch.compile, DDP and checkpoint wrappers put in between."""
    wrappers = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)
