"""The padded back-end against a loop over pairs in one process, and what it does at its limits."""

from typing import cast

import pytest
import torch
import torch.distributed as dist

from moerouters.dispatch import agreement, exchange, padded
from moerouters.dispatch.all_to_all import AllToAllDispatcher
from moerouters.dispatch.padded import PaddedDispatcher
from moerouters.dispatch.site import Site
from moerouters_conformance.pool import rank_pool

from . import padded_jobs as jobs
from .parity import Case, expect_parity

E = jobs.E

CASES = [
    Case("padded", (5, 5), capacity_factor=1.0),
    Case("padded", (6, 6, 6, 6), capacity_factor=0.5, shared=True),
    Case("padded", (6, 6, 6, 6), capacity_factor=4.0),
    Case("padded", (0, 0), capacity_factor=1.0),
    Case("padded", (4, 3), capacity_factor=1.0),  # a capacity of 1 on both
    Case("padded", (7, 7), load="one_expert", capacity_factor=1.25),
    Case("padded", (7, 7, 7, 7), load="half", top_k=3, capacity_factor=2.0),
    Case("padded", (6, 6), load="holes", capacity_factor=1.0, shared=True),
    Case("padded", (6, 6), capacity_factor=1.0, chunks=3),
    Case("padded", (6, 6), capacity_factor=1.0, kind="pairs"),
    Case("padded", (4, 4), capacity_factor=4.0, kind="dense"),
    Case("padded", (6, 6), capacity_factor=1.0, padding=True, backwards=2),
]


def test_output_and_gradients_are_those_of_one_process() -> None:
    by_rank = rank_pool().run(jobs.steps, CASES)
    for case, results in zip(CASES, zip(*by_rank, strict=True), strict=True):
        expect_parity(case, list(results))


def test_what_was_dropped_is_reported_over_all_ranks() -> None:
    case = Case("padded", (6, 6), load="one_expert", capacity_factor=0.5)
    found = rank_pool().run(jobs.train_one_step, case)
    for first in (0, 2):  # the first choice of six tokens at one expert, which keeps one on each rank
        own = [dropped for dropped, _ in found[first : first + 2]]
        assert min(own) >= 5
        assert [of_all for _, of_all in found[first : first + 2]] == [sum(own)] * 2


def test_ranks_of_one_capacity_may_hold_uneven_tokens_or_none() -> None:
    """Experts give NaN for rows that carry no token: neither results nor gradients see them."""
    ids_of_member = [[[0, 1], [1, E], [3, 0]], []]
    found = rank_pool().run(jobs.uneven_ranks_of_one_capacity, ids_of_member, 3)
    for rank, result in enumerate(found):
        # 2 experts x 2 ranks x 3 places; experts 0 and 1 get two tokens each, expert 2 none, expert 3 one.
        assert result["rows"] == ((12, 3), (12 - 4, 12 - 1)[rank % 2], [6, 6])
        for have, want in zip(result["have"], result["want"], strict=True):
            torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-14)


def test_ranks_that_cannot_agree_and_layers_without_capacity_say_so() -> None:
    cases = [Case("padded", (8, 3), capacity_factor=1.0), Case("padded", (3, 3))]
    (uneven, without), (uneven_on_1, _), *_ = rank_pool().run(jobs.messages, cases)
    assert uneven == (
        "DispatchError: ranks disagree on the capacity of an expert: rank 1 has 1; here it is 2.\n"
        "  from   rank 0 of 2, back-end 'padded'\n"
        "  cause  blocks of one size are exchanged, and a layer computes its capacity from the tokens of its own rank\n"
        "  fix    give every rank the same number of tokens (leave out a last, smaller batch), or choose all_to_all"
    )
    assert "rank 0 has 2; here it is 1" in uneven_on_1 and "rank 1 of 2" in uneven_on_1
    assert without.startswith("ConfigError: the padded back-end got an assignment without a capacity.")
    assert "capacity_factor" in without


def test_more_rows_than_places_raise_and_overwrite_nothing() -> None:
    for message in rank_pool().run(jobs.too_many_rows):
        assert message.startswith("DispatchError: an expert has more rows than its capacity of 2 on rank")
        assert "layer 'block.0', back-end 'padded'" in message


def test_nothing_of_a_known_form_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data raise where somebody looks; so there are no shapes that follow from data either."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # "meta" is no device to it
    monkeypatch.setattr(exchange.dist, "all_to_all_single", lambda *args, **kwargs: None)
    monkeypatch.setattr(agreement, "all_gather_single", lambda *args, **kwargs: None)
    site = Site(cast(dist.ProcessGroup, jobs.GroupOfTwo()), backend="padded")
    dispatcher = PaddedDispatcher(site)
    with monkeypatch.context() as first_batch:
        first_batch.setattr(padded, "expect_agreement", lambda *args: None)
        first_batch.setattr(padded, "_expect_capacity", lambda *args: None)
        jobs.step_without_data(dispatcher)
    arrival = jobs.step_without_data(dispatcher)
    assert arrival.x_RD.shape == (2 * 2 * 3, 3)
    assert arrival.load_e.device.type == "cpu" and arrival.load_e.tolist() == [6, 6]
    with pytest.raises(NotImplementedError, match="no data"):
        jobs.step_without_data(AllToAllDispatcher(site))


def test_a_compiled_layer_gives_the_same_bits() -> None:
    case = Case("padded", (6, 6), capacity_factor=1.0, shared=True)
    for graphs, (compiled, plain) in rank_pool().run(jobs.compiled, case)[:2]:
        assert graphs > 0
        for name, value in plain.items():
            assert torch.equal(compiled[name], value), name
