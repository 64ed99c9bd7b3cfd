"""The public names and their signatures, pinned: a change here is a change of the API.

To accept one, run this file: `python tests/test_public_api.py` from the root writes the list anew.
"""

import inspect
from enum import Enum
from pathlib import Path

from pydantic import BaseModel

import moerouters

GOLDEN = Path(__file__).parent / "golden" / "public_api.txt"


def describe() -> str:
    """One line per public name and per public member of a public class."""
    lines = []
    for name in sorted(moerouters.__all__):
        thing = getattr(moerouters, name)
        if inspect.isclass(thing):
            lines.append(f"class {name}{_signature(thing)}")
            lines += [f"  {line}" for line in sorted(_members(thing))]
        elif inspect.isfunction(thing):
            lines.append(f"def {name}{_signature(thing)}")
        else:
            lines.append(f"{name}: {type(thing).__name__}")
    return "\n".join(lines) + "\n"


def _members(cls: type) -> list[str]:
    if issubclass(cls, Enum):
        return [f"{member.name} = {member.value!r}" for member in cls]
    lines = []
    for base in cls.__mro__:
        if not base.__module__.startswith("moerouters"):
            continue
        for name, member in vars(base).items():
            if name.startswith("_") or (issubclass(cls, BaseModel) and name == "model_config"):
                continue
            if isinstance(member, property):
                lines.append(f"{name} -> property")
            elif isinstance(member, classmethod | staticmethod):
                lines.append(f"{type(member).__name__} {name}{_signature(member.__func__)}")
            elif inspect.isfunction(member):
                lines.append(f"def {name}{_signature(member)}")
    return list(dict.fromkeys(lines))


def _signature(thing: object) -> str:
    """Parameters without annotations, which Python versions print differently."""
    if inspect.isclass(thing) and issubclass(thing, Enum):
        return ""
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else _Default(p.default))
        for p in inspect.signature(thing).parameters.values()  # type: ignore[arg-type]
    ]
    return str(inspect.Signature(parameters))


class _Default:
    """A default value as it is written, not as an object prints itself."""

    def __init__(self, value: object) -> None:
        plain = value is None or isinstance(value, bool | int | float | str)
        self.text = repr(value) if plain and not isinstance(value, Enum) else "..."

    def __repr__(self) -> str:
        return self.text


def test_the_public_api_is_pinned() -> None:
    assert describe() == GOLDEN.read_text(encoding="utf-8")


def test_all_is_sorted_and_complete() -> None:
    assert moerouters.__all__ == sorted(moerouters.__all__)
    assert all(hasattr(moerouters, name) for name in moerouters.__all__)


def test_the_library_logs_only_where_asked() -> None:
    import logging

    assert [type(handler) for handler in logging.getLogger("moerouters").handlers] == [logging.NullHandler]


if __name__ == "__main__":
    GOLDEN.write_text(describe(), encoding="utf-8")
