"""A training step of PPMoE's model on its V100 cluster, by formula: PPMoE, all-to-all and the dense backbone.

The model of arXiv:2304.11414, Sec. 4, as far as it is known: GPT-3 Medium, 64 experts and K = 1 in every other layer,
32 GPUs. MoE layers are those of `moerouters simulate`, the pipeline is simulated with the schedule's table; attention
and dense layers are counted here, and what no layer sees: gradients of replicas, sends between stages, the bubble.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moerouters.bench.shapes import Shape
from moerouters.pipeline import Link, Network, StageCost, build
from moerouters.pipeline import simulate as simulate_schedule
from moerouters.planning.cluster import PRESETS, Cluster
from moerouters.planning.collectives import Group
from moerouters.planning.load_models import load_models
from moerouters.planning.simulation import Scenario, simulate

LAYERS, MOE_LAYERS, WIDTH, INNER, SEQUENCE, EXPERTS, VOCABULARY = 24, 12, 1024, 4096, 2048, 64, 51200
RANKS, TENSOR, STAGES, MICROBATCHES = 32, 8, 4, 32
"""MICROBATCHES of one sequence: the paper does not say how many; 32 are one for each rank without a pipeline."""
BACKBONE_TOKENS_PER_S = 5120.0
"""Of a GPU, with the dense backbone on 32 data-parallel ranks, as notes on the paper have it."""
_BYTES = 2
_DENSE = 6.0 * WIDTH * INNER
_ATTENTION = 8.0 * WIDTH**2 + 2.0 * SEQUENCE * WIDTH
"""FLOPs of a token, forward: a SwiGLU layer as the experts are counted; projections, and causal scores."""
_PARAMETERS = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER) + VOCABULARY * WIDTH
"""Of the dense backbone."""


@dataclass(frozen=True)
class Way:
    """Tokens a second and GPU, and what a step is spent on."""

    tokens_per_s: float
    parts_ms: dict[str, float]


def cluster(*, shared_port: bool, slowed: bool) -> Cluster:
    """v100-nvl8-ib100; with a port for each node and not each GPU; with arithmetic as slow as the paper's backbone."""
    found = PRESETS["v100-nvl8-ib100"]
    assert found.inter is not None
    if shared_port:
        inter = found.inter.model_copy(update={"bytes_per_s": found.inter.bytes_per_s / found.ranks_per_node})
        found = found.model_copy(update={"inter": inter})
    if slowed:
        seconds = SEQUENCE / BACKBONE_TOKENS_PER_S - _reduced(found, _PARAMETERS)
        flops = 3 * SEQUENCE * _forward_flops()
        found = found.model_copy(update={"flops_per_s": flops / seconds})
    return found


def dense(machine: Cluster) -> Way:
    """The backbone, data-parallel: a sequence a rank, gradients over all."""
    work = 3 * SEQUENCE * _forward_flops() / machine.flops_per_s
    return _way({"arithmetic": work, "gradients": _reduced(machine, _PARAMETERS)})


def all_to_all(machine: Cluster) -> Way:
    """Experts over all 32 ranks; the rest data-parallel."""
    work = 3 * SEQUENCE * (_forward_flops() - MOE_LAYERS * _DENSE) / machine.flops_per_s
    layers = MOE_LAYERS * sum(_moe_layer(machine, "all_to_all", SEQUENCE))
    backbone = _PARAMETERS - MOE_LAYERS * 3 * WIDTH * INNER
    return _way({"arithmetic": work, "MoE layers": layers, "gradients": _reduced(machine, backbone)})


def all_to_all_with_copies(machine: Cluster) -> Way:
    """The same beside tensor parallelism on each node, whose 8 ranks each send the tokens of all of them.

    So it was before duplicates were dropped (DeepSpeed-TED, arXiv:2303.06318), and the paper compares with DeepSpeed of
    2021 at such a layout.
    """
    node = Group(machine, TENSOR)
    tensor = 3 * LAYERS * float(node.all_reduce(np.asarray(float(TENSOR * SEQUENCE * WIDTH * _BYTES))))
    work = 3 * SEQUENCE * (_forward_flops() - MOE_LAYERS * _DENSE) / machine.flops_per_s
    layers = MOE_LAYERS * sum(_moe_layer(machine, "all_to_all", TENSOR * SEQUENCE))
    backbone = _PARAMETERS - MOE_LAYERS * 3 * WIDTH * INNER
    between = _reduced(machine, backbone // TENSOR)  # a rank's eighth, over the nodes
    parts = {"arithmetic": work, "tensor parallelism": tensor, "MoE layers": layers, "gradients": between}
    return _way(parts)


def ppmoe(machine: Cluster) -> Way:
    """Experts over the 8 ranks of a node, which cut all else; 4 such stages, 1F1B."""
    stage = LAYERS // STAGES
    node = Group(machine, TENSOR)
    hidden = np.asarray(float(SEQUENCE * WIDTH * _BYTES))
    reduced = float(node.all_reduce(hidden))
    # Attention in all layers, dense products in every other; after each an all-reduce, in backward as well.
    flops = SEQUENCE * (stage * _ATTENTION + stage / 2 * _DENSE + 2.0 * VOCABULARY * WIDTH / STAGES)
    forward = flops / TENSOR / machine.flops_per_s
    tensor = 1.5 * stage * reduced
    moe = [stage / 2 * seconds for seconds in _moe_layer(machine, "tensor_sliced", SEQUENCE // TENSOR)]
    assert machine.inter is not None
    sent = float(machine.inter.seconds(1, hidden))
    cost = StageCost(
        forward=forward + tensor + moe[0],
        backward=2 * forward + tensor + moe[1],
        input_backward=None,
        weight_backward=None,
    )
    run = simulate_schedule(build("1f1b", STAGES, MICROBATCHES), cost, Network(link=Link(latency=sent)))
    parts = {
        "arithmetic": MICROBATCHES * 3 * forward,
        "tensor parallelism": MICROBATCHES * 2 * tensor,
        "MoE layers": MICROBATCHES * sum(moe),
    }
    return _way(parts | {"bubble and sends": float(run.makespan) - sum(parts.values())})


def _way(parts_s: dict[str, float]) -> Way:
    """All ways train as many tokens in a step: a sequence for each rank."""
    seconds = sum(parts_s.values())
    return Way(SEQUENCE / seconds, {name: 1e3 * value for name, value in parts_s.items()})


def _forward_flops() -> float:
    """Of a token in the dense backbone."""
    return LAYERS * (_ATTENTION + _DENSE) + 2.0 * VOCABULARY * WIDTH


def _reduced(machine: Cluster, parameters: int) -> float:
    """Seconds of the all-reduce of gradients over all ranks."""
    return float(Group(machine, RANKS).all_reduce(np.asarray(float(_BYTES * parameters))))


def _moe_layer(machine: Cluster, backend: str, tokens: int) -> tuple[float, float]:
    """Seconds of a layer, forward and backward, with even shares of experts."""
    shape = Shape(name="gpt3-medium-64", T=tokens, D=WIDTH, E=EXPERTS, K=1, F=INNER, layers=1)
    scenario = Scenario(
        cluster=machine,
        shape=shape,
        worlds=(RANKS,),
        loads=tuple(load_models("uniform")),
        backends=(backend,),
        number_bytes=_BYTES,
        layers=MOE_LAYERS,
    )
    (found,) = simulate(scenario).estimates
    return 1e-3 * found.forward.total, 1e-3 * found.backward.total
