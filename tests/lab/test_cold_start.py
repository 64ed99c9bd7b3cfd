"""From a cold start on skewed scores: what is routed, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moerouters.lab.cold_start import ColdStart, Recipe, main, run
from moerouters.lab.showcase import fingerprint
from moerouters.metrics import max_violation

SMALL = Recipe(tokens=128, sequences=4, num_experts=8, top_k=2, width=16, steps=6)


def test_batches_are_new_tokens_of_one_world() -> None:
    batches = list(SMALL.batches())
    assert len(batches) == SMALL.steps + 1  # one more, for eval mode
    for again, batch in zip(SMALL.batches(), batches, strict=True):
        assert torch.equal(again.logits_TE, batch.logits_TE)
    assert not torch.equal(batches[0].logits_TE, batches[1].logits_TE)
    means = torch.stack([batch.logits_TE.mean(dim=0) for batch in batches])
    assert means.std(dim=0).max() < 0.5 < means.mean(dim=0).std()  # some experts stay popular
    ctx = batches[2].ctx
    assert ctx.sequence_ids_T is not None and torch.bincount(ctx.sequence_ids_T).tolist() == [32] * 4


def test_every_router_gets_the_same_batches() -> None:
    start = run(SMALL, "loss-free:rate=0.05,bip,topk", machine="one core")
    by_label = {router.label: router for router in start.routers}
    assert list(by_label) == ["topk", "loss-free:rate=0.05", "bip"]  # top-k is there once, and first
    plain = [
        float(max_violation(torch.bincount(batch.logits_TE.topk(2).indices.flatten(), minlength=8)))
        for batch in SMALL.batches()
    ]
    topk, loss_free, bip = by_label.values()
    assert [*topk.max_vio, topk.eval_max_vio] == pytest.approx(plain, abs=1e-4)
    assert topk.kept_score == topk.relative_ms == 1 and topk.experts_per_token == 2
    assert loss_free.max_vio[0] == topk.max_vio[0]  # it learns from the first batch
    assert loss_free.max_vio[-1] < topk.max_vio[-1] and loss_free.eval_max_vio < topk.eval_max_vio
    assert max(bip.max_vio) < 0.25
    assert 0 < bip.kept_score < 1
    assert all(router.ms > 0 for router in start.routers)


def test_record_and_render(tmp_path: Path) -> None:
    source, picture = tmp_path / "start.json", tmp_path / "images" / "start.svg"
    main(["record", str(source), "--machine", "one core", "--routers", "bip", "--steps", "2"])
    start = ColdStart.model_validate_json(source.read_bytes())
    assert (start.machine, start.recipe.steps) == ("one core", 2)
    main(["render", str(source), str(picture)])
    first = picture.read_bytes()
    assert fingerprint(source.read_bytes()) in first.decode()
    main(["render", str(source), str(picture)])
    assert picture.read_bytes() == first
