"""Rules that keep several distributions in one repository publishable, each for itself."""

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from support.workspace import CORE, DISTRIBUTIONS, PLUGINS, ROOT, SUITE, Distribution

MAX_LINES = 400
BINARY_SUFFIXES = {".png", ".gz", ".safetensors", ".npz"}
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:tmp|work|root|home|opt|Users)/\w")
INDEX_ADDRESS = re.compile(r"--(?:(?:extra-)?index-url|find-links)\b|(?:file|https?):/{2}\S*/simple\b")

each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
each_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=str)


def requirement_lines(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


@cache
def tracked_files() -> list[Path]:
    """Files that are, or would be, under version control: not what builds and runs leave behind."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def tracked_texts() -> dict[str, bytes]:
    files = [path for path in tracked_files() if path.suffix not in BINARY_SUFFIXES]
    assert len(files) > 20
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in files}


def test_the_plugins_of_the_repository_are_found() -> None:
    assert {plugin.name for plugin in PLUGINS} >= {
        "moerouters-bip",
        "moerouters-loss-controlled",
        "moerouters-loss-free",
    }


@each_distribution
def test_names_agree(distribution: Distribution) -> None:
    assert distribution in (CORE, SUITE) or distribution.folder.name == distribution.name
    assert (distribution.package / "__init__.py").is_file()


@each_distribution
def test_carries_what_an_index_shows(distribution: Distribution) -> None:
    project = distribution.project
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert project["requires-python"] == CORE.project["requires-python"] == ">=3.11"
    assert not [
        name for name in project["classifiers"] if name.startswith("License ::")
    ]  # the expression replaces them
    assert "Typing :: Typed" in project["classifiers"]
    assert distribution.pyproject["tool"]["setuptools"]["dynamic"]["readme"]["file"] == ["README.md", "CHANGELOG.md"]
    assert (distribution.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (distribution.folder / "README.md").read_text(encoding="utf-8").startswith("# ")
    assert f"## {distribution.version}" in (distribution.folder / "CHANGELOG.md").read_text(encoding="utf-8")


@each_distribution
def test_is_typed(distribution: Distribution) -> None:
    assert (distribution.package / "py.typed").is_file()
    assert "py.typed" in distribution.pyproject["tool"]["setuptools"]["package-data"][distribution.import_name]
    assert distribution.import_name in CORE.pyproject["tool"]["mypy"]["packages"]


@each_distribution
def test_is_tested_and_measured(distribution: Distribution) -> None:
    assert list((distribution.folder / "tests").rglob("test_*.py"))
    assert distribution.import_name in CORE.pyproject["tool"]["coverage"]["run"]["source_pkgs"]


@each_distribution
def test_building_needs_setuptools_alone(distribution: Distribution) -> None:
    assert distribution.pyproject["build-system"]["requires"] == ["setuptools>=77"]


def test_no_build_installs_torch() -> None:
    """The fixture distributions of the tests are built as well."""
    files = [path for path in tracked_files() if path.name == "pyproject.toml"]
    assert len(files) >= len(DISTRIBUTIONS)
    for path in files:
        requires = tomllib.loads(path.read_text(encoding="utf-8"))["build-system"]["requires"]
        assert "torch" not in {Requirement(line).name for line in requires}, path


@each_plugin
def test_plugin_depends_on_the_core_and_nothing_else_of_ours(plugin: Distribution) -> None:
    requirements = {found.name: found for found in map(Requirement, plugin.project["dependencies"])}
    assert [name for name in requirements if name.startswith("moerouters")] == ["moerouters"]
    assert requirements["moerouters"].specifier == SpecifierSet(">=0.1,<0.2")
    assert requirements["moerouters"].specifier.contains(CORE.version)
    assert "torch" not in requirements  # arrives through the core, so that one place decides its version


@each_plugin
def test_plugin_offers_routers_of_its_own_name(plugin: Distribution) -> None:
    assert plugin.name.removeprefix("moerouters-") in plugin.routers
    for target in plugin.project["entry-points"]["moerouters"].values():
        assert (plugin.source_root / (target.replace(".", "/") + ".py")).is_file()


@each_plugin
def test_plugin_is_part_of_the_development_set_up(plugin: Distribution) -> None:
    assert f"-e ./plugins/{plugin.name}" in requirement_lines(ROOT / "requirements-dev.txt")
    assert f"$MYPY_CONFIG_FILE_DIR/plugins/{plugin.name}/src" in CORE.pyproject["tool"]["mypy"]["mypy_path"]


@each_plugin
def test_plugin_test_requirements_are_installed_for_development(plugin: Distribution) -> None:
    wanted = {Requirement(line).name for line in plugin.project["optional-dependencies"]["test"]}
    lines = requirement_lines(ROOT / "requirements-dev.txt")
    assert {"pytest", SUITE.name} <= wanted  # every plugin proves its routers
    assert wanted - {SUITE.name} <= {Requirement(line).name for line in lines if not line.startswith("-e")}
    assert "@parametrize_with_checks([" in (plugin.folder / "tests" / "test_conformance.py").read_text(encoding="utf-8")


def test_the_suite_knows_no_router_by_name() -> None:
    """A rule that names a router is a rule that other authors' routers are not held to."""
    names = re.compile(rf"\b(?:{'|'.join(n for d in DISTRIBUTIONS for n in d.routers if n != 'topk')})\b")
    found = {path: names.search(path.read_text(encoding="utf-8")) for path in SUITE.package.rglob("*.py")}
    assert not {path: match.group() for path, match in found.items() if match}


def test_no_two_distributions_offer_the_same_router() -> None:
    routers = [name for distribution in DISTRIBUTIONS for name in distribution.routers]
    assert len(routers) == len(set(routers))


def test_constraints_pin_every_direct_dependency() -> None:
    pins = {found.name: str(found.specifier) for found in map(Requirement, requirement_lines(ROOT / "constraints.txt"))}
    assert all(re.fullmatch(r"==[\w.]+", pin) for pin in pins.values()), pins
    assert (pins["torch"], pins["triton"]) == ("==2.13.0", "==3.7.1")
    wanted = [line for line in requirement_lines(ROOT / "requirements-dev.txt") if not line.startswith("-e")]
    for distribution in DISTRIBUTIONS:
        wanted += distribution.project["dependencies"]
        wanted += [line for extra in distribution.project["optional-dependencies"].values() for line in extra]
    third_party = {Requirement(line).name for line in wanted} - {distribution.name for distribution in DISTRIBUTIONS}
    assert third_party == set(pins)


def test_the_version_stands_in_every_place_that_names_it() -> None:
    assert f'__version__ = "{CORE.version}"\n' in (CORE.package / "__init__.py").read_text(encoding="utf-8")
    assert f"\nversion: {CORE.version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_core_imports_no_plugin() -> None:
    """The command `check` is a door to the suite, which is no plugin."""
    statement = re.compile(r"^\s*(?:from|import) moerouters_(?!conformance\b)\w+", re.MULTILINE)
    assert not [path for path in CORE.package.rglob("*.py") if statement.search(path.read_text(encoding="utf-8"))]


@each_distribution
def test_a_file_is_read_in_one_sitting(distribution: Distribution) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in distribution.package.rglob("*.py")}
    assert lengths
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_texts_are_ascii() -> None:
    assert not [name for name, text in tracked_texts().items() if not text.isascii()]


def test_texts_name_no_path_of_a_machine() -> None:
    assert MACHINE_PATH.search(f"open('{'/'}tmp/log')") and not MACHINE_PATH.search("runs/tmp/log, ../work/log")
    found = {name: MACHINE_PATH.search(text.decode()) for name, text in tracked_texts().items()}
    assert not {name: match.group() for name, match in found.items() if match}


def test_where_pip_looks_is_left_to_the_machine() -> None:
    assert INDEX_ADDRESS.search(f"pip install {'--'}find-links wheels") and not INDEX_ADDRESS.search("pip install -e .")
    found = {name: INDEX_ADDRESS.search(text.decode()) for name, text in tracked_texts().items()}
    assert not {name: match.group() for name, match in found.items() if match}
