"""Where a plugin comes from, read from installed metadata alone: nothing of the plugin is imported."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import Distribution, PackageMetadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import BaseModel, ConfigDict

UNKNOWN = "unknown"


class Provenance(BaseModel):
    """Origin of one entry point; the same record goes into listings, error messages and run manifests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    distribution: str
    version: str
    entry_point: str
    """As the distribution wrote it: `bip = moerouters_bip.plugin`."""
    location: str
    """Folder of the package; of the project for an editable install."""
    editable: bool = False
    """True: the code may differ from the version it names."""
    commit: str | None = None
    """Source commit, known for installs from version control."""
    requirement: str
    """Line of a requirements file that installs the same again."""

    def __str__(self) -> str:
        editable = ", editable" if self.editable else ""
        return f"{self.distribution} {self.version}, entry point {self.entry_point} ({self.location}{editable})"


def read_provenance(distribution: Distribution, *, name: str, module: str) -> Provenance:
    """Describe the entry point `name = module` of `distribution`. Damaged metadata reads as unknown."""
    metadata = distribution.metadata
    project = metadata_field(metadata, "Name") or UNKNOWN
    version = metadata_field(metadata, "Version") or UNKNOWN
    direct = _direct_url(distribution)
    url = str(direct.get("url", ""))
    commit = _part(direct, "vcs_info").get("commit_id")
    editable = _part(direct, "dir_info").get("editable") is True
    if editable:
        location = url2pathname(urlsplit(url).path)
        requirement = f"-e {shlex.quote(location)}"
    else:
        location = _package_folder(distribution, module)
        requirement = f"{project}=={version}"
        if commit:
            requirement = f"{project} @ {_part(direct, 'vcs_info').get('vcs')}+{url}@{commit}"
        elif url:
            requirement = f"{project} @ {url}"
    return Provenance(
        distribution=project,
        version=version,
        entry_point=f"{name} = {module}",
        location=location,
        editable=editable,
        commit=commit,
        requirement=requirement,
    )


def metadata_field(metadata: PackageMetadata, key: str) -> str:
    """Return a field of a distribution's metadata, empty if it has none."""
    values = metadata.get_all(key)
    return str(values[0]) if values else ""


def _direct_url(distribution: Distribution) -> dict[str, Any]:
    """Content of direct_url.json (PEP 610), which pip writes for everything that did not come from an index."""
    try:
        content = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _part(direct: dict[str, Any], key: str) -> dict[str, Any]:
    part = direct.get(key)
    return part if isinstance(part, dict) else {}


def _package_folder(distribution: Distribution, module: str) -> str:
    package = Path(str(distribution.locate_file(module.partition(".")[0])))
    return str(package if package.is_dir() else package.parent)
