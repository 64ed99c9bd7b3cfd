import sys
from importlib.metadata import PackageNotFoundError, PathDistribution
from pathlib import Path

import pytest

from moerouters.registry import discovery
from moerouters.registry.discovery import BUILTINS, PluginEntry, canonical, discover, from_entry_points


def install(folder: Path, project: str, entry_points: str) -> PathDistribution:
    info = folder / f"{project}-0.3.1.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.4\nName: {project}\nVersion: 0.3.1\nSummary: The {project}.\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[moerouters]\n{entry_points}\n", encoding="utf-8")
    return PathDistribution(info)


def claims(*distributions: PathDistribution) -> dict[str, PluginEntry]:
    points = [point for distribution in distributions for point in distribution.entry_points]
    return {entry.name: entry for entry in from_entry_points(points)}


def test_entry_is_read_from_metadata_alone(tmp_path: Path) -> None:
    found = claims(install(tmp_path, "moerouters-bip", "bip = no_such_package.plugin"))["bip"]
    assert (found.name, found.module, found.summary) == ("bip", "no_such_package.plugin", "The moerouters-bip.")
    assert (found.provenance.distribution, found.provenance.version) == ("moerouters-bip", "0.3.1")
    assert not found.builtin


def test_built_in_router_of_a_bare_source_tree_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(project: str) -> str:
        raise PackageNotFoundError(project)

    monkeypatch.setattr(discovery, "version", not_installed)
    (topk,) = from_entry_points([])
    assert (topk.name, topk.module, topk.builtin) == ("topk", "moerouters.builtin", True)
    package = Path(discovery.__file__).parents[1]
    assert topk.provenance.model_dump() == {
        "distribution": "moerouters",
        "version": "unknown",
        "entry_point": "topk = moerouters.builtin",
        "location": str(package),
        "editable": False,
        "commit": None,
        "requirement": f"moerouters @ {package.parent.as_uri()}",
    }


def test_announced_built_in_router_is_not_added_again(tmp_path: Path) -> None:
    core = install(tmp_path, "moerouters", "topk = moerouters.builtin")
    assert [entry.provenance.version for entry in from_entry_points(core.entry_points)] == ["0.3.1"]


def test_claim_of_a_stranger_does_not_replace_the_built_in_router(tmp_path: Path) -> None:
    stranger = install(tmp_path, "moerouters-shadow", "topk = moerouters_shadow.plugin")
    found = from_entry_points(stranger.entry_points)
    assert [(entry.name, entry.provenance.distribution) for entry in found] == [
        ("topk", "moerouters"),
        ("topk", "moerouters-shadow"),
    ]


def test_entries_are_sorted(tmp_path: Path) -> None:
    second = install(tmp_path, "b", "zeta = b\nalpha = b")
    first = install(tmp_path, "a", "zeta = a")
    points = [*second.entry_points, *first.entry_points]
    assert [(entry.name, entry.module) for entry in from_entry_points(points)] == [
        ("alpha", "b"),
        ("topk", "moerouters.builtin"),
        ("zeta", "a"),
        ("zeta", "b"),
    ]


def test_listing_this_environment_imports_nothing() -> None:
    before = set(sys.modules)
    assert {entry.name for entry in discover()} >= set(BUILTINS)
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not new - sys.stdlib_module_names


def test_distribution_names_are_compared_as_indexes_do() -> None:
    assert canonical("Moerouters_BIP") == canonical("moerouters.-bip") == "moerouters-bip"
