"""The version gate between a plugin and this host, asked before anything of the plugin is constructed."""

from __future__ import annotations

from enum import StrEnum


class ApiFit(StrEnum):
    """Whether a router written for one version of the plugin API can run on a host with another."""

    FITS = "fits"
    TOO_OLD = "too old"
    TOO_NEW = "too new"


def api_fit(written_for: str, host: str) -> ApiFit:
    """Compare two MAJOR.MINOR versions.

    A minor adds optional things only, so an older minor of the same major fits. Major 0 promises nothing: there only
    the very same minor fits.
    """
    plugin, offered = _parse(written_for), _parse(host)
    if plugin > offered:
        return ApiFit.TOO_NEW
    if plugin == offered or plugin[0] == offered[0] > 0:
        return ApiFit.FITS
    return ApiFit.TOO_OLD


def _parse(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)
