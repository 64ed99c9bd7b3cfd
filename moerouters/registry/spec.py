"""RouterSpec: how a plugin describes a router it offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from moerouters.capabilities import Capabilities

API_VERSION = "0.1"
"""Version of the plugin contract, MAJOR.MINOR. 0.x promises nothing across minors."""


class RouterConfig(BaseModel):
    """Base of every router's own settings: frozen, closed, validated. A router without settings uses it as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class RouterSpec(BaseModel):
    """One router that a plugin offers. Returned by the hook `moerouters_routers`, never registered by a call."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9]*([-_][a-z0-9]+)*$")
    """Public name; equals the name of the entry point that leads to it."""
    summary: str = Field(min_length=1)
    """One line for listings."""
    factory: Callable[..., Any]
    """Called as factory(gating, config); returns a `moerouters.Router`."""
    config: type[RouterConfig] = RouterConfig
    capabilities: Capabilities = Capabilities()
    reference: str = ""
    """Paper or page with the equations."""
    equation: str = ""
    """What it does to scores, state or loss, in a few lines of plain text."""
    advice: str = ""
    """When to use it, and when not; a sentence each."""
    api: str = Field(pattern=r"^\d+\.\d+$")
    """Plugin API it was written for, as a literal: the host's own API_VERSION would always seem to fit."""
    gating: Mapping[str, Any] = {}
    """Settings of `Gating` that belong to the method, for a model that is built anew for it (`moerouters compare`)."""
    baselines: tuple[Mapping[str, Any], ...] = ()
    """Further settings, beside the defaults, that a comparison should run too (overrides of config fields)."""
