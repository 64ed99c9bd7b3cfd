import importlib
import sys

import pytest
import typer
from typer.testing import CliRunner

from moerouters.cli import app, main
from moerouters.cli.group import COMMANDS
from moerouters.errors import ConfigError, MoeroutersError, RouterNotFound, RouterUnavailable
from support.fake_plugins import entry, registry_of


def test_help_lists_the_commands_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMANDS:
        monkeypatch.delitem(sys.modules, f"moerouters.cli.{name}", raising=False)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    width = max(map(len, COMMANDS)) + 2
    for name, summary in COMMANDS.items():
        assert f"{name:<{width}}{summary}" in result.output  # whole: a longer line would be cut
        assert f"moerouters.cli.{name}" not in sys.modules


@pytest.mark.parametrize("name", ["plugins", "info"])
def test_line_in_the_list_is_the_commands_own(name: str) -> None:
    function = getattr(importlib.import_module(f"moerouters.cli.{name}"), name)
    assert function.__doc__ == COMMANDS[name]
    assert COMMANDS[name] in CliRunner().invoke(app, [name, "--help"]).output


def test_without_a_command_there_is_help() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "Usage: moerouters" in result.output


def test_unknown_command_gets_a_suggestion() -> None:
    result = CliRunner().invoke(app, ["plugin"])
    assert result.exit_code == 2
    assert "No such command 'plugin'. Did you mean 'plugins'" in result.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RouterNotFound("no router.", fix="spell it"), 2),
        (ConfigError("bad config.", fix="spell it"), 2),
        (RouterUnavailable("not to be had.", fix="spell it"), 3),
        (MoeroutersError("something else.", fix="spell it"), 1),
    ],
)
def test_our_errors_are_messages_and_exit_statuses(
    monkeypatch: pytest.MonkeyPatch, error: MoeroutersError, status: int
) -> None:
    def failing() -> None:
        raise error

    monkeypatch.setattr("moerouters.cli.plugins.plugins", failing)
    result = CliRunner().invoke(app, ["plugins"])
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr == f"{type(error).__name__}: {error}\n"


def test_other_errors_are_bugs_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("moerouters.cli.plugins.plugins", failing)
    assert isinstance(CliRunner().invoke(app, ["plugins"]).exception, ZeroDivisionError)


def test_main_is_the_console_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(name: str) -> None:
        typer.echo(f"hello {name}")

    monkeypatch.setattr("moerouters.cli.info.info", answer)
    monkeypatch.setattr(sys, "argv", ["moerouters", "info", "bip"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert capsys.readouterr().out == "hello bip\n"


def test_no_plugins_overrides_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(entry("twin", "a"), entry("twin", "b"), entry("bip"), MOEROUTERS_PLUGINS="bip,typo")
    monkeypatch.setattr("moerouters.registry.default._registry", registry)
    assert CliRunner().invoke(app, ["plugins"]).exit_code == 2
    assert CliRunner().invoke(app, ["--no-plugins", "plugins"]).exit_code == 0
    assert registry.available() == ("topk",)
