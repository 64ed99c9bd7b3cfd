"""Fails at import: the package it needs was renamed, removed or never installed."""

import flux_capacitor

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    return (RouterSpec(name="broken", summary="Never seen.", factory=flux_capacitor.Router, api="0.1"),)
