"""Plugins that misbehave, laid out as installed distributions in a folder for PYTHONPATH."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

HEAD = """
import os, sys, time
import torch
from moerouters import Router, RouterSpec, Selection, hookimpl

class Stranger(Router):
    reads = frozenset()
    def __init__(self, gating, config):
        super().__init__(gating)
        self.config = config
"""
HOOK = """
@hookimpl
def moerouters_routers():
    return [RouterSpec(name="{name}", api="0.1", summary="A stranger.", factory=Stranger)]
"""


def install_stranger(folder: Path, name: str, body: str, *, top: str = "") -> Path:
    """A distribution `moerouters-NAME` with a router whose class body goes on with `body`; returns the folder."""
    module = f"stranger_{name.replace('-', '_')}"
    code = HEAD + "".join(f"    {line}\n" for line in dedent(body).strip().splitlines()) + HOOK.format(name=name)
    (folder / f"{module}.py").write_text(top + code, encoding="utf-8")
    meta = folder / f"{module}-0.1.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: moerouters-{name}\nVersion: 0.1\n")
    (meta / "entry_points.txt").write_text(f"[moerouters]\n{name} = {module}\n")
    return folder
