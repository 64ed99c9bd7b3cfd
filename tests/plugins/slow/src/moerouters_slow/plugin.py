"""Imports something heavy at module level."""

import time

from moerouters import RouterSpec, hookimpl

time.sleep(2)

from moerouters_slow import marker  # noqa: E402  (a test looks for it among the loaded modules)


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    return (RouterSpec(name="slow", summary=marker.SUMMARY, factory=dict, api="0.1"),)
