"""A MoE model of the study on larger clusters, by `moerouters simulate`: a projection, nothing of it is measured."""

from __future__ import annotations

from moerouters.bench.shapes import Shape
from moerouters.lab.settings import Settings
from moerouters.planning.cluster import PRESETS
from moerouters.planning.load_models import load_models
from moerouters.planning.simulation import Scenario, simulate
from moerouters.study.results import Projected

_WORLDS = (8, 64, 512)


def project(name: str, settings: Settings, *, avg_max_vio: float | None) -> list[Projected]:
    """Each preset cluster and back-end, with even loads and, if it is known, with the MaxVio that was measured."""
    loads = "uniform" if not avg_max_vio else f"uniform,lognormal:max_vio={avg_max_vio:.2g}"
    shape = Shape(
        name=name,
        T=settings.batch_tokens,
        D=settings.hidden_size,
        E=settings.num_experts,
        K=settings.top_k,
        F=settings.expert_size,
        layers=1,
    )
    found = []
    for cluster in PRESETS.values():
        scenario = Scenario(
            cluster=cluster,
            shape=shape,
            worlds=_WORLDS,
            loads=tuple(load_models(loads)),
            layers=settings.num_layers,
        )
        found += [
            Projected(
                model=name,
                cluster=cluster.name,
                ranks=each.ranks,
                backend=each.backend,
                load=each.load,
                ms=each.total_ms,
                idle=each.stage_ms("idle") / each.total_ms,
                dropped=each.dropped,
            )
            for each in simulate(scenario).estimates
        ]
    return found
