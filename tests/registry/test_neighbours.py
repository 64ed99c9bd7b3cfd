"""Plugins that misbehave, really installed beside the core: none of them costs anything until it is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.environments import Environment, copy_source, make_environment
from support.workspace import CORE

FIXTURES = Path(__file__).parents[1] / "plugins"

# One interpreter answers every question, because each start imports torch.
REPORT = """
import contextlib, io, json, sys, time
import moerouters
from moerouters import registry
from moerouters.cli import app

def plugin_modules():
    return sorted(name for name in sys.modules if name.startswith("moerouters_"))

def ask(function, *arguments):
    try:
        return {"answer": function(*arguments)}
    except moerouters.errors.MoeroutersError as error:
        return {"type": type(error).__name__, "text": str(error), "cause": type(error.__cause__).__name__}

def command(*arguments):
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(list(arguments), prog_name="moerouters")
        except SystemExit as end:
            status = end.code
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}

gating = moerouters.Gating.softmax(num_experts=4, top_k=2)
report = {"after_import": plugin_modules()}
started = time.perf_counter()
report["available"] = moerouters.available()
report["topk"] = type(moerouters.build("topk", gating)).__name__
report["seconds"] = time.perf_counter() - started
report["after_topk"] = plugin_modules()
config = moerouters.build("good", gating, config={"rate": 0.25})[1]
report["good"] = {"rate": config.rate, "modules": plugin_modules()}
registry.step_metrics_hook()({"step": 3})
report["heard"] = [dict(metrics) for metrics in sys.modules["moerouters_good.plugin"].HEARD]
report["dispatchers"] = list(registry.dispatchers())
names = ("broken", "exits", "future", "misspelt", "twin", "godo")
report["errors"] = {name: ask(moerouters.build, name, gating) for name in names}
report["after_errors"] = plugin_modules()
report["info"] = {name: command("info", name) for name in ("good", "broken", "godo")}
report["import"] = command("plugins", "--import", "--json")
report["after_all"] = plugin_modules()
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The core beside all fixture distributions."""
    root = tmp_path_factory.mktemp("neighbours")
    core = root / "source"
    copy_source(CORE.package, core / CORE.import_name)
    for path in CORE.folder.iterdir():
        if path.is_file():
            shutil.copy(path, core)
    environment = make_environment(root / "environment")
    environment.install(core, *sorted(path.parent for path in FIXTURES.glob("*/pyproject.toml")))
    return environment


@pytest.fixture(scope="module")
def report(environment: Environment) -> Any:
    text = environment.run("-c", REPORT).stdout
    return json.loads(text)


def location(report: Any, package: str) -> str:
    """Where the package lies, by the listing; the folder itself is a temporary one."""
    rows = json.loads(report["import"]["out"])["plugins"]
    (found,) = {row["provenance"]["location"] for row in rows if Path(row["provenance"]["location"]).name == package}
    assert Path(found).is_dir()
    return str(found)


def test_importing_the_core_imports_no_plugin(report: Any) -> None:
    assert report["after_import"] == []


def test_neighbours_cost_nothing_until_they_are_named(report: Any) -> None:
    assert report["available"] == ["broken", "exits", "future", "good", "good-louder", "misspelt", "slow", "topk"]
    assert report["topk"] == "TopKRouter"  # and not the impostor
    assert report["after_topk"] == []
    assert report["seconds"] < 2.0  # which importing the slow one alone would take


def test_only_what_is_named_is_imported(report: Any) -> None:
    assert report["good"] == {"rate": 0.25, "modules": ["moerouters_good", "moerouters_good.plugin"]}
    packages = {name.partition(".")[0] for name in report["after_errors"]}
    named = {"moerouters_good", "moerouters_broken", "moerouters_exits", "moerouters_future", "moerouters_misspelt"}
    assert packages == named
    assert "moerouters_slow.marker" in report["after_all"]


def test_every_hook_of_the_named_plugin_is_served(report: Any) -> None:
    assert report["heard"] == [{"step": 3}]
    assert report["dispatchers"] == ["pigeon"]


@pytest.mark.parametrize(
    ("name", "what", "cause", "original"),
    [
        (
            "broken",
            "is installed, but its plugin cannot be loaded.",
            "ModuleNotFoundError: No module named 'flux_capacitor'",
            "ModuleNotFoundError",
        ),
        (
            "exits",
            "is installed, but its plugin cannot be loaded.",
            "SystemExit: usage: moerouters-exits FILE",
            "SystemExit",
        ),
        (
            "misspelt",
            "is installed, but its plugin cannot be loaded.",
            "unknown hook 'moerouters_router'; did you mean 'moerouters_routers'?",
            "PluginValidationError",
        ),
    ],
)
def test_named_plugin_that_fails(report: Any, name: str, what: str, cause: str, original: str) -> None:
    assert report["errors"][name] == {
        "type": "RouterUnavailable",
        "text": (
            f"router {name!r} {what}\n"
            f"  from   moerouters-{name} 0.1.0, entry point {name} = moerouters_{name}.plugin"
            f" ({location(report, f'moerouters_{name}')})\n"
            f"  cause  {cause}\n"
            f"  fix    `pip install -U moerouters-{name}`, or `pip uninstall moerouters-{name}`\n"
            f"         or run without it: MOEROUTERS_DISABLE={name}"
        ),
        "cause": original,
    }


def test_plugin_of_a_later_api(report: Any) -> None:
    assert report["errors"]["future"]["text"] == (
        "router 'future' does not fit this moerouters.\n"
        "  from   moerouters-future 0.1.0, entry point future = moerouters_future.plugin"
        f" ({location(report, 'moerouters_future')})\n"
        f"  cause  it was written for plugin API 9.0; this is moerouters {CORE.version} with API 0.1\n"
        "  fix    `pip install -U moerouters`\n"
        "         or run without it: MOEROUTERS_DISABLE=future"
    )


def test_name_claimed_twice(report: Any) -> None:
    assert report["errors"]["twin"]["text"] == (
        "router 'twin' is claimed more than once, and nobody wins.\n"
        "  from   moerouters-twin-a 0.1.0, entry point twin = moerouters_twin_a.plugin"
        f" ({location(report, 'moerouters_twin_a')})\n"
        "         moerouters-twin-b 0.1.0, entry point twin = moerouters_twin_b.plugin"
        f" ({location(report, 'moerouters_twin_b')})\n"
        "  cause  one name stands for one router, and moerouters-twin-a and moerouters-twin-b claim it\n"
        "  fix    pick one: MOEROUTERS_DISABLE=twin@moerouters-twin-b leaves moerouters-twin-a\n"
        "         (with an allowlist, write twin@moerouters-twin-a in MOEROUTERS_PLUGINS);\n"
        "         or `pip uninstall` the one you do not want"
    )


def test_typing_error(report: Any) -> None:
    assert report["errors"]["godo"]["type"] == "RouterNotFound"
    assert "did you mean 'good'?" in report["errors"]["godo"]["text"]


def test_info_command(report: Any) -> None:
    good, broken, unknown = (report["info"][name] for name in ("good", "broken", "godo"))
    assert good["status"] == 0
    assert "How fast it learns." in good["out"]
    assert (broken["status"], broken["out"]) == (3, "")
    assert broken["err"] == f"RouterUnavailable: {report['errors']['broken']['text']}\n"
    assert (unknown["status"], unknown["out"]) == (2, "")


def test_plugins_command_imports_all_and_succeeds(report: Any) -> None:
    assert report["import"]["status"] == 0
    rows = json.loads(report["import"]["out"])["plugins"]
    assert [(row["name"], row["state"], row["provenance"]["distribution"]) for row in rows] == [
        ("broken", "failed", "moerouters-broken"),
        ("exits", "failed", "moerouters-exits"),
        ("future", "incompatible", "moerouters-future"),
        ("good", "ready", "moerouters-good"),
        ("good-louder", "ready", "moerouters-good"),
        ("misspelt", "failed", "moerouters-misspelt"),
        ("slow", "ready", "moerouters-slow"),
        ("topk", "ready", "moerouters"),
        ("topk", "conflict", "moerouters-twin-b"),
        ("twin", "conflict", "moerouters-twin-a"),
        ("twin", "conflict", "moerouters-twin-b"),
    ]


def test_console_script_lists_them_all(environment: Environment) -> None:
    done = environment.script("moerouters", "plugins", env={"COLUMNS": "160"})
    table = done.stdout
    assert done.returncode == 0
    assert table.count("discovered") == 8
    assert table.count("conflict") == 3
    assert "Takes seconds to import." in table
