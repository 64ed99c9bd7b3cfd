"""Generating with the trained models: prefill of whole prompts, then one token at a time from a cache, all in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moerouters.bench.memory import peak_mib
from moerouters.bench.timing import Ratio, median_of, ratio_of, take_rounds, waiting
from moerouters.lab.cache import KeyValueCache
from moerouters.lab.corpus import VOCABULARY
from moerouters.lab.model import LanguageModel
from moerouters.lab.settings import Settings
from moerouters.study.results import Inference, ModelResult

_SEQUENCES = 8
_MOST_DECODED = 16
_MIB = 2**20


class Generation:
    """Greedy decoding of some sequences. Prompts are random bytes: what they say changes no shape."""

    def __init__(self, model: LanguageModel, settings: Settings, device: torch.device) -> None:
        self.model = model.eval()
        self.prompt = max(1, settings.sequence_length - _MOST_DECODED, settings.sequence_length // 2)
        self.decoded = min(_MOST_DECODED, self.prompt)
        self._layers, self._device = settings.num_layers, device
        self._half = settings.bf16 and device.type == "cuda"
        generator = torch.Generator().manual_seed(0)
        self._tokens_BS = torch.randint(VOCABULARY, (_SEQUENCES, self.prompt), generator=generator).to(device)

    @torch.no_grad()
    def prefill(self) -> tuple[list[KeyValueCache], Tensor]:
        """Caches of the prompt, and the token [B, 1] that follows."""
        caches = [KeyValueCache(self.prompt + self.decoded) for _ in range(self._layers)]
        return caches, self._next(self._tokens_BS, caches)

    @torch.no_grad()
    def decode(self, caches: Sequence[KeyValueCache], token_B1: Tensor) -> Tensor:
        """The tokens [B, decoded] after that one, from one prompt's caches, which are as before afterwards."""
        tokens = []
        for _ in range(self.decoded):
            token_B1 = self._next(token_B1, caches)
            tokens.append(token_B1)
        for cache in caches:
            cache.length = self.prompt
        return torch.cat(tokens, dim=1)

    def _next(self, tokens_BS: Tensor, caches: Sequence[KeyValueCache]) -> Tensor:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._half):
            logits_BSV: Tensor = self.model(tokens_BS, caches=caches).logits_BSV
        return logits_BSV[:, -1:].argmax(dim=-1)


def time_inference(
    models: Mapping[str, LanguageModel],
    rows: Sequence[ModelResult],
    perplexities: Mapping[str, float],
    *,
    device: torch.device,
    rounds: int,
) -> dict[str, Inference]:
    """Of each model, with ratios to the dense model of nearest perplexity. rows: of all models, these among them."""
    about = {row.name: row for row in rows if row.name in models}
    generations = {name: Generation(models[name], row.settings, device) for name, row in about.items()}
    decoders = {name: _decoder(generation) for name, generation in generations.items()}
    wait = waiting(device)
    prefills = take_rounds({name: each.prefill for name, each in generations.items()}, wait=wait, rounds=rounds)
    decodes = take_rounds(decoders, wait=wait, rounds=rounds)
    found = {}
    for name, row in about.items():
        peer = _peer(row, about, perplexities)
        prompt, decoded = generations[name].prompt, generations[name].decoded
        found[name] = Inference(
            prompt=prompt,
            decoded=decoded,
            sequences=_SEQUENCES,
            prefill_tokens_per_s=_SEQUENCES * prompt / median_of(prefills[name]).value,
            decode_tokens_per_s=_SEQUENCES * decoded / median_of(decodes[name]).value,
            parameters_mib=sum(p.numel() * p.element_size() for p in models[name].parameters()) / _MIB,
            cache_mib=sum(cache.nbytes for cache in generations[name].prefill()[0]) / _MIB,
            prefill_peak_mib=peak_mib(generations[name].prefill, device),
            decode_peak_mib=peak_mib(decoders[name], device),
            peer=peer,
            prefill_over_peer=_over(prefills, name, peer),
            decode_over_peer=_over(decodes, name, peer),
        )
    return found


def _decoder(generation: Generation) -> Callable[[], object]:
    caches, token_B1 = generation.prefill()
    return lambda: generation.decode(caches, token_B1)


def _peer(row: ModelResult, rows: Mapping[str, ModelResult], perplexities: Mapping[str, float]) -> str | None:
    """The dense model whose perplexity is nearest to that of a MoE model; None of a dense one."""
    dense = [name for name, each in rows.items() if each.router is None and name in perplexities]
    if row.router is None or row.name not in perplexities or not dense:
        return None
    return min(dense, key=lambda name: abs(perplexities[name] - perplexities[row.name]))


def _over(taken: Mapping[str, Sequence[float]], name: str, peer: str | None) -> Ratio | None:
    return None if peer is None else ratio_of(taken[name], taken[peer])
