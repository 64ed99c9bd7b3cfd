import json
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from moerouters.registry.provenance import Provenance, read_provenance

METADATA = "Metadata-Version: 2.4\nName: moerouters-bip\nVersion: 0.3.1\nSummary: Solves a dual.\n"


def installed(folder: Path, *, metadata: str = METADATA, direct_url: str | None = None) -> PathDistribution:
    """A distribution with a package, as an installer leaves it in site-packages."""
    info = folder / "moerouters_bip-0.3.1.dist-info"
    info.mkdir()
    (folder / "moerouters_bip").mkdir()
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    if direct_url is not None:
        (info / "direct_url.json").write_text(direct_url, encoding="utf-8")
    return PathDistribution(info)


def read(distribution: PathDistribution, module: str = "moerouters_bip.plugin") -> Provenance:
    return read_provenance(distribution, name="bip", module=module)


def test_from_an_index(tmp_path: Path) -> None:
    assert read(installed(tmp_path)) == Provenance(
        distribution="moerouters-bip",
        version="0.3.1",
        entry_point="bip = moerouters_bip.plugin",
        location=str(tmp_path / "moerouters_bip"),
        editable=False,
        commit=None,
        requirement="moerouters-bip==0.3.1",
    )


def test_editable(tmp_path: Path) -> None:
    source = tmp_path / "my plugins" / "bip"
    direct = {"url": source.as_uri(), "dir_info": {"editable": True}}
    found = read(installed(tmp_path, direct_url=json.dumps(direct)))
    assert (found.editable, found.location, found.requirement) == (True, str(source), f"-e '{source}'")
    assert str(found) == f"moerouters-bip 0.3.1, entry point bip = moerouters_bip.plugin ({source}, editable)"


def test_from_version_control(tmp_path: Path) -> None:
    direct = {"url": "https://example.org/bip.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}
    found = read(installed(tmp_path, direct_url=json.dumps(direct)))
    assert found.commit == "c0ffee"
    assert found.requirement == "moerouters-bip @ git+https://example.org/bip.git@c0ffee"
    assert found.location == str(tmp_path / "moerouters_bip")


def test_from_a_folder(tmp_path: Path) -> None:
    direct = {"url": (tmp_path / "source").as_uri(), "dir_info": {}}
    found = read(installed(tmp_path, direct_url=json.dumps(direct)))
    assert (found.editable, found.commit) == (False, None)
    assert found.requirement == f"moerouters-bip @ {(tmp_path / 'source').as_uri()}"


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"dir_info": 3, "vcs_info": null}'])
def test_damaged_direct_url_is_as_good_as_none(tmp_path: Path, damaged: str) -> None:
    found = read(installed(tmp_path, direct_url=damaged))
    assert (found.editable, found.commit, found.requirement) == (False, None, "moerouters-bip==0.3.1")


def test_damaged_metadata_reads_as_unknown(tmp_path: Path) -> None:
    found = read(installed(tmp_path, metadata="Metadata-Version: 2.4\n"))
    assert (found.distribution, found.version) == ("unknown", "unknown")


def test_single_file_module_is_located_by_its_folder(tmp_path: Path) -> None:
    assert read(installed(tmp_path), module="bip_plugin").location == str(tmp_path)
