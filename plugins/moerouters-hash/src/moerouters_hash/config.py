"""The settings of the router `hash`."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt

from moerouters import RouterConfig


class HashConfig(RouterConfig):
    """Which hash, and whether frequent tokens are spread by a table."""

    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Chooses the hash. Layers with other seeds split the vocabulary otherwise.",
    )
    frequencies: tuple[NonNegativeInt, ...] = Field(
        default=(),
        repr=False,
        description="How often each vocabulary id occurs, counted on a sample of the corpus. With it the balanced "
        "hash: ids by falling frequency go to the experts with the least so far. Ids that never occur, and those past "
        "the end of this list, go by the plain hash.",
    )
