"""The distributions of this repository, read from their own files."""

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Distribution:
    """One folder with a pyproject.toml that is published on its own."""

    folder: Path

    @cached_property
    def pyproject(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))

    @property
    def project(self) -> dict[str, Any]:
        return dict(self.pyproject["project"])

    @property
    def name(self) -> str:
        return str(self.project["name"])

    @property
    def version(self) -> str:
        return str(self.project["version"])

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")

    @property
    def source_root(self) -> Path:
        """The folder that holds the package: plugins have a src layout, the core is flat."""
        return self.folder if self.folder == ROOT else self.folder / "src"

    @property
    def package(self) -> Path:
        return self.source_root / self.import_name

    @property
    def routers(self) -> list[str]:
        """Names under which the distribution offers routers."""
        return list(self.project.get("entry-points", {}).get("moerouters", {}))

    def __str__(self) -> str:
        return self.name


CORE = Distribution(ROOT)
PLUGINS = [Distribution(path.parent) for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))]
SUITE = Distribution(ROOT / "conformance")
DISTRIBUTIONS = [CORE, *PLUGINS, SUITE]
