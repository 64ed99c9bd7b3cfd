from types import MappingProxyType
from typing import Any

import pytest
from pydantic import BaseModel, Field, model_validator

from moerouters.errors import ConfigError
from moerouters.registry.configs import make_config
from moerouters.registry.spec import RouterConfig, RouterSpec


class Term(BaseModel):
    weight: float = Field(ge=0)


class BipConfig(RouterConfig):
    dual_steps: int = Field(default=4, gt=0)
    rate: float = 0.5
    terms: tuple[Term, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> "BipConfig":
        if self.rate > self.dual_steps:
            raise ValueError("rate exceeds dual_steps")
        return self


class NeedyConfig(RouterConfig):
    alpha: float


class OtherConfig(RouterConfig):
    pass


def spec(config: type[RouterConfig]) -> RouterSpec:
    return RouterSpec(name="bip", summary="Is bip.", factory=dict, config=config, api="0.1")


def message(config: Any, kind: type[RouterConfig] = BipConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(spec(kind), config)
    return str(caught.value)


def test_none_means_the_defaults() -> None:
    assert make_config(spec(BipConfig), None) == BipConfig()
    assert make_config(spec(RouterConfig), None) == RouterConfig()


def test_mapping() -> None:
    assert make_config(spec(BipConfig), {"dual_steps": 2}) == BipConfig(dual_steps=2)
    assert make_config(spec(BipConfig), MappingProxyType({"dual_steps": 2})) == BipConfig(dual_steps=2)


def test_record_is_used_as_it_is() -> None:
    config = BipConfig(rate=0.25)
    assert make_config(spec(BipConfig), config) is config


@pytest.mark.parametrize(("wrong", "kind"), [(OtherConfig(), f"{__name__}.OtherConfig"), (3, "builtins.int")])
def test_wrong_kind(wrong: object, kind: str) -> None:
    assert message(wrong) == (
        "router 'bip' got a config of the wrong kind.\n"
        f"  cause  it takes {__name__}.BipConfig or a mapping of its fields, not {kind}\n"
        "  fix    `moerouters info bip` lists its fields"
    )


def test_one_line_for_each_field() -> None:
    assert message({"dual_stps": 3, "dual_steps": 0, "rate": "fast", "terms": [{"weight": -1}]}) == (
        "router 'bip' got a bad config.\n"
        f"  from   {__name__}.BipConfig\n"
        "  cause  dual_steps: input should be greater than 0 (got 0)\n"
        "         rate: input should be a valid number, unable to parse string as a number (got 'fast')\n"
        "         terms.0.weight: input should be greater than or equal to 0 (got -1)\n"
        "         dual_stps: unknown field; did you mean 'dual_steps'?\n"
        "  fix    `moerouters info bip` lists its fields"
    )


def test_unknown_field_with_nothing_near() -> None:
    assert "  cause  zzz: unknown field\n" in message({"zzz": 3})


def test_missing_field() -> None:
    assert "  cause  alpha: required\n" in message(None, NeedyConfig)


def test_rule_over_several_fields() -> None:
    assert "  cause  rate exceeds dual_steps\n" in message({"rate": 9.0})


def test_long_input_is_cut() -> None:
    assert f"(got '{'x' * 56}...)" in message({"rate": "x" * 500})


def test_pydantic_error_is_chained_and_not_quoted() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(spec(BipConfig), {"rate": "fast"})
    assert "http" not in str(caught.value)
    assert type(caught.value.__cause__).__name__ == "ValidationError"
