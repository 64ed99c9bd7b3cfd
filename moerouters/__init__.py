"""moerouters: one router interface for mixture-of-experts models - any balancer, any model, any parallelism."""

import logging

from moerouters.attach import Handle, attach
from moerouters.capabilities import AssignmentKind, Capabilities, LoadScope, StateAlgebra
from moerouters.capacity import limit_capacity
from moerouters.gating import Gating
from moerouters.layer import MoELayer, MoEOutput
from moerouters.registry import API_VERSION, RouterConfig, RouterSpec, available, build, hookimpl, info
from moerouters.router import Router
from moerouters.router_state import load_router_state, save_router_state
from moerouters.trace import RoutingTrace, record, replay
from moerouters.types import Assignment, RouteContext, Routing, Selection

logging.getLogger("moerouters").addHandler(logging.NullHandler())

__version__ = "0.1.0"

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
    "attach",
    "available",
    "build",
    "hookimpl",
    "info",
    "limit_capacity",
    "load_router_state",
    "record",
    "replay",
    "save_router_state",
]
