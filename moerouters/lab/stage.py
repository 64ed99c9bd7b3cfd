"""The LanguageModel as a pipeline: its blocks in runs, behind the embedding, before the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moerouters.lab.model import LanguageModel, through_blocks
from moerouters.pipeline import StageGraph

TOKENS, NOISE, TARGET = "tokens", "noise", "target"
"""Parts of the batch: int64 [B, S]; int64 [M, n], a noise key for each microbatch; int64 [B, S]."""


class Stage(nn.Module):
    """Some blocks of a model, which keeps them: their parameters have their names there."""

    def __init__(self, model: LanguageModel, layers: range) -> None:
        super().__init__()
        self.layers = layers
        self.embedding = model.embedding if layers.start == 0 else None
        self.blocks = nn.ModuleList([model.blocks[layer] for layer in layers])
        last = layers.stop == len(model.blocks)
        self.norm = model.norm if last else None
        self.head = model.head if last else None
        self.head_size = model.head_size
        self._passes: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """(tokens_BS, noise_1n) in the first stage, (x_BSD, tokens_BS, noise_1n) in others; gives x_BSD or logits."""
        tokens_BS, noise_1n = others if self.embedding is None else (x, *others)
        x_BSD = x if self.embedding is None else self.embedding(tokens_BS)
        key = noise_1n[0] if self.training else None
        ways = zip(self.layers, self.blocks, strict=True)
        x_BSD, assignments, _ = through_blocks(ways, x_BSD, tokens_BS, key, head_size=self.head_size)
        self._passes.append((noise_1n[0, -1], torch.stack([each.load_E for each in assignments])))
        if self.head is None or self.norm is None:
            return x_BSD
        logits_BSV: Tensor = self.head(self.norm(x_BSD))
        return logits_BSV

    def take_loads(self) -> Tensor:
        """int64 [M, layers, E] of all passes since the last call, by the last number of their noise keys."""
        numbers, loads = zip(*self._passes, strict=True)
        self._passes = []
        return torch.stack(loads)[torch.stack(numbers).argsort()]


def stage_graph(num_stages: int) -> StageGraph:
    """Hidden states go from stage to stage; every stage sees tokens, and the key of its noise."""
    names = [*(f"hidden{stage}" for stage in range(num_stages - 1)), "logits"]
    before = [(), *((name,) for name in names)]
    return StageGraph.of(*(((*x, TOKENS, NOISE), name) for x, name in zip(before, names, strict=False)))


def empty_elsewhere(model: LanguageModel, here: set[int]) -> None:
    """Put nothing in the place of blocks that are not `here`, and of the embedding and head beside other blocks."""
    absent = ["embedding"] if 0 not in here else []
    absent += ["norm", "head"] if len(model.blocks) - 1 not in here else []
    for name in absent:
        setattr(model, name, nn.Identity())
    for layer in range(len(model.blocks)):
        if layer not in here:
            model.blocks[layer] = nn.Identity()


def tied_copies(model: nn.Module) -> list[nn.Parameter]:
    """The head's weight where it is the embedding's, which another rank has: it counts there."""
    assert isinstance(model, LanguageModel)
    embedding: nn.Module = model.embedding
    return list(model.head.parameters()) if model.tied_head and not isinstance(embedding, nn.Embedding) else []
