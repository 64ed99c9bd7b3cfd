from typing import Any

import pytest
from typer.testing import CliRunner

from moerouters.cli import app
from moerouters.errors import ConfigError
from moerouters.lab import job
from moerouters.lab.presets import preset
from moerouters.lab.protocols import PROTOCOLS, protocol
from moerouters.lab.roster import named_roster


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_router_of_a_protocol_can_be_built_in_its_model(name: str) -> None:
    chosen = protocol(name)
    entrants = named_roster(",".join(chosen.routers), preset(chosen.preset))
    assert tuple(entrant.label for entrant in entrants) == chosen.routers


def test_a_paper_and_its_small_scale_compare_the_same_routers() -> None:
    for experts in (16, 64):
        small, whole = protocol(f"bip-{experts}"), protocol(f"bip-{experts}-paper")
        assert small.routers == whole.routers
        sizes = [(s.num_experts, s.top_k) for s in (preset(small.preset), preset(whole.preset))]
        assert sizes[0] == sizes[1]


def test_a_misspelt_one_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bip-64'"):
        protocol("bip64")


def chosen_by(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> job.CompareOptions:
    taken: list[Any] = []

    def run_compare(options: job.CompareOptions) -> int:
        taken.append(options)
        return 0

    monkeypatch.setattr(job, "run_compare", run_compare)
    done = CliRunner().invoke(app, ["compare", *arguments])
    assert done.exit_code == 0, done.output
    (options,) = taken
    assert isinstance(options, job.CompareOptions)
    return options


def test_the_command_line_takes_what_it_does_not_say_from_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    options = chosen_by(monkeypatch, "--protocol", "bip-64", "--seed", "2")
    assert (options.routers, options.preset) == (",".join(PROTOCOLS["bip-64"].routers), "tiny-64")
    assert options.seeds == (2, 3, 4)
    options = chosen_by(monkeypatch, "--protocol", "bip-64", "--routers", "topk", "--preset", "tiny", "--seeds", "1")
    assert (options.routers, options.preset, options.seeds) == ("topk", "tiny", (0,))


def test_without_one_all_routers_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options = chosen_by(monkeypatch)
    assert (options.routers, options.preset, options.seeds) == (None, "tiny", (0,))
