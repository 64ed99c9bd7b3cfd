"""moerouters: one router interface for mixture-of-experts models - any balancer, any model, any parallelism.

Names are imported when they are used: listing plug-ins and asking for help must not wait for torch (2 to 3 s).
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moerouters.capabilities import AssignmentKind, Capabilities, LoadScope, StateAlgebra
    from moerouters.capacity import limit_capacity
    from moerouters.gating import Gating
    from moerouters.handle import Handle, attach
    from moerouters.layer import MoELayer, MoEOutput
    from moerouters.registry import API_VERSION, RouterConfig, RouterSpec, available, build, hookimpl, info
    from moerouters.router import Router
    from moerouters.router_state import load_router_state, save_router_state
    from moerouters.sharding import expert_parameters, shard_experts
    from moerouters.swapping import SwapRecord, swap, unswap
    from moerouters.tape import Tape, record, replay
    from moerouters.trace import RoutingTrace
    from moerouters.types import Assignment, RouteContext, Routing, Selection

logging.getLogger("moerouters").addHandler(logging.NullHandler())

__version__ = "0.1.0"

_HOMES = {
    "API_VERSION": "registry",
    "Assignment": "types",
    "AssignmentKind": "capabilities",
    "Capabilities": "capabilities",
    "Gating": "gating",
    "Handle": "handle",
    "LoadScope": "capabilities",
    "MoELayer": "layer",
    "MoEOutput": "layer",
    "RouteContext": "types",
    "Router": "router",
    "RouterConfig": "registry",
    "RouterSpec": "registry",
    "Routing": "types",
    "RoutingTrace": "trace",
    "Selection": "types",
    "StateAlgebra": "capabilities",
    "SwapRecord": "swapping",
    "Tape": "tape",
    "attach": "handle",
    "available": "registry",
    "build": "registry",
    "expert_parameters": "sharding",
    "hookimpl": "registry",
    "info": "registry",
    "limit_capacity": "capacity",
    "load_router_state": "router_state",
    "record": "tape",
    "replay": "tape",
    "save_router_state": "router_state",
    "shard_experts": "sharding",
    "swap": "swapping",
    "unswap": "swapping",
}

__all__ = [
    "API_VERSION",
    "Assignment",
    "AssignmentKind",
    "Capabilities",
    "Gating",
    "Handle",
    "LoadScope",
    "MoELayer",
    "MoEOutput",
    "RouteContext",
    "Router",
    "RouterConfig",
    "RouterSpec",
    "Routing",
    "RoutingTrace",
    "Selection",
    "StateAlgebra",
    "SwapRecord",
    "Tape",
    "attach",
    "available",
    "build",
    "expert_parameters",
    "hookimpl",
    "info",
    "limit_capacity",
    "load_router_state",
    "record",
    "replay",
    "save_router_state",
    "shard_experts",
    "swap",
    "unswap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moerouters' has no attribute {name!r}")
    value = getattr(import_module(f"moerouters.{_HOMES[name]}"), name)
    globals()[name] = value  # the next look-up is a plain one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
