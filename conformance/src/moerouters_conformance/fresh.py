"""Run in an interpreter of its own: build one router, and say what about the process is not as it was before.

`python -m moerouters_conformance.fresh` reads a request from stdin as JSON and writes what it found to the file that
the request names. Everything that the host itself imports is imported before the first look.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any


def look() -> dict[str, str]:
    """What belongs to the process and not to a router, by name."""
    import torch

    def digest(value: object) -> str:
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

    found: dict[str, object] = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's number of interop threads": torch.get_num_interop_threads(),
        "grad mode": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's float32 matmul precision": torch.get_float32_matmul_precision(),
        "cudnn's flags": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "state of torch's generator": digest(torch.get_rng_state().tolist()),
        "state of Python's generator": digest(random.getstate()),
        "working directory": str(Path.cwd()),
        "sys.path": sys.path,
        "level and handlers of the root logger": (logging.getLogger().level, logging.getLogger().handlers),
        "signal handlers": {s.name: str(signal.getsignal(s)) for s in signal.valid_signals() if hasattr(s, "name")},
        "sys.excepthook": sys.excepthook,
        "sys.stdout and sys.stderr": (id(sys.stdout), id(sys.stderr)),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        # A filter for one message or module is a library's own business; one for everything silences the user's code.
        "blanket warning filters": [(f[0], f[2]) for f in warnings.filters if f[1] is None and f[3] is None],
    }
    if "numpy" in sys.modules:
        import numpy

        state = numpy.random.get_state(legacy=True)
        found["state of numpy's generator"] = digest([str(part) for part in state])
    environment = {f"environment variable {name}": value for name, value in os.environ.items()}
    return {name: str(value) for name, value in found.items()} | environment


def build(request: dict[str, Any]) -> None:
    """Make the router in the way its user would: by its installed name, or from the module of its factory."""
    import moerouters
    from moerouters.gating import GatingSettings

    gating = moerouters.Gating(GatingSettings.model_validate(request["gating"]))
    if request["name"]:
        moerouters.build(request["name"], gating, config=request["config"])
        return
    factory = _find(*request["factory"])
    if request["config_class"] is None:
        factory(gating)
        return
    factory(gating, _find(*request["config_class"]).model_validate(request["config"]))


def _find(module: str, path: str) -> Any:
    found: Any = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def main() -> None:
    # What the host and this suite import is not the router's doing.
    for host in ("torch", "moerouters", "moerouters_conformance.checks.hygiene"):
        import_module(host)
    request = json.load(sys.stdin)
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        os.dup2(said.fileno(), 1)  # not sys.stdout: C code prints too
        os.dup2(said.fileno(), 2)
        before = look()
        build(request)
        after = look()
        sys.stdout.flush()
        sys.stderr.flush()
        said.seek(0)
        printed = said.read().decode(errors="replace")
    changed = {n: [before.get(n, "not there"), after.get(n, "gone")] for n in before | after}
    answer = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    if printed:
        answer["stdout and stderr"] = ["nothing", printed[:300]]
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
