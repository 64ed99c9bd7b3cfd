import json
from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner, Result

from moerouters.capabilities import Capabilities, MaxViolation
from moerouters.cli import app
from moerouters.cli.info import InfoReport
from moerouters.registry import Registry, RouterConfig, RouterSpec
from support.fake_plugins import PluginModules, entry, registry_of


class Rule(StrEnum):
    SIGN = "sign"
    ERROR = "error"


class Term(BaseModel):
    weight: float = 1.0


class RichConfig(RouterConfig):
    alpha: float = Field(gt=0, le=1, description="Weight of the [loss].")
    rule: Rule = Rule.SIGN
    clip: Literal["none", 3] = "none"
    limit: int | None = None
    steps: tuple[Annotated[int, Field(ge=0)], ...] = (1, 2)
    terms: dict[str, Term] = Field(default_factory=dict)
    anything: Any = None
    halved: float = Field(default_factory=lambda data: data["alpha"] / 2)


SPEC = RouterSpec(
    name="own",
    summary="Made here.",
    factory=dict,
    config=RichConfig,
    reference="arXiv:2502.15451",
    equation="b += u * e\ns + b",
    advice="For tests. Not for training.",
    api="0.1",
    capabilities=Capabilities(causal=False, balance=MaxViolation(at_most=0.1, after_steps=3)),
)


def run(monkeypatch: pytest.MonkeyPatch, registry: Registry, *arguments: str) -> Result:
    monkeypatch.setattr("moerouters.registry.default._registry", registry)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["info", *arguments])


def cells(result: Result) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.stdout.splitlines()]


def test_everything_about_one_router(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of()
    with registry.temporary(SPEC):
        result = run(monkeypatch, registry, "own")
    assert result.exit_code == 0
    assert result.stdout.startswith(
        "own: Made here.\n\n"
        "from       (temporary) 0, entry point own = builtins:dict (this process)\n"
        "api        0.1\n"
        "reference  arXiv:2502.15451\n"
        "\n"
        "    b += u * e\n"
        "    s + b\n"
        "\n"
        "For tests. Not for training.\n"
        "\n"
    )
    rows = cells(result)
    assert ["capability", "value"] in rows
    assert ["assignment", "slots"] in rows
    assert ["causal", "no"] in rows
    assert ["eval_batch_invariant", "yes"] in rows
    assert ["balance", "at_most 0.1, after_steps 3"] in rows
    assert ["dtypes", "bfloat16, float16, float32, float64"] in rows
    assert ["setting", "type", "default", "meaning"] in rows
    assert ["alpha", "float > 0 <= 1", "(required)", "Weight of the [loss]."] in rows
    assert ["rule", "'sign' | 'error'", "'sign'"] in rows
    assert ["clip", "'none' | 3", "'none'"] in rows
    assert ["limit", "int | None", "None"] in rows
    assert ["steps", "tuple[int, ...]", "(1, 2)"] in rows
    assert ["terms", "dict[str, Term]", "{}"] in rows
    assert ["anything", "Any", "None"] in rows
    assert ["halved", "float", "(computed)"] in rows


def test_router_without_settings(modules: PluginModules, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, registry_of(modules.router("bip")), "bip")
    assert "from       moerouters-bip 0.1.0, entry point bip = fake_bip (site-packages/fake_bip)\n" in result.stdout
    assert "reference" not in result.stdout
    assert ["balance", "-"] in cells(result)
    assert result.stdout.endswith("It has no settings.\n")


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of()
    with registry.temporary(SPEC):
        document = json.loads(run(monkeypatch, registry, "own", "--json").stdout)
    assert InfoReport.model_validate(document).model_dump(mode="json") == document
    assert document["schema_version"] == 1
    assert (document["name"], document["state"], document["api"]) == ("own", "ready", "0.1")
    assert document["capabilities"]["dtypes"] == ["bfloat16", "float16", "float32", "float64"]
    assert document["capabilities"]["balance"] == {"at_most": 0.1, "after_steps": 3}
    assert document["config"][0] == {
        "name": "alpha",
        "type": "float > 0 <= 1",
        "default": None,
        "description": "Weight of the [loss].",
    }


def test_unknown_router_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, registry_of(entry("bip")), "bipp")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "RouterNotFound: no router named 'bipp'.\n"
        "  cause  did you mean 'bip'? installed: bip, topk\n"
        "  fix    routers come from distributions with a 'moerouters' entry point; `moerouters plugins` lists them\n"
    )


def test_router_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, registry_of(entry("bip")), "bip")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("RouterUnavailable: router 'bip' is installed, but its plugin cannot be loaded.\n")
    assert "Traceback" not in result.stderr


def test_built_in_router() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["info", "topk"])
    assert result.exit_code == 0
    assert result.stdout.startswith("topk: ")
