"""`moerouters new`: a plugin distribution that installs, routes and passes the conformance suite as generated.

The files lie in `template/`; `$name` and its like are filled in. In a path `__module__` becomes the package, and
`__dot__` a dot: tools that copy sources leave hidden files out.
"""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from moerouters.errors import ConfigError
from moerouters.registry.spec import API_VERSION

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_SUFFIX = ".tmpl"  # so that neither pytest nor a linter takes a template for a module


def write_plugin(name: str, folder: Path) -> list[Path]:
    """Write the distribution of a router `name` into `folder`, and return the files, relative to it.

    Raises ConfigError for a name that no router can have, and for a folder that is not empty.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a router.",
            why="names are lower-case words and digits joined by - or _, and start with a letter",
            fix="for instance: moerouters new my-router",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"'{folder}' is there already.", why="nothing is written over what you have", fix="choose another --dir"
        )
    words = re.split(r"[-_]", name)
    fields = {
        "name": name,
        "distribution": f"moerouters-{name.replace('_', '-')}",
        "module": f"moerouters_{'_'.join(words)}",
        "Class": "".join(word.capitalize() for word in words),
        "api": API_VERSION,
    }
    written = []
    for source, relative in _templates(files(__name__) / "template", Path()):
        shown = str(relative).replace("__module__", fields["module"]).replace("__dot__", ".")
        target = Path(shown.removesuffix(_SUFFIX))
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_text(Template(source.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")
        written.append(target)
    return sorted(written)


def _templates(place: Traversable, relative: Path) -> list[tuple[Traversable, Path]]:
    found = []
    for entry in place.iterdir():
        if entry.is_dir():
            found += _templates(entry, relative / entry.name)
        elif entry.name.endswith(_SUFFIX):
            found.append((entry, relative / entry.name))
    return found
