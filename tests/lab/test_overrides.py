from typing import Any

import pytest

from moerouters.errors import ConfigError
from moerouters.lab.overrides import label, parse_changes, parse_routers, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("1e-3", 0.001),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("published", "published"),
        ('"8"', "8"),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_changes() -> None:
    assert parse_changes(["steps=100", " rate = 1e-3 ", "x=a=b"], where="--set") == {
        "steps": 100,
        "rate": 0.001,
        "x": "a=b",
    }


@pytest.mark.parametrize("item", ["steps", "=5", ""])
def test_unreadable_change(item: str) -> None:
    with pytest.raises(ConfigError, match="it is not name=value"):
        parse_changes([item], where="--set")


def test_change_given_twice() -> None:
    with pytest.raises(ConfigError, match="'steps' is given twice"):
        parse_changes(["steps=1", "steps=2"], where="--set")


def test_routers() -> None:
    assert parse_routers('topk, bip:iterations=8;variant=published ,x:levels=[1,2];name="a,b;c]"') == [
        ("topk", "topk", {}),
        ("bip:iterations=8;variant=published", "bip", {"iterations": 8, "variant": "published"}),
        ('x:levels=[1,2];name="a,b;c]"', "x", {"levels": [1, 2], "name": "a,b;c]"}),
    ]


@pytest.mark.parametrize("text", ["", " , "])
def test_no_router(text: str) -> None:
    with pytest.raises(ConfigError, match="--routers names no router"):
        parse_routers(text)


@pytest.mark.parametrize("config", [{}, {"alpha": 0.1}, {"a": [1, 2], "b": "text", "c": "8", "d": None, "e": True}])
def test_label_reads_back(config: dict[str, Any]) -> None:
    text = label("bip", config)
    assert parse_routers(text) == [(text, "bip", config)]
