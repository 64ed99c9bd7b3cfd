"""StockRouter: a router module of somebody else's model, its tensors by name, and a way to call it on other tensors."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

_BLOCK = "block."


class Stock:
    """A router as it was found: the module, and the block around it, which some models keep the router's bias on.

    Tensors go by their name inside the module; `block.` comes before the name of one that the block hands in as an
    argument (MiniMax-M2, LFM2, AFMoE keep their correction bias there).
    """

    def __init__(self, module: nn.Module, block: nn.Module, *, handed_in: Mapping[str, Tensor] | None = None) -> None:
        """`handed_in` replaces tensors of the block."""
        self.module = module
        self.block = block
        self._handed_in = dict(handed_in or {})

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name, as it is now: FSDP and casts put others in its place."""
        if "." not in name:  # nearly every one, on the path of every decoded token
            return getattr(self.module, name)  # type: ignore[no-any-return]
        if name in self._handed_in and name.startswith(_BLOCK):
            return self._handed_in[name]
        owner: object = self.block if name.startswith(_BLOCK) else self.module
        for part in name.removeprefix(_BLOCK).split("."):
            owner = getattr(owner, part)
        assert isinstance(owner, Tensor)
        return owner

    def own_names(self) -> list[str]:
        """Names of the module's parameters and buffers."""
        return [name for name, _ in (*self.module.named_parameters(), *self.module.named_buffers())]

    def handed_in(self) -> list[str]:
        """Names of what the block hands in beside hidden states. Raises TypeError where it has to be something else."""
        names = []
        forward = inspect.signature(type(self.module).forward)
        for parameter in list(forward.parameters.values())[2:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if isinstance(getattr(self.block, parameter.name, None), Tensor):
                names.append(_BLOCK + parameter.name)
            elif parameter.default is parameter.empty:
                raise TypeError(f"it needs `{parameter.name}` beside the hidden states")
            else:
                break
        return names

    def tensors(self) -> dict[str, Tensor]:
        """Everything the router computes with, detached."""
        return {name: self(name).detach() for name in (*self.own_names(), *self.handed_in())}

    def run(self, tensors: Mapping[str, Tensor], hidden_TD: Tensor) -> object:
        """What the stock forward returns in eval mode for hidden states and these tensors. The module stays as is."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BLOCK)}
        handed_in = tuple(tensor for name, tensor in tensors.items() if name.startswith(_BLOCK))
        with torch.no_grad(), undisturbed(self.module):
            try:
                return functional_call(self.module, own, (hidden_TD, *handed_in))
            except (ValueError, IndexError):  # a gate that flattens for itself may insist on [B, S, D]
                return functional_call(self.module, own, (hidden_TD.unsqueeze(0), *handed_in))


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """The module in eval mode and without hooks, which would take our probes for the user's tokens; as it was after."""
    before = [(each, each.training, each._forward_pre_hooks, each._forward_hooks) for each in module.modules()]
    module.eval()
    for each, *_ in before:
        each._forward_pre_hooks, each._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for each, training, pre_hooks, hooks in before:
            each.training, each._forward_pre_hooks, each._forward_hooks = training, pre_hooks, hooks
