"""DispatcherSpec: how a plugin describes a dispatcher it offers beside its routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class DispatcherSpec(BaseModel):
    """One dispatcher of a plugin module. It has no API version of its own: the one of the module's routers counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9]*([-_][a-z0-9]+)*$")
    """Public name, unique over the plugins that a run loads."""
    summary: str = Field(min_length=1)
    """One line for listings."""
    factory: Callable[..., Any]
    """Called as factory(site=site) once per layer, where site is a moerouters.dispatch.site.Site (group, layer name,
    `name`); returns a moerouters.dispatch.base.Dispatcher."""
