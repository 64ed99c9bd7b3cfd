"""attach: run `Router.update` once per optimizer step, on what every rank saw since the last one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moerouters.capabilities import StateAlgebra
from moerouters.errors import ConfigError, NonFiniteLogits, UnconsumedLoss
from moerouters.losses import LossMode
from moerouters.reduce import reduce_sums
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
    *distinct* tokens (data parallel), never tensor-parallel replicas; default: the whole world, if there is one.
    Calling it again with the same model and optimizers returns the same Handle.

    At the step it raises NonFiniteLogits, naming the layer, if a gate gave NaN or infinity, and UnconsumedLoss if a
    router's loss was never differentiated. Both are raised before any router is updated.
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
        for layer in layers.values():
            layer.loss_mode = loss_mode
    modes = {layer.loss_mode for layer in layers.values()}
    if len(modes) > 1:
        raise ConfigError(
            "layers disagree on loss_mode.",
            where=", ".join(f"{name}: {layer.loss_mode}" for name, layer in layers.items()),
            why="losses meet the graph in exactly one way per run",
            fix="attach(..., loss_mode='collect') or 'inject' sets it on all of them",
        )
    earlier = _attached(chosen, layers)
    return earlier if earlier is not None else Handle(chosen, layers, token_group)


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
        self._hooks = [o.register_step_post_hook(_Stepped(self, i)) for i, o in enumerate(optimizers)]

    def scale_losses(self, *, accumulation_steps: int = 1, scaler: torch.amp.GradScaler | None = None) -> None:
        """Scale injected losses as the training loss is scaled: by 1 / accumulation_steps, times the GradScaler's.

        Call before the first backward pass of a step, and each step with a scaler, whose scale moves. In collect mode
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

    def _stepped(self, index: int, optimizer: Optimizer) -> None:
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
        self._check(sums, marks)
        self.steps += 1
        for name, layer in self.layers.items():
            observed = {key.removeprefix("stats."): v for key, v in sums[name].items() if key.startswith("stats.")}
            if layer.router.capabilities.state is not StateAlgebra.STATELESS:
                layer.router.update(observed)
            self.loads[name] = sums[name]["load_E"]
            self.dropped[name] = sums[name]["dropped"]
            layer.running.clear()
        self._tell_plugins()

    def _check(self, sums: Mapping[str, Mapping[str, Tensor]], marks: Mapping[str, Tensor | float]) -> None:
        # One transfer for all layers: [nonfinite, local forward passes, marks] each.
        rows = []
        for name, layer in self.layers.items():
            passes, mark = layer.running.sums["passes"], _as_double(marks[name], layer)
            rows.append(torch.stack([sums[name]["nonfinite"].double(), passes.double(), mark]))
        table = torch.stack(rows).tolist()
        for (name, layer), (nonfinite, passes, marked) in zip(self.layers.items(), table, strict=True):
            if nonfinite:
                layer.running.clear()
                raise NonFiniteLogits(
                    f"the gate of layer '{name}' gave NaN or infinite logits for {int(nonfinite)} tokens in this step.",
                    where=type(layer.router).__name__,
                    why="experts cannot be chosen from them; the weights of these tokens are NaN",
                    fix="look at the loss and the gradient norm of the steps before; lower the learning rate, clip "
                    "gradients, or add a z-loss",
                )
            expected = passes * layer.losses_per_pass
            if marked < expected and layer.trains_router:
                layer.running.clear()
                raise UnconsumedLoss(
                    f"layer '{name}' computed its aux loss {int(expected)} times in this step, but it was "
                    f"differentiated {int(marked)} times.",
                    where=f"{type(layer.router).__name__}, loss_mode={layer.loss_mode!r}",
                    why="without its loss this router never balances",
                    fix="add the losses of the layer's assignment to the training loss; or attach(..., "
                    "loss_mode='inject'), which also survives reentrant checkpointing; evaluate under model.eval()",
                )

    def _tell_plugins(self) -> None:
        from moerouters.registry import step_metrics_hook

        hook = step_metrics_hook()
        if hook is not None:
            hook({"step": self.steps, "loads": dict(self.loads), "dropped": dict(self.dropped)})


class _Stepped:
    """The post-step hook; a class, so that `attach` recognises its own among an optimizer's hooks."""

    def __init__(self, handle: Handle, index: int) -> None:
        self.handle = handle
        self.index = index

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.handle._stepped(self.index, optimizer)


def _attached(optimizers: list[Optimizer], layers: dict[str, RoutedModule]) -> Handle | None:
    """The Handle that already serves these optimizers and layers, if any."""
    hooks: Iterator[Any] = iter(optimizers[0]._optimizer_step_post_hooks.values())
    for hook in hooks:
        if isinstance(hook, _Stepped):
            handle = hook.handle
            same_layers = list(map(id, handle.layers.values())) == list(map(id, layers.values()))
            if same_layers and list(map(id, handle._optimizers)) == list(map(id, optimizers)):
                return handle
    return None


def _as_double(mark: Tensor | float, layer: RoutedModule) -> Tensor:
    return torch.as_tensor(mark, dtype=torch.float64, device=layer.running.probe.device)


def _plain_name(name: str) -> str:
    """Module name as the user wrote it, without what torch.compile, DDP and checkpoint wrappers put in between."""
    wrappers = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)
