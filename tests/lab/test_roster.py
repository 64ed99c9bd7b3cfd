from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from moerouters import registry
from moerouters.builtin import TopKRouter
from moerouters.errors import ConfigError, RouterNotFound, RouterUnavailable
from moerouters.lab.roster import default_roster, named_roster
from moerouters.registry import Registry, RouterConfig, RouterSpec
from support.fake_plugins import entry, plugin_modules
from support.lab import SMALL


class Config(RouterConfig):
    alpha: float = Field(default=0.01, ge=0)


class WithAlpha(TopKRouter):
    """Refuses alpha 7 like a router that does not fit the gating, and alpha 8 like one with a bug."""

    def __init__(self, gating: Any, config: Config) -> None:
        super().__init__(gating)
        if config.alpha == 7:
            raise ConfigError("no gating has seven of them.")
        if config.alpha == 8:
            raise KeyError("eight")


def spec(name: str, *baselines: dict[str, Any]) -> RouterSpec:
    return RouterSpec(name=name, summary="s", factory=WithAlpha, config=Config, api="0.1", baselines=baselines)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry with topk, a plugin that breaks at import, and whatever a test adds."""
    builtin = entry("topk", "moerouters.builtin", distribution="moerouters")
    with plugin_modules(tmp_path) as modules:
        modules.write("fake_broken", "import a_module_that_nobody_has")
        own = Registry(discover=lambda: (entry("broken"), builtin), environ={})
        monkeypatch.setattr("moerouters.registry.default._registry", own)
        yield own


def test_named_routers_keep_the_text_that_was_typed(fresh: Registry) -> None:
    with registry.temporary(spec("loss")):
        entrants = named_roster("topk,loss:alpha=0.5,loss", SMALL)
    assert [(e.label, e.name, e.overrides) for e in entrants] == [
        ("topk", "topk", {}),
        ("loss:alpha=0.5", "loss", {"alpha": 0.5}),
        ("loss", "loss", {}),
    ]


def test_default_is_everything_and_its_baselines(fresh: Registry) -> None:
    with ExitStack() as stack:
        stack.enter_context(registry.temporary(spec("loss", {}, {"alpha": 0.1}, {"alpha": 0.1}, {"alpha": 7})))
        entrants, skipped = default_roster(SMALL)
        assert isinstance(entrants[1].build(SMALL), WithAlpha)
    assert [e.label for e in entrants] == ["loss", "loss:alpha=0.1", "topk"]
    assert [item.label for item in skipped] == ["broken", "loss:alpha=7"]
    assert "a_module_that_nobody_has" in skipped[0].reason
    assert "no gating has seven" in skipped[1].reason


def test_a_gating_that_belongs_to_the_method_goes_before_the_settings(fresh: Registry) -> None:
    method = spec("relus").model_copy(update={"gating": {"score": "relu", "renormalize": False}})
    with registry.temporary(method):
        (entrant,) = named_roster("relus", SMALL)
        gating = entrant.build(SMALL).gating.settings
    assert (gating.score, gating.renormalize) == ("relu", False)
    assert (gating.num_experts, gating.scale) == (SMALL.num_experts, SMALL.scale)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("topc", RouterNotFound, "did you mean 'topk'"),
        ("topk,broken", RouterUnavailable, "a_module_that_nobody_has"),
        ("topk,topk", ConfigError, "'topk' is named twice"),
        ("loss:alpa=1", ConfigError, "did you mean 'alpha'"),
        ("loss:alpha=-1", ConfigError, "alpha: input should be greater than or equal to 0"),
        ("loss:alpha=7", ConfigError, "no gating has seven"),
        ("loss:alpha=8", RouterUnavailable, r"(?s)router 'loss:alpha=8' cannot be built.*KeyError: 'eight'"),
    ],
)
def test_a_named_router_that_cannot_run_is_fatal(
    fresh: Registry, text: str, error: type[Exception], message: str
) -> None:
    with registry.temporary(spec("loss")), pytest.raises(error, match=message):
        named_roster(text, SMALL)
