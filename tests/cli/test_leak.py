"""`moerouters leak`: the table, the JSON and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from moerouters import Capabilities, RouteContext, Router, RouterSpec, Selection, registry
from moerouters.cli import app
from moerouters.leaking import command
from moerouters.leaking.report import LeakReport
from moerouters.registry import RouterConfig

QUICK = ["--experts", "4", "--top-k", "1", "--tokens", "12", "--samples", "8", "--repeats", "2"]


class Liar(Router):
    """Follows the next token and declares to be causal."""

    capabilities = Capabilities()
    reads = frozenset()

    def __init__(self, gating: object, config: RouterConfig) -> None:
        super().__init__(gating)  # type: ignore[arg-type]

    def select(self, adjusted_TE: torch.Tensor, ctx: RouteContext) -> Selection:
        return Selection.slots(ctx.need("token_ids_T", router="liar").roll(-1).unsqueeze(1) % 2)


LIAR = RouterSpec(name="liar", api="0.1", summary="Follows the next token.", factory=Liar)


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, ["leak", *arguments])


def test_a_table_and_json(tmp_path: Path) -> None:
    target = tmp_path / "leak.json"
    result = run("topk", "bip:iterations=2", *QUICK, "--seed", "3", "--json", str(target))
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["topk", "0.000", "0.000", "-", "0.000", "1", "yes", "-"] in rows
    assert any(row[:1] == ["bip:iterations=2"] and row[-2:] == ["no", "-"] for row in rows)
    assert "no more than 3.0 can be seen" in " ".join(result.output.split())
    document = json.loads(target.read_text())
    report = LeakReport.model_validate(document)
    assert report.model_dump(mode="json") == document
    assert document["schema_version"] == 1
    assert {name: document["experiment"][name] for name in ("num_experts", "top_k", "tokens", "samples", "seed")} == {
        "num_experts": 4,
        "top_k": 1,
        "tokens": 12,
        "samples": 8,
        "seed": 3,
    }
    topk, bip = report.routers
    assert (topk.label, bip.label) == ("topk", "bip:iterations=2")
    assert topk.bits == 0 and bip.bits > 0
    assert bip.bits == pytest.approx(sum(at.bits for at in bip.positions) / len(bip.positions))


def test_a_setting_for_all_and_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    built = command.build_routers(
        ["bip", "bip:iterations=8,bip:variant=published"], ["iterations=2"], command.make_experiment({})
    )
    assert list(built) == [
        "bip:iterations=2",
        "bip:iterations=8",
        "bip:iterations=2;variant=published",
    ]
    assert [router.config.iterations for router in built.values()] == [2, 8, 2]  # type: ignore[union-attr]


def test_a_router_that_lies_is_told_of() -> None:
    with registry.temporary(LIAR):
        result = run("liar", *QUICK)
    assert result.exit_code == 0, result.output
    assert "liar declares causal=True, and later tokens change its choice" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["topk", "--top-k", "17"], "top_k 17 exceeds experts 16"),
        (["topk", "--tokens", "1"], "tokens"),
        (["topk", "--tokens", "8"], "8 positions need more than 8 tokens"),
        (["topk", "--score", "softmin"], "score"),
        (["topk", "topk"], "'topk' is named twice"),
        (["bip", "--setting", "iterations"], "it is not name=value"),
        (["bip", "--setting", "iteration=3"], "did you mean 'iterations'"),
        (["bipp"], "no router named 'bipp'"),
    ],
)
def test_wrong_usage_says_what_is_wrong(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_without_a_name_there_is_a_usage_error() -> None:
    assert run().exit_code == 2
