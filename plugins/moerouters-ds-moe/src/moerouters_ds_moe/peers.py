"""Against dense models: how wide the MLP of one with the same loss would be, and how long its layers take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from moerouters import MoELayer
from moerouters.bench.timing import Ratio, median_of, ratio_of, take_rounds
from moerouters.lab.batches import validation_windows
from moerouters.lab.corpus import Corpus
from moerouters.lab.model import DenseMLP
from moerouters.lab.settings import Settings
from moerouters.lab.train import Trainer
from moerouters_ds_moe.curves import Curve, Rule
from moerouters_ds_moe.modes import sparse, train_dense

TOKENS = 4096
"""Of a timed pass, as whole sequences."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Peer(_Record):
    """A dense model of the same depth and heads, trained as long on the same batches."""

    width: int
    """Of its MLP."""
    loss: float
    """Nats per token on held-out text."""


class Against(_Record):
    """Layers under a rule against the MLPs of a dense model with the same loss: inference, forward."""

    rule: Rule
    loss: float
    part: float
    """Of all parameters, active."""
    width: int
    """Of the MLP that a dense model with this loss has, by interpolation between peers; the best peer's, where none is
    as good."""
    best_peer: float
    """Its loss."""
    tokens: int
    layers_ms: Ratio
    """Of all layers of the model, one after the other, with gate and routing."""
    over_mlps: Ratio
    over_every_expert: Ratio
    """The same layers with every expert active."""


def train_peer(settings: Settings, width: int, corpus: Corpus, *, seed: int) -> Peer:
    """On the CPU."""
    dense = settings.override({"dense_size": width})
    trainer = Trainer(None, seed=seed, settings=dense, corpus=corpus, device=torch.device("cpu"))
    while trainer.step < settings.steps:
        trainer.train_step()
    return Peer(width=width, loss=trainer.validation_loss())


def width_of(loss: float, peers: Sequence[Peer]) -> int | None:
    """The narrowest, on straight lines between neighbours in the logarithm of the width. Where no peer is as good: that
    of the best one. None where all are better."""
    ordered = sorted(peers, key=lambda peer: peer.width)
    for one, two in pairwise(ordered):
        if min(one.loss, two.loss) <= loss <= max(one.loss, two.loss) and one.loss != two.loss:
            share = (loss - one.loss) / (two.loss - one.loss)
            return round(math.exp(math.log(one.width) + share * math.log(two.width / one.width)))
    best = min(peers, key=lambda peer: peer.loss, default=None)
    return best.width if best is not None and loss < best.loss else None


def against(
    trainer: Trainer, curve: Curve, peers: Sequence[Peer], *, share: float = 0.4, rounds: int = 31
) -> Against | None:
    """Time the layers of a trained model under the best rule within this share of its parameters, on hidden states of
    held-out text. None where no rule is within it, or every peer is better."""
    point = curve.best_within(share)
    width = None if point is None else width_of(point.loss, peers)
    if point is None or width is None:
        return None
    everything = train_dense(deepcopy(trainer.model)).eval()
    model = sparse(trainer.model, inference=point.rule.inference, eps=point.rule.eps, top_k=point.rule.top_k)
    states = _hidden_states(trainer)
    mlps = [DenseMLP(trainer.settings.hidden_size, width) for _ in states]

    @torch.no_grad()
    def through(parts: Sequence[nn.Module]) -> None:
        for part, x_TD in zip(parts, states, strict=True):
            part(x_TD)

    runs: dict[str, Sequence[nn.Module]] = {
        "layers": _layers(model),
        "mlps": mlps,
        "every expert": _layers(everything),
    }
    candidates = {name: partial(through, parts) for name, parts in runs.items()}
    taken = take_rounds(candidates, wait=lambda: None, rounds=rounds)
    return Against(
        rule=point.rule,
        loss=point.loss,
        part=curve.part(point),
        width=width,
        best_peer=min(peer.loss for peer in peers),
        tokens=len(states[0]),
        layers_ms=median_of([1e3 * seconds for seconds in taken["layers"]]),
        over_mlps=ratio_of(taken["layers"], taken["mlps"]),
        over_every_expert=ratio_of(taken["layers"], taken["every expert"]),
    )


def _layers(model: nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


@torch.no_grad()
def _hidden_states(trainer: Trainer) -> list[Tensor]:
    """[T, D], what each layer gets for the first held-out windows."""
    settings, found = trainer.settings, []
    windows = validation_windows(
        trainer.corpus.validation, count=max(1, TOKENS // settings.sequence_length), length=settings.sequence_length
    )
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
        for layer in _layers(trainer.model)
    ]
    try:
        trainer.model(windows[:, :-1])
    finally:
        for hook in hooks:
            hook.remove()
    return found
