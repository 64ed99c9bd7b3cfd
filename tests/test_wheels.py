"""What users install: every distribution as wheel and sdist, and the wheels at work where the tree is out of sight.

Editable installs hide missing package data, missing entry points and imports of files that never reach a wheel.
"""

import json
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest

from support.environments import Environment, copy_source, make_environment
from support.workspace import CORE, DISTRIBUTIONS, Distribution

ROUTERS = [name for distribution in DISTRIBUTIONS for name in distribution.routers]

ROUTE = """
import sys
from pathlib import Path
import torch, moerouters
assert Path(moerouters.__file__).is_relative_to(sys.prefix), moerouters.__file__
noise_key = torch.zeros(4, dtype=torch.int64)
ctx = moerouters.RouteContext(token_ids_T=torch.arange(16), hidden_TD=torch.randn(16, 8), noise_key=noise_key)
for name in sys.argv[1:]:
    gating = moerouters.Gating.of(8, 2, **moerouters.info(name).spec.gating)
    assignment = moerouters.build(name, gating)(torch.randn(16, 8), ctx).validate()
    assert assignment.load_E.sum() > 0
    print(name, assignment.num_tokens)
"""

each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)


def run_here(*args: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of every distribution; wheels are built from the unpacked sdists."""
    scratch = tmp_path_factory.mktemp("build")
    for distribution in DISTRIBUTIONS:
        source = copy_source(distribution.folder, scratch / distribution.name)
        run_here("-m", "build", "--no-isolation", "--outdir", scratch / "dist", source)
    return scratch / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = make_environment(tmp_path_factory.mktemp("wheels"))
    environment.install(*sorted(dist.glob("*.whl")))
    return environment


def wheel_of(dist: Path, distribution: Distribution) -> zipfile.ZipFile:
    return zipfile.ZipFile(dist / f"{distribution.import_name}-{distribution.version}-py3-none-any.whl")


def metadata_of(dist: Path, distribution: Distribution) -> Message:
    with wheel_of(dist, distribution) as wheel:
        text = wheel.read(f"{distribution.import_name}-{distribution.version}.dist-info/METADATA").decode()
    return Parser().parsestr(text)


@each_distribution
def test_wheel_holds_the_package_and_nothing_else(dist: Path, distribution: Distribution) -> None:
    with wheel_of(dist, distribution) as wheel:
        names = {PurePosixPath(name) for name in wheel.namelist()}
    info = f"{distribution.import_name}-{distribution.version}.dist-info"
    assert {name.parts[0] for name in names} == {distribution.import_name, info}
    in_tree = {
        PurePosixPath(path.relative_to(distribution.source_root))
        for path in distribution.package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.parts[0] == distribution.import_name} == in_tree
    assert PurePosixPath(distribution.import_name, "py.typed") in names
    assert PurePosixPath(info, "licenses", "LICENSE") in names


@each_distribution
def test_wheel_metadata(dist: Path, distribution: Distribution) -> None:
    metadata = metadata_of(dist, distribution)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_all("Classifier") == distribution.project["classifiers"]
    description = metadata.get_payload()
    for part in ("README.md", "CHANGELOG.md"):
        assert (distribution.folder / part).read_text(encoding="utf-8").strip() in description


@each_distribution
def test_sdist_is_complete(dist: Path, distribution: Distribution) -> None:
    prefix = f"{distribution.import_name}-{distribution.version}"
    with tarfile.open(dist / f"{prefix}.tar.gz") as archive:
        names = set(archive.getnames())
    assert {f"{prefix}/{name}" for name in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml")} <= names
    tests = {path.relative_to(distribution.folder).as_posix() for path in distribution.folder.glob("tests/**/*.py")}
    shipped = {name.removeprefix(f"{prefix}/") for name in names} & tests
    assert shipped == (set() if distribution is CORE else tests)  # the core's need the rest of the repository


def test_twine_finds_nothing(dist: Path) -> None:
    files = sorted(dist.iterdir())
    assert len(files) == 2 * len(DISTRIBUTIONS)
    verdicts = run_here("-m", "twine", "--no-color", "check", "--strict", *files)
    assert verdicts.count("PASSED") == len(files), verdicts


def test_installed_wheels_are_listed(installed: Environment) -> None:
    report = json.loads(installed.script("moerouters", "plugins", "--json").stdout)
    listed = {
        (row["name"], row["provenance"]["distribution"], row["provenance"]["version"]) for row in report["plugins"]
    }
    offered = {(name, owner.name, owner.version) for owner in DISTRIBUTIONS for name in owner.routers}
    assert listed == offered
    assert {row["state"] for row in report["plugins"]} == {"discovered"}
    for row in report["plugins"]:
        assert not row["provenance"]["editable"]
        assert Path(row["provenance"]["location"]).is_relative_to(installed.root)


def test_every_installed_router_routes(installed: Environment) -> None:
    assert set(ROUTERS) >= {"topk", "loss-controlled", "loss-free", "bip"}
    printed = installed.run("-c", ROUTE, *ROUTERS).stdout
    assert printed.splitlines() == [f"{name} 16" for name in ROUTERS]


@pytest.fixture(scope="module")
def generated(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin as `moerouters new` writes it, built and installed beside the wheels."""
    scratch = tmp_path_factory.mktemp("generated")
    installed.script("moerouters", "new", "fresh-router", "--dir", scratch / "fresh")
    run_here("-m", "build", "--no-isolation", "--wheel", "--outdir", scratch / "dist", scratch / "fresh")
    installed.install(*(scratch / "dist").glob("*.whl"))
    return scratch / "fresh"


@pytest.mark.parametrize("profile", ["smoke", pytest.param("default", marks=pytest.mark.slow)])
def test_a_generated_plugin_passes_the_suite(installed: Environment, generated: Path, profile: str) -> None:
    """Its own three-line test file, and the command."""
    options = ("-q", "-p", "no:cacheprovider", "--conformance-profile", profile)
    tested = installed.run("-m", "pytest", *options, generated, timeout=600)
    assert " passed" in tested.stdout and "failed" not in tested.stdout
    checked = installed.script("moerouters", "check", "fresh-router", "--profile", "smoke", "--only", "contract")
    assert " 0 failed" in checked.stdout and " 0 errors" in checked.stdout
