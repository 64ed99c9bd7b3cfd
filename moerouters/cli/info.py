"""`moerouters info NAME`: one router, imported and described."""

from __future__ import annotations

import types
from enum import Enum
from textwrap import indent
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from moerouters import registry
from moerouters.cli.output import plugin_output_to_stderr, print_table


class ConfigField(BaseModel):
    """One setting of a router. Type and default are texts for reading, as one would write them in Python."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    type: str
    default: str | None  # None: the field is required
    description: str


class InfoReport(BaseModel):
    """What `moerouters info NAME --json` prints. A field changes its meaning only with a new `schema_version`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    name: str
    state: registry.PluginState
    summary: str
    reference: str
    equation: str = ""
    advice: str = ""
    api: str
    capabilities: dict[str, Any]
    config: tuple[ConfigField, ...]
    provenance: registry.Provenance


def info(
    name: Annotated[str, typer.Argument(help="Public name of the router, see `moerouters plugins`.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document with a versioned schema.")] = False,
) -> None:
    """Show what one router promises, and its settings."""
    with plugin_output_to_stderr():
        report = _report(registry.info(name))
    if json:
        typer.echo(report.model_dump_json(indent=2))
        return
    typer.echo(f"{report.name}: {report.summary}\n")
    provenance = report.provenance
    lines = {"from": str(provenance), "commit": provenance.commit, "api": report.api, "reference": report.reference}
    for label, text in lines.items():
        if text:
            typer.echo(f"{label:<10} {text}")
    typer.echo()
    for text in (indent(report.equation.rstrip(), "    "), report.advice):
        if text:
            typer.echo(f"{text}\n")
    print_table(("capability", "value"), [(key, _text(value)) for key, value in report.capabilities.items()])
    if report.config:
        rows = [
            (field.name, field.type, "(required)" if field.default is None else field.default, field.description)
            for field in report.config
        ]
        print_table(("setting", "type", "default", "meaning"), rows)
    else:
        typer.echo("It has no settings.")


def _report(found: registry.RouterInfo) -> InfoReport:
    spec = found.spec
    capabilities = spec.capabilities.model_dump(mode="json")
    return InfoReport(
        name=spec.name,
        state=found.state,
        summary=spec.summary,
        reference=spec.reference,
        equation=spec.equation,
        advice=spec.advice,
        api=spec.api,
        # A set has another order in every process; a report should not.
        capabilities={key: sorted(value) if isinstance(value, list) else value for key, value in capabilities.items()},
        config=tuple(_field(key, field) for key, field in spec.config.model_fields.items()),
        provenance=found.provenance,
    )


def _field(name: str, field: FieldInfo) -> ConfigField:
    bounds = [_bound(rule) for rule in field.metadata]
    return ConfigField(
        name=name,
        type=" ".join([_type(field.annotation), *filter(None, bounds)]),
        default=None if field.is_required() else _default(field),
        description=field.description or "",
    )


def _default(field: FieldInfo) -> str:
    try:
        default = field.get_default(call_default_factory=True)
    except ValueError:  # its factory looks at the values of other fields
        return "(computed)"
    return repr(default.value if isinstance(default, Enum) else default)


def _type(annotation: Any) -> str:
    """An annotation as one writes it, without module names; an enum by the values that a config file has."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(repr(argument) for argument in arguments)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_type(argument) for argument in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type(argument) for argument in arguments)}]"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(repr(member.value) for member in annotation)
    special = {type(None): "None", Ellipsis: "..."}
    return special.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _bound(rule: Any) -> str:
    """A numeric bound of a field such as `>= 0`; other rules show in the message that they raise."""
    signs = {"Gt": ("gt", ">"), "Ge": ("ge", ">="), "Lt": ("lt", "<"), "Le": ("le", "<=")}
    attribute, sign = signs.get(type(rule).__name__, ("", ""))
    return f"{sign} {getattr(rule, attribute)}" if attribute else ""


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(value)
        case dict():
            return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
