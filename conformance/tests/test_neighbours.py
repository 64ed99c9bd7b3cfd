"""Which other settings of a router the suite tries."""

from pydantic import Field

from moerouters import Gating, RouterConfig, RouterSpec
from moerouters.errors import ShapeError
from moerouters.registry import API_VERSION
from moerouters_conformance.mutants.healthy import Plain
from moerouters_conformance.neighbours import other_configs
from moerouters_conformance.subject import Subject


class Settings(RouterConfig):
    width: int = Field(default=8, ge=1, description="Of the hidden states.")
    rate: float = Field(default=0.5, le=0.5, description="At most a half.")


class Wide(Plain):
    """Looks at hidden states of one width."""

    config: Settings

    def __init__(self, gating: Gating, config: Settings) -> None:
        super().__init__(gating, config)

    def adjust(self, scores_TE, ctx):
        if ctx.hidden_TD.shape[1] != self.config.width:
            raise ShapeError("another width.")
        return scores_TE


def test_what_does_not_fit_the_batches_is_no_neighbour() -> None:
    spec = RouterSpec(name="wide", api=API_VERSION, summary="Wide.", factory=Wide, config=Settings)
    assert list(other_configs(Subject.of(spec))) == [("rate", Settings(rate=0.25))]
