"""The formulas of the stages: by hand, against the model that `auto` chooses by, and against PPMoE's."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest

from moerouters.dispatch.cost import Line, Sizes, Speeds, costs
from moerouters.planning.cluster import PRESETS, Cluster, Link
from moerouters.planning.collectives import Group
from moerouters.planning.ppmoe import all_to_all_over_ffn, allreduce_over_compute, bubble, bubble_over_ideal
from moerouters.planning.stages import BACKENDS, Batch, Stages, chosen_share, experts, gate

ENDLESS = 1e30
BATCH = Batch(T=100, D=8, E=16, K=2, F=32, number_bytes=2, capacity=20)


def cluster(**changes: object) -> Cluster:
    fields: dict[str, object] = {
        "name": "hand",
        "ranks_per_node": 4,
        "intra": Link(latency_s=0, bytes_per_s=ENDLESS),
        "inter": Link(latency_s=0, bytes_per_s=ENDLESS),
        "flops_per_s": ENDLESS,
        "memory_bytes_per_s": ENDLESS,
    }
    return Cluster.model_validate(fields | changes)


def run(name: str, made: Cluster, ranks: int, *, rows: float = 200.0, batch: Batch = BATCH) -> tuple[Stages, Stages]:
    return BACKENDS[name](batch, Group(made, ranks), np.asarray(rows))


def seconds(passes: tuple[Stages, Stages]) -> float:
    return float(passes[0].total + passes[1].total)


def test_experts_by_hand() -> None:
    forward, backward = experts(BATCH, Group(cluster(flops_per_s=1.0), 4), np.asarray(200.0))
    assert float(forward) == 6 * 200 * 8 * 32 and float(backward) == 2 * float(forward)
    weights, activations = 3 * 4 * 8 * 32 * 2, 200 * (2 * 8 + 4 * 32) * 2
    forward, backward = experts(BATCH, Group(cluster(memory_bytes_per_s=1.0), 4), np.asarray(200.0))
    assert float(forward) == weights + activations and float(backward) == 2 * float(forward)


def test_the_gate_is_a_product_in_float32() -> None:
    forward, backward = gate(BATCH, Group(cluster(float32_flops_per_s=1.0), 4), 100)
    assert (float(forward), float(backward)) == (2 * 100 * 8 * 16, 4 * 100 * 8 * 16)


def test_all_to_all_by_hand() -> None:
    """Bytes within a node only, a byte a second: counts of 4 experts and a header to 3 ranks, then 3/4 of 200 rows."""
    made = cluster(intra=Link(latency_s=0, bytes_per_s=1.0), host_wait_s=5.0)
    forward, backward = run("all_to_all", made, 4)
    assert float(forward.dispatch) == pytest.approx(3 * 8 * (4 + 3) + 5 + 150 * 16)
    assert float(forward.combine) == float(backward.dispatch) == float(backward.combine) == pytest.approx(150 * 16)


def test_padded_sends_every_place_whatever_the_load() -> None:
    made = cluster(intra=Link(latency_s=0, bytes_per_s=1.0), flops_per_s=1.0)
    even, uneven = run("padded", made, 4), run("padded", made, 4, rows=777.0)
    assert seconds(even) == seconds(uneven)
    assert float(even[0].experts) == 6 * 16 * 20 * 8 * 32
    assert float(even[0].combine) == pytest.approx(3 / 4 * 16 * 20 * 16)


def test_tensor_sliced_moves_one_all_reduce_of_all_tokens_each_way() -> None:
    made = cluster(intra=Link(latency_s=0, bytes_per_s=1.0))
    forward, backward = run("tensor_sliced", made, 4)
    assert float(forward.combine) == pytest.approx(2 * 3 / 4 * 400 * 8 * 4)
    assert float(backward.dispatch) == pytest.approx(2 * 3 / 4 * 400 * 8 * 2)
    assert float(forward.dispatch) == pytest.approx(3 * 8 * 6)  # what ranks compare, and no row


def test_hierarchical_sends_a_token_once_to_each_node() -> None:
    """Two nodes of two ranks, 16 experts, K = 2: counted over all pairs of experts."""
    made = cluster(ranks_per_node=2, inter=Link(latency_s=0, bytes_per_s=1.0))
    pairs = list(combinations(range(16), 2))
    nodes = sum(len({e // 8 for e in pair}) for pair in pairs) / len(pairs)
    forward, _ = run("hierarchical", made, 4)
    counts, ids = 8 * 2 * (1 + 2 * 5 + 3), 200 / 2 * 8
    assert float(forward.dispatch) == pytest.approx(100 * nodes / 2 * 16 + counts + ids)
    near = run("hierarchical", made, 4, batch=replace(BATCH, most_nodes=1))
    assert float(near[0].dispatch) == pytest.approx(100 / 2 * 16 + counts + ids)
    assert float(run("all_to_all", made, 4)[0].dispatch) > 200 / 2 * 16 - 1


@pytest.mark.parametrize(("num_experts", "held", "top_k"), [(16, 4, 2), (8, 8, 1), (256, 1, 8), (6, 5, 3), (4, 0, 2)])
def test_chances_are_those_of_combinations(num_experts: int, held: int, top_k: int) -> None:
    exact = 1 - comb(num_experts - held, top_k) / comb(num_experts, top_k)
    assert chosen_share(num_experts, held, top_k) == pytest.approx(exact)


def test_what_travels_is_what_the_choice_of_auto_counts() -> None:
    """Without arithmetic and memory, on one node, both models are of the same exchanges."""
    line = Line(1e-5, 1e9)
    speeds = Speeds(all_to_all=line, all_gather=line, reduce_scatter=line, host_wait_s=3e-5, flops_per_s=ENDLESS)
    made = cluster(ranks_per_node=8, intra=Link(latency_s=1e-5, bytes_per_s=1e9), inter=None, host_wait_s=3e-5)
    batch = Batch(T=4096, D=512, E=64, K=4, F=64, number_bytes=2, capacity=320)
    sizes = Sizes(
        num_ranks=8, tokens=4096, pairs=4 * 4096, num_experts=64, width=512, bytes_per_element=2, capacity=320
    )
    theirs = costs(sizes, speeds)
    for name in ("all_to_all", "all_gather", "padded"):
        # padded is charged 5% there for refusing batches.
        wanted = theirs[name] / (1.05 if name == "padded" else 1.0)
        assert seconds(run(name, made, 8, rows=4 * 4096.0, batch=batch)) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_more_work_never_takes_less_time(name: str) -> None:
    made = PRESETS["h100-nvl8-ib400"]
    batch = Batch(T=1024, D=512, E=64, K=4, F=256, capacity=80)
    assert made.inter is not None
    slower = made.model_copy(update={"inter": made.inter.model_copy(update={"bytes_per_s": 1e9})})
    later = made.model_copy(update={"intra": made.intra.model_copy(update={"latency_s": 1e-3})})
    for ranks in (8, 16, 64):
        own = seconds(run(name, made, ranks, rows=4096.0, batch=batch))
        for more in ({"T": 2048}, {"D": 1024}, {"F": 512}):
            bigger = replace(batch, **more)
            assert seconds(run(name, made, ranks, rows=float(bigger.N), batch=bigger)) > own
        assert seconds(run(name, made, ranks, rows=5000.0, batch=batch)) >= own
        assert seconds(run(name, slower, ranks, rows=4096.0, batch=batch)) >= own
        assert seconds(run(name, later, ranks, rows=4096.0, batch=batch)) > own


def test_nobody_to_send_to_takes_no_exchange() -> None:
    made = cluster(intra=Link(latency_s=1.0, bytes_per_s=1.0), inter=None)
    for name in BACKENDS:
        assert seconds(run(name, made, 1)) == pytest.approx(0)


def test_the_numbers_of_ppmoe() -> None:
    assert all_to_all_over_ffn(64) == 252
    volta = {"ranks": 8, "flops_per_s": 1.25e14, "bytes_per_s": 3e11, "width": 1000}
    assert allreduce_over_compute(**volta) == pytest.approx(35 / 6)
    assert round(allreduce_over_compute(**volta), 2) == 5.83
    assert bubble(4, 12) == pytest.approx(3 / 15) and bubble_over_ideal(4, 12) == pytest.approx(3 / 12)
    # Of an ideal time M, (P - 1) more: the same wait over the longer time.
    assert bubble_over_ideal(4, 12) / (1 + bubble_over_ideal(4, 12)) == pytest.approx(bubble(4, 12))


def test_its_ring_moves_the_whole_message_in_every_step() -> None:
    """The all-reduce of a library cuts the message in T parts: T times less than Eq. 5 of the paper."""
    made = cluster(ranks_per_node=8, intra=Link(latency_s=0, bytes_per_s=3e11), inter=None, flops_per_s=1.25e14)
    tokens, h = 4096, 1000
    reduce_s = float(Group(made, 8).all_reduce(np.asarray(2.0 * tokens * h)))  # 16 bits
    ffn_s = 2 * 2 * tokens * h * 4 * h / 8 / made.flops_per_s  # h to 4 h and back, an eighth of it on each rank
    paper = allreduce_over_compute(ranks=8, flops_per_s=1.25e14, bytes_per_s=3e11, width=h)
    assert reduce_s / ffn_s == pytest.approx(paper / 8)


def test_the_share_of_communication_is_near_what_ppmoe_measured() -> None:
    """20.7% of a forward out of the 38.2% that its MoE layers take; 65.5 of 82.6 for the all-to-alls of DPMoE. There a
    GPU's part of the 100 Gb/s port of its node is between an eighth and all of it."""
    made = PRESETS["v100-nvl8-ib100"]
    assert made.inter is not None
    batch = Batch(T=2048, D=1024, E=64, K=1, F=4096, capacity=40)

    def share(name: str, which: Cluster, ranks: int) -> float:
        forward, _ = run(name, which, ranks, rows=2048.0, batch=batch)
        return float((forward.dispatch + forward.combine) / forward.total)

    assert share("tensor_sliced", made, 8) == pytest.approx(20.7 / 38.2, abs=0.05)
    eighth = made.model_copy(update={"inter": made.inter.model_copy(update={"bytes_per_s": 1.25e10 / 8})})
    assert share("all_to_all", made, 64) < 65.5 / 82.6 < share("all_to_all", eighth, 64)
