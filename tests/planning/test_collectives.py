"""Clusters and the time of collectives, by hand and by counting messages rank by rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from moerouters.errors import ConfigError
from moerouters.planning.cluster import PRESETS, Cluster, Link, find_cluster
from moerouters.planning.collectives import Group

INTRA = Link(latency_s=1.0, message_s=0.1, bytes_per_s=100.0)
INTER = Link(latency_s=10.0, message_s=1.0, bytes_per_s=10.0)


def cluster(**changes: object) -> Cluster:
    fields = {"name": "hand", "ranks_per_node": 4, "intra": INTRA, "inter": INTER, "flops_per_s": 1e3}
    return Cluster.model_validate(fields | {"memory_bytes_per_s": 1e3} | changes)


def test_a_message_takes_latency_gaps_and_bytes() -> None:
    assert float(INTRA.seconds(3, np.asarray(50.0))) == pytest.approx(1.0 + 2 * 0.1 + 0.5)
    assert INTRA.seconds(0, np.asarray([50.0, 7.0])).tolist() == [0, 0]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_all_to_all_counted_rank_by_rank(ranks: int) -> None:
    group, each = Group(cluster(), ranks), 30.0
    near = [peer for peer in range(1, ranks) if peer < 4]  # of rank 0, on its own node
    far = [peer for peer in range(1, ranks) if peer >= 4]
    seconds = 0.0
    for peers, link in ((near, INTRA), (far, INTER)):
        if peers:
            one = link.latency_s + sum(link.message_s for _ in peers[1:]) + sum(each / link.bytes_per_s for _ in peers)
            seconds = max(seconds, one)
    assert float(group.all_to_all(np.asarray(each))) == pytest.approx(seconds)


def test_gathers_send_every_byte_once_to_every_node_and_rank() -> None:
    group, each = Group(cluster(), 8), np.asarray(30.0)  # two nodes
    within = 1.0 + 2 * 0.1 + 7 * 30 / 100  # from three neighbours, all that any of the other 7 ranks has
    between = 10.0 + 30 / 10  # one port brings what the rank of its place on the other node has
    assert float(group.all_gather(each)) == pytest.approx(max(within, between))
    assert float(group.reduce_scatter(each)) == float(group.all_gather(each))
    assert float(group.all_reduce(8 * each)) == pytest.approx(2 * float(group.all_gather(each)))
    measured = Group(cluster(efficiency={"all_reduce": 0.5}), 4)
    assert float(measured.all_reduce(np.asarray(400.0))) == pytest.approx(1.2 + 2 * 3 / 4 * 400 / (0.5 * 100))


def test_shares_of_processors_and_efficiencies_slow_bytes_down() -> None:
    slow = Group(cluster(processors=2, efficiency={"all_gather": 0.25}), 4)
    assert float(slow.all_to_all(np.asarray(100.0))) == pytest.approx(1.2 + 300 / 50)
    assert float(slow.all_gather(np.asarray(100.0))) == pytest.approx(1.2 + 300 / 12.5)
    assert cluster(processors=2).share(1) == 1 and cluster().share(99) == 1


def test_arrays_and_single_numbers_agree() -> None:
    group = Group(cluster(), 16)
    rows = np.array([[1.0, 50.0], [7.0, 300.0]])
    for name in ("all_to_all", "all_gather", "all_reduce", "within", "between"):
        run = getattr(group, name)
        assert run(rows).tolist() == [[float(run(np.asarray(value))) for value in row] for row in rows]


def test_worlds_that_fill_no_nodes() -> None:
    with pytest.raises(ConfigError, match="6 ranks cannot be laid on nodes of 4"):
        Group(cluster(), 6)
    with pytest.raises(ConfigError, match=r"(?s)8 ranks.*one node"):
        Group(cluster(inter=None), 8)
    assert Group(cluster(), 3).nodes == 1


def test_clusters_come_from_files(tmp_path: Path) -> None:
    made = cluster(efficiency={"all_reduce": 0.5})
    made.save(tmp_path / "a.json")
    assert find_cluster(str(tmp_path / "a.json")) == made
    (tmp_path / "b.toml").write_text(
        'name = "b"\nranks_per_node = 2\nflops_per_s = 1e12\nmemory_bytes_per_s = 1e11\n'
        "[intra]\nlatency_s = 1e-5\nbytes_per_s = 1e10\n"
    )
    assert find_cluster(str(tmp_path / "b.toml")).intra.bytes_per_s == 1e10
    assert find_cluster("h100-nvl8-ib400") is PRESETS["h100-nvl8-ib400"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"name": "a"}', "ranks_per_node: required"),
        ("a.toml", "name = ", "(?s)cannot read the cluster.*Invalid value"),
        ("missing.json", None, "No such file"),
        ("nothing", None, "there is: h100-nvl8-ib400, v100-nvl8-ib100"),
    ],
)
def test_what_is_no_cluster_is_told(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        find_cluster(name if "." not in name else str(tmp_path / name))


def test_an_efficiency_is_positive() -> None:
    with pytest.raises(ValidationError, match="above 0"):
        cluster(efficiency={"all_reduce": 0.0})
