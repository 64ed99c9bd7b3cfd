"""Prefill and decoding of trained models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moerouters.study.contender import Contender
from moerouters.study.inference import Generation, time_inference
from support.lab import small_corpus
from support.study import CPU, PLAN, model

LONG = PLAN.settings.override({"sequence_length": 24})


def test_decoding_from_the_cache_is_decoding_anew(tmp_path: Path) -> None:
    spec = PLAN.models[1]
    trainer = Contender.of(PLAN, spec).trainer(seed=0, corpus=small_corpus(tmp_path), device=CPU)
    generation = Generation(trainer.model, LONG, CPU)
    caches, token_B1 = generation.prefill()
    decoded = generation.decode(caches, token_B1)
    assert decoded.shape == (8, generation.decoded) == (8, 12)
    tokens_BS = torch.cat([generation._tokens_BS, token_B1], dim=1)
    with torch.no_grad():
        for _ in range(12):
            following = trainer.model(tokens_BS).logits_BSV[:, -1:].argmax(dim=-1)
            tokens_BS = torch.cat([tokens_BS, following], dim=1)
    assert torch.equal(tokens_BS[:, -12:], decoded)
    assert torch.equal(generation.decode(caches, token_B1), decoded)  # caches are as before


def test_every_model_is_timed_against_the_dense_one_of_nearest_perplexity(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    rows = [model("dense"), model("other"), model("topk", ratio=1.0)]
    rows = [row.model_copy(update={"settings": row.settings.override({"sequence_length": 24})}) for row in rows]
    specs = (PLAN.models[0], PLAN.models[0], PLAN.models[1])
    nets = {
        row.name: Contender.of(PLAN, spec).trainer(seed=0, corpus=corpus, device=CPU).model
        for row, spec in zip(rows, specs, strict=True)
    }
    prices = {"dense": 6.0, "other": 5.0, "topk": 5.2}
    found = time_inference(nets, rows, prices, device=CPU, rounds=5)
    assert found["topk"].peer == "other" and found["dense"].peer is None
    assert found["topk"].prefill_over_peer is not None and found["other"].decode_over_peer is None
    row = found["topk"]
    assert (row.prompt, row.decoded, row.sequences) == (12, 12, 8)
    assert row.parameters_mib == pytest.approx(sum(p.numel() for p in nets["topk"].parameters()) * 4 / 2**20)
    assert row.cache_mib == pytest.approx(2 * 2 * 1 * 8 * 4 * 8 * 24 / 2**20)  # layers, heads, head size, B, S
    assert row.prefill_peak_mib > row.cache_mib and row.decode_peak_mib > 0
    assert row.prefill_tokens_per_s > 0 and row.decode_tokens_per_s > 0
