"""The command `moerouters simulate` behind its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text as Line

from moerouters.bench.shapes import named_shapes
from moerouters.errors import ConfigError
from moerouters.inspecting.inspect_command import make_console
from moerouters.lab.files import atomic_path, write_text
from moerouters.lab.job import choose_device
from moerouters.planning.cluster import Cluster, find_cluster
from moerouters.planning.load_models import load_models
from moerouters.planning.simulate_console import print_compared, print_simulation
from moerouters.planning.simulation import Scenario, Simulation, simulate
from moerouters.planning.stages import BACKENDS


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What the user typed."""

    cluster: str = "h100-nvl8-ib400"
    shape: str = "deepseek-v3"
    ranks: str = "8,64,512,4096,65536"
    loads: str = "uniform,lognormal:max_vio=0.5"
    backends: str | None = None
    bits: int = 16
    group: int | None = None
    grow: bool = False
    layers: int = 32
    capacity_factor: float = 1.25
    most_nodes: int | None = None
    placed: bool = False
    seed: int = 0
    json: Path | None = None
    picture: Path | None = None


def run_simulate(options: SimulateOptions) -> Simulation:
    """Simulate, print the table and write what was asked for."""
    console = make_console()
    if options.picture is not None:
        from moerouters.lab.report import require_report_extra

        require_report_extra()
    found = simulate(scenario_of(options))
    print_simulation(console, found)
    if options.json is not None:
        write_text(options.json, found.model_dump_json(indent=1, by_alias=True) + "\n")
        console.print(Line(f"JSON: {options.json}"), soft_wrap=True)
    if options.picture is not None:
        from moerouters.planning.simulate_pictures import write_picture

        write_picture(found, options.picture)
        console.print(Line(f"picture: {options.picture}"), soft_wrap=True)
    return found


def run_calibrate(*, output: Path, device: str, compare: bool) -> Cluster:
    """Measure this machine, write its cluster, and, if asked to, hold the formulas against real layers."""
    from moerouters.planning.calibrate import RANKS, calibrate
    from moerouters.planning.validation import compare as simulate_them
    from moerouters.planning.validation import time_layers

    console = make_console()
    chosen = choose_device(device).type
    ranks = [n for n in RANKS if chosen == "cpu" or n <= _gpus()]
    measured = calibrate(ranks=ranks, device=chosen, name=output.stem)
    with atomic_path(output) as partial:
        measured.save(partial)
    _print_cluster(console, measured)
    console.print(Line(f"cluster: {output}"), soft_wrap=True)
    if compare:
        timed = time_layers(ranks=ranks, device=chosen)
        print_compared(console, simulate_them(measured, timed, number_bytes=4 if chosen == "cpu" else 2))
    return measured


def scenario_of(options: SimulateOptions) -> Scenario:
    """The options, read. Raises ConfigError for what cannot be."""
    backends = tuple(BACKENDS) if options.backends is None else tuple(filter(None, options.backends.split(",")))
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown or not backends:
        raise ConfigError(
            f"there is no back-end '{', '.join(unknown)}' to simulate.",
            where="--backends",
            why=f"there is: {', '.join(BACKENDS)}",
            fix=f"--backends {','.join(BACKENDS)}",
        )
    shapes = named_shapes(options.shape, subject="layer", device="cuda")
    if len(shapes) != 1:
        raise ConfigError("one shape at a time.", where=f"--shape {options.shape}", fix="name one of them")
    return Scenario(
        cluster=find_cluster(options.cluster),
        shape=shapes[0],
        worlds=_worlds(options.ranks),
        loads=tuple(load_models(options.loads)),
        backends=backends,
        number_bytes=options.bits // 8,
        group=options.group,
        grow=options.grow,
        layers=options.layers,
        capacity_factor=options.capacity_factor,
        most_nodes=options.most_nodes,
        placed=options.placed,
        seed=options.seed,
    )


def _worlds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"cannot read the numbers of ranks '{text}'.",
            where="--ranks",
            why="they are whole numbers",
            fix="--ranks 8,64",
        )
    return tuple(map(int, parts))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _print_cluster(console: Console, cluster: Cluster) -> None:
    link, giga, micro = cluster.intra, 1e-9, 1e6
    lines = [
        f"{cluster.source}, as of one rank alone:",
        f"arithmetic of experts  {giga * cluster.flops_per_s:.3g} GFLOP/s",
        f"gathering and summing  {giga * cluster.memory_bytes_per_s:.3g} GB/s",
        f"exchange               {micro * link.latency_s:.3g} us, {micro * link.message_s:.3g} us for each rank more, "
        f"{giga * link.bytes_per_s:.3g} GB/s",
        f"at a time              {cluster.processors or cluster.ranks_per_node:.3g} ranks' worth of that",
        f"layer of one token     {micro * cluster.forward_s:.3g} us, backward {micro * cluster.backward_s:.3g} us",
    ]
    for line in lines:
        console.print(Line(line))
