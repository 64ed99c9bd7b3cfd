"""From what the user wrote to a router's config record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from moerouters.errors import ConfigError
from moerouters.registry.spec import RouterConfig, RouterSpec


def make_config(spec: RouterSpec, config: Mapping[str, Any] | RouterConfig | None) -> RouterConfig:
    """Return the config record of a router: of a mapping, a record of the right class, or None for the defaults.

    Raises:
        ConfigError: one line per field, with the nearest known name for an unknown one.
    """
    if isinstance(config, spec.config):
        return config
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(
            f"router {spec.name!r} got a config of the wrong kind.",
            why=f"it takes {_path(spec.config)} or a mapping of its fields, not {_path(type(config))}",
            fix=_fix(spec),
        )
    try:
        return spec.config.model_validate(dict(config or {}))
    except ValidationError as error:
        raise ConfigError(
            f"router {spec.name!r} got a bad config.",
            where=_path(spec.config),
            why="\n".join(field_errors(error, known=spec.config.model_fields)),
            fix=_fix(spec),
        ) from error


def field_errors(error: ValidationError, *, known: Collection[str] = ()) -> list[str]:
    """Return one line per field of a pydantic error, without its addresses and type codes."""
    return [_line(dict(details), known) for details in error.errors(include_url=False)]


def _line(details: dict[str, Any], known: Collection[str]) -> str:
    field = ".".join(str(part) for part in details["loc"])
    message = str(details["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    match details["type"]:
        case "extra_forbidden":
            close = get_close_matches(field, known, n=1)
            return f"{field}: unknown field" + (f"; did you mean {close[0]!r}?" if close else "")
        case "missing":
            return f"{field}: required"
    if not field:
        return message
    return f"{field}: {message[:1].lower()}{message[1:]} (got {_shortened(details['input'])})"


def _shortened(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _path(config: type) -> str:
    return f"{config.__module__}.{config.__qualname__}"


def _fix(spec: RouterSpec) -> str:
    return f"`moerouters info {spec.name}` lists its fields"
