"""Plugins that exist for one test: entries without a distribution, and modules written into a temporary folder."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

from moerouters.registry import PluginEntry, Provenance, Registry

HEADER = "from moerouters.registry import DispatcherSpec, RouterConfig, RouterSpec, hookimpl\n"


def entry(
    name: str, module: str = "", *, distribution: str = "", version: str = "0.1.0", editable: bool = False
) -> PluginEntry:
    """An installed claim; module and distribution follow from the name if they are not given."""
    module = module or f"fake_{name.replace('-', '_')}"
    distribution = distribution or f"moerouters-{name}"
    return PluginEntry(
        name=name,
        module=module,
        summary=f"About {name}.",
        provenance=Provenance(
            distribution=distribution,
            version=version,
            entry_point=f"{name} = {module}",
            location=f"site-packages/{module}",
            editable=editable,
            requirement=f"{distribution}=={version}",
        ),
    )


TOPK = entry("topk", "fake_builtin", distribution="moerouters")


def registry_of(*entries: PluginEntry, host_api: str = "0.1", **environ: str) -> Registry:
    """A registry that knows these claims and the built-in one, under these environment variables."""
    return Registry(discover=lambda: (*entries, TOPK), environ=environ, host_api=host_api)


class PluginModules:
    """A folder on the import path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, module: str, body: str) -> None:
        """Write a module with the imports a plugin needs; it is imported only if something imports it."""
        (self.folder / f"{module}.py").write_text(HEADER + dedent(body), encoding="utf-8")

    def router(self, name: str, module: str = "", *, api: str = "0.1", also: Sequence[str] = ()) -> PluginEntry:
        """Write a module that offers working routers, and return the claim to the first of them."""
        claim = entry(name, module)
        names = (name, *also)
        specs = ", ".join(f"RouterSpec(name={n!r}, summary='Is {n}.', factory=dict, api={api!r})" for n in names)
        self.write(claim.module, f"@hookimpl\ndef moerouters_routers():\n    return ({specs},)\n")
        return claim


@contextmanager
def plugin_modules(folder: Path) -> Iterator[PluginModules]:
    """Put `folder` on the import path, with a built-in router in it; forget all its modules in the end."""
    modules = PluginModules(folder)
    modules.router("topk", TOPK.module)
    sys.path.insert(0, str(folder))
    try:
        yield modules
    finally:
        sys.path.remove(str(folder))
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)
