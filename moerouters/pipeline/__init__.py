"""Pipeline schedules: as tables, checked, simulated, drawn, searched for, and run.

In reading order: `schedule` is the data, `builders` makes the well-known ones and `table` those of users, `check` says
whether one can run, `simulate` how long it takes; `formats` reads and writes files, `gantt` and `console` draw, and
`searching` finds better ones. `graph` says what a model's stages give each other, `lowering` makes a `program` for
every rank, and `runtime` runs it; `torch_engine` lets torch.distributed.pipelining do so, `controller` drives ranks
from one process. `Pipeline`, `TorchPipeline`, `Controller` and `cut` are imported when they are used, all else works
without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moerouters.pipeline.builders import BUILDERS, build
from moerouters.pipeline.check import check
from moerouters.pipeline.costs import Link, Network, StageCost
from moerouters.pipeline.formats import check_file, read, write
from moerouters.pipeline.graph import StageGraph
from moerouters.pipeline.lowering import lower
from moerouters.pipeline.schedule import Fused, Kind, Schedule, Task
from moerouters.pipeline.searching import Found, search
from moerouters.pipeline.simulate import Simulation, TimedTask, simulate
from moerouters.pipeline.table import from_function, from_table

if TYPE_CHECKING:
    from moerouters.pipeline.controller import Controller
    from moerouters.pipeline.runtime import Pipeline
    from moerouters.pipeline.stages import cut
    from moerouters.pipeline.torch_engine import TorchPipeline

__all__ = [
    "BUILDERS",
    "Controller",
    "Found",
    "Fused",
    "Kind",
    "Link",
    "Network",
    "Pipeline",
    "Schedule",
    "Simulation",
    "StageCost",
    "StageGraph",
    "Task",
    "TimedTask",
    "TorchPipeline",
    "build",
    "check",
    "check_file",
    "cut",
    "from_function",
    "from_table",
    "lower",
    "read",
    "search",
    "simulate",
    "write",
]


def __getattr__(name: str) -> Any:
    homes = {"Controller": "controller", "Pipeline": "runtime", "TorchPipeline": "torch_engine", "cut": "stages"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
