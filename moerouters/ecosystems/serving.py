"""What the plug-ins for vLLM and SGLang share: a router in eval mode that an engine calls with logits.

Engines load every installed plug-in, in each of their processes, so nothing happens unless the environment asks:

    MOEROUTERS_SERVE          name of a router plug-in
    MOEROUTERS_SERVE_STATE    file of save_router_state, for routers that learn
    MOEROUTERS_SERVE_CONFIG   JSON object, the router's settings
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from moerouters.errors import ConfigError, TraceError, UnsupportedError

WITHOUT = "serve this model without a router plug-in"

if TYPE_CHECKING:
    from torch import Tensor

    from moerouters.capabilities import Capabilities
    from moerouters.gating import Gating
    from moerouters.router import Router


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the environment asks for."""

    router: str
    config: Mapping[str, Any] = field(default_factory=dict)
    state: str | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Request | None:
        """None if no router is asked for. Raises ConfigError for settings that are no JSON object."""
        router = environ.get("MOEROUTERS_SERVE")
        if not router:
            return None
        text = environ.get("MOEROUTERS_SERVE_CONFIG") or "{}"
        try:
            config = json.loads(text)
        except json.JSONDecodeError:
            config = None
        if not isinstance(config, dict):
            raise ConfigError(
                "the settings of the router are no JSON object.",
                where=f"MOEROUTERS_SERVE_CONFIG={text}",
                why="they are the fields of its config, by name",
                fix="for instance MOEROUTERS_SERVE_CONFIG='{\"p\": 0.4}'",
            )
        return cls(router=router, config=config, state=environ.get("MOEROUTERS_SERVE_STATE") or None)


def expect_servable(capabilities: Capabilities, *, name: str) -> None:
    """Raise UnsupportedError for a router that an engine cannot call with any batch it likes."""
    problems = {
        "its choice depends on which requests share the batch": not capabilities.eval_batch_invariant,
        "its forward talks to other ranks, and an engine's ranks do not all call it": capabilities.forward_collective,
    }
    for why, holds in problems.items():
        if holds:
            raise UnsupportedError(
                f"router '{name}' cannot serve in an engine.",
                where="MOEROUTERS_SERVE",
                why=why,
                fix="serve with a router that `moerouters info` calls batch-invariant in eval",
            )


class ServedRouter:
    """A router of one layer, as engines call a routing function."""

    def __init__(self, request: Request, gating: Gating, *, layer: int, correction_E: Tensor | None) -> None:
        """correction_E: the engine's tensor for the model's own bias; weights may be loaded into it later."""
        import torch

        import moerouters
        from moerouters.ecosystems.common import expect_slots

        with torch.device("cpu"):
            self.router = moerouters.build(request.router, gating, config=dict(request.config)).eval()
        expect_servable(self.router.capabilities, name=request.router)
        self.correction_E = correction_E
        names = load_layer(self.router, request, layer=layer)
        if "gating.correction_bias_E" in names:
            # What the engine loaded holds, beside the model's own bias, the one that the router has learned.
            self.correction_E = None
        with torch.no_grad():
            tried = self.router(torch.zeros(2, gating.num_experts))  # what it misses in an engine, it says now
        expect_slots(tried, self.router, where="MOEROUTERS_SERVE")

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """(float32 [T, K] weights, int32 [T, K] ids). topk and renormalize are those that the gating was made from."""
        import torch

        with torch.no_grad():
            gating = self.router.gating
            own = next(chain(self.router.buffers(), self.router.parameters()), None)
            if own is not None and own.device != gating_output.device:
                self.router.to(gating_output.device)
            if self.correction_E is not None:
                gating.correction_bias_E.copy_(self.correction_E)
            ids_TK, weights_TK = self.router(gating_output).to_slots()
            return weights_TK.to(torch.float32).contiguous(), ids_TK.to(torch.int32).contiguous()


def load_layer(router: Router, request: Request, *, layer: int) -> set[str]:
    """Copy the state of one layer out of the file into `router`; return the names that were there.

    Names of modules differ between the framework that trained and the engine, so layers are told by their number.
    Raises UnsupportedError for a router that learns and no file, TraceError for a file that does not fit.
    """
    import torch

    from moerouters.router_state import read_router_state

    own = {name: router.get_buffer(name) for name in router.state_names()} | dict(router.named_parameters())
    gating = router.gating
    models = {f"gating.{name}": gating.get_buffer(name) for name in gating.state_names()}
    if not own and request.state is None:
        return set()
    if request.state is None:
        raise UnsupportedError(
            f"router '{request.router}' chooses by what it has learned, and there is no file with it.",
            where=", ".join(own),
            why="without its state it is another router than the one that trained the model",
            fix="MOEROUTERS_SERVE_STATE=router_state.safetensors, as moerouters.save_router_state wrote it",
        )
    saved = read_router_state(request.state)
    found: dict[str, list[Tensor]] = {}
    for key, value in saved.items():
        if _layer_number(key) == layer:
            for name in own.keys() | models.keys():
                if key.endswith(f".{name}") and (name.startswith("gating.") or ".gating." not in key):
                    found.setdefault(name, []).append(value)
    targets = own | {name: models[name] for name in models.keys() & found.keys()}
    for name, target in targets.items():
        values = found.get(name, [])
        if len(values) != 1 or values[0].shape != target.shape:
            shapes = ", ".join(str(list(value.shape)) for value in values) or "nothing"
            raise TraceError(
                f"the saved router state does not fit layer {layer}.",
                where=request.state,
                why=f"for '{name}' of shape {list(target.shape)} it holds {shapes}",
                fix="pass the state of this model, trained with the same router",
            )
        with torch.no_grad():
            target.copy_(values[0])
    return set(found)


def layer_number(name: str) -> int:
    """The number of a layer from a module's name. Raises UnsupportedError if it has none."""
    number = _layer_number(name)
    if number is None:
        raise UnsupportedError(
            f"the MoE layer '{name}' has no number.",
            why="state is looked up by the number after 'layers.'",
            fix=WITHOUT,
        )
    return number


def _layer_number(name: str) -> int | None:
    match = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
    return None if match is None else int(match[1])
