"""Throw-away virtual environments with every third-party dependency and none of our own code.

Tests that install a distribution need an environment where *only* that distribution is ours: an editable install in
the developer's environment would hide a missing entry point or missing package data. Downloading torch again for each
would take a minute and a network, and ``--system-site-packages`` would show the base interpreter instead of the running
one. So a bare environment gets one more folder on its path, the *overlay*, with a symbolic link for every top-level
entry of the running interpreter's site-packages, except everything that belongs to moerouters or plugs into it.

The overlay lies beside the environment, never inside it: pip removes old versions of what lies under ``sys.prefix``,
and through the links it would remove files of the running interpreter.
"""

import os
import shutil
import subprocess
import sysconfig
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BUILD_LEFTOVERS = (".*", "build", "*.egg-info", "__pycache__")
INHERITED_PREFIXES_DROPPED = ("PYTHON", "COVERAGE", "COV_CORE", "MOEROUTERS", "PIP", "VIRTUAL_ENV")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """A virtual environment that a test may install into and run commands in."""

    root: Path  # working directory of every command: a folder that holds none of our code
    python: Path

    def run(
        self, *args: str | Path, check: bool = True, env: Mapping[str, str] | None = None, timeout: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python *args`` here; with ``check`` a non-zero exit raises AssertionError with the whole output."""
        return self._execute(self.python, *args, check=check, env=env, timeout=timeout)

    def script(
        self,
        name: str,
        *args: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run the console script ``name`` of an installed distribution, as a user types it."""
        return self._execute(self.python.parent / name, *args, check=check, env=env, timeout=timeout)

    def install(self, *paths: Path) -> None:
        """Install wheels or source folders through pip, offline and without dependencies; one call for many is faster.

        Source folders are copied first, because a setuptools build writes ``build`` and ``*.egg-info`` beside them.
        """
        with tempfile.TemporaryDirectory(dir=self.root) as scratch:
            sources = [
                copy_source(path, Path(scratch) / f"{position}" / path.name) if path.is_dir() else path
                for position, path in enumerate(paths)
            ]
            self.run(
                *("-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--quiet"),
                *("--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--root-user-action=ignore"),
                *sources,
            )

    def _execute(
        self, *command: str | Path, check: bool, env: Mapping[str, str] | None, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED_PREFIXES_DROPPED)}
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.root,
            env=clean | {"PYTHONNOUSERSITE": "1"} | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{' '.join(str(part) for part in command)} exited with {done.returncode}\n"
                f"--- stdout ---\n{done.stdout}\n--- stderr ---\n{done.stderr}"
            )
        return done


def make_environment(root: Path) -> Environment:
    """Create an environment under ``root`` (made if missing) that imports the third-party packages of this one."""
    # Hypothesis reads the source of every imported module outside a folder of this name for numbers to try, which for
    # the whole of torch takes half a minute.
    prefix, overlay = root / "venv", root / "third_party" / "site-packages"
    overlay.mkdir(parents=True)
    for folder in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
        for entry in sorted(folder.iterdir()):
            if entry.name != "__pycache__" and entry.suffix != ".pth" and not _is_ours(entry):
                (overlay / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    venv.EnvBuilder(symlinks=True, with_pip=False).create(prefix)
    site_packages = sysconfig.get_path("purelib", scheme="venv", vars={"base": str(prefix), "platbase": str(prefix)})
    (Path(site_packages) / "third_party.pth").write_text(f"{overlay}\n", encoding="utf-8")
    return Environment(root=root, python=prefix / "bin" / "python")


def copy_source(source: Path, target: Path) -> Path:
    """Copy a source tree without what builds, editors and version control leave in it; returns ``target``."""
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns(*BUILD_LEFTOVERS)))


def _is_ours(entry: Path) -> bool:
    """True for our packages and metadata, and for metadata of any other plugin that happens to be installed here."""
    if "moerouters" in entry.name:
        return True
    entry_points = entry / "entry_points.txt"
    return entry_points.is_file() and "[moerouters]" in entry_points.read_text(encoding="utf-8")
