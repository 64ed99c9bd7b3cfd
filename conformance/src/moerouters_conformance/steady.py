"""The same examples in every process.

`derandomize` fixes the seed by the source of the property. But now and then hypothesis draws a number that stands in
the source of some local module that happens to be imported. A check would see other inputs under pytest than on the
command line, and a rule could be kept in one place and broken in the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis.internal.conjecture import providers


@contextmanager
def steady_examples() -> Iterator[None]:
    """Draw no constants from modules. hypothesis has no switch for it; a version built otherwise is left as it is."""
    if not all(hasattr(providers, name) for name in ("_get_local_constants", "CONSTANTS_CACHE", "GLOBAL_CONSTANTS")):
        yield
        return
    before, cache = providers._get_local_constants, providers.CONSTANTS_CACHE
    none = type(providers.GLOBAL_CONSTANTS)()
    providers._get_local_constants = lambda: none
    providers.CONSTANTS_CACHE = type(cache)(1024)  # what it holds was found with the modules of this process
    try:
        yield
    finally:
        providers._get_local_constants = before
        providers.CONSTANTS_CACHE = cache
